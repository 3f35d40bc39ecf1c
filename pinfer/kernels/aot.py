"""What to compile of each op without a device: `builds()` of every `<op>/gpu.py` lists it.

The launchers take their block sizes and warps from the same functions, so that what is checked
for spills is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES, FLOATS, INTS = "*u8", "*fp32", "*i32"


@dataclass(frozen=True)
class Build:
    """One specialisation of a Triton kernel: argument types by name, constants, and warps."""

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int

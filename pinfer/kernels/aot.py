"""What to compile of each op without a device: `builds()` of every `<op>/gpu.py` lists it.

The launchers take their block sizes and warps from the same functions, so that what is checked
for spills and for the width of its loads is what runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES, FLOATS, INTS, LONGS = "*u8", "*fp32", "*i32", "*i64"


def interpreting() -> bool:
    """Whether Triton interprets in this process: then nothing can be compiled."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Build:
    """One specialisation of a Triton kernel.

    label:           names it among the builds of its op; tests and reports tell builds apart by it.
    arguments:       types by name of what is passed at run time; pointers count as 16-byte aligned.
    constants:       values by name of its `tl.constexpr` parameters.
    num_warps:       warps of a CTA, and num_stages of its software pipeline, as the launcher passes them.
    multiples_of_16: integer arguments that are multiples of 16 at run time, as the JIT would find.
    wide_share:      the least share of the bytes named by global load instructions that 16-byte loads
                     must carry, on every target, in the loop that loads most or in the whole kernel;
                     None where nothing is promised. Read from the machine code, each instruction
                     once: a load of 16 bytes weighs four of 4.
    warps_of_64:     num_warps where a warp has 64 lanes (AMD); num_warps there too unless given.
    atomics:         whether it may use atomic instructions.
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    multiples_of_16: tuple[str, ...] = ()
    wide_share: float | None = None
    warps_of_64: int | None = None
    atomics: bool = False

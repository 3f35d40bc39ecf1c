"""Named hardware: cards and memories from their data sheets, and the shares of a data sheet that kernels reach.

Cards: NVIDIA's data sheets of each product (memory size, memory bandwidth). A card's "GB" of memory are 2^30
bytes. Memories: channels × 8 bytes × transfers, as JEDEC names them; the EPYC generations have the channels of
AMD's data sheets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pinfer.placement.hardware import Hardware

# Of PCIe x16 by generation, bytes/s: 8, 16, 32 GT/s with 128b/130b coding. Large copies from pinned
# memory reach about 80 % of it.
PCIE_BANDWIDTH = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
PINNED_SHARE = 0.8


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: bytes, bytes/s, the PCIe generation of its x16 link."""

    name: str
    memory_bytes: int
    bandwidth: float
    pcie: int

    @property
    def copy_bandwidth(self) -> float:
        """Bytes/s of a large copy from or to pinned memory."""
        return PINNED_SHARE * PCIE_BANDWIDTH[self.pcie]


@dataclass(frozen=True)
class Memory:
    """A machine's memory, all channels of one socket filled."""

    name: str
    channels: int
    transfers_per_s: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s."""
        return 8 * self.channels * self.transfers_per_s


@dataclass(frozen=True)
class Reach:
    """What is reached of figures as data sheets have them.

    gpu_efficiency, cpu_efficiency: the share of memory bandwidth. sync_s: the hand-over of a layer split over both
    devices. over_prediction: neurons that a predictor names, to those that fire.
    """

    gpu_efficiency: float
    cpu_efficiency: float
    sync_s: float
    over_prediction: float


DERATED = Reach(0.85, 0.75, 60e-6, 1.3)
IDEAL = Reach(1.0, 1.0, 30e-6, 1.0)

GIB = 2**30
CARDS = {
    "2080ti": Card("RTX 2080 Ti", 11 * GIB, 616e9, 3),
    "3090": Card("RTX 3090", 24 * GIB, 936e9, 4),
    "4090": Card("RTX 4090", 24 * GIB, 1008e9, 4),
    "5090": Card("RTX 5090", 32 * GIB, 1792e9, 5),
    "a10040": Card("A100 40GB", 40 * GIB, 1555e9, 4),
    "a10080": Card("A100 80GB", 80 * GIB, 2039e9, 4),
    "h100": Card("H100", 80 * GIB, 3350e9, 5),
    "h200": Card("H200", 140 * GIB, 4800e9, 5),
    "l4": Card("L4", 24 * GIB, 300e9, 4),
}
MEMORIES = {
    "ddr43200": Memory("DDR4-3200", 2, 3.2e9),
    "ddr55600": Memory("DDR5-5600", 2, 5.6e9),
    "ddr56000": Memory("DDR5-6000", 2, 6.0e9),
    "epyc8": Memory("EPYC 8-channel", 8, 3.2e9),  # 7002, 7003: DDR4-3200
    "epyc12": Memory("EPYC 12-channel", 12, 4.8e9),  # 9004: DDR5-4800
}
# Words that say nothing about which card or memory of the table it is.
_NOISE = re.compile(r"nvidia|geforce|rtx|(sxm|hbm)\d*e?|gpu|gib|gb|dual|channels?|memory")
_ALIASES = {"h10080": "h100", "h200141": "h200", "l424": "l4", "309024": "3090", "409024": "4090", "509032": "5090"}
Named = TypeVar("Named", Card, Memory)


def find_card(name: str) -> Card:
    """The card of a name in any spelling (rtx4090, RTX-4090, NVIDIA GeForce RTX 4090); ValueError for none of them."""
    return _find(name, CARDS, "GPU")


def find_memory(name: str) -> Memory:
    """The memory of a name in any spelling (DDR5-5600, ddr5 5600 dual channel, epyc12); ValueError for none of them."""
    return _find(name, MEMORIES, "memory")


def named_hardware(card: Card, cpu_bandwidth: float, reach: Reach = DERATED, memory: str = "memory") -> Hardware:
    """A card beside a machine's memory of so many bytes/s."""
    return Hardware(
        name=f"{card.name} and {memory}",
        gpu_bytes=card.memory_bytes,
        gpu_bandwidth=card.bandwidth,
        cpu_bandwidth=cpu_bandwidth,
        gpu_efficiency=reach.gpu_efficiency,
        cpu_efficiency=reach.cpu_efficiency,
        to_gpu_bandwidth=card.copy_bandwidth,
        to_cpu_bandwidth=card.copy_bandwidth,
        sync_s=reach.sync_s,
    )


def _find(name: str, table: Mapping[str, Named], kind: str) -> Named:
    key = re.sub(r"[^a-z0-9]", "", _NOISE.sub("", name.lower()))
    if (found := table.get(_ALIASES.get(key, key))) is None:
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(one.name for one in table.values())}")
    return found

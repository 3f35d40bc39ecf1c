"""Reads machine code as text (NVIDIA SASS, AMD assembly) into counts: the instruction mix of one kernel.

Widths are those of one thread's instruction: `LDG.E.128` names 16 bytes. Sources: CUDA Binary
Utilities (instruction set reference), LLVM's AMDGPU guide (gfx942).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

WIDE_BYTES = 16

# The first pattern that matches the start of an opcode names its family; the rest is "other".
SASS_FAMILIES = (
    (r"LDGSTS|UBLKCP|UTMALDG", "async_copy"),
    (r"LDG\b|LD\b", "global_load"),
    (r"STG\b|ST\b|UTMASTG", "global_store"),
    (r"LDL", "local_load"),
    (r"STL", "local_store"),
    (r"LDS|LDSM", "shared_load"),
    (r"STS|STSM", "shared_store"),
    (r"ATOM|REDG?\b|REDS|UTMAREDG", "atomic"),
    (r"[HIBDQ]MMA|[HIQB]GMMA|OMMA|UTC.*MMA", "tensor"),
    (r"FFMA", "fma"),
    (r"FADD", "add"),
    (r"FMUL", "mul"),
    (r"I2F|F2I|F2F|I2I|F2IP|I2IP|FRND|HADD2\.F32", "conversion"),  # HADD2.F32 is how a half becomes a float
    (r"HFMA2|HADD2|HMUL2|HSETP2|HSET2|HMNMX2", "half"),
    (r"MUFU", "special"),
    (r"U?POPC", "popc"),
    (r"IDP", "dot"),
    (r"SHFL|REDUX", "shuffle"),
    (r"BAR\b|BARRIER|SYNCS", "barrier"),
    (r"BRA|BRX|JMP|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|BREAK", "branch"),
    (r"IMAD\.MOV|U?MOV|S2U?R|CS2R|R2U?R|U?P2U?R|R2P|U?LDCU?\b", "move"),
    (r"U?(IMAD|IADD3?|LEA|LOP3?|PLOP3|SHF|SHL|SHR|PRMT|SGXT|BMSK|SEL|ISETP|IMNMX|FLO|BREV|IABS|XMAD)", "integer"),
    (r"VI(ADD|MNMX|ADDMNMX)|ISCADD|BFE|BFI", "integer"),
    (r"NOP", "nop"),
)
AMDGCN_FAMILIES = (
    (r"(global|buffer)_load_lds", "async_copy"),
    (r"(global|buffer|flat)_load", "global_load"),
    (r"(global|buffer|flat)_store", "global_store"),
    (r"scratch_load", "local_load"),
    (r"scratch_store", "local_store"),
    (r"(global|buffer|flat)_atomic|ds_(add|sub|inc|dec|min|max|and|or|xor|cmpst|wrxchg|pk_add)_", "atomic"),
    (r"ds_(bpermute|permute|swizzle)|v_permlane|\w+_dpp", "shuffle"),
    (r"ds_(read|load)", "shared_load"),
    (r"ds_(write|store)", "shared_store"),
    (r"v_s?mfmac?_", "tensor"),
    (r"v_(pk_)?(fma|mac|mad)[a-z_]*_f32", "fma"),
    (r"v_(pk_)?(add|sub|subrev)_f32", "add"),
    (r"v_(pk_)?mul(_legacy)?_f32", "mul"),
    (r"v_cvt_", "conversion"),
    (r"v_dot\d", "dot"),
    (r"v_(pk_)?\w+_b?f16", "half"),
    (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f", "special"),
    (r"v_bcnt|s_bcnt", "popc"),
    (r"s_barrier", "barrier"),
    (r"s_(cbranch|branch|endpgm|setpc|swappc)", "branch"),
    (r"[vs]_mov|v_accvgpr|v_readlane|v_readfirstlane|v_writelane|s_load", "move"),
    (r"s_nop", "nop"),
    (r"v_cndmask|v_perm_b32|v_alignb|[vs]_\w+_([bui]\d+|co_\w+)", "integer"),
)
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_SASS_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_AMD_LINE = re.compile(r"^\s+([a-z]+_\w+)\b([^;]*)", re.ASCII)
_LABEL = re.compile(r"^([.\w$]+):")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_WIDTHS = (
    (r"dwordx4|b128", 16),
    (r"dwordx3|b96", 12),
    (r"dwordx2|b64", 8),
    (r"dword|b32", 4),
    (r"[us]?short|[bui]16", 2),
    (r"[us]byte|[ui]8", 1),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it lies, its whole opcode, and where it branches to, in the unit of `address`."""

    address: int
    opcode: str
    operands: str = ""
    target: int | None = None


@dataclass(frozen=True)
class Mix:
    """Counts over the text of one kernel; each instruction once, whatever runs how often.

    total:        instructions, padding (NOP) left out.
    families:     count by family: global_load, fma, integer, ...
    load_widths:  global loads, asynchronous copies to shared memory among them, by their bytes.
    loop:         (instructions, bytes named by global loads) of the loop that loads most, or of the
                  whole kernel where no loop loads.
    loop_widths:  load_widths of that loop, or of the whole kernel.
    flushing:     float32 additions, products and FMAs that take denormal numbers for zero; on AMD, where
                  a mode of the whole kernel decides, all or none.
    """

    total: int
    families: Mapping[str, int]
    load_widths: Mapping[int, int] = field(default_factory=dict)
    loop: tuple[int, int] = (0, 0)
    loop_widths: Mapping[int, int] = field(default_factory=dict)
    flushing: int = 0

    def count(self, *families: str) -> int:
        return sum(self.families.get(name, 0) for name in families)

    @property
    def spills(self) -> int:
        """Instructions that read or write a thread's local memory: LDL and STL, or AMD's scratch."""
        return self.count("local_load", "local_store")

    @property
    def wide_share(self) -> float | None:
        """Of the loop that loads most, where x and the like are loaded once before it; of the whole kernel,
        where the weights are loaded once and a loop goes over tokens; whichever is more."""
        of_loop, of_all = wide_share(self.loop_widths), wide_share(self.load_widths)
        return of_all if of_loop is None or of_all is None else max(of_loop, of_all)

    @property
    def per_byte(self) -> float | None:
        """Instructions for each byte that the loop's loads name; None without global loads."""
        instructions, n_bytes = self.loop
        return instructions / n_bytes if n_bytes else None


def wide_share(load_widths: Mapping[int, int]) -> float | None:
    """Bytes named by loads of 16 bytes or more over the bytes named by all; None without loads."""
    total = sum(width * n for width, n in load_widths.items())
    return sum(width * n for width, n in load_widths.items() if width >= WIDE_BYTES) / total if total else None


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of `nvdisasm`'s listing with numeric branch targets (its raw mode) and byte addresses."""
    result = []
    for address, opcode, operands in _SASS_LINE.findall(text):
        is_branch = opcode.split(".")[0] in ("BRA", "JMP")
        target = _SASS_TARGET.search(operands) if is_branch else None
        place = int(target[1], 16) if target else None
        result.append(Instruction(int(address, 16), opcode, operands.strip(), place))
    return result


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of LLVM's AMDGPU assembly up to the kernel's end; an address is a place in the list."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.split(".amdhsa_kernel")[0].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _AMD_LINE.match(line):
            found.append((instruction[1], instruction[2].strip()))
    return [
        Instruction(at, opcode, operands, labels.get(operands) if "branch" in opcode else None)
        for at, (opcode, operands) in enumerate(found)
    ]


_FLUSHING = re.compile(r"(FFMA|FMUL|FADD)\S*\.FTZ")


def sass_mix(instructions: Iterable[Instruction]) -> Mix:
    listing = list(instructions)
    flushing = sum(bool(_FLUSHING.match(instruction.opcode)) for instruction in listing)
    return replace(_mix(listing, SASS_FAMILIES, _sass_width), flushing=flushing)


def amdgcn_mix(instructions: Iterable[Instruction]) -> Mix:
    return _mix(list(instructions), AMDGCN_FAMILIES, _amdgcn_width)


def _mix(instructions: list[Instruction], table: Sequence[tuple[str, str]], width: Callable[[str], int]) -> Mix:
    families = [_family(instruction.opcode, table) for instruction in instructions]
    loads = [
        width(instruction.opcode) if family in ("global_load", "async_copy") else 0
        for instruction, family in zip(instructions, families, strict=True)
    ]
    counts = Counter(families)
    start, end = _busiest_loop(instructions, loads) or (0, len(instructions))
    in_loop = end - start if end - start < len(instructions) else len(instructions) - counts["nop"]
    n_nops = counts.pop("nop", 0)
    return Mix(
        total=len(instructions) - n_nops,
        families=dict(sorted(counts.items())),
        load_widths=_widths(loads),
        loop=(in_loop, sum(loads[start:end])),
        loop_widths=_widths(loads[start:end]),
    )


def _widths(loads: list[int]) -> dict[int, int]:
    return dict(sorted(Counter(n_bytes for n_bytes in loads if n_bytes).items()))


def _busiest_loop(instructions: list[Instruction], loads: list[int]) -> tuple[int, int] | None:
    """First and last place (exclusive) of the loop, from a backward branch's target to the branch, that loads
    most; the shortest of equals, so that a loop around the busiest one does not hide it."""
    place = {instruction.address: at for at, instruction in enumerate(instructions)}
    best = None
    for end, branch in enumerate(instructions):
        if branch.target is None or branch.target >= branch.address or branch.target not in place:
            continue
        start = place[branch.target]
        n_bytes = sum(loads[start:end])
        if n_bytes and (best is None or (n_bytes, best[0]) > (best[1], end + 1 - start)):
            best, span = (end + 1 - start, n_bytes), (start, end + 1)
    return None if best is None else span


@cache
def _family(opcode: str, table: Sequence[tuple[str, str]]) -> str:
    return next((family for pattern, family in table if re.match(pattern, opcode)), "other")


def _sass_width(opcode: str) -> int:
    """Bytes of a load's opcode; 4 without a width. `LTC128B` is a hint to the L2 cache, not a width."""
    return next((_SASS_WIDTHS[part] for part in opcode.split(".") if part in _SASS_WIDTHS), 4)


def _amdgcn_width(opcode: str) -> int:
    kind = opcode.split("_load_")[1].removeprefix("lds_")
    return next((n_bytes for pattern, n_bytes in _AMD_WIDTHS if re.match(pattern, kind)), 0)

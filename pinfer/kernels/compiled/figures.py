"""The figures of a compiled kernel, and the rules that every kernel is held to."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from pinfer.kernels.compiled.compile import Artifact, disassemble, resource_usage
from pinfer.kernels.compiled.instructions import Instruction, Mix, amdgcn_mix, parse_amdgcn, sass_mix
from pinfer.kernels.compiled.occupancy import LIMITS, Occupancy, occupancy


@dataclass(frozen=True)
class Figures:
    """What one kernel needs on one target.

    registers:     of a thread, 32 bits each; on AMD vector registers with the accumulators.
    stack_bytes:   local memory of a thread, where spilled registers lie.
    shared_bytes:  shared memory of a CTA, static and dynamic.
    scalar_spills: AMD's scalar registers kept in lanes of vector registers: no memory traffic, allowed.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    scalar_spills: int
    mix: Mix
    occupancy: Occupancy


@dataclass(frozen=True)
class Row:
    """One build on one target: what was promised, and its figures or the error that stopped it."""

    op: str
    build: str
    kernel: str
    target: str
    num_warps: int
    num_stages: int
    promised_share: float | None
    atomics_allowed: bool
    figures: Figures | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.build, self.target

    def problems(self) -> list[str]:
        """Each rule that the kernel breaks, with op, build, target and figure; empty for a sound one."""
        name = f"{self.op}: {self.build} on {self.target}"
        if self.figures is None:
            return [f"{name}: does not compile: {self.error}"]
        figures, mix = self.figures, self.figures.mix
        found = []
        if mix.spills:
            found.append(f"{mix.spills} spill instructions")
        if figures.stack_bytes:
            found.append(f"{figures.stack_bytes} bytes of stack a thread")
        if not self.atomics_allowed and mix.count("atomic"):
            found.append(f"{mix.count('atomic')} atomic instructions")
        if mix.flushing:
            found.append(f"{mix.flushing} float32 instructions that flush denormals, which quants are read as")
        share = mix.wide_share or 0.0
        if self.promised_share is not None and share < self.promised_share:
            widths = ", ".join(f"{n} of {width} B" for width, n in mix.load_widths.items())
            found.append(f"wide_share {share:.3f}, promised {self.promised_share:g} (loads: {widths or 'none'})")
        if not figures.occupancy.ctas:
            most = LIMITS[self.target].max_cta_bytes
            found.append(f"no CTA fits an SM ({figures.shared_bytes} shared bytes of {most} at most)")
        return [f"{name}: {problem}" for problem in found]

    def as_json(self) -> dict[str, Any]:
        """Plain values with stable names; ratios rounded to 4 digits."""
        head = {k: v for k, v in vars(self).items() if k not in ("figures", "error")}
        if self.figures is None:
            return head | {"error": self.error}
        figures, mix = self.figures, self.figures.mix
        share, per_byte = mix.wide_share, mix.per_byte
        return head | {
            "registers": figures.registers,
            "stack_bytes": figures.stack_bytes,
            "spill_instructions": mix.spills,
            "scalar_spills": figures.scalar_spills,
            "shared_bytes": figures.shared_bytes,
            "wide_share": None if share is None else round(share, 4),
            "load_widths": {str(width): n for width, n in mix.load_widths.items()},
            "instructions": {"total": mix.total, **mix.families},
            "loop_instructions_per_byte": None if per_byte is None else round(per_byte, 4),
            **{f"occupancy_{name}": value for name, value in asdict(figures.occupancy).items()},
        }


def figures_of(artifacts: list[Artifact]) -> list[Figures]:
    """Figures in the order of the artifacts; each NVIDIA target is disassembled in one go."""
    listings: dict[int, list[Instruction]] = {}
    for target in sorted({artifact.target for artifact in artifacts if artifact.cubin}):
        places = [at for at, artifact in enumerate(artifacts) if artifact.cubin and artifact.target == target]
        listings.update(zip(places, disassemble(target, [artifacts[at].cubin for at in places]), strict=True))
    return [
        _nvidia(artifact, listings[at]) if artifact.cubin else _amd(artifact) for at, artifact in enumerate(artifacts)
    ]


def _nvidia(artifact: Artifact, listing: list[Instruction]) -> Figures:
    usage = resource_usage(artifact.cubin)
    # From sm_90 on, ptxas counts the kilobyte that the system keeps of a CTA's shared memory as static.
    reserved = LIMITS[artifact.target].reserved_bytes if artifact.target == "sm_90" else 0
    shared = artifact.shared_bytes + max(0, usage["SHARED"] - reserved)
    fits = occupancy(artifact.target, usage["REG"], shared, artifact.num_warps)
    return Figures(usage["REG"], usage["STACK"], shared, 0, sass_mix(listing), fits)


def _amd(artifact: Artifact) -> Figures:
    def metadata(name: str) -> int:
        found = re.search(rf"^\s+-?\s*\.{name}:\s+(\d+)", artifact.assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no {name} in the metadata of an AMD kernel")
        return int(found[1])

    registers = metadata("vgpr_count")
    fits = occupancy(artifact.target, registers, artifact.shared_bytes, artifact.num_warps)
    mix = amdgcn_mix(parse_amdgcn(artifact.assembly))
    mode = re.search(r"\.amdhsa_float_denorm_mode_32 (\d)", artifact.assembly)
    if mode is None or int(mode[1]) != 3:  # 3 keeps denormal inputs and outputs
        mix = replace(mix, flushing=mix.total)
    stack = metadata("private_segment_fixed_size")
    return Figures(registers, stack, artifact.shared_bytes, metadata("sgpr_spill_count"), mix, fits)

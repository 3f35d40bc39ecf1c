"""How many CTAs (AMD: workgroups) of a kernel one SM (AMD: CU) can hold at once, from what the kernel needs.

    CTAs = min(threads, slots, registers, shared memory of the SM over those of a CTA), each in its allocation unit

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications) and CUDA's
`cuda_occupancy.h` (allocation units); for AMD the CDNA 3 ISA guide and LLVM's AMDGPU subtarget.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What one SM has.

    warps:           resident warps (AMD: wavefronts).
    ctas:            resident CTAs.
    partitions:      quarters of an SM, each with its own registers.
    registers:       32-bit registers of one partition.
    register_unit:   registers that a warp is given at a time.
    shared_bytes:    shared memory of the SM.
    max_cta_bytes:   the most of it that one CTA may have.
    shared_unit:     bytes of it that a CTA is given at a time.
    reserved_bytes:  what the system keeps of it for each CTA.
    warp_size:       threads of a warp.
    """

    warps: int
    ctas: int
    shared_bytes: int
    max_cta_bytes: int
    partitions: int = 4
    registers: int = 16_384
    register_unit: int = 256
    shared_unit: int = 128
    reserved_bytes: int = KIB
    warp_size: int = 32


LIMITS = {
    "sm_80": Limits(warps=64, ctas=32, shared_bytes=164 * KIB, max_cta_bytes=163 * KIB),  # 2,048 threads
    "sm_86": Limits(warps=48, ctas=16, shared_bytes=100 * KIB, max_cta_bytes=99 * KIB),  # 1,536 threads
    "sm_89": Limits(warps=48, ctas=24, shared_bytes=100 * KIB, max_cta_bytes=99 * KIB),
    "sm_90": Limits(warps=64, ctas=32, shared_bytes=228 * KIB, max_cta_bytes=227 * KIB),
    # MI300: 512 registers a lane and SIMD, given by 8; 8 wavefronts a SIMD; 16 barriers, so 16 workgroups.
    "gfx942": Limits(
        warps=32, ctas=16, shared_bytes=64 * KIB, max_cta_bytes=64 * KIB, registers=512 * 64,
        register_unit=8 * 64, shared_unit=512, reserved_bytes=0, warp_size=64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Occupancy:
    """Resident CTAs and warps of an SM, the warps as a share of the most, and what holds them back."""

    ctas: int
    warps: int
    share: float
    limited_by: str


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Estimate for a kernel of `num_warps` warps a CTA with `registers` a thread and `shared_bytes` a CTA.

    0 CTAs where a CTA asks for more than an SM has: such a kernel cannot be launched.
    """
    limits = LIMITS[target]
    a_warp = _round_up(max(1, registers) * limits.warp_size, limits.register_unit)
    by_registers = limits.registers // a_warp * limits.partitions // num_warps
    a_cta = _round_up(shared_bytes + limits.reserved_bytes, limits.shared_unit)
    fits = shared_bytes <= limits.max_cta_bytes
    bounds = {
        "warps": limits.warps // num_warps,
        "slots": limits.ctas,
        "registers": by_registers,
        "shared": (limits.shared_bytes // a_cta if a_cta else limits.ctas) if fits else 0,
    }
    limited_by = min(bounds, key=lambda name: bounds[name])
    ctas = bounds[limited_by]
    return Occupancy(ctas, ctas * num_warps, round(ctas * num_warps / limits.warps, 4), limited_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

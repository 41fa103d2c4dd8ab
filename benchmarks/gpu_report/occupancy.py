"""How many warps of a kernel a multiprocessor holds at once, from what the kernel takes of it.

NVIDIA: a multiprocessor has four partitions with a register file each, and registers are given to a warp in units. Source: CUDA
C++ Programming Guide, "Technical Specifications per Compute Capability", and the arithmetic of NVIDIA's occupancy calculator
(``cuda_occupancy.h`` of the CUDA toolkit).

AMD CDNA3: the same with SIMDs and waves; vector registers of both kinds come from one file of 512 per lane. Source: "AMD
Instinct MI300" instruction set architecture, and the limits of gfx90a and gfx942 in LLVM (``AMDGPUBaseInfo.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor (AMD: compute unit) has to give."""

    warp_size: int
    most_warps: int
    most_blocks: int
    partitions: int
    registers: int
    """Of a partition: per lane of a warp."""
    register_unit: int
    """Registers of a thread are rounded up to a multiple."""
    shared_bytes: int
    shared_unit: int
    shared_reserved: int
    """Bytes that the system takes in every block."""


def nvidia(most_warps: int, most_blocks: int, shared_kib: int) -> Architecture:
    return Architecture(32, most_warps, most_blocks, 4, 16_384 // 32, 8, shared_kib << 10, 128, 1024)


ARCHITECTURES = {
    "sm_80": nvidia(64, 32, 164),
    "sm_86": nvidia(48, 16, 100),
    "sm_89": nvidia(48, 24, 100),
    "sm_90": nvidia(64, 32, 228),
    "sm_100": nvidia(64, 32, 228),
    "gfx942": Architecture(64, 32, 32, 4, 512, 8, 64 << 10, 512, 0),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    """Of a multiprocessor at once."""
    warps: int
    share: float
    """Of the most warps that it could hold."""
    limited_by: str


def occupancy(target: str, num_warps: int, registers: int, shared_bytes: int, scalar_registers: int = 0) -> Occupancy:
    """Of blocks of `num_warps` warps; registers per thread, shared memory per block, scalar registers per wave (AMD)."""
    limits = ARCHITECTURES[target]
    warps_per_partition = limits.registers // _rounded_up(max(registers, 1), limits.register_unit)
    if target.startswith("gfx"):
        warps_per_partition = min(warps_per_partition, _waves_by_scalar_registers(scalar_registers))
    by = {
        "warps": limits.most_warps // num_warps,
        "registers": limits.partitions * warps_per_partition // num_warps,
        "blocks": limits.most_blocks,
    }
    if shared_bytes:
        by["shared memory"] = limits.shared_bytes // _rounded_up(
            shared_bytes + limits.shared_reserved, limits.shared_unit
        )
    limit = min(by, key=lambda name: by[name])
    blocks = by[limit]
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / limits.most_warps, limit)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _waves_by_scalar_registers(registers: int) -> int:
    """Of a SIMD; LLVM's ``getOccupancyWithNumSGPRs`` for the ninth generation, whose waves are at most 8 here."""
    return 8 if registers <= 100 else 7

"""GPUs that times are modelled for: public figures, each with where it is from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "LATENCY", "Device"]

LATENCY = 1e-6
"""Seconds from a load's issue to its data, under load, in the model.

Unloaded it is 466 cycles on A100 and 479 on H100, a third of this (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
GPU Architecture via Microbenchmarking", arXiv 2402.13499).
"""


@dataclass(frozen=True)
class Device:
    target: str
    """Of the compiler."""
    units: int
    """Multiprocessors, or compute units."""
    clock: float
    """Hz, the highest."""
    bandwidth: float
    """Bytes per second of the device's memory."""
    issued: int
    """Instructions of threads that a unit starts per cycle."""
    fp32: int
    """Of these, additions, multiplications or both at once in single precision."""
    special: int
    """Of these, exponentials, logarithms and reciprocals."""
    source: str

    @property
    def flops(self) -> float:
        """In single precision, two per instruction."""
        return 2 * self.fp32 * self.units * self.clock


NVIDIA_RATES = "instructions per cycle: CUDA C++ Programming Guide, table of arithmetic throughput"
AMD_RATES = (
    "instructions per cycle: AMD CDNA 3 white paper (four SIMDs, a wave of 64 in four cycles each); quarter rate of the special "
    "functions: scheduling model of LLVM (SISchedule.td)"
)

DEVICES = {
    "A100 80GB SXM": Device(
        "sm_80", 108, 1.41e9, 2.039e12, 128, 64, 16, f"NVIDIA A100 data sheet (2,039 GB/s, 19.5 TFLOPS FP32); {NVIDIA_RATES}"
    ),
    "H100 SXM": Device(
        "sm_90", 132, 1.98e9, 3.35e12, 128, 128, 16, f"NVIDIA H100 data sheet (3.35 TB/s, 67 TFLOPS FP32); {NVIDIA_RATES}"
    ),
    "B200": Device(
        "sm_100", 148, 1.98e9, 8e12, 128, 128, 16, f"NVIDIA HGX B200 data sheet (8 TB/s, 75 TFLOPS FP32); {NVIDIA_RATES}"
    ),
    "MI300X": Device(
        "gfx942", 304, 2.1e9, 5.3e12, 64, 64, 16,
        f"AMD Instinct MI300X data sheet (5.3 TB/s; 163.4 TFLOPS FP32 with packed instructions, 81.7 without); {AMD_RATES}",
    ),
}  # fmt: skip

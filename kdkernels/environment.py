"""What this process runs on: versions, processor, devices. Results are worth little without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kdkernels.backends import backends, native

__all__ = ["describe", "device_name", "machine", "package_version"]

PACKAGES = ("kdkernels", "torch", "triton", "numpy", "matplotlib", "liger-kernel")


def package_version(name: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> dict[str, Any]:
    """The instruction set the native kernels use, and all this processor could run; torch's own where they are not built."""
    if native.module is None:
        return {"used": None, "available": [], "torch": torch.backends.cpu.get_cpu_capability()}
    try:
        used = native.module.isa()
    except RuntimeError as error:  # KDKERNELS_CPU_ISA asks for one that is not there
        used = f"none: {error}"
    return {"used": used, "available": list(native.module.isas()), "torch": torch.backends.cpu.get_cpu_capability()}


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"device": "cpu", "name": processor()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


def machine(device: str) -> str:
    """One line to stand beside a measurement made on this device."""
    parts = [device_name(device)]
    if torch.device(device).type == "cpu":
        parts.append(f"{torch.get_num_threads()} threads, {instruction_sets()['used'] or 'no native kernels'}")
    parts.extend(
        f"{name} {package_version(name)}" for name in ("torch", "triton", "kdkernels") if package_version(name)
    )
    return ", ".join(parts)


def describe() -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "backends": {
            name: {"available": status.available, "reason": status.reason} for name, status in backends().items()
        },
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "devices": devices(),
    }

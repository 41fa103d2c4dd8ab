"""The kernels of the compiled CUDA extension, read with cuobjdump; nothing of it runs."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from .matrix import kernel_row
from .objects import Resources, elf_text, resource_usage
from .occupancy import ARCHITECTURES
from .tables import KernelRow

__all__ = [
    "CudaKernel",
    "compiled_kernels",
    "demangled",
    "dtype_of",
    "extension",
    "kernel_rows",
    "parse_bounds",
    "parse_usage",
]

MODULE = "kdkernels._cuda"


@dataclass(frozen=True)
class CudaKernel:
    target: str
    symbol: str
    resources: Resources
    threads: int = 0
    """Of the largest block that it may be launched with, by its launch bounds; 0: not known."""


def extension() -> Path | None:
    """The shared library with the CUDA kernels, if it was built."""
    try:
        found = importlib.util.find_spec(MODULE)
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found is not None and found.origin else None


def parse_usage(text: str) -> list[CudaKernel]:
    """From what ``cuobjdump --dump-resource-usage`` prints: functions in sections of one architecture each."""
    kernels = []
    target = symbol = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line.strip()):
            target = match[1]
        elif match := re.match(r"Function (\S+):$", line.strip()):
            symbol = match[1]
        elif symbol and "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            spilled = numbers["STACK"] + numbers["LOCAL"]
            shared = max(0, numbers["SHARED"] - (ARCHITECTURES[target].shared_reserved if target in RESERVING else 0))
            kernels.append(CudaKernel(target, symbol, Resources(numbers["REG"], spilled, shared, 0, 0, 0, 0, None)))
            symbol = ""
    return kernels


RESERVING = {"sm_90", "sm_100"}
"""Where cuobjdump counts what the system takes of a block's shared memory."""


def demangled(symbols: list[str]) -> dict[str, str]:
    """Names as they are in the source; as they are in the file where there is no c++filt."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not symbols:
        return dict(zip(symbols, symbols, strict=True))
    output = subprocess.run([program], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return dict(zip(symbols, output.splitlines(), strict=True))


def parse_bounds(text: str) -> dict[tuple[str, str], int]:
    """Threads of the largest block by (target, symbol), from what ``cuobjdump --dump-elf`` prints."""
    bounds = {}
    target = symbol = ""
    awaited = False
    for line in map(str.strip, text.splitlines()):
        if match := re.match(r"arch = (sm_\d+)", line):
            target = match[1]
        elif line.startswith("."):
            symbol = line.removeprefix(".nv.info.") if line.startswith(".nv.info.") else ""
        elif line.startswith("Attribute:"):
            awaited = line.endswith("EIATTR_MAX_THREADS")
        elif awaited and symbol and line.startswith("Value:"):
            bounds[target, symbol] = math.prod(int(size, 16) for size in line.split()[1:])
    return bounds


def compiled_kernels(library: Path) -> list[CudaKernel]:
    """Every kernel for every architecture in the library."""
    bounds = parse_bounds(elf_text(str(library)))
    return [
        replace(kernel, threads=bounds.get((kernel.target, kernel.symbol), 0))
        for kernel in parse_usage(resource_usage(str(library)))
    ]


def kernel_rows(library: Path) -> list[KernelRow]:
    """Rows of the kernels; occupancy is that of the largest block, without the dynamic shared memory of a launch."""
    kernels = [kernel for kernel in compiled_kernels(library) if kernel.target in ARCHITECTURES]
    names = demangled(sorted({kernel.symbol for kernel in kernels}))
    rows = []
    for kernel in kernels:
        name = re.sub(r"^void ", "", names[kernel.symbol])
        name = re.sub(r"\(anonymous namespace\)::", "", name)
        short = re.split(r"[<(]", name)[0].split("::")[-1]
        call = re.sub(r"\([^()]*\)$", "", name)
        warps = kernel.threads // ARCHITECTURES[kernel.target].warp_size
        rows.append(kernel_row("CUDA", call, short, dtype_of(name), kernel.target, warps, kernel.resources))
    return rows


def dtype_of(name: str) -> str:
    """Of the template argument that names the logits' type, mangled or not; empty where there is none."""
    if match := re.search(r"_kernelI([df])", name):
        return {"d": "fp64", "f": "fp32"}[match[1]]
    arguments = name.replace("(anonymous namespace)", "").split("(", maxsplit=1)[0]
    for word, dtype in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("double", "fp64"), ("float", "fp32")):
        if word in arguments:
            return dtype
    return ""

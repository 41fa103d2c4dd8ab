"""The rows of the report's tables: what the processes of the program compute, and what follows from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

from .calls import CALLS, COMPILED, COUNTED, DTYPES
from .compilation import TARGETS, CompiledKernel, compile_call, launches_of
from .hardware import DEVICES
from .interpretation import count_call
from .objects import Resources
from .occupancy import ARCHITECTURES, occupancy
from .roofline import Work, model, work_per_logit
from .tables import KernelRow, ModelRow, TrafficRow

__all__ = ["compiled_rows", "kernel_row", "launched", "modelled_rows", "renewed", "tasks", "traffic_rows"]

CallRow = TypeVar("CallRow", KernelRow, TrafficRow)

ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def compiled_rows(call: str, dtype: str, target: str) -> list[KernelRow]:
    """One call's kernels; where it launches one in several versions, the one that takes most registers."""
    wanted = CALLS[call]
    found = compile_call(lambda: wanted.run(DTYPES[dtype], COMPILED), target)
    largest: dict[str, CompiledKernel] = {}
    for kernel in found:
        name = kernel.kernel.removesuffix("_kernel")
        size = kernel.resources.spilled_bytes, kernel.resources.registers
        other = largest.get(name)
        if other is None or size > (other.resources.spilled_bytes, other.resources.registers):
            largest[name] = kernel
    if largest.keys() != set(wanted.kernels):
        raise RuntimeError(f"{call} launches {sorted(largest)}, and its entry says {sorted(wanted.kernels)}")
    rows = []
    for name, kernel in largest.items():
        work = None
        if wanted.streams is not None:
            work = work_per_logit(kernel.loops, ITEMSIZE[dtype], wanted.streams)
        rows.append(kernel_row("Triton", call, name, dtype, target, kernel.num_warps, kernel.resources, work))
    return rows


def launched(target: str) -> dict[str, set[str]]:
    """The kernels that each call launches, none of them compiled; the interpreter lets pass what fails here."""
    return {
        name: {
            launch.kernel.removesuffix("_kernel")
            for launch in launches_of(functools.partial(call.run, DTYPES["fp32"], COUNTED), target)
        }
        for name, call in CALLS.items()
    }


def kernel_row(
    language: str,
    call: str,
    kernel: str,
    dtype: str,
    target: str,
    warps: int,
    resources: Resources,
    work: Work | None = None,
) -> KernelRow:
    held = occupancy(target, warps or 8, resources.registers, resources.shared_bytes, resources.scalar_registers)
    work = work or Work(0.0, 0.0, 0.0, 0)
    return KernelRow(
        language=language,
        call=call,
        kernel=kernel,
        dtype=dtype,
        target=target,
        warps=warps,
        registers=resources.registers,
        spilled_bytes=resources.spilled_bytes,
        scalars_in_lanes=resources.scalars_in_lanes,
        shared_bytes=resources.shared_bytes,
        blocks=held.blocks,
        occupancy=held.share,
        limited_by=held.limited_by,
        instructions=work.instructions,
        arithmetic=work.arithmetic,
        special=work.special,
        bytes_under_way=work.bytes_under_way,
    )


def traffic_rows(call: str, dtype: str) -> list[TrafficRow]:
    """Of one call; in a process where the interpreter is on."""
    wanted = CALLS[call]
    kernels, units = count_call(lambda: wanted.run(DTYPES[dtype], COUNTED))
    kinds = ("loaded", "stored", "arithmetic", "special", "divisions")
    return [
        TrafficRow(call, name.removesuffix("_kernel"), dtype, wanted.unit, *(counts[kind] / units for kind in kinds))
        for name, counts in kernels.items()
    ]


def modelled_rows(kernels: Sequence[KernelRow], traffic: Sequence[TrafficRow]) -> list[ModelRow]:
    """For every device, the calls whose kernels are all sweeps over rows."""
    moved = {(row.call, row.kernel, row.dtype): row for row in traffic}
    rows = []
    for name, device in DEVICES.items():
        threads_of_warp = ARCHITECTURES[device.target].warp_size
        groups: dict[tuple[str, str], list[KernelRow]] = {}
        for row in kernels:
            if row.language == "Triton" and row.target == device.target and CALLS[row.call].streams is not None:
                groups.setdefault((row.call, row.dtype), []).append(row)
        for (call, dtype), members in groups.items():
            if any((call, row.kernel, dtype) not in moved for row in members):
                continue
            times = []
            for row in members:
                bytes_ = moved[call, row.kernel, dtype]
                work = Work(row.instructions, row.arithmetic, row.special, row.bytes_under_way)
                times.append(
                    model(device, bytes_.loaded, bytes_.stored, work, row.blocks * row.warps * threads_of_warp)
                )
            memory, modelled = sum(each.memory for each in times), sum(each.time for each in times)
            slowest = max(times, key=lambda each: each.time / each.memory)
            total = sum(moved[call, row.kernel, dtype].bytes for row in members)
            rows.append(
                ModelRow(name, call, dtype, total, memory * 1e12, modelled * 1e12, modelled / memory, slowest.bound)
            )
    return rows


def renewed(before: Sequence[CallRow], new: Sequence[CallRow]) -> list[CallRow]:
    """Rows of calls: the new ones and, of calls that these are not of, the ones there were, in the order of the calls."""
    order = {name: place for place, name in enumerate(CALLS)}
    computed = {row.call for row in new}
    kept = [row for row in before if row.call in order and row.call not in computed]
    kept += new
    return sorted(kept, key=lambda row: order[row.call])


def tasks(quick: bool, only: str = "") -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(what to compile: call, dtype, target; what to count: call, dtype)."""
    chosen = [call for call in CALLS.values() if (call.brief or not quick) and only in call.name]
    dtypes = ["bf16"] if quick else list(DTYPES)
    typed = [(call.name, dtype) for call in chosen for dtype in dtypes if dtype in call.dtypes]
    compiled = [(*each, target) for each in typed for target in TARGETS]
    counted = [(call.name, dtype) for call in chosen for dtype in call.dtypes if dtype != "fp16"]
    return compiled, counted

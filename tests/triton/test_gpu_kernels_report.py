"""The report's record of the Triton kernels (``docs/gpu``): complete, and kept. `make gpu-report` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_report import cuda_extension, matrix, tables
from gpu_report.calls import CALLS

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "docs" / "gpu"

Worker = Callable[..., Any]


def recorded_kernels() -> dict[tuple[str, ...], tables.KernelRow]:
    rows = tables.read(RECORDED / "kernels.csv", tables.KernelRow)
    return {(row.call, row.kernel, row.dtype, row.target): row for row in rows if row.language == "Triton"}


def recorded_traffic() -> dict[tuple[str, ...], tables.TrafficRow]:
    return {(row.call, row.kernel, row.dtype): row for row in tables.read(RECORDED / "traffic.csv", tables.TrafficRow)}


def test_every_kernel_is_launched_by_a_call() -> None:
    there = {
        name
        for file in (ROOT / "triton_kernels").glob("*.py")
        for name in re.findall(r"^def (\w+)_kernel\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    launched = {name for call in CALLS.values() for name in call.kernels}
    assert there == launched, "benchmarks/gpu_report/calls.py lists what launches the kernels"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_calls_launch_what_their_entries_say(target: str, compiler: Worker) -> None:
    found = compiler(matrix.launched, target)
    assert found == {name: set(call.kernels) for name, call in CALLS.items()}


def test_the_record_is_complete() -> None:
    compiled, counted = matrix.tasks(quick=False)
    wanted = {(call, kernel, *rest) for call, *rest in compiled for kernel in CALLS[call].kernels}
    assert wanted == recorded_kernels().keys(), "run `make gpu-report`"
    wanted = {(call, kernel, *rest) for call, *rest in counted for kernel in CALLS[call].kernels}
    assert wanted == recorded_traffic().keys(), "run `make gpu-report`"


def test_nothing_in_the_record_spills() -> None:
    assert [key for key, row in recorded_kernels().items() if row.spilled_bytes] == []


@pytest.mark.slow
def test_no_installed_cuda_kernel_spills() -> None:
    library = cuda_extension.extension()
    if library is None:
        pytest.skip("kdkernels was installed without its CUDA extension: there was no nvcc")
    assert spilling_kernels(library) == []


def spilling_kernels(library: Path) -> list[str]:
    """Those of a compiled extension, but for kernels in double precision."""
    kernels = cuda_extension.compiled_kernels(library)
    assert kernels
    names = cuda_extension.demangled([kernel.symbol for kernel in kernels])
    return [
        f"{kernel.target}: {names[kernel.symbol]}: {kernel.resources.spilled_bytes} bytes"
        for kernel in kernels
        if kernel.resources.spilled_bytes and cuda_extension.dtype_of(names[kernel.symbol]) != "fp64"
    ]


def check_compiled(compiler: Worker, call: str, dtype: str, target: str) -> None:
    for row in compiler(matrix.compiled_rows, call, dtype, target):
        before = recorded_kernels()[row.call, row.kernel, row.dtype, row.target]
        assert row.spilled_bytes <= before.spilled_bytes, f"{row.kernel}: {row.registers} registers"


def check_counted(interpreter: Worker, call: str, dtype: str) -> None:
    for row in interpreter(matrix.traffic_rows, call, dtype):
        before = recorded_traffic()[row.call, row.kernel, row.dtype]
        assert row.bytes <= before.bytes + 0.005, f"{row.kernel}: {row.bytes:.3f} bytes per {row.unit}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_per_logit_do_not_grow(dtype: str, interpreter: Worker) -> None:
    check_counted(interpreter, "divergence JSD", dtype)


@pytest.mark.slow
def test_the_smallest_kernel_compiles_without_spills(compiler: Worker) -> None:
    check_compiled(compiler, "ranking", "bf16", "sm_90")


COUNTED_BELOW_SECONDS = [
    name for name, call in CALLS.items() if call.family != "pairwise_l1" and not name.endswith("streamed")
]
"""The others take the interpreter many seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("call", COUNTED_BELOW_SECONDS)
def test_bytes_of_other_calls_do_not_grow(call: str, interpreter: Worker) -> None:
    check_counted(interpreter, call, CALLS[call].dtypes[0])


SAMPLED = [
    ("bernoulli KL", "fp16", "sm_80"),
    ("head_mass", "bf16", "sm_100"),
    ("pairwise_l1 16 × 16 rows", "fp32", "gfx942"),
    ("sparse_divergence forward KL, uniform", "bf16", "gfx942"),
    ("topk sample", "fp32", "sm_80"),
]
"""Launches as the backend makes them, where the other tests compile kernels from types and constants of their own."""


@pytest.mark.slow
@pytest.mark.parametrize("launch", SAMPLED, ids="-".join)
def test_launches_compile_without_new_spills(launch: tuple[str, str, str], compiler: Worker) -> None:
    check_compiled(compiler, *launch)

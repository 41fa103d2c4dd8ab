"""Every Triton kernel compiles for every target without a GPU: no register spills, 128-bit loads and stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import aot
import pytest
from aot import TARGETS, Case, Compiled

FORWARD_KL, JSD, SKEW_FORWARD_KL = 0, 3, 4
KINDS = range(10)
SOFT_CROSS_ENTROPY = 10
DIVERGENCE_KERNELS = ("divergence_forward", "divergence_backward")
SPARSE_KERNELS = ("sparse_divergence_forward", "sparse_divergence_backward")
POLICIES = range(5)

Compiler = Callable[..., Any]


def routine() -> list[Case]:
    """Each kernel on each target, each divergence in each kernel, each dtype, and every option at least once."""
    cases = [Case("token_statistics", target, "bf16") for target in TARGETS]
    cases += [Case("token_statistics", target, "fp32", variant="everything", softcap=True) for target in TARGETS]
    cases += [Case("token_statistics", "sm_90", "bf16", variant="student_only")]
    cases += [Case("divergence_backward", "sm_90", "bf16", FORWARD_KL, "student_only")]
    cases += [Case("divergence_forward", "sm_90", "bf16", FORWARD_KL, softcap=True, composed=True)]
    cases += [Case("divergence_backward", "sm_90", "bf16", FORWARD_KL, composed=True)]
    # On AMD this keeps 201 scalar registers in lanes of vector registers, and no register in memory.
    cases += [Case("divergence_forward", "gfx942", "bf16", FORWARD_KL, softcap=True, composed=True)]
    for kernel in DIVERGENCE_KERNELS:
        cases += [Case(kernel, "sm_90", "bf16", kind) for kind in KINDS]
        cases += [Case(kernel, "sm_80", "fp32", kind) for kind in KINDS]
        cases += [Case(kernel, target, "bf16", k) for target in ("sm_100", "gfx942") for k in (FORWARD_KL, JSD)]
        cases += [Case(kernel, "sm_90", dtype, k) for dtype in ("fp16", "fp64") for k in (FORWARD_KL, JSD)]
        cases += [Case(kernel, "sm_100", "fp32", SKEW_FORWARD_KL, "everything", softcap=True)]
        cases += [Case(kernel, "sm_90", "fp32", JSD, "everything", aligned=False)]
        cases += [Case(kernel, "sm_80", "bf16", FORWARD_KL, "everything")]
        cases += [Case(kernel, "sm_90", "fp32", SKEW_FORWARD_KL, "decoupled")]
    for target in TARGETS:
        cases += [Case(kernel, target, "bf16", JSD) for kernel in SPARSE_KERNELS]
    cases += [Case("divergence_forward", "sm_90", "bf16", SOFT_CROSS_ENTROPY)]
    for kernel in SPARSE_KERNELS:
        cases += [Case(kernel, "sm_90", "fp32", FORWARD_KL, "everything", softcap=True)]
        cases += [Case(kernel, "sm_80", "fp64", SKEW_FORWARD_KL)]
        cases += [Case(kernel, "sm_80", "fp32", SKEW_FORWARD_KL, "everything", aligned=False)]
    cases += [
        Case("sparse_divergence_forward", "sm_90", "fp32", kind) for kind in KINDS if kind not in (FORWARD_KL, JSD)
    ]
    cases += [Case("sparse_divergence_forward", "sm_100", "bf16", FORWARD_KL, policy=policy) for policy in POLICIES]
    return cases


def remaining() -> Iterator[Case]:
    """What is left of all divergences x kernels x targets, in one dtype each; `make gpu-report` compiles the others too."""
    done = set(routine())
    for target, dtype in (("sm_100", "bf16"), ("gfx942", "fp32")):
        for kernel in DIVERGENCE_KERNELS:
            for kind in KINDS:
                case = Case(kernel, target, dtype, kind)
                if case not in done:
                    yield case


def check(result: Compiled) -> None:
    assert result.spilled_bytes == 0, f"{result.spilled_bytes} bytes of registers spilled, {result.registers} registers"
    assert result.vector_loads >= result.wanted_vector_loads
    assert result.vector_stores >= result.wanted_vector_stores
    assert result.shuffles_in_loops in (0, None)


SMOKE = [Case(kernel, "sm_90", "bf16", JSD) for kernel in DIVERGENCE_KERNELS]


@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_compiles_without_spills(case: Case, compiler: Compiler) -> None:
    check(compiler(aot.compile_case, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in routine() if case not in SMOKE], ids=str)
def test_routine_cases_compile_without_spills(case: Case, compiler: Compiler) -> None:
    check(compiler(aot.compile_case, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(remaining()), ids=str)
def test_rest_of_the_matrix_compiles_without_spills(case: Case, compiler: Compiler) -> None:
    check(compiler(aot.compile_case, case))


def test_spills_would_be_seen(compiler: Compiler) -> None:
    starved = Case("divergence_backward", "sm_90", "fp32", JSD, maxnreg=24)
    assert compiler(aot.compile_case, starved).spilled_bytes > 0


@pytest.mark.parametrize("kernel", aot.KERNELS)
def test_sizes_and_hyperparameters_never_recompile(kernel: str, compiler: Compiler) -> None:
    strides = ["student_stride", "teacher_stride"]
    numbers = ["student_temperature", "teacher_temperature", "student_softcap", "teacher_softcap"]
    strides += ["grad_student_stride", "grad_teacher_stride"] if kernel.endswith("backward") else []
    numbers += ["a", "b"] if kernel not in ("token_statistics", "sparse_divergence_backward") else []
    if kernel.startswith("sparse"):
        strides, numbers = ([name for name in names if "teacher" not in name] for names in (strides, numbers))
    calls = [
        {
            "vocab_size": size,
            **dict.fromkeys(strides, stride),
            **dict.fromkeys(numbers, number),
            **({"entries": size} if kernel.startswith("sparse") else {}),
        }
        for size, stride, number in [(1, 1, 1.0), (16, 16, 0.5), (151_936, 18_992, 1e-3), (50_257, 2**33 + 1, 0.0)]
    ]
    signatures = compiler(aot.specialisations, kernel, calls)
    assert len(set(signatures)) == 1, signatures

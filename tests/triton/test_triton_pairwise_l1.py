"""The Triton kernels of the family pairwise_l1: in the interpreter against the reference in float64, and compiled."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import accuracy
import aot_transport
import interpreted_transport
import pytest
import torch
from aot import ITEMSIZE, TARGETS
from aot_transport import Case
from kdkernels.triton_kernels.tiling import choose_tiling
from torch import Tensor

Worker = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(student: Tensor, teacher: Tensor, upstream: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the terms that distances and gradients are made from."""
    temperature = options.get("temperature", 1.0)
    x = torch.softmax(student.double() / temperature, -1)
    y = torch.softmax(teacher.double() / options.get("teacher_temperature", temperature), -1)
    weights = upstream.abs()
    return torch.full_like(upstream, 2.0), x * weights.sum(-1, keepdim=True), y * weights.sum(-2).unsqueeze(-1)


def check_rows(interpreter: Worker, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Value and gradients under the accuracy rule."""
    shape = (*student.shape[:-1], teacher.shape[-2])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    call = interpreted_transport.rows
    found: tuple[Tensor, ...] = interpreter(call, "pairwise_l1", (student, teacher), upstream, options)
    single = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    plain = call("pairwise_l1", (student.to(single), teacher.to(single)), upstream, options, "reference")
    truth = call("pairwise_l1", (student.double(), teacher.double()), upstream, options, "reference")
    for place, size in enumerate(sizes(student, teacher, upstream, options)):
        accuracy.check(f"output {place}", found[place], plain[place], truth[place], 2 * size)
    return found


@pytest.mark.slow
def test_pairs_of_rows(interpreter: Worker) -> None:
    check_rows(interpreter, logits(3, 70).float(), logits(5, 70, seed=1).float())


@pytest.mark.slow
@each_dtype
def test_more_rows_than_a_block(interpreter: Worker, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 17, 65).to(dtype), logits(2, 9, 65, seed=1).to(dtype)
    check_rows(interpreter, student, teacher, temperature=0.7, teacher_temperature=1.9)


@pytest.mark.slow
def test_a_vocabulary_of_one_and_one_in_parts(interpreter: Worker) -> None:
    check_rows(interpreter, logits(1, 2, 1).bfloat16(), logits(1, 3, 1).float())
    check_rows(interpreter, logits(1, 2, 4100).float(), logits(1, 3, 4100, seed=1).bfloat16())


@pytest.mark.slow
def test_masked_vocabulary_and_equal_rows(interpreter: Worker) -> None:
    student, teacher = logits(4, 40).float(), logits(4, 40, seed=1).float()
    student[0, 5:9] = -math.inf
    student[1, 3] = 1e4
    teacher[1] = student[2]
    teacher[2, ::2] = torch.finfo(torch.float32).min
    distance, grad_student, grad_teacher = check_rows(interpreter, student, teacher)
    assert distance[2, 1] == 0
    assert (grad_student[0, 5:9] == 0).all()
    assert (grad_teacher[2, ::2] == 0).all()


@pytest.mark.slow
def test_rows_of_nan(interpreter: Worker) -> None:
    student, teacher = logits(3, 40).float(), logits(2, 40, seed=1).float()
    student[1, 7] = math.nan
    (distance,) = interpreter(interpreted_transport.rows, "pairwise_l1", (student, teacher), None, {})
    assert distance[1].isnan().all()
    assert distance[::2].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [None, 500])
def test_heads(interpreter: Worker, memory_budget: int | None) -> None:
    vocab = 70

    def head(rows: int, seed: int, **options: Any) -> dict[str, Any]:
        hidden, weight, bias = (logits(*shape, seed=seed) for shape in ((rows, 6), (vocab, 6), (vocab,)))
        return {"hidden": hidden, "weight": 0.5 * weight, "bias": bias} | options

    heads = head(3, 0, softcap=4.0), head(2, 5, logit_scale=0.6)
    upstream = logits(3, 2, seed=9)
    options = {"memory_budget": memory_budget, "temperature": 1.3}

    def cast(dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
        return tuple({k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in each.items()} for each in heads)

    call = interpreted_transport.head_rows
    found = interpreter(call, "pairwise_l1", cast(torch.float32), upstream, options)
    plain = call("pairwise_l1", cast(torch.float32), upstream, options, "reference")
    truth = call("pairwise_l1", heads, upstream, options, "reference")
    for place, (ours, rough, exact) in enumerate(zip(found, plain, truth, strict=True)):
        size = 4 * exact.abs().max().expand_as(exact)  # of products of matrices: sums over all of a head
        accuracy.check(f"output {place}", ours, rough, exact, size)


def case(kernel: str, target: str, dtype: str, *, cap: bool = False, absent: tuple[str, ...] = ()) -> Case:
    """A kernel with the constants that the launcher gives it."""
    launcher = importlib.import_module("kdkernels.backends.triton.pairwise_l1")
    warp_size = TARGETS[target][2]
    if kernel == "pairwise_l1_forward":
        blocks = {"STUDENT_BLOCK": launcher.BLOCK, "TEACHER_BLOCK": launcher.BLOCK, "LANES": warp_size}
        constants, threads = {"HAS_STUDENT_CAP": cap, "HAS_TEACHER_CAP": cap, **blocks}, launcher.FORWARD_THREADS
    elif kernel == "pairwise_l1_backward":
        blocks = {"OWN_BLOCK": launcher.OWN_BLOCK, "OTHER_BLOCK": launcher.OTHER_BLOCK, "COLUMNS": launcher.COLUMNS}
        constants, threads = {"HAS_OWN_CAP": cap, "HAS_OTHER_CAP": cap, **blocks}, launcher.BACKWARD_THREADS
    else:
        tiling = choose_tiling(151_936, ITEMSIZE[dtype], True, warp_size)
        constants = {"HAS_CAP": cap, "UNROLL": tiling.unroll, "LANES": tiling.lanes, "WIDTH": tiling.width}
        threads = tiling.num_warps * warp_size
    return Case(kernel, target, dtype, tuple(constants.items()), threads // warp_size, absent, "pairwise_l1")


KERNELS = ("pairwise_normalisers", "pairwise_l1_forward", "pairwise_l1_backward")
SMOKE = case("pairwise_l1_forward", "sm_90", "bf16")
CASES = [case("pairwise_l1_forward", target, "fp32") for target in ("sm_80", "sm_100", "gfx942")]
CASES += [case("pairwise_l1_forward", "sm_90", "bf16", cap=True, absent=("signed_mass",))]
CASES += [case("pairwise_l1_backward", target, "bf16") for target in TARGETS]
CASES += [case("pairwise_l1_backward", "sm_90", "fp32", cap=True)]
CASES += [case("pairwise_normalisers", target, "bf16") for target in ("sm_80", "gfx942")]


@pytest.mark.slow
def test_compiles_without_spills(compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, SMOKE)["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_compile_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_and_hyperparameters_never_recompile(kernel: str, compiler: Worker) -> None:
    signatures = compiler(aot_transport.specialisations, "pairwise_l1", kernel)
    assert len(set(signatures)) == 1, signatures

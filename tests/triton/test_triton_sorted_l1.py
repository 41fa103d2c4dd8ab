"""The Triton kernel of the family sorted_l1: in the interpreter against the reference in float64, and compiled."""

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


def check_rows(interpreter: Worker, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Value and gradients under the accuracy rule."""
    upstream = torch.randn(student.shape[:-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    call = interpreted_transport.rows
    found: tuple[Tensor, ...] = interpreter(call, "sorted_l1", (student, teacher), upstream, options)
    single = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    plain = call("sorted_l1", (student.to(single), teacher.to(single)), upstream, options, "reference")
    truth = call("sorted_l1", (student.double(), teacher.double()), upstream, options, "reference")
    temperature = options.get("temperature", 1.0)
    column = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    q = torch.softmax(student.double() / column, -1)
    p = torch.softmax(teacher.double() / options.get("teacher_temperature", column), -1)
    weights = upstream.abs().unsqueeze(-1)
    for place, size in enumerate((torch.full_like(upstream, 2.0), q * weights, p * weights)):
        accuracy.check(f"output {place}", found[place], plain[place], truth[place], 4 * size)
    return found


@pytest.mark.slow
def test_rows(interpreter: Worker) -> None:
    check_rows(interpreter, logits(2, 70).float(), logits(2, 95, seed=1).float())


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(1, 1), (300, 131), (70, 600)])
def test_vocabularies(interpreter: Worker, dtype: torch.dtype, student_vocab: int, teacher_vocab: int) -> None:
    student, teacher = logits(3, student_vocab).to(dtype), logits(3, teacher_vocab, seed=1).to(dtype)
    temperatures = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    check_rows(interpreter, student, teacher, temperature=temperatures, teacher_temperature=1.3)


@pytest.mark.slow
def test_equal_rows_masked_vocabulary_and_tokens(interpreter: Worker) -> None:
    student, teacher = logits(5, 90).float(), logits(5, 90, seed=1).float()
    teacher[1] = student[1].flip(0)
    student[2, ::3] = -math.inf
    teacher[3] = 0.0  # ties
    student[4, 0] = math.nan  # not in the mask
    mask = torch.tensor([True, True, True, True, False])
    upstream = torch.ones(5)
    call = interpreted_transport.rows
    value, grad_student, grad_teacher = interpreter(call, "sorted_l1", (student, teacher), upstream, {"mask": mask})
    assert value[1] == value[4] == 0
    for gradient in (grad_student, grad_teacher):
        assert (gradient[1] == 0).all()
        assert (gradient[4] == 0).all()
        assert gradient.isfinite().all()
    assert (grad_student[2, ::3] == 0).all()
    check_rows(interpreter, student[:4], teacher[:4])


@pytest.mark.slow
def test_bound_and_no_rows(interpreter: Worker) -> None:
    student, teacher = logits(2, 70).float(), logits(2, 95, seed=1).float()
    (bounded,) = interpreter(interpreted_transport.rows, "sorted_l1", (student, teacher), None, {"error_bound": 1e-2})
    truth = interpreted_transport.rows("sorted_l1", (student.double(), teacher.double()), None, {}, "reference")[0]
    torch.testing.assert_close(bounded.double(), truth, rtol=0, atol=1e-6)
    value, *gradients = interpreter(
        interpreted_transport.rows, "sorted_l1", (student[:0], teacher[:0]), torch.ones(0), {}
    )
    assert value.shape == (0,)
    assert [tuple(each.shape) for each in gradients] == [(0, 70), (0, 95)]


@pytest.mark.slow
def test_heads(interpreter: Worker) -> None:
    def head(vocab: int, seed: int, **options: Any) -> dict[str, Any]:
        hidden, weight, bias = (logits(*shape, seed=seed) for shape in ((3, 6), (vocab, 6), (vocab,)))
        return {"hidden": hidden, "weight": 0.5 * weight, "bias": bias} | options

    heads = head(80, 0, softcap=4.0), head(70, 5)

    def cast(dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
        return tuple({k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in each.items()} for each in heads)

    upstream, call = logits(3, seed=9), interpreted_transport.head_rows
    found = interpreter(call, "sorted_l1", cast(torch.float32), upstream, {"memory_budget": 1})
    plain = call("sorted_l1", cast(torch.float32), upstream, {}, "reference")
    truth = call("sorted_l1", heads, upstream, {}, "reference")
    for place, (ours, rough, exact) in enumerate(zip(found, plain, truth, strict=True)):
        size = 4 * exact.abs().max().expand_as(exact)  # of products of matrices: sums over all of a head
        accuracy.check(f"output {place}", ours, rough, exact, size)


def case(target: str, dtype: str, *, cap: bool = False, absent: tuple[str, ...] = ()) -> Case:
    """The kernel with the constants that the launcher gives it."""
    launcher = importlib.import_module("kdkernels.backends.triton.sorted_l1")
    tiling = choose_tiling(151_936, ITEMSIZE[dtype], True, TARGETS[target][2])
    constants = {"HAS_STUDENT_CAP": cap, "HAS_TEACHER_CAP": cap, "UNROLL": launcher.UNROLL, "LANES": tiling.lanes}
    return Case("sorted_l1", target, dtype, tuple(constants.items()), tiling.num_warps, absent, "sorted_l1")


SMOKE = case("sm_90", "bf16")
CASES = [case(target, "fp32") for target in ("sm_80", "sm_100", "gfx942")]
CASES += [case("gfx942", "bf16", absent=("grad_student", "student_order")), case("sm_80", "bf16", cap=True)]


@pytest.mark.slow
def test_compiles_without_spills(compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, SMOKE)["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_compile_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.slow
def test_sizes_and_hyperparameters_never_recompile(compiler: Worker) -> None:
    signatures = compiler(aot_transport.specialisations, "sorted_l1", "sorted_l1")
    assert len(set(signatures)) == 1, signatures

"""The Triton kernel of the family bernoulli: in the interpreter against the reference in float64, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accuracy
import aot_transport
import interpreted_sigmoids_and_heads as interpreted_rows
import pytest
import torch
from aot import ITEMSIZE, TARGETS
from aot_transport import Case
from kdkernels.triton_kernels.tiling import choose_tiling

from kdkernels.backends.bernoulli import BernoulliForm

Worker = Callable[..., Any]
FORMS = [
    ("cross_entropy", False, torch.float32),
    ("kl", False, torch.bfloat16),
    ("half", False, torch.float32),
    ("cross_entropy", True, torch.float64),
    ("kl", True, torch.float32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "probabilities", "dtype"), FORMS)
def test_rows(interpreter: Worker, form: str, probabilities: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, 85, generator=generator, dtype=torch.float64)
    if probabilities:
        teacher = torch.sigmoid(teacher)
    student, teacher, upstream = student.to(dtype), teacher.to(dtype), torch.tensor([1.0, -0.4, 2.0])
    options: dict[str, Any] = {
        "form": form,
        "probabilities": probabilities,
        "temperature": torch.tensor([0.7, 1.0, 3.0]),
    }
    single = torch.float64 if dtype == torch.float64 else torch.float32
    found = interpreter(interpreted_rows.bernoulli, student, teacher, upstream, options)
    plain = interpreted_rows.bernoulli(student.to(single), teacher.to(single), upstream, options, "reference")
    options["temperature"] = options["temperature"].double()
    truth = interpreted_rows.bernoulli(student.double(), teacher.double(), upstream, options, "reference")
    accuracy.check("values", found[0], plain[0], truth[0], student.double().abs().sum(-1))
    slope = (upstream.abs() / options["temperature"]).unsqueeze(-1).expand_as(truth[1])
    accuracy.check("gradient", found[1], plain[1], truth[1], slope)


@pytest.mark.slow
def test_masked_vocabulary_and_tokens(interpreter: Worker) -> None:
    student, teacher = torch.linspace(-9, 9, 120).view(3, 40), torch.linspace(5, -5, 120).view(3, 40).clone()
    student[0, ::3], teacher[0, ::3] = -math.inf, -math.inf
    student[1] = math.nan
    options = {"mask": torch.tensor([True, False, True]), "form": "kl"}
    value, gradient = interpreter(interpreted_rows.bernoulli, student, teacher, torch.ones(3), options)
    expected, right = interpreted_rows.bernoulli(
        student.double(), teacher.double(), torch.ones(3), options, "reference"
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-6)
    assert bool((gradient[1] == 0).all())
    assert bool((gradient[0, ::3] == 0).all())


def case(target: str, dtype: str, form: BernoulliForm, *, cap: bool = False) -> Case:
    tiling = choose_tiling(151_936, ITEMSIZE[dtype], True, TARGETS[target][2])
    constants = {"HAS_STUDENT_CAP": cap, "HAS_TEACHER_CAP": cap, "FORM": int(form), "UNROLL": tiling.unroll}
    constants |= {"LANES": tiling.lanes, "WIDTH": tiling.width}
    return Case("bernoulli", target, dtype, tuple(constants.items()), tiling.num_warps, (), "bernoulli")


CASES = [case("sm_90", "bf16", BernoulliForm.KL, cap=True), case("gfx942", "fp32", BernoulliForm.HALF)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.slow
def test_sizes_and_hyperparameters_never_recompile(compiler: Worker) -> None:
    assert len(set(compiler(aot_transport.specialisations, "bernoulli", "bernoulli"))) == 1

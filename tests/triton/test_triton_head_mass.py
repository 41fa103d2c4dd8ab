"""The Triton kernel of the family head_mass: in the interpreter against the reference, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import aot_transport
import interpreted_sigmoids_and_heads as interpreted_rows
import pytest
import torch
from aot import ITEMSIZE, TARGETS
from aot_transport import Case
from kdkernels.triton_kernels.tiling import choose_tiling
from torch import Tensor

Worker = Callable[..., Any]


def check(interpreter: Worker, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = interpreter(interpreted_rows.head_mass, student, teacher, options)
    expected = interpreted_rows.head_mass(student.double(), teacher.double(), options, "reference")
    assert torch.equal(found[0].double(), expected[0])
    for ours, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=1e-6)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("crossing", [False, True], ids=["", "crossing"])
def test_rows(interpreter: Worker, dtype: torch.dtype, crossing: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, 6, 145, generator=generator, dtype=torch.float64)).to(dtype)
    teacher[3] = 0.0
    teacher[4, ::2] = -math.inf
    teacher[5] = torch.arange(145) % 2
    mass = torch.tensor([0.5, 0.0, 1.0, 0.4, 0.8, 0.6])
    check(interpreter, student, teacher, mass=mass, crossing=crossing, temperature=1.3)


@pytest.mark.slow
def test_rows_that_do_not_count_and_rows_without_a_distribution(interpreter: Worker) -> None:
    student, teacher = torch.linspace(-3, 3, 90).view(3, 30), torch.linspace(4, -4, 90).view(3, 30).clone()
    teacher[1, 3], student[2, 5] = math.nan, math.nan
    options = {"mass": 0.5, "mask": torch.tensor([True, True, True])}
    threshold, head, tail = interpreter(interpreted_rows.head_mass, student, teacher, options)
    assert threshold.isnan().tolist() == [False, True, False]
    assert head.isnan().tolist() == tail.isnan().tolist() == [False, True, True]
    options["mask"] = torch.tensor([True, False, False])
    _, head, tail = interpreter(interpreted_rows.head_mass, student, teacher, options)
    assert (head[1:] == 0).all()
    assert (tail[1:] == 0).all()


def case(target: str, dtype: str, *, cap: bool = False) -> Case:
    tiling = choose_tiling(151_936, ITEMSIZE[dtype], True, TARGETS[target][2])
    constants = {"HAS_STUDENT_CAP": cap, "HAS_TEACHER_CAP": cap, "CROSSING": cap, "UNROLL": tiling.unroll}
    constants |= {"LANES": tiling.lanes, "WIDTH": tiling.width}
    return Case("head_mass", target, dtype, tuple(constants.items()), tiling.num_warps, (), "head_mass")


CASES = [case("sm_90", "bf16", cap=True), case("gfx942", "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.slow
def test_sizes_and_hyperparameters_never_recompile(compiler: Worker) -> None:
    assert len(set(compiler(aot_transport.specialisations, "head_mass", "head_mass"))) == 1

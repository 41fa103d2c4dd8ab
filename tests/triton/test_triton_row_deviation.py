"""The Triton kernels of the family row_deviation: in the interpreter against the definition in float64, and compiled."""

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
from torch import Tensor

pytestmark = pytest.mark.slow

Worker = Callable[..., Any]


def noise(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("columns", [1, 37, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moments_and_gradient(interpreter: Worker, dtype: torch.dtype, columns: int) -> None:
    logits = noise(5, columns + 3, dtype, 0)[:, :columns]
    logits[1] *= 1e-3
    logits[2] += 50  # the squares of what lies far from 0 would cancel
    logits[3] = 2.5
    gradient = noise(5, columns, dtype, 1) + logits
    found = interpreter(interpreted_rows.row_deviation, logits, gradient, 1e-7)
    plain = interpreted_rows.row_deviation(logits, gradient, 1e-7, "reference")
    truth = interpreted_rows.row_deviation(logits.double(), gradient.double(), 1e-7, "reference")
    assert columns == 1 or not torch.allclose(truth[2], gradient.double(), rtol=0.1)  # it is changed
    for name, ours, other, right in zip(("means", "deviations", "gradient"), found, plain, truth, strict=True):
        accuracy.check(name, ours, other, right, torch.maximum(right.abs(), gradient.abs().max().double()))
    assert found[1][3] == torch.tensor(1e-7, dtype=found[1].dtype)  # the least, of equal logits


def test_rows_without_a_deviation(interpreter: Worker) -> None:
    logits = noise(4, 300, torch.float32, 2)
    logits[1, 7], logits[2, 299] = math.nan, -math.inf
    _, deviations, gradient = interpreter(interpreted_rows.row_deviation, logits, torch.ones(4, 300), 1e-7)
    assert deviations.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


def test_the_loss(interpreter: Worker) -> None:
    student, teacher = noise(4, 45, torch.float32, 3), noise(4, 45, torch.float32, 4)
    found = interpreter(interpreted_rows.standardised, student, teacher)
    truth = interpreted_rows.standardised(student.double(), teacher.double(), "reference")
    for ours, right in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6 * float(right.abs().max()))


def case(target: str, dtype: str, kernel: str, aligned: bool = True) -> Case:
    tiling = choose_tiling(151_936, ITEMSIZE[dtype], aligned, TARGETS[target][2])
    constants = {"UNROLL": tiling.unroll, "LANES": tiling.lanes, "WIDTH": tiling.width}
    return Case(kernel, target, dtype, tuple(constants.items()), tiling.num_warps, (), "row_deviation")


CASES = [
    case("sm_90", "fp64", "row_deviation"),
    case("gfx942", "fp32", "row_deviation", aligned=False),
    case("sm_80", "fp64", "row_deviation_backward", aligned=False),
]
"""Beside those that the record of the GPU kernels holds."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.parametrize("kernel", ["row_deviation", "row_deviation_backward"])
def test_sizes_and_hyperparameters_never_recompile(kernel: str, compiler: Worker) -> None:
    assert len(set(compiler(aot_transport.specialisations, "row_deviation", kernel))) == 1

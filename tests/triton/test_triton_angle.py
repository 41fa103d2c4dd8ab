"""The Triton kernels of the family angle: in the interpreter against those of the CPU and the reference, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import aot_transport
import interpreted_relation
import pytest
import torch
from aot import TARGETS
from aot_transport import Case
from torch import Tensor

from kdkernels.backends.cpu.angle import angle as native
from kdkernels.backends.triton.angle import THREADS, TILE

pytestmark = pytest.mark.slow

Worker = Callable[..., Any]


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side_of(points: Tensor) -> tuple[Tensor, Tensor]:
    squares = torch.cdist(points, points).square().fill_diagonal_(torch.inf)
    return points @ points.T, squares.rsqrt()


@pytest.mark.parametrize("count", [3, 19])
def test_sums(interpreter: Worker, count: int) -> None:
    """Some cosines differ by more than 1."""
    sides = side_of(points(count, 3, seed=1)), side_of(points(count, 2, seed=2))
    corners = torch.arange(count)[torch.arange(count) != 1]
    for ours, right in zip(
        interpreter(interpreted_relation.angle, sides, corners), native(*sides, corners), strict=True
    ):
        assert float(right.abs().max()) > 0
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13 * float(right.abs().max()))


def test_no_corners_and_what_is_not_a_number(interpreter: Worker) -> None:
    gram, lengths = side_of(points(4, 3, seed=1))
    for part in interpreter(interpreted_relation.angle, ((gram, lengths),) * 2, torch.zeros(0, dtype=torch.int64)):
        assert not bool(part.any())
    gram[2, 1] = gram[1, 2] = math.nan
    sides = (gram, lengths), side_of(points(4, 3, seed=2))
    losses, _, _ = interpreter(interpreted_relation.angle, sides, torch.arange(4))
    assert bool(losses.isnan().any())


def test_near_and_coinciding_points(interpreter: Worker) -> None:
    student, teacher = points(7, 4, seed=1).float(), points(7, 3, seed=2).float()
    student[1] = student[0] + 1e-5 * points(1, 4, seed=3)[0]
    teacher[4] = teacher[5]
    call = interpreted_relation.results
    loss, gradient = interpreter(call, "angle_loss", [student, teacher], {})
    truth = call("angle_loss", [student.double(), teacher.double()], {}, "reference")
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=0)
    size = truth[1].norm(dim=-1, keepdim=True)  # a near neighbour makes some gradients very large
    torch.testing.assert_close(gradient.double() / size, truth[1] / size, rtol=0, atol=1e-6)


def test_compiles_without_spills(compiler: Worker) -> None:
    """The one that takes more registers, where programs have half as many warps."""
    warps = THREADS // TARGETS["gfx942"][2]
    case = Case("angle_sums", "gfx942", "fp64", (("TILE", TILE),), warps, family="angle")
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.parametrize("kernel", ["angle_gradient", "angle_sums"])
def test_sizes_never_recompile(kernel: str, compiler: Worker) -> None:
    assert len(set(compiler(aot_transport.specialisations, "angle", kernel))) == 1

"""``kd.angle_loss`` against loops over triples, in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import check
from loss_cases import copy, noise
from torch import Tensor

import kdkernels as kd


def unit(leg: Tensor) -> Tensor:
    return leg / leg.norm() if bool(leg.detach().any()) else leg * 0


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    count = student.shape[0]
    terms = []
    for j in range(count):
        for i in range(count):
            for k in range(count):
                cosines = [unit(e[i] - e[j]) @ unit(e[k] - e[j]) for e in (student, teacher)]
                x = (cosines[0] - cosines[1]).abs()
                terms.append(torch.where(x < 1, x * x / 2, x - 0.5))
    return torch.stack(terms).mean()


def points(case: str, count: int = 6) -> tuple[Tensor, Tensor]:
    student, teacher = noise(count, 4, seed=1) + 20, noise(count, 6, seed=2)
    if case == "near":
        student[1] = student[0] + 1e-9 * noise(4, seed=3)
        student[2] = student[0] + 1e-9 * noise(4, seed=4)
        teacher[5] = teacher[3] + 1e-8 * noise(6, seed=5)
    if case == "coinciding":
        student[1] = student[0]
        teacher[5] = teacher[2] = teacher[3]
    return student, teacher


def agree(found: Tensor, expected: Tensor, mine: Tensor, true: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    ours, right = torch.autograd.grad(found, mine)[0], torch.autograd.grad(expected, true)[0]
    assert float(right.abs().max()) > 0
    size = right.norm(dim=-1, keepdim=True)  # a near neighbour makes some gradients very large
    torch.testing.assert_close(ours.double() / size, right / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["apart", "near", "coinciding"])
def test_value_and_gradient(case: str, backend: str) -> None:
    student, teacher = points(case)
    mine, true = copy(student), copy(student)
    # What a difference of points at 20 from the origin has lost, loses the formula, too.
    agree(
        kd.angle_loss(mine, teacher, backend=backend),
        plain(true, teacher),
        mine,
        true,
        1e-6 if case == "near" else 1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    student, teacher = (side.to(dtype) for side in points("near", 6))
    leaves = [copy(student, each) for each in (dtype, torch.float32, torch.float64)]
    values = [
        kd.angle_loss(leaves[0], teacher),
        kd.reference.angle_loss(leaves[1], teacher.float()),
        plain(leaves[2], teacher.double()),
    ]
    check("the value", *(value.reshape(1) for value in values))
    gradients = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)]
    check("the gradient", *gradients)


def test_derivatives() -> None:
    student, teacher = points("apart", 4)
    assert torch.autograd.gradcheck(kd.reference.angle_loss, (copy(student), teacher))
    assert torch.autograd.gradgradcheck(kd.angle_loss, (copy(student), teacher))


def test_not_a_number_shows() -> None:
    student, teacher = points("apart")
    student[2, 1] = torch.nan
    assert bool(kd.angle_loss(student, teacher).isnan())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_points(count: int) -> None:
    student = copy(noise(count, 3, seed=1))
    loss = kd.angle_loss(student, noise(count, 2, seed=2))
    loss.backward()
    assert abs(loss.item()) < 1e-30
    assert student.grad is not None
    assert bool((student.grad.abs() < 1e-15).all())


@pytest.mark.slow
def test_operator() -> None:
    from kdkernels.ops.angle import angle_op

    student, teacher = points("apart")
    mine, plainly = copy(student), copy(student)
    torch.library.opcheck(angle_op, (mine, teacher, "cpu"))
    compiled = torch.compile(kd.angle_loss, fullgraph=True, backend="aot_eager")
    agree(compiled(mine, teacher), kd.angle_loss(plainly, teacher), mine, plainly, 1e-12)


def test_threads_do_not_matter() -> None:
    student, teacher = points("apart", 45)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mine = copy(student)
        loss = kd.angle_loss(mine, teacher)
        results.append([loss.detach(), torch.autograd.grad(loss, mine)[0]])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-16)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"student must have the shape \[B, d\]"):
        kd.angle_loss(torch.ones(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="as many points"):
        kd.angle_loss(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(TypeError, match=r"teacher must be a torch\.Tensor"):
        kd.angle_loss(torch.ones(3, 2), None)  # type: ignore[arg-type]

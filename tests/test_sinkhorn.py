"""``kd.sinkhorn`` against POT, linear programming, closed forms, and an eager loop that autograd goes through."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accuracy import complaint
from test_operators import recorded
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.functional.sinkhorn import Warned

NAN, INFINITY = math.nan, math.inf
MODES = ("envelope", "implicit", "unrolled")
BACKENDS = ("cpu", "reference")
each_backend = pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
each_mode = pytest.mark.parametrize("mode", MODES)
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])

pytestmark = pytest.mark.skipif(native.module is None, reason=f"the native extension is not there: {native.reason}")


class Inputs(NamedTuple):
    cost: Tensor
    a: Tensor
    b: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(each.to(dtype) for each in self))

    def leaves(self) -> Inputs:
        return Inputs(*(each.detach().clone().requires_grad_() for each in self))


def random_problems(batch: int, n: int, m: int, *, scale: float = 1.0, seed: int = 0) -> Inputs:
    """In float64, but numbers that float32 can hold."""
    random = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=random, dtype=torch.float64) * scale
    a, b = (torch.rand(batch, size, generator=random, dtype=torch.float64) + 0.1 for size in (n, m))
    return Inputs(cost.float().double(), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))


def close(found: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    """By the size of what is expected, so that zeros or a wrong sign are far off."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    size = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0  # what vanishes is left its rounding
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


# --- an independent loop -------------------------------------------------------------------------------------------------


def eager(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    iterations: int,
    *,
    reaches: tuple[float, float] = (INFINITY, INFINITY),
    start: Tensor | None = None,
    epsilon_start: float = 0.0,
    epsilon_decay: float = 0.5,
) -> dict[str, Tensor]:
    """The definition, as one writes it with ``logsumexp``; positive marginals."""
    g = torch.zeros_like(b) if start is None else start
    f = torch.zeros_like(a)
    for k in range(iterations):
        eps = max(epsilon, epsilon_start * epsilon_decay**k)
        lam = [1.0 if math.isinf(reach) else reach / (reach + eps) for reach in reaches]
        f = -lam[0] * eps * torch.logsumexp(b.log().unsqueeze(-2) + (g.unsqueeze(-2) - cost) / eps, -1)
        g = -lam[1] * eps * torch.logsumexp(a.log().unsqueeze(-1) + (f.unsqueeze(-1) - cost) / eps, -2)
    plan = (a.log().unsqueeze(-1) + b.log().unsqueeze(-2) + (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()

    def conjugate(x: Tensor, reach: float) -> Tensor:
        return x if math.isinf(reach) else reach * (1 - (-x / reach).exp())

    value = (a * conjugate(f, reaches[0])).sum(-1) + (b * conjugate(g, reaches[1])).sum(-1)
    value = value - epsilon * (plan.sum((-1, -2)) - a.sum(-1) * b.sum(-1))
    distance = (plan * torch.where(cost.isinf(), 0.0, cost)).sum((-1, -2))
    return {"distance": distance, "value": value, "f": f, "g": g, "plan": plan}


OUTPUTS = ("distance", "value", "f", "g", "plan")


def outputs(result: kd.SinkhornResult) -> dict[str, Tensor]:
    return {name: getattr(result, name) for name in OUTPUTS[:-1]} | {"plan": result.plan()}


def upstreams(found: dict[str, Tensor], *, without_shift: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    sent = {name: torch.randn(value.shape, generator=random, dtype=torch.float64) for name, value in found.items()}
    if without_shift:  # in f + c, g - c, which the fixed point leaves open
        for name in ("f", "g"):
            sent[name] = sent[name] - sent[name].mean(-1, keepdim=True)
    return sent


def gradients(found: dict[str, Tensor], inputs: Inputs, sent: dict[str, Tensor]) -> list[Tensor]:
    total = sum(
        (found[name] * one.to(found[name].dtype)).sum() for name, one in sent.items() if found[name].requires_grad
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


def tangential(gradient: Tensor) -> Tensor:
    """What a gradient to marginals says of changes that keep their sum."""
    return gradient - gradient.mean(-1, keepdim=True)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "balanced": ({}, {}),
    "relaxed": ({"unbalanced": 0.7}, {"reaches": (0.7, 0.7)}),
    "one side relaxed": ({"unbalanced": (None, 0.02)}, {"reaches": (INFINITY, 0.02)}),
    "annealed": (
        {"epsilon_start": 2.0, "epsilon_decay": 0.6},
        {"epsilon_start": 2.0, "epsilon_decay": 0.6},
    ),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
SIZES = ((5, 7), (17, 16), (40, 33), (1, 9), (9, 1))
each_size = pytest.mark.parametrize(("n", "m"), SIZES, ids=str)


@each_backend
@each_variant
@each_size
def test_eager_loop(backend: str, variant: str, n: int, m: int) -> None:
    """Every output and the unrolled gradient of each, in float64."""
    ours, theirs = VARIANTS[variant]
    inputs = random_problems(2, n, m)
    mine, other = inputs.leaves(), inputs.leaves()
    options = {"epsilon": 0.05, "max_iterations": 12, "gradient": "unrolled", "backend": backend}
    found, expected = outputs(kd.sinkhorn(*mine, **options, **ours)), eager(*other, 0.05, 12, **theirs)
    sent = upstreams(expected, without_shift=False)
    for name, value in expected.items():
        close(found[name], value, 1e-11)
    for gradient, exact in zip(gradients(found, mine, sent), gradients(expected, other, sent), strict=True):
        close(gradient, exact, 1e-9)


@each_variant
@each_mode
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_accuracy_in_single_precision(variant: str, mode: str, scale: float) -> None:
    """No worse than plain PyTorch in float32, against float64."""
    inputs = random_problems(3, 21, 18, scale=scale)
    # Enough iterations that the implicit system is well posed.
    options: dict[str, Any] = {"epsilon": 0.05 * scale, "max_iterations": 60, "gradient": mode}
    for name, value in VARIANTS[variant][0].items():
        numbers = value if isinstance(value, tuple) else (value,)
        scaled = tuple(number if number is None or name == "epsilon_decay" else number * scale for number in numbers)
        options[name] = scaled if len(scaled) > 1 else scaled[0]
    answers = []
    for library, dtype in ((kd, torch.float32), (kd.reference, torch.float32), (kd.reference, torch.float64)):
        leaves = Inputs(*(each.float().to(dtype) for each in inputs)).leaves()
        found = outputs(library.sinkhorn(*leaves, **options))
        sent = upstreams(found, without_shift=True)
        answers.append([*found.values(), *gradients(found, leaves, sent)])
    for name, ours, plain, truth in zip((*OUTPUTS, "cost", "a", "b"), *answers, strict=True):
        rows = [each.detach().reshape(1, -1) for each in (ours, plain, truth)]
        if name in {"a", "b"} and mode == "implicit":
            rows = [tangential(each) for each in rows]
        # A gradient is the sum of as many terms as there are iterations.
        slack = 2e-6 if name in OUTPUTS else 1e-5
        assert complaint(*rows, slack=slack) is None, f"{name} {complaint(*rows, slack=slack)}"
        assert complaint(-rows[0], *rows[1:], slack=slack), f"{name}: a wrong sign passes"


# --- peers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_backend
def test_pot(backend: str) -> None:
    ot = pytest.importorskip("ot")
    cost, a, b = random_problems(3, 12, 9)
    result = kd.sinkhorn(cost, a, b, epsilon=0.05, max_iterations=2000, backend=backend)
    for place in range(3):
        plan = ot.bregman.sinkhorn(
            a[place].numpy(), b[place].numpy(), cost[place].numpy(), 0.05, method="sinkhorn_log", stopThr=1e-14
        )
        close(result.plan()[place], plan)
        close(result.distance[place], (plan * cost[place].numpy()).sum())


@pytest.mark.slow
@each_backend
def test_pot_batch(backend: str) -> None:
    batch = pytest.importorskip("ot.batch")
    cost, a, b = random_problems(3, 12, 9)
    theirs = batch.solve_batch(cost, 0.1, a, b, max_iter=1000, tol=1e-14, method="log_sinkhorn", reg_type="kl")
    result = kd.sinkhorn(cost, a, b, epsilon=0.1, max_iterations=1000, backend=backend)
    close(result.plan(), theirs.plan)
    close(result.distance, theirs.value_linear)
    close(result.value, theirs.value, 1e-8)  # theirs adds 1e-16 to logarithms


@pytest.mark.slow
@each_backend
@pytest.mark.parametrize("reach", [1.0, (0.3, 2.0)])
def test_pot_unbalanced(backend: str, reach: Any) -> None:
    ot = pytest.importorskip("ot")
    cost, a, b = random_problems(2, 8, 11)
    b = b * 1.7
    result = kd.sinkhorn(cost, a, b, epsilon=0.05, unbalanced=reach, max_iterations=3000, backend=backend)
    for place in range(2):
        expected = ot.unbalanced.sinkhorn_unbalanced(
            a[place].numpy(), b[place].numpy(), cost[place].numpy(), 0.05, reach, method="sinkhorn",
            reg_type="kl", numItermax=20_000, stopThr=1e-15,
        )  # fmt: skip
        close(result.plan()[place], expected, 1e-9)


@pytest.mark.slow
@each_backend
def test_linear_programming(backend: str) -> None:
    """At a small epsilon the plan costs what the best plan of all does."""
    ot = pytest.importorskip("ot")
    cost, a, b = random_problems(2, 10, 8)
    result = kd.sinkhorn(
        cost, a, b, epsilon=1e-3, epsilon_start=1.0, epsilon_decay=0.9, max_iterations=4000, backend=backend
    )
    for place in range(2):
        best = ot.emd2(a[place].numpy(), b[place].numpy(), cost[place].numpy())
        # What is not where it should be costs at most the largest cost, which is 1.
        missing = float(result.marginal_error[place])
        assert missing < 5e-3
        assert best - missing - 1e-9 <= float(result.distance[place]) <= best + missing + 2e-3


# --- closed forms --------------------------------------------------------------------------------------------------------


@each_backend
@each_precision
def test_one_row_or_column(backend: str, dtype: torch.dtype) -> None:
    """The only plan there is."""
    for n, m in ((1, 6), (6, 1), (1, 1)):
        cost, a, b = random_problems(2, n, m).to(dtype)
        result = kd.sinkhorn(cost, a, b, epsilon=0.3, max_iterations=3, backend=backend)
        close(result.plan(), a.unsqueeze(-1) * b.unsqueeze(-2), 1e-6)
        close(result.distance, (a.unsqueeze(-1) * b.unsqueeze(-2) * cost).sum((-1, -2)), 1e-6)


@each_backend
def test_identical_marginals_far_apart(backend: str) -> None:
    """Moving anything costs far more than epsilon: everything stays."""
    a = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    cost = (1 - torch.eye(3, dtype=torch.float64)) * 100
    result = kd.sinkhorn(cost, a, a, epsilon=0.1, max_iterations=50, backend=backend)
    close(result.plan(), a.diag())
    assert float(result.distance) == pytest.approx(0, abs=1e-12)


@each_backend
def test_translated_points(backend: str) -> None:
    """Squared distances to points moved by t: the plan stays as it is, the cost is that of the move plus the blur's."""
    random = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, generator=random, dtype=torch.float64)
    move = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    blurred, moved = (
        kd.sinkhorn(torch.cdist(points, points + t).square(), epsilon=3.0, max_iterations=2000, backend=backend)
        for t in (0 * move, move)
    )
    close(moved.plan(), blurred.plan(), 1e-8)
    assert float(moved.distance - blurred.distance) == pytest.approx(float(move.square().sum()), rel=1e-8)


@each_backend
def test_symmetry_and_mass(backend: str) -> None:
    cost, a, b = random_problems(2, 11, 6)
    one = kd.sinkhorn(cost, a, b, epsilon=0.1, max_iterations=500, backend=backend)
    other = kd.sinkhorn(cost.mT, b, a, epsilon=0.1, max_iterations=500, backend=backend)
    close(one.distance, other.distance)
    close(one.value, other.value)
    close(one.plan(), other.plan().mT)
    close(one.plan().sum(-2), b)
    close(one.plan().sum(-1), a)
    few = kd.sinkhorn(cost, a, b, epsilon=0.02, max_iterations=2, backend=backend)
    close(few.plan().sum(-2), b)
    close(few.marginal_error, (few.plan().sum(-1) - a).abs().sum(-1), 1e-9)


@each_backend
def test_matrix_scaling(backend: str) -> None:
    """Unit marginals: a doubly stochastic matrix."""
    cost = random_problems(2, 7, 7).cost
    result = kd.sinkhorn(cost, epsilon=0.1, marginals="unit", max_iterations=500, backend=backend)
    close(result.plan().sum(-1), torch.ones(2, 7))
    close(result.plan().sum(-2), torch.ones(2, 7))
    by_hand = (-cost / 0.1).exp()
    for _ in range(500):
        by_hand = by_hand / by_hand.sum(-1, keepdim=True)
        by_hand = by_hand / by_hand.sum(-2, keepdim=True)
    close(result.plan(), by_hand)


# --- gradients -----------------------------------------------------------------------------------------------------------


@each_backend
@each_variant
def test_implicit_is_the_limit_of_unrolled(backend: str, variant: str) -> None:
    inputs = random_problems(2, 9, 12)
    answers = []
    for mode in ("implicit", "unrolled"):
        leaves = inputs.leaves()
        options = VARIANTS[variant][0] | {"gradient": mode, "max_iterations": 700, "backend": backend}
        found = outputs(kd.sinkhorn(*leaves, epsilon=0.08, **options))
        answers.append(gradients(found, leaves, upstreams(found, without_shift=True)))
    cost, *marginals = zip(*answers, strict=True)
    close(cost[0], cost[1], 1e-8)
    for ours, expected in marginals:
        close(tangential(ours), tangential(expected), 1e-8)


@each_backend
def test_envelope_of_the_value(backend: str) -> None:
    """At convergence: the plan to the cost, the potentials to the marginals; the distance is given the same."""
    for output in ("value", "distance"):
        leaves = random_problems(2, 9, 12).leaves()
        result = kd.sinkhorn(*leaves, epsilon=0.1, gradient="envelope", max_iterations=500, backend=backend)
        cost, a, b = torch.autograd.grad(getattr(result, output).sum(), leaves)
        close(cost, result.plan())
        close(a, result.f)
        close(b, result.g)
        assert not result.plan().requires_grad
    exact = random_problems(2, 9, 12).leaves()
    value = kd.sinkhorn(*exact, epsilon=0.1, gradient="unrolled", max_iterations=500, backend=backend).value.sum()
    for ours, expected in zip((cost, tangential(a), tangential(b)), torch.autograd.grad(value, exact), strict=True):
        close(ours, expected if expected.dim() == 3 else tangential(expected), 1e-9)


@each_backend
@pytest.mark.parametrize("variant", ["balanced", "relaxed", "annealed"])
def test_gradcheck_unrolled(backend: str, variant: str) -> None:
    leaves = random_problems(1, 3, 4).leaves()

    def values(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        # Differences leave the plane of equal sums, so a is what is given and b follows.
        b = b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True)
        options = VARIANTS[variant][0] | {"max_iterations": 4, "gradient": "unrolled", "backend": backend}
        return tuple(outputs(kd.sinkhorn(cost, a, b, epsilon=0.2, **options)).values())

    assert torch.autograd.gradcheck(values, tuple(leaves))


@each_backend
@pytest.mark.parametrize("variant", ["balanced", "relaxed"])
def test_gradcheck_implicit(backend: str, variant: str) -> None:
    leaves = random_problems(1, 3, 4).leaves()

    def values(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        b = b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True)
        options = VARIANTS[variant][0] | {"max_iterations": 300, "gradient": "implicit", "backend": backend}
        result = kd.sinkhorn(cost, a, b, epsilon=0.3, **options)
        free_of_shift = result.f.unsqueeze(-1) + result.g.unsqueeze(-2)
        return result.distance, result.value, free_of_shift, result.plan()

    assert torch.autograd.gradcheck(values, tuple(leaves))


@each_backend
def test_gradcheck_envelope(backend: str) -> None:
    """Of the value, whose gradient it is."""
    leaves = random_problems(1, 3, 4).leaves()

    def value(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        b = b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True)
        return kd.sinkhorn(cost, a, b, epsilon=0.3, gradient="envelope", max_iterations=300, backend=backend).value

    assert torch.autograd.gradcheck(value, tuple(leaves))


def test_second_derivatives() -> None:
    """Of unrolled iterations through the reference; elsewhere refused."""
    leaves = random_problems(1, 3, 3).leaves()

    def value(*leaves: Tensor) -> Tensor:
        return kd.sinkhorn(*leaves, epsilon=0.3, gradient="unrolled", max_iterations=3).distance

    def balanced(cost: Tensor, a: Tensor) -> Tensor:
        return value(cost, a, a.flip(-1))

    assert torch.autograd.gradgradcheck(balanced, leaves[:2])
    distance = kd.sinkhorn(leaves.cost, epsilon=0.3, gradient="implicit").distance
    with pytest.raises(RuntimeError, match="unrolled"):
        torch.autograd.grad(distance, leaves.cost, create_graph=True)


@pytest.mark.parametrize("wanted", ["cost", "a", "b"])
@each_mode
def test_each_input_alone(mode: str, wanted: str) -> None:
    inputs = random_problems(2, 5, 6)
    all_of_them = inputs.leaves()
    some = Inputs(*(getattr(inputs, name).clone().requires_grad_(name == wanted) for name in Inputs._fields))
    for output in ("distance", "value"):
        both = [getattr(kd.sinkhorn(*each, epsilon=0.2, gradient=mode), output).sum() for each in (some, all_of_them)]
        alone = torch.autograd.grad(both[0], getattr(some, wanted))[0]
        assert torch.equal(alone, torch.autograd.grad(both[1], getattr(all_of_them, wanted))[0])


def test_repeated_backward() -> None:
    leaves = random_problems(2, 5, 6).leaves()
    distance = kd.sinkhorn(*leaves, epsilon=0.2, gradient="unrolled").distance.sum()
    first = torch.autograd.grad(distance, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(distance, leaves)))


@each_backend
def test_function_transforms(backend: str) -> None:
    """They go through the reference."""
    cost = random_problems(3, 4, 5).cost

    def distance(cost: Tensor) -> Tensor:
        return kd.sinkhorn(cost, epsilon=0.2, max_iterations=9, gradient="unrolled").distance

    leaf = cost.clone().requires_grad_()
    expected = torch.autograd.grad(distance(leaf).sum(), leaf)[0]
    close(torch.func.grad(lambda cost: distance(cost).sum())(cost), expected)
    close(torch.func.vmap(torch.func.grad(distance))(cost), expected)


# --- ragged batches ------------------------------------------------------------------------------------------------------

ROW_LENGTHS, COLUMN_LENGTHS = torch.tensor([9, 4, 1, 0, 7]), torch.tensor([3, 12, 5, 6, 12])


@pytest.mark.parametrize("given", [True, False], ids=["given marginals", "uniform"])
@each_mode
@each_precision
def test_ragged_is_a_loop(dtype: torch.dtype, mode: str, given: bool) -> None:
    """Bitwise, with NaN in all padding, values and gradients, which are zero in the padding."""
    full = random_problems(5, 9, 12).to(dtype)
    padded = Inputs(*(each.clone() for each in full))
    for place, (n, m) in enumerate(zip(ROW_LENGTHS.tolist(), COLUMN_LENGTHS.tolist(), strict=True)):
        full.a[place, :n] /= full.a[place, :n].sum()
        full.b[place, :m] /= full.b[place, :m].sum()
        padded.cost[place] = NAN
        padded.cost[place, :n, :m] = full.cost[place, :n, :m]
        padded.a[place] = torch.where(torch.arange(9) < n, full.a[place], NAN)
        padded.b[place] = torch.where(torch.arange(12) < m, full.b[place], NAN)
    leaves = padded.leaves()
    used = leaves if given else leaves[:1]
    options: dict[str, Any] = {"epsilon": 0.1, "max_iterations": 15, "gradient": mode}
    result = kd.sinkhorn(*used, **options, row_lengths=ROW_LENGTHS, column_lengths=COLUMN_LENGTHS)
    found = outputs(result)
    sent = upstreams(found, without_shift=False)
    del sent["plan"]  # its gradient is summed by torch, in an order of its own
    grads = gradients(found, used, sent)  # type: ignore[arg-type]
    for place, (n, m) in enumerate(zip(ROW_LENGTHS.tolist(), COLUMN_LENGTHS.tolist(), strict=True)):
        size = {"distance": (), "value": (), "f": (n,), "g": (m,), "plan": (n, m)}
        inside = [slice(0, n)], [slice(0, m)], [slice(0, n), slice(0, m)]
        cut = dict(zip(("f", "g", "plan"), inside, strict=True)) | {"distance": [], "value": []}
        if n == 0:
            for name, value in found.items():
                assert not bool(value[place].any()), name
            for gradient in grads:
                assert not bool(gradient[place].any())
            continue
        alone = Inputs(full.cost[place, :n, :m], full.a[place, :n], full.b[place, :m]).leaves()
        mine = alone if given else alone[:1]
        expected = outputs(kd.sinkhorn(*mine, **options))
        for name, value in found.items():
            part = value[place][tuple(cut[name])]
            assert part.shape == size[name]
            assert torch.equal(part, expected[name]), name
            outside = value.detach()[place].clone()
            outside[tuple(cut[name])] = 0
            assert not bool(outside.any()), name
        parts = {name: sent[name][place][tuple(cut[name])] for name in sent}
        for gradient, one, where in zip(
            grads, gradients(expected, mine, parts), (inside[2], inside[0], inside[1]), strict=False  # type: ignore[arg-type]
        ):  # fmt: skip
            assert torch.equal(gradient[place][tuple(where)], one)
            outside = gradient[place].clone()
            outside[tuple(where)] = 0
            assert not bool(outside.any())


@each_mode
def test_ragged_reference(mode: str) -> None:
    """The reference agrees, padding included."""
    inputs = random_problems(5, 9, 12)
    inputs.cost[:, -1] = NAN
    options: dict[str, Any] = {"epsilon": 0.1, "gradient": mode, "max_iterations": 100}
    lengths = {"row_lengths": ROW_LENGTHS.clamp(max=8), "column_lengths": COLUMN_LENGTHS}
    answers = []
    for backend in BACKENDS:
        leaf = inputs.cost.clone().requires_grad_()
        result = kd.sinkhorn(leaf, backend=backend, **options, **lengths)
        found = outputs(result)
        sent = upstreams(found, without_shift=mode == "implicit")
        answers.append([*found.values(), result.marginal_error, result.iterations, *gradients(found, [leaf], sent)])  # type: ignore[arg-type]
    for ours, expected in zip(*answers, strict=True):
        close(ours, expected, 1e-8)


# --- hard inputs ---------------------------------------------------------------------------------------------------------


@each_backend
@each_mode
@each_precision
def test_forbidden_pairs(backend: str, mode: str, dtype: torch.dtype) -> None:
    """Like a very large cost, and without gradient."""
    inputs = random_problems(2, 6, 6)
    forbidden = torch.zeros(6, 6, dtype=torch.bool)
    forbidden[0, 2:] = forbidden[4, :3] = forbidden[3, 5] = True
    leaves = inputs._replace(cost=inputs.cost.masked_fill(forbidden, INFINITY)).to(dtype).leaves()
    large = inputs._replace(cost=inputs.cost.masked_fill(forbidden, 300.0)).leaves()
    options: dict[str, Any] = {"epsilon": 0.1, "max_iterations": 400, "gradient": mode}
    found = outputs(kd.sinkhorn(*leaves, backend=backend, **options))
    expected = outputs(kd.reference.sinkhorn(*large, **options))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for name, value in expected.items():
        close(found[name], value, tolerance)
    assert not bool(found["plan"][:, forbidden].any())
    sent = upstreams(found, without_shift=True)
    mine, exact = gradients(found, leaves, sent), gradients(expected, large, sent)
    assert not bool(mine[0][:, forbidden].any())
    close(mine[0], exact[0].masked_fill(forbidden, 0), tolerance)
    for ours, theirs in zip(mine[1:], exact[1:], strict=True):
        close(tangential(ours), tangential(theirs), tolerance)


@each_mode
def test_zero_marginals(mode: str) -> None:
    """Rows and columns without mass take no part; what is differentiable there agrees with the reference."""
    inputs = random_problems(2, 6, 7)
    inputs.a[0, 2] = inputs.b[0, 3] = inputs.b[1, 0] = inputs.a[1, 5] = 0
    inputs.a[1, 5] = 0
    inputs.cost[1, 5] = INFINITY
    scaled = Inputs(inputs.cost, *(each / each.sum(-1, keepdim=True) for each in inputs[1:]))
    options: dict[str, Any] = {"epsilon": 0.1, "max_iterations": 200, "gradient": mode}
    answers = []
    for library in (kd, kd.reference):
        leaves = scaled.leaves()
        result = library.sinkhorn(*leaves, **options)
        found = outputs(result)
        sent = upstreams(found, without_shift=True)
        sent["f"][1, 5] = 0
        answers.append([*found.values(), *gradients(found, leaves, sent)])
        assert not bool(result.f[1, 5])
        assert bool(result.f.isfinite().all())
        assert not bool(result.plan()[0, 2].any())
    for name, ours, expected in zip((*OUTPUTS, "cost", "a", "b"), *answers, strict=True):
        assert bool(ours.isfinite().all()), name
        close(ours, expected, 1e-8)
    rows = torch.tensor([0, 1, 3, 4, 5])
    columns = torch.tensor([0, 1, 2, 4, 5, 6])
    small = kd.sinkhorn(
        scaled.cost[0][rows][:, columns], scaled.a[0, rows], scaled.b[0, columns], epsilon=0.1, max_iterations=200
    )
    close(answers[0][0][0], small.distance)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_range_of_epsilon(epsilon: float, scale: float) -> None:
    """Costs of 1e4 at an epsilon of 1e-3: single precision keeps what float64 says."""
    inputs = random_problems(2, 17, 19, scale=scale)
    exact = kd.reference.sinkhorn(inputs.cost, epsilon=epsilon, max_iterations=30)
    leaf = inputs.cost.float().requires_grad_()
    for mode in MODES:
        result = kd.sinkhorn(leaf, epsilon=epsilon, max_iterations=30, gradient=mode)
        close(result.distance, exact.distance, 1e-5)
        close(result.f, exact.f, 1e-5 * max(1.0, epsilon / scale))  # they are made from multiples of epsilon
        close(result.plan(), exact.plan(), 1e-4)
        gradient = torch.autograd.grad(result.distance.sum() + result.value.sum(), leaf)[0]
        assert bool(gradient.isfinite().all())
    double = kd.sinkhorn(inputs.cost, epsilon=epsilon, max_iterations=30)
    close(double.plan(), exact.plan(), 1e-8)


@pytest.mark.parametrize("epsilon", [1e-3, 0.02])
@pytest.mark.parametrize("reach", [0.01, 1.0])
def test_range_of_reaches(epsilon: float, reach: float) -> None:
    """Where hardly anything is carried, sums leave the range of single precision."""
    inputs = random_problems(2, 9, 8, scale=5.0)
    options: dict[str, Any] = {"epsilon": epsilon, "unbalanced": reach, "max_iterations": 20, "gradient": "unrolled"}
    answers = []
    for library, dtype in ((kd, torch.float32), (kd, torch.float64), (kd.reference, torch.float64)):
        leaf = inputs.cost.to(dtype).requires_grad_()
        result = library.sinkhorn(leaf, **options)
        answers.append((result.f, result.g, result.value, torch.autograd.grad(result.f.sum(), leaf)[0]))
    for single, double, exact in zip(*answers, strict=True):
        close(double, exact, 1e-9)
        close(single, exact, 2e-4)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Halves are read and computed in float32; the gradient comes back in the dtype of each input."""
    cost = random_problems(2, 8, 5).cost
    # Sums that are equal in any dtype.
    a = torch.tensor([1, 3, 2, 2, 1, 3, 1, 3], dtype=torch.float64).expand(2, -1) / 16
    b = torch.tensor([1, 2, 1, 2, 2], dtype=torch.float64).expand(2, -1) / 8
    inputs = Inputs(cost, a, b).to(dtype).leaves()
    result = kd.sinkhorn(*inputs, epsilon=0.1, gradient="unrolled", max_iterations=20, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert {result.distance.dtype, result.f.dtype, result.plan().dtype, result.value.dtype} == {compute}
    exact = Inputs(*(each.detach().double() for each in inputs)).leaves()
    expected = kd.reference.sinkhorn(*exact, epsilon=0.1, gradient="unrolled", max_iterations=20)
    close(result.distance, expected.distance, 1e-5)
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    for leaf, other in zip(inputs, exact, strict=True):
        ours = torch.autograd.grad(result.distance.sum(), leaf, retain_graph=True)[0]
        assert ours.dtype == dtype
        close(ours, torch.autograd.grad(expected.distance.sum(), other, retain_graph=True)[0], tolerance)


@each_backend
def test_empty(backend: str) -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)):
        leaf = torch.zeros(shape, requires_grad=True)
        for mode in MODES:
            result = kd.sinkhorn(leaf, epsilon=0.1, gradient=mode, max_iterations=5, backend=backend)
            assert result.distance.shape == shape[:1]
            assert result.plan().shape == shape
            assert not bool(result.distance.any())
            gradient = torch.autograd.grad(result.distance.sum() + result.value.sum(), leaf, allow_unused=True)[0]
            assert gradient is None or gradient.shape == shape


@each_backend
def test_batch_shapes_and_strides(backend: str) -> None:
    cost, a, b = random_problems(6, 5, 7)
    options: dict[str, Any] = {"epsilon": 0.1, "backend": backend}
    flat = kd.sinkhorn(cost, a, b, **options)
    nested = kd.sinkhorn(cost.reshape(2, 3, 5, 7), a.reshape(2, 3, 5), b.reshape(2, 3, 7), **options)
    assert nested.distance.shape == (2, 3)
    assert nested.plan().shape == (2, 3, 5, 7)
    assert torch.equal(nested.f.reshape(6, 5), flat.f)
    single = kd.sinkhorn(cost[1], a[1], b[1], **options)
    assert single.distance.shape == ()
    close(single.plan(), flat.plan()[1], 1e-12)
    transposed = kd.sinkhorn(cost.mT.contiguous().mT, a, b, **options)
    assert torch.equal(transposed.distance, flat.distance)
    shared = kd.sinkhorn(cost, a[0], b[0], **options)
    close(shared.distance[0], flat.distance[0], 1e-12)


# --- many small problems, which share vectors ----------------------------------------------------------------------------


def small_problems(batch: int) -> tuple[Inputs, Tensor, Tensor]:
    """Ragged, of all sizes up to 32 and one more; with zero masses, forbidden pairs, and costs that leave the range."""
    random = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(1, 33, (batch,), generator=random) for _ in range(2))
    rows[:4], columns[:4] = torch.tensor([1, 32, 33, 32]), torch.tensor([32, 1, 31, 33])
    cost, a, b = random_problems(batch, 33, 33)
    cost[5::6] *= 1000
    for place, (n, m) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        if place % 3 == 0 and min(n, m) > 3:
            a[place, 1] = b[place, 2] = 0
            cost[place, 1] = INFINITY
        if place % 4 == 0 and min(n, m) > 3:
            cost[place, 0, 1 : m - 1] = INFINITY
        a[place] /= a[place, :n].sum()
        b[place] /= b[place, :m].sum()
        cost[place, n:] = cost[place, :, m:] = a[place, n:] = b[place, m:] = NAN
    return Inputs(cost, a, b), rows, columns


@each_precision
def test_small_problems(dtype: torch.dtype) -> None:
    """Every output and its unrolled gradient, problem by problem, as in the reference in float64."""
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    inputs, rows, columns = small_problems(45)
    options: dict[str, Any] = {"epsilon": 0.1, "max_iterations": 61, "gradient": "unrolled"}
    options |= {"row_lengths": rows, "column_lengths": columns}
    answers = []
    for library, precision in ((kd, dtype), (kd.reference, torch.float64)):
        leaves = Inputs(*(each.to(dtype).to(precision) for each in inputs)).leaves()
        found = outputs(library.sinkhorn(*leaves, **options))
        sent = upstreams(found, without_shift=False)
        answers.append((found, gradients(found, leaves, sent)))
    (found, grads), (expected, exact) = answers
    for place, (n, m) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for name, value in expected.items():
            close(found[name][place], value[place], tolerance)
        for ours, truth in zip(grads, exact, strict=True):
            close(ours[place], truth[place], tolerance)
        assert not bool(grads[0][place, n:].any())
        assert not bool(grads[0][place, :, m:].any())


@each_precision
@pytest.mark.filterwarnings("ignore:.*missed the tolerance")
def test_small_problems_stop_by_themselves(dtype: torch.dtype) -> None:
    """Bitwise what each is alone: its iterations, and the gradient through these."""
    cost, a, b = random_problems(20, 6, 7).to(dtype)
    cost = cost * torch.linspace(0.1, 2.0, 20, dtype=dtype).reshape(-1, 1, 1)
    cost[3] *= 10_000  # leaves the range
    options: dict[str, Any] = {"epsilon": 0.1, "tolerance": 1e-4, "max_iterations": 75, "gradient": "unrolled"}
    leaves = Inputs(cost, a, b).leaves()
    together = kd.sinkhorn(*leaves, **options)
    assert len(set(together.iterations.tolist())) > 5
    found = outputs(together)
    sent = upstreams(found, without_shift=False)
    del sent["plan"]  # its gradient is summed by torch, in an order of its own
    grads = gradients(found, leaves, sent)
    for place in range(0, 20, 3):
        alone = Inputs(*(each[place] for each in (cost, a, b))).leaves()
        result = kd.sinkhorn(*alone, **options)
        assert int(result.iterations) == int(together.iterations[place])
        mine = gradients(outputs(result), alone, {name: each[place] for name, each in sent.items()})
        for ours, expected in zip(mine, grads, strict=True):
            assert torch.equal(ours, expected[place])
        exact = Inputs(*(each.detach().double() for each in alone)).leaves()
        steps = {"epsilon": 0.1, "max_iterations": int(result.iterations), "gradient": "unrolled"}
        truth = outputs(kd.reference.sinkhorn(*exact, **steps))
        for ours, expected in zip(
            mine, gradients(truth, exact, {name: each[place] for name, each in sent.items()}), strict=True
        ):
            close(ours, expected, 1e-9 if dtype == torch.float64 else 1e-4)


# --- how iterations end --------------------------------------------------------------------------------------------------


@each_backend
def test_each_problem_stops_by_itself(backend: str) -> None:
    """As it does alone, the error being what is asked for and no less."""
    cost, a, b = random_problems(4, 10, 9)
    cost = cost * torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64).reshape(-1, 1, 1)
    options: dict[str, Any] = {"epsilon": 0.1, "tolerance": 1e-6, "max_iterations": 5000, "backend": backend}
    together = kd.sinkhorn(cost, a, b, **options)
    assert len(set(together.iterations.tolist())) == 4
    assert bool(together.converged.all())
    assert bool((together.marginal_error <= 1e-6).all())
    for place in range(4):
        alone = kd.sinkhorn(cost[place], a[place], b[place], **options)
        assert int(alone.iterations) == int(together.iterations[place])
        close(alone.f, together.f[place], 1e-12)
        steps = int(alone.iterations)
        sooner = kd.sinkhorn(cost[place], a[place], b[place], epsilon=0.1, max_iterations=steps - 1, backend=backend)
        assert float(sooner.marginal_error) > 1e-6


@each_backend
def test_stops_after_annealing_only(backend: str) -> None:
    cost = torch.zeros(1, 3, 3)  # converged from the start
    options: dict[str, Any] = {"epsilon": 0.125, "tolerance": 1e-3, "max_iterations": 9, "backend": backend}
    assert int(kd.sinkhorn(cost, **options).iterations) == 1
    assert int(kd.sinkhorn(cost, **options, epsilon_start=1.0).iterations) == 4


@each_backend
def test_missed_tolerance_is_reported(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Warned, "already", False)
    cost = random_problems(2, 10, 9).cost
    options: dict[str, Any] = {"epsilon": 0.01, "tolerance": 1e-9, "max_iterations": 3, "backend": backend}
    with pytest.warns(UserWarning, match="2 of 2 problems missed the tolerance"):
        result = kd.sinkhorn(cost, **options)
    assert result.iterations.tolist() == [3, 3]
    assert not bool(result.converged.any())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.sinkhorn(cost, **options)


@each_backend
def test_warm_start(backend: str) -> None:
    """Two runs of 10 iterations are one of 20; the start has no gradient."""
    leaves = random_problems(2, 10, 9).leaves()
    options: dict[str, Any] = {"epsilon": 0.05, "gradient": "unrolled", "backend": backend}
    whole = kd.sinkhorn(*leaves, **options, max_iterations=20)
    first = kd.sinkhorn(*leaves, **options, max_iterations=10)
    second = kd.sinkhorn(*leaves, **options, max_iterations=10, warm_start=first)
    close(second.f, whole.f, 1e-12)
    again = kd.sinkhorn(*leaves, **options, max_iterations=10, warm_start=(first.f, first.g))
    close(again.f, whole.f, 1e-12)
    expected = eager(*leaves, 0.05, 10, start=first.g.detach())
    sent = upstreams(expected, without_shift=False)
    for ours, exact in zip(
        gradients(outputs(second), leaves, sent), gradients(expected, leaves, sent), strict=True
    ):  # fmt: skip
        close(ours, exact, 1e-9)


# --- large problems and threads ------------------------------------------------------------------------------------------


@each_mode
def test_several_chunks_of_rows(mode: str) -> None:
    inputs = random_problems(1, 600, 70)
    answers = []
    for library, dtype in ((kd, torch.float32), (kd.reference, torch.float64)):
        leaves = inputs.to(dtype).leaves()
        found = outputs(library.sinkhorn(*leaves, epsilon=0.1, max_iterations=30, gradient=mode))
        answers.append([*found.values(), *gradients(found, leaves, upstreams(found, without_shift=True))])
    for name, ours, exact in zip((*OUTPUTS, "cost", "a", "b"), *answers, strict=True):
        compared = tangential if name in {"a", "b"} else Tensor.detach
        close(compared(ours), compared(exact), 2e-5)


@each_mode
@pytest.mark.parametrize(("batch", "n", "m"), [(1, 600, 70), (2, 300, 70), (9, 50, 70), (70, 11, 14)])
def test_threads_change_nothing(mode: str, batch: int, n: int, m: int) -> None:
    inputs = random_problems(batch, n, m).to(torch.float32)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = inputs.leaves()
            result = kd.sinkhorn(*leaves, epsilon=0.1, max_iterations=9, gradient=mode)
            grads = torch.autograd.grad(result.distance.sum() + result.value.sum(), leaves)
            answers.append([result.distance, result.f, result.g, result.marginal_error, *grads])
    finally:
        torch.set_num_threads(before)
    for others in answers[1:]:
        assert all(map(torch.equal, answers[0], others))


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.module.isas() if native.module is not None else [])
def test_instruction_sets(isa: str) -> None:
    program = (
        "import test_sinkhorn as tests\n"
        "for variant in tests.VARIANTS:\n"
        "    for mode in tests.MODES: tests.test_accuracy_in_single_precision(variant, mode, 1.0)\n"
        "    for n, m in tests.SIZES: tests.test_eager_loop('cpu', variant, n, m)\n"
        "tests.test_several_chunks_of_rows('unrolled')\n"
        "for dtype in (tests.torch.float32, tests.torch.float64): tests.test_small_problems(dtype)\n"
        "from kdkernels.backends import native\n"
        "print('verified', native.module.isa())\n"
    )
    environment = {**os.environ, "KDKERNELS_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert f"verified {isa}" in done.stdout, done.stderr


# --- what is refused -----------------------------------------------------------------------------------------------------

SQUARE = torch.ones(2, 3, 3)
HALF = torch.full((2, 3), 0.5)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cost is no tensor": ({"cost": [[1.0]]}, TypeError, "cost"),
    "cost of integers": ({"cost": torch.ones(2, 3, 3, dtype=torch.int64)}, TypeError, "cost"),
    "cost is a vector": ({"cost": torch.ones(3)}, ValueError, "cost"),
    "NaN cost": ({"cost": torch.full((2, 3, 3), NAN)}, ValueError, "cost of problem 0 holds NaN"),
    "-inf cost": ({"cost": torch.full((2, 3, 3), -INFINITY)}, ValueError, "cost of problem 0 holds NaN or -inf"),
    "row without partner": (
        {"cost": SQUARE.index_fill(1, torch.tensor([1]), INFINITY)}, ValueError, "every partner of a row",
    ),
    "column without partner": (
        {"cost": SQUARE.index_fill(2, torch.tensor([1]), INFINITY)}, ValueError, "every partner of a column",
    ),
    "a of another length": ({"a": torch.ones(2, 4)}, ValueError, "a must have the shape"),
    "a of another batch": ({"a": torch.ones(5, 3)}, ValueError, "a must have the shape"),
    "negative a": ({"a": -HALF, "b": -HALF}, ValueError, "a must be finite and not negative"),
    "NaN in b": ({"b": torch.full((2, 3), NAN)}, ValueError, "b must be finite and not negative"),
    "infinite a": ({"a": torch.full((2, 3), INFINITY)}, ValueError, "a must be finite and not negative"),
    "infeasible marginals": ({"a": HALF, "b": 2 * HALF}, ValueError, "a and b must have the same sum"),
    "epsilon zero": ({"epsilon": 0.0}, ValueError, "epsilon"),
    "epsilon negative": ({"epsilon": -1.0}, ValueError, "epsilon"),
    "epsilon NaN": ({"epsilon": NAN}, ValueError, "epsilon"),
    "no iterations": ({"max_iterations": 0}, ValueError, "max_iterations"),
    "iterations of float": ({"max_iterations": 2.5}, TypeError, "max_iterations"),
    "negative tolerance": ({"tolerance": -1e-3}, ValueError, "tolerance"),
    "lengths of float": ({"row_lengths": torch.ones(2)}, TypeError, "row_lengths"),
    "lengths of another batch": ({"row_lengths": torch.tensor([1])}, ValueError, "row_lengths"),
    "lengths too large": ({"column_lengths": torch.tensor([4, 1])}, ValueError, "column_lengths"),
    "lengths negative": ({"row_lengths": torch.tensor([-1, 1])}, ValueError, "row_lengths"),
    "unknown gradient": ({"gradient": "exact"}, ValueError, "gradient"),
    "unknown marginals": ({"marginals": "uniform"}, ValueError, "marginals"),
    "unit with a": ({"marginals": "unit", "a": HALF}, ValueError, "marginals"),
    "unit, not square": ({"marginals": "unit", "cost": torch.ones(2, 3, 4)}, ValueError, "marginals"),
    "unit, not square by lengths": (
        {"marginals": "unit", "row_lengths": torch.tensor([3, 2])}, ValueError, "marginals",
    ),
    "reach zero": ({"unbalanced": 0.0}, ValueError, "unbalanced"),
    "reach of text": ({"unbalanced": "1"}, TypeError, "unbalanced"),
    "three reaches": ({"unbalanced": (1.0, 2.0, 3.0)}, ValueError, "unbalanced"),
    "epsilon_start zero": ({"epsilon_start": 0.0}, ValueError, "epsilon_start"),
    "decay of one": ({"epsilon_decay": 1.0}, ValueError, "epsilon_decay"),
    "warm start of one tensor": ({"warm_start": HALF}, TypeError, "warm_start"),
    "warm start of another shape": ({"warm_start": (HALF, torch.ones(2, 4))}, ValueError, "warm_start"),
    "warm start of NaN": ({"warm_start": (HALF, HALF * NAN)}, ValueError, "warm_start"),
    "unknown backend": ({"backend": "gpu"}, ValueError, "backend"),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend: str, name: str) -> None:
    arguments, error, text = REFUSED[name]
    arguments = {"cost": SQUARE, "epsilon": 0.1, "backend": backend} | arguments
    with pytest.raises(error, match=text):
        kd.sinkhorn(**arguments)


def test_faults_are_named_by_problem() -> None:
    cost = torch.ones(4, 3, 3)
    cost[2, 0, 1] = NAN
    with pytest.raises(ValueError, match="cost of problem 2 holds NaN"):
        kd.sinkhorn(cost, epsilon=0.1)
    with pytest.raises(ValueError, match="in problem 1"):
        kd.sinkhorn(SQUARE, HALF, torch.stack([HALF[0], HALF[1] * 1.01]), epsilon=0.1)


def test_rounded_sums_are_equal() -> None:
    """Sums that differ by what the dtype rounds are no error."""
    a = torch.full((1, 300), 1 / 300, dtype=torch.float16)
    b = torch.full((1, 70), 1 / 70, dtype=torch.float16)
    kd.sinkhorn(torch.ones(1, 300, 70), a, b, epsilon=0.1)


# --- the operators -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_mode
def test_opcheck(mode: str) -> None:
    def call() -> None:
        leaves = random_problems(3, 4, 5).to(torch.float32).leaves()
        lengths = torch.tensor([4, 2, 1])
        result = kd.sinkhorn(*leaves[:1], epsilon=0.3, max_iterations=3, gradient=mode, row_lengths=lengths)
        (result.distance.sum() + result.value.sum()).backward()

    calls = recorded(call)
    assert [operator._opname for operator, _ in calls] == ["sinkhorn", "sinkhorn_backward"]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@each_mode
def test_compiled(mode: str) -> None:
    """One graph, which other epsilons and tolerances do not compile anew."""
    torch._dynamo.reset()

    def loss(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float) -> tuple[Tensor, Tensor]:
        result = kd.sinkhorn(cost, a, b, epsilon=epsilon, tolerance=tolerance, gradient=mode, max_iterations=30)
        return result.distance.sum() + (result.plan() * cost.detach()).sum(), result.iterations

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=None)
    for epsilon, tolerance in ((0.1, 0.0), (0.25, 1e-3), (0.5, 1e-4)):
        mine, other = (random_problems(2, 4, 5).leaves() for _ in range(2))
        found, expected = compiled(*mine, epsilon, tolerance), loss(*other, epsilon, tolerance)
        assert torch.equal(found[1], expected[1])
        close(found[0], expected[0], 1e-12)
        for ours, exact in zip(
            torch.autograd.grad(found[0], mine), torch.autograd.grad(expected[0], other), strict=True
        ):  # fmt: skip
            close(ours, exact, 1e-12)


def test_result_is_readable() -> None:
    result = kd.sinkhorn(torch.rand(2, 3), epsilon=1.0)
    assert "problem" not in repr(result)
    assert np.isfinite(result.plan().numpy()).all()

"""The CUDA kernels of the family sinkhorn, run on the host: what the general cases of ``test_cuda_kernels`` leave out.

Where nothing else is said they are held against the reference, which makes the same iterations, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import emulated_transport as there
import pytest
import torch
from torch import Tensor

from kdkernels.backends.transport import GRADIENTS

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]

each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)

VARIANTS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "relaxed": {"unbalanced": (None, 0.3)},
    "annealed": {"epsilon_start": 1.0, "epsilon_decay": 0.6},
}


def problem(batch: int, n: int, m: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> there.Problem:
    """Numbers that float32 can hold, in any dtype."""
    random = torch.Generator().manual_seed(7 * n + m)
    cost = torch.rand(batch, n, m, generator=random) * scale
    masses = [torch.rand(batch, size, generator=random) + 0.1 for size in (n, m)]
    return cost.to(dtype), *((each / each.sum(-1, keepdim=True)).to(dtype) for each in masses)


def weights_of(batch: int, n: int, m: int) -> dict[str, Tensor]:
    """Of every result; those of the potentials are the same for f + c and g - c, which a fixed point leaves open."""
    random = torch.Generator().manual_seed(3)
    shapes = {"distance": (batch,), "value": (batch,), "f": (batch, n), "g": (batch, m), "plan": (batch, n, m)}
    found = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: each - each.mean(-1, keepdim=True) if name in "fg" else each for name, each in found.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, gradient: str = "") -> None:
    """By the size of what is expected, so that zeros or a wrong sign are far off."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours, truth = found[name].double(), value.double()
        if gradient == "implicit" and name in {
            "gradient to a",
            "gradient to b",
        }:  # what a change of the sum does is open
            ours, truth = (each - each.mean(-1, keepdim=True) for each in (ours, truth))
        size = max(float(truth.abs().max()), 1e-3) if truth.numel() else 1.0
        allowed = tolerance * size
        error = float((ours - truth).abs().max()) if truth.numel() else 0.0
        assert ours.shape == truth.shape, name
        assert error <= allowed, f"{name} errs by {error:.3e}, allowed are {allowed:.3e}"


def hold(
    emulated: Emulated,
    given: there.Problem,
    options: dict[str, Any],
    weights: dict[str, Tensor],
    tolerance: float,
    gradient: str = "",
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = emulated(there.transport, given, options, weights)
    exact = tuple(None if each is None else each.double() for each in given)
    close(found, there.transport(exact, options, weights, "reference"), tolerance, gradient)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@each_gradient
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 2, 5), (2, 5, 2), (1, 33, 1), (2, 5, 33)], ids=str)
def test_sizes(emulated: Emulated, shape: tuple[int, int, int], gradient: str, variant: str) -> None:
    options = {"epsilon": 0.2, "max_iterations": 8, "gradient": gradient, **VARIANTS[variant]}
    hold(emulated, problem(*shape), options, weights_of(*shape), 1e-10, gradient)


def test_two_problems(emulated: Emulated) -> None:
    for gradient in GRADIENTS:
        options = {"epsilon": 0.2, "max_iterations": 6, "gradient": gradient}
        hold(emulated, problem(2, 4, 3), options, weights_of(2, 4, 3), 1e-10, gradient)


@pytest.mark.slow
@each_gradient
def test_a_matrix_that_shared_memory_cannot_hold(emulated: Emulated, gradient: str) -> None:
    options = {"epsilon": 0.2, "max_iterations": 3, "gradient": gradient}
    hold(emulated, problem(1, 12, 600), options, weights_of(1, 12, 600), 1e-10, gradient)


@pytest.mark.slow
@each_gradient
def test_ragged_with_forbidden_pairs_and_without_mass(emulated: Emulated, gradient: str) -> None:
    """The padding holds NaN, which nothing may read, and gets no gradient."""
    lengths = torch.tensor([5, 1, 4, 3]), torch.tensor([2, 6, 6, 5])
    cost, *_ = problem(4, 5, 6)
    cost[0, 1, 1] = cost[2, 0, 2:] = cost[2, 3, 4] = math.inf
    outside = torch.arange(5).reshape(1, -1, 1) >= lengths[0].reshape(-1, 1, 1)
    outside = outside | (torch.arange(6) >= lengths[1].reshape(-1, 1, 1))
    masses = []
    for size, valid in zip((5, 6), lengths, strict=True):
        mass = torch.arange(1, size + 1).double().repeat(4, 1)
        mass[3, 1] = 0
        mass[torch.arange(size) >= valid.unsqueeze(-1)] = 0
        masses.append(mass / mass.sum(-1, keepdim=True))
    given = cost.masked_fill(outside, math.nan), *masses
    options = {"epsilon": 0.3, "max_iterations": 30, "gradient": gradient}
    options |= {"row_lengths": lengths[0], "column_lengths": lengths[1]}
    weights = {name: each for name, each in weights_of(4, 5, 6).items() if name in {"distance", "value"}}
    found = hold(emulated, given, options, weights, 1e-9, gradient)
    assert not found["gradient to cost"][outside | cost.isinf()].any()
    assert not found["f"][1, 1:].any()


@pytest.mark.slow
def test_a_length_of_zero(emulated: Emulated) -> None:
    options = {"epsilon": 0.3, "max_iterations": 3, "gradient": "unrolled"}
    options |= {"row_lengths": torch.tensor([0, 3]), "column_lengths": torch.tensor([2, 2])}
    cost = problem(2, 3, 2)[0]
    found = emulated(there.transport, (cost, None, None), options, {"distance": torch.ones(2)})
    assert found["iterations"].tolist() == [0, 3]
    assert not any(found[name][0].any() for name in ("distance", "value", "f", "g", "gradient to cost"))
    assert found["gradient to cost"][1].any()


def test_empty(emulated: Emulated) -> None:
    for shape in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        options = {"epsilon": 0.3, "max_iterations": 2, "gradient": "unrolled"}
        found = emulated(there.transport, (torch.zeros(shape), None, None), options, {"distance": torch.ones(shape[0])})
        assert found["f"].shape == shape[:2]
        assert not found["distance"].any()


@pytest.mark.slow
def test_single_precision_and_large_costs(emulated: Emulated) -> None:
    """Costs of 1e4 at an epsilon of 1e-3."""
    options = {"epsilon": 1e-3, "max_iterations": 12, "gradient": "unrolled"}
    given = problem(2, 9, 7, 1e4, torch.float32)
    found = emulated(there.transport, (given[0], None, None), options, {"distance": torch.ones(2)})
    exact = there.transport((given[0].double(), None, None), options, {"distance": torch.ones(2)}, "reference")
    close(
        {name: found[name] for name in ("distance", "f", "g")},
        {name: exact[name] for name in ("distance", "f", "g")},
        1e-5,
    )
    close({"plan": found["plan"]}, {"plan": exact["plan"]}, 1e-4)
    assert found["gradient to cost"].isfinite().all()


@pytest.mark.slow
def test_scalings_that_leave_the_range(emulated: Emulated) -> None:
    """Where hardly anything is carried, iterations are made in the log domain."""
    options = {"epsilon": 1e-3, "unbalanced": 0.01, "max_iterations": 6, "gradient": "unrolled"}
    given, weights = problem(1, 6, 5, 5.0), {"f": torch.linspace(-1, 1, 6)}
    hold(emulated, given, options, weights, 1e-9)
    hold(emulated, tuple(each.float() for each in given if each is not None), options, weights, 2e-4)


@pytest.mark.slow
def test_each_problem_stops_by_itself(emulated: Emulated) -> None:
    cost, a, b = problem(3, 6, 5)
    cost = cost * torch.tensor([0.1, 1.0, 3.0]).double().reshape(-1, 1, 1)
    options = {"epsilon": 0.2, "tolerance": 1e-5, "max_iterations": 200, "gradient": "unrolled"}
    found = hold(emulated, (cost, a, b), options, {"value": torch.ones(3)}, 1e-9)
    assert len(set(found["iterations"].tolist())) == 3
    assert (found["marginal_error"] <= 1e-5).all()
    relaxed = options | {"unbalanced": 0.5, "tolerance": 1e-3}
    hold(emulated, (cost, a, b), relaxed, {"value": torch.ones(3)}, 1e-9)


@pytest.mark.slow
def test_a_start_and_repeated_runs(emulated: Emulated) -> None:
    given = problem(2, 5, 4, dtype=torch.float32)
    options = {"epsilon": 0.1, "max_iterations": 5, "gradient": "unrolled"}
    first = emulated(there.transport, given, options, {})
    options["warm_start"] = first["f"], first["g"]
    found = hold(emulated, given, options, weights_of(2, 5, 4), 2e-5)
    again = emulated(there.transport, given, options, weights_of(2, 5, 4))
    assert all(torch.equal(again[name], each) for name, each in found.items())


def test_faults_are_named(emulated: Emulated) -> None:
    cost = torch.zeros(3, 2, 2)
    for place, value in (
        ((1, 0, 1), math.nan),
        ((2, 1, 1), -math.inf),
        ((1, 0), math.inf),
        ((2, slice(None), 1), math.inf),
    ):
        wrong = cost.clone()
        wrong[place] = value
        assert emulated(there.fault, wrong).startswith(f"cost of problem {place[0]} ")

"""The Triton kernels of the family sinkhorn: in the interpreter against the reference in float64, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accuracy
import aot_transport
import interpreted_transport
import pytest
import torch
from aot import TARGETS
from aot_transport import Case
from torch import Tensor

from kdkernels.triton_kernels.tiling import ON_CHIP, MATRIX_ON_CHIP, STREAMED_TILE, choose_cost_tiling

Worker = Callable[..., Any]
Problem = tuple[Tensor | None, ...]

MODES = ("envelope", "implicit", "unrolled")
RESULTS = ("distance", "value", "f", "g", "marginal_error", "plan")
BALANCED: dict[str, Any] = {"epsilon": 0.3, "max_iterations": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": BALANCED,
    "relaxed": BALANCED | {"unbalanced": (0.5, 2.0)},
    "half_relaxed": BALANCED | {"unbalanced": (None, 0.7)},
    "annealed": {"epsilon": 0.2, "max_iterations": 6, "epsilon_start": 1.0},
    "converged": {"epsilon": 0.5, "max_iterations": 40, "tolerance": 1e-6},
}


def problem(batch: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(n * m)
    cost = torch.rand(batch, n, m, generator=generator).to(dtype)
    a, b = (0.1 + torch.rand(batch, size, generator=generator) for size in (n, m))
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def upstream_of(shape: torch.Size, gradient: str) -> dict[str, Tensor]:
    batch, n, m = shape
    generator = torch.Generator().manual_seed(1)
    shapes = {"distance": (batch,), "value": (batch,), "f": (batch, n), "g": (batch, m), "plan": (batch, n, m)}
    names = ("distance", "value") if gradient == "envelope" else tuple(shapes)
    return {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in names}


def double(given: Problem) -> Problem:
    return tuple(None if tensor is None else tensor.double() for tensor in given)


def compare(interpreter: Worker, given: Problem, options: dict[str, Any], streamed: bool = False) -> dict[str, Any]:
    """Runs the kernels and holds them to the accuracy rule."""
    cost = given[0]
    assert cost is not None
    upstream = upstream_of(cost.shape, options.get("gradient", "implicit"))
    ours: dict[str, Any] = interpreter(interpreted_transport.sinkhorn, given, upstream, options, "triton", streamed)
    single = tuple(None if tensor is None else tensor.float() for tensor in given)
    plain = interpreted_transport.sinkhorn(single, upstream, options, "reference")
    truth = interpreted_transport.sinkhorn(double(given), upstream, options, "reference")
    assert torch.equal(ours["iterations"], truth["iterations"])
    for name in (*RESULTS, "grad_cost", "grad_a", "grad_b"):
        exact, rough = truth[name], plain[name]
        if exact is None or rough is None:
            assert ours[name] is None
            continue
        # The errors of a row in a plan or in its gradient are those of all of its problem.
        size = max(float(exact.abs().max()), 1e-3)
        floor = torch.full_like(exact, size)
        if name == "marginal_error":
            torch.testing.assert_close(ours[name].double(), exact, rtol=1e-4, atol=2e-6)
            continue
        accuracy.check(name, ours[name].flatten(1), rough.flatten(1), exact.flatten(1), floor.flatten(1)) if (
            exact.dim() > 1
        ) else accuracy.check(name, ours[name], rough, exact, floor)
    return ours


@pytest.mark.parametrize("streamed", [False, True], ids=["on_chip", "streamed"])
def test_iterations_and_their_gradient(interpreter: Worker, streamed: bool) -> None:
    compare(interpreter, problem(1, 5, 9), BALANCED | {"max_iterations": 2, "gradient": "unrolled"}, streamed)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["on_chip", "streamed"])
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients(interpreter: Worker, options: str, gradient: str, streamed: bool) -> None:
    compare(interpreter, problem(2, 5, 9), OPTIONS[options] | {"gradient": gradient}, streamed)

"""Sinkhorn on the CPU, beside POT's batched solver and the loop that one writes with ``logsumexp``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.memory import ask, peak_of_call, tell
from kdkernels.benchmarking.plain import sinkhorn_distances, sinkhorn_plan

EPSILON, ITERATIONS = 0.05, 50
OURS, EAGER, POT = "kdkernels", "eager, log domain", "POT, ot.batch"
SHAPES = {"64 × (128 × 128)": (64, 128, 20), "4096 × (16 × 16)": (4096, 16, 30)}
"""Problems, rows and columns, and how many times faster than the others we want to be."""


def costs(batch: int, n: int) -> Tensor:
    return torch.rand(batch, n, n, generator=torch.Generator().manual_seed(0))


def eager(cost: Tensor) -> Tensor:
    return sinkhorn_distances(cost, EPSILON, ITERATIONS)


def ours(cost: Tensor, gradient: str = "unrolled") -> kd.SinkhornResult:
    return kd.sinkhorn(cost, epsilon=EPSILON, max_iterations=ITERATIONS, gradient=gradient)


def pot(cost: Tensor) -> object:
    from ot.batch import solve_batch

    return solve_batch(cost, EPSILON, max_iter=ITERATIONS, tol=0.0, method="log_sinkhorn", grad="detach")


def trained(distance: Callable[[Tensor], Tensor], cost: Tensor) -> Tensor:
    """The gradient of the sum of the distances."""
    leaf = cost.detach().requires_grad_()
    return torch.autograd.grad(distance(leaf).sum(), leaf)[0]


CONTENDERS: dict[str, Callable[[Tensor], object]] = {
    f"{OURS}, unrolled": lambda cost: trained(lambda leaf: ours(leaf).distance, cost),
    f"{OURS}, implicit": lambda cost: trained(lambda leaf: ours(leaf, "implicit").distance, cost),
    f"{OURS}, envelope": lambda cost: trained(lambda leaf: ours(leaf, "envelope").distance, cost),
    f"{EAGER}, autograd": lambda cost: trained(eager, cost),
}


def marginal_error(plan: Tensor) -> float:
    """The largest of a problem's rows and columns, in L1, from the plan alone."""
    plan = plan.double()
    rows = (plan.sum(-1) - 1 / plan.shape[-2]).abs().sum(-1)
    columns = (plan.sum(-2) - 1 / plan.shape[-1]).abs().sum(-1)
    return float((rows + columns).max())


if __name__ != "__main__":
    from reporting import SideBySide, Target

    each_shape = pytest.mark.parametrize("shape", SHAPES)

    def columns(operation: str, batch: int, n: int) -> dict[str, str | int]:
        return {
            "operation": operation,
            "problems": batch,
            "rows": n,
            "columns": n,
            "iterations": ITERATIONS,
            "dtype": "float32",
            "device": "cpu",
        }

    @each_shape
    def test_forward(side_by_side: SideBySide, shape: str) -> None:
        pytest.importorskip("ot.batch")
        batch, n, times = SHAPES[shape]
        cost = costs(batch, n)
        calls: dict[str, Callable[[], object]] = {
            OURS: lambda: ours(cost),
            EAGER: lambda: eager(cost),
            POT: lambda: pot(cost),
        }
        title = f"Sinkhorn: {shape}, {ITERATIONS} iterations, float32, cpu"
        side_by_side.measure(title, calls, rounds=9, columns=columns("sinkhorn", batch, n))
        for other in (EAGER, POT):
            side_by_side.ratio(f"{other} in ours, {shape}", other, OURS, times, at_least=True)
        errors = [marginal_error(plan) for plan in (ours(cost).plan(), sinkhorn_plan(cost, EPSILON, ITERATIONS))]
        what = f"marginal error in eager's, {shape}"
        side_by_side.targets.append(Target(what, errors[0] / errors[1], 1.0))

    @each_shape
    def test_gradient(side_by_side: SideBySide, shape: str) -> None:
        batch, n, _ = SHAPES[shape]
        cost = costs(batch, n)
        calls: dict[str, Callable[[], object]] = {
            name: lambda call=call: call(cost) for name, call in CONTENDERS.items()
        }
        peaks = {name: ask([sys.executable, __file__, name, shape]) for name in CONTENDERS}
        title = f"Sinkhorn, forward and backward: {shape}, {ITERATIONS} iterations, float32, cpu"
        side_by_side.measure(
            title,
            calls,
            rounds=7,
            columns=columns("sinkhorn, gradient", batch, n),
            peaks=peaks,
            gradient_bytes=cost.nbytes,
        )
        mine, theirs = f"{OURS}, unrolled", f"{EAGER}, autograd"
        side_by_side.ratio(f"autograd through eager in unrolled, {shape}", theirs, mine, 20, at_least=True)
        what = f"memory of autograd through eager in unrolled, {shape}"
        side_by_side.targets.append(Target(what, peaks[theirs] / peaks[mine], 20, at_least=True))

else:
    contender, shape = sys.argv[1:]
    call = CONTENDERS[contender]
    call(costs(2, 8))  # loads what is loaded once
    cost = costs(*SHAPES[shape][:2])
    tell(peak_of_call(lambda: call(cost)))

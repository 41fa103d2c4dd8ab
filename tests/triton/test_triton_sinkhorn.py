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
from kdkernels.triton_kernels.tiling import (
    FEW_PAIRS_PER_WARP,
    MATRIX_ON_CHIP,
    ON_CHIP,
    PAIRS_PER_WARP,
    STREAMED_TILE,
    choose_cost_tiling,
)
from torch import Tensor

Worker = Callable[..., Any]
Problem = tuple[Tensor | None, ...]

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
    if cost.dtype == torch.bfloat16:
        del upstream["plan"]  # whose gradient is a second one, that is rounded and added to the kernels'
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
        if name == "marginal_error":
            torch.testing.assert_close(ours[name].double(), exact, rtol=1e-4, atol=2e-6)
            continue
        # What is wrong anywhere in a problem is carried everywhere by its iterations.
        size = torch.full_like(exact, max(float(exact.abs().max()), 1e-3))
        ours_, rough, exact, size = (
            each.flatten(1) if each.dim() > 1 else each for each in (ours[name], rough, exact, size)
        )
        accuracy.check(name, ours_, rough, exact, size)
    return ours


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["on_chip", "streamed"])
@pytest.mark.slow
def test_iterations_and_their_gradient(interpreter: Worker, streamed: bool) -> None:
    compare(interpreter, problem(1, 5, 9), BALANCED | {"max_iterations": 2, "gradient": "unrolled"}, streamed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "gradient", "streamed"),
    [
        *((options, "unrolled", options == "annealed") for options in OPTIONS),
        *(
            (options, "implicit", options == "relaxed")
            for options in ("balanced", "relaxed", "half_relaxed", "converged")
        ),
        ("converged", "implicit", True),
        ("relaxed", "envelope", False),
    ],
)
def test_values_and_gradients(interpreter: Worker, options: str, gradient: str, streamed: bool) -> None:
    compare(interpreter, problem(2, 5, 9), OPTIONS[options] | {"gradient": gradient}, streamed)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["on_chip", "streamed"])
def test_padding_has_no_influence(interpreter: Worker, streamed: bool) -> None:
    cost, a, b = problem(3, 7, 10)
    assert cost is not None
    assert a is not None
    assert b is not None
    n, m = torch.tensor([4, 0, 7]), torch.tensor([9, 5, 10])
    options = BALANCED | {"row_lengths": n, "column_lengths": m, "gradient": "unrolled", "unbalanced": 1.0}
    upstream = upstream_of(cost.shape, "unrolled")
    found = []
    for filling in (math.nan, 3.0):
        dirty = [tensor.clone() for tensor in (cost, a, b)]
        for k in range(3):
            dirty[0][k, n[k] :] = filling
            dirty[0][k, :, m[k] :] = filling
            dirty[1][k, n[k] :] = filling
            dirty[2][k, m[k] :] = filling
        found.append(interpreter(interpreted_transport.sinkhorn, tuple(dirty), upstream, options, "triton", streamed))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
        assert tensor.isfinite().all(), name
    assert found[0]["distance"][1] == 0
    assert found[0]["iterations"].tolist() == [6, 0, 6]
    for k in (0, 2):
        rows, columns = slice(0, int(n[k])), slice(0, int(m[k]))
        assert (found[0]["grad_cost"][k, n[k] :] == 0).all()
        assert (found[0]["f"][k, n[k] :] == 0).all()
        alone = cost[k : k + 1, rows, columns], a[k : k + 1, rows], b[k : k + 1, columns]
        part = {
            name: each[k : k + 1, rows, columns] if name == "plan" else each[k : k + 1]
            for name, each in upstream.items()
        }
        part["f"], part["g"] = part["f"][:, rows], part["g"][:, columns]
        lone = interpreted_transport.sinkhorn(
            double(alone), part, BALANCED | {"gradient": "unrolled", "unbalanced": 1.0}, "reference"
        )
        torch.testing.assert_close(
            found[0]["grad_cost"][k : k + 1, rows, columns].double(), lone["grad_cost"], rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_forbidden_pairs_and_rows_without_mass(interpreter: Worker, gradient: str) -> None:
    cost, a, b = problem(2, 6, 8, torch.bfloat16)
    assert cost is not None
    assert a is not None
    assert b is not None
    cost[0, 0, 1:5] = math.inf
    cost[0, 4] = math.inf
    a[0, 4] = b[1, 2] = a[1, 0] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    found = compare(interpreter, (cost, a, b), BALANCED | {"gradient": gradient})
    assert (found["plan"][0, 0, 1:5] == 0).all()
    assert (found["grad_cost"][0, 4] == 0).all()
    assert found["f"][0, 4] == 0


@pytest.mark.slow
def test_each_problem_stops_by_itself(interpreter: Worker) -> None:
    cost, a, b = problem(3, 6, 5)
    assert cost is not None
    cost *= torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1)
    options = {"epsilon": 0.25, "max_iterations": 30, "tolerance": 1e-3}
    for streamed in (False, True):
        found = interpreter(interpreted_transport.sinkhorn, (cost, a, b), {}, options, "triton", streamed)
        truth = interpreted_transport.sinkhorn(double((cost, a, b)), {}, options, "reference")
        assert found["iterations"].tolist() == truth["iterations"].tolist()
        assert len(set(truth["iterations"].tolist())) == 3


@pytest.mark.slow
def test_faults_are_found(interpreter: Worker) -> None:
    def complaint(cost: Tensor) -> str:
        options = {"epsilon": 1.0, "backend": "triton"}
        return str(interpreter(interpreted_transport.complaint, "sinkhorn", (cost,), options))

    bad, row, column = torch.ones(3, 2, 4, 5).unbind()
    bad[1, 2, 3] = -math.inf
    assert "problem 1 holds NaN or -inf" in complaint(bad)
    bad[1, 2, 3] = math.nan
    assert "problem 1 holds NaN or -inf" in complaint(bad)
    row[1, 2] = math.inf
    assert "every partner of a row" in complaint(row)
    column[0, :, 4] = math.inf
    assert "every partner of a column" in complaint(column)


@pytest.mark.slow
def test_starts_and_empty_batches(interpreter: Worker) -> None:
    cost, a, b = problem(2, 5, 9)
    assert cost is not None
    assert b is not None
    options = BALANCED | {"gradient": "unrolled", "warm_start": (torch.zeros(2, 5), torch.rand(2, 9))}
    compare(interpreter, (cost, a, b), options)
    compare(interpreter, (cost, a, b), options, streamed=True)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        upstream = upstream_of(torch.Size(shape), "implicit")
        found = interpreter(interpreted_transport.sinkhorn, (torch.ones(shape), None, None), upstream, BALANCED)
        assert found["distance"].tolist() == [0.0] * shape[0]
        assert found["grad_cost"].shape == shape


def case(kernel: str, target: str, dtype: str, size: tuple[int, int] | None = None, **constants: Any) -> Case:
    """A kernel with the tiling that the launcher gives it."""
    largest = {4: (64, 128), 8: (32, 32)} if kernel == "sinkhorn_implicit" else {4: (128, 128), 8: (32, 64)}
    streamed = kernel not in ("sinkhorn", "sinkhorn_adjoint", "sinkhorn_implicit")
    itemsize = 8 if dtype == "fp64" else 4
    rows, columns = STREAMED_TILE if streamed else size or largest[itemsize]
    assert rows * columns <= (MATRIX_ON_CHIP if kernel == "sinkhorn_implicit" else ON_CHIP)[itemsize]
    few = streamed or kernel == "sinkhorn_implicit"
    warp_size = TARGETS[target][2]
    tiling = choose_cost_tiling(rows, columns, warp_size, FEW_PAIRS_PER_WARP if few else PAIRS_PER_WARP)
    lanes = {"ROW_LANES": tiling.row_lanes, "COLUMN_LANES": tiling.column_lanes}
    steps = {"ROW_STEPS": tiling.row_steps, "COLUMN_STEPS": tiling.column_steps}
    if kernel in ("sinkhorn", "sinkhorn_streamed", "sinkhorn_implicit"):
        constants["FAST_LOG"] = target != "gfx942" and dtype != "fp64"
    if kernel in ("sinkhorn", "sinkhorn_streamed"):
        constants.setdefault("RELAXED", False)
    if kernel == "sinkhorn_implicit":
        constants["BALANCED"] = True
    if kernel.endswith("_streamed"):
        constants["VECTOR"] = 256
    if kernel == "sinkhorn_product":
        constants.setdefault("COLUMNS", False)
    return Case(kernel, target, dtype, tuple((steps | lanes | constants).items()), tiling.num_warps)


KERNELS = (
    "sinkhorn",
    "sinkhorn_streamed",
    "sinkhorn_adjoint",
    "sinkhorn_adjoint_streamed",
    "sinkhorn_implicit",
    "sinkhorn_product",
    "sinkhorn_cost_gradient",
)
SMOKE = case("sinkhorn", "sm_90", "bf16", (32, 32))
CASES = [case("sinkhorn", target, "fp32") for target in TARGETS]
CASES += [case("sinkhorn_adjoint", target, "fp32") for target in ("sm_80", "sm_100", "gfx942")]
CASES += [case("sinkhorn_implicit", target, "fp32") for target in ("sm_90", "gfx942")]
CASES += [case("sinkhorn_streamed", target, "bf16") for target in ("sm_80", "gfx942")]
CASES += [case(kernel, "sm_90", "bf16") for kernel in ("sinkhorn_adjoint_streamed", "sinkhorn_cost_gradient")]
CASES += [case("sinkhorn_product", "sm_90", "fp32", COLUMNS=True)]


@pytest.mark.slow
def test_compiles_without_spills(compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, SMOKE)["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_compile_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_and_hyperparameters_never_recompile(kernel: str, compiler: Worker) -> None:
    signatures = compiler(aot_transport.specialisations, "sinkhorn", kernel)
    assert len(set(signatures)) == 1, signatures

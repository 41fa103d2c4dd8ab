"""The family sinkhorn in Triton."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.transport import SOLVER_TOLERANCE, TransportGradients, TransportSpec, TransportValues
from kdkernels.backends.triton.launching import load_kernels, on_device_of, precision, register_limit, warp_size

__all__ = ["SINKHORN_POTENTIALS", "sinkhorn_backward", "sinkhorn_forward"]

SINKHORN_POTENTIALS = None

VECTOR = 256
"""Elements of a vector that a program of a streamed problem moves at a time."""

LOG2_E = 1 / math.log(2)


class Batch(NamedTuple):
    """The problems as the kernels take them."""

    cost: Tensor
    a: Tensor
    b: Tensor
    log_a: Tensor
    """Base 2."""
    log_b: Tensor
    spec: TransportSpec

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "cost": self.cost,
            "row_lengths": self.spec.row_lengths,
            "column_lengths": self.spec.column_lengths,
            "rows": self.cost.shape[1],
            "columns": self.cost.shape[2],
        }

    @property
    def masses(self) -> dict[str, Any]:
        return {"log_a": self.log_a, "log_b": self.log_b}

    @property
    def reaches(self) -> dict[str, float]:
        return {"row_reach": self.spec.row_reach, "column_reach": self.spec.column_reach}

    def epsilons(self) -> Tensor:
        """One per iteration, made on the device: a copy from the host would wait for it."""
        steps = torch.arange(self.spec.max_iterations, dtype=torch.float64, device=self.cost.device)
        annealed = self.spec.epsilon_start * torch.pow(self.spec.epsilon_decay, steps)
        return annealed.clamp(min=self.spec.epsilon).to(self.a.dtype)

    def on_chip(self, largest: dict[int, int]) -> bool:
        """Whether a program holds a problem in its registers."""
        tiling = load_kernels().tiling.choose_cost_tiling(*self.cost.shape[1:], warp_size(self.cost))
        sides = tiling.rows, tiling.columns
        fits = math.prod(sides) <= largest[self.a.element_size()]
        return bool(fits and max(sides) <= load_kernels().tiling.LONGEST_SIDE)

    def tile(self, on_chip: bool, solving: bool = False, kernel: str = "") -> dict[str, Any]:
        """The constants of a kernel that say how a problem is cut up, and its warps and registers."""
        sizes = load_kernels().tiling
        rows, columns = self.cost.shape[1:] if on_chip else sizes.STREAMED_TILE
        pairs = sizes.PAIRS_PER_WARP if on_chip and not solving else sizes.FEW_PAIRS_PER_WARP
        tiling = sizes.choose_cost_tiling(rows, columns, warp_size(self.cost), pairs)
        double = self.a.dtype == torch.float64
        most_registers = None if double else tiling.most_registers(kernel, warp_size(self.cost))
        return {
            "COMPUTE": precision(double)["compute"],
            "ROW_STEPS": tiling.row_steps,
            "COLUMN_STEPS": tiling.column_steps,
            "ROW_LANES": tiling.row_lanes,
            "COLUMN_LANES": tiling.column_lanes,
            "num_warps": tiling.num_warps,
            **register_limit(most_registers),
        }

    @property
    def fast_log(self) -> bool:
        return bool(precision(self.a.dtype == torch.float64)["fast_log"])

    def inside(self) -> tuple[Tensor | float, Tensor | float]:
        """1 on the valid rows and columns, 0 on the padding."""
        lengths = self.spec.row_lengths, self.spec.column_lengths
        found: list[Tensor | float] = []
        for length, masses in zip(lengths, (self.a, self.b), strict=True):
            places = torch.arange(masses.shape[1], device=masses.device)
            found.append(1.0 if length is None else (places < length.unsqueeze(-1)).to(masses.dtype))
        return found[0], found[1]


def prepare(cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec) -> Batch:
    if spec.start is not None:
        spec = spec._replace(start=spec.start.to(a.dtype).contiguous())
    return Batch(cost, a, b, a.log2(), b.log2(), spec)


def sinkhorn_forward(cost: Tensor, a: Tensor, b: Tensor, spec: TransportSpec, keep_history: bool) -> TransportValues:
    """See ``kdkernels.backends.transport``."""
    batch, n, m = cost.shape
    steps = spec.max_iterations if keep_history else 0
    values = TransportValues(
        distance=a.new_zeros(batch),
        value=a.new_zeros(batch),
        f=a.new_zeros(batch, n),
        g=a.new_zeros(batch, m),
        iterations=torch.zeros(batch, dtype=torch.int64, device=a.device),
        error=a.new_zeros(batch),
        status=torch.zeros(batch, dtype=torch.int32, device=a.device),
        f_history=a.new_zeros(batch, steps, n),
        g_history=a.new_zeros(batch, steps, m),
    )
    if 0 in cost.shape:
        return values
    problems = prepare(cost, a, b, spec)
    kernels = load_kernels()
    on_chip = problems.on_chip(kernels.tiling.ON_CHIP)
    kernel = kernels.sinkhorn.sinkhorn_kernel if on_chip else kernels.sinkhorn.sinkhorn_streamed_kernel
    streamed = {} if on_chip else {"next_f": torch.empty_like(a), "VECTOR": VECTOR}
    with on_device_of(cost, "sinkhorn"):
        kernel[(batch,)](
            **problems.arguments,
            **problems.masses,
            **problems.reaches,
            start=problems.spec.start,
            epsilons=problems.epsilons(),
            max_iterations=spec.max_iterations,
            epsilon=spec.epsilon,
            tolerance=spec.tolerance,
            f_out=values.f,
            g_out=values.g,
            f_history=values.f_history if keep_history else None,
            g_history=values.g_history if keep_history else None,
            iterations=values.iterations,
            error_out=values.error,
            status=values.status,
            RELAXED=not spec.balanced,
            FAST_LOG=problems.fast_log,
            **problems.tile(on_chip, kernel="sinkhorn" if on_chip else "sinkhorn_streamed"),
            **streamed,
        )
    rows = plan_sums(problems, values.f, values.g, columns=False)
    objective = (a * conjugate(values.f, spec.row_reach)).sum(-1) + (b * conjugate(values.g, spec.column_reach)).sum(-1)
    excess = (a * rows.mass).sum(-1) - a.sum(-1) * b.sum(-1)
    return values._replace(distance=(a * rows.cost).sum(-1), value=objective - spec.epsilon * excess)


def conjugate(potential: Tensor, reach: float) -> Tensor:
    return potential if math.isinf(reach) else -reach * torch.expm1(-potential / reach)


class PlanSums(NamedTuple):
    """Of the rows of the plan over a, or of its columns over b."""

    mass: Tensor
    cost: Tensor


def plan_sums(problems: Batch, f: Tensor, g: Tensor, *, columns: bool) -> PlanSums:
    scale = LOG2_E / problems.spec.epsilon
    row_exponents = f * scale + problems.log_a if columns else f * scale
    column_exponents = g * scale if columns else g * scale + problems.log_b
    return PlanSums(*products(problems, row_exponents, column_exponents, None, columns=columns, with_cost=True))


def products(
    problems: Batch,
    row_exponents: Tensor,
    column_exponents: Tensor,
    vector: Tensor | None,
    *,
    columns: bool,
    with_cost: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``sinkhorn_product_kernel``; without the cost the second is empty."""
    kernels = load_kernels()
    tile = problems.tile(on_chip=False)
    outer = problems.b if columns else problems.a
    product = torch.empty_like(outer)
    cost_product = torch.empty_like(outer) if with_cost else outer.new_empty(0)
    block = tile["COLUMN_STEPS"] * tile["COLUMN_LANES"] if columns else tile["ROW_STEPS"] * tile["ROW_LANES"]
    with on_device_of(outer, "sinkhorn"):
        kernels.sinkhorn.sinkhorn_product_kernel[(len(outer), -(-outer.shape[1] // block))](
            **problems.arguments,
            row_exponents=row_exponents,
            column_exponents=column_exponents,
            vector=vector,
            epsilon=problems.spec.epsilon,
            product=product,
            cost_product=cost_product if with_cost else None,
            COLUMNS=columns,
            **tile,
        )
    return product, cost_product


class Adjoints(NamedTuple):
    """What the gradient to the cost is made from, see ``sinkhorn_cost_gradient_kernel``, and those to the marginals."""

    start: Tensor | None
    f_history: Tensor
    normalised_f: Tensor
    g_history: Tensor
    f_adjoints: Tensor
    g_adjoints: Tensor
    epsilons: Tensor
    iterations: Tensor
    grad_a: Tensor
    grad_b: Tensor


def sinkhorn_backward(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    values: TransportValues,
    spec: TransportSpec,
    gradient: str,
    upstream: TransportGradients,
    grad_cost: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """See ``kdkernels.backends.transport``."""
    if 0 in cost.shape:
        for empty in (grad_cost, grad_a, grad_b):
            if empty is not None:
                empty.zero_()
        return
    problems = prepare(cost, a, b, spec)
    epsilon, f, g = spec.epsilon, values.f, values.g
    nothing = a.new_zeros(len(cost))
    to_distance = nothing if upstream.distance is None else upstream.distance
    to_value = nothing if upstream.value is None else upstream.value
    if gradient == "envelope":
        to_distance, to_value = nothing, to_value + to_distance
    rows = plan_sums(problems, f, g, columns=False)
    columns = plan_sums(problems, f, g, columns=True)
    by_distance, by_value = to_distance.unsqueeze(-1), to_value.unsqueeze(-1)
    adjoints = None
    if gradient != "envelope":
        grad_f = a * (by_distance * rows.cost / epsilon + by_value * (slope(f, spec.row_reach) - rows.mass))
        grad_g = b * (by_distance * columns.cost / epsilon + by_value * (slope(g, spec.column_reach) - columns.mass))
        grad_f = grad_f if upstream.f is None else grad_f + upstream.f
        grad_g = grad_g if upstream.g is None else grad_g + upstream.g
        inside = problems.inside()
        follow = unrolled if gradient == "unrolled" else implicit
        adjoints = follow(problems, values, grad_f * inside[0], grad_g * inside[1], rows)
    if grad_a is not None and grad_b is not None:
        inside = problems.inside()
        masses = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        direct_a = by_distance * rows.cost + by_value * (
            conjugate(f, spec.row_reach) - epsilon * (rows.mass - masses[1])
        )
        direct_b = by_distance * columns.cost + by_value * (
            conjugate(g, spec.column_reach) - epsilon * (columns.mass - masses[0])
        )
        torch.mul(direct_a, inside[0], out=grad_a)
        torch.mul(direct_b, inside[1], out=grad_b)
        if adjoints is not None:
            grad_a.add_(adjoints.grad_a)
            grad_b.add_(adjoints.grad_b)
    if grad_cost is not None:
        cost_gradient(problems, values, adjoints, to_distance, to_value, grad_cost)


def slope(potential: Tensor, reach: float) -> Tensor | float:
    """The derivative of ``conjugate``."""
    return 1.0 if math.isinf(reach) else torch.exp(-potential / reach)


def unrolled(problems: Batch, values: TransportValues, grad_f: Tensor, grad_g: Tensor, _: PlanSums) -> Adjoints:
    """Back through the iterations that were made."""
    kernels = load_kernels()
    spec = problems.spec
    steps, m = spec.max_iterations, problems.cost.shape[2]
    found = Adjoints(
        spec.start,
        values.f_history,
        values.f_history,
        values.g_history,
        torch.empty_like(values.f_history),
        values.g_history.new_empty(len(grad_g), steps + 1, m),
        problems.epsilons(),
        values.iterations,
        torch.empty_like(grad_f),
        torch.empty_like(grad_g),
    )
    on_chip = problems.on_chip(kernels.tiling.ON_CHIP)
    kernel = kernels.sinkhorn.sinkhorn_adjoint_kernel if on_chip else kernels.sinkhorn.sinkhorn_adjoint_streamed_kernel
    with on_device_of(grad_f, "sinkhorn"):
        kernel[(len(grad_f),)](
            **problems.arguments,
            **problems.masses,
            **problems.reaches,
            start=found.start,
            f_history=found.f_history,
            g_history=found.g_history,
            epsilons=found.epsilons,
            iterations=found.iterations,
            max_iterations=steps,
            grad_f=grad_f,
            grad_g=grad_g,
            f_adjoints=found.f_adjoints,
            g_adjoints=found.g_adjoints,
            grad_a=found.grad_a,
            grad_b=found.grad_b,
            **problems.tile(on_chip),
            **({} if on_chip else {"VECTOR": VECTOR}),
        )
    return found


def implicit(problems: Batch, values: TransportValues, grad_f: Tensor, grad_g: Tensor, rows: PlanSums) -> Adjoints:
    """Back through a last iteration that repeats for ever."""
    kernels = load_kernels()
    batch, _, m = problems.cost.shape
    found = Adjoints(
        values.g,
        values.f.unsqueeze(1),
        torch.empty_like(values.f).unsqueeze(1),
        values.g.unsqueeze(1),
        torch.empty_like(grad_f),
        grad_g.new_empty(batch, 2, m),
        grad_f.new_full((1,), problems.spec.epsilon),
        (values.iterations > 0).to(torch.int64),
        torch.empty_like(grad_f),
        torch.empty_like(grad_g),
    )
    if not problems.on_chip(kernels.tiling.MATRIX_ON_CHIP):
        solve_streamed(problems, values, grad_f, grad_g, rows, found)
        return found
    with on_device_of(grad_f, "sinkhorn"):
        kernels.sinkhorn.sinkhorn_implicit_kernel[(batch,)](
            **problems.arguments,
            **problems.masses,
            **problems.reaches,
            f=values.f,
            g=values.g,
            max_steps=solver_steps(problems),
            epsilon=problems.spec.epsilon,
            solver_tolerance=SOLVER_TOLERANCE[problems.a.dtype],
            grad_f=grad_f,
            grad_g=grad_g,
            normalised_f=found.normalised_f,
            f_adjoints=found.f_adjoints,
            g_adjoints=found.g_adjoints,
            grad_a=found.grad_a,
            grad_b=found.grad_b,
            BALANCED=problems.spec.balanced,
            FAST_LOG=problems.fast_log,
            **problems.tile(on_chip=True, solving=True, kernel="sinkhorn_implicit"),
        )
    return found


def solver_steps(problems: Batch) -> int:
    return 2 * min(problems.cost.shape[1:]) + 10


def solve_streamed(
    problems: Batch, values: TransportValues, grad_f: Tensor, grad_g: Tensor, rows: PlanSums, found: Adjoints
) -> None:
    """``sinkhorn_implicit_kernel`` for problems of any size, one launch per product of the matrix.

    Each of these reads the whole cost, so that it is worth all of the device; a program per problem would solve a single
    large one on a single multiprocessor. Problems that are solved wait for the others: asking would synchronise.
    """
    spec = problems.spec
    scale = LOG2_E / spec.epsilon
    row_damping, column_damping = (1 / (1 + spec.epsilon / reach) for reach in (spec.row_reach, spec.column_reach))
    f, g = values.f * scale, values.g * scale
    made_g = g / column_damping
    made_f = torch.where(rows.mass > 0, f - rows.mass.log2(), 0.0)
    found.normalised_f.copy_((made_f * (row_damping / scale)).unsqueeze(1))

    def rows_of(vector: Tensor) -> Tensor:
        return column_damping * products(problems, f, made_g, vector, columns=False)[0]

    def columns_of(vector: Tensor) -> Tensor:
        return row_damping * products(problems, made_f, g, vector, columns=True)[0]

    row_exponents = 0.5 * (problems.log_a + f + made_f)
    column_exponents = 0.5 * (problems.log_b + g + made_g)

    def matrix(vector: Tensor) -> Tensor:
        inner, _ = products(problems, row_exponents, column_exponents, vector, columns=False)
        image, _ = products(problems, row_exponents, column_exponents, inner, columns=True)
        return vector - row_damping * column_damping * image

    root = torch.exp2(0.5 * (problems.log_b + g - made_g))
    null = root / root.norm(dim=-1, keepdim=True).clamp(min=1e-15) if spec.balanced else torch.zeros_like(root)

    def without_null_space(vector: Tensor) -> Tensor:
        return vector - null * (null * vector).sum(-1, keepdim=True)

    given = columns_of(grad_f - problems.a * rows_of(grad_g))
    residual = -torch.exp2(0.5 * (problems.log_b - g + made_g)) * given
    residual = without_null_space(without_null_space(residual))  # twice: see the kernel
    solution, direction = torch.zeros_like(residual), residual
    square = residual.square().sum(-1, keepdim=True)
    enough = square * SOLVER_TOLERANCE[problems.a.dtype] ** 2
    no_curvature = load_kernels().sinkhorn.NO_CURVATURE.value
    for _ in range(solver_steps(problems)):
        image = matrix(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = (square > enough) & (curvature > no_curvature * direction.square().sum(-1, keepdim=True))
        length = torch.where(going, square / curvature, 0.0)
        solution = solution + length * direction
        residual = without_null_space(residual - length * image)
        new_square = torch.where(going, residual.square().sum(-1, keepdim=True), 0.0)
        direction = residual + direction * torch.where(going, new_square / square, 0.0)
        square = new_square
    z_g = grad_g + root * without_null_space(solution)
    row_sums = rows_of(z_g)
    z_f = grad_f - problems.a * row_sums
    found.g_adjoints[:, 1] = z_g
    found.f_adjoints.copy_(z_f)
    torch.mul(row_sums, -spec.epsilon, out=found.grad_a)
    torch.mul(columns_of(z_f), -spec.epsilon, out=found.grad_b)


def cost_gradient(
    problems: Batch,
    values: TransportValues,
    adjoints: Adjoints | None,
    to_distance: Tensor,
    to_value: Tensor,
    grad_cost: Tensor,
) -> None:
    batch, n, m = problems.cost.shape
    tile = problems.tile(on_chip=False)
    blocks = -(-n // (tile["ROW_STEPS"] * tile["ROW_LANES"])), -(-m // (tile["COLUMN_STEPS"] * tile["COLUMN_LANES"]))
    grid = (batch, *blocks)
    names = Adjoints._fields[: Adjoints._fields.index("grad_a")]
    through = dict.fromkeys(names) if adjoints is None else {name: getattr(adjoints, name) for name in names}
    with on_device_of(grad_cost, "sinkhorn"):
        load_kernels().sinkhorn.sinkhorn_cost_gradient_kernel[grid](
            **problems.arguments,
            **problems.masses,
            **problems.reaches,
            **through,
            max_iterations=1 if adjoints is None else adjoints.f_history.shape[1],
            epsilon=problems.spec.epsilon,
            f=values.f,
            g=values.g,
            plan_factors=to_distance + to_value,
            cost_factors=-to_distance / problems.spec.epsilon,
            cost_gradient=grad_cost,
            **tile,
        )

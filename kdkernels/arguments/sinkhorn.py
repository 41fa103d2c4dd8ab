"""The arguments of ``sinkhorn``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.transport import GRADIENTS, TransportSpec, transport_dtype
from kdkernels.checks import check_choice, check_floating, check_integer, check_integral, check_real, is_real
from kdkernels.debugging import values_are_checked

__all__ = ["Transport", "prepare_sinkhorn", "valid_pairs"]

MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""How far the sums of two marginals may differ, relative to the larger, by the least precise dtype they were given in."""


class Transport(NamedTuple):
    """A batch of problems: cost ``[B, n, m]``, marginals ``[B, n]`` and ``[B, m]`` of the compute type."""

    cost: Tensor
    a: Tensor
    b: Tensor
    spec: TransportSpec
    gradient: str
    batch_shape: torch.Size


def prepare_sinkhorn(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    gradient: str,
    unbalanced: Any,
    marginals: str,
    epsilon_start: float | None,
    epsilon_decay: float,
    warm_start: Any,
) -> Transport:
    check_floating("cost", cost)
    if cost.dim() < 2:
        raise ValueError(f"cost must have the shape [..., n, m], got {list(cost.shape)}")
    for name, marginal in (("a", a), ("b", b)):
        if marginal is not None:
            check_floating(name, marginal)
    check_choice("gradient", gradient, GRADIENTS)
    batch_shape, (n, m) = cost.shape[:-2], cost.shape[-2:]
    batch = math.prod(batch_shape)
    spec = TransportSpec(
        check_real("epsilon", epsilon, positive=True),
        at_least_one("max_iterations", max_iterations),
        not_negative("tolerance", tolerance),
        *reaches(unbalanced),
        *annealing(epsilon_start, epsilon_decay),
        lengths("row_lengths", row_lengths, n, batch_shape, cost),
        lengths("column_lengths", column_lengths, m, batch_shape, cost),
        start(warm_start, batch_shape, m, cost),
    )
    check_choice("marginals", marginals, ("probability", "unit"))
    if marginals == "unit" and not (a is None and b is None):
        raise ValueError('marginals: "unit" is for marginals that are not given; a and b must be None')
    if marginals == "unit" and spec.balanced:
        check_square(spec, n, m, cost)
    dtype = transport_dtype(cost, a, b)
    flat = cost.reshape(batch, n, m).contiguous()
    row_lengths, column_lengths = both_or_none(spec, n, m)
    rows = marginal_of("a", a, batch_shape, n, row_lengths, marginals, flat, dtype)
    columns = marginal_of("b", b, batch_shape, m, column_lengths, marginals, flat, dtype)
    if values_are_checked(cost) and not (a is None and b is None):
        given = [tensor.dtype for tensor in (a, b) if tensor is not None]
        check_masses(rows, columns, spec, max(MASS_TOLERANCE[one] for one in given))
    return Transport(flat, rows, columns, spec, gradient, batch_shape)


def both_or_none(spec: TransportSpec, n: int, m: int) -> tuple[Tensor | None, Tensor | None]:
    """The lengths of rows and columns, 0 in a problem that lacks either."""
    rows, columns = spec.row_lengths, spec.column_lengths
    if n == 0 or m == 0 or (rows is None and columns is None):
        return rows, columns
    rows_there = True if columns is None else columns > 0
    columns_there = True if rows is None else rows > 0
    given = rows if rows is not None else columns
    assert given is not None
    rows = given.new_full(given.shape, n) if rows is None else rows
    columns = given.new_full(given.shape, m) if columns is None else columns
    return rows * rows_there, columns * columns_there


def at_least_one(name: str, value: Any) -> int:
    if check_integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def not_negative(name: str, value: Any) -> float:
    if check_real(name, value) < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return float(value)


def reaches(unbalanced: Any) -> tuple[float, float]:
    """Of rows and columns; infinite where the marginal is kept."""
    pair = tuple(unbalanced) if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise ValueError(f"unbalanced must be one reach or a pair of them (rows, columns), got {unbalanced!r}")

    def reach(value: Any) -> float:
        if value is None:
            return math.inf
        if not is_real(value):
            raise TypeError(f"unbalanced must be None, a positive number or a pair of these, got {unbalanced!r}")
        if not value > 0:
            raise ValueError(f"unbalanced must be positive, got {unbalanced!r}")
        return float(value)

    return reach(pair[0]), reach(pair[1])


def annealing(epsilon_start: Any, epsilon_decay: Any) -> tuple[float, float]:
    first = 0.0 if epsilon_start is None else check_real("epsilon_start", epsilon_start, positive=True)
    decay = check_real("epsilon_decay", epsilon_decay, positive=True)
    if decay >= 1:
        raise ValueError(f"epsilon_decay must lie between 0 and 1, got {epsilon_decay!r}")
    return first, decay


def lengths(name: str, given: Tensor | None, size: int, batch_shape: torch.Size, cost: Tensor) -> Tensor | None:
    if given is None:
        return None
    check_integral(name, given)
    if given.shape != batch_shape:
        raise ValueError(f"{name} must have the shape {list(batch_shape)} of the cost's batch, got {list(given.shape)}")
    check_device(name, given, cost)
    if values_are_checked(given) and bool(((given < 0) | (given > size)).any()):
        raise ValueError(f"{name} must lie between 0 and {size}, got {int(given.min())} to {int(given.max())}")
    return given.reshape(-1).to(torch.int64).contiguous()


def check_device(name: str, tensor: Tensor, cost: Tensor) -> None:
    if tensor.device != cost.device:
        raise ValueError(f"{name} must be on the device of cost, {cost.device}, got {tensor.device}")


def start(warm_start: Any, batch_shape: torch.Size, m: int, cost: Tensor) -> Tensor | None:
    """The potentials of the columns to start from; those of the rows follow from them."""
    if warm_start is None:
        return None
    pair = getattr(warm_start, "potentials", warm_start)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Tensor):
        raise TypeError(
            f"warm_start must be a SinkhornResult or a pair of potentials (f, g), got {type(warm_start).__name__}"
        )
    g: Tensor = pair[1].detach()
    check_floating("warm_start", g)
    if g.shape != (*batch_shape, m):
        raise ValueError(f"warm_start: g must have the shape {[*batch_shape, m]}, got {list(g.shape)}")
    check_device("warm_start", g, cost)
    if values_are_checked(g) and not bool(g.isfinite().all()):
        raise ValueError("warm_start: g must be finite")
    return g.reshape(-1, m).contiguous()


def check_square(spec: TransportSpec, n: int, m: int, cost: Tensor) -> None:
    rows = n if spec.row_lengths is None else spec.row_lengths
    columns = m if spec.column_lengths is None else spec.column_lengths
    if isinstance(rows, int) and isinstance(columns, int):
        square = rows == columns
    else:
        square = not values_are_checked(cost) or bool(torch.as_tensor(rows == columns).all())
    if not square:
        raise ValueError(
            'marginals: "unit" gives every row and column the mass 1, so each problem needs as many rows as columns; '
            "got cost of other lengths"
        )


def valid_entries(lengths: Tensor | None, size: int) -> Tensor | None:
    """bool ``[B, size]``, or None if everything is."""
    if lengths is None:
        return None
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def valid_pairs(problem: Transport) -> Tensor | None:
    """bool ``[B, n, m]`` or a shape that broadcasts to it; None if there is no padding."""
    rows = valid_entries(problem.spec.row_lengths, problem.cost.shape[1])
    columns = valid_entries(problem.spec.column_lengths, problem.cost.shape[2])
    if rows is None:
        return None if columns is None else columns.unsqueeze(-2)
    return rows.unsqueeze(-1) if columns is None else rows.unsqueeze(-1) & columns.unsqueeze(-2)


def marginal_of(
    name: str,
    given: Tensor | None,
    batch_shape: torch.Size,
    size: int,
    lengths: Tensor | None,
    marginals: str,
    cost: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``[B, size]``, zero on the padding."""
    valid = valid_entries(lengths, size)
    if 0 in cost.shape[1:]:  # nothing to carry, whatever the other side holds
        valid = torch.zeros(cost.shape[0], size, dtype=torch.bool, device=cost.device)
        lengths = valid.sum(-1)
    if given is None:
        ones = cost.new_ones(cost.shape[0], size, dtype=dtype) if valid is None else valid.to(dtype)
        if marginals == "unit":
            return ones
        return ones / max(size, 1) if lengths is None else ones / lengths.clamp(min=1).unsqueeze(-1)
    check_device(name, given, cost)
    if given.dim() == 0 or given.shape[-1] != size or given.dim() > len(batch_shape) + 1:
        raise ValueError(f"{name} must have the shape {[*batch_shape, size]}, got {list(given.shape)}")
    try:
        flat = given.broadcast_to(*batch_shape, size).reshape(-1, size).to(dtype)
    except RuntimeError:
        raise ValueError(f"{name} must have the shape {[*batch_shape, size]}, got {list(given.shape)}") from None
    if valid is not None:
        flat = torch.where(valid, flat, 0)
    # One comparison finds NaN, too.
    if values_are_checked(given) and not bool(((flat >= 0) & (flat < math.inf)).all()):
        raise ValueError(f"{name} must be finite and not negative, got {float(flat.min())} to {float(flat.max())}")
    return flat.contiguous()


def check_masses(a: Tensor, b: Tensor, spec: TransportSpec, tolerance: float) -> None:
    if not spec.balanced or 0 in a.shape or 0 in b.shape:
        return
    rows, columns = a.detach().double().sum(-1), b.detach().double().sum(-1)
    wrong = (rows - columns).abs() > tolerance * torch.maximum(rows, columns)
    for lengths in (spec.row_lengths, spec.column_lengths):
        if lengths is not None:
            wrong &= lengths > 0
    if bool(wrong.any()):
        place = int(wrong.int().argmax())
        raise ValueError(
            f"a and b must have the same sum, got {float(rows[place]):.6g} and {float(columns[place]):.6g} in problem {place}; "
            "unbalanced= relaxes the marginals"
        )

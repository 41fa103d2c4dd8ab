# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Entropic optimal transport of a batch of ragged problems, in the log domain, base 2.

With the reference measure a x b the plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), and one iteration is

    f_i = -lam_a eps log sum_j b_j exp((g_j - C_ij) / eps)      g_j = -lam_b eps log sum_i a_i exp((f_i - C_ij) / eps)

with lam = 1, or rho / (rho + eps) for a side whose marginal is relaxed ("damping" below). One program solves one problem
in a single launch: with its cost in registers (`sinkhorn_kernel`), or, if that does not fit, reading it tile by tile in
every half of an iteration, with the potentials in global memory (`sinkhorn_streamed_kernel`).

Backward. With the weights W_ij = a_i exp((f_i - C_ij) / eps + g_j / (lam_b eps)), columns of which sum to 1, and
V_ij = b_j exp((g'_j - C_ij) / eps + f_i / (lam_a eps)), rows of which do (g' is the g that f was made from), the adjoints
z of the potentials of an iteration are

    z_f = -lam_b W z_g      z_g' = -lam_a V' z_f      dC = lam_b W o (1 z_g') + lam_a V o (z_f 1')

so that they cost one product of the kernel matrix with a vector each (`sinkhorn_adjoint_kernel`, `..._streamed_kernel`),
and the gradient to the cost, the sum over the iterations, is made tile by tile afterwards by as many programs as there are
tiles (`sinkhorn_cost_gradient_kernel`): nothing but vectors is kept of an iteration.

A tile of a cost is [ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES]: a warp (ROW_LANES x COLUMN_LANES threads) holds a
patch of it at a time, so that each thread has several rows and columns of the whole and the vectors along either side,
[ROW_STEPS, ROW_LANES] and [COLUMN_STEPS, COLUMN_LANES], are spread over the threads: a warp with one row to itself would
hold all of them in all of its threads, and sum its rows by five exchanges each.

Everything of a problem is addressed by lengths: what stands in the padding is never read. An infinite cost and a mass of
zero are an exponent of -inf. Costs are [B, n, m], contiguous; vectors [B, n] and [B, m] in COMPUTE.
"""

import triton
import triton.language as tl

from .online_softmax import LN_2, LOG2_E, log2_of, round_to

# Status of a problem, bits.
BAD_COST = tl.constexpr(1)  # NaN or -inf
BLOCKED_ROW = tl.constexpr(2)  # a row with mass, all of whose pairs are forbidden
BLOCKED_COLUMN = tl.constexpr(4)

# Largest exponent of a weight divided by its mass: where both masses are 0 nothing else bounds it.
SATURATION = tl.constexpr(120.0)
NOTHING = tl.constexpr(float("-inf"))  # the logarithm of 0


@triton.jit
def problem_pointer(pointer, problem, size):
    """The first element of a problem, `size` elements each; None stays None."""
    if pointer is not None:
        pointer += problem.to(tl.int64) * size
    return pointer


@triton.jit
def problem_length(lengths, problem, size):
    """How many of its `size` rows or columns a problem uses."""
    length = size
    if lengths is not None:
        length = tl.load(lengths + problem).to(tl.int32)
    return length


@triton.jit
def positions(STEPS: tl.constexpr, LANES: tl.constexpr):
    """Row (or column) of each element of a tile's side that starts at 0, int32 [STEPS, LANES]."""
    return tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def along_rows(vector):
    """A vector over the rows in a form that broadcasts against a tile."""
    return vector[:, None, :, None]


@triton.jit
def along_columns(vector):
    return vector[None, :, None, :]


@triton.jit
def along(vector, COLUMNS: tl.constexpr):
    if COLUMNS:
        spread = along_columns(vector)
    else:
        spread = along_rows(vector)
    return spread


@triton.jit
def reduced_sum(tile, COLUMNS: tl.constexpr):
    """Sums of a tile's rows, [ROW_STEPS, ROW_LANES], or of its columns, [COLUMN_STEPS, COLUMN_LANES]."""
    if COLUMNS:
        total = tl.sum(tl.sum(tile, axis=0), axis=1)
    else:
        total = tl.sum(tl.sum(tile, axis=1), axis=2)
    return total


@triton.jit
def reduced_max(tile, COLUMNS: tl.constexpr):
    """Maxima of a tile's rows, or of its columns."""
    if COLUMNS:
        top = tl.max(tl.max(tile, axis=0), axis=1)
    else:
        top = tl.max(tl.max(tile, axis=1), axis=2)
    return top


@triton.jit
def sum_all(vector):
    """Of a vector [STEPS, LANES]."""
    return tl.sum(tl.sum(vector, axis=0), axis=0)


@triton.jit
def max_all(vector):
    return tl.max(tl.max(vector, axis=0), axis=0)


@triton.jit
def load_cost(cost, i, j, n, m, stride, COMPUTE: tl.constexpr):
    """The tile of a cost at rows i and columns j; +inf outside the problem."""
    offsets = along_rows(i).to(tl.int64) * stride + along_columns(j)
    valid = along_rows(i < n) & along_columns(j < m)
    return tl.load(cost + offsets, mask=valid, other=float("inf")).to(COMPUTE)


@triton.jit
def cost_status(tile):
    """BAD_COST if a tile holds NaN or -inf."""
    good = (tile > NOTHING).to(tl.int32)
    return max_all(reduced_max(1 - good, False)) * BAD_COST


@triton.jit
def load_vector(pointer, index, length):
    """Part of a vector; 0 outside the problem."""
    return tl.load(pointer + index, mask=index < length, other=0.0)


@triton.jit
def load_log_masses(pointer, index, length):
    """Part of the base 2 logarithms of a marginal; outside the problem, as for a mass of 0, -inf."""
    return tl.load(pointer + index, mask=index < length, other=NOTHING)


@triton.jit
def finite_or_zero(x):
    return tl.where(x > NOTHING, x, 0.0)


@triton.jit
def log_sums(exponents, COLUMNS: tl.constexpr, FAST_LOG: tl.constexpr):
    """log2 of the sums of powers of two along the rows (COLUMNS: the columns) of a tile; -inf where all of them are 0."""
    top = finite_or_zero(reduced_max(exponents, COLUMNS))
    return top + log2_of(reduced_sum(tl.exp2(exponents - along(top, COLUMNS)), COLUMNS), FAST_LOG)


@triton.jit
def new_potential(sums, damping, epsilon):
    """The potential that these logarithms give: 0 where every pair is forbidden."""
    return tl.where(sums == NOTHING, 0.0, sums * (-damping * epsilon * LN_2))


@triton.jit
def epsilon_at(epsilons, step, steps, last):
    """Of iteration `step`; after all of them the last, which the plan is made with."""
    return tl.where(step < steps, tl.load(epsilons + tl.minimum(step, steps - 1)), last)


@triton.jit
def row_errors(f, new_f, log_a, epsilon, RELAXED: tl.constexpr):
    """How far an iterate is from the fixed point, by rows.

    The next f tells the row sums of the plan as it is: a_i exp((f_i - new_f_i) / epsilon). Balanced: by how much they are
    off. Relaxed: the change of f over epsilon.
    """
    change = (f - new_f) / epsilon
    if RELAXED:
        errors = tl.where(log_a > NOTHING, tl.abs(change), 0.0)
    else:
        errors = tl.abs(tl.exp2(log_a + change * LOG2_E) - tl.exp2(log_a))
    return errors


@triton.jit
def blocked(sums, log_masses):
    """1 where a row or column with mass has nothing to go to."""
    return ((log_masses > NOTHING) & (sums == NOTHING)).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "columns", "max_iterations"])
def sinkhorn_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    start,
    epsilons,
    rows,
    columns,
    max_iterations,
    epsilon: tl.float64,
    tolerance: tl.float64,
    row_damping: tl.float64,
    column_damping: tl.float64,
    f_out,
    g_out,
    f_history,
    g_history,
    iterations,
    error_out,
    status,
    RELAXED: tl.constexpr,
    FAST_LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """One problem with its cost in registers; grid (B,).

    log_a, log_b: log2 of the marginals; start: [B, m] the first g, or None (0); epsilons: [max_iterations] in COMPUTE.
    f_history [B, max_iterations, n] and g_history [B, max_iterations + 1, m], the start first, may be None.
    iterations, status: int32 [B]; error_out: [B].
    """
    problem = tl.program_id(0)
    n = problem_length(row_lengths, problem, rows)
    m = problem_length(column_lengths, problem, columns)
    i = positions(ROW_STEPS, ROW_LANES)
    j = positions(COLUMN_STEPS, COLUMN_LANES)
    tile = load_cost(problem_pointer(cost, problem, rows.to(tl.int64) * columns), i, j, n, m, columns, COMPUTE)
    log_a = load_log_masses(problem_pointer(log_a, problem, rows), i, n)
    log_b = load_log_masses(problem_pointer(log_b, problem, columns), j, m)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, (max_iterations + 1).to(tl.int64) * columns)
    last = tl.full((), epsilon, COMPUTE)
    tolerance = tl.full((), tolerance, COMPUTE)
    row_damping = tl.full((), row_damping, COMPUTE)
    column_damping = tl.full((), column_damping, COMPUTE)

    f = tl.zeros(i.shape, COMPUTE)
    g = tl.zeros(j.shape, COMPUTE)
    if start is not None:
        g = load_vector(problem_pointer(start, problem, columns), j, m)
    if g_history is not None:
        tl.store(g_history + j, g, mask=j < m)
    flags = cost_status(tile)
    error = tl.full((), float("inf"), COMPUTE)
    settled = False  # whether g was made with the last epsilon
    step = 0
    going = True
    while going:
        epsilon_now = epsilon_at(epsilons, step, max_iterations, last)
        scale = LOG2_E / epsilon_now
        sums = log_sums(along_columns(g * scale + log_b) - tile * scale, False, FAST_LOG)
        new_f = new_potential(sums, row_damping, epsilon_now)
        if step > 0:
            if RELAXED:
                error = max_all(row_errors(f, new_f, log_a, epsilon_now, RELAXED))
            else:
                error = sum_all(row_errors(f, new_f, log_a, epsilon_now, RELAXED))
        else:
            flags |= max_all(blocked(sums, log_a)) * BLOCKED_ROW
        going = (step < max_iterations) & ~(settled & (tolerance > 0) & (error <= tolerance))
        if going:
            f = new_f
            column_sums = log_sums(along_rows(f * scale + log_a) - tile * scale, True, FAST_LOG)
            g = new_potential(column_sums, column_damping, epsilon_now)
            if step == 0:
                flags |= max_all(blocked(column_sums, log_b)) * BLOCKED_COLUMN
            if f_history is not None:
                tl.store(f_history + step.to(tl.int64) * rows + i, f, mask=i < n)
                tl.store(g_history + (step + 1).to(tl.int64) * columns + j, g, mask=j < m)
            settled = epsilon_now <= last
            step += 1
    tl.store(problem_pointer(f_out, problem, rows) + i, tl.where(i < n, f, 0.0), mask=i < rows)
    tl.store(problem_pointer(g_out, problem, columns) + j, tl.where(j < m, g, 0.0), mask=j < columns)
    tl.store(iterations + problem, step)
    tl.store(error_out + problem, error)
    tl.store(status + problem, flags)


@triton.jit
def streamed_half(
    cost,
    potential,
    log_masses,
    outer_log_masses,
    target,
    n,
    m,
    stride,
    epsilon,
    damping,
    COLUMNS: tl.constexpr,
    FAST_LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """Half an iteration: the new potential of the rows (COLUMNS: of the columns) into `target`.

    Returns (BAD_COST if the rows were asked for and the cost holds NaN or -inf, whether a row or column is blocked).
    """
    row_positions = positions(ROW_STEPS, ROW_LANES)
    column_positions = positions(COLUMN_STEPS, COLUMN_LANES)
    if COLUMNS:
        outer_length, inner_length, outer_positions, inner_positions = m, n, column_positions, row_positions
    else:
        outer_length, inner_length, outer_positions, inner_positions = n, m, row_positions, column_positions
    BLOCK: tl.constexpr = outer_positions.numel
    INNER_BLOCK: tl.constexpr = inner_positions.numel
    scale = LOG2_E / epsilon
    flags = 0
    stuck = 0
    for first in range(0, outer_length, BLOCK):
        outer = first + outer_positions
        top = tl.full(outer.shape, NOTHING, COMPUTE)
        total = tl.zeros(outer.shape, COMPUTE)
        for inner_first in range(0, inner_length, INNER_BLOCK):
            inner = inner_first + inner_positions
            if COLUMNS:
                tile = load_cost(cost, inner, outer, n, m, stride, COMPUTE)
            else:
                tile = load_cost(cost, outer, inner, n, m, stride, COMPUTE)
                flags |= cost_status(tile)
            shift = load_vector(potential, inner, inner_length) * scale
            shift += load_log_masses(log_masses, inner, inner_length)
            exponents = along(shift, not COLUMNS) - tile * scale
            new_top = tl.maximum(top, reduced_max(exponents, COLUMNS))
            safe = finite_or_zero(new_top)
            powers = tl.exp2(exponents - along(safe, COLUMNS))
            total = total * tl.exp2(top - safe) + reduced_sum(powers, COLUMNS)
            top = new_top
        sums = finite_or_zero(top) + log2_of(total, FAST_LOG)
        stuck |= max_all(blocked(sums, load_log_masses(outer_log_masses, outer, outer_length)))
        tl.store(target + outer, new_potential(sums, damping, epsilon), mask=outer < outer_length)
    tl.debug_barrier()
    return flags, stuck


@triton.jit
def copy_vector(source, target, length, limit, BLOCK: tl.constexpr):
    """The `length` elements of a vector, and zeros from there to `limit`."""
    for first in range(0, limit, BLOCK):
        index = first + tl.arange(0, BLOCK)
        tl.store(target + index, load_vector(source, index, length), mask=index < limit)


@triton.jit(do_not_specialize=["rows", "columns", "max_iterations"])
def sinkhorn_streamed_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    start,
    epsilons,
    rows,
    columns,
    max_iterations,
    epsilon: tl.float64,
    tolerance: tl.float64,
    row_damping: tl.float64,
    column_damping: tl.float64,
    f_out,
    g_out,
    f_history,
    g_history,
    iterations,
    error_out,
    status,
    next_f,
    RELAXED: tl.constexpr,
    FAST_LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The same for a problem of any size; next_f: [B, n] scratch. Vectors alone are walked in blocks of VECTOR."""
    problem = tl.program_id(0)
    n = problem_length(row_lengths, problem, rows)
    m = problem_length(column_lengths, problem, columns)
    cost = problem_pointer(cost, problem, rows.to(tl.int64) * columns)
    log_a = problem_pointer(log_a, problem, rows)
    log_b = problem_pointer(log_b, problem, columns)
    f = problem_pointer(f_out, problem, rows)
    g = problem_pointer(g_out, problem, columns)
    next_f = problem_pointer(next_f, problem, rows)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, (max_iterations + 1).to(tl.int64) * columns)
    last = tl.full((), epsilon, COMPUTE)
    tolerance = tl.full((), tolerance, COMPUTE)
    row_damping = tl.full((), row_damping, COMPUTE)
    column_damping = tl.full((), column_damping, COMPUTE)

    copy_vector(f, f, 0, rows, VECTOR)
    if start is None:
        copy_vector(g, g, 0, columns, VECTOR)
    else:
        copy_vector(problem_pointer(start, problem, columns), g, m, columns, VECTOR)
    tl.debug_barrier()
    if g_history is not None:
        copy_vector(g, g_history, m, m, VECTOR)
    flags = 0
    error = tl.full((), float("inf"), COMPUTE)
    settled = False
    step = 0
    going = True
    while going:
        epsilon_now = epsilon_at(epsilons, step, max_iterations, last)
        found, stuck = streamed_half(
            cost, g, log_b, log_a, next_f, n, m, columns, epsilon_now, row_damping,
            False, FAST_LOG, COMPUTE, ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES,
        )  # fmt: skip
        if step > 0:
            error = tl.zeros((), COMPUTE)
            for first in range(0, n, VECTOR):
                i = first + tl.arange(0, VECTOR)
                errors = row_errors(
                    load_vector(f, i, n), load_vector(next_f, i, n), load_log_masses(log_a, i, n), epsilon_now, RELAXED
                )
                if RELAXED:
                    error = tl.maximum(error, tl.max(errors, axis=0))
                else:
                    error += tl.sum(errors, axis=0)
        else:
            flags |= found | (stuck * BLOCKED_ROW)
        going = (step < max_iterations) & ~(settled & (tolerance > 0) & (error <= tolerance))
        if going:
            found, stuck = streamed_half(
                cost, next_f, log_a, log_b, g, n, m, columns, epsilon_now, column_damping,
                True, FAST_LOG, COMPUTE, ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES,
            )  # fmt: skip
            if step == 0:
                flags |= stuck * BLOCKED_COLUMN
            copy_vector(next_f, f, n, n, VECTOR)
            if f_history is not None:
                copy_vector(next_f, f_history + step.to(tl.int64) * rows, n, n, VECTOR)
                copy_vector(g, g_history + (step + 1).to(tl.int64) * columns, m, m, VECTOR)
            settled = epsilon_now <= last
            step += 1
            tl.debug_barrier()
    tl.store(iterations + problem, step)
    tl.store(error_out + problem, error)
    tl.store(status + problem, flags)

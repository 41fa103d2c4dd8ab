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

# What may be wrong with a problem, bits.
BAD_COST = tl.constexpr(1)  # NaN or -inf
BLOCKED_ROW = tl.constexpr(2)  # a row with mass, all of whose pairs are forbidden
BLOCKED_COLUMN = tl.constexpr(4)

# Largest exponent of a weight divided by its mass, base 2: where both masses are 0 nothing else bounds it.
SATURATION = tl.constexpr(99.5)
NO_CURVATURE = tl.constexpr(1e-7)  # of a direction in the null space, up to rounding
NOTHING = tl.constexpr(float("-inf"))  # the logarithm of 0


@triton.jit
def problem_pointer(pointer, problem, size):
    """The first element of a problem, `size` elements each; None stays None."""
    if pointer is not None:
        pointer += problem.to(tl.int64) * size
    return pointer


@triton.jit
def problem_lengths(row_lengths, column_lengths, problem, rows, columns):
    """How many rows and columns a problem uses; neither, if it lacks one of them."""
    n = rows
    m = columns
    if row_lengths is not None:
        n = tl.load(row_lengths + problem).to(tl.int32)
    if column_lengths is not None:
        m = tl.load(column_lengths + problem).to(tl.int32)
    return tl.where(m > 0, n, 0), tl.where(n > 0, m, 0)


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
def damping_of(reach, epsilon):
    """lam of a side; 1 if its reach is infinite."""
    return 1.0 / (1.0 + epsilon / reach)


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


@triton.jit
def fault_of(flags):
    """The number that `kdkernels.backends.transport.FAULTS` gives to the first of the faults; 0: none."""
    return tl.where((flags & BAD_COST) != 0, 1, tl.where((flags & BLOCKED_ROW) != 0, 2, tl.where(flags != 0, 3, 0)))


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
    row_reach: tl.float64,
    column_reach: tl.float64,
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
    f_history [B, max_iterations, n] and g_history [B, max_iterations, m] may be None. iterations: int64 [B]; status: int32
    [B]; error_out: [B].
    """
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    i = positions(ROW_STEPS, ROW_LANES)
    j = positions(COLUMN_STEPS, COLUMN_LANES)
    tile = load_cost(problem_pointer(cost, problem, rows.to(tl.int64) * columns), i, j, n, m, columns, COMPUTE)
    log_a = load_log_masses(problem_pointer(log_a, problem, rows), i, n)
    log_b = load_log_masses(problem_pointer(log_b, problem, columns), j, m)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, max_iterations.to(tl.int64) * columns)
    last = tl.full((), epsilon, COMPUTE)
    tolerance = tl.full((), tolerance, COMPUTE)
    row_reach = tl.full((), row_reach, COMPUTE)
    column_reach = tl.full((), column_reach, COMPUTE)

    f = tl.zeros(i.shape, COMPUTE)
    g = tl.zeros(j.shape, COMPUTE)
    if start is not None:
        g = load_vector(problem_pointer(start, problem, columns), j, m)
    flags = cost_status(tile)
    error = tl.zeros((), COMPUTE)
    settled = False  # whether g was made with the last epsilon
    step = 0
    going = n > 0
    while going:
        epsilon_now = epsilon_at(epsilons, step, max_iterations, last)
        scale = LOG2_E / epsilon_now
        sums = log_sums(along_columns(g * scale + log_b) - tile * scale, False, FAST_LOG)
        new_f = new_potential(sums, damping_of(row_reach, epsilon_now), epsilon_now)
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
            g = new_potential(column_sums, damping_of(column_reach, epsilon_now), epsilon_now)
            if step == 0:
                flags |= max_all(blocked(column_sums, log_b)) * BLOCKED_COLUMN
            if f_history is not None:
                tl.store(f_history + rows.to(tl.int64) * step + i, f, mask=i < n)
                tl.store(g_history + columns.to(tl.int64) * step + j, g, mask=j < m)
            settled = epsilon_now <= last
            step += 1
    tl.store(problem_pointer(f_out, problem, rows) + i, tl.where(i < n, f, 0.0), mask=i < rows)
    tl.store(problem_pointer(g_out, problem, columns) + j, tl.where(j < m, g, 0.0), mask=j < columns)
    tl.store(iterations + problem, step)
    tl.store(error_out + problem, error)
    tl.store(status + problem, fault_of(flags))


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
    row_reach: tl.float64,
    column_reach: tl.float64,
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
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    cost = problem_pointer(cost, problem, rows.to(tl.int64) * columns)
    log_a = problem_pointer(log_a, problem, rows)
    log_b = problem_pointer(log_b, problem, columns)
    f = problem_pointer(f_out, problem, rows)
    g = problem_pointer(g_out, problem, columns)
    next_f = problem_pointer(next_f, problem, rows)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, max_iterations.to(tl.int64) * columns)
    last = tl.full((), epsilon, COMPUTE)
    tolerance = tl.full((), tolerance, COMPUTE)
    row_reach = tl.full((), row_reach, COMPUTE)
    column_reach = tl.full((), column_reach, COMPUTE)

    copy_vector(f, f, 0, rows, VECTOR)
    if start is None:
        copy_vector(g, g, 0, columns, VECTOR)
    else:
        copy_vector(problem_pointer(start, problem, columns), g, m, columns, VECTOR)
    tl.debug_barrier()
    flags = 0
    error = tl.zeros((), COMPUTE)
    settled = False
    step = 0
    going = n > 0
    while going:
        epsilon_now = epsilon_at(epsilons, step, max_iterations, last)
        found, stuck = streamed_half(
            cost, g, log_b, log_a, next_f, n, m, columns, epsilon_now, damping_of(row_reach, epsilon_now),
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
                cost, next_f, log_a, log_b, g, n, m, columns, epsilon_now, damping_of(column_reach, epsilon_now),
                True, FAST_LOG, COMPUTE, ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES,
            )  # fmt: skip
            if step == 0:
                flags |= stuck * BLOCKED_COLUMN
            copy_vector(next_f, f, n, n, VECTOR)
            if f_history is not None:
                copy_vector(next_f, f_history + rows.to(tl.int64) * step, n, n, VECTOR)
                copy_vector(g, g_history + columns.to(tl.int64) * step, m, m, VECTOR)
            settled = epsilon_now <= last
            step += 1
            tl.debug_barrier()
    tl.store(iterations + problem, step)
    tl.store(error_out + problem, error)
    tl.store(status + problem, fault_of(flags))


@triton.jit
def saturated_power(exponents):
    """2 ** exponents, kept finite, so that a mass of 0 in front of it gives 0."""
    return tl.exp2(tl.minimum(exponents, SATURATION))


@triton.jit(do_not_specialize=["rows", "columns"])
def sinkhorn_product_kernel(
    cost,
    row_exponents,
    column_exponents,
    vector,
    row_lengths,
    column_lengths,
    rows,
    columns,
    epsilon: tl.float64,
    product,
    cost_product,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """A matrix 2 ** (row_exponents + column_exponents) exp(-C / epsilon) times a vector, some rows of a problem.

    The result for the rows, sums over the columns, or, if COLUMNS, for the columns; grid (B, blocks of rows or columns).
    vector: [B, m] (COLUMNS: [B, n]), or None (ones); product: [B, n] (COLUMNS: [B, m]), 0 on the padding; cost_product: the
    same with each entry of the matrix multiplied by its cost (0 for forbidden pairs), or None.
    """
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    cost = problem_pointer(cost, problem, rows.to(tl.int64) * columns)
    row_exponents = problem_pointer(row_exponents, problem, rows)
    column_exponents = problem_pointer(column_exponents, problem, columns)
    scale = LOG2_E / tl.full((), epsilon, COMPUTE)
    row_positions = positions(ROW_STEPS, ROW_LANES)
    column_positions = positions(COLUMN_STEPS, COLUMN_LANES)
    if COLUMNS:
        outer = tl.program_id(1) * column_positions.numel + column_positions
        inner_positions = row_positions
        outer_size, outer_length, inner_size, inner_length = columns, m, rows, n
        outer_exponents, inner_exponents = column_exponents, row_exponents
    else:
        outer = tl.program_id(1) * row_positions.numel + row_positions
        inner_positions = column_positions
        outer_size, outer_length, inner_size, inner_length = rows, n, columns, m
        outer_exponents, inner_exponents = row_exponents, column_exponents
    vector = problem_pointer(vector, problem, inner_size)
    # Exponents of -inf leave out what is outside the problem.
    shift = load_log_masses(outer_exponents, outer, outer_length)
    total = tl.zeros(outer.shape, COMPUTE)
    cost_total = tl.zeros(outer.shape, COMPUTE)
    for first in range(0, inner_length, inner_positions.numel):
        inner = first + inner_positions
        if COLUMNS:
            tile = load_cost(cost, inner, outer, n, m, columns, COMPUTE)
        else:
            tile = load_cost(cost, outer, inner, n, m, columns, COMPUTE)
        shifts = along(shift, COLUMNS) + along(load_log_masses(inner_exponents, inner, inner_length), not COLUMNS)
        terms = saturated_power(shifts - tile * scale)
        if vector is not None:
            terms *= along(load_vector(vector, inner, inner_length), not COLUMNS)
        total += reduced_sum(terms, COLUMNS)
        if cost_product is not None:
            cost_total += reduced_sum(tl.where(tile < float("inf"), terms * tile, 0.0), COLUMNS)
    tl.store(problem_pointer(product, problem, outer_size) + outer, total, mask=outer < outer_size)
    if cost_product is not None:
        tl.store(problem_pointer(cost_product, problem, outer_size) + outer, cost_total, mask=outer < outer_size)


@triton.jit
def load_previous(g_history, start, step, columns, j, m):
    """Part of the g that iteration `step` began with."""
    g = load_vector(g_history + columns.to(tl.int64) * (step - 1), j, tl.where(step > 0, m, 0))
    if start is not None:
        g += load_vector(start, j, tl.where(step > 0, 0, m))
    return g


@triton.jit(do_not_specialize=["rows", "columns", "max_iterations"])
def sinkhorn_adjoint_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    start,
    f_history,
    g_history,
    epsilons,
    iterations,
    rows,
    columns,
    max_iterations,
    row_reach: tl.float64,
    column_reach: tl.float64,
    grad_f,
    grad_g,
    f_adjoints,
    g_adjoints,
    grad_a,
    grad_b,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """The iterations of one problem backwards, its cost in registers; grid (B,).

    f_history, g_history, epsilons, iterations: of `sinkhorn_kernel`; grad_f [B, n], grad_g [B, m]: of the last potentials.
    f_adjoints [B, max_iterations, n] and g_adjoints [B, max_iterations + 1, m]: of the potentials of every iteration taken,
    those of g behind the place of the start, which is not written.
    grad_a [B, n], grad_b [B, m]: of the marginals, 0 on the padding.
    """
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    i = positions(ROW_STEPS, ROW_LANES)
    j = positions(COLUMN_STEPS, COLUMN_LANES)
    tile = load_cost(problem_pointer(cost, problem, rows.to(tl.int64) * columns), i, j, n, m, columns, COMPUTE)
    log_a = problem_pointer(log_a, problem, rows)
    log_b = problem_pointer(log_b, problem, columns)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, max_iterations.to(tl.int64) * columns)
    f_adjoints = problem_pointer(f_adjoints, problem, max_iterations.to(tl.int64) * rows)
    g_adjoints = problem_pointer(g_adjoints, problem, (max_iterations + 1).to(tl.int64) * columns)
    row_reach = tl.full((), row_reach, COMPUTE)
    column_reach = tl.full((), column_reach, COMPUTE)

    start = problem_pointer(start, problem, columns)
    z_f = load_vector(problem_pointer(grad_f, problem, rows), i, n)
    z_g = load_vector(problem_pointer(grad_g, problem, columns), j, m)
    to_a = tl.zeros(i.shape, COMPUTE)
    to_b = tl.zeros(j.shape, COMPUTE)
    step = tl.load(iterations + problem).to(tl.int32)
    while step > 0:
        step -= 1
        epsilon = tl.load(epsilons + step)
        scale = LOG2_E / epsilon
        f = load_vector(f_history + rows.to(tl.int64) * step, i, n) * scale
        g = load_vector(g_history + columns.to(tl.int64) * step, j, m) * scale
        row_damping = damping_of(row_reach, epsilon)
        column_damping = damping_of(column_reach, epsilon)
        tl.store(g_adjoints + columns.to(tl.int64) * (step + 1) + j, z_g, mask=j < m)
        powers = saturated_power(along_rows(f) + along_columns(g / column_damping) - tile * scale)
        sums = column_damping * reduced_sum(powers * along_columns(z_g), False)
        to_a -= epsilon * sums
        z_f -= tl.exp2(load_log_masses(log_a, i, n)) * sums
        tl.store(f_adjoints + rows.to(tl.int64) * step + i, z_f, mask=i < n)
        g = load_previous(g_history, start, step, columns, j, m) * scale
        powers = saturated_power(along_rows(f / row_damping) + along_columns(g) - tile * scale)
        column_sums = row_damping * reduced_sum(powers * along_rows(z_f), True)
        to_b -= epsilon * column_sums
        z_g = -tl.exp2(load_log_masses(log_b, j, m)) * column_sums
        z_f = tl.zeros(i.shape, COMPUTE)
    tl.store(problem_pointer(grad_a, problem, rows) + i, to_a, mask=i < rows)
    tl.store(problem_pointer(grad_b, problem, columns) + j, to_b, mask=j < columns)


@triton.jit
def streamed_adjoint_half(
    cost,
    log_masses,
    outer_potential,
    outer_potential_length,
    inner_potential,
    adjoint,
    given,
    given_length,
    target,
    gradient,
    n,
    m,
    stride,
    epsilon,
    damping,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """Backwards through the half that made the inner potential out of the outer one.

    target = given - damping mass o (K adjoint), and gradient, of the mass, -= damping epsilon K adjoint. given: what else
    depends on the outer potential, as far as `given_length` goes.
    """
    row_positions = positions(ROW_STEPS, ROW_LANES)
    column_positions = positions(COLUMN_STEPS, COLUMN_LANES)
    if COLUMNS:
        outer_length, inner_length, outer_positions, inner_positions = m, n, column_positions, row_positions
    else:
        outer_length, inner_length, outer_positions, inner_positions = n, m, row_positions, column_positions
    scale = LOG2_E / epsilon
    for first in range(0, outer_length, outer_positions.numel):
        outer = first + outer_positions
        shift = load_vector(outer_potential, outer, outer_potential_length) * scale
        sums = tl.zeros(outer.shape, COMPUTE)
        for inner_first in range(0, inner_length, inner_positions.numel):
            inner = inner_first + inner_positions
            if COLUMNS:
                tile = load_cost(cost, inner, outer, n, m, stride, COMPUTE)
            else:
                tile = load_cost(cost, outer, inner, n, m, stride, COMPUTE)
            inner_shift = load_vector(inner_potential, inner, inner_length) * scale / damping
            powers = saturated_power(along(shift, COLUMNS) + along(inner_shift, not COLUMNS) - tile * scale)
            sums += reduced_sum(powers * along(load_vector(adjoint, inner, inner_length), not COLUMNS), COLUMNS)
        sums *= damping
        before = load_vector(gradient, outer, outer_length)
        tl.store(gradient + outer, before - epsilon * sums, mask=outer < outer_length)
        made = (
            load_vector(given, outer, given_length) - tl.exp2(load_log_masses(log_masses, outer, outer_length)) * sums
        )
        tl.store(target + outer, made, mask=outer < outer_length)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "columns", "max_iterations"])
def sinkhorn_adjoint_streamed_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    start,
    f_history,
    g_history,
    epsilons,
    iterations,
    rows,
    columns,
    max_iterations,
    row_reach: tl.float64,
    column_reach: tl.float64,
    grad_f,
    grad_g,
    f_adjoints,
    g_adjoints,
    grad_a,
    grad_b,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The same for a problem of any size."""
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    cost = problem_pointer(cost, problem, rows.to(tl.int64) * columns)
    log_a = problem_pointer(log_a, problem, rows)
    log_b = problem_pointer(log_b, problem, columns)
    grad_f = problem_pointer(grad_f, problem, rows)
    grad_a = problem_pointer(grad_a, problem, rows)
    grad_b = problem_pointer(grad_b, problem, columns)
    f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
    g_history = problem_pointer(g_history, problem, max_iterations.to(tl.int64) * columns)
    f_adjoints = problem_pointer(f_adjoints, problem, max_iterations.to(tl.int64) * rows)
    g_adjoints = problem_pointer(g_adjoints, problem, (max_iterations + 1).to(tl.int64) * columns)
    row_reach = tl.full((), row_reach, COMPUTE)
    column_reach = tl.full((), column_reach, COMPUTE)

    step = tl.load(iterations + problem).to(tl.int32)
    copy_vector(problem_pointer(grad_g, problem, columns), g_adjoints + columns.to(tl.int64) * step, m, m, VECTOR)
    copy_vector(grad_a, grad_a, 0, rows, VECTOR)
    copy_vector(grad_b, grad_b, 0, columns, VECTOR)
    tl.debug_barrier()
    start = problem_pointer(start, problem, columns)
    given_length = n
    while step > 0:
        step -= 1
        epsilon = tl.load(epsilons + step)
        f = f_history + rows.to(tl.int64) * step
        g = g_history + columns.to(tl.int64) * step
        z_f = f_adjoints + rows.to(tl.int64) * step
        z_g = g_adjoints + columns.to(tl.int64) * (step + 1)
        streamed_adjoint_half(
            cost, log_a, f, n, g, z_g, grad_f, given_length, z_f, grad_a, n, m, columns, epsilon,
            damping_of(column_reach, epsilon), False, COMPUTE, ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES,
        )  # fmt: skip
        given_length = 0
        old_g = g - columns
        old_length = m
        if step == 0:
            if start is None:
                old_length = 0
            else:
                old_g = start
        streamed_adjoint_half(
            cost, log_b, old_g, old_length, f, z_f, grad_f, given_length, z_g - columns, grad_b, n, m, columns, epsilon,
            damping_of(row_reach, epsilon), True, COMPUTE, ROW_STEPS, COLUMN_STEPS, ROW_LANES, COLUMN_LANES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "max_iterations"])
def sinkhorn_cost_gradient_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    start,
    f_history,
    normalised_f,
    g_history,
    f_adjoints,
    g_adjoints,
    epsilons,
    iterations,
    rows,
    columns,
    max_iterations,
    epsilon: tl.float64,
    row_reach: tl.float64,
    column_reach: tl.float64,
    f,
    g,
    plan_factors,
    cost_factors,
    cost_gradient,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """A tile of the gradient to the cost, 0 on the padding; grid (B, blocks of rows, blocks of columns).

    It is P o (plan_factors [B] + cost_factors [B] C), with the plan P of the potentials f and g, and, if f_adjoints are
    given, what comes through the iterations: sum over them of lam_b W o z_g + lam_a V o z_f. normalised_f: [B,
    max_iterations, n] the potential that makes the rows of V sum to 1: f_history, if f was made from the g before it.
    """
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    row_positions = positions(ROW_STEPS, ROW_LANES)
    column_positions = positions(COLUMN_STEPS, COLUMN_LANES)
    i = tl.program_id(1) * row_positions.numel + row_positions
    j = tl.program_id(2) * column_positions.numel + column_positions
    size = rows.to(tl.int64) * columns
    tile = load_cost(problem_pointer(cost, problem, size), i, j, n, m, columns, COMPUTE)
    log_a = load_log_masses(problem_pointer(log_a, problem, rows), i, n)
    log_b = load_log_masses(problem_pointer(log_b, problem, columns), j, m)
    scale = LOG2_E / tl.full((), epsilon, COMPUTE)
    row_shift = log_a + load_vector(problem_pointer(f, problem, rows), i, n) * scale
    column_shift = log_b + load_vector(problem_pointer(g, problem, columns), j, m) * scale
    plan = tl.exp2(along_rows(row_shift) + along_columns(column_shift) - tile * scale)
    factors = tl.load(plan_factors + problem)
    factors += tl.load(cost_factors + problem) * tl.where(tile < float("inf"), tile, 0.0)
    gradient = plan * factors
    if f_adjoints is not None:
        row_reach = tl.full((), row_reach, COMPUTE)
        column_reach = tl.full((), column_reach, COMPUTE)
        start = problem_pointer(start, problem, columns)
        f_history = problem_pointer(f_history, problem, max_iterations.to(tl.int64) * rows)
        normalised_f = problem_pointer(normalised_f, problem, max_iterations.to(tl.int64) * rows)
        g_history = problem_pointer(g_history, problem, max_iterations.to(tl.int64) * columns)
        f_adjoints = problem_pointer(f_adjoints, problem, max_iterations.to(tl.int64) * rows)
        g_adjoints = problem_pointer(g_adjoints, problem, (max_iterations + 1).to(tl.int64) * columns)
        for step in range(tl.load(iterations + problem).to(tl.int32)):
            epsilon_now = tl.load(epsilons + step)
            scale = LOG2_E / epsilon_now
            row_damping = damping_of(row_reach, epsilon_now)
            column_damping = damping_of(column_reach, epsilon_now)
            row = rows.to(tl.int64) * step
            column = columns.to(tl.int64) * step
            f_now = load_vector(f_history + row, i, n) * scale
            g_now = load_vector(g_history + column, j, m) * scale
            weights = tl.exp2(along_rows(log_a + f_now) + along_columns(g_now / column_damping) - tile * scale)
            gradient += weights * (along_columns(load_vector(g_adjoints + column + columns, j, m)) * column_damping)
            f_now = load_vector(normalised_f + row, i, n) * scale
            g_now = load_previous(g_history, start, step, columns, j, m) * scale
            weights = tl.exp2(along_rows(f_now / row_damping) + along_columns(log_b + g_now) - tile * scale)
            gradient += weights * (along_rows(load_vector(f_adjoints + row, i, n)) * row_damping)
    offsets = along_rows(i).to(tl.int64) * columns + along_columns(j)
    rounded = round_to(gradient, cost_gradient.dtype.element_ty)
    stored = along_rows(i < rows) & along_columns(j < columns)
    tl.store(problem_pointer(cost_gradient, problem, size) + offsets, rounded, mask=stored)


@triton.jit
def without_null_space(y, null, factor):
    """The part of a vector that is orthogonal to the null space of a balanced problem (factor 0: there is none)."""
    return y - null * (sum_all(null * y) * factor)


@triton.jit(do_not_specialize=["rows", "columns", "max_steps"])
def sinkhorn_implicit_kernel(
    cost,
    log_a,
    log_b,
    row_lengths,
    column_lengths,
    f,
    g,
    rows,
    columns,
    max_steps,
    epsilon: tl.float64,
    solver_tolerance: tl.float64,
    row_reach: tl.float64,
    column_reach: tl.float64,
    grad_f,
    grad_g,
    normalised_f,
    f_adjoints,
    g_adjoints,
    grad_a,
    grad_b,
    BALANCED: tl.constexpr,
    FAST_LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """The adjoint of the fixed point of one problem, its matrix in registers; grid (B,).

    z_f = grad_f - lam_b W z_g and z_g = grad_g - lam_a V' z_f: with z_g = grad_g + root t, root = sqrt(b s) and s the sums
    of a column of the plan over b, conjugate gradients find t from I - lam_a lam_b S' S, S_ij = sqrt(W_ij V_ij), which is
    diag(a)^-1/2 P diag(b)^-1/2 at the fixed point. V is made with the f that follows from g, normalised_f, so that the
    matrix is positive semidefinite wherever the iteration has ended; balanced, its null space, the shift of f against g,
    is root. normalised_f, f_adjoints, grad_a: [B, n]; grad_b: [B, m]; g_adjoints: [B, 2, m], the second of which is written.
    """
    problem = tl.program_id(0)
    n, m = problem_lengths(row_lengths, column_lengths, problem, rows, columns)
    i = positions(ROW_STEPS, ROW_LANES)
    j = positions(COLUMN_STEPS, COLUMN_LANES)
    cost = problem_pointer(cost, problem, rows.to(tl.int64) * columns)
    f_pointer = problem_pointer(f, problem, rows)
    g_pointer = problem_pointer(g, problem, columns)
    a_pointer = problem_pointer(log_a, problem, rows)
    b_pointer = problem_pointer(log_b, problem, columns)
    grad_f = problem_pointer(grad_f, problem, rows)
    grad_g = problem_pointer(grad_g, problem, columns)
    epsilon = tl.full((), epsilon, COMPUTE)
    scale = LOG2_E / epsilon
    row_damping = damping_of(tl.full((), row_reach, COMPUTE), epsilon)
    column_damping = damping_of(tl.full((), column_reach, COMPUTE), epsilon)
    log_a = load_log_masses(a_pointer, i, n)
    log_b = load_log_masses(b_pointer, j, m)
    f = load_vector(f_pointer, i, n) * scale
    g = load_vector(g_pointer, j, m) * scale
    made_g = g / column_damping  # minus the logarithm of the sums that g was made from
    tile = load_cost(cost, i, j, n, m, columns, COMPUTE) * scale
    made_f = -finite_or_zero(log_sums(along_columns(g + log_b) - tile, False, FAST_LOG))
    next_f = made_f * (row_damping * epsilon * LN_2)
    tl.store(problem_pointer(normalised_f, problem, rows) + i, tl.where(i < n, next_f, 0.0), mask=i < rows)

    weights = saturated_power(along_rows(f) + along_columns(made_g) - tile)
    row_sums = reduced_sum(weights * along_columns(load_vector(grad_g, j, m)), False)
    given_f = load_vector(grad_f, i, n) - column_damping * tl.exp2(log_a) * row_sums
    weights = saturated_power(along_rows(made_f) + along_columns(g) - tile)
    column_sums = reduced_sum(weights * along_rows(given_f), True)
    root = tl.exp2(0.5 * (log_b + g - made_g))
    residual = -row_damping * tl.exp2(0.5 * (log_b - g + made_g)) * column_sums
    factor = tl.zeros((), COMPUTE)
    if BALANCED:
        factor = 1.0 / tl.maximum(sum_all(root * root), 1.0e-30)
    symmetric = tl.exp2(0.5 * (along_rows(log_a + f + made_f) + along_columns(made_g + log_b + g)) - tile)  # S
    damping = row_damping * column_damping
    # Twice: what rounding leaves of a large part in the null space would in the end be all that is left.
    residual = without_null_space(without_null_space(residual, root, factor), root, factor)
    direction = residual
    solution = tl.zeros(j.shape, COMPUTE)
    square = sum_all(residual * residual)
    enough = square * tl.full((), solver_tolerance * solver_tolerance, COMPUTE)
    limit = tl.minimum(max_steps, 2 * tl.minimum(n, m) + 10)
    step = 0
    while (step < limit) & (square > enough):
        inner = reduced_sum(symmetric * along_columns(direction), False)
        image = direction - damping * reduced_sum(symmetric * along_rows(inner), True)
        curvature = sum_all(direction * image)
        useful = curvature > sum_all(direction * direction) * NO_CURVATURE
        length = tl.where(useful, square / curvature, 0.0)
        solution += length * direction
        residual = without_null_space(residual - length * image, root, factor)
        new_square = tl.where(useful, sum_all(residual * residual), 0.0)
        direction = residual + direction * (new_square / square)
        square = new_square
        step += 1
    solution = without_null_space(solution, root, factor)
    # Read again what need not be in registers meanwhile.
    z_g = load_vector(grad_g, j, m) + root * solution
    g_adjoints = problem_pointer(g_adjoints, problem, 2 * columns) + columns
    tl.store(g_adjoints + j, tl.where(j < m, z_g, 0.0), mask=j < columns)
    tile = load_cost(cost, i, j, n, m, columns, COMPUTE) * scale
    f = load_vector(f_pointer, i, n) * scale
    g = load_vector(g_pointer, j, m) * scale
    weights = saturated_power(along_rows(f) + along_columns(g / column_damping) - tile)
    row_sums = column_damping * reduced_sum(weights * along_columns(z_g), False)
    tl.store(problem_pointer(grad_a, problem, rows) + i, -epsilon * row_sums, mask=i < rows)
    z_f = load_vector(grad_f, i, n) - tl.exp2(load_log_masses(a_pointer, i, n)) * row_sums
    tl.store(problem_pointer(f_adjoints, problem, rows) + i, tl.where(i < n, z_f, 0.0), mask=i < rows)
    weights = saturated_power(along_rows(made_f) + along_columns(g) - tile)
    column_sums = row_damping * reduced_sum(weights * along_rows(z_f), True)
    tl.store(problem_pointer(grad_b, problem, columns) + j, -epsilon * column_sums, mask=j < columns)

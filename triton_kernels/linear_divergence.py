# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Divergences between two language-model heads whose logits are never written to memory.

A head is hidden states [N, H] and a weight [V, H], and its logits are scale * (hidden weight^T + bias), soft-capped. A
program makes a tile of both heads' logits with tensor cores (float32 sums) and uses it where it stands, on the chip. The
formulas are those of ``divergence``: there a lane has a part of one row, here a row of its own, so the lanes' algebra serves.

Forward: a program has a block of rows and a split of the vocabulary and leaves the state of its rows (10 numbers each); a
second kernel merges the splits of a row, in a fixed order, as ``divergence`` merges lanes. The mixture forms go over the
logits once more for their sums.

Backward, strip by strip of the vocabulary (a few thousand columns, ``tiling.LinearTiling``): one kernel makes the logits of
the strip again and writes their gradient, [N, strip] in the head's dtype; one that owns a tile of the strip and a block of the
hidden size walks the rows and writes its piece of dW, which is then final; one that owns a block of rows and of the hidden
size walks the strip and adds to its piece of dH, float32. Nobody shares what he writes, so there are no atomics, and the order
of every sum is fixed.

Why a strip is written: a kernel that kept the gradient on the chip would have to carry it to all of dH (or dW) at once, which
does not fit there, H being thousands. Either each pair (row block, vocabulary tile) reads and writes its H-wide float32 sums
again, 8 bytes per 2 * 128 multiplications with tiles of 128: 32 operations per byte, a tenth of what a GPU needs; or dH and
dW have kernels of their own, which make the logits twice, and still have that traffic. The strip costs 2 bytes per logit
written and read from a buffer that is smaller than the hidden states where H > strip, and the traffic of dH's sums falls to
8 bytes per 2 * strip operations and entry: 512 per byte with 2,048 columns.

What it costs, in matrix products of size N V H (both heads alike, gradients of the student): 2 forward, 2 to make the logits
again, 2 for dH and dW: 6, and 2 more for the mixture forms; a path that stores the logits needs 4. Memory: both weights are
read once per ROWS rows, mostly from the cache, as the programs of one split run side by side. Nothing of width V exists but dW;
beside results there are N * 10 * splits floats, N * strip * itemsize bytes for each head with a gradient and the float32 sums
of dH. Not timed on a GPU: these are counts.

Sizes are in ``tiling.choose_linear_tiling``. A tile of 64 x 128 logits is what fits the registers without spills beside
what the formulas need; a step of its product loads 192 entries for 2 * 64 * 128 operations, 43 per byte of bfloat16, which
the caches have to deliver: probably the limit of these kernels.

Under a tolerance the gradient kernel also notes each row's sum of squares and sum within each tile; the product kernels walk
lists of the tiles that are kept and get what stands in for the others as vectors, see ``kdkernels/backends/gradient_tiles.py``.

A side comes as a tuple (tensor, its row stride, weight or None, weight's row stride, bias, hidden size, scale, cap or None,
temperature, temperatures or None); without a weight the tensor holds logits [N, V]. All computation is in float32.
"""

import triton
import triton.language as tl

from .divergence import (
    LOWEST,
    STATISTICS,
    STUDENT_CONSTANT,
    STUDENT_HARD_LOG_SUM,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    TEACHER_CONSTANT,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    accumulate_logits,
    before_cap,
    divergence_terms,
    hard_terms,
    merge_lanes,
    student_terms,
    takes_two_sweeps,
    teacher_terms,
    value_from_sums,
)
from .online_softmax import INTERPRETED, LN_2, LOG2_E, LOGIT_FLOOR, advance_sum, capped_logits, round_to, row_scalar

# What a split leaves of each row: the nine parts of the lanes' state, and the label's logit if the split has it.
LABEL_LOGIT = tl.constexpr(9)
STATES = tl.constexpr(10)


@triton.jit
def dot(left, right, sums, PRECISION: tl.constexpr):
    """sums + left @ right. The interpreter holds bfloat16 as bits, which it cannot multiply; in float32 they are exact."""
    if INTERPRETED and left.dtype == tl.bfloat16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def rows_of_block(block, row_count, active, ROWS: tl.constexpr):
    """(row numbers, the last one repeated past the end; which of them are there; which of those count)."""
    rows = block * ROWS + tl.arange(0, ROWS)
    present = rows < row_count
    rows = tl.minimum(rows, row_count - 1)
    counted = present
    if active is not None:
        counted = present & (tl.load(active + rows) != 0)
    return rows, present, counted


@triton.jit
def numbers_of_rows(default, per_row, rows):
    """A hyper-parameter of each row, float32 [ROWS]."""
    return row_scalar(default, per_row, rows, tl.float32) + tl.zeros(rows.shape, tl.float32)


@triton.jit
def scale_of(side, rows):
    """log2(e) / temperature of each row."""
    return LOG2_E / numbers_of_rows(side[8], side[9], rows)


@triton.jit
def ids_of(columns, valid, order):
    """The vocabulary entries at these places of the order (None: its own); those that are not `valid` read the first."""
    ids = tl.where(valid, columns, 0)
    if order is not None:
        ids = tl.load(order + ids)
    return ids


@triton.jit
def side_logits(side, rows, counted, ids, valid, HIDDEN: tl.constexpr, PRECISION: tl.constexpr):
    """Capped, floored logits, float32 [ROWS, COLUMNS]; 0 in rows that do not count."""
    tensor, stride, weight, weight_stride, bias, hidden_size, scale, cap, _, _ = side
    rows_at = tensor + rows.to(tl.int64)[:, None] * stride
    if weight is None:
        logits = tl.load(rows_at + ids[None, :]).to(tl.float32)
    else:
        # Nothing but the hidden size is masked: what stands for rows and columns that are not there is some other one.
        columns_at = weight + ids.to(tl.int64)[None, :] * weight_stride
        logits = tl.zeros((rows.shape[0], ids.shape[0]), tl.float32)
        for start in range(0, hidden_size, HIDDEN):
            entries = start + tl.arange(0, HIDDEN)
            there = entries < hidden_size
            states = tl.load(rows_at + entries[None, :], mask=there[None, :], other=0.0)
            weights = tl.load(columns_at + entries[:, None], mask=there[:, None], other=0.0)
            logits = dot(states, weights, logits, PRECISION)
        if bias is not None:
            logits += tl.load(bias + ids).to(tl.float32)[None, :]
        logits *= scale
    logits = tl.where(counted[:, None], logits, 0.0)
    if cap is None:
        logits, _ = capped_logits(logits, valid[None, :], 0.0, False, True)
    else:
        logits, _ = capped_logits(logits, valid[None, :], tl.full((), cap, tl.float32), True, True)
    return logits


@triton.jit
def as_lanes(tile):
    """[ROWS, COLUMNS] -> [1, ROWS, COLUMNS], a tile whose lanes are rows."""
    return tl.reshape(tile, (1, tile.shape[0], tile.shape[1]))


@triton.jit(do_not_specialize=["row_count", "vocab_size", "splits"])
def linear_divergence_sweep_kernel(
    student,
    teacher,
    row_count,
    vocab_size,
    splits,
    states,
    labels,
    active,
    parameters,
    a,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """First sweep: the state of a block of rows over SPLIT columns of the vocabulary; grid (row blocks, splits).

    states: float32 [N, STATES, splits]; labels: int64 [N] or None; active: bool [N] or None; parameters: [N], instead of a.
    """
    split = tl.program_id(1)
    rows, present, counted = rows_of_block(tl.program_id(0), row_count, active, ROWS)
    HARD: tl.constexpr = labels is not None
    student_scale = scale_of(student, rows)
    teacher_scale = scale_of(teacher, rows)
    a = numbers_of_rows(a, parameters, rows)
    lowest = tl.full((ROWS,), LOGIT_FLOOR, tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    state = (lowest, zero, lowest, zero, zero, zero, zero, tl.full((ROWS,), LOWEST, tl.float32), zero)
    label_logit = zero
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, vocab_size), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        valid = columns < vocab_size
        ids = ids_of(columns, valid, None)
        s = side_logits(student, rows, counted, ids, valid, HIDDEN, PRECISION)
        there = valid[None, None, :]
        if HARD:
            label = tl.load(labels + rows).to(tl.int32)  # again for each tile: so no register keeps it
            label_logit += tl.sum(tl.where(columns[None, :] == label[:, None], s, 0.0), axis=1)
        if takes_two_sweeps(KIND):
            # No sum of this sweep takes both sides: so no register keeps one's logits while the other's are made.
            max_s, sum_s, max_t, sum_t, cross_s, cross_t, hard_sum, max_x, sum_x = state
            if HARD:
                _, hard_sum = advance_sum(max_s, hard_sum, as_lanes(s), there, tl.full((), LOG2_E, tl.float32))
            max_s, sum_s = advance_sum(max_s, sum_s, as_lanes(s), there, student_scale)
            t = side_logits(teacher, rows, counted, ids, valid, HIDDEN, PRECISION)
            max_t, sum_t = advance_sum(max_t, sum_t, as_lanes(t), there, teacher_scale)
            state = max_s, sum_s, max_t, sum_t, cross_s, cross_t, hard_sum, max_x, sum_x
        else:
            t = side_logits(teacher, rows, counted, ids, valid, HIDDEN, PRECISION)
            state = accumulate_logits(
                state, as_lanes(s), as_lanes(t), there, student_scale, teacher_scale, a, KIND, HARD, True
            )
    states_at = states + rows.to(tl.int64) * STATES * splits + split
    for index in tl.static_range(9):
        tl.store(states_at + index * splits, state[index], mask=present)
    tl.store(states_at + LABEL_LOGIT * splits, label_logit, mask=present)


@triton.jit(do_not_specialize=["vocab_size", "splits"])
def linear_divergence_merge_kernel(
    states,
    splits,
    vocab_size,
    divergence,
    cross_entropy,
    statistics,
    labels,
    active,
    student_temperatures,
    teacher_temperatures,
    parameters,
    student_temperature,
    teacher_temperature,
    a,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row: its statistics from the states of its splits; its value, if the form takes one sweep; grid (N,).

    divergence, cross_entropy (None without labels): float32 [N]; statistics: float32 [N, STATISTICS]; SPLITS >= splits.
    """
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(divergence + row, 0.0)
            if labels is not None:
                tl.store(cross_entropy + row, 0.0)
            return
    HARD: tl.constexpr = labels is not None
    student_scale = LOG2_E / row_scalar(student_temperature, student_temperatures, row, tl.float32)
    teacher_scale = LOG2_E / row_scalar(teacher_temperature, teacher_temperatures, row, tl.float32)
    a = row_scalar(a, parameters, row, tl.float32)
    split = tl.arange(0, SPLITS)
    there = split < splits
    at = states + row * STATES * splits + split
    state = (
        tl.load(at, mask=there, other=LOGIT_FLOOR),
        tl.load(at + splits, mask=there, other=0.0),
        tl.load(at + 2 * splits, mask=there, other=LOGIT_FLOOR),
        tl.load(at + 3 * splits, mask=there, other=0.0),
        tl.load(at + 4 * splits, mask=there, other=0.0),
        tl.load(at + 5 * splits, mask=there, other=0.0),
        tl.load(at + 6 * splits, mask=there, other=0.0),
        tl.load(at + 7 * splits, mask=there, other=LOWEST),
        tl.load(at + 8 * splits, mask=there, other=0.0),
    )
    max_s, log_sum_s, max_t, log_sum_t, hard_log_sum, value, constant_s, constant_t = merge_lanes(
        state, student_scale, teacher_scale, a, KIND, HARD
    )
    tl.store(divergence + row, value)
    row_statistics = statistics + row * STATISTICS
    tl.store(row_statistics + STUDENT_MAX, max_s)
    tl.store(row_statistics + STUDENT_LOG_SUM, log_sum_s * LN_2)
    tl.store(row_statistics + TEACHER_MAX, max_t)
    tl.store(row_statistics + TEACHER_LOG_SUM, log_sum_t * LN_2)
    tl.store(row_statistics + STUDENT_CONSTANT, constant_s)
    tl.store(row_statistics + TEACHER_CONSTANT, constant_t)
    if HARD:
        tl.store(row_statistics + STUDENT_HARD_LOG_SUM, hard_log_sum)
        label = tl.load(labels + row)
        logit = tl.sum(tl.load(at + LABEL_LOGIT * splits, mask=there, other=0.0), axis=0)
        inside = (label >= 0) & (label < vocab_size)
        tl.store(cross_entropy + row, tl.where(inside, hard_log_sum - (logit - max_s), float("nan")))


@triton.jit
def logarithms(logits, row_statistics, MAX: tl.constexpr, LOG_SUM: tl.constexpr, scale):
    """log2 of the probabilities [ROWS, COLUMNS]; `row_statistics` point to the rows' statistics."""
    largest = tl.load(row_statistics + MAX)
    log_sum = tl.load(row_statistics + LOG_SUM) * LOG2_E
    return (logits - largest[:, None]) * scale[:, None] - log_sum[:, None]


@triton.jit(do_not_specialize=["row_count", "vocab_size", "splits"])
def linear_divergence_terms_kernel(
    student,
    teacher,
    row_count,
    vocab_size,
    splits,
    sums,
    statistics,
    active,
    parameters,
    a,
    b,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Second sweep of the mixture forms: sums (H_s, H_t, value), float32 [N, 3, splits]; grid as in the first."""
    split = tl.program_id(1)
    rows, present, counted = rows_of_block(tl.program_id(0), row_count, active, ROWS)
    sum_h_s = tl.zeros((ROWS,), tl.float32)
    sum_h_t = tl.zeros((ROWS,), tl.float32)
    sum_value = tl.zeros((ROWS,), tl.float32)
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, vocab_size), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        valid = columns < vocab_size
        ids = ids_of(columns, valid, None)
        s = side_logits(student, rows, counted, ids, valid, HIDDEN, PRECISION)
        t = side_logits(teacher, rows, counted, ids, valid, HIDDEN, PRECISION)
        # What is of a row is read again for each tile: so no register keeps it while logits are made.
        row_statistics = statistics + rows.to(tl.int64) * STATISTICS
        student_scale = scale_of(student, rows)
        teacher_scale = scale_of(teacher, rows)
        log_q = logarithms(s, row_statistics, STUDENT_MAX, STUDENT_LOG_SUM, student_scale)
        log_p = logarithms(t, row_statistics, TEACHER_MAX, TEACHER_LOG_SUM, teacher_scale)
        row_a = numbers_of_rows(a, parameters, rows)[:, None]
        h_s, h_t, value = divergence_terms(log_p, log_q, row_a, b, KIND, FAST_LOG)
        sum_h_s += tl.sum(tl.where(valid[None, :], h_s, 0.0), axis=1)
        sum_h_t += tl.sum(tl.where(valid[None, :], h_t, 0.0), axis=1)
        sum_value += tl.sum(tl.where(valid[None, :], value, 0.0), axis=1)
    sums_at = sums + rows.to(tl.int64) * 3 * splits + split
    tl.store(sums_at, sum_h_s, mask=present)
    tl.store(sums_at + splits, sum_h_t, mask=present)
    tl.store(sums_at + 2 * splits, sum_value, mask=present)


@triton.jit(do_not_specialize=["splits"])
def linear_divergence_value_kernel(
    sums, splits, divergence, statistics, active, parameters, a, b, KIND: tl.constexpr, SPLITS: tl.constexpr
):
    """One row of a mixture form: its value and constants from the sums of its splits; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    a = row_scalar(a, parameters, row, tl.float32)
    split = tl.arange(0, SPLITS)
    there = split < splits
    at = sums + row * 3 * splits + split
    constant_s = tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
    constant_t = tl.sum(tl.load(at + splits, mask=there, other=0.0), axis=0)
    value = tl.sum(tl.load(at + 2 * splits, mask=there, other=0.0), axis=0)
    tl.store(divergence + row, value_from_sums(constant_s, constant_t, value, a, b, KIND))
    tl.store(statistics + row * STATISTICS + STUDENT_CONSTANT, constant_s)
    tl.store(statistics + row * STATISTICS + TEACHER_CONSTANT, constant_t)


@triton.jit
def to_raw_logits(gradient, logits, cap):
    """The gradient to logits before the cap. The tanh is what they are in units of it: so no register keeps it."""
    if cap is None:
        gradient = before_cap(gradient, logits, logits, False)
    else:
        gradient = before_cap(gradient, logits, logits * (1.0 / cap), True)
    return gradient


@triton.jit
def strip_places(block, in_strip, stride, ROWS: tl.constexpr):
    """Where a block of rows has these columns of a strip, [ROWS, COLUMNS]."""
    rows = block * ROWS + tl.arange(0, ROWS)
    return rows.to(tl.int64)[:, None] * stride + in_strip[None, :]


@triton.jit
def note_tile(notes, gradient, logits, inside, tile, block, ROWS: tl.constexpr):
    """Writes a row's sums over this tile: squares and sums float32 [tiles, blocks * ROWS], masked int32 [tiles, blocks]."""
    squares, sums, masked = notes
    blocks = tl.num_programs(0)
    at = (tile.to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
    tl.store(squares + at, tl.sum(gradient * gradient, axis=1))
    tl.store(sums + at, tl.sum(gradient, axis=1))
    on_floor = tl.where((logits == LOGIT_FLOOR) & inside, 1, 0)
    tl.store(masked + tile * blocks + block, tl.max(tl.max(on_floor, axis=1), axis=0))


@triton.jit(do_not_specialize=["row_count", "vocab_size", "first_column"])
def linear_divergence_gradient_kernel(
    student,
    teacher,
    row_count,
    vocab_size,
    first_column,
    grad_student,
    grad_teacher,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    student_notes,
    teacher_notes,
    statistics,
    grad_divergence,
    grad_cross_entropy,
    order,
    labels,
    active,
    parameters,
    a,
    b,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The gradients to a tile of the logits of a strip, which starts at `first_column`; grid (row blocks, tiles).

    grad_student, grad_teacher: of logits [N, V]; of a head a strip [blocks * ROWS, tiles * COLUMNS] of its dtype, written to
    its edges, with 0 where there is no logit; None where not wanted.
    student_notes, teacher_notes: (squares, sums, masked) of ``note_tile``, or None. order: int32 [V] or None.
    grad_divergence, grad_cross_entropy (None: no such term): float32 [N].
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    rows, present, counted = rows_of_block(block, row_count, active, ROWS)
    HARD: tl.constexpr = grad_cross_entropy is not None
    in_strip = tile * COLUMNS + tl.arange(0, COLUMNS)
    columns = first_column + in_strip
    valid = columns < vocab_size
    ids = ids_of(columns, valid, order)
    inside = counted[:, None] & valid[None, :]
    s = side_logits(student, rows, counted, ids, valid, HIDDEN, PRECISION)
    t = side_logits(teacher, rows, counted, ids, valid, HIDDEN, PRECISION)
    # What is of a row is read now: so no register keeps it while logits are made.
    row_statistics = statistics + rows.to(tl.int64) * STATISTICS
    student_scale = scale_of(student, rows)
    teacher_scale = scale_of(teacher, rows)
    log_q = logarithms(s, row_statistics, STUDENT_MAX, STUDENT_LOG_SUM, student_scale)
    log_p = logarithms(t, row_statistics, TEACHER_MAX, TEACHER_LOG_SUM, teacher_scale)
    a = numbers_of_rows(a, parameters, rows)[:, None]
    factor = tl.load(grad_divergence + rows)
    if grad_student is not None:
        constant = tl.load(row_statistics + STUDENT_CONSTANT)[:, None]
        gradient = student_terms(log_p, log_q, constant, a, b, KIND, FAST_LOG)
        gradient *= (factor / numbers_of_rows(student[8], student[9], rows))[:, None]
        if HARD:
            hard_log_sum = tl.load(row_statistics + STUDENT_HARD_LOG_SUM) * LOG2_E
            is_label = ids[None, :] == tl.load(labels + rows).to(tl.int32)[:, None]
            largest = tl.load(row_statistics + STUDENT_MAX)
            hard = hard_terms(s, largest[:, None], hard_log_sum[:, None], is_label)
            gradient += tl.load(grad_cross_entropy + rows)[:, None] * hard
        gradient = tl.where(inside, to_raw_logits(gradient, s, student[7]), 0.0)
        if student_notes is not None:
            note_tile(student_notes, gradient, s, inside, tile, block, ROWS)
        gradient = round_to(gradient, grad_student.dtype.element_ty)
        if student[2] is None:
            at = grad_student + rows.to(tl.int64)[:, None] * student_stride + ids[None, :]
            tl.store(at, gradient, mask=present[:, None] & valid[None, :])
        else:
            tl.store(grad_student + strip_places(block, in_strip, student_stride, ROWS), gradient)
    if grad_teacher is not None:
        constant = tl.load(row_statistics + TEACHER_CONSTANT)[:, None]
        gradient = teacher_terms(log_p, log_q, constant, a, b, KIND, FAST_LOG)
        gradient *= (factor / numbers_of_rows(teacher[8], teacher[9], rows))[:, None]
        gradient = tl.where(inside, to_raw_logits(gradient, t, teacher[7]), 0.0)
        if teacher_notes is not None:
            note_tile(teacher_notes, gradient, t, inside, tile, block, ROWS)
        gradient = round_to(gradient, grad_teacher.dtype.element_ty)
        if teacher[2] is None:
            at = grad_teacher + rows.to(tl.int64)[:, None] * teacher_stride + ids[None, :]
            tl.store(at, gradient, mask=present[:, None] & valid[None, :])
        else:
            tl.store(grad_teacher + strip_places(block, in_strip, teacher_stride, ROWS), gradient)


@triton.jit
def listed(lists, counts, owner, length, index):
    """Number `index` of what `owner` has to walk: from its list, or all of `length` things in turn."""
    number = index
    if counts is not None:
        number = tl.load(lists + owner * length + index)
    return number


@triton.jit
def length_of(counts, owner, length):
    if counts is not None:
        length = tl.load(counts + owner)
    return length


@triton.jit(do_not_specialize=["row_count", "vocab_size", "first_column", "tiles"])
def linear_divergence_hidden_kernel(
    gradient,
    gradient_stride: tl.int64,
    weight,
    weight_stride,
    hidden_size,
    total,
    scale,
    row_count,
    vocab_size,
    first_column,
    tiles,
    order,
    lists,
    counts,
    means,
    skipped,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """What a strip's gradient makes of the weight: total [N, H] float32 gets scale * gradient @ weight; grid (blocks, H blocks).

    gradient: the strip. lists, counts: int32 [blocks, tiles] and [blocks], the tiles to walk, or None for all; means: [N],
    skipped: [blocks, H], float32: what stands in for the others, an entry of each row and the sums of their rows of weight.
    """
    block = tl.program_id(0)
    rows, present, _ = rows_of_block(block, row_count, None, ROWS)
    entries = tl.program_id(1) * PRODUCT + tl.arange(0, PRODUCT)
    there = entries < hidden_size
    at = total + rows.to(tl.int64)[:, None] * hidden_size + entries[None, :]
    stored = present[:, None] & there[None, :]
    sums = tl.zeros((ROWS, PRODUCT), tl.float32)
    for index in range(length_of(counts, block, tiles)):
        tile = listed(lists, counts, block, tiles, index)
        in_strip = tile * COLUMNS + tl.arange(0, COLUMNS)
        ids = ids_of(first_column + in_strip, first_column + in_strip < vocab_size, order)
        part = tl.load(gradient + strip_places(block, in_strip, gradient_stride, ROWS))
        weights_at = weight + ids.to(tl.int64)[:, None] * weight_stride + entries[None, :]
        weights = tl.load(weights_at, mask=there[None, :], other=0.0)
        sums = dot(part, weights, sums, PRECISION)
    if counts is not None:
        mean = tl.load(means + rows)
        sums += mean[:, None] * tl.load(skipped + block * hidden_size + entries, mask=there, other=0.0)[None, :]
    sums *= scale
    if not FIRST:
        sums += tl.load(at, mask=stored, other=0.0)
    tl.store(at, sums, mask=stored)


@triton.jit(do_not_specialize=["row_count", "vocab_size", "first_column", "blocks"])
def linear_divergence_weight_kernel(
    gradient,
    gradient_stride: tl.int64,
    hidden,
    hidden_stride,
    hidden_size,
    grad_weight,
    grad_bias,
    scale,
    row_count,
    vocab_size,
    first_column,
    blocks,
    order,
    active,
    lists,
    counts,
    skipped,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The rows of grad_weight [V, H] that belong to a tile; grid (tiles, H blocks). Or, if it is None, those of grad_bias [V].

    gradient: the strip; hidden: [N, H]. lists, counts: int32 [tiles, blocks] and [tiles], the row blocks to walk, or None for
    all; skipped: float32 [tiles, H], of grad_bias [tiles]: what the others come to.
    """
    tile = tl.program_id(0)
    in_strip = tile * COLUMNS + tl.arange(0, COLUMNS)
    valid = first_column + in_strip < vocab_size
    ids = ids_of(first_column + in_strip, valid, order)
    entries = tl.program_id(1) * PRODUCT + tl.arange(0, PRODUCT)
    there = entries < hidden_size
    if grad_weight is not None:
        sums = tl.zeros((COLUMNS, PRODUCT), tl.float32)
    else:
        sums = tl.zeros((COLUMNS,), tl.float32)
    for index in range(length_of(counts, tile, blocks)):
        block = listed(lists, counts, tile, blocks, index)
        part = tl.load(gradient + strip_places(block, in_strip, gradient_stride, ROWS))
        if grad_weight is not None:
            rows, _, counted = rows_of_block(block, row_count, active, ROWS)
            states_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + entries[None, :]
            states = tl.load(states_at, mask=counted[:, None] & there[None, :], other=0.0)
            sums = dot(tl.trans(part), states, sums, PRECISION)
        else:
            sums += tl.sum(part.to(tl.float32), axis=0)
    if grad_weight is not None:
        if counts is not None:
            sums += tl.load(skipped + tile * hidden_size + entries, mask=there, other=0.0)[None, :]
        at = grad_weight + ids.to(tl.int64)[:, None] * hidden_size + entries[None, :]
        sums = round_to(sums * scale, grad_weight.dtype.element_ty)
        tl.store(at, sums, mask=valid[:, None] & there[None, :])
    else:
        if counts is not None:
            sums += tl.load(skipped + tile)
        tl.store(grad_bias + ids, round_to(sums * scale, grad_bias.dtype.element_ty), mask=valid)

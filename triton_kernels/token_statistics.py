# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Token statistics in one pass over the logits: normalisers, entropies, KL divergences, arg max, label log-probs.

One program handles one row and reads each logit once. p = softmax(teacher / tau_t), q = softmax(student / tau_s).
"""

import triton
import triton.language as tl

from .compositions import load_side, load_side_label, row_source
from .online_softmax import (
    LN_2,
    LOG2_E,
    LOGIT_FLOOR,
    advance_maximum,
    lane_min,
    lane_sum,
    merge_maximum,
    powers_of_two,
    row_scalar,
    tile_columns,
)

# Columns of the values; those of the teacher come right behind the student's.
LSE_STUDENT = tl.constexpr(0)
LSE_TEACHER = tl.constexpr(1)
FORWARD_KL = tl.constexpr(2)
REVERSE_KL = tl.constexpr(3)
ENTROPY_STUDENT = tl.constexpr(4)
ENTROPY_TEACHER = tl.constexpr(5)
MAX_STUDENT = tl.constexpr(6)
MAX_TEACHER = tl.constexpr(7)
LABEL_LOGPROB_STUDENT = tl.constexpr(8)
LABEL_LOGPROB_TEACHER = tl.constexpr(9)
VALUES = tl.constexpr(10)

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def advance_side(maximum, total, moment, best, logits, scale, columns, valid, MASKED: tl.constexpr):
    """One more tile of one side's logits.

    Per lane: maximum, total = sum 2^z, moment = sum 2^z z, best = the lowest column that holds the maximum. Returns
    them with the tile's exponents z = (logits - maximum) * scale, the powers 2^z, and the shift of older exponents.
    """
    new, shift, z = advance_maximum(maximum, logits, scale)
    power = powers_of_two(z, valid, MASKED)
    # Later tiles hold higher columns, so a tie with an earlier tile leaves `best` alone.
    found = lane_min(tl.where(logits == new[None, :, None], columns, NO_COLUMN))
    best = tl.where(new > maximum, found, tl.minimum(best, found))
    rescale = tl.exp2(shift)
    moment = rescale * (moment + total * shift) + lane_sum(power * z)
    return new, total * rescale + lane_sum(power), moment, best, z, power, shift


@triton.jit
def accumulate(
    state,
    student_row,
    teacher_row,
    columns,
    vocab_size,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile added to the lanes' state: (maximum, total, moment, best) of both sides, and the cross sums of the KLs.

    cross_s = sum 2^z_s (z_s - z_t), cross_t = sum 2^z_t (z_t - z_s).
    """
    max_s, sum_s, moment_s, best_s, max_t, sum_t, moment_t, best_t, cross_s, cross_t = state
    valid = columns < vocab_size
    s, _ = load_side(student_row, columns, valid, student_cap, HAS_STUDENT_CAP, MASKED, "evict_first", COMPUTE)
    max_s, new_sum_s, moment_s, best_s, z_s, power_s, shift_s = advance_side(
        max_s, sum_s, moment_s, best_s, s, student_scale, columns, valid, MASKED
    )
    new_sum_t = sum_t
    if teacher_row is not None:
        t, _ = load_side(teacher_row, columns, valid, teacher_cap, HAS_TEACHER_CAP, MASKED, "evict_first", COMPUTE)
        max_t, new_sum_t, moment_t, best_t, z_t, power_t, shift_t = advance_side(
            max_t, sum_t, moment_t, best_t, t, teacher_scale, columns, valid, MASKED
        )
        gap = z_t - z_s
        moved = shift_t - shift_s
        cross_s = tl.exp2(shift_s) * (cross_s - sum_s * moved) - lane_sum(power_s * gap)
        cross_t = tl.exp2(shift_t) * (cross_t + sum_t * moved) + lane_sum(power_t * gap)
    return max_s, new_sum_s, moment_s, best_s, max_t, new_sum_t, moment_t, best_t, cross_s, cross_t


@triton.jit
def merge_side(maximum, total, moment, best, scale, vocab_size):
    """The row's maximum, sum, log2 of it, entropy and arg max from its lanes', and the shift of their exponents."""
    row_maximum, shift = merge_maximum(maximum, scale)
    rescale = tl.exp2(shift)
    row_total = tl.sum(total * rescale, axis=0)
    row_moment = tl.sum(rescale * (moment + total * shift), axis=0)
    log_total = tl.log2(row_total)
    best = tl.min(tl.where(maximum == row_maximum, best, NO_COLUMN), axis=0)
    best = tl.where(best < vocab_size, best, 0)  # a row of NaN has no maximum
    row_maximum = tl.where(row_total == row_total, row_maximum, row_total)
    return row_maximum, row_total, log_total, (log_total - row_moment / row_total) * LN_2, best, shift


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab_size"])
def token_statistics_kernel(
    student,
    teacher,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    values,
    argmax,
    labels,
    active,
    student_composition,
    teacher_composition,
    student_temperatures,
    teacher_temperatures,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of statistics.

    student, teacher: [N, V] logits, adjacent columns, row strides in vectors of WIDTH logits; teacher may be None.
    values: [N, VALUES] in COMPUTE, columns as named above; normalisers, entropies, KLs and label log-probs are of the
    tempered logits, maxima of the raw (capped, floored) ones; NaN where there is no teacher or no label.
    argmax: int64 [N, 2], student and teacher, the lowest column among equals. Inactive rows are all 0.
    labels: int64 [N]; active: bool [N]; temperatures: [N]; each may be None.
    """
    row = tl.program_id(0)
    row_values = values + row.to(tl.int64) * VALUES
    row_argmax = argmax + row.to(tl.int64) * 2
    if active is not None:
        if tl.load(active + row) == 0:
            slot = tl.arange(0, 16)
            tl.store(row_values + slot, tl.zeros((16,), COMPUTE), mask=slot < VALUES)
            tl.store(row_argmax, 0)
            tl.store(row_argmax + 1, 0)
            return
    student_temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    teacher_temperature = row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    student_scale = LOG2_E / student_temperature
    teacher_scale = LOG2_E / teacher_temperature
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    student_row = row_source(student, row, student_stride, student_composition, WIDTH)
    teacher_row = teacher
    if teacher is not None:
        teacher_row = row_source(teacher, row, teacher_stride, teacher_composition, WIDTH)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    rest_columns = tile_columns(1, LANES, WIDTH)
    REST_TILE: tl.constexpr = LANES * WIDTH

    lowest = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    zero = tl.zeros((LANES,), COMPUTE)
    nowhere = tl.full((LANES,), NO_COLUMN, tl.int32)
    state = (lowest, zero, zero, nowhere, lowest, zero, zero, nowhere, zero, zero)
    for start in range(0, whole, TILE):
        state = accumulate(
            state, student_row, teacher_row, start + columns, vocab_size, student_scale, teacher_scale,
            student_cap, teacher_cap, HAS_STUDENT_CAP, HAS_TEACHER_CAP, False, COMPUTE,
        )  # fmt: skip
    for start in range(whole, vocab_size, REST_TILE):
        state = accumulate(
            state, student_row, teacher_row, start + rest_columns, vocab_size, student_scale, teacher_scale,
            student_cap, teacher_cap, HAS_STUDENT_CAP, HAS_TEACHER_CAP, True, COMPUTE,
        )  # fmt: skip

    max_s, sum_s, moment_s, best_s, max_t, sum_t, moment_t, best_t, cross_s, cross_t = state
    row_max_s, row_sum_s, log_sum_s, entropy_s, argmax_s, shift_s = merge_side(
        max_s, sum_s, moment_s, best_s, student_scale, vocab_size
    )
    missing = tl.full((), float("nan"), COMPUTE)
    tl.store(row_values + LSE_STUDENT, (row_max_s * student_scale + log_sum_s) * LN_2)
    tl.store(row_values + ENTROPY_STUDENT, entropy_s)
    tl.store(row_values + MAX_STUDENT, row_max_s)
    tl.store(row_argmax, argmax_s.to(tl.int64))
    if teacher is not None:
        row_max_t, row_sum_t, log_sum_t, entropy_t, argmax_t, shift_t = merge_side(
            max_t, sum_t, moment_t, best_t, teacher_scale, vocab_size
        )
        cross_s = tl.sum(tl.exp2(shift_s) * (cross_s + sum_s * (shift_s - shift_t)), axis=0)
        cross_t = tl.sum(tl.exp2(shift_t) * (cross_t + sum_t * (shift_t - shift_s)), axis=0)
        tl.store(row_values + LSE_TEACHER, (row_max_t * teacher_scale + log_sum_t) * LN_2)
        tl.store(row_values + FORWARD_KL, (cross_t / row_sum_t - (log_sum_t - log_sum_s)) * LN_2)
        tl.store(row_values + REVERSE_KL, (cross_s / row_sum_s - (log_sum_s - log_sum_t)) * LN_2)
        tl.store(row_values + ENTROPY_TEACHER, entropy_t)
        tl.store(row_values + MAX_TEACHER, row_max_t)
        tl.store(row_argmax + 1, argmax_t.to(tl.int64))
    else:
        tl.store(row_values + LSE_TEACHER, missing)
        tl.store(row_values + FORWARD_KL, missing)
        tl.store(row_values + REVERSE_KL, missing)
        tl.store(row_values + ENTROPY_TEACHER, missing)
        tl.store(row_values + MAX_TEACHER, missing)
        tl.store(row_argmax + 1, 0)
    label_s = missing
    label_t = missing
    if labels is not None:
        label = tl.load(labels + row)
        logit = load_side_label(student_row, label, vocab_size, student_cap, HAS_STUDENT_CAP, COMPUTE)
        label_s = ((logit - row_max_s) * student_scale - log_sum_s) * LN_2
        if teacher is not None:
            logit = load_side_label(teacher_row, label, vocab_size, teacher_cap, HAS_TEACHER_CAP, COMPUTE)
            label_t = ((logit - row_max_t) * teacher_scale - log_sum_t) * LN_2
    tl.store(row_values + LABEL_LOGPROB_STUDENT, label_s)
    tl.store(row_values + LABEL_LOGPROB_TEACHER, label_t)

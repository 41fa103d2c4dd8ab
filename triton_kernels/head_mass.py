# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The head of a row: its most probable entries that hold a given mass, and how far the student is from it there.

One program handles one row. After the normalisers it halves the range of logits in which the mass is crossed, in sweeps over
a row that the caches hold. The range ends at logits of the row, so that the search ends when none is left.
"""

import triton
import triton.language as tl

from .online_softmax import (
    LOG2_E,
    LOGIT_FLOOR,
    advance_maximum,
    lane_sum,
    load_logits,
    load_probabilities,
    merge_maximum,
    powers_of_two,
    row_pointer,
    row_scalar,
    tile_columns,
)


@triton.jit
def normaliser(
    pointer, vocab_size, scale, cap,
    HAS_CAP: tl.constexpr, COMPUTE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(the largest logit of a row, the sum of exponentials relative to it)."""
    columns = tile_columns(UNROLL, LANES, WIDTH)
    maximum = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    for start in range(0, vocab_size, UNROLL * LANES * WIDTH):
        valid = start + columns < vocab_size
        logits, _ = load_logits(pointer, start + columns, valid, cap, HAS_CAP, True, "", COMPUTE)
        maximum, shift, exponents = advance_maximum(maximum, logits, scale)
        total = total * tl.exp2(shift) + lane_sum(powers_of_two(exponents, valid, True))
    largest, shift = merge_maximum(maximum, scale)
    return largest, tl.sum(total * tl.exp2(shift), axis=0)


@triton.jit
def divide(
    pointer, vocab_size, bound, largest, factor, scale, cap,
    HAS_CAP: tl.constexpr, COMPUTE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(mass of the logits at or above `bound`; the lowest of these; the highest of the others)."""
    columns = tile_columns(UNROLL, LANES, WIDTH)
    mass = tl.zeros((LANES,), COMPUTE)
    above = tl.full((LANES,), float("inf"), COMPUTE)
    below = tl.full((LANES,), -float("inf"), COMPUTE)
    for start in range(0, vocab_size, UNROLL * LANES * WIDTH):
        valid = start + columns < vocab_size
        p, logits, _ = load_probabilities(
            pointer, start + columns, valid, largest, factor, scale, cap, HAS_CAP, COMPUTE
        )
        high = valid & (logits >= bound)
        mass += lane_sum(tl.where(high, p, 0.0))
        above = tl.minimum(above, tl.min(tl.min(tl.where(high, logits, float("inf")), axis=0), axis=1))
        below = tl.maximum(below, tl.max(tl.max(tl.where(valid & ~high, logits, -float("inf")), axis=0), axis=1))
    return tl.sum(mass, axis=0), tl.min(above, axis=0), tl.max(below, axis=0)


@triton.jit(do_not_specialize=["teacher_stride", "student_stride", "vocab_size"])
def head_mass_kernel(
    teacher,
    student,
    teacher_stride: tl.int64,
    student_stride: tl.int64,
    vocab_size,
    masses,
    mass: tl.float64,
    thresholds,
    gaps,
    active,
    student_temperatures,
    teacher_temperatures,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    CROSSING: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the lowest logit of the teacher's head and, with a student, the sums of |p - q| over head and tail.

    CROSSING: the entries that cross the mass are of the head.

    teacher, student: [N, V] logits, adjacent columns, row strides in vectors of WIDTH logits; student may be None.
    masses: [N], or None (`mass` for all). thresholds: [N]; gaps: [N, 2]. active: bool [N]; temperatures: [N]; each may be
    None. Rows that are not active are all 0.
    """
    row = tl.program_id(0)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(thresholds + row, 0.0)
            if student is not None:
                tl.store(gaps + 2 * row.to(tl.int64), 0.0)
                tl.store(gaps + 2 * row.to(tl.int64) + 1, 0.0)
            return
    target = row_scalar(mass, masses, row, COMPUTE)
    scale = LOG2_E / row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    cap = tl.full((), teacher_softcap, COMPUTE)
    pointer = row_pointer(teacher, row, teacher_stride, WIDTH)
    largest, total = normaliser(pointer, vocab_size, scale, cap, HAS_TEACHER_CAP, COMPUTE, UNROLL, LANES, WIDTH)
    factor = 1.0 / total
    # The head reaches down to `threshold` at least. What is above `low` and up to `high`, a logit of the row, may follow; what
    # is not above `low` does not: the first entry of the tail has at least (1 - target) / vocab_size.
    threshold = largest
    held, _top, high = divide(
        pointer, vocab_size, largest, largest, factor, scale, cap, HAS_TEACHER_CAP, COMPUTE, UNROLL, LANES, WIDTH
    )
    nothing = tl.full((), LOGIT_FLOOR - 1.0, COMPUTE)
    share = tl.maximum(0.5 * (1.0 - target) / vocab_size, 1e-30)
    low = tl.where(target < 1, tl.maximum(largest + tl.log2(share * total) / scale, nothing), nothing)
    target = tl.where(target < 1, target, float("inf"))
    # A row of NaN does not enter: its sum compares as false.
    while (high > low) & (total < float("inf")):
        bound = low + (high - low) / 2
        bound = tl.where(bound > low, bound, high)
        found, above, below = divide(
            pointer, vocab_size, bound, largest, factor, scale, cap, HAS_TEACHER_CAP, COMPUTE, UNROLL, LANES, WIDTH
        )
        inside = found <= target
        threshold = tl.where(inside, above, threshold)
        held = tl.where(inside, found, held)
        high = tl.where(inside, below, high)
        low = tl.where(inside, low, above)
    if CROSSING:
        # What follows the head is `high`.
        threshold = tl.where((held < target) & (high >= LOGIT_FLOOR), high, threshold)
    threshold = tl.where(total < float("inf"), threshold, float("nan"))
    tl.store(thresholds + row, threshold)

    if student is not None:
        student_scale = LOG2_E / row_scalar(student_temperature, student_temperatures, row, COMPUTE)
        student_cap = tl.full((), student_softcap, COMPUTE)
        student_pointer = row_pointer(student, row, student_stride, WIDTH)
        student_largest, student_total = normaliser(
            student_pointer, vocab_size, student_scale, student_cap, HAS_STUDENT_CAP, COMPUTE, UNROLL, LANES, WIDTH
        )
        columns = tile_columns(UNROLL, LANES, WIDTH)
        head_gap = tl.zeros((LANES,), COMPUTE)
        tail_gap = tl.zeros((LANES,), COMPUTE)
        for start in range(0, vocab_size, UNROLL * LANES * WIDTH):
            valid = start + columns < vocab_size
            p, logits, _ = load_probabilities(
                pointer, start + columns, valid, largest, factor, scale, cap, HAS_TEACHER_CAP, COMPUTE
            )
            q, _, _ = load_probabilities(
                student_pointer, start + columns, valid, student_largest, 1.0 / student_total, student_scale,
                student_cap, HAS_STUDENT_CAP, COMPUTE,
            )  # fmt: skip
            gap = tl.abs(p - q)
            head_gap += lane_sum(tl.where(logits >= threshold, gap, 0.0))
            tail_gap += lane_sum(tl.where(logits >= threshold, 0.0, gap))
        # NaN of either side shows in both.
        doubt = threshold - threshold + (student_total - student_total)
        tl.store(gaps + 2 * row.to(tl.int64), tl.sum(head_gap, axis=0) + doubt)
        tl.store(gaps + 2 * row.to(tl.int64) + 1, tl.sum(tail_gap, axis=0) + doubt)

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The L1 distance of the sorted probabilities of two rows, from logits that have been sorted.

sum_r |q_(r) - p_(r)| with q = softmax(student / tau_s) and p = softmax(teacher / tau_t) in falling order, the shorter filled
up with zeros. A sort of the logits is one of the probabilities, and its first logit is the largest, so that a row takes one
sweep for the normalisers, one for the distance and, where gradients are wanted, a third: with sigma the sign of q_(r) - p_(r),

    dD/d student logit = q (sigma - sum q sigma) / tau_s        dD/d teacher logit = p (sum p sigma - sigma) / tau_t

written to the places that the logits came from. One program handles one row.
"""

import triton
import triton.language as tl

from .divergence import store_gradient, zero_row
from .online_softmax import (
    LOG2_E,
    lane_sum,
    load_label_logit,
    load_logits,
    load_probabilities,
    powers_of_two,
    row_pointer,
    row_scalar,
    tile_columns,
)


@triton.jit
def exponential_sum(
    pointer,
    vocab_size,
    largest,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of a row, relative to its largest logit."""
    columns = tile_columns(UNROLL, LANES, 1)
    total = tl.zeros((LANES,), COMPUTE)
    for start in range(0, vocab_size, UNROLL * LANES):
        valid = start + columns < vocab_size
        logits, _ = load_logits(pointer, start + columns, valid, cap, HAS_CAP, True, "", COMPUTE)
        total += lane_sum(powers_of_two((logits - largest) * scale, valid, True))
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["student_vocab", "teacher_vocab", "grad_student_stride", "grad_teacher_stride"])
def sorted_l1_kernel(
    student,
    teacher,
    student_order,
    teacher_order,
    student_vocab,
    teacher_vocab,
    values,
    grad_values,
    grad_student,
    grad_teacher,
    grad_student_stride: tl.int64,
    grad_teacher_stride: tl.int64,
    active,
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
):
    """One row: its distance and, where a buffer is given, the gradients.

    student [N, V_s], teacher [N, V_t]: sorted logits, contiguous; student_order, teacher_order: int64, where they stood.
    grad_student [N, V_s], grad_teacher [N, V_t]: in the order before the sort, or None. values: [N] in COMPUTE; grad_values:
    [N], or None (ones). active: bool [N]; temperatures: [N]; each may be None.
    """
    row = tl.program_id(0)
    grad_student_row = grad_student
    if grad_student is not None:
        grad_student_row = row_pointer(grad_student, row, grad_student_stride, 1)
    grad_teacher_row = grad_teacher
    if grad_teacher is not None:
        grad_teacher_row = row_pointer(grad_teacher, row, grad_teacher_stride, 1)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(values + row, 0.0)
            zero_row(grad_student_row, tl.arange(0, LANES), student_vocab, LANES)
            zero_row(grad_teacher_row, tl.arange(0, LANES), teacher_vocab, LANES)
            return
    student_temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    teacher_temperature = row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    student_scale = LOG2_E / student_temperature
    teacher_scale = LOG2_E / teacher_temperature
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    student_row = row_pointer(student, row, student_vocab, 1)
    teacher_row = row_pointer(teacher, row, teacher_vocab, 1)
    largest_s = load_label_logit(student_row, 0, student_vocab, student_cap, HAS_STUDENT_CAP, COMPUTE)
    largest_t = load_label_logit(teacher_row, 0, teacher_vocab, teacher_cap, HAS_TEACHER_CAP, COMPUTE)
    factor_s = 1.0 / exponential_sum(
        student_row, student_vocab, largest_s, student_scale, student_cap, HAS_STUDENT_CAP, COMPUTE, UNROLL, LANES
    )
    factor_t = 1.0 / exponential_sum(
        teacher_row, teacher_vocab, largest_t, teacher_scale, teacher_cap, HAS_TEACHER_CAP, COMPUTE, UNROLL, LANES
    )

    columns = tile_columns(UNROLL, LANES, 1)
    longer = tl.maximum(student_vocab, teacher_vocab)
    total = tl.zeros((LANES,), COMPUTE)
    student_moment = tl.zeros((LANES,), COMPUTE)
    teacher_moment = tl.zeros((LANES,), COMPUTE)
    for start in range(0, longer, UNROLL * LANES):
        ranks = start + columns
        q, _, _ = load_probabilities(
            student_row, ranks, ranks < student_vocab, largest_s, factor_s, student_scale, student_cap,
            HAS_STUDENT_CAP, COMPUTE,
        )  # fmt: skip
        p, _, _ = load_probabilities(
            teacher_row, ranks, ranks < teacher_vocab, largest_t, factor_t, teacher_scale, teacher_cap,
            HAS_TEACHER_CAP, COMPUTE,
        )  # fmt: skip
        total += lane_sum(tl.abs(q - p))
        student_moment += lane_sum(signed(q, q - p))
        teacher_moment += lane_sum(signed(p, q - p))
    tl.store(values + row, tl.sum(total, axis=0))

    if grad_student is not None or grad_teacher is not None:
        student_constant = tl.sum(student_moment, axis=0)
        teacher_constant = tl.sum(teacher_moment, axis=0)
        factor = tl.full((), 1.0, COMPUTE)
        if grad_values is not None:
            factor = tl.load(grad_values + row).to(COMPUTE)
        student_factor = factor / student_temperature
        teacher_factor = factor / teacher_temperature
        for start in range(0, longer, UNROLL * LANES):
            ranks = start + columns
            in_student = ranks < student_vocab
            in_teacher = ranks < teacher_vocab
            q, s, tanh_s = load_probabilities(
                student_row,
                ranks,
                in_student,
                largest_s,
                factor_s,
                student_scale,
                student_cap,
                HAS_STUDENT_CAP,
                COMPUTE,
            )
            p, t, tanh_t = load_probabilities(
                teacher_row,
                ranks,
                in_teacher,
                largest_t,
                factor_t,
                teacher_scale,
                teacher_cap,
                HAS_TEACHER_CAP,
                COMPUTE,
            )
            difference = q - p
            if grad_student is not None:
                places = tl.load(student_order + row.to(tl.int64) * student_vocab + ranks, mask=in_student, other=0)
                gradient = student_factor * (signed(q, difference) - q * student_constant)
                store_gradient(grad_student_row + places, gradient, s, tanh_s, in_student, HAS_STUDENT_CAP, True)
            if grad_teacher is not None:
                places = tl.load(teacher_order + row.to(tl.int64) * teacher_vocab + ranks, mask=in_teacher, other=0)
                gradient = teacher_factor * (p * teacher_constant - signed(p, difference))
                store_gradient(grad_teacher_row + places, gradient, t, tanh_t, in_teacher, HAS_TEACHER_CAP, True)


@triton.jit
def signed(x, difference):
    """x times the sign of the difference."""
    return tl.where(difference > 0, x, tl.where(difference < 0, -x, x * difference))

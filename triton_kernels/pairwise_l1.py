# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""L1 distances between the softmax rows of two sides, every row of one with every row of the other.

distance_ij = sum_v |x_iv - y_jv| with x = softmax(student / tau_s) and y = softmax(teacher / tau_t). No product of matrices
gives a sum of absolute values, so the work is a subtraction and an addition per pair and entry, and the tiles are made for
it: lanes lie along the vocabulary, each with all pairs of a block of rows in its registers and sums of its own, so that the
loop holds no exchange between lanes and each probability is made once for a block of pairs. Only the normalisers of the
rows are known beforehand.

The gradient to a side is x_iv (h_iv - centre_i) / tau with h_iv = sum_j grad_ij sign(x_iv - y_jv) and centre_i = sum_v
x_iv h_iv, which the forward's sums x sign(x - y) give. The two sides are the same kernel with their roles exchanged.

Rows of logits are [B n, V] with adjacent columns; normalisers [N, 2] in COMPUTE: the largest logit after softcap and floor,
and the sum of the exponentials relative to it.
"""

import triton
import triton.language as tl

from .divergence import store_gradient
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
    tile_columns,
)


@triton.jit(do_not_specialize=["stride", "vocab_size"])
def pairwise_normalisers_kernel(
    source,
    stride: tl.int64,
    vocab_size,
    normalisers,
    temperature: tl.float64,
    softcap: tl.float64,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The normalisers of one row; source: [N, V], row stride in vectors of WIDTH logits; grid (N,)."""
    row = tl.program_id(0)
    pointer = row_pointer(source, row, stride, WIDTH)
    scale = LOG2_E / tl.full((), temperature, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    maximum = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        logits, _ = load_logits(pointer, start + columns, columns >= 0, cap, HAS_CAP, False, "", COMPUTE)
        maximum, shift, exponents = advance_maximum(maximum, logits, scale)
        total = total * tl.exp2(shift) + lane_sum(tl.exp2(exponents))
    rest_columns = tile_columns(1, LANES, WIDTH)
    for start in range(whole, vocab_size, LANES * WIDTH):
        valid = start + rest_columns < vocab_size
        logits, _ = load_logits(pointer, start + rest_columns, valid, cap, HAS_CAP, True, "", COMPUTE)
        maximum, shift, exponents = advance_maximum(maximum, logits, scale)
        total = total * tl.exp2(shift) + lane_sum(powers_of_two(exponents, valid, True))
    largest, shift = merge_maximum(maximum, scale)
    tl.store(normalisers + row.to(tl.int64) * 2, largest)
    tl.store(normalisers + row.to(tl.int64) * 2 + 1, tl.sum(total * tl.exp2(shift), axis=0))


@triton.jit
def load_normalisers(normalisers, rows):
    """(largest logits, factors of the exponentials) of some rows, [rows, 1]."""
    row = rows.to(tl.int64) * 2
    return tl.load(normalisers + row)[:, None], 1.0 / tl.load(normalisers + row + 1)[:, None]


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "students", "teachers", "vocab_size", "split_size"])
def pairwise_l1_forward_kernel(
    student,
    teacher,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    students,
    teachers,
    vocab_size,
    split_size,
    student_normalisers,
    teacher_normalisers,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    distance,
    signed_mass,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    TEACHER_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """A block of pairs of one problem over one part of the vocabulary; grid (B * blocks of pairs, parts).

    students, teachers: rows per problem; parts are `split_size` long. distance [parts, B, students, teachers]: the sums of
    this part; signed_mass: the sums of x sign(x - y), or None.
    """
    teacher_blocks = tl.cdiv(teachers, TEACHER_BLOCK)
    blocks = tl.cdiv(students, STUDENT_BLOCK) * teacher_blocks
    problem = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i = block // teacher_blocks * STUDENT_BLOCK + tl.arange(0, STUDENT_BLOCK)
    j = block % teacher_blocks * TEACHER_BLOCK + tl.arange(0, TEACHER_BLOCK)
    # Rows past the end stand for the last one; they are not stored.
    student_rows = problem.to(tl.int64) * students + tl.minimum(i, students - 1)
    teacher_rows = problem.to(tl.int64) * teachers + tl.minimum(j, teachers - 1)
    student_scale = LOG2_E / tl.full((), student_temperature, COMPUTE)
    teacher_scale = LOG2_E / tl.full((), teacher_temperature, COMPUTE)
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    largest_s, factors_s = load_normalisers(student_normalisers, student_rows)
    largest_t, factors_t = load_normalisers(teacher_normalisers, teacher_rows)
    student_pointers = student + student_rows[:, None] * student_stride
    teacher_pointers = teacher + teacher_rows[:, None] * teacher_stride
    start = tl.program_id(1) * split_size
    end = tl.minimum(start + split_size, vocab_size)

    total = tl.zeros((STUDENT_BLOCK, TEACHER_BLOCK, LANES), COMPUTE)
    signed_total = tl.zeros((STUDENT_BLOCK, TEACHER_BLOCK, LANES), COMPUTE)
    for first in range(start, end, LANES):
        columns = first + tl.arange(0, LANES)
        valid = (columns < end)[None, :]
        x, _, _ = load_probabilities(
            student_pointers, columns[None, :], valid, largest_s, factors_s, student_scale, student_cap,
            HAS_STUDENT_CAP, COMPUTE,
        )  # fmt: skip
        y, _, _ = load_probabilities(
            teacher_pointers, columns[None, :], valid, largest_t, factors_t, teacher_scale, teacher_cap,
            HAS_TEACHER_CAP, COMPUTE,
        )  # fmt: skip
        x = x[:, None, :]
        difference = x - y[None, :, :]
        total += tl.abs(difference)
        if signed_mass is not None:
            signed_total += tl.where(difference > 0, x, tl.where(difference < 0, -x, 0.0))
    part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + problem
    offsets = (part * students + i[:, None]) * teachers + j[None, :]
    inside = (i < students)[:, None] & (j < teachers)[None, :]
    tl.store(distance + offsets, tl.sum(total, axis=2), mask=inside)
    if signed_mass is not None:
        tl.store(signed_mass + offsets, tl.sum(signed_total, axis=2), mask=inside)


@triton.jit(
    do_not_specialize=[
        "own_stride",
        "other_stride",
        "gradient_stride",
        "own_rows",
        "other_rows",
        "vocab_size",
        "grad_own_stride",
        "grad_other_stride",
    ]
)
def pairwise_l1_backward_kernel(
    own,
    other,
    gradient,
    own_stride: tl.int64,
    other_stride: tl.int64,
    gradient_stride: tl.int64,
    own_rows,
    other_rows,
    vocab_size,
    own_normalisers,
    other_normalisers,
    own_temperature: tl.float64,
    other_temperature: tl.float64,
    own_softcap: tl.float64,
    other_softcap: tl.float64,
    grad,
    grad_own_stride: tl.int64,
    grad_other_stride: tl.int64,
    centres,
    HAS_OWN_CAP: tl.constexpr,
    HAS_OTHER_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient to some logits of the side `own`, which it may be written over; grid (B * blocks of rows, blocks of columns).

    own, gradient: [B own_rows, V]; other: [B other_rows, V]. grad: [B, ...] of the pairs, strides of either side's rows in
    a problem; centres: [B own_rows].
    """
    blocks = tl.cdiv(own_rows, OWN_BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * OWN_BLOCK + tl.arange(0, OWN_BLOCK)
    rows = problem * own_rows + tl.minimum(i, own_rows - 1)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own_scale = LOG2_E / tl.full((), own_temperature, COMPUTE)
    other_scale = LOG2_E / tl.full((), other_temperature, COMPUTE)
    own_cap = tl.full((), own_softcap, COMPUTE)
    other_cap = tl.full((), other_softcap, COMPUTE)
    largest, factors = load_normalisers(own_normalisers, rows)
    valid = (columns < vocab_size)[None, :]
    x, logits, tanh = load_probabilities(
        own + rows[:, None] * own_stride, columns[None, :], valid, largest, factors, own_scale, own_cap,
        HAS_OWN_CAP, COMPUTE,
    )  # fmt: skip
    grad += problem * own_rows * other_rows
    # [other, own, columns]: the sum over the other rows is each thread's own.
    h = tl.zeros((OWN_BLOCK, COLUMNS), COMPUTE)
    for first in range(0, other_rows, OTHER_BLOCK):
        j = first + tl.arange(0, OTHER_BLOCK)
        pair_grads = tl.load(
            grad + j[:, None] * grad_other_stride + i[None, :] * grad_own_stride,
            mask=(j < other_rows)[:, None] & (i < own_rows)[None, :],
            other=0.0,
        )[:, :, None]
        others = problem * other_rows + tl.minimum(j, other_rows - 1)
        other_largest, other_factors = load_normalisers(other_normalisers, others)
        y, _, _ = load_probabilities(
            other + others[:, None] * other_stride, columns[None, :], valid, other_largest, other_factors, other_scale,
            other_cap, HAS_OTHER_CAP, COMPUTE,
        )  # fmt: skip
        difference = x[None, :, :] - y[:, None, :]
        h += tl.sum(tl.where(difference > 0, pair_grads, tl.where(difference < 0, -pair_grads, 0.0)), axis=0)
    centre = tl.load(centres + rows)[:, None]
    made = x * (h - centre) / tl.full((), own_temperature, COMPUTE)
    inside = (i < own_rows)[:, None] & valid
    pointers = gradient + rows[:, None] * gradient_stride + columns[None, :]
    store_gradient(pointers, made, logits, tanh, inside, HAS_OWN_CAP, True)

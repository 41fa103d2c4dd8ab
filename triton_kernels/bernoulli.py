# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Losses of sigmoids: every entry of the vocabulary is a yes-or-no question of its own.

There is no normaliser, so that one sweep over a row makes value and gradient. With u = exp(-|x|) and w = exp(-|y|), of a
student's tempered logit x and a teacher's y, all that is needed is rational in u and w or the logarithm of such a quotient,
without cancellation but where x and y are close. One program handles one row.
"""

import triton
import triton.language as tl

from .divergence import store_gradient, zero_row
from .online_softmax import LN_2, LOG2_E, lane_sum, load_logits, row_pointer, row_scalar, tile_columns

# The numbering is shared with kdkernels/backends/bernoulli.py and csrc/cpu/bernoulli.cpp.
CROSS_ENTROPY = tl.constexpr(0)
KL = tl.constexpr(1)
HALF = tl.constexpr(2)
TARGET_CROSS_ENTROPY = tl.constexpr(3)
TARGET_KL = tl.constexpr(4)


@triton.jit
def log1p(u):
    """log(1 + u) for u from -1/2 to 1, with all digits however small u is."""
    above = 1.0 + u
    # What the sum has lost, by the slope of the logarithm, 1 / (1 + u), which is 1 - u where the loss matters.
    return tl.log2(above) * LN_2 + (u - (above - 1.0)) * (1.0 - u)


@triton.jit
def entry_terms(x, y, FORM: tl.constexpr):
    """(value, gradient to x) of each entry; y is a target in [0, 1] in the TARGET forms."""
    positive = x > 0
    u = tl.exp2(-tl.abs(x) * LOG2_E)
    if FORM == TARGET_CROSS_ENTROPY or FORM == TARGET_KL:
        other = 1.0 - y
        rest = u / (1.0 + u)
        value = tl.where(positive, other, -y) * x + log1p(u)
        if FORM == TARGET_KL:
            small = tl.minimum(y, other)
            value += small * tl.log2(tl.maximum(small, 1e-37)) * LN_2 + (1.0 - small) * log1p(-small)
        gradient = tl.where(positive, other - rest, rest - y)
    elif FORM == HALF:
        d = x - y
        size = tl.abs(d)
        u = tl.exp2(-size * LOG2_E)
        tanh = (1.0 - u) / (1.0 + u)
        # log cosh(d / 2): the second form cancels for small d.
        small = size < 1.75
        series = log1p(tl.where(small, -tanh * tanh, u))
        value = tl.where(small, -0.5 * series, 0.5 * size - LN_2 + series)
        gradient = tl.where(d < 0, -0.5 * tanh, 0.5 * tanh)
    else:
        teacher_positive = y > 0
        w = tl.exp2(-tl.abs(y) * LOG2_E)
        both = 1.0 / ((1.0 + u) * (1.0 + w))
        difference = tl.where(positive == teacher_positive, w - u, 1.0 - u * w) * both
        gradient = tl.where(positive, difference, -difference)
        affirmed = tl.where(teacher_positive, 1.0, w)
        denied = tl.where(teacher_positive, w, 1.0)
        factor = tl.where(positive, denied, -affirmed) * (1.0 + u) * both
        if FORM == CROSS_ENTROPY:
            value = factor * x + log1p(u)
        else:
            crossing = positive.to(x.dtype) - teacher_positive.to(x.dtype)
            value = factor * (x - y) + crossing * y + log1p((u - w) * (1.0 + u) * both)
    return value, gradient


@triton.jit
def accumulate_entries(
    total,
    student_row,
    teacher_row,
    gradient_row,
    columns,
    vocab_size,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    factor,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The lanes' sums over one more tile, whose gradient it writes if there is a row for it."""
    valid = columns < vocab_size
    s, tanh = load_logits(student_row, columns, valid, student_cap, HAS_STUDENT_CAP, MASKED, "evict_first", COMPUTE)
    t, _ = load_logits(teacher_row, columns, valid, teacher_cap, HAS_TEACHER_CAP, MASKED, "evict_first", COMPUTE)
    if MASKED and (FORM == TARGET_CROSS_ENTROPY or FORM == TARGET_KL):
        t = tl.where(valid, t, 0.0)
    value, gradient = entry_terms(s * student_scale, t * teacher_scale, FORM)
    if MASKED:
        value = tl.where(valid, value, 0.0)
    if gradient_row is not None:
        store_gradient(gradient_row + columns, factor * gradient, s, tanh, valid, HAS_STUDENT_CAP, MASKED)
    return total + lane_sum(value)


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "gradient_stride", "vocab_size"])
def bernoulli_kernel(
    student,
    teacher,
    grad_student,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    gradient_stride: tl.int64,
    vocab_size,
    values,
    grad_values,
    active,
    student_temperatures,
    teacher_temperatures,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    FORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its value and, where a buffer is given, the gradient to the student's logits.

    student, teacher: [N, V] logits (or targets), adjacent columns, row strides in vectors of WIDTH logits; grad_student: the
    same, or None; it may be `student` itself. values: [N] in COMPUTE; grad_values: [N], or None (ones). active: bool [N];
    temperatures: [N]; each may be None.

    Whole tiles go without a mask, so that their loads are vectors at any vocabulary size; smaller masked ones follow.
    """
    row = tl.program_id(0)
    gradient_row = grad_student
    if grad_student is not None:
        gradient_row = row_pointer(grad_student, row, gradient_stride, WIDTH)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(values + row, 0.0)
            zero_row(gradient_row, tl.arange(0, LANES), vocab_size, LANES)
            return
    student_scale = 1.0 / row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    teacher_scale = 1.0 / row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    student_row = row_pointer(student, row, student_stride, WIDTH)
    teacher_row = row_pointer(teacher, row, teacher_stride, WIDTH)
    factor = student_scale
    if grad_values is not None:
        factor *= tl.load(grad_values + row).to(COMPUTE)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    total = tl.zeros((LANES,), COMPUTE)
    for start in range(0, whole, TILE):
        total = accumulate_entries(
            total, student_row, teacher_row, gradient_row, start + columns, vocab_size, student_scale, teacher_scale,
            student_cap, teacher_cap, factor, HAS_STUDENT_CAP, HAS_TEACHER_CAP, FORM, False, COMPUTE,
        )  # fmt: skip
    rest_columns = tile_columns(1, LANES, WIDTH)
    for start in range(whole, vocab_size, LANES * WIDTH):
        total = accumulate_entries(
            total, student_row, teacher_row, gradient_row, start + rest_columns, vocab_size, student_scale,
            teacher_scale, student_cap, teacher_cap, factor, HAS_STUDENT_CAP, HAS_TEACHER_CAP, FORM, True, COMPUTE,
        )  # fmt: skip
    tl.store(values + row, tl.sum(total, axis=0))

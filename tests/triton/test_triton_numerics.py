"""The Triton kernels, run in Triton's interpreter, against plain PyTorch in float64.

The rule for every result: per row, its error against the float64 truth is no worse than that of plain PyTorch
computing in the kernels' own precision, give or take a little that is measured against the truth. A gradient that is
zero, has the wrong sign or is off by 2% breaks the rule, and the gradient tests make sure of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

from kdkernels.backends.rows import STATISTICS, RowSpec

pytestmark = pytest.mark.slow

FORWARD_KL, REVERSE_KL, JEFFREYS, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TVD, ALPHA, RENYI, AB = range(10)
KINDS = {
    FORWARD_KL: "forward_kl",
    REVERSE_KL: "reverse_kl",
    JEFFREYS: "jeffreys",
    JSD: "jsd",
    SKEW_FORWARD_KL: "skew_forward_kl",
    SKEW_REVERSE_KL: "skew_reverse_kl",
    TVD: "tvd",
    ALPHA: "alpha",
    RENYI: "renyi",
    AB: "ab",
}
PARAMETERS = {JEFFREYS: (0.3, 0.0), JSD: (0.3, 0.0), SKEW_FORWARD_KL: (0.1, 0.0), SKEW_REVERSE_KL: (0.2, 0.0)}
PARAMETERS |= {ALPHA: (0.3, 1 / (0.3 * 0.7)), RENYI: (0.6, 0.0), AB: (0.4, 0.7)}
UNBOUNDED = [(ALPHA, 1.7, 1 / (1.7 * -0.7)), (ALPHA, -0.4, 1 / (-0.4 * 1.4)), (RENYI, 2.5, 0.0), (ALPHA, 0.5, 1.0)]
FLOOR = -1e5
LEAST = torch.finfo(torch.float32).min
TINY = {torch.float32: 2e-6, torch.float64: 1e-14}

Interpreter = Callable[..., Any]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=KINDS.get)


def compute_dtype(*logits: Tensor) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in logits) else torch.float32


def make_spec(kind: int, **options: Any) -> RowSpec:
    a, b = PARAMETERS.get(kind, (0.0, 0.0))
    return RowSpec(kind, a, b, **options)


def tempered(logits: Tensor, temperature: float, temperatures: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    """(logits as the loss sees them, log-probabilities), differentiable."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(logits < FLOOR, FLOOR, logits)
    tau = temperature if temperatures is None else temperatures.to(logits.dtype)[:, None]
    return logits, torch.log_softmax(logits / tau, -1)


def plain_values(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """(divergence [N], cross-entropy [N] or [0]) by the definitions, in the dtype of the logits."""
    kind, a, b = spec.kind, spec.a, spec.b
    s, lq = tempered(student, spec.student_temperature, spec.student_temperatures, spec.student_softcap)
    _, lp = tempered(teacher, spec.teacher_temperature, spec.teacher_temperatures, spec.teacher_softcap)
    p, q = lp.exp(), lq.exp()

    def kl(weight: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        return (weight * (numerator - denominator)).sum(-1)

    def log_mixture(share: float, first: Tensor, second: Tensor) -> Tensor:
        logs = torch.tensor([share, 1 - share], dtype=torch.float64).log().tolist()
        return torch.logaddexp(first + logs[0], second + logs[1])

    if kind == FORWARD_KL:
        value = kl(p, lp, lq)
    elif kind == REVERSE_KL:
        value = kl(q, lq, lp)
    elif kind == JEFFREYS:
        value = a * kl(p, lp, lq) + (1 - a) * kl(q, lq, lp)
    elif kind == JSD:
        lm = log_mixture(a, lp, lq)
        value = a * kl(p, lp, lm) + (1 - a) * kl(q, lq, lm)
    elif kind == SKEW_FORWARD_KL:
        value = kl(p, lp, log_mixture(a, lp, lq))
    elif kind == SKEW_REVERSE_KL:
        value = kl(q, lq, log_mixture(a, lq, lp))
    elif kind == TVD:
        value = 0.5 * (p - q).abs().sum(-1)
    elif kind == ALPHA:
        value = (b * (a * p + (1 - a) * q - (a * lp + (1 - a) * lq).exp())).sum(-1)
    elif kind == RENYI:
        value = torch.logsumexp(a * lp + (1 - a) * lq, -1) / (a - 1)
    else:
        powers = (a * lp + b * lq).exp() - a / (a + b) * ((a + b) * lp).exp() - b / (a + b) * ((a + b) * lq).exp()
        value = -powers.sum(-1) / (a * b)
    if spec.labels is None:
        return value, value.new_empty(0)
    return value, torch.nn.functional.cross_entropy(s, spec.labels, reduction="none")


def plain(
    student: Tensor, teacher: Tensor, spec: RowSpec, upstream: Tensor, hard_upstream: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """[divergence, cross_entropy, grad_student, grad_teacher] by autograd, computed in `dtype`."""
    s, t = (logits.detach().to(dtype, copy=True).requires_grad_() for logits in (student, teacher))
    value, hard = plain_values(s, t, spec)
    total = (value * upstream.to(dtype)).sum()
    if hard_upstream is not None:
        total = total + (hard * hard_upstream.to(dtype)).sum()
    return [value.detach(), hard.detach(), *torch.autograd.grad(total, [s, t])]


def no_worse(ours: Tensor, torchs: Tensor, truth: Tensor, compute: torch.dtype, scale: Tensor) -> bool:
    """The rule, row by row; `scale` [N] is the size of the numbers a row's result is the difference of."""
    rows = truth.shape[0]
    ours, torchs, truth = (each.double().reshape(rows, -1) for each in (ours, torchs, truth))
    allowance = TINY[compute] * truth.norm(dim=-1) + 8 * torch.finfo(compute).eps * scale
    return bool(((ours - truth).norm(dim=-1) <= 2 * (torchs - truth).norm(dim=-1) + allowance).all())


def check(
    interpreter: Interpreter,
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    informative: bool = True,
    padding: int = 0,
) -> None:
    """Values and gradients by the rule. `informative`: every row has gradients well away from zero."""
    rows, vocab_size = student.shape
    compute = compute_dtype(student, teacher)
    upstream = torch.linspace(-1.5, 2.0, rows, dtype=compute)
    hard_upstream = None if spec.labels is None else torch.linspace(0.5, 2.5, rows, dtype=compute)
    ours = interpreter(
        interpreted.divergence, student, teacher, spec, upstream, hard_upstream, (True, True), False, padding
    )
    truth = plain(student, teacher, spec, upstream, hard_upstream, torch.float64)
    torchs = plain(student, teacher, spec, upstream, hard_upstream, compute)
    assert ours[0].dtype == compute
    size = truth[0].abs() + 1
    assert no_worse(ours[0], torchs[0], truth[0], compute, size), f"divergence {ours[0]}, truth {truth[0]}"
    if spec.labels is not None:
        assert no_worse(ours[1], torchs[1], truth[1], compute, truth[1].abs() + 1), f"{ours[1]}, truth {truth[1]}"
    hard_size = 0 if hard_upstream is None else hard_upstream.abs()
    for side, logits in ((2, student), (3, teacher)):
        gradient, outside = ours[side][:, :vocab_size], ours[side][:, vocab_size:]
        assert gradient.dtype == logits.dtype
        assert outside.shape[1] == padding
        assert bool((outside == interpreted.UNTOUCHED).all())
        rounded = torchs[side].to(logits.dtype)
        size = upstream.abs() * truth[0].abs().clamp(1) + hard_size

        def right(candidate: Tensor, theirs: Tensor = rounded, true: Tensor = truth[side], size: Tensor = size) -> bool:
            return no_worse(candidate, theirs, true, compute, size)

        assert right(gradient), f"gradient {gradient}, truth {truth[side]}"
        if informative:
            assert not right(torch.zeros_like(gradient))
            assert not right(-gradient)
            assert not right(gradient * 1.02)


def random_pair(rows: int, vocab_size: int, dtype: torch.dtype, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Student and teacher logits that resemble each other, in rows that are `stride` apart."""
    generator = torch.Generator().manual_seed(rows * 1000 + vocab_size)
    student = 3 * torch.randn(rows, stride or vocab_size, generator=generator, dtype=torch.float64)
    teacher = student + torch.randn(student.shape, generator=generator, dtype=torch.float64)
    return student.to(dtype)[:, :vocab_size], teacher.to(dtype)[:, :vocab_size]


@each_kind
@pytest.mark.parametrize(
    ("dtype", "stride"),
    # rows that start on 16-byte boundaries, and rows that do not
    [(torch.float32, 304), (torch.bfloat16, 300), (torch.float16, 320), (torch.float64, 301)],
    ids=["fp32", "bf16", "fp16", "fp64"],
)
def test_dtypes_temperatures_per_row_and_labels(
    kind: int, dtype: torch.dtype, stride: int, interpreter: Interpreter
) -> None:
    student, teacher = random_pair(3, 300, dtype, stride)
    spec = make_spec(
        kind,
        student_temperatures=torch.tensor([1.0, 0.7, 2.1], dtype=compute_dtype(student)),
        teacher_temperatures=torch.tensor([1.3, 1.0, 0.6], dtype=compute_dtype(student)),
        labels=torch.tensor([0, 299, 17]),
    )
    check(interpreter, student, teacher, spec, padding=stride - 300)


@each_kind
@pytest.mark.parametrize("vocab_size", [1, 2, 127, 4097])
def test_vocabulary_sizes(kind: int, vocab_size: int, interpreter: Interpreter) -> None:
    student, teacher = random_pair(2, vocab_size, torch.float32, 4100 if vocab_size == 4097 else None)
    spec = make_spec(kind, student_temperature=1.4, teacher_temperature=0.9)
    check(interpreter, student, teacher, spec, informative=vocab_size > 1)


@pytest.mark.parametrize(("kind", "a", "b"), UNBOUNDED, ids=lambda value: str(round(value, 2)))
def test_orders_outside_the_unit_interval(kind: int, a: float, b: float, interpreter: Interpreter) -> None:
    check(interpreter, *random_pair(3, 127, torch.float32), RowSpec(kind, a, b))


@pytest.mark.parametrize("kind", [FORWARD_KL, JSD], ids=KINDS.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_softcaps(kind: int, dtype: torch.dtype, interpreter: Interpreter) -> None:
    student, teacher = (4 * logits for logits in random_pair(3, 300, dtype))
    student[0] *= 1e-3
    student[1] *= 0.25  # the cap's tanh is a series for small arguments
    labels = torch.tensor([3, 250, 8])
    spec = make_spec(kind, student_softcap=15.0, teacher_softcap=8.0, student_temperature=1.5, labels=labels)
    check(interpreter, student, teacher, spec)


def test_sides_of_different_dtypes(interpreter: Interpreter) -> None:
    student, _ = random_pair(2, 256, torch.float32)
    _, teacher = random_pair(2, 256, torch.bfloat16)
    check(interpreter, student, teacher, make_spec(SKEW_REVERSE_KL))
    check(interpreter, student, teacher.double(), make_spec(SKEW_REVERSE_KL))


def hard_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of 130 logits on which naive code fails."""
    (base, other), columns = random_pair(1, 130, torch.float32), torch.arange(130)
    infinite = float("-inf")
    return {
        "large": (1e4 * base.sign() + base, 1e4 * base.sign() + other),
        "large and disjoint": (1e4 * base, -1e4 * base),
        "student masked": (base.masked_fill(columns < 70, infinite), other),
        "teacher masked": (base, other.masked_fill(columns < 70, infinite)),
        "masked differently": (base.masked_fill(columns < 70, infinite), other.masked_fill(columns > 60, infinite)),
        "masked alike by finfo.min": (
            base.masked_fill(columns % 3 == 0, LEAST),
            other.masked_fill(columns % 3 == 0, LEAST),
        ),
        "constant": (torch.full_like(base, 2.5), other),
        "both constant": (torch.full_like(base, -1e4), torch.full_like(base, 1e4)),
        "all masked": (torch.full_like(base, infinite), other),
        "underflowing under both": (1e4 * (columns == 3) + base, 1e4 * (columns == 5) + other),
    }


@each_kind
def test_hard_inputs(kind: int, interpreter: Interpreter) -> None:
    pairs = hard_pairs()
    student, teacher = (torch.cat(side) for side in zip(*pairs.values(), strict=True))
    upstream = torch.full((len(pairs),), 1.5)
    spec = make_spec(kind)
    ours = interpreter(interpreted.divergence, student, teacher, spec, upstream)
    truth = plain(student, teacher, spec, upstream, None, torch.float64)
    torchs = plain(student, teacher, spec, upstream, None, torch.float32)
    for row, name in enumerate(pairs):
        size = 1.5 * truth[0][row : row + 1].abs().clamp(1)
        for index in (0, 2, 3):
            mine, theirs, true = (results[index][row : row + 1] for results in (ours, torchs, truth))
            assert bool(mine.isfinite().all()), f"{name}: {mine}"
            assert no_worse(mine, theirs, true, torch.float32, size), f"{name}, result {index}: {mine}, truth {true}"
    for index, logits in ((2, student), (3, teacher)):
        assert bool((ours[index][logits < FLOOR] == 0).all()), "a masked logit has a gradient"


@each_kind
def test_inactive_rows_are_zero_whatever_they_hold(kind: int, interpreter: Interpreter) -> None:
    student, teacher = random_pair(3, 127, torch.float32)
    expected = interpreter(
        interpreted.divergence,
        student,
        teacher,
        make_spec(kind, labels=torch.tensor([5, 6, 7])),
        torch.ones(3),
        torch.ones(3),
    )
    student[1], teacher[1] = float("nan"), float("inf")
    spec = make_spec(kind, labels=torch.tensor([5, -100, 7]), active=torch.tensor([True, False, True]))
    nans = torch.tensor([1.0, float("nan"), 1.0])
    ours = interpreter(interpreted.divergence, student, teacher, spec, nans, nans)
    for result, whole in zip(ours, expected, strict=True):
        assert bool((result[1] == 0).all())
        assert torch.equal(result[[0, 2]], whole[[0, 2]])


@each_kind
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_goes_in_nan_comes_out(kind: int, side: int, interpreter: Interpreter) -> None:
    pair = random_pair(1, 127, torch.float32)
    pair[side][0, 100] = float("nan")
    value, _, *gradients = interpreter(interpreted.divergence, *pair, make_spec(kind), torch.ones(1))
    assert bool(value.isnan())
    assert bool(gradients[side].isnan().all())
    assert bool(gradients[1 - side].isnan().any())


@pytest.mark.parametrize("kind", [FORWARD_KL, JSD], ids=KINDS.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_alone_and_in_place_are_the_same(kind: int, dtype: torch.dtype, interpreter: Interpreter) -> None:
    student, teacher = random_pair(2, 1200, dtype)
    spec = make_spec(kind, labels=torch.tensor([4, 1100]))
    arguments = (student, teacher, spec, torch.tensor([0.5, -2.0]), torch.ones(2))
    _, _, to_student, to_teacher = interpreter(interpreted.divergence, *arguments)
    _, _, alone, nothing = interpreter(interpreted.divergence, *arguments, (True, False))
    assert nothing is None
    assert torch.equal(alone, to_student)
    _, _, nothing, alone = interpreter(interpreted.divergence, *arguments, (False, True))
    assert nothing is None
    assert torch.equal(alone, to_teacher)
    copies = (student.clone(), teacher.clone(), *arguments[2:])
    _, _, *written_over = interpreter(interpreted.divergence, *copies, (True, True), True)
    assert torch.equal(written_over[0], to_student)
    assert torch.equal(written_over[1], to_teacher)


def test_a_label_outside_the_vocabulary_shows(interpreter: Interpreter) -> None:
    student, teacher = random_pair(2, 127, torch.float32)
    spec = make_spec(FORWARD_KL, labels=torch.tensor([127, -1]))
    value, hard, *_ = interpreter(interpreted.divergence, student, teacher, spec, torch.ones(2), torch.ones(2))
    assert bool(hard.isnan().all())
    assert bool(value.isfinite().all())


def test_no_rows(interpreter: Interpreter) -> None:
    empty = torch.empty(0, 5)
    value, _, to_student, to_teacher = interpreter(interpreted.divergence, empty, empty, make_spec(JSD), torch.empty(0))
    assert value.shape == (0,)
    assert to_student.shape == to_teacher.shape == (0, 5)
    values, argmax = interpreter(interpreted.token_statistics, empty, None, make_spec(FORWARD_KL))
    assert values.shape == (0, len(STATISTICS))
    assert argmax.shape == (0, 2)


def plain_statistics(student: Tensor, teacher: Tensor, spec: RowSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    s, lq = tempered(student.to(dtype), spec.student_temperature, spec.student_temperatures, spec.student_softcap)
    t, lp = tempered(teacher.to(dtype), spec.teacher_temperature, spec.teacher_temperatures, spec.teacher_softcap)
    p, q = lp.exp(), lq.exp()
    rows = torch.arange(len(s))
    return {
        "lse_student": (s / spec.student_temperature - lq)[:, 0],
        "lse_teacher": (t / spec.teacher_temperature - lp)[:, 0],
        "forward_kl": (p * (lp - lq)).sum(-1),
        "reverse_kl": (q * (lq - lp)).sum(-1),
        "entropy_student": -(q * lq).sum(-1),
        "entropy_teacher": -(p * lp).sum(-1),
        "max_student": s.amax(-1),
        "max_teacher": t.amax(-1),
        "label_log_prob_student": lq[rows, spec.labels],
        "label_log_prob_teacher": lp[rows, spec.labels],
    }


@pytest.mark.parametrize("vocab_size", [1, 127, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_token_statistics(vocab_size: int, dtype: torch.dtype, interpreter: Interpreter) -> None:
    student, teacher = random_pair(3, vocab_size, dtype)
    compute = compute_dtype(student)
    labels = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    cap = 9.0 if vocab_size == 127 else 0.0
    spec = make_spec(FORWARD_KL, labels=labels, student_temperature=0.8, teacher_temperature=1.7, student_softcap=cap)
    values, argmax = interpreter(interpreted.token_statistics, student, teacher, spec)
    truth = plain_statistics(student, teacher, spec, torch.float64)
    torchs = plain_statistics(student, teacher, spec, compute)
    assert values.dtype == compute
    for column, name in enumerate(STATISTICS):
        size = truth["lse_student"].abs() + truth["lse_teacher"].abs() + 1
        assert no_worse(values[:, column], torchs[name], truth[name], compute, size), name
    assert torch.equal(argmax, torch.stack([student.argmax(-1), teacher.argmax(-1)], -1))


def test_token_statistics_on_hard_inputs(interpreter: Interpreter) -> None:
    pairs = hard_pairs()
    student, teacher = (torch.cat(side) for side in zip(*pairs.values(), strict=True))
    spec = make_spec(FORWARD_KL, labels=torch.full((len(pairs),), 100))
    values, argmax = interpreter(interpreted.token_statistics, student, teacher, spec)
    truth = plain_statistics(student, teacher, spec, torch.float64)
    torchs = plain_statistics(student, teacher, spec, torch.float32)
    for row, hard in enumerate(pairs):
        for column, name in enumerate(STATISTICS):
            mine, theirs, true = values[row : row + 1, column], torchs[name][row : row + 1], truth[name][row : row + 1]
            size = true.abs() + truth["lse_student"][row].abs() + truth["lse_teacher"][row].abs() + 1
            assert no_worse(mine, theirs, true, torch.float32, size), f"{hard}, {name}: {mine}, truth {true}"
    masked = [student.clamp(FLOOR), teacher.clamp(FLOOR)]
    assert torch.equal(argmax, torch.stack([side.argmax(-1) for side in masked], -1))


def test_token_statistics_of_ties_inactive_rows_and_missing_sides(interpreter: Interpreter) -> None:
    student, _ = random_pair(3, 3000, torch.float32)
    student[0, [2900, 1500, 1501, 700]] = 50.0
    student[1] = float("nan")
    student[2, 2000] = float("nan")
    spec = make_spec(FORWARD_KL, active=torch.tensor([True, False, True]))
    values, argmax = interpreter(interpreted.token_statistics, student, None, spec)
    present = [name.endswith("student") and not name.startswith("label") for name in STATISTICS]
    assert values[0].isnan().logical_not().tolist() == present
    assert argmax[0].tolist() == [700, 0]
    assert bool((values[1] == 0).all())
    assert argmax[1].tolist() == [0, 0]
    assert bool(values[2].isnan().all())


@pytest.mark.parametrize(
    ("kernel", "kind", "grads", "moved"),
    [
        ("forward", FORWARD_KL, (False, False), {"load student": 1, "load teacher": 1}),
        ("forward", REVERSE_KL, (False, False), {"load student": 1, "load teacher": 1}),
        ("forward", JEFFREYS, (False, False), {"load student": 1, "load teacher": 1}),
        ("forward", RENYI, (False, False), {"load student": 1, "load teacher": 1}),
        *[
            ("forward", kind, (False, False), {"load student": 2, "load teacher": 2})
            for kind in (JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TVD, ALPHA, AB)
        ],
        *[
            ("backward", kind, (True, False), {"load student": 1, "load teacher": 1, "store grad_student": 1})
            for kind in KINDS
        ],
        (
            "backward",
            JSD,
            (True, True),
            {"load student": 1, "load teacher": 1, "store grad_student": 1, "store grad_teacher": 1},
        ),
        ("token_statistics", FORWARD_KL, (False, False), {"load student": 1, "load teacher": 1}),
    ],
    ids=str,
)
def test_elements_moved_per_logit(
    kernel: str, kind: int, grads: tuple[bool, bool], moved: dict[str, int], interpreter: Interpreter
) -> None:
    assert interpreter(interpreted.traffic, kernel, 2, 2500, kind, grads) == moved


def test_the_interpreter_is_offered_for_cpu_tensors(interpreter: Interpreter) -> None:
    (available, how), (supported, reason) = interpreter(interpreted.availability, torch.zeros(1))
    assert available
    assert "interpreter" in how
    assert supported, reason
    _, (supported, reason) = interpreter(interpreted.availability, torch.zeros(1, device="meta"))
    assert not supported
    assert "meta" in reason


def test_backend_and_kernels_agree_on_the_statistics(interpreter: Interpreter) -> None:
    wanted, written = interpreter(interpreted.saved_statistics)
    assert wanted == written

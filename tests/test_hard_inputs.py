"""Inputs on which losses are known to fail: masked vocabulary, underflow, empty batches, NaN where nobody looks, views."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import check
from torch import Tensor
from truth import (
    EVERY_DIVERGENCE,
    OTHER_PARAMETERS,
    Case,
    Head,
    alpha_divergence,
    compute_dtype,
    each,
    each_divergence,
    evaluate,
    leaf,
    random_logits,
)

import kdkernels as kd

VOCAB = 130
INFINITY = math.inf
Pair = tuple[Tensor, Tensor]


def columns(*ranges: range) -> Tensor:
    """A mask ``[V]``, True in the ranges."""
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    for each_range in ranges:
        mask[list(each_range)] = True
    return mask


FIRST, LAST, THIRDS = columns(range(70)), columns(range(60, VOCAB)), columns(range(0, VOCAB, 3))


def lowest(logits: Tensor) -> float:
    return torch.finfo(logits.dtype).min


# From ordinary logits to hard ones, where plain PyTorch still says what is right.
HARD: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "both masked alike by -inf": lambda s, t: (s.masked_fill(THIRDS, -INFINITY), t.masked_fill(THIRDS, -INFINITY)),
    "both masked alike by finfo.min": lambda s, t: (s.masked_fill(THIRDS, lowest(s)), t.masked_fill(THIRDS, lowest(t))),
    "student masked by -inf, teacher by finfo.min": lambda s, t: (
        s.masked_fill(FIRST, -INFINITY),
        t.masked_fill(FIRST, lowest(t)),
    ),
    "student masked": lambda s, t: (s.masked_fill(FIRST, -INFINITY), t),
    "teacher masked": lambda s, t: (s, t.masked_fill(FIRST, -INFINITY)),
    "masked apart": lambda s, t: (s.masked_fill(FIRST, -INFINITY), t.masked_fill(LAST, -INFINITY)),
    "no common support": lambda s, t: (s.masked_fill(FIRST, -INFINITY), t.masked_fill(~FIRST, -INFINITY)),
    "student all -inf": lambda s, t: (torch.full_like(s, -INFINITY), t),
    "teacher all -inf": lambda s, t: (s, torch.full_like(t, -INFINITY)),
    "both all -inf": lambda s, t: (torch.full_like(s, -INFINITY), torch.full_like(t, -INFINITY)),
    "one entry left": lambda s, t: (s.masked_fill(~columns(range(1)), -INFINITY),) * 2,
    "+-1e4": lambda s, t: (1e4 * s.sign() + s, 1e4 * s.sign() + t),
    "+-1e4, opposed": lambda s, t: (1e4 * s.sign(), -1e4 * s.sign()),
    "student constant": lambda s, t: (torch.full_like(s, 7), t),
    "teacher constant": lambda s, t: (s, torch.full_like(t, -1e4)),
    "both constant": lambda s, t: (torch.full_like(s, 1e4), torch.full_like(t, -1e4)),
    "underflow under both": lambda s, t: (s + 900 * columns(range(3, 4)), t + 900 * columns(range(5, 6))),
    "one-hot": lambda s, t: (5e3 * columns(range(3, 4)).to(s.dtype).expand_as(s),) * 2,
}


def hard_rows(dtype: torch.dtype) -> Pair:
    """Every hard pair as one row of ``[N, V]``."""
    student, teacher = (logits[:1] for logits in random_logits(VOCAB, dtype))
    rows = [make(student, teacher) for make in HARD.values()]
    return torch.cat([row[0] for row in rows]).to(dtype), torch.cat([row[1] for row in rows]).to(dtype)


def value_and_gradients(case: Case, student: Tensor, teacher: Tensor, **options: object) -> list[Tensor]:
    s, t = leaf(student), leaf(teacher)
    value = kd.distillation_loss(s, t, case.divergence, reduction="none", **options)  # type: ignore[arg-type]
    value.sum().backward()
    assert s.grad is not None
    assert t.grad is not None
    return [value.detach(), s.grad, t.grad]


NAMES = ("value", "student's gradient", "teacher's gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@each(EVERY_DIVERGENCE, slow=OTHER_PARAMETERS)
def test_finite_and_right(case: Case, dtype: torch.dtype) -> None:
    student, teacher = hard_rows(dtype)
    ours = value_and_gradients(case, student, teacher)
    for row, hard in enumerate(HARD):
        for name, result in zip(NAMES, ours, strict=True):
            assert bool(result[row].isfinite().all()), f"{hard}: {name} is {result[row]}"
    for logits, gradient in ((student, ours[1]), (teacher, ours[2])):
        assert bool((gradient[logits < -1e5] == 0).all()), "a masked entry has a gradient"
    upstream = torch.ones(len(HARD), dtype=compute_dtype(dtype))
    truth = evaluate(case, student, teacher, upstream, torch.float64)
    plain = evaluate(case, student, teacher, upstream, upstream.dtype)
    for row, hard in enumerate(HARD):
        one = slice(row, row + 1)
        # Where a power overflows, the library saturates and the formula does not.
        if not all(bool(result[one].isfinite().all()) for result in (*plain, *truth)) or truth.value[row].abs() > 1e20:
            assert case.factor != 1, f"{hard}: plain PyTorch is at its end"
            continue
        sizes = (truth.value_size, truth.gradient_size, truth.gradient_size)
        for name, mine, near, exact, size in zip(NAMES, ours, plain[:3], truth[:3], sizes, strict=True):
            check(f"{hard}: {name}", mine[one], near[one], exact[one], size[one])


@each_divergence
def test_finite_in_fp16(case: Case) -> None:
    """Its range ends at 65504, which the gradients of alpha outside [0, 1] may leave."""
    student, teacher = hard_rows(torch.float16)
    for name, result in zip(NAMES, value_and_gradients(case, student, teacher), strict=True):
        bad = [hard for hard, row in zip(HARD, result, strict=True) if not bool(row.isfinite().all())]
        assert not bad, f"{name}: {bad}"


@each_divergence
@pytest.mark.parametrize("fill", [-INFINITY, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
def test_masked_vocabulary_is_vocabulary_left_out(case: Case, fill: float) -> None:
    student, teacher = random_logits(VOCAB)
    ours = value_and_gradients(case, student.masked_fill(THIRDS, fill), teacher.masked_fill(THIRDS, fill))
    without = value_and_gradients(case, student[:, ~THIRDS], teacher[:, ~THIRDS])
    for mine, other in zip([ours[0], *(gradient[:, ~THIRDS] for gradient in ours[1:])], without, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6 * case.factor)


@each([alpha_divergence(alpha) for alpha in (1.2, 5.0, -5.0)])
def test_alpha_outside_the_unit_interval_saturates(case: Case) -> None:
    """Even where a single ratio of probabilities is beyond every floating-point range."""
    for result in value_and_gradients(case, *hard_rows(torch.float32)):
        assert bool(result.isfinite().all())


def test_subnormal_numbers_survive_outside_the_kernels() -> None:
    """The kernels flush them to 0, and the threads they ran on go on as before."""
    logits = torch.randn(64, 1031) * 30
    kd.distillation_loss(logits, logits.roll(1, 0), reduction="none")
    smallest = torch.full((100_000,), 1e-40)
    assert torch.all(smallest * 0.5 > 0)


@pytest.mark.parametrize(
    ("temperature", "teacher_temperature"),
    [(1e-3, 1e-3), (1e4, 1e4), (1e-3, 1e4), (1e4, 1e-3), (100.0, 1.0)],
    ids=lambda value: f"{value:g}",
)
@each(EVERY_DIVERGENCE, slow=OTHER_PARAMETERS)
def test_extreme_temperatures(case: Case, temperature: float, teacher_temperature: float) -> None:
    student, teacher = hard_rows(torch.float32)
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    ours = value_and_gradients(case, student, teacher, **options)
    for name, result in zip(NAMES, ours, strict=True):
        bad = [hard for hard, row in zip(HARD, result, strict=True) if not bool(row.isfinite().all())]
        assert not bad, f"{name}: {bad}"
    # Ordinary logits too, and these must be right.
    student, teacher = random_logits(VOCAB, rows=3)
    upstream = torch.ones(3)
    truth = evaluate(case, student, teacher, upstream, torch.float64, **options)
    plain = evaluate(case, student, teacher, upstream, torch.float32, **options)
    if not all(bool(result.isfinite().all()) for result in plain) or bool((truth.value > 1e20).any()):
        return
    ours = value_and_gradients(case, student, teacher, **options)
    scales = (1.0, 1 / temperature, 1 / teacher_temperature)
    sizes = (truth.value_size, truth.gradient_size, truth.gradient_size)
    for name, mine, near, exact, size, scale in zip(NAMES, ours, plain[:3], truth[:3], sizes, scales, strict=True):
        if case.name == "tvd" and name != "value" and min(temperature, teacher_temperature) == 1e4:
            continue  # p and q agree to a few roundings, on which the sign of p - q depends
        # Exponents in the thousands: their rounding is a relative error of the result.
        check(name, mine, near, exact, size * max(1.0, scale), slack=1e-3 if min(options.values()) < 1 else None)


def sources_with(student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor | Head, Tensor | Head]]:
    """The logits on either side, or as the product of a head with an identity weight."""

    def head(logits: Tensor) -> Head:
        return Head(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))

    return {
        "logits": (student, teacher),
        "heads": (head(student), head(teacher)),
        "student_head": (head(student), teacher),
        "teacher_head": (student, head(teacher)),
    }


PAIRINGS = ("logits", "heads", "student_head", "teacher_head")
BACKENDS = ("cpu", "reference")
each_pairing = pytest.mark.parametrize("pairing", PAIRINGS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def leaves_of(side: Tensor | Head) -> tuple[kd.LMHead | Tensor, list[Tensor]]:
    """A source whose tensors require grad, and these tensors."""
    if isinstance(side, Head):
        side = side.with_leaves()
        return side.source(), [*side.tensors().values()]
    side = leaf(side)
    return side, [side]


def run_pair(pair: tuple[Tensor | Head, Tensor | Head], case: Case, **options: object) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients to every tensor of both sides."""
    (student, student_leaves), (teacher, teacher_leaves) = (leaves_of(side) for side in pair)
    value = kd.distillation_loss(student, teacher, case.divergence, **options)  # type: ignore[arg-type]
    value.sum().backward()
    gradients = [each.grad for each in student_leaves + teacher_leaves]
    assert all(each is not None for each in gradients)
    return value.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_backend
@each_pairing
def test_all_tokens_masked(pairing: str, backend: str, reduction: str) -> None:
    """Loss 0, gradient 0: no 0/0, whatever the logits hold."""
    student, teacher = random_logits(33)
    student[1], teacher[2] = math.nan, INFINITY
    for case in EVERY_DIVERGENCE:
        value, gradients = run_pair(
            sources_with(student, teacher)[pairing],
            case,
            mask=torch.zeros(6, dtype=torch.bool),
            reduction=reduction,
            backend=backend,
        )
        assert bool((value == 0).all()), f"{case.name}: {value}"
        assert all(bool((gradient == 0).all()) for gradient in gradients), case.name


@pytest.mark.parametrize("dropped_by", ["mask", "ignore_index"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_backend
@each_pairing
def test_nan_in_masked_rows_does_not_leak(pairing: str, backend: str, reduction: str, dropped_by: str) -> None:
    student, teacher = random_logits(33)
    kept = torch.tensor([True, False, True, True, False, True])
    labels = torch.arange(6).masked_fill(~kept, -100)
    options = {"labels": labels, "ce_weight": 0.5} if dropped_by == "ignore_index" else {"mask": kept}
    options |= {"reduction": reduction, "backend": backend}
    for case in (EVERY_DIVERGENCE[0], EVERY_DIVERGENCE[3]):
        clean_value, clean_gradients = run_pair(sources_with(student, teacher)[pairing], case, **options)
        for bad in (math.nan, INFINITY):
            dirty = [side.clone() for side in (student, teacher)]
            dirty[0][1] = bad
            dirty[1][4, 7] = bad
            value, gradients = run_pair(sources_with(*dirty)[pairing], case, **options)
            assert torch.equal(value, clean_value), f"{case.name}: {value}"
            for found, expected in zip(gradients, clean_gradients, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=f"{case.name}, {bad}")


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@each(EVERY_DIVERGENCE, slow=OTHER_PARAMETERS)
def test_nan_in_a_counted_row_shows(case: Case, side: int) -> None:
    for vocab, column in ((33, 0), (33, 32), (2100, 1500)):
        pair = random_logits(vocab)
        pair[side][2, column] = math.nan
        value, *gradients = value_and_gradients(case, *pair)
        assert value.isnan().tolist() == [False, False, True, False, False, False]
        assert bool(gradients[side][2].isnan().all())
        assert bool(gradients[1 - side][2].isnan().any())
        rest = [0, 1, 3, 4, 5]
        assert all(bool(gradient[rest].isfinite().all()) for gradient in gradients), "it reaches other rows"
        mean = kd.distillation_loss(*pair, case.divergence)
        assert bool(mean.isnan())


@each_backend
@each_pairing
@each_divergence
def test_empty_batch(case: Case, pairing: str, backend: str) -> None:
    empty = torch.empty(0, 5)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        value, gradients = run_pair(sources_with(empty, empty)[pairing], case, reduction=reduction, backend=backend)
        assert value.shape == shape
        assert bool((value == 0).all())
        assert all(bool((gradient == 0).all()) for gradient in gradients)


@each_backend
@each_pairing
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3, 2), (2, 0, 3)], ids=str)
def test_batch_shapes(shape: tuple[int, ...], pairing: str, backend: str) -> None:
    count = math.prod(shape)
    student, teacher = random_logits(33, rows=max(count, 1))
    batch = [logits[:count].reshape(*shape, 33) for logits in (student, teacher)]
    temperature = torch.linspace(0.5, 2.0, count).reshape(shape)
    weight = torch.linspace(1.0, 3.0, count).reshape(shape)
    options = {"reduction": "none", "backend": backend}
    value, gradients = run_pair(
        sources_with(*batch)[pairing], EVERY_DIVERGENCE[3], temperature=temperature, weight=weight, **options
    )
    flat = [logits[:count] for logits in (student, teacher)]
    flat_options = {"temperature": temperature.reshape(-1), "weight": weight.reshape(-1), **options}
    expected, flat_gradients = run_pair(sources_with(*flat)[pairing], EVERY_DIVERGENCE[3], **flat_options)
    assert value.shape == shape
    torch.testing.assert_close(value.reshape(-1), expected, rtol=1e-6, atol=1e-7)
    for found, other in zip(gradients, flat_gradients, strict=True):
        torch.testing.assert_close(found.reshape(other.shape), other, rtol=1e-5, atol=1e-7)


def transposed(logits: Tensor) -> Tensor:
    return logits.t().contiguous().t()


def spaced_rows(logits: Tensor) -> Tensor:
    return torch.stack([logits, logits + 9], 1)[:, 0]


def spaced_columns(logits: Tensor) -> Tensor:
    return torch.stack([logits, logits + 9], -1)[..., 0]


def shifted(logits: Tensor) -> Tensor:
    """Rows that start at no address divisible by 16."""
    return torch.nn.functional.pad(logits, (1, 2), value=50.0)[:, 1:-2]


def batch_transposed(logits: Tensor) -> Tensor:
    """``[2, 3, V]`` whose rows do not follow one another."""
    return logits.reshape(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)


VIEWS = [transposed, spaced_rows, spaced_columns, shifted, batch_transposed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@each([EVERY_DIVERGENCE[0], EVERY_DIVERGENCE[3]])
def test_views(case: Case, reduction: str, view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """A view gives what its copy gives, and nothing beside it is read or written."""
    student, teacher = random_logits(1030, dtype)
    leaves = leaf(student), leaf(teacher)
    copies = leaf(student), leaf(teacher)
    viewed = [view(each) for each in leaves]
    assert view is batch_transposed or not viewed[0].is_contiguous()
    before = [each.detach().clone() for each in viewed]
    value = kd.distillation_loss(*viewed, case.divergence, reduction=reduction)
    value.sum().backward()
    expected = kd.distillation_loss(*copies, case.divergence, reduction=reduction)
    expected.sum().backward()
    assert torch.equal(value.reshape(expected.shape), expected)
    for found, other in zip(leaves, copies, strict=True):
        assert found.grad is not None
        assert other.grad is not None
        assert torch.equal(found.grad, other.grad)
    assert all(torch.equal(now, then) for now, then in zip(viewed, before, strict=True)), "an input was modified"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@each_divergence
def test_vocab_size_leaves_the_padding_alone(case: Case, reduction: str) -> None:
    """Padded heads: what stands in the padding, even NaN, has no influence and gets gradient 0."""
    student, teacher = random_logits(300)
    padded_student = torch.nn.functional.pad(student, (0, 20), value=math.nan)
    padded_teacher = torch.nn.functional.pad(teacher, (0, 5), value=60.0)
    results = []
    for s, t, vocab_size in ((student, teacher, None), (padded_student, padded_teacher, 300)):
        leaves = leaf(s), leaf(t)
        value = kd.distillation_loss(*leaves, case.divergence, reduction=reduction, vocab_size=vocab_size)
        value.sum().backward()
        results.append((value.detach(), leaves[0].grad, leaves[1].grad))
    (value, *gradients), (padded_value, *padded_gradients) = results
    assert torch.equal(value, padded_value)
    for found, expected in zip(padded_gradients, gradients, strict=True):
        assert found is not None
        assert torch.equal(found[:, :300], expected)
        assert bool((found[:, 300:] == 0).all())


@each_divergence
def test_a_teacher_expanded_over_the_batch(case: Case) -> None:
    """Stride 0 between the rows: its gradient is the sum over them."""
    student, teacher = random_logits(100, torch.float64)
    one = leaf(teacher[:1])
    kd.distillation_loss(student, one.expand(6, -1), case.divergence, reduction="sum").backward()
    rows = leaf(teacher[:1].repeat(6, 1))
    kd.distillation_loss(student, rows, case.divergence, reduction="sum").backward()
    assert one.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(one.grad, rows.grad.sum(0, keepdim=True), rtol=1e-12, atol=1e-14)


def test_temperatures_broadcast() -> None:
    """A 0-d tensor serves every token, one per token each its own; the teacher's follow the student's unless given."""
    student, teacher = (each.reshape(2, 3, 40) for each in random_logits(40, torch.float64))
    number = kd.distillation_loss(student, teacher, temperature=2.5, reduction="none")
    for same in (torch.tensor(2.5), torch.full((2, 3), 2.5), torch.full((2, 1), 2.5).expand(2, 3)):
        found = kd.distillation_loss(student, teacher, temperature=same, reduction="none")
        torch.testing.assert_close(found, number, rtol=1e-13, atol=0)
        found = kd.distillation_loss(student, teacher, temperature=2.5, teacher_temperature=same, reduction="none")
        torch.testing.assert_close(found, number, rtol=1e-13, atol=0)
    rows = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
    found = kd.distillation_loss(student, teacher, temperature=rows, teacher_temperature=0.7, reduction="none")
    for i in range(2):
        for j in range(3):
            alone = kd.distillation_loss(
                student[i, j], teacher[i, j], temperature=rows[i, j].item(), teacher_temperature=0.7
            )
            assert found[i, j].item() == pytest.approx(alone.item(), rel=1e-12)

"""``sorted_l1`` against sorting in float64.

The sign of ``q_(r) - p_(r)`` is not determined where both are equal within rounding: there, and only there, a gradient may
have another one (``Truth.doubt``). The order within a row is that of its logits, which no rounding can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accuracy import LENIENCE, SLACK, check
from test_operators import check_compiled, compiled, graphs, recorded
from torch import Tensor
from torch.nn import functional as F
from truth import LOGIT_FLOOR, compute_dtype, each_dtype, leaf

import kdkernels as kd
from kdkernels.backends import native

pytestmark = pytest.mark.skipif(native.module is None, reason=f"the native extension is not there: {native.reason}")

DOUBT = {torch.float32: 8, torch.float64: 256}
"""Within how many roundings q_(r) and p_(r) count as equal."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Truth(NamedTuple):
    """In float64: values ``[N]``, and of student and teacher ``[N, V]`` what their gradients are made of."""

    value: Tensor
    probabilities: tuple[Tensor, Tensor]
    signs: tuple[Tensor, Tensor]
    doubt: tuple[Tensor, Tensor]

    def gradients(self, upstream: Tensor, temperatures: tuple[float, float]) -> list[Tensor]:
        return [
            upstream.unsqueeze(-1) / temperature * q * (signs - (q * signs).sum(-1, keepdim=True))
            for q, signs, temperature in zip(self.probabilities, self.signs, temperatures, strict=True)
        ]


def truth(
    student: Tensor,
    teacher: Tensor,
    temperatures: tuple[float, float] = (1.0, 1.0),
    precision: torch.dtype = torch.float32,
) -> Truth:
    """By sorting, of logits ``[N, V]``; ``precision`` is that of the computation whose doubts are asked for."""
    sides = []
    for logits, temperature in zip((student, teacher), temperatures, strict=True):
        exact = logits.double().clamp(min=LOGIT_FLOOR) + 0.0
        order = torch.sort(exact, dim=-1, descending=True, stable=True).indices
        probabilities = torch.softmax((exact - exact.amax(-1, keepdim=True)) / temperature, -1)
        sides.append((probabilities, order))
    (q, ranked), (p, teacher_ranked) = sides
    longer = max(q.shape[-1], p.shape[-1])
    sorted_q, sorted_p = (F.pad(x.gather(-1, order), (0, longer - x.shape[-1])) for x, order in sides)
    difference = sorted_q - sorted_p
    larger = torch.maximum(sorted_q, sorted_p)
    info = torch.finfo(precision)
    doubt = (difference.abs() <= DOUBT[precision] * info.eps * larger) | (larger < 2 * info.tiny)

    def by_id(at_rank: Tensor, order: Tensor) -> Tensor:
        return torch.empty_like(order, dtype=at_rank.dtype).scatter_(-1, order, at_rank[..., : order.shape[-1]])

    return Truth(
        difference.abs().sum(-1),
        (q, p),
        (by_id(difference.sign(), ranked), by_id(-difference.sign(), teacher_ranked)),
        (by_id(doubt, ranked), by_id(doubt, teacher_ranked)),
    )


def fault(
    gradient: Tensor, found: Truth, place: int, upstream: Tensor, temperatures: tuple[float, float]
) -> str | None:
    """Why a gradient to side ``place`` is wrong, or None. Every entry is held to its own size."""
    exact = found.gradients(upstream, temperatures)[place]
    q, doubt = found.probabilities[place], found.doubt[place]
    eps = torch.finfo(compute_dtype(gradient.dtype)).eps * LENIENCE
    if gradient.dtype == torch.float64:  # the truth is no better
        eps *= 20
    unit = q * (upstream.abs().unsqueeze(-1) / temperatures[place])
    # Small probabilities are the exponentials of large numbers, which are rounded.
    distance = (q.amax(-1, keepdim=True) / q.clamp(min=1e-300)).log2()
    allowed = eps * ((16 + 2 * distance) * exact.abs() + 4 * unit)
    # A doubtful sign may be wrong by 2, and then so is what all entries have in common by 2 q.
    uncertain = (q * doubt).sum(-1, keepdim=True)
    allowed = allowed + 2 * unit * (uncertain + doubt.double())
    info = torch.finfo(gradient.dtype)
    allowed = allowed + 0.5 * info.eps * exact.abs() + 2 * info.tiny
    wrong = ~((gradient.double() - exact).abs() <= allowed)
    if not bool(wrong.any()):
        return None
    row, entry = wrong.nonzero()[0].tolist()
    return (
        f"{int(wrong.sum())} entries are wrong, first [{row}, {entry}]: {gradient[row, entry]:.9e}, "
        f"truth {exact[row, entry]:.9e}, allowed error {allowed[row, entry]:.3e}"
    )


def upstream_for(rows: int) -> Tensor:
    return torch.linspace(-1.5, 2.0, rows, dtype=torch.float64) if rows > 1 else torch.ones(rows, dtype=torch.float64)


def evaluate(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float] = (1.0, 1.0), **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The values of the rows and the gradients to both sides."""
    leaves = leaf(student), leaf(teacher)
    value = kd.sorted_l1(*leaves, temperature=temperatures[0], teacher_temperature=temperatures[1], **options)
    gradients = torch.autograd.grad(value, leaves, upstream_for(len(value)).to(value.dtype))
    return value.detach(), list(gradients)


def plain(student: Tensor, teacher: Tensor, temperatures: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """What one writes in PyTorch."""
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    q, p = (
        torch.softmax(logits.to(dtype).clamp(min=LOGIT_FLOOR) / temperature, -1).sort(-1, descending=True).values
        for logits, temperature in zip((student, teacher), temperatures, strict=True)
    )
    longer = max(q.shape[-1], p.shape[-1])
    return (F.pad(q, (0, longer - q.shape[-1])) - F.pad(p, (0, longer - p.shape[-1]))).abs().sum(-1)


def check_pair(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float] = (1.0, 1.0), **options: Any
) -> None:
    """Values by the accuracy rule, and every entry of the gradients."""
    value, gradients = evaluate(student, teacher, temperatures, **options)
    assert value.dtype == compute_dtype(gradients[0].dtype if student.dtype == torch.float64 else teacher.dtype)
    exact = truth(student, teacher, temperatures, value.dtype)
    near = plain(student, teacher, temperatures)
    columns = [each.unsqueeze(-1) for each in (value, near, exact.value)]
    check("value", *columns, torch.full_like(columns[2], 2.0))
    for place, (name, gradient) in enumerate(zip(("student", "teacher"), gradients, strict=True)):
        assert gradient.dtype == (student, teacher)[place].dtype
        wrong = fault(gradient, exact, place, upstream_for(len(value)), temperatures)
        assert wrong is None, f"gradient to the {name}: {wrong}"


SIZES = [(1, 1), (2, 2), (2, 1), (127, 127), (127, 300), (1025, 40), (4097, 4097)]
LARGE = [(151_936, 151_936), (151_936, 32_000)]


@pytest.mark.parametrize("close", [False, True], ids=["far", "close"])
@pytest.mark.parametrize(
    "sizes", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in LARGE)], ids="{0[0]}-{0[1]}".format
)
@each_dtype
def test_equals_sorting(dtype: torch.dtype, sizes: tuple[int, int], close: bool) -> None:
    """Half types have many equal logits, so the order of ties is tested with them."""
    rows = 2 if max(sizes) > 10_000 else 5
    student, teacher = normal(rows, sizes[0]), normal(rows, sizes[1], seed=1)
    if close:
        shared = min(sizes)
        student[:, :shared] = teacher[:, :shared] + 0.01 * student[:, :shared]
    check_pair(student.to(dtype), teacher.to(dtype))


@pytest.mark.parametrize("temperatures", [(2.0, 0.7), (0.5, 0.5)], ids="{}".format)
def test_temperatures(temperatures: tuple[float, float]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_pair(normal(5, 700).to(dtype), normal(5, 900, seed=1).to(dtype), temperatures)


def test_mixed_dtypes() -> None:
    check_pair(normal(4, 300).bfloat16(), normal(4, 300, seed=1).float())
    check_pair(normal(4, 300).float(), normal(4, 300, seed=1))


ROWS: dict[str, Callable[[int], Tensor]] = {
    "gaussian": lambda vocab: normal(vocab, seed=3),
    "wide": lambda vocab: normal(vocab, seed=4, spread=12.0),
    "constant": lambda vocab: torch.full((vocab,), 3.0, dtype=torch.float64),
    "peaked": lambda vocab: normal(vocab, seed=5) + 40 * (torch.arange(vocab) == vocab // 3),
    "one id": lambda vocab: torch.where(torch.arange(vocab) == vocab // 2, 1e4, -1e4).double(),
    "two values": lambda vocab: (torch.arange(vocab) % 15 == 7).double(),
    "few values": lambda vocab: (normal(vocab, seed=6) * 2).round() / 2,
    "zeros of both signs": lambda vocab: torch.where(torch.arange(vocab) % 3 == 0, -0.0, 0.0).double(),
    "masked": lambda vocab: normal(vocab, seed=7).masked_fill(torch.arange(vocab) % 3 == 1, -math.inf),
    "all masked": lambda vocab: torch.full((vocab,), -math.inf, dtype=torch.float64),
    "all but one masked": lambda vocab: torch.full((vocab,), -math.inf, dtype=torch.float64).index_fill(
        0, torch.tensor([vocab // 2]), 1.0
    ),
    "10000 and -10000": lambda vocab: 1e4 * normal(vocab, seed=8).sign(),
    "around 10000": lambda vocab: 1e4 + normal(vocab, seed=9),
    "thousands apart": lambda vocab: 1e3 * normal(vocab, seed=10),
    "nearly constant": lambda vocab: 1 + 1e-5 * normal(vocab, seed=11),
    "ascending": lambda vocab: torch.linspace(-20, 0, vocab, dtype=torch.float64),
}


def without_gradient_of_masked(exact: Truth, student: Tensor, teacher: Tensor) -> Truth:
    """Masked vocabulary takes part, but gets no gradient: as if its probability were nothing there."""
    return exact._replace(
        probabilities=tuple(
            q.masked_fill(logits <= LOGIT_FLOOR, 0.0)
            for q, logits in zip(exact.probabilities, (student, teacher), strict=True)
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("row", ROWS)
def test_every_kind_of_row_against_every_other(row: str, dtype: torch.dtype) -> None:
    teacher = torch.stack([make(211) for make in ROWS.values()]).to(dtype)
    student = ROWS[row](300).to(dtype).expand(len(teacher), -1)
    value, gradients = evaluate(student, teacher)
    exact = truth(student, teacher, precision=value.dtype)
    tolerance = 40 * LENIENCE * torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), exact.value, rtol=tolerance, atol=tolerance)
    masked = without_gradient_of_masked(exact, student, teacher)
    for place in range(2):
        uncertain = (exact.probabilities[place] * exact.doubt[place]).sum(-1)
        assert float((uncertain < 1e-6).double().mean()) > 0.7, "too many doubts for a test"
        if row == "all masked" and place == 0:
            assert not gradients[0].any()
            continue
        keep = torch.ones(len(teacher), dtype=torch.bool)
        if place == 1:
            keep[list(ROWS).index("all masked")] = False
            assert not gradients[1][~keep].any()
        kept = masked._replace(
            value=masked.value[keep],
            probabilities=tuple(each[keep] for each in masked.probabilities),
            signs=tuple(each[keep] for each in masked.signs),
            doubt=tuple(each[keep] for each in masked.doubt),
        )
        wrong = fault(gradients[place][keep], kept, place, upstream_for(len(teacher))[keep], (1.0, 1.0))
        assert wrong is None, wrong


@each_dtype
@pytest.mark.parametrize("row", ROWS)
def test_identical_rows_give_exactly_nothing(row: str, dtype: torch.dtype) -> None:
    logits = ROWS[row](500).to(dtype).expand(3, -1)
    for error_bound in (0.0, 1e-2):
        value, gradients = evaluate(logits, logits.clone(), (1.7, 1.7), error_bound=error_bound)
        assert not value.any()
        assert not any(gradient.any() for gradient in gradients)


def test_the_order_of_the_vocabulary_does_not_matter() -> None:
    """Not to the value, and not at all to the gradient of the other side."""
    student, teacher = normal(3, 900).float(), normal(3, 900, seed=1).float()
    shuffled = teacher[:, torch.randperm(900, generator=generator())]
    value, gradients = evaluate(student, teacher)
    same, gradients_too = evaluate(student, shuffled)
    torch.testing.assert_close(same, value, rtol=0, atol=5e-7)
    assert torch.equal(gradients[0], gradients_too[0])


def test_swapping_the_sides_swaps_the_gradients() -> None:
    student, teacher = normal(3, 500).float(), normal(3, 800, seed=1).float()
    value, gradients = evaluate(student, teacher)
    swapped, gradients_too = evaluate(teacher, student)
    assert torch.equal(value, swapped)
    assert all(torch.equal(one, other) for one, other in zip(gradients, gradients_too[::-1], strict=True))


def test_the_shorter_vocabulary_is_padded_with_zeros() -> None:
    student, teacher = normal(3, 500).float(), normal(3, 300, seed=1).float()
    value, gradients = evaluate(student, teacher)
    padded = torch.cat([teacher, torch.full((3, 200), -math.inf)], -1)
    same, gradients_too = evaluate(student, padded)
    assert torch.equal(value, same)
    assert torch.equal(gradients[0], gradients_too[0])
    assert torch.equal(gradients[1], gradients_too[1][:, :300])
    assert not gradients_too[1][:, 300:].any()


def test_closed_forms() -> None:
    """A certain id against n equally likely ones: 2 (1 - 1 / n)."""
    certain = torch.tensor([[-1e4, 0.0, -1e4, -1e4]])
    for n in (1, 2, 5, 100):
        value = kd.sorted_l1(certain, torch.zeros(1, n))
        torch.testing.assert_close(value, torch.tensor([2 * (1 - 1 / n)]))


def by_loop(student: np.ndarray, teacher: np.ndarray) -> float:
    """One row, with nothing of torch."""
    q, p = (sorted(np.exp(x - x.max()) / math.fsum(np.exp(x - x.max())), reverse=True) for x in (student, teacher))
    longer = max(len(q), len(p))
    q, p = q + [0.0] * (longer - len(q)), p + [0.0] * (longer - len(p))
    return math.fsum(abs(one - other) for one, other in zip(q, p, strict=True))


def test_against_a_loop_in_numpy() -> None:
    student, teacher = normal(4, 83), normal(4, 131, seed=1)
    value = kd.sorted_l1(student, teacher)
    expected = [by_loop(*rows) for rows in zip(student.numpy(), teacher.numpy(), strict=True)]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14)


def test_digits_of_a_peaked_gradient_are_kept() -> None:
    """The rest of the vocabulary has 1e-5 of the mass: a difference from 1 leaves it two digits in float32."""
    student = torch.tensor([[0.0, -12.0, -13.0, -14.0]])
    teacher = torch.tensor([[0.0, -11.0, -15.0, -13.5]])
    _, gradients = evaluate(student, teacher)
    exact = truth(student, teacher).gradients(upstream_for(1), (1.0, 1.0))
    for ours, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


# --- broken gradients are found ----------------------------------------------------------------------------------------


@each_dtype
def test_broken_gradients_are_rejected(dtype: torch.dtype) -> None:
    """In any row, one sign among 4097 too."""
    student, teacher = normal(4, 4097).to(dtype), normal(4, 4097, seed=1).to(dtype)
    value, gradients = evaluate(student, teacher)
    exact = truth(student, teacher, precision=value.dtype)
    upstream = upstream_for(4)
    for place, gradient in enumerate(gradients):
        assert fault(gradient, exact, place, upstream, (1.0, 1.0)) is None
        for row in range(4):
            entry = int(gradient[row].abs().argsort()[4000])
            mutants = {
                "zero": torch.zeros_like(gradient[row]),
                "negated": -gradient[row],
                "2% too large": gradient[row] * 1.02,
                "one place off": gradient[row].roll(1),
                "one entry negated": gradient[row].index_fill(0, torch.tensor([entry]), -gradient[row, entry].item()),
            }
            for name, mutant in mutants.items():
                broken = gradient.clone()
                broken[row] = mutant
                assert fault(broken, exact, place, upstream, (1.0, 1.0)), f"{name} passes in row {row}"


def test_ties_are_ranked_by_id() -> None:
    """Three equal logits of which the teacher's cut the first, and only the first, off from the others."""
    student = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
    teacher = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    _, gradients = evaluate(student, teacher)
    # Ranks 0 and 1 are below the teacher's, 2 and 3 above.
    torch.testing.assert_close(gradients[0], torch.tensor([[-0.25, -0.25, 0.25, 0.25]]))


# --- the bound ---------------------------------------------------------------------------------------------------------


def adversarial(vocab: int) -> tuple[Tensor, Tensor]:
    """Probabilities that take turns in pairs: in each, the student's lie inside the teacher's, so D changes its sign twice."""
    middle = torch.linspace(0, -12, vocab // 2, dtype=torch.float64).repeat_interleave(2)
    apart = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(vocab // 2)
    return (middle + 1e-4 * apart).unsqueeze(0), (middle + 3e-4 * apart).unsqueeze(0)


PAIRS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "random": lambda vocab: (normal(2, vocab), normal(2, vocab + 5, seed=1)),
    "close": lambda vocab: (normal(2, vocab), normal(2, vocab) + 0.01 * normal(2, vocab, seed=1)),
    "peaked": lambda vocab: (normal(1, vocab, spread=8.0), normal(1, vocab, seed=1, spread=8.0)),
    "uniform": lambda vocab: (torch.zeros(1, vocab).double(), 1e-3 * normal(1, vocab, seed=1)),
    "tied": lambda vocab: ((normal(2, vocab) * 2).round() / 2, (normal(2, vocab, seed=1) * 2).round() / 2),
    "same": lambda vocab: (normal(1, vocab), normal(1, vocab)),
    "adversarial": adversarial,
    "permuted": lambda vocab: (normal(1, vocab), normal(1, vocab).flip(-1) * (1 + 1e-4)),
}


def check_bound(student: Tensor, teacher: Tensor, error_bound: float) -> tuple[Tensor, Tensor]:
    leaves = leaf(student), leaf(teacher)
    value, bound = kd.sorted_l1(*leaves, error_bound=error_bound, return_bound=True)
    assert not bound.requires_grad
    exact = truth(student, teacher).value
    _, rounding = kd.sorted_l1(student, teacher, return_bound=True)
    assert bool(((value.double() - exact).abs() <= bound).all())
    assert bool((value.double() <= exact + rounding).all()), "what is left unsorted makes it smaller"
    assert bool((bound <= rounding.clamp(min=error_bound) * (1 + 1e-6)).all())
    # The gradient of a softmax sums to zero, whatever the signs.
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert float(gradient.double().sum(-1).abs().max()) < 4 * torch.finfo(gradient.dtype).eps + 1e-5
    return value.detach(), bound


@pytest.mark.parametrize("error_bound", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_the_bound_holds(name: str, error_bound: float) -> None:
    for vocab in (2, 128, 4098):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            student, teacher = PAIRS[name](vocab)
            check_bound(student.to(dtype), teacher.to(dtype), error_bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_the_bound_holds_at_full_size(name: str) -> None:
    student, teacher = PAIRS[name](151_936)
    for error_bound in (1e-4, 1e-2):
        check_bound(student.float(), teacher.float(), error_bound)


def test_the_bound_is_made_use_of() -> None:
    """Else the tests above would hold of a kernel that sorts everything."""
    student, teacher = (each.float() for each in PAIRS["close"](4098))
    _, exact_bound = check_bound(student, teacher, 0.0)
    _, bound = check_bound(student, teacher, 1e-3)
    assert bool((bound > 10 * exact_bound).all())


def test_the_gradient_is_that_of_the_bounded_value() -> None:
    """With the buckets held fixed: mass goes from one entry to another, which leaves the ends of the scale where they are."""
    q, p = (torch.softmax(normal(1, 600, seed=seed), -1) for seed in (0, 1))
    leaves = q.log().requires_grad_(), p.log().requires_grad_()
    value = kd.sorted_l1(*leaves, error_bound=0.02)
    assert float(truth(*(each.detach() for each in leaves)).value - value) > 1e-5, "nothing was left unsorted"
    for place, side in enumerate((q, p)):
        (gradient,) = torch.autograd.grad(value, leaves[place], retain_graph=True)
        slope = (gradient / side).squeeze(0)
        for one, other in torch.randint(600, (40, 2), generator=generator()).tolist():
            step = 1e-9 * min(float(side[0, one]), float(side[0, other]))
            values = []
            for sign in (1, -1):
                moved = side.clone()
                moved[0, one] += sign * step
                moved[0, other] -= sign * step
                pair = [moved.log() if place == which else leaves[which].detach() for which in range(2)]
                values.append(kd.sorted_l1(*pair, error_bound=0.02).item())
            found = (values[0] - values[1]) / (2 * step)
            if {one, other} & {int(side.argmax()), int(side.argmin())}:
                continue
            assert abs(found - float(slope[one] - slope[other])) < max(1e-3, 1e-15 / step), (place, one, other)


# --- what rows count, shapes, sources ------------------------------------------------------------------------------------


def test_what_stands_where_no_token_counts_has_no_influence() -> None:
    student, teacher = normal(6, 50).float(), normal(6, 70, seed=1).float()
    mask = torch.tensor([True, False, True, True, False, True])
    polluted = [side.masked_fill(~mask.unsqueeze(-1), math.nan) for side in (student, teacher)]
    value, gradients = evaluate(*polluted, mask=mask)
    expected, gradients_expected = evaluate(student, teacher)
    assert torch.equal(value, expected.where(mask, 0))
    for ours, other in zip(gradients, gradients_expected, strict=True):
        assert torch.equal(ours, other.where(mask.unsqueeze(-1), 0))
    for masked in (torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        assert torch.equal(kd.sorted_l1(student, teacher, mask=masked), expected.where(masked, 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_shows(bad: float) -> None:
    student, teacher = normal(3, 50).float(), normal(3, 50, seed=1).float()
    student[1, 7] = bad
    value, gradients = evaluate(student, teacher)
    assert value.isnan().tolist() == [False, True, False]
    for gradient in gradients:
        assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == [False, True, False]


def test_temperatures_per_token() -> None:
    student, teacher = normal(4, 50).float(), normal(4, 60, seed=1).float()
    temperatures = torch.tensor([0.5, 1.0, 2.0, 3.0])
    together = kd.sorted_l1(student, teacher, temperature=temperatures, teacher_temperature=temperatures.flip(0))
    alone = [
        kd.sorted_l1(s, t, temperature=float(one), teacher_temperature=float(other))
        for s, t, one, other in zip(student, teacher, temperatures, temperatures.flip(0), strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0, 3), (2, 1, 3, 2)], ids="{}".format)
def test_batches_of_every_shape(batch: tuple[int, ...]) -> None:
    student, teacher = leaf(normal(*batch, 20).float()), leaf(normal(*batch, 33, seed=1).float())
    value, bound = kd.sorted_l1(student, teacher, return_bound=True)
    assert value.shape == bound.shape == batch
    value.sum().backward()
    flat = evaluate(student.detach().reshape(-1, 20), teacher.detach().reshape(-1, 33))[0]
    assert torch.equal(value.flatten(), flat)
    for side in (student, teacher):
        assert side.grad is not None
        assert side.grad.shape == side.shape


def test_not_contiguous() -> None:
    student, teacher = normal(40, 6).float(), normal(6, 90, seed=1).float()
    views = student.t(), teacher[:, ::2]
    value, gradients = evaluate(*(view.clone() for view in views))
    leaves = leaf(student), leaf(teacher)
    again = kd.sorted_l1(leaves[0].t(), leaves[1][:, ::2])
    found = torch.autograd.grad(again, leaves, upstream_for(6).float())
    assert torch.equal(again, value)
    assert torch.equal(found[0].t(), gradients[0])
    assert torch.equal(found[1][:, ::2], gradients[1])
    assert not found[1][:, 1::2].any()
    padded = torch.cat([teacher, teacher], -1)[:, :90]
    assert torch.equal(kd.sorted_l1(padded, teacher), torch.zeros(6))


@pytest.mark.parametrize("sides", ["student", "teacher"])
def test_one_side_requires_grad(sides: str) -> None:
    logits = {"student": normal(4, 60).float(), "teacher": normal(4, 80, seed=1).float()}
    _, gradients = evaluate(logits["student"], logits["teacher"])
    logits[sides].requires_grad_()
    kd.sorted_l1(**logits).backward(upstream_for(4).float())
    assert torch.equal(logits[sides].grad, gradients[sides == "teacher"])  # type: ignore[arg-type]
    with torch.no_grad():
        assert not kd.sorted_l1(**logits).requires_grad


def test_logits_are_not_touched_even_if_donated() -> None:
    student, teacher = leaf(normal(3, 50).float()), normal(3, 50, seed=1).float()
    before = student.detach().clone()
    kd.sorted_l1(kd.Logits(student, donate=True), teacher).sum().backward()
    assert torch.equal(student, before)


def test_half_precision_does_not_underflow() -> None:
    """The upstream gradient of a GradScaler is in before anything is rounded to float16."""
    student, teacher = normal(2, 4000).half(), normal(2, 4000, seed=1).half()
    leaves = leaf(student), leaf(teacher)
    gradients = torch.autograd.grad(kd.sorted_l1(*leaves).sum() * 2.0**14, leaves)
    exact = truth(student, teacher)
    for place, gradient in enumerate(gradients):
        assert fault(gradient, exact, place, torch.full((2,), 2.0**14, dtype=torch.float64), (1.0, 1.0)) is None


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": 0.5},
}


def heads(dtype: torch.dtype, bias: bool = False) -> dict[str, Tensor]:
    tensors = {
        "student.hidden": normal(2, 4, 6),
        "student.weight": normal(37, 6, seed=1, spread=1.0),
        "teacher.hidden": normal(2, 4, 5, seed=2),
        "teacher.weight": normal(53, 5, seed=3, spread=1.0),
    }
    if bias:
        tensors |= {"student.bias": normal(37, seed=4), "teacher.bias": normal(53, seed=5)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def head_loss(tensors: dict[str, Tensor], library: Any = kd, **options: Any) -> Tensor:
    settings = {name: options.pop(name) for name in ("softcap", "logit_scale") if name in options}
    sides = [
        tensors[f"{name}.logits"]
        if f"{name}.logits" in tensors
        else kd.LMHead(tensors[f"{name}.hidden"], tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **settings)
        for name in ("student", "teacher")
    ]
    value: Tensor = library.sorted_l1(*sides, **options)
    return value


def head_gradients(
    tensors: dict[str, Tensor], wanted: list[str], library: Any, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    value = head_loss(leaves, library, **options)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, [leaves[name] for name in wanted], upstream)


@pytest.mark.parametrize("wanted", ["all", "hidden", "weight", "student.weight"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_heads(dtype: torch.dtype, head: str, wanted: str) -> None:
    """A chunk for all tokens, or one for each; gradients made in the forward (hidden) or in the backward."""
    settings = dict(HEADS[head])
    tensors = heads(dtype, bias=bool(settings.pop("bias", False)))
    names = [name for name in tensors if wanted in name or wanted == "all"]
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = False
    polluted = dict(tensors)
    polluted["student.hidden"] = tensors["student.hidden"].masked_fill(~mask.unsqueeze(-1), math.nan)
    options = {"temperature": 1.5, "mask": mask, **settings}
    exact = head_gradients({name: t.double() for name, t in tensors.items()}, names, kd.reference, **options)
    # Rounding logits to bfloat16 makes some of them change their ranks, and so their signs.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.25, torch.float64: 1e-11}[dtype]
    for budget in (None, 1):
        value, gradients = head_gradients(polluted, names, kd, memory_budget=budget, **options)
        torch.testing.assert_close(value.double(), exact[0], rtol=tolerance, atol=tolerance)
        for name, ours, expected in zip(names, gradients, exact[1], strict=True):
            assert ours.dtype == dtype
            error = (ours.double() - expected).norm() / expected.norm()
            assert float(error) <= tolerance, (name, float(error))


def test_a_head_beside_logits() -> None:
    tensors = heads(torch.float64)
    tensors["teacher.logits"] = normal(2, 4, 41, seed=6)
    names = ["student.hidden", "student.weight", "teacher.logits"]
    ours, exact = (head_gradients(tensors, names, library) for library in (kd, kd.reference))
    torch.testing.assert_close(ours, exact)


# --- autograd, operators -------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_reference_and_of_the_kernel() -> None:
    leaves = leaf(normal(3, 8)), leaf(normal(3, 11, seed=1))
    for backend in ("reference", "cpu"):
        torch.autograd.gradcheck(lambda s, t, b=backend: kd.sorted_l1(s, t, temperature=1.3, backend=b), leaves)
        torch.autograd.gradgradcheck(lambda s, t, b=backend: kd.sorted_l1(s, t, backend=b), leaves)


def test_repeated_and_last_backward() -> None:
    student, teacher = leaf(normal(3, 40).float()), normal(3, 40, seed=1).float()
    value = kd.sorted_l1(student, teacher)
    upstream = upstream_for(3).float()
    first = torch.autograd.grad(value, student, upstream, retain_graph=True)[0].clone()
    second = torch.autograd.grad(value, student, 2 * upstream, retain_graph=True)[0]
    last = torch.autograd.grad(value, student, upstream)[0]
    torch.testing.assert_close(second, 2 * first)
    assert torch.equal(last, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, student, upstream)


def test_function_transforms_take_the_reference() -> None:
    student, teacher = normal(3, 20).float(), normal(3, 25, seed=1).float()
    found = torch.func.grad(lambda s: kd.sorted_l1(s, teacher).sum())(student)
    torch.testing.assert_close(found, evaluate_sum(student, teacher))
    with pytest.raises(NotImplementedError, match="backend='cpu'"):
        torch.func.grad(lambda s: kd.sorted_l1(s, teacher, backend="cpu").sum())(student)


def evaluate_sum(student: Tensor, teacher: Tensor) -> Tensor:
    student = leaf(student)
    (gradient,) = torch.autograd.grad(kd.sorted_l1(student, teacher).sum(), student)
    return gradient


def sorted_l1_calls(tensors: dict[str, Tensor], **options: Any) -> list[Any]:
    """The operators behind a value and its backward."""
    leaves = {name: leaf(tensor) for name, tensor in tensors.items()}
    return recorded(lambda: head_loss(leaves, **options).sum().backward())


LOGITS = {"student.logits": normal(3, 20).float(), "teacher.logits": normal(3, 25, seed=1).float()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["logits", "half", "heads"])
def test_opcheck(source: str) -> None:
    tensors = {
        "logits": LOGITS,
        "half": {name: tensor.bfloat16() for name, tensor in LOGITS.items()},
        "heads": heads(torch.float32, bias=True),
    }[source]
    calls = sorted_l1_calls(tensors, error_bound=1e-3)
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("source", ["logits", "heads"])
def test_compiled(source: str) -> None:
    tensors = LOGITS if source == "logits" else heads(torch.float32)
    check_compiled(head_loss, {name: leaf(tensor) for name, tensor in tensors.items()})


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_changing_numbers_do_not_recompile() -> None:
    leaves = {name: leaf(tensor) for name, tensor in LOGITS.items()}
    fast = compiled(lambda given, x: head_loss(given, temperature=1 + x, error_bound=x))
    for number in (0.3, 0.35, 0.4, 0.45):
        torch.testing.assert_close(fast(leaves, number), head_loss(leaves, temperature=1 + number, error_bound=number))
    assert graphs() <= 2


@pytest.fixture
def threads() -> Iterator[list[int]]:
    before = torch.get_num_threads()
    yield [1, 2, 3]
    torch.set_num_threads(before)


def test_threads_make_no_difference(threads: list[int]) -> None:
    student, teacher = normal(7, 20_000).float(), normal(7, 20_000, seed=1).float()
    found = []
    for count in threads:
        torch.set_num_threads(count)
        value, gradients = evaluate(student, teacher, error_bound=1e-4)
        found.append([value, *gradients])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


# --- bad input -----------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"student": [1.0]}, TypeError, "student must be"),
    "no teacher": ({"teacher": None}, TypeError, "teacher must be"),
    "integers": ({"teacher": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "teacher: logits"),
    "no vocabulary": ({"student": torch.zeros(2, 0)}, ValueError, "student: the vocabulary is empty"),
    "0-d": ({"student": torch.tensor(1.0)}, ValueError, "student: logits"),
    "other tokens": ({"teacher": torch.zeros(3, 3)}, ValueError, "same tokens"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature must be a positive"),
    "teacher temperature NaN": ({"teacher_temperature": math.nan}, ValueError, "teacher_temperature must be"),
    "temperatures of the wrong shape": ({"temperature": torch.ones(3)}, ValueError, "temperature must have one"),
    "a temperature that is not positive": ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature must"),
    "mask of numbers": ({"mask": torch.ones(2)}, TypeError, "mask must be"),
    "mask of the wrong shape": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must have"),
    "negative bound": ({"error_bound": -1e-3}, ValueError, "error_bound must be at least 0"),
    "bound of text": ({"error_bound": "small"}, TypeError, "error_bound must be"),
    "infinite bound": ({"error_bound": math.inf}, ValueError, "error_bound must be"),
    "flag of a number": ({"return_bound": 1}, TypeError, "return_bound must be"),
    "no budget": ({"memory_budget": -1}, ValueError, "memory_budget must be"),
    "no such backend": ({"backend": "gpu"}, ValueError, "backend must be"),
    "temperature with gradient": (
        {"temperature": torch.ones(2, requires_grad=True)},
        NotImplementedError,
        "temperature requires grad",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changed, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        kd.sorted_l1(**{"student": GOOD, "teacher": GOOD, **changed})
    if not {"memory_budget", "backend"} & set(changed) and error is not NotImplementedError:
        with pytest.raises(error, match=text):
            kd.reference.sorted_l1(**{"student": GOOD, "teacher": GOOD, **changed})


def test_the_reference_under_the_same_name() -> None:
    student, teacher = normal(3, 20).float(), normal(3, 30, seed=1).float()
    expected, bound = kd.reference.sorted_l1(student, teacher, temperature=1.5, return_bound=True)
    value, same = kd.sorted_l1(student, teacher, temperature=1.5, return_bound=True)
    torch.testing.assert_close(value, expected, rtol=SLACK[torch.float32], atol=1e-6)
    assert torch.equal(bound, same)
    assert torch.equal(kd.sorted_l1(student, teacher, temperature=1.5, backend="reference"), expected)

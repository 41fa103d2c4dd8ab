"""The losses of the chapter on decoupled logits against their formulas, written once more row by row in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import Model, compare, each_backend, each_kind, each_precision, noise
from torch import Tensor

import kdkernels as kd
from kdkernels.catalogue import ENTRIES, PRELUDE

ROWS, CLASSES = 7, 23
LABELS = torch.tensor([3, 0, -100, 22, 7, 5, 5])


def rest(logits: Tensor, label: int) -> Tensor:
    """The logits of a row without its label's."""
    return torch.cat([logits[:label], logits[label + 1 :]])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def parts(s: Tensor, t: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """(of the label against the rest, of the rest) for one row."""
    p, q = t.softmax(0)[label], s.softmax(0)[label]
    return kl(torch.stack([p, 1 - p]), torch.stack([q, 1 - q])), kl(
        rest(t, label).softmax(0), rest(s, label).softmax(0)
    )


def counted(s: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """The rows that have a label."""
    rows = zip(s.reshape(-1, CLASSES), t.reshape(-1, CLASSES), LABELS.tolist(), strict=True)
    return [row for row in rows if row[2] >= 0]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def dkd(s: Tensor, t: Tensor) -> Tensor:
    terms = []
    for student, teacher, label in counted(s, t):
        target, others = parts(student / 2, teacher / 2, label)
        terms.append(4 * (0.7 * target + 3 * others) - 0.2 * student.log_softmax(0)[label])
    return mean(terms)


def atkd(s: Tensor, t: Tensor, reverse: bool = False) -> Tensor:
    rows = counted(s, t)
    uncertain = [1 - teacher.softmax(0)[label].item() for _, teacher, label in rows]
    median = sorted(uncertain)[(len(rows) - 1) // 2]
    easy, hard = [], []
    for (student, teacher, label), value in zip(rows, uncertain, strict=True):
        target, others = parts(*((teacher, student) if reverse else (student, teacher)), label)
        if value < median:
            easy.append(others)
        else:
            hard.append(target + others)
    return 0.2 * mean(easy) + 0.8 * mean(hard)


def nkd(s: Tensor, t: Tensor) -> Tensor:
    terms = []
    for student, teacher, label in counted(s, t):
        log_q = student.log_softmax(0)[label]
        soft = -(rest(teacher / 3, label).softmax(0) * rest(student / 3, label).log_softmax(0)).sum()
        terms.append(-teacher.softmax(0)[label] * log_q + 3.5 * 9 * soft - log_q)
    return mean(terms)


def ofa(s: Tensor, t: Tensor, raised: str, epsilon: float = 1.5) -> Tensor:
    terms = []
    for student, teacher, label in counted(s, t):
        p, log_q = teacher.softmax(0), student.log_softmax(0)
        r = p**epsilon if raised == "all" else p
        r = torch.stack([(1 + p[label]) ** epsilon - 1 if v == label else r[v] for v in range(CLASSES)])
        terms.append(-2.0 * (r * log_q).sum() - 0.5 * log_q[label])
    return mean(terms)


def ttm(s: Tensor, t: Tensor, weighted: bool, gamma: float = 0.2) -> Tensor:
    terms = []
    for student, teacher, label in counted(s, t):
        power = teacher.softmax(0) ** gamma
        value = kl(power / power.sum(), student.softmax(0))
        terms.append(4 * value * (power.sum() if weighted else 1) - 0.5 * student.log_softmax(0)[label])
    return mean(terms)


Formula = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Callable[[str | None], torch.nn.Module], Formula]] = {
    "dkd": (lambda backend: kd.losses.DKD(0.7, 3.0, temperature=2.0, ce_weight=0.2, backend=backend), dkd),
    "atkd": (lambda backend: kd.losses.ATKD(backend=backend), atkd),
    "atkd-reverse": (
        lambda backend: kd.losses.ATKD(reverse=True, backend=backend),
        lambda s, t: atkd(s, t, reverse=True),
    ),
    "nkd": (lambda backend: kd.losses.NKD(3.5, temperature=3.0, backend=backend), nkd),
    "ofa": (
        lambda backend: kd.losses.OFAKD(1.5, kd_weight=2.0, ce_weight=0.5, backend=backend),
        lambda s, t: ofa(s, t, "all"),
    ),
    "ofa-label": (
        lambda backend: kd.losses.OFAKD(1.5, raised="label", kd_weight=2.0, ce_weight=0.5, backend=backend),
        lambda s, t: ofa(s, t, "label"),
    ),
    "ttm": (lambda backend: kd.losses.TTM(0.2, 4.0, ce_weight=0.5, backend=backend), lambda s, t: ttm(s, t, False)),
    "wttm": (lambda backend: kd.losses.WTTM(0.2, 4.0, ce_weight=0.5, backend=backend), lambda s, t: ttm(s, t, True)),
}


@each_kind
@each_backend
@each_precision
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_formula(name: str, dtype: torch.dtype, backend: str | None, kind: str) -> None:
    make, formula = LOSSES[name]
    loss = make(backend)
    student, teacher = (Model.make(kind, (ROWS,), CLASSES, seed) for seed in (1, 5))
    compare(lambda s, t: loss(s, t, LABELS), formula, student, teacher, dtype)


def test_ofa_of_stages() -> None:
    """Each stage adds the loss of its logits, without a hard-label term."""
    student, first, second, teacher = (noise(ROWS, CLASSES, seed=seed).requires_grad_() for seed in range(4))
    loss = kd.losses.OFAKD(1.5, stage_weight=0.3)(student, teacher, LABELS, [first, second])
    alone = kd.losses.OFAKD(1.5)(student, teacher, LABELS)
    stages = [kd.losses.OFAKD(1.5, ce_weight=0.0)(stage, teacher, LABELS) for stage in (first, second)]
    expected = alone + 0.3 * (stages[0] + stages[1])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, right in zip(
        torch.autograd.grad(loss, (student, first, second)),
        torch.autograd.grad(expected, (student, first, second)),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("score", ["log", "probability"])
def test_uskd(score: str) -> None:
    student, weak = (noise(ROWS, CLASSES, seed=seed).requires_grad_() for seed in (1, 2))
    rows = counted(student, weak)
    squares = [s.softmax(0)[label].item() ** 2 for s, _, label in rows]
    terms = []
    for (s, w, label), square in zip(rows, squares, strict=True):
        log_q, share = s.log_softmax(0), w.softmax(0)
        own = log_q / (1 - log_q[label]) if score == "log" else log_q.exp() / (1 - log_q[label].exp())
        scores = (share / (1 - share[label]) + own).tolist()
        order = sorted(range(CLASSES), key=lambda v, scores=scores: -scores[v])
        zipf = {v: 1 / (order.index(v) + 1) for v in range(CLASSES) if v != label}
        soft = torch.tensor([value / sum(zipf.values()) for value in zipf.values()], dtype=torch.float64)
        target = square + 1 - sum(squares) / len(squares)
        smooth = torch.full((CLASSES,), 0.1 / CLASSES, dtype=torch.float64)
        smooth[label] += 0.9
        terms.append(
            -0.5 * target * log_q[label]
            - 0.2 * (soft * rest(s, label).log_softmax(0)).sum()
            - 0.03 * (smooth * w.log_softmax(0)).sum()
        )
    expected = mean(terms)
    loss = kd.losses.USKD(0.5, 0.2, 0.03, score=score)(student, weak, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, right in zip(
        torch.autograd.grad(loss, (student, weak)), torch.autograd.grad(expected, (student, weak)), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6 * right.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_of_no_rows_that_count(name: str) -> None:
    student = torch.randn(3, CLASSES, requires_grad=True)
    loss = LOSSES[name][0](None)(student, torch.randn(3, CLASSES), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert bool((student.grad == 0).all())


def test_atkd_splits_where_it_is_told_to() -> None:
    """Equal tokens are all hard; the largest share makes all but the least sure token easy."""
    student, teacher = (noise(4, CLASSES, seed=seed) for seed in (1, 2))
    labels = torch.tensor([1, 2, 3, 4])
    same = teacher[:1].repeat(4, 1)
    found = kd.losses.ATKD(0.3)(student, same, torch.full((4,), 2))
    both = kd.distillation_loss(student, same, kd.Decoupled(), labels=torch.full((4,), 2))
    torch.testing.assert_close(found, 0.7 * both)
    p = teacher.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    least = int(p.argmin())
    rows = kd.distillation_loss(student, teacher, kd.Decoupled(target_weight=0.0), labels=labels, reduction="none")
    hard = kd.distillation_loss(student, teacher, kd.Decoupled(), labels=labels, reduction="none")[least]
    others = rows[[row for row in range(4) if row != least]].mean()
    torch.testing.assert_close(kd.losses.ATKD(0.3, easy=1.0)(student, teacher, labels), 0.3 * others + 0.7 * hard)


def test_wttm_without_labels() -> None:
    student, teacher = (noise(4, CLASSES, seed=seed) for seed in (1, 2))
    power = teacher.softmax(-1) ** 0.5
    rows = power.sum(-1) * torch.stack([kl(p / p.sum(), q) for p, q in zip(power, student.softmax(-1), strict=True)])
    loss = kd.losses.WTTM(0.5, 2.0, ce_weight=0.0)
    torch.testing.assert_close(loss(student, teacher), 2 * rows.mean())
    with pytest.raises(ValueError, match="needs labels"):
        kd.losses.WTTM()(student, teacher)


FOUR, ONES = torch.ones(3, 4), torch.ones(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: kd.losses.ATKD(easy=1.5), ValueError, "easy must be between 0 and 1, got 1.5"),
        (lambda: kd.losses.OFAKD(0.0), ValueError, "epsilon must be a positive finite number"),
        (lambda: kd.losses.OFAKD(raised="none"), ValueError, "raised must be one of all, label"),
        (lambda: kd.losses.TTM(-1.0), ValueError, "gamma must be a positive finite number"),
        (lambda: kd.losses.USKD(score="rank"), ValueError, "score must be one of log, probability"),
        (lambda: kd.losses.DKD(math.nan), ValueError, "alpha must be a finite number"),
        (lambda: kd.losses.ATKD()(FOUR, FOUR, ONES[:2]), ValueError, "labels must have the shape"),
        (lambda: kd.losses.USKD()(FOUR, FOUR[:2], ONES), ValueError, "weak must have the shape"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


KEYS = {"atkd", "dkd", "nkd_uskd", "ofa_kd", "shike_dkt", "topkd_scaled", "ttm_wttm"}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_lines_of_the_catalogue_run(key: str) -> None:
    names: dict[str, Any] = {}
    exec(PRELUDE + ENTRIES[key].use, names)
    names["loss"].backward()
    assert bool(names["student"].grad.isfinite().all())
    assert bool(names["student"].grad.abs().max() > 0)

"""The losses on orders against their formulas in loops, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import TOLERANCES, Model, compare, copy, each_backend, each_kind, each_precision, noise
from torch import Tensor

from kdkernels import losses
from kdkernels.losses.ranking import flops, percentile_scaled

MASK = torch.tensor([[True, True, True, False, True], [True, False, True, True, False], [False] * 5])


def against(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *given: Tensor) -> None:
    """Value and gradient to what requires grad (the first), in float32 against float64."""
    for dtype in TOLERANCES:
        mine, true = copy(given[0], dtype), copy(given[0])
        others = [each.to(dtype) if each.is_floating_point() else each for each in given[1:]]
        found, expected = ours(mine, *others), plain(true, *given[1:])
        assert found.dim() == 0
        found.backward()
        expected.backward()
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=0)
        assert mine.grad is not None
        assert true.grad is not None
        size = float(true.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=0, atol=TOLERANCES[dtype] * size)


@each_backend
@each_kind
@each_precision
@pytest.mark.parametrize("top_k", [None, 3])
def test_pld(top_k: int | None, dtype: torch.dtype, kind: str, backend: str | None) -> None:
    labels = torch.tensor([2, 0, -100, 8])
    loss = losses.PLD(1.5, top_k=top_k, backend=backend)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n in (0, 1, 3):
            y = int(labels[n])
            pi = [y, *(v for v in torch.argsort(-teacher[n]).tolist() if v != y)]
            w = torch.softmax(teacher[n] / 1.5, -1)
            for k in range(9 if top_k is None else top_k):
                total = total + w[pi[k]] * (torch.logsumexp(student[n, pi[k:]], -1) - student[n, pi[k]])
        return total / 3

    student, teacher = (Model.make(kind, (4,), 9, seed) for seed in (1, 5))
    compare(lambda s, t: loss(s, t, labels), plain, student, teacher, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", ["positive", "all"])
def test_margin_mse(pairs: str, masked: bool) -> None:
    student, teacher = noise(3, 5, seed=1), noise(3, 5, seed=2)
    mask = MASK if masked else torch.ones_like(MASK)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        lists = []
        for row in range(3):
            places = mask[row].nonzero().flatten().tolist()
            chosen = [(i, j) for i in places for j in places if pairs == "all" or (i == 0 and j > 0)]
            errors = [
                ((student[row, i] - student[row, j]) - (teacher[row, i] - teacher[row, j])) ** 2 for i, j in chosen
            ]
            if errors:
                lists.append(torch.stack(errors).mean())
        return torch.stack(lists).mean()

    loss = losses.MarginMSE(pairs)
    dirty = torch.where(mask, student, torch.nan)
    against(lambda s, t: loss(s.masked_fill(~mask, torch.nan), t, mask=mask), plain, student, teacher)
    assert loss(dirty, teacher, mask=torch.zeros_like(mask)) == 0


def test_margin_mse_of_pairs_as_published() -> None:
    scores = noise(4, 6, seed=3)
    expected = (((scores[0] - scores[1]) - (scores[2] - scores[3])) ** 2).mean()
    found = losses.MarginMSE()(torch.stack([scores[0], scores[1]], -1), torch.stack([scores[2], scores[3]], -1))
    torch.testing.assert_close(found, expected)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@each_backend
def test_cadet_listwise(backend: str | None) -> None:
    student, teacher = 0.2 * noise(3, 5, seed=1), noise(3, 5, seed=2).sigmoid()

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        divergences, contrasts = [], []
        for row in range(3):
            places = MASK[row].nonzero().flatten()
            if not len(places):
                continue
            s, t = student[row, places], teacher[row, places]
            divergences.append(kl(s / 0.05, t / 0.3))
            kept = [0] + [j for j in range(1, len(places)) if t[j] <= 0.6 * t.max()]
            contrasts.append(-(s[kept] / 0.01).log_softmax(-1)[0])
        return torch.stack(divergences).mean() + 0.1 * torch.stack(contrasts).mean()

    loss = losses.CADETListwise(backend=backend)
    against(lambda s, t: loss(s, t, mask=MASK), plain, student, teacher)


def test_percentile_scaled() -> None:
    scores = noise(7, 11, seed=4)
    ordered = scores.flatten().sort().values
    low, high = 0.01 * 76, 0.99 * 76  # places between the 77 sorted scores
    ends = [
        ordered[int(p)] + (p - int(p)) * (ordered[math.ceil(p)] - ordered[int(p)]) for p in (low, high)
    ]  # fmt: skip
    torch.testing.assert_close(percentile_scaled(scores), ((scores - ends[0]) / (ends[1] - ends[0])).clamp(0, 1))
    assert not percentile_scaled(torch.ones(3)).any()
    mask = scores > 0
    assert torch.equal(percentile_scaled(scores, mask=mask)[mask], percentile_scaled(scores[mask]))


@each_backend
@pytest.mark.parametrize("sparsity", ["flops", "l1"])
def test_disco_retrieval(sparsity: str, backend: str | None) -> None:
    documents, queries = noise(2, 4, 7, seed=1), noise(2, 7, seed=2).requires_grad_()
    teachers = noise(3, 2, 4, seed=3)
    mask = torch.tensor([[True] * 4, [True, True, False, True]])

    def plain(documents: Tensor, queries: Tensor, teachers: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(2):
            places = mask[row].nonzero().flatten()
            s, t = documents[row, places] @ queries[row], teachers.mean(0)[row, places]
            margins = torch.stack([((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i in range(len(s)) for j in range(len(s))])
            total = total + (kl(s, t) - 0.3 * s.log_softmax(-1)[0] + 0.05 * margins.mean()) / 2
        for weight, vectors in ((0.02, queries), (0.01, documents.reshape(-1, 7))):
            density = [vectors[:, j].abs().mean() for j in range(7)]
            total = total + weight * sum(x if sparsity == "l1" else x * x for x in density)
        return total

    loss = losses.DiSCoRetrieval(
        contrastive_weight=0.3,
        margin_weight=0.05,
        query_sparsity=0.02,
        document_sparsity=0.01,
        sparsity=sparsity,
        backend=backend,
    )
    against(lambda d, q, t: loss(q, d, t, mask=mask), plain, documents, queries.detach(), teachers)
    assert flops(torch.ones(3, 4)) == 4
    loss(queries, documents, teachers).backward()
    assert queries.grad is not None
    assert queries.grad.any()


@each_backend
@pytest.mark.parametrize("restricted", [False, True])
def test_cprd(restricted: bool, backend: str | None) -> None:
    student, teacher = noise(4, 6, seed=1), noise(4, 3, seed=2)
    candidates = torch.tensor([[0, 2, 4], [5, 1, 0], [3, 2, 1], [1, 0, 5]])
    valid = torch.ones(4, 3, dtype=torch.bool)
    easy = torch.ones(4, 6, dtype=torch.bool)
    if restricted:
        valid[0, 1] = valid[2, 0] = False
        valid[3] = False
        easy[:, 3] = False

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        queries = []
        for row in range(4):
            ranked = [j for j in range(3) if valid[row, j]]
            ranked.sort(key=lambda j: -float(teacher[row, j]))
            ids = [int(candidates[row, j]) for j in ranked]
            negatives = [v for v in range(6) if easy[row, v] and v not in candidates[row].tolist()]
            scores = (student[row] / 0.5).exp()
            terms = [-(scores[v] / (scores[ids[i:]].sum() + scores[negatives].sum())).log() for i, v in enumerate(ids)]
            if terms:
                queries.append(torch.stack(terms).mean())
        return torch.stack(queries).mean()

    loss = losses.CPRD(0.5, backend=backend)
    options: dict[str, Any] = {"valid": valid, "easy": easy} if restricted else {}
    against(lambda s, t: loss(s, candidates, t, **options), plain, student, teacher)


def test_trans_encoder() -> None:
    student, teachers = noise(6, seed=1), noise(3, 6, seed=2).tanh()

    def cross(student: Tensor, teachers: Tensor) -> Tensor:
        target = teachers.mean(0)
        return torch.stack(
            [-(y * x.sigmoid().log() + (1 - y) * (-x).sigmoid().log()) for x, y in zip(student, target, strict=True)]
        ).mean()

    against(losses.TransEncoder(), cross, student, teachers)
    against(
        losses.TransEncoder("bi"),
        lambda s, t: sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / 6,
        student,
        teachers[0],
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.PLD(0.0), ValueError, "temperature must be a positive"),
        (lambda: losses.PLD(reduction="last"), ValueError, "reduction must be one of"),
        (lambda: losses.MarginMSE("some"), ValueError, "pairs must be one of positive, all"),
        (lambda: losses.MarginMSE()(torch.zeros(3), torch.zeros(3)), ValueError, r"shape \[B, n\]"),
        (lambda: losses.MarginMSE()(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2, 3)), TypeError, "mask"),
        (lambda: percentile_scaled(torch.ones(2), low=99, high=1), ValueError, "low and high"),
        (lambda: losses.CPRD()(torch.zeros(2, 3), torch.full((2, 1), 3), torch.zeros(2, 1)), ValueError, "candidates"),
        (lambda: losses.CPRD()(torch.zeros(2, 3), torch.zeros(2, 1).long(), torch.zeros(2)), ValueError, "teacher"),
        (
            lambda: losses.DiSCoRetrieval()(torch.zeros(2), torch.zeros(2, 2, 2), torch.zeros(2, 2)),
            ValueError,
            "queries",
        ),
        (lambda: losses.TransEncoder()(torch.zeros(2), torch.zeros(3)), ValueError, "student must have the shape"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    "key", ["pld", "margin_mse", "cadet_listwise", "disco_retrieval", "cprd", "trans_encoder"]
)  # fmt: skip
def test_registered(key: str) -> None:
    assert losses.get(key).__doc__
    assert not losses.get(key)().state_dict()

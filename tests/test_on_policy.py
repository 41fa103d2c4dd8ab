"""On-policy helpers and losses against formulas token by token, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import Model, compare, each_kind, each_precision, noise
from torch import Tensor

import kdkernels as kd
from kdkernels import losses, on_policy

V = 11
IDS = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor(
    [[False, True, True, True, True, True], [False, False, False, True, True, False], [False] * 6]
)  # fmt: skip
STEPS = [(b, t) for b in range(3) for t in range(5) if MASK[b, t + 1]]
"""The rows that predict a token of a response."""


def log_prob(logits: Tensor, b: int, t: int) -> Tensor:
    return logits[b, t].log_softmax(-1)[IDS[b, t + 1]]


def test_the_shift() -> None:
    following, counted = on_policy.predicted(IDS, MASK)
    assert [tuple(place) for place in counted.nonzero().tolist()] == STEPS
    assert all(following[b, t] == IDS[b, t + 1] for b, t in STEPS)
    assert bool((following[~counted] == -100).all())
    assert on_policy.predicted(IDS)[1].sum() == 15


@each_kind
def test_log_probs(kind: str) -> None:
    model = Model.make(kind, (3, 6), V, 1)
    given = model.to(torch.float64)
    found = on_policy.taken_log_probs(given.source(), IDS, MASK)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, t in STEPS:
        expected[b, t] = log_prob(model.logits(), b, t)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(on_policy.sequence_log_probs(given.source(), IDS, MASK), expected.sum(-1))
    means = on_policy.sequence_log_probs(given.source(), IDS, MASK, length_normalized=True)
    torch.testing.assert_close(means, expected.sum(-1) / torch.tensor([5.0, 2.0, 1.0]))


def test_rewards_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [math.nan, 3.0, math.nan, 5.0], [math.nan] * 4])
    counted = torch.tensor([[True] * 4, [False, True, False, True], [False] * 4])
    expected = torch.tensor([[1 + 1 + 1 + 1.0, 2 + 2 + 2.0, 4 + 4.0, 8.0], [0, 3 + 0.25 * 5, 0, 5], [0] * 4])
    torch.testing.assert_close(on_policy.rewards_to_go(rewards, counted, gamma=0.5), expected)
    lengths = torch.tensor([[4.0, 3, 2, 1], [1, 2, 1, 1], [1] * 4])
    found = on_policy.rewards_to_go(rewards, counted, gamma=0.5, length_normalized=True)
    torch.testing.assert_close(found, expected / lengths)
    assert on_policy.rewards_to_go(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_padding_does_not_enter_the_whitening() -> None:
    values = noise(2, 5, seed=3)
    counted = torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    found = on_policy.whiten(values, counted)
    kept = values[counted]
    torch.testing.assert_close(found[counted], (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt())
    assert not found[~counted].any()
    assert torch.equal(found, on_policy.whiten(values.masked_fill(~counted, math.nan), counted))
    assert not on_policy.whiten(values, torch.zeros_like(counted)).any()


def test_mixtures() -> None:
    p, q = torch.tensor([0.5, 1e-30]), torch.tensor([0.125, 0.25])
    torch.testing.assert_close(on_policy.log_mixture(p.log(), q.log(), 0.2).exp(), 0.2 * p + 0.8 * q)
    assert torch.equal(on_policy.log_mixture(p.log(), q.log(), 0.0), q.log())
    assert torch.equal(on_policy.log_mixture(p.log(), q.log(), 1.0), p.log())


def minillm(student: Tensor, teacher: Tensor, old: Tensor, clip: float | None) -> Tensor:
    """The loss with the defaults, where ``old`` drew the sequences."""
    with torch.no_grad():
        totals = {}
        for b, t in STEPS:
            behind = [u for c, u in STEPS if c == b and u >= t]
            rewards = [0.5 * (log_prob(teacher, b, u) - log_prob(old, b, u)) for u in behind]
            totals[b, t] = sum(0.95 ** (u - t) * r for u, r in zip(behind, rewards, strict=True)) / len(behind)
        every = torch.stack(list(totals.values()))
        advantages = {
            step: (x - every.mean()) / (every.var(unbiased=False) + 1e-8).sqrt() for step, x in totals.items()
        }
    terms = []
    for b, t in STEPS:
        drawn = 0.2 * log_prob(teacher, b, t).exp() + 0.8 * log_prob(old, b, t).exp()
        ratio = log_prob(student, b, t).exp() / drawn
        loss = -advantages[b, t] * ratio
        if clip is not None:
            loss = torch.maximum(loss, -advantages[b, t] * ratio.clamp(1 - clip, 1 + clip))
        q, p = student[b, t].log_softmax(-1), teacher[b, t].log_softmax(-1)
        terms.append(loss + (q.exp() * (q - p)).sum())
    return torch.stack(terms).mean()


@each_kind
@each_precision
@pytest.mark.parametrize("clip", [None, 0.2])
def test_minillm(clip: float | None, dtype: torch.dtype, kind: str) -> None:
    loss = losses.MiniLLM(clip=clip)
    student, teacher = Model.make(kind, (3, 6), V, 1), Model.make(kind, (3, 6), V, 5)
    old = Model([leaf + 0.3 * noise(*leaf.shape, seed=9) for leaf in student.leaves])

    def ours(s: Any, t: Any) -> Tensor:
        rollout = loss.rollout(old.to(dtype).source(), t, IDS, MASK)
        return loss(s, t, IDS, MASK, rollout=rollout)

    compare(ours, lambda s, t: minillm(s, t, old.logits(), clip), student, teacher, dtype)
    compare(
        lambda s, t: loss(s, t, IDS, MASK),
        lambda s, t: minillm(s, t, s.detach(), clip),
        student,
        teacher,
        dtype,
    )


def test_minillm_without_responses() -> None:
    student = noise(3, 6, V, seed=1).requires_grad_()
    found = losses.MiniLLM()(student, noise(3, 6, V, seed=2), IDS, torch.zeros_like(MASK))
    found.backward()
    assert found == 0
    assert student.grad is not None
    assert not student.grad.any()


@each_kind
@each_precision
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_teacher_dpo(smoothing: float, dtype: torch.dtype, kind: str) -> None:
    """Chosen sequences, then rejected ones, shorter by a token; the third pair has no response at all."""
    loss = losses.TeacherDPO(0.3, label_smoothing=smoothing)
    student, teacher = Model.make(kind, (3, 6), V, 1), Model.make(kind, (3, 6), V, 5)
    other, reference = Model.make(kind, (3, 5), V, 11), Model.make(kind, (3, 5), V, 15)
    rejected_mask = MASK[:, :5].flip(0)

    def ours(s: Any, t: Any) -> Tensor:
        return loss(
            s,
            other.to(dtype).source(),
            t,
            reference.to(dtype).source(),
            IDS,
            IDS[:, :5],
            chosen_mask=MASK,
            rejected_mask=rejected_mask,
        )

    def plain(s: Tensor, t: Tensor) -> Tensor:
        difference = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
        for b, step in STEPS:
            difference[b] = difference[b] + log_prob(s, b, step) - log_prob(t, b, step)
        for b in range(3):
            for step in range(4):
                if rejected_mask[b, step + 1]:
                    difference[b] = (
                        difference[b] - log_prob(other.logits(), b, step) + log_prob(reference.logits(), b, step)
                    )
        sigma = torch.sigmoid(0.3 * torch.stack(difference))
        return (-(1 - smoothing) * sigma.log() - smoothing * (1 - sigma).log()).mean()

    compare(ours, plain, student, teacher, dtype)


@each_kind
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_speculative_kd(name: str, kind: str) -> None:
    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        terms = []
        for b, t in STEPS:
            q, p = student[b, t].softmax(-1), teacher[b, t].softmax(-1)
            m = (p + q) / 2
            pairs = {"forward_kl": [(p, q)], "reverse_kl": [(q, p)], "jsd": [(p, m), (q, m)]}[name]
            terms.append(sum((x * (x / y).log()).sum() for x, y in pairs) / len(pairs))
        return torch.stack(terms).mean()

    loss = losses.SpeculativeKD(name)
    compare(
        lambda s, t: loss(s, t, MASK),
        plain,
        Model.make(kind, (3, 6), V, 1),
        Model.make(kind, (3, 6), V, 5),
        torch.float64,
    )


@each_kind
@pytest.mark.parametrize("top_p", [None, 0.5])
def test_speculative_acceptance(top_p: float | None, kind: str) -> None:
    model = Model.make(kind, (3, 6), V, 5)
    teacher = model.to(torch.float32)
    proposed = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(1))
    found = on_policy.speculative_acceptance(
        teacher.source(), proposed, 3, temperature=0.8, top_p=top_p, generator=torch.Generator().manual_seed(2)
    )
    top = model.logits().topk(3, -1).indices
    assert torch.equal(found.accepted, (top == proposed.unsqueeze(-1)).any(-1))
    assert 0 < found.accepted.sum() < 18
    assert torch.equal(found.token_ids[found.accepted], proposed[found.accepted])
    if top_p is not None:
        p = torch.softmax(model.logits() / 0.8, -1)
        ordered, ids = p.sort(-1, descending=True)
        nucleus = ids.masked_fill(ordered.cumsum(-1) - ordered >= top_p, -1)
        drawn = found.token_ids.unsqueeze(-1)
        assert bool((nucleus == drawn).any(-1)[~found.accepted].all())


def test_draws_follow_the_teacher() -> None:
    teacher = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(4000, 4)
    proposed = torch.full((4000,), 3)
    for top_p, expected in ((None, [0.5, 0.3, 0.2]), (0.7, [0.625, 0.375, 0.0])):
        found = on_policy.speculative_acceptance(
            teacher, proposed, 2, top_p=top_p, generator=torch.Generator().manual_seed(0)
        )
        assert not found.accepted.any()
        shares = found.token_ids.bincount(minlength=4)[:3] / 4000
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.03)


def test_choice_of_data() -> None:
    generator = torch.Generator().manual_seed(0)
    share = sum(on_policy.use_student_data(0.3, generator=generator) for _ in range(2000)) / 2000
    assert abs(share - 0.3) < 0.04
    assert not any(on_policy.use_student_data(0.0) for _ in range(20))
    assert all(on_policy.use_student_data(1.0) for _ in range(20))


def test_generalized_jsd() -> None:
    assert on_policy.generalized_jsd(0) == kd.ForwardKL()
    assert on_policy.generalized_jsd(1.0) == kd.ReverseKL()
    assert on_policy.generalized_jsd(0.3) == kd.JSD(0.3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: on_policy.predicted(IDS[0]), ValueError, r"token_ids must have the shape \[B, T\]"),
        (lambda: on_policy.predicted(IDS, MASK[:, :3]), ValueError, "mask must have the shape"),
        (lambda: on_policy.rewards_to_go(torch.zeros(2, 3), MASK), ValueError, "counted must have the shape"),
        (lambda: on_policy.rewards_to_go(torch.zeros(3, 6), MASK, gamma=1.5), ValueError, "gamma must be in"),
        (lambda: on_policy.log_mixture(torch.zeros(2), torch.zeros(2), 2.0), ValueError, "share must be in"),
        (
            lambda: on_policy.speculative_acceptance(torch.zeros(2, 4), torch.zeros(2).long(), 0),
            ValueError,
            "k must be",
        ),
        (lambda: on_policy.use_student_data(1.5), ValueError, "fraction must be in"),
        (lambda: losses.MiniLLM(mixture=-0.1), ValueError, "mixture must be between"),
        (lambda: losses.MiniLLM()(torch.zeros(3, 6, V), torch.zeros(3, 6, V), IDS[:2], MASK), ValueError, "token_ids"),
        (lambda: losses.TeacherDPO(label_smoothing=0.5), ValueError, "label_smoothing must be in"),
        (lambda: losses.SpeculativeKD("tvd"), ValueError, "divergence must be one of"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_registered() -> None:
    assert losses.get("minillm") is losses.MiniLLM
    assert losses.get("speculative_kd") is losses.SpeculativeKD

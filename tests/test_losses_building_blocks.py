"""Adaptive KL, standardised logits, learned temperature, correlations and losses of sigmoids, against formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from loss_cases import Model, compare, copy, each_kind, each_precision, noise
from torch import Tensor
from torch.nn import functional as F

import kdkernels as kd
from kdkernels.losses import building_blocks

BATCH, VOCAB = (5,), 37


def models(kind: str) -> tuple[Model, Model]:
    return Model.make(kind, BATCH, VOCAB, 0), Model.make("logits", BATCH, VOCAB, 7)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def in_head(p: Tensor, mass: float) -> Tensor:
    """bool [N, V]: ids whose falling cumulative probability is at most ``mass``, and the first."""
    head = torch.zeros_like(p, dtype=torch.bool)
    for row in range(len(p)):
        total = 0.0
        for place, column in enumerate(p[row].argsort(descending=True).tolist()):
            total += float(p[row, column])
            head[row, column] = place == 0 or total <= mass
    return head


def ascending_head(p: Tensor, mass: float) -> Tensor:
    """As DSKD's code has it: ids whose rising cumulative probability is above ``mass``."""
    head = torch.zeros_like(p, dtype=torch.bool)
    for row in range(len(p)):
        total = 0.0
        for column in p[row].argsort().tolist():
            total += float(p[row, column])
            head[row, column] = total > mass
    return head


def plain_akl(
    student: Tensor, teacher: Tensor, head_of: Callable[[Tensor, float], Tensor], mass: float, tau: float
) -> Tensor:
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    gap, head = (p - q).abs().detach(), head_of(p, mass)
    w = (gap * head).sum(-1) / gap.sum(-1)
    return (w * kl(p, q) + (1 - w) * kl(q, p)).mean()


@each_precision
@each_kind
def test_akl(kind: str, dtype: torch.dtype) -> None:
    loss = kd.losses.AKL(0.6, temperature=1.5)
    compare(loss, lambda s, t: plain_akl(s, t, in_head, 0.6, 1.5), *models(kind), dtype)


def test_akl_of_the_other_head() -> None:
    loss = kd.losses.AKL(0.3, head="ascending")
    compare(loss, lambda s, t: plain_akl(s, t, ascending_head, 0.3, 1.0), *models("logits"), torch.float64)


def test_akl_where_both_agree_and_under_a_mask() -> None:
    logits, mask = noise(*BATCH, VOCAB, seed=0), torch.tensor([True, False, True, True, False])
    student = copy(logits)
    assert float(kd.losses.AKL()(student, logits).detach()) == pytest.approx(0, abs=1e-12)
    other = noise(*BATCH, VOCAB, seed=1)
    torch.testing.assert_close(kd.losses.AKL()(student, other, mask=mask), kd.losses.AKL()(student[mask], other[mask]))


def plain_standardised(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    log_q = (student / (student.std(-1, keepdim=True) * tau)).log_softmax(-1)
    p = (teacher / (teacher.std(-1, keepdim=True) * tau)).softmax(-1)
    return (p * (p.log() - log_q)).sum(-1).mean()


@each_precision
@each_kind
def test_logit_std(kind: str, dtype: torch.dtype) -> None:
    loss = kd.losses.LogitStd(1.7, weight=9.0)
    compare(loss, lambda s, t: 9 * 1.7**2 * plain_standardised(s, t, 1.7), *models(kind), dtype)


def test_logit_std_in_blocks_and_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building_blocks, "BLOCK_BYTES", 2 * 8 * VOCAB)  # two rows
    compare(kd.losses.LogitStd(), lambda s, t: 4 * plain_standardised(s, t, 2.0), *models("logits"), torch.float64)
    student, teacher = (model.logits() for model in models("logits"))
    mask = torch.tensor([True, False, True, True, False])
    found = kd.losses.LogitStd()(student, teacher, mask=mask)
    torch.testing.assert_close(found, 4 * plain_standardised(student[mask], teacher[mask], 2.0))
    spoilt = [logits.detach().masked_fill(~mask.unsqueeze(-1), torch.nan) for logits in (student, teacher)]
    again = kd.losses.LogitStd()(spoilt[0].requires_grad_(), spoilt[1], mask=mask)
    again.backward()
    torch.testing.assert_close(again, found)
    assert spoilt[0].grad is not None
    assert spoilt[0].grad[mask].abs().amax(-1).min() > 0
    assert not spoilt[0].grad[~mask].any()


def test_logit_std_twice_backward_and_in_half_precision() -> None:
    student, teacher = copy(noise(*BATCH, VOCAB, seed=0), torch.float32), noise(*BATCH, VOCAB, seed=1).float()
    loss = kd.losses.LogitStd()(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, student)[0], first)
    half = copy(student, torch.bfloat16)
    kd.losses.LogitStd()(half, teacher).backward()
    assert half.grad is not None
    torch.testing.assert_close(half.grad.float(), first, rtol=0, atol=0.05 * float(first.abs().max()))


def test_mix_kd_std() -> None:
    generator = torch.Generator().manual_seed(3)
    labels, others = torch.randint(VOCAB, (2, *BATCH), generator=generator).unbind()
    mixing = torch.rand(BATCH, generator=generator, dtype=torch.float64)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = (student / student.std(-1, keepdim=True)).log_softmax(-1)
        target = mixing[:, None] * F.one_hot(labels, VOCAB) + (1 - mixing[:, None]) * F.one_hot(others, VOCAB)
        return 0.9 * plain_standardised(student, teacher, 1.0) - 0.1 * (target * log_q).sum(-1).mean()

    loss = kd.losses.MixKDStd()
    compare(lambda s, t: loss(s, t, labels, others, mixing), plain, *models("logits"), torch.float64)


@each_precision
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_ctkd(kind: str, dtype: torch.dtype) -> None:
    student, teacher = models("logits")
    if kind == "head":
        student, teacher = (Model.make("head", BATCH, VOCAB, seed) for seed in (0, 5))
    theta = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)

    def sources(model: Model) -> kd.LMHead | Tensor:
        return model.leaves[0] if kind == "logits" else kd.LMHead(*model.leaves, logit_scale=0.8)

    def logits(model: Model) -> Tensor:
        return model.logits() if kind == "logits" else 0.8 * (model.leaves[0] @ model.leaves[1].T + model.leaves[2])

    loss = kd.losses.CTKD(0.25, loops=10).to(dtype)
    loss.set_loop(4)
    strength = (1 - math.cos(0.4 * math.pi)) / 2
    mine = student.to(dtype)
    found = loss(sources(mine), sources(Model([leaf.to(dtype) for leaf in teacher.leaves])))
    found.backward()
    true = student.to(torch.float64)
    tau = 1 + 20 * torch.sigmoid(theta)
    expected = tau**2 * kl((logits(teacher) / tau).softmax(-1), (logits(true) / tau).softmax(-1)).mean()
    expected.backward()
    tolerance = 5e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    assert theta.grad is not None
    assert loss.theta.grad is not None
    torch.testing.assert_close(loss.theta.grad.double(), -strength * theta.grad, rtol=10 * tolerance, atol=0)
    for ours, right in zip(mine.leaves, true.leaves, strict=True):
        assert ours.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(
            ours.grad.double(), right.grad, rtol=0, atol=tolerance * float(right.grad.abs().max())
        )


def test_ctkd_curriculum_state_and_softcap() -> None:
    loss = kd.losses.CTKD()
    strengths = []
    for loop in (0, 5, 10, 30):
        loss.set_loop(loop)
        strengths.append(float(loss.strength))
    assert strengths == pytest.approx([0, 0.5, 1, 1])
    other = kd.losses.CTKD(theta=-2.0)
    other.load_state_dict(loss.state_dict())
    assert other.theta.item() == 1.0
    assert other.loop.item() == 30
    head = kd.LMHead(torch.zeros(2, 3), torch.zeros(4, 3), softcap=5.0)
    with pytest.raises(ValueError, match="softcap"):
        loss(head, torch.zeros(2, 4))


def pearson(x: Tensor, y: Tensor, eps: float) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm() + eps)


@each_precision
@each_kind
def test_dist(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building_blocks, "BLOCK_BYTES", 2 * 8 * VOCAB)
    loss = kd.losses.DIST(1.3, 0.7, temperature=2.0, eps=1e-3)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
        rows = torch.stack([pearson(q[n], p[n], 1e-3) for n in range(len(q))])
        columns = torch.stack([pearson(q[:, v], p[:, v], 1e-3) for v in range(VOCAB)])
        return 4 * (1.3 * (1 - rows.mean()) + 0.7 * (1 - columns.mean()))

    compare(loss, plain, *models(kind), dtype)


def binary_kl(b: Tensor, a: Tensor) -> Tensor:
    return b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log()


@each_precision
@pytest.mark.parametrize("form", ["half", "plain"])
def test_dhkd(form: str, dtype: torch.dtype) -> None:
    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        if form == "plain":
            value = binary_kl(torch.sigmoid(teacher / 2), torch.sigmoid(student / 2))
        else:
            value = binary_kl(torch.full_like(student, 0.5), torch.sigmoid((student - teacher) / 2))
        return 0.1 * 4 * value.sum(-1).mean()

    compare(kd.losses.DHKD(weight=0.1, form=form), plain, *models("head"), dtype)


@each_precision
def test_multi_aspect(dtype: torch.dtype) -> None:
    labels, aspects = torch.tensor([0, 3, 29, 11, 7]), torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    loss = kd.losses.MultiAspectKD(30, weight=0.4)

    def plain(student: Tensor, _: Tensor) -> Tensor:
        hard = -student[:, :30].log_softmax(-1)[torch.arange(5), labels].mean()
        a, b = torch.sigmoid(student[:, 30:]), aspects.double()
        return hard - 0.4 * (b * a.log() + (1 - b) * (1 - a).log()).mean()

    compare(lambda s, _: loss(s, aspects.to(dtype), labels), plain, *models("logits"), dtype)


@pytest.mark.parametrize("fill", ["last_mean", "zero", "half_least", 1 / 527])
def test_ced(fill: str | float) -> None:
    scores, ids = torch.rand(5, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64).topk(4)
    least = scores.amin(-1, keepdim=True)
    rest = {"last_mean": least / (VOCAB - 4), "zero": 0 * least, "half_least": least / 2}
    target = (
        (rest[fill] if isinstance(fill, str) else torch.full_like(least, fill)).repeat(1, VOCAB).scatter(1, ids, scores)
    )

    def plain(student: Tensor, _: Tensor) -> Tensor:
        a = torch.sigmoid(student)
        return -(target * a.log() + (1 - target) * (1 - a).log()).mean()

    loss = kd.losses.CED(fill)
    compare(lambda s, _: loss(s, ids, scores), plain, *models("head"), torch.float64)


def test_ced_random_fill_stays_below_the_stored_scores() -> None:
    student, ids = copy(noise(5, VOCAB, seed=0)), torch.arange(4).repeat(5, 1)
    scores = torch.full((5, 4), 0.8, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = kd.losses.CED("random")(student, ids, scores)
    torch.manual_seed(0)
    fill = 0.8 * torch.rand(5, dtype=torch.float64)
    target = fill[:, None].repeat(1, VOCAB).scatter(1, ids, scores)
    torch.testing.assert_close(drawn, F.binary_cross_entropy_with_logits(student, target), rtol=1e-6, atol=0)


def test_refused() -> None:
    with pytest.raises(ValueError, match="mass must be in"):
        kd.losses.AKL(1.5)
    with pytest.raises(ValueError, match="fill must be one of"):
        kd.losses.CED(2.0)
    with pytest.raises(ValueError, match="same shape"):
        kd.losses.DIST()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="student and aspects"):
        kd.losses.MultiAspectKD(5)(torch.zeros(2, 7), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))

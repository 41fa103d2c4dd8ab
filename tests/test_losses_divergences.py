"""Losses of dense teachers against plain formulas in float64, and TAID's schedule against a sequence worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from loss_cases import Model, compare, copy, noise
from torch import Tensor

import kdkernels as kd
from kdkernels.losses.targets import label_mixed

TOKENS, VOCAB = 5, 37
LABELS = torch.tensor([3, -100, 36, 0, 7])
MASK = torch.tensor([True, True, False, True, True])
COUNTED = LABELS != -100
OTHERS = [2 * noise(TOKENS, VOCAB, seed=seed) for seed in (70, 71, 72)]
SPANS = torch.tensor([[0, 0, 0, 1, -1]])

Formula = Callable[[Tensor, Tensor], Tensor]


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    scaled = logits / temperature
    top = scaled.amax(-1, keepdim=True)
    return scaled - top - (scaled - top).exp().sum(-1, keepdim=True).log()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def mean(rows: Tensor, counted: Tensor = COUNTED) -> Tensor:
    return rows[counted].sum() / counted.sum()


def ce(student: Tensor) -> Tensor:
    log_q = log_softmax(student)
    return -sum((log_q[row, label] for row, label in enumerate(LABELS.tolist()) if label >= 0), torch.zeros(())) / 4


def mixed(log_p: Tensor, weight: float) -> Tensor:
    """``weight e_y + (1 - weight) p``."""
    p = (1 - weight) * log_p.exp()
    for row, label in enumerate(LABELS.tolist()):
        p[row, max(label, 0)] += weight
    return p.log()


def interpolated(s: Tensor, t: Tensor) -> Tensor:
    log_p = log_softmax(0.6 * s.detach() + 0.4 * t)
    return -mean((log_p.exp() * log_softmax(s)).sum(-1), MASK)


def jsd(s: Tensor, t: Tensor) -> Tensor:
    log_p, log_q = log_softmax(t, 2.0), log_softmax(s, 2.0)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    return mean(0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m))


def delta(s: Tensor, t: Tensor) -> Tensor:
    target = OTHERS[0] + 0.7 * (t - OTHERS[1])
    return 0.4 * ce(s) + 0.6 * 4 * mean(kl(log_softmax(target, 2.0), log_softmax(s, 2.0)))


def self_evolution(s: Tensor, t: Tensor) -> Tensor:
    log_r, log_q = mixed(log_softmax(t, 1.5), 0.4), log_softmax(s, 1.5)
    easy = kl(log_r, log_q)
    hard = kl(log_r, (0.75 * log_q.exp() + 0.25 * log_r.exp()).log())
    difficult = easy.detach() > 1.6
    assert 0 < int(difficult[COUNTED].sum()) < 4
    return mean(torch.where(difficult, hard, easy))


def swap(s: Tensor, t: Tensor) -> Tensor:
    swapped = t.clone()
    for row, label in enumerate(LABELS.tolist()):
        if label >= 0:
            best = int(t[row].argmax())
            swapped[row, best], swapped[row, label] = t[row, label], t[row, best]
    return ce(s) + 0.3 * mean(kl(log_softmax(swapped), log_softmax(s)))


def balanced(s: Tensor, t: Tensor) -> Tensor:
    log_p, log_q = log_softmax(t, 4.0), log_softmax(s, 4.0)
    sure = (-(log_p.exp() * log_p).sum(-1) > -(log_q.exp() * log_q).sum(-1)).double().detach()
    assert 0 < float(sure[COUNTED].sum()) < 4
    rows = (1 + sure) * kl(log_p, log_q) + (2 - sure) * kl(log_q, log_p)
    return ce(s) + 0.5 * 16 * mean(rows)


def squares(s: Tensor, t: Tensor) -> Tensor:
    q, p, truth = log_softmax(s).exp(), log_softmax(t).exp(), torch.zeros(TOKENS, VOCAB, dtype=torch.float64)
    for row, label in enumerate(LABELS.tolist()):
        truth[row, max(label, 0)] = 1
    return mean((0.6 * (q - truth).square() + 0.4 * (q - p).square()).mean(-1))


def clipped(s: Tensor, t: Tensor) -> Tensor:
    lower = torch.linspace(-1, 0, TOKENS).double().unsqueeze(-1)
    value = 0.5 * ce(s) + mean(kl(log_softmax(t.clamp(min=lower, max=torch.tensor(1.5))), log_softmax(s)))
    q, p = log_softmax(s).exp(), log_softmax(t).exp()
    spans = [((q[i] * q[i + 1] - p[i] * p[i + 1]) ** 2).sum() for i in (0, 1)]
    return value + 3.0 * (spans[0].sqrt() + spans[1].sqrt()) / 2


def experts(s: Tensor, t: Tensor) -> Tensor:
    log_q = log_softmax(s, 2.0)
    return sum((mean(kl(log_q, log_softmax(each, 2.0)), MASK) for each in (t, *OTHERS)), torch.zeros(())) / 4


def ensemble(s: Tensor, t: Tensor) -> Tensor:
    p = sum((log_softmax(each).exp() for each in (t, *OTHERS[:2])), torch.zeros(())) / 3
    return -mean((p * log_softmax(s)).sum(-1), MASK)


LOWER = torch.linspace(-1, 0, TOKENS)

LOSSES: dict[str, tuple[Callable[[Any, Any], Tensor], Formula]] = {
    "taid": (lambda s, t: kd.losses.TAID(10)(s, t, mask=MASK), interpolated),
    "gkd": (lambda s, t: kd.losses.GKD(0.3, temperature=2.0)(s, t, labels=LABELS), jsd),
    "gkd, beta 0": (
        lambda s, t: kd.losses.GKD(0.0)(s, t, mask=MASK),
        lambda s, t: mean(kl(log_softmax(t), log_softmax(s)), MASK),
    ),
    "gkd, beta 1": (
        lambda s, t: kd.losses.GKD(1.0)(s, t, mask=MASK),
        lambda s, t: mean(kl(log_softmax(s), log_softmax(t)), MASK),
    ),
    "promptkd": (
        lambda s, t: kd.losses.PromptKD()(s, t, mask=MASK),
        lambda s, t: mean(kl(log_softmax(s), log_softmax(t)), MASK),
    ),
    "promptkd, the prompt's": (
        lambda s, t: kd.losses.PromptKD(2.0).prompt_loss(s, t, OTHERS[0].to(dtype_of(s)), 0.25, mask=MASK),
        lambda s, t: mean(
            kl(log_softmax(s), log_softmax(t)) + 0.75 * 2 * kl(log_softmax(s), log_softmax(OTHERS[0])), MASK
        ),
    ),
    "delta_kd": (
        lambda s, t: kd.losses.DeltaKD(0.7, 0.4, temperature=2.0, temperature_squared=True)(
            s, OTHERS[0].to(dtype_of(s)), t, OTHERS[1].to(dtype_of(s)), LABELS
        ),
        delta,
    ),
    "self_evolution_kd": (
        lambda s, t: kd.losses.SelfEvolutionKD(0.4, 1.6, 0.25, temperature=1.5)(s, t, LABELS),
        self_evolution,
    ),
    "mix_cpt_lssd": (lambda s, t: kd.losses.LSSD()(s, t, LABELS), swap),
    "bd_kd": (lambda s, t: kd.losses.BDKD(0.5, temperature_squared=True)(s, t, LABELS), balanced),
    "bd_kd, the teacher's": (
        lambda s, t: kd.losses.BDKD(0.5, temperature=1.0).teacher_loss(s, t, LABELS),
        lambda s, t: ce(s) + 0.5 * mean(kl(log_softmax(s), log_softmax(t))),
    ),
    "every_expert_matters": (
        lambda s, t: kd.losses.ExpertAugmentation(temperature=2.0, exact_value=True)(
            s, [t, *(other.to(dtype_of(s)) for other in OTHERS)], mask=MASK
        ),
        experts,
    ),
    "dac_kl": (
        lambda s, t: kd.losses.DACKL(3.0, 0.5, norm=True)(
            batched(s), batched(t), LABELS[None], lower=LOWER[None], upper=1.5, spans=SPANS
        ),
        clipped,
    ),
    "pesf_kd": (
        lambda s, t: kd.losses.PESFKD()(s, t, LABELS),
        lambda s, t: 0.1 * ce(s) + 0.9 * 16 * mean(kl(log_softmax(t, 4.0), log_softmax(s, 4.0))),
    ),
    "pesf_kd, the teacher's": (
        lambda s, t: kd.losses.PESFKD().teacher_loss(s, t, LABELS),
        lambda s, t: ce(s) + 16 * mean(kl(log_softmax(t, 4.0), log_softmax(s, 4.0))),
    ),
    "pesf_kd, labels alone": (lambda s, t: kd.losses.PESFKD(0.0)(s, t, LABELS), lambda s, _: ce(s)),
    "even_your_teacher": (lambda s, t: kd.losses.GroundTruthSelfDistillation(0.6)(s, t, LABELS), squares),
    "meal_v2": (
        lambda s, t: kd.losses.MEALV2()(s, [t, *(other.to(dtype_of(s)) for other in OTHERS[:2])], mask=MASK),
        ensemble,
    ),
}


def dtype_of(source: Any) -> torch.dtype:
    tensor = source.hidden if isinstance(source, kd.LMHead) else source
    assert isinstance(tensor, Tensor)
    return tensor.dtype


def batched(source: Any) -> Any:
    """One sequence of the tokens."""
    if isinstance(source, kd.LMHead):
        return kd.LMHead(
            source.hidden[None], source.weight, source.bias, softcap=source.softcap, logit_scale=source.logit_scale
        )
    return source[None]


@pytest.mark.parametrize(("kind", "dtype"), [("logits", torch.float64), ("head", torch.float32)])
@pytest.mark.parametrize("name", LOSSES)
def test_the_formula(name: str, kind: str, dtype: torch.dtype) -> None:
    ours, plain = LOSSES[name]
    compare(ours, plain, Model.make(kind, (TOKENS,), VOCAB, 2), Model.make(kind, (TOKENS,), VOCAB, 5), dtype)


def test_ctcd_teaches_both() -> None:
    small, large = copy(2 * noise(TOKENS, VOCAB, seed=1)), copy(2 * noise(TOKENS, VOCAB, seed=2))
    found = kd.losses.CTCD(0.5, 2.0, 0.25, 3.0, temperature=2.0)(small, large, LABELS)
    log_s, log_l = log_softmax(small, 2.0), log_softmax(large, 2.0)
    expected = 0.5 * ce(small) + 2 * mean(kl(log_l.detach(), log_s)) + 0.25 * ce(large)
    expected = expected + 3 * mean(kl(log_s.detach(), log_l))
    torch.testing.assert_close(found, expected)
    for mine, right in zip(
        torch.autograd.grad(found, [small, large]), torch.autograd.grad(expected, [small, large]), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_ff_g2m() -> None:
    student, teacher = copy(noise(6, 4, seed=1)), noise(6, 4, seed=2)
    edges = torch.tensor([[0, 1, 2, 3, 4, 4], [0, 2, 5, 3, 1, 0]])
    labels = torch.tensor([0, 3, -100, 1, -100, 2])
    found = kd.losses.FFG2M(0.1)(student, teacher, edges, labels)
    low, high, hard = [], [], []
    for i, j in edges.T.tolist():
        low.append(kl(log_softmax(teacher[j]), log_softmax(student[i])))
        if i != j:
            gaps = (teacher[i] - teacher[j]).abs(), (student[i] - student[j]).abs()
            high.append(kl(log_softmax(gaps[0], 1.5), log_softmax(gaps[1], 1.5)))
    for node, label in enumerate(labels.tolist()):
        if label >= 0:
            hard.append(-log_softmax(student[node])[label])
    expected = 0.1 * torch.stack(hard).mean() + 0.9 * (torch.stack(low).mean() + torch.stack(high).mean())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student)[0] for value in (found, expected)), rtol=1e-9, atol=1e-12
    )


def test_sla_sd() -> None:
    classes, turns = 3, 4
    single, joint = copy(noise(5, classes, seed=1)), copy(noise(5, turns, classes * turns, seed=2))
    labels = torch.tensor([0, 2, 1, 1, 0])
    found = kd.losses.SLASD(0.5, 4.0, temperature=2.0)(single, joint, labels)
    value = torch.zeros((), dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        for turn in range(turns):
            value = value - 4.0 / turns * log_softmax(joint[row, turn])[label * turns + turn]
        aggregate = torch.stack([joint[row, :, c * turns : (c + 1) * turns].diagonal().mean() for c in range(classes)])
        value = value - log_softmax(single[row])[label]
        value = value + 0.5 * 4 * kl(log_softmax(aggregate.detach(), 2.0), log_softmax(single[row], 2.0))
    torch.testing.assert_close(found, value / 5)
    for mine, right in zip(
        torch.autograd.grad(found, [single, joint]), torch.autograd.grad(value / 5, [single, joint]), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_lelp() -> None:
    classes, width, directions = 3, 7, 2
    embeddings, classifier = noise(60, width, seed=1), noise(classes, width, seed=2)
    labels = torch.arange(60) % classes
    module = kd.losses.LELP(classes, width, directions, beta=0.7, temperature=2.0, label_weight=0.5).double()
    module.fit(embeddings, labels, classifier, torch.Generator().manual_seed(0))
    for index in range(classes):
        own = embeddings[labels == index]
        along = (own - own.mean(0)) @ module.projections[index].T
        torch.testing.assert_close(along.std(0), torch.ones(directions, dtype=torch.float64))
        # What the classifier sees does not count, and the directions span the largest of what is left.
        assert float((module.projections[index] @ classifier.T).abs().max()) < 1e-9
        seen = torch.linalg.qr(classifier.T).Q
        rest = (own - own.mean(0)) - (own - own.mean(0)) @ seen @ seen.T
        main = torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -directions:]
        inside = module.projections[index] @ main
        torch.testing.assert_close(inside.square().sum(-1), module.projections[index].square().sum(-1))
    teacher, student = noise(5, classes, seed=3), copy(noise(5, classes * 2 * directions, seed=4))
    found = module(student, teacher, embeddings[:5], labels[:5])
    value = torch.zeros((), dtype=torch.float64)
    for row in range(5):
        p = []
        for c in range(classes):
            u = module.projections[c] @ (embeddings[row] - embeddings[labels == c].mean(0))
            p.append(log_softmax(teacher[row], 2.0)[c].exp() * log_softmax(torch.cat([u, -u]) / 0.7).exp())
        value = value - (torch.cat(p) * log_softmax(student[row], 2.0)).sum()
        by_class = log_softmax(student[row]).exp().view(classes, -1).sum(-1)
        value = value - 0.5 * by_class[labels[row]].log()
    torch.testing.assert_close(found, value / 5)
    torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (found, value / 5)))


def test_meal_v2_discriminator_has_one_sign() -> None:
    torch.manual_seed(0)
    module = kd.losses.MEALV2(VOCAB, 0.5).double()
    student, teachers = copy(noise(TOKENS, VOCAB, seed=1)), OTHERS[:2]
    found = module(student, teachers)
    assert module.discriminator is not None
    loss = torch.zeros((), dtype=torch.float64)
    for rows, truth in ((student, [1.0, 0.0]), ((teachers[0] + teachers[1]) / 2, [0.0, 1.0])):
        chance = torch.sigmoid(module.discriminator(rows))
        target = torch.tensor(truth, dtype=torch.float64)
        loss = loss - (target * chance.log() + (1 - target) * (1 - chance).log()).mean() / 2
    p = (log_softmax(teachers[0]).exp() + log_softmax(teachers[1]).exp()) / 2
    expected = -(p * log_softmax(student)).sum(-1).mean() + 0.5 * loss
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (found, expected)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_labels_in_the_target(weight: float) -> None:
    target = label_mixed(OTHERS[0], LABELS, weight, temperature=2.0)
    log_q = log_softmax(OTHERS[1], 2.0)
    found = kd.distillation_loss(OTHERS[1], target, kd.TVD(), temperature=2.0, labels=LABELS, reduction="none")
    expected = 0.5 * (mixed(log_softmax(OTHERS[0], 2.0), weight).exp() - log_q.exp()).abs().sum(-1)
    torch.testing.assert_close(found[COUNTED], expected[COUNTED], rtol=1e-9, atol=1e-9)


def test_taid_schedule_by_hand() -> None:
    schedule = kd.weighting.TAIDSchedule(100, 0.2, alpha=0.1, beta=0.5)
    losses = [4.0, 3.0, 3.5, 1.0, 0.5]
    schedule.update(torch.tensor(losses[0]))
    assert float(schedule.coefficient) == pytest.approx(0.2)  # the first step only keeps its loss
    share, momentum = 0.2, 0.0
    for step, (before, loss) in enumerate(pairwise(losses), start=1):
        momentum = 0.5 * momentum + 0.5 * (before - loss) / before
        risen = share + 0.1 / (1 + math.exp(-momentum)) * (1 - share)
        share = min(1.0, max(0.2 + 0.8 * step / 100, risen))
        schedule.update(torch.tensor(loss))
        assert float(schedule.coefficient) == pytest.approx(share, rel=1e-6)
    schedule.update(torch.tensor(0.5), step=90)
    assert float(schedule.coefficient) == pytest.approx(0.2 + 0.8 * 0.9, rel=1e-6)
    schedule.update(torch.tensor(0.5), step=100)
    assert float(schedule.coefficient) == 1.0


def test_taid_schedule_is_saved() -> None:
    first, second = kd.losses.TAID(50), kd.losses.TAID(50)
    for loss in (2.0, 1.5, 1.7):
        first.schedule.update(torch.tensor(loss))
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.schedule.update(torch.tensor(0.9))
    assert first.state_dict() == second.state_dict()
    assert set(first.state_dict()) == {
        f"schedule.{name}" for name in ("coefficient", "previous_loss", "momentum", "step")
    }


def test_taid_moves_its_schedule_only_in_training() -> None:
    module = kd.losses.TAID(10)
    student = copy(OTHERS[0])
    loss = module(student, OTHERS[1])
    assert float(module.schedule.previous_loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    module(student, OTHERS[1])
    risen = float(module.schedule.coefficient)
    assert risen > 0.4
    module.eval()
    module(student, OTHERS[1])
    assert float(module.schedule.coefficient) == risen


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: kd.weighting.TAIDSchedule(0), "total_steps must be positive"),
        (lambda: kd.weighting.TAIDSchedule(10, 0.9, 0.5), "0 <= start <= end <= 1"),
        (lambda: kd.weighting.TAIDSchedule(10).update(torch.zeros(2)), "loss must be 0-d"),
        (lambda: kd.losses.GKD(1.5), "beta must be between 0 and 1"),
        (lambda: kd.losses.DeltaKD()(*OTHERS, OTHERS[0]), "labels are needed"),
        (lambda: kd.losses.SelfEvolutionKD(proxy=1.0), "proxy must be at least 0"),
        (lambda: kd.losses.MEALV2(None, 1.0), "classes are needed"),
        (lambda: kd.losses.SLASD()(OTHERS[0], torch.zeros(5, 2, 3), LABELS), "joint must have the shape"),
    ],
)
def test_refusals(call: Callable[[], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call()

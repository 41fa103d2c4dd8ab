"""The losses of truncated teachers and the Medusa heads against their formulas, token by token in loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import TOLERANCES, Model, compare, copy, each_kind, each_precision, noise
from torch import Tensor

import kdkernels as kd
from kdkernels import losses
from kdkernels.losses.truncated import constant_logit_tail, log_probs_at

N, V, K = 5, 37, 3
LABELS = torch.tensor([3, 36, -100, 0, 7])


def entries(logits: Tensor, **options: Any) -> kd.TopKLogits:
    return kd.topk_logits(logits, K, **options)


@pytest.fixture(scope="module")
def topk() -> kd.TopKLogits:
    """Entries of each token, of which one has two, one none, and one begins with a gap."""
    found = entries(2 * noise(N, V, seed=9))
    ids, log_probs = found.ids.clone(), found.log_probs.clone()
    for token, place in ((1, 2), (3, 0), (4, 0), (4, 1), (4, 2)):
        ids[token, place], log_probs[token, place] = -1, -math.inf
    return kd.TopKLogits(ids, log_probs, vocab_size=V)


def named(topk: kd.TopKLogits, token: int) -> list[tuple[int, float]]:
    pairs = zip(topk.ids[token].tolist(), topk.log_probs[token].exp().tolist(), strict=True)
    return [(id_, p) for id_, p in pairs if id_ >= 0]


# --- FIRST --------------------------------------------------------------------------------------------------------------


def first_plain(
    student: Tensor, topk: kd.TopKLogits, c: float, linear: bool, bucket: bool, smoothing: float, mean: bool
) -> Tensor:
    values = []
    for token in range(N):
        pairs = named(topk, token)
        if not pairs:
            continue
        probs = torch.exp(student[token]) / torch.exp(student[token]).sum()
        p = [value for _, value in pairs]
        q = [probs[id_] for id_, _ in pairs]
        if bucket:
            p.append(1 - sum(p))
            q.append(1 - sum(q))
        sharp = [math.exp(value / c) for value in p]
        target = [(1 - smoothing) * value / sum(sharp) + smoothing / len(p) for value in sharp]
        shares = [value + 1e-6 for value in q] if linear else [torch.exp(value / 0.7) for value in q]
        values.append(
            sum(t * (math.log(t) - torch.log(share / sum(shares))) for t, share in zip(target, shares, strict=True))
        )
    total = torch.stack([torch.as_tensor(value) for value in values]).sum()
    return total / (len(values) if mean else N)


@each_precision
@each_kind
@pytest.mark.parametrize(
    ("linear", "bucket", "smoothing", "mean"),
    [(True, False, 0.0, False), (True, True, 0.1, True), (False, True, 0.0, True)],
)
def test_first(
    dtype: torch.dtype, kind: str, topk: kd.TopKLogits, linear: bool, bucket: bool, smoothing: float, mean: bool
) -> None:
    loss = losses.FIRST(
        0.3,
        normalisation="linear" if linear else "softmax",
        student_recalibration=0.7,
        bucket=bucket,
        label_smoothing=smoothing,
        reduction="mean" if mean else "batch",
    )
    student = Model.make(kind, (N,), V, seed=1)
    compare(
        lambda source, _: loss(source, topk),
        lambda s, _: first_plain(s, topk, 0.3, linear, bucket, smoothing, mean),
        student,
        Model.make("logits", (N,), V, seed=2),
        dtype,
    )


def test_first_is_calibrated_by_the_grid() -> None:
    """Labels drawn from ``softmax(p / 0.5)`` of the teacher's probabilities: the search finds about 0.5, and it is kept."""
    logits = 2.5 * noise(4000, 12, seed=3)
    topk = kd.topk_logits(logits, 5)
    target = (topk.log_probs.exp() / 0.5).softmax(-1)
    drawn = target.multinomial(1, generator=torch.Generator().manual_seed(4))
    first = losses.FIRST(1.7)
    found = first.fit(topk, topk.ids.gather(-1, drawn).squeeze(-1))
    assert 0.4 <= found <= 0.6
    other = losses.FIRST(1.0)
    other.load_state_dict(first.state_dict())
    assert float(other.recalibration) == found


def test_log_probs_at_are_those_of_the_softmax(topk: kd.TopKLogits) -> None:
    model = Model.make("head", (N,), V, seed=5).to(torch.float64)
    found = log_probs_at(model.source(), topk.ids)
    right = model.logits().log_softmax(-1).gather(-1, topk.ids.clamp(min=0)).masked_fill(topk.ids < 0, -math.inf)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_gradient_of_log_probs_at(topk: kd.TopKLogits) -> None:
    """The same again from the same graph, in the logits' dtype, and a second derivative."""
    student = copy(noise(N, V, seed=5), torch.bfloat16)
    kept = topk.ids >= 0
    total = log_probs_at(student, topk.ids).where(kept, 0).sum()
    grads = [torch.autograd.grad(total, student, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert grads[0].dtype == torch.bfloat16
    right = -kept.sum(-1, keepdim=True) * student.detach().double().softmax(-1)
    right = right.scatter_add(-1, topk.ids.clamp(min=0), kept.double())
    torch.testing.assert_close(grads[0].double(), right, rtol=0, atol=0.01 * float(right.abs().max()))
    exact = copy(noise(N, V, seed=5))
    torch.autograd.gradgradcheck(lambda logits: log_probs_at(logits, topk.ids)[kept], exact, fast_mode=True)


# --- pretraining distillation -------------------------------------------------------------------------------------------


def pretraining_plain(
    student: Tensor, topk: kd.TopKLogits, alpha: float, tau: float, objective: str, tau_s: float
) -> Tensor:
    terms, nll = [], []
    for token in range(N):
        label = int(LABELS[token])
        if label < 0:
            continue
        log_q = student[token].log_softmax(-1)
        nll.append(-log_q[label])
        pairs = named(topk, token)
        sharp = [p ** (1 / tau) for _, p in pairs]
        target = [value / sum(sharp) for value in sharp]
        log_q = (student[token] / tau_s).log_softmax(-1)
        value = torch.zeros((), dtype=torch.float64)
        for (id_, _), f in zip(pairs, target, strict=True):
            if objective == "mse":
                value = value + (f - log_q[id_].exp()) ** 2
            else:
                value = value + f * ((math.log(f) if objective == "kl" else 0.0) - log_q[id_])
        terms.append(value)
    return alpha * torch.stack(terms).mean() + (1 - alpha) * torch.stack(nll).mean()


@each_kind
@pytest.mark.parametrize(("objective", "tau_s"), [("nll", 1.0), ("kl", 1.5), ("mse", 1.0)])
def test_pretraining_distillation(kind: str, topk: kd.TopKLogits, objective: str, tau_s: float) -> None:
    loss = losses.PretrainingDistillation(0.3, temperature=0.6, student_temperature=tau_s, objective=objective)
    compare(
        lambda source, _: loss(source, topk, LABELS, alpha=0.8),
        lambda s, _: pretraining_plain(s, topk, 0.8, 0.6, objective, tau_s),
        Model.make(kind, (N,), V, seed=11),
        Model.make("logits", (N,), V, seed=2),
        torch.float64,
    )


def test_pretraining_distillation_cuts_teachers_itself() -> None:
    student, teacher = copy(noise(N, V, seed=1)), noise(N, V, seed=2)
    loss = losses.PretrainingDistillation(k=4, top_p=0.5)
    stored = kd.topk_logits(teacher, 4, top_p=0.5)
    torch.testing.assert_close(loss(student, teacher, LABELS), loss(student, stored, LABELS))
    torch.testing.assert_close(
        loss(student, kd.pack(stored, "q8"), LABELS), loss(student, stored, LABELS), rtol=0.01, atol=0.01
    )


def test_pretraining_distillation_with_alpha_at_its_ends(topk: kd.TopKLogits) -> None:
    student = copy(noise(N, V, seed=1))
    counted = LABELS >= 0
    nll = -student.log_softmax(-1).gather(-1, LABELS.clamp(min=0).unsqueeze(-1)).squeeze(-1)[counted].mean()
    for objective in ("nll", "kl", "mse"):
        loss = losses.PretrainingDistillation(objective=objective)
        torch.testing.assert_close(loss(student, topk, LABELS, alpha=0.0), nll, rtol=1e-9, atol=0)
        whole = loss(student, topk, LABELS, alpha=1.0)
        torch.testing.assert_close(whole, pretraining_plain(student, topk, 1.0, 1.0, objective, 1.0), rtol=1e-9, atol=0)


def test_pretraining_distillation_of_samples_is_unbiased() -> None:
    student, teacher = noise(2, 7, seed=1), noise(2, 7, seed=2)
    drawn = kd.sample_logits(teacher, 40000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    found = losses.PretrainingDistillation(alpha=1.0)(student, drawn, labels)
    right = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    assert abs(float(found - right)) < 0.02
    with pytest.raises(TypeError, match="'mse', got SampledLogits"):
        losses.PretrainingDistillation(objective="mse")(student, drawn, labels)


# --- uniform rest -------------------------------------------------------------------------------------------------------


def uniform_plain(student: Tensor, teacher: Tensor, form: str, weight: float, tau: float) -> Tensor:
    values = []
    for token in range(N):
        label = int(LABELS[token])
        if label < 0:
            continue
        p = (teacher[token] / tau).softmax(-1)
        kept = p.argsort(descending=True)[:K].tolist() if form == "topk" else [label]
        rho = torch.full_like(p, float((1 - p[kept].sum()) / (V - len(kept))))
        rho[kept] = p[kept]
        soft = -(rho * (student[token] / tau).log_softmax(-1)).sum()
        values.append((1 - weight) * -student[token].log_softmax(-1)[label] + weight * tau**2 * soft)
    return torch.stack(values).mean()


@each_precision
@each_kind
@pytest.mark.parametrize("form", ["topk", "label"])
def test_top_k_uniform(dtype: torch.dtype, kind: str, form: str) -> None:
    loss = losses.TopKUniform(0.7, temperature=3.0, form=form, k=K)
    compare(
        lambda s, t: loss(s, t, LABELS),
        lambda s, t: uniform_plain(s, t, form, 0.7, 3.0),
        Model.make(kind, (N,), V, seed=21),
        Model.make(kind, (N,), V, seed=31),
        dtype,
    )


# --- transitions --------------------------------------------------------------------------------------------------------


@each_precision
def test_transitions(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 5, -1], [0, 2, 36], [-1, -1, -1], [4, -1, 9]])
    counts = torch.tensor([[3.0, 1.0, 9.0], [2.0, 2.0, 8.0], [1.0, 1.0, 1.0], [5.0, 7.0, 0.0]], dtype=torch.float64)
    dense = torch.zeros(4, V, dtype=torch.float64)
    for row in range(4):
        for id_, count in zip(ids[row].tolist(), counts[row].tolist(), strict=True):
            if id_ >= 0:
                dense[row, id_] = count
    target = (dense / dense.amax(-1, keepdim=True).clamp(min=1e-24) / 0.2).softmax(-1)
    mask = torch.tensor([True, True, True, False])
    loss = losses.TransitionDistillation(0.4, temperature=0.2)
    compare(
        lambda source, _: loss(source, ids, counts.to(dtype), mask=mask),
        lambda s, _: 0.4 * -(target * (s / 0.2).log_softmax(-1)).sum(-1)[:3].mean(),
        Model.make("head", (4,), V, seed=41),
        Model.make("logits", (4,), V, seed=2),
        dtype,
    )


def test_constant_logit_tail_is_the_softmax() -> None:
    ids, logits = torch.tensor([[3, -1, 0]]), torch.tensor([[1.5, 9.0, -0.5]], dtype=torch.float64)
    found = constant_logit_tail(ids, logits, vocab_size=6, constant=0.3)
    right = torch.tensor([-0.5, 0.3, 0.3, 1.5, 0.3, 0.3], dtype=torch.float64).softmax(-1)
    assert found.log_tail_mass is not None
    torch.testing.assert_close(found.log_probs[0, [0, 2]].exp(), right[[3, 0]])
    torch.testing.assert_close(found.log_tail_mass.exp()[0], right[[1, 2, 4, 5]].sum())


# --- lexical prior ------------------------------------------------------------------------------------------------------


@each_kind
def test_lexical_prior(kind: str, topk: kd.TopKLogits) -> None:
    loss = losses.LexicalPrior(100, temperature=2.0)

    def plain(student: Tensor, weight: float) -> Tensor:
        values = []
        for token in range(N):
            label = int(LABELS[token])
            if label < 0:
                continue
            log_q = student[token].log_softmax(-1)
            soft = [p**0.5 for _, p in named(topk, token)]
            prior = sum(
                (f / sum(soft)) * (math.log(f / sum(soft)) - log_q[id_])
                for (id_, _), f in zip(named(topk, token), soft, strict=True)
            )
            values.append(weight * prior - (1 - weight) * log_q[label])
        return torch.stack(values).mean()

    for step, weight in ((0, 1.0), (9, math.log(5) / math.log(50)), (49, 0.0), (80, 0.0)):
        compare(
            lambda source, _, step=step: loss(source, topk, LABELS, step),
            lambda s, _, weight=weight: plain(s, weight),
            Model.make(kind, (N,), V, seed=51),
            Model.make("logits", (N,), V, seed=2),
            torch.float64,
        )


# --- Medusa -------------------------------------------------------------------------------------------------------------


@each_kind
def test_medusa_heads(kind: str) -> None:
    labels = torch.tensor([[5, 4, -100, 2, 1, 9], [7, 8, 9, 10, 11, -100]])
    heads = [Model.make(kind, (2, 6), V, seed=60 + 10 * k) for k in range(3)]
    mine, true = [head.to(torch.float64) for head in heads], [head.to(torch.float64) for head in heads]
    found = losses.MedusaHeads(0.2, decay=0.8)([head.source() for head in mine], labels, weight=0.5)
    total = torch.zeros((), dtype=torch.float64)
    for ahead, head in enumerate(true, 1):
        terms = [
            -head.logits()[b, t].log_softmax(-1)[labels[b, t + ahead + 1]]
            for b in range(2)
            for t in range(6)
            if t + ahead + 1 < 6 and labels[b, t + ahead + 1] >= 0
        ]
        total = total + 0.5 * 0.8**ahead * torch.stack(terms).mean()
    torch.testing.assert_close(found, total, rtol=1e-9, atol=0)
    found.backward()
    total.backward()
    for ours, right in zip(mine, true, strict=True):
        for one, other in zip(ours.leaves, right.leaves, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert float(other.grad.abs().max()) > 0
            size = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=TOLERANCES[torch.float64] * size)


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(topk: kd.TopKLogits) -> None:
    student = torch.zeros(N, V)
    with pytest.raises(ValueError, match="recalibration must be a positive finite number, got 0"):
        losses.FIRST(0)
    with pytest.raises(TypeError, match=r"teacher must be kd.TopKLogits or kd.PackedLogits, got Tensor"):
        losses.FIRST(1.0)(student, student)
    with pytest.raises(ValueError, match=r"ids must have the shape \(4, 3\) of the student's tokens"):
        losses.FIRST(1.0)(student[:4], topk)
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got 1\.5"):
        losses.PretrainingDistillation()(student, topk, LABELS, alpha=1.5)
    with pytest.raises(ValueError, match="student_temperature must be 1 with the objective 'mse', got 2"):
        losses.PretrainingDistillation(objective="mse", student_temperature=2.0)
    with pytest.raises(ValueError, match="form must be one of topk, label"):
        losses.TopKUniform(form="similarity")
    with pytest.raises(ValueError, match="ids and logits must have the same shape"):
        constant_logit_tail(LABELS, torch.zeros(4), vocab_size=9)
    with pytest.raises(ValueError, match="steps must be at least 3, got 2"):
        losses.LexicalPrior(2)
    with pytest.raises(ValueError, match="heads must hold at least one source"):
        losses.MedusaHeads()([], LABELS)

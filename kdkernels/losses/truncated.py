"""Losses from truncated, synthetic and sparse teachers: a few named entries per token, and what stands for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.arguments.rows import side
from kdkernels.checks import (
    check_choice,
    check_flag,
    check_floating,
    check_integer,
    check_integral,
    check_real,
    check_share,
)
from kdkernels.functional import distillation_loss, token_log_probs, topk_logits, unpack
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import IGNORED, counted_labels, detached, mean_over
from kdkernels.reference.rows import effective_logits
from kdkernels.sources import PackedLogits, SampledLogits, Source, SparseTeacher, TopKLogits
from kdkernels.weighting.schedules import LogarithmicDecay

__all__ = [
    "FIRST",
    "LexicalPrior",
    "PretrainingDistillation",
    "TopKUniform",
    "TransitionDistillation",
    "constant_logit_tail",
    "log_probs_at",
]


def with_tail(teacher: TopKLogits | PackedLogits, tail: str) -> TopKLogits:
    """The same entries under another policy for the rest."""
    if isinstance(teacher, PackedLogits):
        teacher = unpack(teacher)
    if not isinstance(teacher, TopKLogits):
        raise TypeError(f"teacher must be kd.TopKLogits or kd.PackedLogits, got {type(teacher).__name__}")
    return TopKLogits(
        teacher.ids,
        teacher.log_probs,
        vocab_size=teacher.vocab_size,
        tail=tail,
        temperature=teacher.temperature,
        log_tail_mass=teacher.log_tail_mass,
    )


def log_probs_at(source: Source, ids: Tensor, *, backend: str | None = None) -> Tensor:
    """``[..., K]``, differentiable: the log-probabilities of the ids, of which -1 gives -inf.

    One fused sweep for the normaliser and K logits per token: of an ``LMHead`` they are products with K rows of its weight,
    for which ``[..., K, H]`` numbers are made.
    """
    rows, shape, _ = side("student", source, None)
    if ids.shape[:-1] != shape:
        raise ValueError(
            f"ids must have the shape {(*shape, ids.shape[-1])} of the student's tokens, got {tuple(ids.shape)}"
        )
    flat = ids.reshape(-1, ids.shape[-1]).long()
    if rows.weight is None:
        found: Tensor = LogProbsAt.apply(rows.tensor, flat, backend)  # type: ignore[no-untyped-call]
        return found.reshape(ids.shape)
    places = flat.clamp(min=0)
    weights = rows.weight[places]
    logits = (weights @ rows.tensor.to(weights.dtype).unsqueeze(-1)).squeeze(-1)
    logits = (logits if rows.bias is None else logits + rows.bias[places]) * rows.scale
    logits = effective_logits(logits, rows.softcap, torch.promote_types(rows.tensor.dtype, torch.float32))
    known, labels = any_entry(flat)
    log_prob = token_log_probs(source, labels.reshape(shape), ignore_index=-1, backend=backend).reshape(-1, 1)
    return (logits - logits.gather(-1, known) + log_prob).masked_fill(flat < 0, -math.inf).reshape(ids.shape)


def any_entry(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The place ``[N, 1]`` of the first entry of each row there is, and its id ``[N]``, from which the normaliser is known."""
    known = (ids >= 0).int().argmax(-1, keepdim=True)
    return known, ids.gather(-1, known).squeeze(-1)


class LogProbsAt(torch.autograd.Function):
    """Of dense logits ``[N, V]``: the gradient of the normaliser's kernel gets the entries' part written into it, which
    spares a second gradient of the logits' size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, backend: str | None) -> Tensor:
        known, labels = any_entry(ids)
        named = effective_logits(
            logits.gather(-1, ids.clamp(min=0)), 0.0, torch.promote_types(logits.dtype, torch.float32)
        )
        with torch.enable_grad():
            # The same storage: a graph of its own, of the normaliser alone.
            ctx.leaf = logits.detach().requires_grad_(logits.requires_grad)
            ctx.log_prob = token_log_probs(ctx.leaf, labels, ignore_index=-1, backend=backend)
        ctx.save_for_backward(logits, ids)
        log_prob: Tensor = ctx.log_prob.detach().unsqueeze(-1)
        return (named - named.gather(-1, known) + log_prob).masked_fill(ids < 0, -math.inf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, ids = ctx.saved_tensors
        known, labels = any_entry(ids)
        grad = grad.masked_fill(ids < 0, 0)
        total = grad.sum(-1)
        if torch.is_grad_enabled():  # a second derivative is wanted: in plain PyTorch
            probs = effective_logits(logits, 0.0, grad.dtype).softmax(-1)
            dense = (-total.unsqueeze(-1) * probs).scatter_add(-1, ids.clamp(min=0), grad)
            return dense.to(logits.dtype), None, None
        (gradient,) = torch.autograd.grad(ctx.log_prob, ctx.leaf, total, retain_graph=True)
        # The kernel's has the whole of it at the one entry.
        grad = grad.scatter_add(-1, known, -total.unsqueeze(-1).masked_fill(labels.unsqueeze(-1) < 0, 0))
        return gradient.scatter_add_(-1, ids.clamp(min=0), grad.to(gradient.dtype)), None, None


def distilled_and_labelled(
    student: Source,
    teacher: SparseTeacher,
    labels: Tensor,
    share: float,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_squared: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``share KL + (1 - share) CE``, the mean over the tokens that count, in one sweep."""
    if share == 0:
        nll = -token_log_probs(student, labels, mask=mask, backend=backend)
        return mean_over(nll, counted_labels(labels, mask))
    loss = distillation_loss(
        student,
        teacher,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        labels=labels,
        mask=mask,
        ce_weight=(1 - share) / share,
        temperature_squared=temperature_squared,
        backend=backend,
    )
    return share * loss


def blank_rows(kept: Tensor) -> Tensor:
    """The same with rows of nothing kept whole: they are dropped later, and until then their softmax must be a number."""
    return kept | ~kept.any(-1, keepdim=True)


def entropy(log_probs: Tensor) -> Tensor:
    """``[...]``, of distributions ``[..., K]`` given by logarithms, some of which may be -inf."""
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0)).sum(-1)


def uniform_tail_entropy(teacher: TopKLogits) -> Tensor:
    """``[...]``, of a teacher that knows its tail and spreads it evenly."""
    assert teacher.log_tail_mass is not None
    rest = (teacher.vocab_size - (teacher.ids >= 0).sum(-1)).clamp(min=1)
    share = teacher.log_tail_mass - rest.to(teacher.log_tail_mass.dtype).log()
    return entropy(teacher.log_probs) - teacher.log_tail_mass.exp() * share.masked_fill(share == -math.inf, 0)


@register("first_topk")
class FIRST(nn.Module):
    """Distillation from a few recalibrated probabilities per token.

    The teacher's k largest probabilities (5 in the paper) are sharpened: ``p~ = softmax(p / c)`` of the PROBABILITIES, c
    found by calibration (``fit``). The student's probabilities of the same ids, full softmax first, are normalised either by
    their sum, ``q~ = (q + epsilon) / sum (q + epsilon)``, or ``q~ = softmax(q / c_S)``. The loss is the sum over the tokens of
    ``KL(p~ || q~)``, over the batch.

    Source: Shum et al. 2024 (EMNLP; arXiv 2408.12168). Confidence: from the authors' code; the search for c from
    summaries. Not copied: with the bucket the code takes probabilities for logarithms, and smooths log-probabilities; here
    both are what they are called.

    Args:
        recalibration: c, positive.
        normalisation: "linear" or "softmax", of the student.
        student_recalibration: c_S, with "softmax".
        bucket: whether all other ids are one more outcome, of probability ``1 - sum`` on either side.
        epsilon: with "linear".
        label_smoothing: mixes p~ with the uniform distribution over its outcomes; 0.1 in an option of the code.
        reduction: "batch", the sum over the tokens by the first dimension, as published, or "mean" over the tokens.
    """

    recalibration: Tensor

    def __init__(
        self,
        recalibration: float,
        *,
        normalisation: str = "linear",
        student_recalibration: float = 1.0,
        bucket: bool = False,
        epsilon: float = 1e-6,
        label_smoothing: float = 0.0,
        reduction: str = "batch",
    ) -> None:
        super().__init__()
        c = check_real("recalibration", recalibration, positive=True)
        self.register_buffer("recalibration", torch.tensor(c, dtype=torch.float64))
        self.normalisation = check_choice("normalisation", normalisation, ("linear", "softmax"))
        self.student_recalibration = check_real("student_recalibration", student_recalibration, positive=True)
        self.bucket = check_flag("bucket", bucket)
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.label_smoothing = check_real("label_smoothing", label_smoothing)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
        self.reduction = check_choice("reduction", reduction, ("batch", "mean"))

    def forward(self, student: Source, teacher: TopKLogits | PackedLogits, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[..., V]`` or ``kd.LMHead``.
            teacher: its largest entries ``[..., k]`` at temperature 1; the tail policy is not looked at.
            mask: bool ``[...]``, True where a token counts. Tokens without entries do not.
        """
        teacher = with_tail(teacher, "bucket")
        present = teacher.ids >= 0
        counted = present.any(-1) if mask is None else mask & present.any(-1)
        ids = teacher.ids.masked_fill(~counted.unsqueeze(-1), -1)
        target = self.target(teacher)
        q = self.outcomes(log_probs_at(student, ids).exp())
        kept = self.kept(present)
        if self.normalisation == "linear":
            q = (q + self.epsilon).masked_fill(~kept, 0)
            log_q = (q / q.sum(-1, keepdim=True).clamp(min=self.epsilon)).clamp(min=torch.finfo(q.dtype).tiny).log()
        else:
            log_q = (q / self.student_recalibration).masked_fill(~blank_rows(kept), -math.inf).log_softmax(-1)
        target = target.to(log_q.dtype)
        terms = torch.special.entr(target).neg() - target * log_q.masked_fill(~kept, 0)
        values: Tensor = terms.sum(-1).masked_fill(~counted, 0)
        if self.reduction == "mean":
            return mean_over(values, counted)
        return values.sum() / max(1, values.shape[0] if values.dim() else 1)

    def outcomes(self, probs: Tensor) -> Tensor:
        """With all other ids as the last."""
        if not self.bucket:
            return probs
        return torch.cat([probs, (1 - probs.sum(-1, keepdim=True)).clamp(min=0)], -1)

    def kept(self, present: Tensor) -> Tensor:
        return torch.cat([present, present.any(-1, keepdim=True)], -1) if self.bucket else present

    def target(self, teacher: TopKLogits, recalibration: float | None = None) -> Tensor:
        """p~ ``[..., k]``, or ``k + 1`` with the bucket; 0 where there is no entry."""
        c = self.recalibration if recalibration is None else recalibration
        kept = self.kept(teacher.ids >= 0)
        probs = self.outcomes(teacher.log_probs.double().exp())
        target = (probs / c).masked_fill(~blank_rows(kept), -math.inf).softmax(-1).masked_fill(~kept, 0)
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        smooth: Tensor = (1 - self.label_smoothing) * target + self.label_smoothing * kept.double() / count
        return smooth

    @torch.no_grad()
    def fit(
        self,
        teacher: TopKLogits | PackedLogits,
        labels: Tensor,
        *,
        lowest: float = 0.1,
        highest: float = 2.0,
        bins: int = 15,
    ) -> float:
        """Sets c to what calibrates the teacher best, and returns it: the least expected calibration error of its first
        choice, searched in steps of 0.1 and around the best in steps of 0.02.

        Args:
            teacher: its largest entries for held-out tokens ``[..., k]``.
            labels: the right ids ``[...]``; -100 drops a token.
            lowest, highest: what is searched.
            bins: of the confidence.
        """
        teacher = with_tail(teacher, "bucket")
        check_integral("labels", labels)
        counted = (labels != IGNORED) & (teacher.ids >= 0).any(-1)
        teacher = TopKLogits(teacher.ids[counted], teacher.log_probs[counted], vocab_size=teacher.vocab_size)
        labels = labels[counted].unsqueeze(-1)

        def error(c: float) -> float:
            confidence, place = self.target(teacher, c)[..., : teacher.ids.shape[-1]].max(-1)
            hit = (teacher.ids.gather(-1, place.unsqueeze(-1)) == labels).squeeze(-1).double()
            bin_of = (confidence * bins).long().clamp(max=bins - 1)
            gap = confidence.new_zeros(bins).index_add(0, bin_of, confidence - hit)
            return float(gap.abs().sum()) / max(1, len(hit))

        def search(low: float, high: float, step: float) -> float:
            count = int((high - low) / step + 1e-9) + 1
            return min((low + i * step for i in range(count)), key=error)

        coarse = search(lowest, highest, 0.1)
        c = search(max(0.02, coarse - 0.08), coarse + 0.08, 0.02)
        self.recalibration.fill_(c)
        return c


@register("pretraining_distillation")
class PretrainingDistillation(nn.Module):
    """Pretraining on stored logits: ``(1 - alpha) CE + alpha L`` with the teacher cut by top-p and then top-k.

    ``F = softmax(teacher / temperature)`` over the ids kept, the student over its full vocabulary, and L one of

    =======  ===============================================================
    "nll"    ``-sum_K F log q``
    "kl"     ``KL(F || q)``, the same gradient
    "mse"    ``sum_K (F - q)^2``, found much worse by the paper
    =======  ===============================================================

    ``alpha`` may change from step to step: constant, ``kd.weighting.Ramp`` or, best in the paper, a
    ``kd.weighting.WarmupStableDecay`` with a learning rate of the same form.

    Source: Peng et al. 2025 (ACL; arXiv 2410.16215). Confidence: from summaries; top-p, k and alpha from memory, which of
    the squared errors is meant was not available.

    Args:
        alpha: weight of L, from 0 to 1, if the call does not say otherwise.
        temperature: of the teacher; 0.5 to 1 did best.
        student_temperature: of the student.
        objective: see above.
        top_p, k: how a teacher that is not yet truncated is cut.
        backend: of the kernels.
    """

    def __init__(
        self,
        alpha: float = 0.9,
        *,
        temperature: float = 1.0,
        student_temperature: float = 1.0,
        objective: str = "nll",
        top_p: float = 0.95,
        k: int = 100,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_share("alpha", alpha)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.student_temperature = check_real("student_temperature", student_temperature, positive=True)
        self.objective = check_choice("objective", objective, ("nll", "kl", "mse"))
        if self.objective == "mse" and self.student_temperature != 1:
            raise ValueError(f"student_temperature must be 1 with the objective 'mse', got {student_temperature}")
        self.top_p = check_real("top_p", top_p, positive=True)
        self.k = check_integer("k", k)
        self.backend = backend

    def forward(
        self,
        student: Source,
        teacher: Source | SparseTeacher,
        labels: Tensor,
        *,
        alpha: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The mean over the tokens that count, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[..., V]`` or ``kd.LMHead``.
            teacher: ``kd.TopKLogits`` or ``kd.PackedLogits`` from a store, whatever their tail policy; ``kd.SampledLogits``,
                whose sums are unbiased (not with "mse"); or logits or a head, which are cut here.
            labels: ``[...]``, what is predicted at each token; -100 drops it.
            alpha: in place of that of the constructor.
            mask: bool ``[...]``, True where a token counts.
        """
        share = self.alpha if alpha is None else check_share("alpha", alpha)
        if not isinstance(teacher, (TopKLogits, PackedLogits, SampledLogits)):
            teacher = topk_logits(detached(teacher), self.k, top_p=self.top_p, backend=self.backend)
        if self.objective == "mse":
            return self.squared_error(student, teacher, labels, share, mask)
        target = teacher if isinstance(teacher, SampledLogits) else with_tail(teacher, "renormalize")
        loss = distilled_and_labelled(
            student,
            target,
            labels,
            share,
            temperature=self.student_temperature,
            teacher_temperature=self.temperature,
            mask=mask,
            backend=self.backend,
        )
        if self.objective == "kl" or share == 0:
            return loss
        if isinstance(target, SampledLogits):
            known = torch.zeros_like(labels, dtype=loss.dtype) if target.entropy is None else target.entropy
        else:
            known = entropy(self.renormalised(target))
        return loss + share * mean_over(known.to(loss.dtype), counted_labels(labels, mask))

    def renormalised(self, teacher: TopKLogits) -> Tensor:
        """log F ``[..., K]``, 0 entries where a token has none."""
        present = teacher.ids >= 0
        log_probs = teacher.log_probs.masked_fill(~present, 0) * (teacher.temperature / self.temperature)
        return log_probs.masked_fill(~blank_rows(present), -math.inf).log_softmax(-1).masked_fill(~present, -math.inf)

    def squared_error(
        self, student: Source, teacher: SparseTeacher, labels: Tensor, share: float, mask: Tensor | None
    ) -> Tensor:
        if isinstance(teacher, SampledLogits):
            raise TypeError(
                "teacher must be kd.TopKLogits or kd.PackedLogits with the objective 'mse', got SampledLogits"
            )
        target = with_tail(teacher, "renormalize")
        counted = counted_labels(labels, mask)
        q = log_probs_at(student, target.ids.masked_fill(~counted.unsqueeze(-1), -1)).exp()
        error = (self.renormalised(target).exp().to(q.dtype) - q).square().sum(-1)
        nll = -token_log_probs(student, labels, mask=mask, backend=self.backend)
        return share * mean_over(error, counted) + (1 - share) * mean_over(nll, counted)


@register("kd_topk_uniform")
class TopKUniform(nn.Module):
    """Knowledge distillation from part of what the teacher says, the rest spread evenly.

    ``(1 - weight) CE + weight T^2 SCE(rho, softmax(student / T))`` with a partial teacher rho: "topk" keeps the k largest
    of ``softmax(teacher / T)`` and spreads the rest over the other V - k ids; "label" keeps the probability of the label
    alone (KD-pt). The similarity of classes (KD-sim) is a teacher head of normalised weights, see the catalogue.

    Source: Tang et al. 2020 (arXiv 2002.03532). Confidence: general form, from memory.

    Args:
        weight: from 0 to 1.
        temperature: T, 3 to 5 in the paper.
        form: "topk" or "label".
        k: 10 to 50 in the paper.
        temperature_squared: the factor T^2.
        backend: of the kernels.
    """

    def __init__(
        self,
        weight: float = 0.9,
        *,
        temperature: float = 4.0,
        form: str = "topk",
        k: int = 10,
        temperature_squared: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_share("weight", weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.form = check_choice("form", form, ("topk", "label"))
        self.k = check_integer("k", k)
        self.temperature_squared = check_flag("temperature_squared", temperature_squared)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The mean over the labels that are not -100, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: ``[...]``.
        """
        target = self.target(detached(teacher), labels)
        loss = distilled_and_labelled(
            student,
            target,
            labels,
            self.weight,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            backend=self.backend,
        )
        known = uniform_tail_entropy(target)
        scale = self.weight * (self.temperature**2 if self.temperature_squared else 1.0)
        return loss + scale * mean_over(known.to(loss.dtype), counted_labels(labels, None))

    def target(self, teacher: Source, labels: Tensor) -> TopKLogits:
        _, _, vocab = side("teacher", teacher, None)
        if self.form == "topk":
            found = topk_logits(teacher, min(self.k, vocab), temperature=self.temperature, backend=self.backend)
            return with_tail(found, "uniform")
        kept = token_log_probs(teacher, labels, temperature=self.temperature, backend=self.backend).detach()
        return TopKLogits(
            labels.clamp(min=0).unsqueeze(-1),
            kept.unsqueeze(-1),
            vocab_size=vocab,
            tail="uniform",
            temperature=self.temperature,
            log_tail_mass=torch.log(-torch.expm1(kept)),
        )


def constant_logit_tail(ids: Tensor, logits: Tensor, *, vocab_size: int, constant: float = 0.0) -> TopKLogits:
    """The softmax of a vector of which few entries are named and all others are the same.

    Its closed form: with n ids named, ``Z = sum exp(logits) + (vocab_size - n) exp(constant)``; the tail of the result is
    "uniform", so the loss costs as much as any sparse teacher's.

    Args:
        ids: ``[..., K]``, each at most once per token; -1 where there is no entry.
        logits: ``[..., K]``.
        vocab_size: V.
        constant: the logit of every other id.
    """
    check_integral("ids", ids)
    check_floating("logits", logits)
    if ids.shape != logits.shape:
        raise ValueError(f"ids and logits must have the same shape, got {tuple(ids.shape)} and {tuple(logits.shape)}")
    present = ids >= 0
    named = logits.detach().double().masked_fill(~present, -math.inf)
    others = (vocab_size - present.sum(-1)).double().log() + check_real("constant", constant)
    total = torch.logaddexp(named.logsumexp(-1), others)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return TopKLogits(
        ids,
        (named - total.unsqueeze(-1)).to(dtype),
        vocab_size=vocab_size,
        tail="uniform",
        log_tail_mass=(others - total).to(dtype),
    )


@register("mqsa_ted")
class TransitionDistillation(nn.Module):
    """Transitions between items as a teacher of their embeddings in sequential recommendation.

    ``weight SCE(softmax((c / max c) / temperature), softmax(z / temperature))`` with the counts c of what followed the item
    at hand, most of them 0, and the inner products z of its embedding with those of all items. The target is a teacher whose
    tail is one constant logit, in closed form. It is added to the cross-entropy of the next item given the sequence.

    Source: Zhu et al. 2024 (WSDM; arXiv 2311.01056). Confidence: from the authors' code.

    Args:
        weight: of the term.
        temperature: of both sides.
        backend: of the kernels.
    """

    def __init__(self, weight: float = 0.1, *, temperature: float = 0.1, backend: str | None = None) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, items: Source, ids: Tensor, counts: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The mean over the positions, a 0-d tensor; the gradient flows to the embeddings.

        Args:
            items: ``kd.LMHead(embedding[item], embedding)`` of the items at hand ``[...]``, or logits ``[..., V]``.
            ids: items that followed, ``[..., K]``, each at most once per position; -1 where there is no entry.
            counts: how often, at least 0, floating point ``[..., K]``.
            mask: bool ``[...]``, True where a position counts.
        """
        _, shape, vocab = side("items", items, None)
        check_floating("counts", counts)
        known = counts.masked_fill(ids < 0, 0)
        scaled = known / known.amax(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny) / self.temperature
        target = constant_logit_tail(ids, scaled, vocab_size=vocab)
        loss = distillation_loss(
            items, target, temperature=self.temperature, teacher_temperature=1.0, mask=mask, backend=self.backend
        )
        counted = torch.ones(shape, dtype=torch.bool, device=ids.device) if mask is None else mask
        return self.weight * (loss + mean_over(uniform_tail_entropy(target).to(loss.dtype), counted))


@register("nat_lexical_prior")
class LexicalPrior(nn.Module):
    """A word-alignment dictionary as a teacher of non-autoregressive translation: ``w KL(Q || q) + (1 - w) CE``.

    Q is the dictionary's distribution over the few translations of the source word at each target token, softened by a
    temperature; ``w = log(I / (2 (i + 1))) / log(I / 2)`` at step i of I, which is 0 in the second half.

    Source: Ding et al. 2021 (ICLR; arXiv 2012.14583). Confidence: general form, from memory.

    Args:
        steps: I.
        temperature: of the prior.
        backend: of the kernels.
    """

    def __init__(self, steps: int, *, temperature: float = 2.0, backend: str | None = None) -> None:
        super().__init__()
        self.schedule = LogarithmicDecay(1.0, steps)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, student: Source, prior: TopKLogits | PackedLogits, labels: Tensor, step: int) -> Tensor:
        """The mean over the labels that are not -100, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[..., V]`` or ``kd.LMHead``.
            prior: the translations of each token and their log-probabilities ``[..., K]``, -1 where there is no entry; a
                token without any learns from its label alone.
            labels: ``[...]``.
            step: i, from 0.
        """
        return distilled_and_labelled(
            student,
            with_tail(prior, "renormalize"),
            labels,
            self.schedule.at(step),
            teacher_temperature=self.temperature,
            backend=self.backend,
        )

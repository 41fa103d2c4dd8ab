"""Losses that are divergences over the vocabulary from a dense teacher, or from a target made of several sources.

Unless said otherwise a loss is the mean over the tokens (or samples) that count, takes logits ``[..., V]`` or ``kd.LMHead``
on either side, detaches the teacher, and does not multiply by the squared temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kdkernels.arguments.rows import side
from kdkernels.checks import check_flag, check_floating, check_integer, check_real, check_share
from kdkernels.divergences import (
    JSD,
    ABDivergence,
    Divergence,
    ForwardKL,
    Jeffreys,
    ReverseKL,
    SkewForwardKL,
    SoftCrossEntropy,
)
from kdkernels.functional import distillation_loss, token_log_probs, token_statistics
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import counted_labels, detached, mean_over, tensor_of, with_tensor
from kdkernels.losses.targets import label_mixed, swapped_with_label
from kdkernels.reference.rows import composed_logits, side_logits
from kdkernels.sources import Coefficient, DenseTeacher, LMHead, LogitMixture, Source
from kdkernels.weighting.interpolation import TAIDSchedule
from kdkernels.weighting.token_weights import entropy_gap_weights

__all__ = [
    "BDKD",
    "CTCD",
    "DACKL",
    "FFG2M",
    "GKD",
    "LELP",
    "LSSD",
    "MEALV2",
    "PESFKD",
    "SLASD",
    "TAID",
    "DeltaKD",
    "ExpertAugmentation",
    "GroundTruthSelfDistillation",
    "PromptKD",
    "SelfEvolutionKD",
]


def counted_tokens(student: Source, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """How many tokens count, at least 1, as a 0-d tensor."""
    tensor = tensor_of("student", student)
    if labels is not None:
        counted = counted_labels(labels, mask)
    else:
        counted = torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device) if mask is None else mask
    return counted.sum().clamp(min=1)


def weighted_loss(
    student: Source,
    teacher: DenseTeacher,
    divergence: Divergence,
    soft: float,
    hard: float = 0.0,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The mean of ``soft D + hard CE`` in one sweep."""
    if hard and labels is None:
        raise ValueError("labels are needed for the cross-entropy")
    if soft == 0:
        if labels is None:
            raise ValueError("labels are needed where the weight of the divergence is 0")
        return hard * hard_loss(student, labels, mask, options.get("backend"))
    # By the normalizer rather than a factor on the result, which would cost a sweep over the gradient.
    count = counted_tokens(student, labels, mask).double() / soft
    return distillation_loss(
        student,
        teacher,
        divergence,
        labels=labels,
        mask=mask,
        ce_weight=hard / soft,
        normalizer=count,
        **options,
    )


def hard_loss(student: Source, labels: Tensor, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The mean cross-entropy of the labels that count, at temperature 1."""
    counted = counted_labels(labels, mask)
    return -mean_over(token_log_probs(student, labels, mask=mask, backend=backend), counted)


@register("taid")
class TAID(nn.Module):
    """Temporally adaptive interpolated distillation: a target that moves from the student to the teacher.

    ``L = mean SCE(p_c, q)`` with ``p_c = softmax((1 - c) sg(s) + c t)``, mixed as logits; c is the schedule's coefficient.
    In training mode every call moves the schedule by its loss. The value is the cross-entropy, as in the code, for the
    schedule feeds on it; it counts the entropy of the target, which the gradient does not.

    Source: Shing et al. 2025 (ICLR; arXiv 2501.16937). Confidence: from the authors' code.

    Args:
        schedule: of the share of the teacher, see ``kd.weighting.TAIDSchedule``; or its number of steps.
        backend: of the kernels.
    """

    def __init__(self, schedule: TAIDSchedule | int, *, backend: str | None = None) -> None:
        super().__init__()
        self.schedule = schedule if isinstance(schedule, TAIDSchedule) else TAIDSchedule(schedule)
        self.backend = backend

    def forward(
        self, student: Source, teacher: Source, *, mask: Tensor | None = None, step: int | None = None
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            student, teacher: logits ``[..., V]`` or heads.
            mask: bool ``[...]``, True where a token counts.
            step: of the training, for the schedule; None: the next one.
        """
        tensor = tensor_of("student", student)
        if self.schedule.coefficient.device != tensor.device:
            self.schedule.to(tensor.device)
        share = self.schedule.coefficient
        target = LogitMixture([student, teacher], [1 - share, share])
        loss = distillation_loss(student, target, SoftCrossEntropy(), mask=mask, backend=self.backend)
        if self.training:
            self.schedule.update(loss, step)
        return loss


@register("gkd")
class GKD(nn.Module):
    """Generalised knowledge distillation: the JSD between teacher and student, with beta on the teacher.

    ``L = mean JSD_beta(p, q)``; beta 0 stands for ``KL(p || q)`` and 1 for ``KL(q || p)``. The values jump there: JSD_beta
    itself vanishes as beta goes to 0, and JSD_beta / beta goes to the forward KL. That the student writes a share of the
    sequences (half of them, at a temperature of 0.9 that the loss does not see) is the training loop's part.

    Source: Agarwal et al. 2024 (ICLR; arXiv 2306.13649). Confidence: from another implementation (TRL).
    TRL's "batchmean" without labels divides by the sequences instead of the tokens; this does not.
    """

    def __init__(self, beta: float = 0.5, *, temperature: float = 1.0, backend: str | None = None) -> None:
        super().__init__()
        self.beta = check_share("beta", beta)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(
        self, student: Source, teacher: Source, *, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d, of logits ``[..., V]`` or heads; tokens whose label is -100 do not count."""
        divergence: Divergence = JSD(self.beta) if 0 < self.beta < 1 else ReverseKL() if self.beta else ForwardKL()
        return distillation_loss(
            student,
            detached(teacher),
            divergence,
            labels=labels,
            mask=mask,
            temperature=self.temperature,
            backend=self.backend,
        )


@register("promptkd")
class PromptKD(nn.Module):
    """A teacher with a soft prompt that learns to suit the student.

    The student's step: ``KL(q || p')`` with p' the teacher behind the prompt (``forward``). The prompt's step:
    ``KL(p' || q) + (1 - progress) regularization KL(p' || p)`` with p the teacher without it (``prompt_loss``). Each has an
    optimizer of its own and the other side constant; tokens of the prompt are sliced off beforehand. On text that the student
    wrote.

    Source: Kim et al. 2024 (Findings of EMNLP; arXiv 2402.12842). Confidence: from the authors' code, in its shipped setting
    (both divergences reverse, as seen from the side that learns).
    """

    def __init__(self, regularization: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        self.regularization = check_real("regularization", regularization)
        self.backend = backend

    def forward(self, student: Source, prompted: Source, *, mask: Tensor | None = None) -> Tensor:
        """The student's loss, 0-d, from logits ``[..., V]`` or heads."""
        return distillation_loss(student, detached(prompted), ReverseKL(), mask=mask, backend=self.backend)

    def prompt_loss(
        self, prompted: Source, student: Source, teacher: Source, progress: float = 0.0, *, mask: Tensor | None = None
    ) -> Tensor:
        """The prompt's loss, 0-d, with the gradient to ``prompted``; ``progress`` is the share of the training that is over."""
        options = {"mask": mask, "backend": self.backend}
        loss = distillation_loss(prompted, detached(student), ReverseKL(), **options)  # type: ignore[arg-type]
        factor = (1 - check_share("progress", progress)) * self.regularization
        return loss + weighted_loss(prompted, detached(teacher), ReverseKL(), factor, **options) if factor else loss  # type: ignore[arg-type]


@register("delta_kd")
class DeltaKD(nn.Module):
    """What fine-tuning changed in the teacher, added to the student as it was.

    ``L = label_weight CE + (1 - label_weight) KL(softmax(z / T) || softmax(s / T))`` with
    ``z = s_raw + alpha (t_tuned - t_raw)``, from three frozen models.

    Source: arXiv 2509.14526. Confidence: from summaries; alpha and label_weight are tuned there and have no known default.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        label_weight: float = 0.5,
        *,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        self.label_weight = check_share("label_weight", label_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.temperature_squared = check_flag("temperature_squared", temperature_squared)
        self.backend = backend

    def forward(
        self,
        student: Source,
        raw_student: Source,
        tuned_teacher: Source,
        raw_teacher: Source,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d, of logits ``[..., V]`` or heads; labels ``[...]`` unless their weight is 0, -100: does not count."""
        target = LogitMixture([raw_student, tuned_teacher, raw_teacher], [1.0, self.alpha, -self.alpha])
        return weighted_loss(
            student,
            target,
            ForwardKL(),
            1 - self.label_weight,
            self.label_weight,
            labels,
            mask,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            backend=self.backend,
        )


@register("self_evolution_kd")
class SelfEvolutionKD(nn.Module):
    """Hard tokens learn from a student that is helped a little by the target.

    The target is ``r = label_weight e_y + (1 - label_weight) p``. A token is hard where ``KL(r || q) > threshold``; there the
    loss is ``KL(r || (1 - b) q + b r)`` with b = ``proxy``, elsewhere ``KL(r || q)``. Which tokens are hard has no gradient.

    Source: Song et al. 2025 (COLING; arXiv 2412.15303). Confidence: from summaries; threshold and b are tuned there and have
    no known default.
    """

    def __init__(
        self,
        label_weight: float = 0.5,
        threshold: float = 1.0,
        proxy: float = 0.5,
        *,
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.label_weight = check_share("label_weight", label_weight)
        self.threshold = check_real("threshold", threshold)
        self.proxy = check_real("proxy", proxy)
        if not 0 <= self.proxy < 1:
            raise ValueError(f"proxy must be at least 0 and less than 1, got {proxy!r}")
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of logits ``[..., V]`` or heads and labels ``[...]``; -100: does not count."""
        tempered: dict[str, Any] = {"temperature": self.temperature, "backend": self.backend}
        target = label_mixed(teacher, labels, self.label_weight, **tempered)
        difficulty = token_statistics(student, target, labels, mask=mask, **tempered).forward_kl
        assert difficulty is not None
        share = self.proxy * (difficulty > self.threshold).to(difficulty.dtype)
        return distillation_loss(student, target, SkewForwardKL(share), labels=labels, mask=mask, **tempered)


@register("mix_cpt_lssd")
class LSSD(nn.Module):
    """Logit-swap self-distillation: the frozen initial model, whose best guess changes places with the label.

    ``L = CE + weight KL(softmax(t') || q)``, where t' is t with the logits of its largest entry and of the label exchanged.

    Source: Mix-CPT, Jiang et al. 2025 (ICLR; arXiv 2407.10804). Confidence: from another implementation, whose weight is 0.3
    and which does not leave out tokens without a label; this does.
    """

    def __init__(self, weight: float = 0.3, *, backend: str | None = None) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of logits ``[..., V]`` or heads and labels ``[...]``; -100: does not count."""
        target = swapped_with_label(teacher, labels, backend=self.backend)
        return weighted_loss(student, target, ForwardKL(), self.weight, 1.0, labels, mask, backend=self.backend)


@register("bd_kd")
class BDKD(nn.Module):
    """Balanced divergences: of each sample the divergence that the student needs more is emphasised.

    The student: ``CE + weight mean(a KL(p || q) + b KL(q || p))``, a = emphasis and b = 1 where the teacher's entropy is the
    larger (the student is too sure of itself), else the other way round. The teacher learns as well: ``teacher_loss`` is
    ``CE + weight KL(p || sg(q))``, its reverse divergence.

    Source: Amara et al. 2022 (arXiv 2212.12965). Confidence: from summaries; the emphasis of 2 and the temperature of 4 are
    not sure, and readings differ on the squared temperature.
    """

    def __init__(
        self,
        weight: float = 1.0,
        emphasis: float = 2.0,
        *,
        temperature: float = 4.0,
        temperature_squared: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_real("weight", weight, positive=True)
        self.emphasis = check_real("emphasis", emphasis, positive=True)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.temperature_squared = check_flag("temperature_squared", temperature_squared)
        self.backend = backend

    @property
    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
            "backend": self.backend,
        }

    def forward(self, student: Source, teacher: Source, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The student's loss, 0-d, of logits ``[..., V]`` or heads and labels ``[...]``; -100: does not count."""
        teacher = detached(teacher)
        found = token_statistics(
            student, teacher, labels, mask=mask, temperature=self.temperature, backend=self.backend
        )
        forward, _ = entropy_gap_weights(found, emphasis=self.emphasis)
        return weighted_loss(
            student,
            teacher,
            Jeffreys(forward / (1 + self.emphasis)),
            (1 + self.emphasis) * self.weight,
            1.0,
            labels,
            mask,
            **self.options,
        )

    def teacher_loss(self, teacher: Source, student: Source, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The teacher's loss, with the gradient to it alone."""
        return weighted_loss(teacher, detached(student), ReverseKL(), self.weight, 1.0, labels, mask, **self.options)


@register("every_expert_matters")
class ExpertAugmentation(nn.Module):
    """A teacher with sampled experts, run several times: the mean of the reverse KL divergences.

    ``L = (1/M) sum_m KL(q || p_m)``. The reverse KL is linear in log p, so this is the divergence from the mean of the logits
    plus a number that the student has no part in: one sweep for the gradient. With ``exact_value`` the number is added,
    for one more read of every teacher. The paper's other way, a router trained towards the student, is ``PromptKD``'s two steps.

    Source: Kim et al. 2025 (arXiv 2502.12947). Confidence: general form.
    """

    def __init__(self, *, temperature: float = 1.0, exact_value: bool = False, backend: str | None = None) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.exact_value = check_flag("exact_value", exact_value)
        self.backend = backend

    def forward(self, student: Source, teachers: Sequence[Source], *, mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of logits ``[..., V]`` or heads and of up to four teachers."""
        tempered: dict[str, Any] = {"mask": mask, "temperature": self.temperature, "backend": self.backend}
        mean = LogitMixture(list(teachers))
        loss = distillation_loss(student, mean, ReverseKL(), **tempered)
        if not self.exact_value:
            return loss
        singles = [token_statistics(detached(teacher), **tempered).lse_student for teacher in teachers]
        of_mean = token_statistics(student, mean, **tempered).lse_teacher
        assert of_mean is not None
        return loss + (torch.stack(singles).mean(0) - of_mean).sum() / counted_tokens(student, None, mask)


@register("ctcd")
class CTCD(nn.Module):
    """Co-training and co-distillation: both models learn from the labels and from each other.

    ``a CE(small) + b KL(p_large || p_small) + a' CE(large) + b' KL(p_small || p_large)``, the teaching side constant in each.

    Source: Lee et al. 2023 (Findings of EMNLP; arXiv 2311.02849). Confidence: general form; the weights were not available.
    """

    def __init__(
        self,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        large_ce_weight: float = 1.0,
        large_kd_weight: float = 1.0,
        *,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.small = check_real("kd_weight", kd_weight), check_real("ce_weight", ce_weight)
        self.large = check_real("large_kd_weight", large_kd_weight), check_real("large_ce_weight", large_ce_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.temperature_squared = check_flag("temperature_squared", temperature_squared)
        self.backend = backend

    def forward(self, small: Source, large: Source, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of both, 0-d, of logits ``[..., V]`` or heads and labels ``[...]``; -100: does not count."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
            "backend": self.backend,
        }
        loss = weighted_loss(small, detached(large), ForwardKL(), *self.small, labels, mask, **options)
        return loss + weighted_loss(large, detached(small), ForwardKL(), *self.large, labels, mask, **options)


@register("dac_kl")
class DACKL(nn.Module):
    """A teacher clipped per token, and relations of neighbours within spans.

    ``ce_weight CE + KL(softmax(clip(t, lower, upper)) || q) + span_weight span``, where span is the mean over pairs of
    neighbouring tokens i, i + 1 of one span of ``sum_v (q_i q_{i+1} - p_i p_{i+1})^2`` (``norm=True``: of its square root).
    The bounds are logits per token, for instance quantiles of the teacher; in the paper a small network predicts them and is
    trained through the loss. Here they are constants: train such a network by other means.

    Source: arXiv 2407.10068. Confidence: from summaries; the network and its clipping function were not available, and
    readings differ on the square.
    """

    def __init__(
        self, span_weight: float = 1.0, ce_weight: float = 1.0, *, norm: bool = False, backend: str | None = None
    ) -> None:
        super().__init__()
        self.span_weight = check_real("span_weight", span_weight)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.norm = check_flag("norm", norm)
        self.backend = backend

    def forward(
        self,
        student: Source,
        teacher: Source,
        labels: Tensor,
        *,
        lower: Coefficient | None = None,
        upper: Coefficient | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            student, teacher: logits ``[B, T, V]`` or heads.
            labels: ``[B, T]``; -100: does not count.
            lower, upper: what the teacher's logits are clipped to: a number or ``[B, T]``.
            spans: int ``[B, T]``, the number of the span that a token is in; below 0: none. None: no span term.
        """
        target = LogitMixture([teacher], [1.0], lower=lower, upper=upper)
        loss = weighted_loss(student, target, ForwardKL(), 1.0, self.ce_weight, labels, None, backend=self.backend)
        if spans is None:
            return loss
        together = (spans[:, 1:] == spans[:, :-1]) & (spans[:, 1:] >= 0)
        relations = [
            checkpoint(neighbours, student_row, teacher_row, self.norm, use_reentrant=False)
            for student_row, teacher_row in zip(sequences(student), sequences(detached(teacher)), strict=True)
        ]
        return loss + self.span_weight * mean_over(torch.stack(relations), together)


def sequences(source: Source) -> list[Source]:
    """The sequences of a batch, one by one."""
    return [with_tensor(source, sequence) for sequence in tensor_of("source", source)]


def neighbours(student: Source, teacher: Source, norm: bool) -> Tensor:
    """The squared distance of the products of neighbouring tokens' probabilities ``[T - 1]`` of one sequence."""
    q, p = (torch.softmax(whole_logits(source), -1) for source in (student, teacher))
    squares = (q[1:] * q[:-1] - p[1:] * p[:-1]).square().sum(-1)
    # The root of 0 has no slope.
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0) if norm else squares


def whole_logits(source: Source) -> Tensor:
    """The logits ``[..., V]`` of a source, stored whole, in float32 at least."""
    rows, shape, vocab = side("source", source, None)
    dtype = torch.float64 if rows.tensor.dtype == torch.float64 else torch.float32
    return composed_logits(side_logits(rows), rows.softcap, dtype, None).reshape(*shape, vocab)


@register("ff_g2m")
class FFG2M(nn.Module):
    """From a graph network to a network without the graph: what neighbours share, and how they differ.

    ``label_weight CE + (1 - label_weight) (low + high)`` over the directed edges (i, j) of the graph:
    ``low = mean KL(softmax(t_j) || softmax(s_i))``, self-loops included, and
    ``high = mean KL(softmax(|t_i - t_j| / T) || softmax(|s_i - s_j| / T))`` without them.

    Source: Wu et al. 2023 (AAAI; arXiv 2305.10758). Confidence: from the authors' code.
    """

    def __init__(self, label_weight: float = 0.1, *, temperature: float = 1.5, backend: str | None = None) -> None:
        super().__init__()
        self.label_weight = check_share("label_weight", label_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor, edges: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, 0-d.

        Args:
            student, teacher: logits of the nodes ``[n, C]``.
            edges: int64 ``[2, E]``, rows i and j, with the self-loops that low is to count.
            labels: ``[n]``, -100 where unknown; not needed with a label_weight of 0.
        """
        here, there = edges
        teacher = teacher.detach()
        low = distillation_loss(student[here], teacher[there], ForwardKL(), backend=self.backend)
        differ = here != there
        high = distillation_loss(
            (student[here] - student[there]).abs(),
            (teacher[here] - teacher[there]).abs(),
            ForwardKL(),
            mask=differ,
            temperature=self.temperature,
            backend=self.backend,
        )
        loss = (1 - self.label_weight) * (low + high)
        if self.label_weight == 0:
            return loss
        if labels is None:
            raise ValueError("labels are needed for the cross-entropy")
        return loss + self.label_weight * hard_loss(student, labels, None, self.backend)


@register("pesf_kd")
class PESFKD(nn.Module):
    """A teacher that learns to be friendlier to the student, through an adapter of its own.

    The student (``forward``): ``(1 - alpha) CE + alpha T^2 KL(p || q)``. The adapter (``teacher_loss``), whose parameters
    alone are to be trained: ``CE + T^2 KL(q || p)`` with the teacher's logits ``head(h + adapter(h))``. The gap that it is to
    close, ``lse(t / T) - lse(s / T)``, is in ``kd.token_statistics``.

    Source: Rao et al. 2022 (arXiv 2205.15308). Confidence: general form; alpha about 0.9 and a temperature of 4 are recalled.
    """

    def __init__(self, alpha: float = 0.9, *, temperature: float = 4.0, backend: str | None = None) -> None:
        super().__init__()
        self.alpha = check_share("alpha", alpha)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The student's loss, 0-d, of logits ``[..., V]`` or heads and labels ``[...]``; -100: does not count."""
        return self.loss(student, teacher, labels, self.alpha, 1 - self.alpha)

    def teacher_loss(self, teacher: Source, student: Source, labels: Tensor) -> Tensor:
        """The adapter's loss, with the gradient to the teacher's logits (or hidden states) alone."""
        return self.loss(teacher, student, labels, 1.0, 1.0)

    def loss(self, learner: Source, other: Source, labels: Tensor, soft: float, hard: float) -> Tensor:
        return weighted_loss(
            learner,
            detached(other),
            ForwardKL(),
            soft,
            hard,
            labels,
            None,
            temperature=self.temperature,
            temperature_squared=True,
            backend=self.backend,
        )


@register("even_your_teacher")
class GroundTruthSelfDistillation(nn.Module):
    """Self-distillation by squares, with the ground truth kept in.

    ``alpha MSE(q, e_y) + (1 - alpha) MSE(q, sg(q'))`` with the probabilities q of this step's model and q' of the last one's,
    means over samples and classes. alpha weights the GROUND TRUTH. The penalty on the weights (1e-4 in the code, on norms
    that are not squared) is the optimizer's.

    Source: Borup and Andersen 2021 (NeurIPS; arXiv 2102.13088). Confidence: from the authors' code; the theory takes the
    outputs before the softmax instead.
    """

    def __init__(self, alpha: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        self.alpha = check_share("alpha", alpha)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The loss, 0-d, of logits ``[..., C]`` or heads and labels ``[...]``; -100: does not count."""
        classes = student.weight.shape[0] if isinstance(student, LMHead) else tensor_of("student", student).shape[-1]
        squares = ABDivergence(1.0, 1.0)  # 0.5 sum (p - q)^2
        loss: Tensor | None = None
        for share, target in (
            (self.alpha, label_mixed(teacher, labels, 1.0, backend=self.backend)),
            (1 - self.alpha, detached(teacher)),
        ):
            if share == 0:
                continue
            part = weighted_loss(student, target, squares, 2 * share / classes, 0.0, labels, None, backend=self.backend)
            loss = part if loss is None else loss + part
        assert loss is not None
        return loss


@register("sla_sd")
class SLASD(nn.Module):
    """Self-distillation of labels augmented by the transformation of the input.

    A joint head tells the C classes and the M transformations apart (class c under transformation j: entry ``c M + j``).
    ``L = joint_weight CE(joint) + CE(single) + weight T^2 KL(sg softmax(a / T) || softmax(single / T))`` with the aggregate
    ``a_c = (1/M) sum_j joint(x_j)[c M + j]``.

    Source: Lee et al. 2020 (ICML; arXiv 1910.05872). Confidence: from the authors' code, which takes M as joint_weight on
    ImageNet and iNaturalist.
    """

    def __init__(
        self, weight: float = 1.0, joint_weight: float = 1.0, *, temperature: float = 1.0, backend: str | None = None
    ) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.joint_weight = check_real("joint_weight", joint_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, single: Tensor, joint: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d.

        Args:
            single: logits ``[B, C]`` of the head for inference.
            joint: logits ``[B, M, C M]`` of the joint head, by transformation.
            labels: ``[B]``.
        """
        transformations, classes = joint.shape[1], single.shape[-1]
        if joint.shape != (single.shape[0], transformations, classes * transformations):
            raise ValueError(f"joint must have the shape [B, M, {classes} M], got {tuple(joint.shape)}")
        numbers = torch.arange(transformations, device=labels.device)
        joint_labels = labels.unsqueeze(-1) * transformations + numbers
        by_class = joint.detach().reshape(*joint.shape[:2], classes, transformations)
        aggregate = by_class.diagonal(dim1=1, dim2=3).mean(-1)
        loss = weighted_loss(
            single,
            aggregate,
            ForwardKL(),
            self.weight,
            1.0,
            labels,
            None,
            temperature=self.temperature,
            temperature_squared=True,
            backend=self.backend,
        )
        return loss + self.joint_weight * hard_loss(joint, joint_labels, None, self.backend)


@register("lelp")
class LELP(nn.Module):
    """Classes split in two ways along each of a few directions of the teacher's embeddings, for tasks of few classes.

    Of each class, the embeddings' parts that the teacher's classifier does not see are projected to their first principal
    directions, turned at random; with the projections ``u_j`` over their standard deviations, the sub-classes have the logits
    ``+-u_j / beta``, and ``p(c, k) = p_T(c) softmax_k``. The student has an output per sub-class:
    ``L = SCE(p(c, k), q(c, k)) + label_weight CE``, where q(c) is the sum over k.

    Source: Loo et al. 2024 (arXiv 2409.20449). Confidence: from summaries; temperature and beta are tuned there, and that the
    projections are scaled is said in one reading only (``standardize``).

    Args:
        classes, width: of the teacher's outputs and embeddings.
        directions: per class, which makes ``2 directions`` sub-classes each.
        beta, temperature: of the sub-classes, and of the teacher's and the student's softmax.
        label_weight: of the cross-entropy of the labels, 0 in the paper.
        standardize: whether the projections are divided by their standard deviations.
    """

    projections: Tensor
    """[C, directions, width]"""
    centres: Tensor
    """[C, width]"""

    def __init__(
        self,
        classes: int,
        width: int,
        directions: int = 1,
        *,
        beta: float = 1.0,
        temperature: float = 1.0,
        label_weight: float = 0.0,
        standardize: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.directions = check_integer("directions", directions)
        self.beta = check_real("beta", beta, positive=True)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.label_weight = check_real("label_weight", label_weight)
        self.standardize = check_flag("standardize", standardize)
        self.backend = backend
        self.register_buffer("projections", torch.zeros(classes, directions, width))
        self.register_buffer("centres", torch.zeros(classes, width))

    @torch.no_grad()
    def fit(
        self, embeddings: Tensor, labels: Tensor, classifier: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Finds the directions, before the training.

        Args:
            embeddings: the teacher's ``[n, width]``, several of each class.
            labels: ``[n]``, their classes.
            classifier: the weight ``[C, width]`` of the teacher's last layer.
            generator: of the random rotation.
        """
        check_floating("embeddings", embeddings)
        seen = torch.linalg.qr(classifier.double().T).Q
        for index, (projection, centre) in enumerate(zip(self.projections, self.centres, strict=True)):
            own = embeddings[labels == index].double()
            mean = own.mean(0)
            unseen = (own - mean) - (own - mean) @ seen @ seen.T
            main = torch.linalg.svd(unseen, full_matrices=False).Vh[: self.directions]
            noise = torch.randn(self.directions, self.directions, generator=generator, dtype=torch.float64)
            turned = torch.linalg.qr(noise.to(main.device)).Q @ main
            if self.standardize:
                turned = turned / (unseen @ turned.T).std(0).clamp(min=1e-12).unsqueeze(-1)
            projection.copy_(turned - turned @ seen @ seen.T)
            centre.copy_(mean)

    def target(self, teacher: Tensor, embeddings: Tensor) -> Tensor:
        """The logits ``[..., C K]`` at temperature 1 of the sub-classes, ordered by class."""
        shifted = embeddings.unsqueeze(-2) - self.centres.to(embeddings.dtype)
        along = torch.einsum("...cd,ckd->...ck", shifted, self.projections.to(embeddings.dtype)) / self.beta
        within = torch.log_softmax(torch.cat([along, -along], -1), -1)
        between = torch.log_softmax(teacher / self.temperature, -1)
        return (between.unsqueeze(-1) + within).flatten(-2)

    def forward(self, student: Source, teacher: Tensor, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, 0-d.

        Args:
            student: logits ``[..., C K]`` or a head; K is twice the directions, sub-class k of class c is entry ``c K + k``.
            teacher: logits ``[..., C]``.
            embeddings: the teacher's ``[..., width]``.
            labels: ``[...]``, for a label_weight other than 0.
        """
        target = self.target(teacher.detach(), embeddings.detach())
        loss = distillation_loss(
            student,
            target,
            SoftCrossEntropy(),
            temperature=self.temperature,
            teacher_temperature=1.0,
            backend=self.backend,
        )
        if self.label_weight == 0:
            return loss
        if labels is None:
            raise ValueError("labels are needed for the cross-entropy")
        logits = whole_logits(student)
        log_q = torch.log_softmax(logits.reshape(*logits.shape[:-1], -1, 2 * self.directions).logsumexp(-1), -1)
        return loss + self.label_weight * functional.nll_loss(log_q.flatten(0, -2), labels.flatten())


@register("meal_v2")
class MEALV2(nn.Module):
    """The mean of several teachers' probabilities, and a discriminator between student and teachers.

    ``L = SCE((1/K) sum_k softmax(t_k), q) + discriminator_weight BCE``. The discriminator, three layers of which the inner
    ones are ``classes / divisor`` wide, tells the student's logits from the mean of the teachers'. The code adds its loss with
    the SAME sign for both networks, without a reversal of the gradient, so that it is no adversary; this is kept, behind a
    weight that is 0 unless asked for. No hard labels.

    Source: Shen and Savvides 2020 (arXiv 2009.08453). Confidence: from the authors' code.

    Args:
        classes: where the discriminator is wanted.
        discriminator_weight: 1 in the code.
        divisor: of the discriminator's width.
    """

    def __init__(
        self,
        classes: int | None = None,
        discriminator_weight: float = 0.0,
        *,
        divisor: int = 8,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.discriminator_weight = check_real("discriminator_weight", discriminator_weight)
        self.backend = backend
        self.discriminator: nn.Sequential | None = None
        if self.discriminator_weight:
            if classes is None:
                raise ValueError("classes are needed for a discriminator")
            width = max(1, classes // check_integer("divisor", divisor))
            layers = nn.Linear(classes, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
            self.discriminator = nn.Sequential(*layers)

    def forward(self, student: Source, teachers: Sequence[Source], *, mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of logits ``[..., C]`` or heads and up to four teachers; a discriminator needs logits."""
        target = LogitMixture(list(teachers), space="probabilities")
        loss = distillation_loss(student, target, SoftCrossEntropy(), mask=mask, backend=self.backend)
        if self.discriminator is None:
            return loss
        mean = torch.stack([tensor_of("teachers", teacher).detach() for teacher in teachers]).mean(0)
        found = self.discriminator(torch.stack([tensor_of("student", student), mean]))
        truth = torch.eye(2, dtype=found.dtype, device=found.device)
        truth = truth.view(2, *(1,) * (found.dim() - 2), 2).expand_as(found)
        return loss + self.discriminator_weight * functional.binary_cross_entropy_with_logits(found, truth)

"""Losses on logits that treat the label apart from the rest, or transform the teacher's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdkernels.checks import check_choice, check_flag, check_floating, check_real
from kdkernels.divergences import Decoupled, SoftCrossEntropy
from kdkernels.functional import distillation_loss, token_statistics
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import IGNORED, check_ids, detached, tensor_of
from kdkernels.sources import Source

__all__ = ["ATKD", "DKD", "NKD", "OFAKD", "TTM", "USKD", "WTTM"]


def check_labels(labels: Tensor, student: Source) -> None:
    check_ids("labels", labels, tensor_of("student", student).shape[:-1], "student")


def mean_over_labels(total: Tensor, labels: Tensor) -> Tensor:
    """A sum over the rows that count, divided by their number; 0 if there are none."""
    return total / (labels != IGNORED).sum().clamp(min=1)


@register("dkd")
class DKD(nn.Module):
    """Decoupled knowledge distillation: the label against the rest, and the rest among themselves, each with a weight.

    ``T^2 (alpha KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta KL(N(p) || N(q)))`` with both probabilities at temperature T and
    N the softmax without the label.

    Source: Zhao et al. 2022 (CVPR; arXiv 2203.08679). Confidence: from code; the authors set beta and T per
    pair of models (0.5 to 8, and 1 or 4). Copies differ in whether padding counts in the mean: here it does not.

    Args:
        alpha: weight of the label's part.
        beta: weight of the rest's part.
        temperature: T.
        temperature_squared: whether T^2 is there.
        ce_weight: of the hard-label term, which is at temperature 1.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.5,
        *,
        temperature: float = 1.0,
        temperature_squared: bool = True,
        ce_weight: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        self.beta = check_real("beta", beta)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.temperature_squared = check_flag("temperature_squared", temperature_squared)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The mean over the labels, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: token ids or classes ``[...]``, each at the logits that predict it; -100: the row does not count.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        return distillation_loss(
            student,
            detached(teacher),
            Decoupled(target_weight=self.alpha, rest_weight=self.beta),
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            labels=labels,
            ce_weight=self.ce_weight,
            backend=self.backend,
        )


@register("atkd")
class ATKD(nn.Module):
    """Tokens that the teacher is sure of teach only the rest of the vocabulary; the others teach all of it.

    With ``UNC = 1 - p_y``, the tokens whose UNC is below the batch's lower median are easy, the others hard. With ``DKD =
    KL(N(p) || N(q))`` over the vocabulary without the label and ``TKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))`` the loss is
    ``alpha mean_easy(DKD) + (1 - alpha) mean_hard(TKD + DKD)``.

    Source: Zhong et al. 2024 (ACL; arXiv 2402.11890). Confidence: from the authors' code. No factor T^2.

    Args:
        alpha: weight of the easy tokens.
        easy: the share of tokens up to whose UNC tokens are easy; 0.5 is the median.
        temperature: of both sides, and of UNC.
        reverse: exchanges student and teacher in both divergences; the split remains the teacher's.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        easy: float = 0.5,
        temperature: float = 1.0,
        reverse: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        self.easy = check_real("easy", easy)
        if not 0 <= self.easy <= 1:
            raise ValueError(f"easy must be between 0 and 1, got {easy!r}")
        self.temperature = check_real("temperature", temperature, positive=True)
        self.reverse = check_flag("reverse", reverse)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: token ids ``[...]``, each at the logits that predict it; -100: the token does not count.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_labels(labels, student)
        teacher = detached(teacher)
        found = token_statistics(teacher, labels=labels, temperature=self.temperature, backend=self.backend)
        assert found.label_log_prob_student is not None
        counted = labels != IGNORED
        uncertainty = -torch.expm1(found.label_log_prob_student)
        easy = counted & (uncertainty < lower_quantile(uncertainty, counted, self.easy))
        hard = counted & ~easy
        of_hard = hard.to(uncertainty.dtype) * (1 - self.alpha) / hard.sum().clamp(min=1)
        of_both = of_hard + easy.to(uncertainty.dtype) * self.alpha / easy.sum().clamp(min=1)
        return distillation_loss(
            *((teacher, student) if self.reverse else (student, teacher)),
            Decoupled(target_weight=of_hard, rest_weight=of_both),
            temperature=self.temperature,
            labels=labels,
            reduction="sum",
            backend=self.backend,
        )


def lower_quantile(values: Tensor, counted: Tensor, share: float) -> Tensor:
    """0-d: of the values that count, in order, the one at ``share`` of the way, rounded down; any if none counts."""
    ordered = values.masked_fill(~counted, torch.inf).flatten().sort().values
    if not len(ordered):
        return values.new_zeros(())
    place = ((counted.sum() - 1).clamp(min=0) * share).floor().long()
    return ordered.gather(0, place.reshape(1)).squeeze(0)


@register("nkd_uskd")
class NKD(nn.Module):
    """Normalised knowledge distillation: the label with the teacher's weight, and the rest, normalised, as a soft target.

    ``-p_y log q_y + gamma T^2 SCE(N(t / T), N(s / T)) + ce_weight (-log q_y)`` with N the softmax without the label and SCE
    the cross-entropy from the first to the second; p_y and q_y are at temperature 1.

    Source: Yang et al. 2023 (ICCV; arXiv 2303.13005). Confidence: from the authors' code. ``USKD`` is the form
    without a teacher.

    Args:
        gamma: 1.5 for CNNs on ImageNet, 1 for DeiT; 3.5 with T = 3 on CIFAR-100.
        temperature: T.
        ce_weight: of the hard-label term.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self, gamma: float = 1.5, *, temperature: float = 1.0, ce_weight: float = 1.0, backend: str | None = None
    ) -> None:
        super().__init__()
        self.gamma = check_real("gamma", gamma)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor) -> Tensor:
        """The mean over the labels, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: token ids or classes ``[...]``, each at the logits that predict it; -100: the row does not count.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_labels(labels, student)
        teacher = detached(teacher)
        found = token_statistics(teacher, labels=labels, backend=self.backend)
        assert found.label_log_prob_student is not None
        return distillation_loss(
            student,
            teacher,
            Decoupled(SoftCrossEntropy(), target_weight=0.0, rest_weight=self.gamma * self.temperature**2),
            temperature=self.temperature,
            labels=labels,
            ce_weight=self.ce_weight + found.label_log_prob_student.exp(),
            backend=self.backend,
        )


@register("uskd")
class USKD(nn.Module):
    """Universal self-knowledge distillation: soft labels from the student's own ranks, without a teacher.

    With q the student's probabilities and w those of a weak head on a middle layer:

    - ``-alpha sg(q_y^2 + 1 - mean_B q_y^2) log q_y``;
    - ``beta SCE(z, N(q))``, N the softmax without the label: z is Zipf's law over the ranks, ``z_i ~ 1 / rank_i``,
      renormalised without the label, which takes part in the ranking by ``w_i / (1 - w_y) + log q_i / (1 - log q_y)`` in
      the code, or ``w_i / (1 - w_y) + q_i / (1 - q_y)`` in the text;
    - ``mu SCE(0.9 e_y + 0.1 / V, w)``.

    Source: Yang et al. 2023 (ICCV; arXiv 2303.13005). Confidence: from the authors' code. The ranks take a full sort of
    every row, and tensors like the logits.

    Args:
        alpha, beta, mu: weights of the three parts; 0.1 each on CIFAR-100.
        score: "log": as the code ranks. "probability": as the text does.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        *,
        score: str = "log",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        self.beta = check_real("beta", beta)
        self.mu = check_real("mu", mu)
        self.score = check_choice("score", score, ("log", "probability"))
        self.backend = backend

    def forward(self, student: Tensor, weak: Tensor, labels: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and, by the last part, to the weak head.

        Args:
            student: logits ``[B, V]``.
            weak: logits ``[B, V]`` of the weak head.
            labels: classes ``[B]``; -100: the sample does not count.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        for name, logits in (("student", student), ("weak", weak)):
            check_floating(name, logits)
            if logits.dim() != 2 or logits.shape != student.shape:
                raise ValueError(f"{name} must have the shape [B, V] of the student, got {tuple(logits.shape)}")
        check_labels(labels, student)
        counted = labels != IGNORED
        with torch.no_grad():
            place = labels.masked_fill(~counted, 0).long().unsqueeze(-1)
            log_q, w = student.float().log_softmax(-1), weak.float().softmax(-1)
            log_q_label = log_q.gather(-1, place)
            of_student = (
                log_q / (1 - log_q_label)
                if self.score == "log"
                else log_q.exp() / -torch.expm1(log_q_label).clamp(max=-torch.finfo(log_q.dtype).tiny)
            )
            of_weak = w / (1 - w.gather(-1, place)).clamp(min=torch.finfo(w.dtype).tiny)
            ranks = (of_weak + of_student).argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1
            squared = log_q_label.squeeze(-1).exp().square().masked_fill(~counted, 0)
            own = self.alpha * (squared + 1 - squared.sum() / counted.sum().clamp(min=1))
        value = distillation_loss(
            student,
            -ranks.to(log_q.dtype).log(),
            Decoupled(SoftCrossEntropy(), target_weight=0.0, rest_weight=self.beta),
            labels=labels,
            ce_weight=own,
            backend=self.backend,
        )
        of_weak_head = cross_entropy(weak, labels.long(), ignore_index=IGNORED, label_smoothing=0.1, reduction="sum")
        return value + self.mu * mean_over_labels(of_weak_head, labels)


class Powers(NamedTuple):
    """Of a teacher's rows ``[...]``: its sum of powers ``sum_v p_v^gamma``, and its log-probability of the label if asked."""

    total: Tensor
    label_log_prob: Tensor | None


def powers(teacher: Source, gamma: float, labels: Tensor | None, backend: str | None) -> Powers:
    """``exp(lse(gamma t) - gamma lse(t))``, from both log-sum-exps in one sweep."""
    found = token_statistics(teacher, teacher, teacher_temperature=1 / gamma, labels=labels, backend=backend)
    assert found.lse_teacher is not None
    return Powers((found.lse_teacher - gamma * found.lse_student).exp(), found.label_log_prob_student)


@register("ofa_kd")
class OFAKD(nn.Module):
    """One for all: the label's probability is raised, in the final logits and in those of projected stages.

    ``L(q) = -sum_v r_v log q_v`` with ``r = (p + e_y)^epsilon - e_y``; the loss is ``ce_weight CE + kd_weight L(final) +
    stage_weight sum_stages L``.

    Source: Hao et al. 2023 (NeurIPS; arXiv 2310.19444). Confidence: from the authors' code. There all probabilities are
    raised; the text raises that of the label alone. Temperature 1, no factor T^2.

    Args:
        epsilon: 1.5 for ImageNet in the code's examples.
        raised: "all": as the code. "label": as the text, ``r_v = p_v`` for all but the label.
        kd_weight, stage_weight, ce_weight: weights of the three parts, the first positive.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        *,
        raised: str = "all",
        kd_weight: float = 1.0,
        stage_weight: float = 1.0,
        ce_weight: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.raised = check_choice("raised", raised, ("all", "label"))
        self.kd_weight = check_real("kd_weight", kd_weight, positive=True)
        self.stage_weight = check_real("stage_weight", stage_weight)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor, stages: Sequence[Source] = ()) -> Tensor:
        """The mean over the labels, a 0-d tensor; the gradient flows to the student and the stages.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: classes ``[...]``, each at the logits that predict it; -100: the row does not count.
            stages: the student's stages, projected to the classes: logits or ``kd.LMHead`` of the same rows.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_labels(labels, student)
        teacher = detached(teacher)
        # r is a multiple of the tempered teacher's probabilities, but for the label, which has more.
        power = self.epsilon if self.raised == "all" else 1.0
        found = powers(teacher, power, labels, self.backend)
        assert found.label_log_prob is not None
        p = found.label_log_prob.exp()
        more = (1 + p) ** self.epsilon - 1 - p**power
        value = torch.zeros((), dtype=p.dtype, device=p.device)
        parts = [
            (student, self.kd_weight, self.ce_weight / self.kd_weight),
            *((stage, self.stage_weight, 0.0) for stage in stages),
        ]
        for source, weight, ce_weight in parts:
            value = value + weight * distillation_loss(
                source,
                teacher,
                SoftCrossEntropy(),
                teacher_temperature=1 / power,
                weight=found.total,
                labels=labels,
                ce_weight=(more + ce_weight) / found.total,
                reduction="sum",
                backend=self.backend,
            )
        return mean_over_labels(value, labels)


class Transformed(nn.Module):
    """What ``TTM`` and ``WTTM`` share."""

    def __init__(self, gamma: float, weight: float, *, weighted: bool, ce_weight: float, backend: str | None) -> None:
        super().__init__()
        self.gamma = check_real("gamma", gamma, positive=True)
        self.weight = check_real("weight", weight, positive=True)
        self.weighted = weighted
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor | None = None) -> Tensor:
        """The mean over the rows, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: token ids or classes ``[...]``, each at the logits that predict it; -100: the row does not count. None:
                without a hard-label term, which needs ``ce_weight=0``.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        if labels is not None:
            check_labels(labels, student)
        teacher = detached(teacher)
        ce_weight: float | Tensor = self.ce_weight / self.weight
        row_weight = normalizer = None
        if self.weighted:
            row_weight = powers(teacher, self.gamma, None, self.backend).total
            ce_weight = ce_weight / row_weight if self.ce_weight else 0.0
            rows = row_weight.numel() if labels is None else (labels != IGNORED).sum()
            normalizer = torch.as_tensor(rows, device=row_weight.device).clamp(min=1)
        return self.weight * distillation_loss(
            student,
            teacher,
            temperature=1.0,
            teacher_temperature=1 / self.gamma,
            weight=row_weight,
            labels=labels,
            ce_weight=ce_weight,
            normalizer=normalizer,
            backend=self.backend,
        )


@register("ttm_wttm")
class TTM(Transformed):
    """Transformed teacher matching: only the teacher is tempered, as a power of its probabilities.

    ``ce_weight CE(y) + weight KL(softmax(gamma t) || softmax(s))``.

    Source: Zheng and Yang 2024 (ICLR; arXiv 2402.11148). Confidence: from the authors' code, which tunes gamma and the weight
    for each pair of models; no factor T^2. ``WTTM`` is the form with a weight per row.

    Args:
        gamma: the power, 1 over the teacher's temperature.
        weight: of the divergence; 45 for one pair of VGGs.
        ce_weight: of the hard-label term.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self, gamma: float = 0.1, weight: float = 45.0, *, ce_weight: float = 1.0, backend: str | None = None
    ) -> None:
        super().__init__(gamma, weight, weighted=False, ce_weight=ce_weight, backend=backend)


@register("wttm")
class WTTM(Transformed):
    """Weighted transformed teacher matching: ``TTM`` with the sum of the powers as the weight of a row.

    ``ce_weight CE(y) + weight mean(U KL(softmax(gamma t) || softmax(s)))``, ``U = sum_v p_v^gamma``, which for gamma below 1
    is the larger the less sure the teacher is.

    Source: Zheng and Yang 2024 (ICLR; arXiv 2402.11148). Confidence: from the authors' code, which tunes gamma and the weight
    for each pair of models; no factor T^2.

    Args:
        gamma: the power, 1 over the teacher's temperature.
        weight: of the divergence; about 4, with CRD 0.8.
        ce_weight: of the hard-label term.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self, gamma: float = 0.2, weight: float = 4.0, *, ce_weight: float = 1.0, backend: str | None = None
    ) -> None:
        super().__init__(gamma, weight, weighted=True, ce_weight=ce_weight, backend=backend)

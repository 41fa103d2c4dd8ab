"""Losses that tell a student's sample from others by the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, nll_loss, normalize

from kdkernels.checks import check_integer, check_integral, check_real
from kdkernels.functional import relation_loss
from kdkernels.losses.registry import register

__all__ = ["Leader", "LinguGKD", "MIAlpha"]


@register("lingugkd_infonce")
class LinguGKD(nn.Module):
    """InfoNCE of the layers of a graph network against those of a language model.

    ``softmax(v)_0 NLL + softmax(v)_1 sum_l softmax(w)_l CE(cos(h_S^l, h_T^l) / temperature, diagonal)``; other samples of the
    same class take no part. v and w are learned.

    Source: Hu et al. 2024 (arXiv 2402.05894). Confidence: from the authors' code.

    Args:
        student_size, teacher_size: widths; where they differ the teacher's states are projected.
        layers: how many pairs of layers are given.
        temperature: 0.07.
        backend: of the kernels, see ``kd.relation_loss``.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int = 4096,
        layers: int = 1,
        *,
        temperature: float = 0.07,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend
        self.layer_logits = nn.Parameter(torch.zeros(check_integer("layers", layers)))
        self.task_logits = nn.Parameter(torch.zeros(2))
        same = student_size == teacher_size
        self.projector: nn.Module = nn.Identity() if same else nn.Linear(teacher_size, student_size, bias=False)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], log_probs: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and the parameters.

        Args:
            student, teacher: states ``[B, d]`` and ``[B, d']`` of each layer.
            log_probs: of the student's classes ``[B, C]``.
            labels: classes ``[B]``.
        """
        check_integral("labels", labels)
        count = labels.shape[0]
        other = self.projector(torch.stack(tuple(teacher)).detach())
        same = labels.unsqueeze(-1) == labels
        rows = relation_loss(
            torch.stack(tuple(student)),
            other,
            score="cosine",
            student_scale=1 / self.temperature,
            pair_mask=~same | torch.eye(count, dtype=torch.bool, device=labels.device),
            labels=torch.arange(count, device=labels.device).expand(len(student), count),
            reduction="none",
            backend=self.backend,
        )
        contrast = self.layer_logits.softmax(0) @ rows.mean(-1).to(self.layer_logits.dtype)
        shares = self.task_logits.softmax(0)
        return shares[0] * nll_loss(log_probs, labels.long()) + shares[1] * contrast


@register("leader_medrec")
class Leader(nn.Module):
    """A recommender learns from the states of a language model.

    ``BCE + state_weight MSE(W h_S, h_LLM) + align_weight C(profile, medication)``, C the sum over both directions of
    ``mean_i [-cos_ii / T + log sum_{j != i} exp(cos_ij / T)]``: the positive pair is left out of the denominator.

    Source: Liu et al. 2024 (TOIS; arXiv 2402.02803). Confidence: from the authors' code.

    Args:
        student_size, teacher_size: widths; the teacher's states may have been stored.
        state_weight: 0.1.
        align_weight: 0.005 for MIMIC-III, 0.01 for MIMIC-IV.
        temperature: T.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int = 4096,
        *,
        state_weight: float = 0.1,
        align_weight: float = 0.005,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.projector = nn.Linear(student_size, teacher_size)
        self.state_weight = check_real("state_weight", state_weight)
        self.align_weight = check_real("align_weight", align_weight)
        self.temperature = check_real("temperature", temperature, positive=True)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        student: Tensor,
        teacher: Tensor,
        profiles: Tensor,
        medications: Tensor,
    ) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            logits, targets: of the medications ``[B, M]``, targets 0 or 1.
            student, teacher: states ``[B, d]`` and ``[B, d']``.
            profiles, medications: ``[B, e]`` both, B at least 2.
        """
        task = binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
        states = mse_loss(self.projector(student), teacher.detach())
        scores = normalize(profiles, dim=-1) @ normalize(medications, dim=-1).mT / self.temperature
        positives = scores.diagonal()
        others = scores.masked_fill(torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device), -torch.inf)
        align = sum((others.logsumexp(dim) - positives).mean() for dim in (0, 1))
        return task + self.state_weight * states + self.align_weight * align


@register("distiller_mi_alpha")
class MIAlpha(nn.Module):
    """A lower bound of the mutual information of a student's and a teacher's states, to be maximised.

    ``-I``, ``I = 1 + mean_i [f_ii - log d_i] - mean_{i != j} [exp(f_ij) / d_i]`` with
    ``d_i = alpha m_i + (1 - alpha) exp(b)``, m_i the mean of ``exp(f_ij)`` over the other samples j, and the critic f the
    product of both projections over the temperature. ``alpha = 1`` is InfoNCE (without the positive pair in m), 0 is NWJ.

    Source: Distiller (SustaiNLP 2021; arXiv 2109.11105), the bound of Poole et al. 2019. Confidence: general form; alpha was
    searched for (0.1, 0.5, 0.9).

    Args:
        student_size, teacher_size: widths of the states.
        size: of the projections.
        alpha: from 0 to 1.
        temperature: of the critic.
    """

    def __init__(
        self, student_size: int, teacher_size: int, size: int = 128, *, alpha: float = 0.5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
        self.temperature = check_real("temperature", temperature, positive=True)
        self.student_projector = nn.Linear(student_size, size)
        self.teacher_projector = nn.Linear(teacher_size, size)
        self.baseline = nn.Parameter(torch.zeros(()))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of states ``[B, d]`` and ``[B, d']``, B at least 2; a 0-d tensor.

        The gradient flows to the student, both projectors and ``baseline``, which is b.
        """
        if student.shape[0] < 2:
            raise ValueError(f"student must have at least 2 samples, got {list(student.shape)}")
        critic = self.student_projector(student) @ self.teacher_projector(teacher.detach()).mT / self.temperature
        count = critic.shape[0]
        others = critic.masked_fill(torch.eye(count, dtype=torch.bool, device=critic.device), -torch.inf)
        means = others.logsumexp(-1) - torch.log(critic.new_tensor(count - 1.0))
        share = critic.new_tensor([self.alpha, 1 - self.alpha]).log()
        denominators = torch.logaddexp(share[0] + means, share[1] + self.baseline)
        bound: Tensor = 1 + (critic.diagonal() - denominators).mean() - (means - denominators).exp().mean()
        return -bound

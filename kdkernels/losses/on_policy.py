"""Losses on sequences that a student has generated, and on preferences between sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kdkernels.checks import check_choice, check_flag, check_real, check_share
from kdkernels.divergences import JSD, Divergence, ForwardKL, ReverseKL
from kdkernels.functional import distillation_loss
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import batch_of, check_ids, detached, mean_over
from kdkernels.on_policy import (
    log_mixture,
    predicted,
    rewards_to_go,
    sequence_log_probs,
    taken_log_probs,
    whiten,
)
from kdkernels.sources import Source

__all__ = ["MiniLLM", "Rollout", "SpeculativeKD", "TeacherDPO"]


class Rollout(NamedTuple):
    """What of generated sequences stays fixed while the student learns from them, ``[B, T]`` each, without gradient.

    Entry t belongs to the token behind row t, as everywhere in ``kd.on_policy``.
    """

    advantages: Tensor
    sampling_log_probs: Tensor
    """Of the taken tokens, under the mixture they were drawn from."""


@register("minillm")
class MiniLLM(nn.Module):
    """Reverse KL divergence as a policy gradient on the student's own sequences, with an exact term for single steps.

    Tokens are drawn from ``p~ = a p + (1 - a) q``, p the teacher and q the student at that time. The reward of a token is
    ``r_t = reward_scale (log p - log q)`` of the token taken, clipped; the advantage ``A_t`` is the discounted reward-to-go,
    divided by the remaining length and whitened over the batch's response tokens. With ``rho_t = q_now / p~``,

    ``L = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1 - clip, 1 + clip)) + single_step mean_t KL(q_t || p_t)``.

    The paper adds a language-modelling term on its pre-training data, ``(1 - kd_ratio) CE + kd_ratio SCE(p, q)`` with
    kd_ratio 0.5: ``kd.distillation_loss`` with labels and ``ce_weight``.

    Source: MiniLLM, Gu et al., ICLR 2024. Confidence: from the authors' code, but for this: there padding enters the
    whitening and rewards are not masked; here only response tokens count. Whitening makes ``reward_scale`` matter for the
    clipping alone.

    Args:
        mixture: a, 0 where the student drew the tokens alone.
        gamma: discount.
        clip: of the ratio, or None.
        reward_scale, reward_clip: of the rewards; no clipping if None.
        length_normalized: whether the reward-to-go is divided by the remaining length.
        single_step: weight of the exact term.
        backend: of the kernels.
    """

    def __init__(
        self,
        *,
        mixture: float = 0.2,
        gamma: float = 0.95,
        clip: float | None = 0.2,
        reward_scale: float = 0.5,
        reward_clip: float | None = 100.0,
        length_normalized: bool = True,
        single_step: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.mixture = check_share("mixture", mixture)
        self.gamma = check_share("gamma", gamma)
        self.clip = None if clip is None else check_real("clip", clip, positive=True)
        self.reward_scale = check_real("reward_scale", reward_scale, positive=True)
        self.reward_clip = None if reward_clip is None else check_real("reward_clip", reward_clip, positive=True)
        self.length_normalized = check_flag("length_normalized", length_normalized)
        self.single_step = check_real("single_step", single_step)
        self.backend = backend

    @torch.no_grad()
    def rollout(self, student: Source, teacher: Source, token_ids: Tensor, mask: Tensor) -> Rollout:
        """What the student that drew the sequences makes of them: once per batch, for several steps on it.

        Arguments as in ``forward``.
        """
        _, counted = predicted(token_ids, mask)
        log_q = taken_log_probs(student, token_ids, mask, backend=self.backend)
        log_p = taken_log_probs(teacher, token_ids, mask, backend=self.backend)
        rewards = self.reward_scale * (log_p - log_q)
        if self.reward_clip is not None:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        totals = rewards_to_go(rewards, counted, gamma=self.gamma, length_normalized=self.length_normalized)
        return Rollout(whiten(totals, counted), log_mixture(log_p, log_q, self.mixture))

    def forward(
        self, student: Source, teacher: Source, token_ids: Tensor, mask: Tensor, *, rollout: Rollout | None = None
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[B, T, V]`` or ``kd.LMHead``; row t predicts token t + 1.
            token_ids: int64 or int32 ``[B, T]``, prompts and responses.
            mask: bool ``[B, T]``, True for the tokens of the responses.
            rollout: from ``rollout`` by the student that drew them; None: this student did just now.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_ids("token_ids", token_ids, batch_of("student", student), "student")
        teacher = detached(teacher)
        if rollout is None:
            rollout = self.rollout(student, teacher, token_ids, mask)
        _, counted = predicted(token_ids, mask)
        log_q = taken_log_probs(student, token_ids, mask, backend=self.backend)
        ratio = (log_q - rollout.sampling_log_probs).exp()
        advantages = rollout.advantages.detach()
        losses = -advantages * ratio
        if self.clip is not None:
            losses = torch.maximum(losses, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip))
        loss = mean_over(losses, counted)
        if self.single_step:
            exact = distillation_loss(student, teacher, ReverseKL(), mask=counted, backend=self.backend)
            loss = loss + self.single_step * exact
        return loss


class TeacherDPO(nn.Module):
    """Direct preference optimisation whose reference is the teacher.

    ``-(1 - e) log sigma(beta D) - e log sigma(-beta D)``, where ``D = (log q(y+) - log p(y+)) - (log q(y-) - log p(y-))`` with
    the log-probabilities of whole responses, e the label smoothing; the mean over the pairs.

    Source: the preference stage of LLaVA-MoD (ICLR 2025). Confidence: from the authors' code, beta recalled. Their mask is not
    shifted against the logits; here it is, see ``kd.on_policy``.

    Args:
        beta: of the difference.
        label_smoothing: e, in [0, 0.5).
        backend: of the kernels.
    """

    def __init__(self, beta: float = 0.1, *, label_smoothing: float = 0.0, backend: str | None = None) -> None:
        super().__init__()
        self.beta = check_real("beta", beta, positive=True)
        self.label_smoothing = check_real("label_smoothing", label_smoothing)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
        self.backend = backend

    def forward(
        self,
        student_chosen: Source,
        student_rejected: Source,
        teacher_chosen: Source,
        teacher_rejected: Source,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        *,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student_chosen, teacher_chosen: logits ``[B, T, V]`` or ``kd.LMHead`` on the preferred sequences; row t predicts
                token t + 1.
            student_rejected, teacher_rejected: the same on the others, whose length may differ.
            chosen_ids, rejected_ids: int64 or int32 ``[B, T]``.
            chosen_mask, rejected_mask: bool ``[B, T]``, True for the tokens of the responses; None: all but the first.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """

        def log_ratio(name: str, student: Source, teacher: Source, ids: Tensor, mask: Tensor | None) -> Tensor:
            check_ids(f"{name}_ids", ids, batch_of(f"student_{name}", student), "student")
            own = sequence_log_probs(student, ids, mask, backend=self.backend)
            return own - sequence_log_probs(detached(teacher), ids, mask, backend=self.backend)

        chosen = log_ratio("chosen", student_chosen, teacher_chosen, chosen_ids, chosen_mask)
        rejected = log_ratio("rejected", student_rejected, teacher_rejected, rejected_ids, rejected_mask)
        if chosen.shape != rejected.shape:
            raise ValueError(
                f"chosen and rejected must be pairs, got {chosen.shape[0]} and {rejected.shape[0]} sequences"
            )
        logits = self.beta * (chosen - rejected)
        e = self.label_smoothing
        losses = -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)
        return losses.mean() if len(losses) else losses.sum()


DIVERGENCES: dict[str, Divergence] = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD(0.5)}


@register("speculative_kd")
class SpeculativeKD(nn.Module):
    """A divergence on sequences that student and teacher have made in turn, over the tokens of the response.

    The sequences come from interleaved sampling: the student proposes, what is not in the teacher's top k is drawn from the
    teacher (``kd.on_policy.speculative_acceptance``). The mean is over all response tokens of the batch.

    Source: Speculative Knowledge Distillation, ICLR 2025. Confidence: from the authors' code, where it was meant to do the
    same: its "JSD" takes the KL divergences from the mean to the models, which is not the Jensen-Shannon divergence that "jsd"
    is here, and it skips the row that predicts the first token of the response.

    Args:
        divergence: "forward_kl", "reverse_kl", "jsd", or an instance such as ``kd.JSD(0.1)``.
        backend: of the kernels.
    """

    def __init__(self, divergence: str | Divergence = "forward_kl", *, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(divergence, Divergence):
            divergence = DIVERGENCES[check_choice("divergence", divergence, tuple(DIVERGENCES))]
        self.divergence = divergence
        self.backend = backend

    def forward(self, student: Source, teacher: Source, mask: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[B, T, V]`` or ``kd.LMHead``; row t predicts token t + 1.
            mask: bool ``[B, T]``, True for the tokens of the responses.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        shape = batch_of("student", student)
        places = torch.zeros(shape, dtype=torch.int64, device=mask.device)
        _, counted = predicted(places, mask)
        return distillation_loss(student, detached(teacher), self.divergence, mask=counted, backend=self.backend)

"""What training on a student's own sequences needs: log-probabilities of taken tokens, rewards, acceptance, mixtures.

Sequences are token ids ``[B, T]`` with a mask of the same shape, True for the tokens of the response. Models are logits
``[B, T, V]`` or ``kd.LMHead``; row t of a model predicts token t + 1. **All that is per token stands where it is predicted**:
entry t of a result belongs to ``token_ids[:, t + 1]``, and the last column belongs to nothing. That is where rows of
``kd.distillation_loss`` and ``kd.token_statistics`` stand, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.checks import check_dense, check_floating, check_integer, check_integral, check_real
from kdkernels.divergences import JSD, Divergence, ForwardKL, ReverseKL
from kdkernels.functional import sample_logits, token_log_probs, token_ranks, topk_logits
from kdkernels.losses.sequences import IGNORED, check_mask, next_tokens, tensor_of
from kdkernels.sources import LMHead, Source

__all__ = [
    "Acceptance",
    "generalized_jsd",
    "log_mixture",
    "predicted",
    "rewards_to_go",
    "sequence_log_probs",
    "speculative_acceptance",
    "taken_log_probs",
    "use_student_data",
    "whiten",
]


def check_counted(values: Tensor, counted: Tensor) -> None:
    check_floating("values", values)
    check_dense("counted", counted, (torch.bool,))
    if values.shape != counted.shape:
        raise ValueError(f"counted must have the shape {tuple(values.shape)}, got {tuple(counted.shape)}")


def predicted(token_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The shift between tokens and the rows that predict them: ``(next_ids, counted)``, both ``[B, T]``.

    ``next_ids[:, t]`` is ``token_ids[:, t + 1]`` where that token is in the mask, else -100; ``counted`` says where it is. The
    row that predicts the first token of a response counts.

    Args:
        token_ids: int64 or int32 ``[B, T]``.
        mask: bool ``[B, T]``, True for the tokens that count; None: all.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    check_integral("token_ids", token_ids)
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids must have the shape [B, T], got {tuple(token_ids.shape)}")
    mask = check_mask("mask", mask, token_ids)
    return next_tokens(token_ids.masked_fill(~mask, IGNORED)), next_tokens(mask, False)


def taken_log_probs(
    source: Source,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log-probability of each token of the response, where it is predicted: ``[B, T]``, 0 elsewhere. Differentiable.

    Args:
        source: logits ``[B, T, V]`` or ``kd.LMHead``.
        token_ids, mask: see ``predicted``.
        temperature, memory_budget, backend: see ``kd.token_log_probs``.
    """
    following, _ = predicted(token_ids, mask)
    return token_log_probs(source, following, temperature=temperature, memory_budget=memory_budget, backend=backend)


def sequence_log_probs(
    source: Source,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    length_normalized: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log-probability of each response ``[B]``, or with ``length_normalized`` its mean per token. Differentiable.

    Arguments as in ``taken_log_probs``. A sequence without tokens in the mask has 0.
    """
    values = taken_log_probs(
        source, token_ids, mask, temperature=temperature, memory_budget=memory_budget, backend=backend
    ).sum(-1)
    if not length_normalized:
        return values
    return values / predicted(token_ids, mask)[1].sum(-1).clamp(min=1)


def rewards_to_go(rewards: Tensor, counted: Tensor, *, gamma: float = 1.0, length_normalized: bool = False) -> Tensor:
    """``R_t = sum_{u >= t} gamma^(u - t) r_u`` over the tokens that count, ``[B, T]``, 0 elsewhere. Tokens that do not count
    are skipped; the exponent counts all positions.

    Args:
        rewards: ``[B, T]``; what stands where a token does not count has no influence.
        counted: bool ``[B, T]``.
        gamma: discount, in [0, 1].
        length_normalized: divides ``R_t`` by the number of tokens that count from t on.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    check_counted(rewards, counted)
    if not 0 <= check_real("gamma", gamma) <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")
    rewards = rewards.masked_fill(~counted, 0.0)
    found = [torch.zeros_like(rewards[:, 0])] if rewards.shape[1] else []
    for t in range(rewards.shape[1] - 1, -1, -1):
        found.append(rewards[:, t] + gamma * found[-1])
    total = torch.stack(found[:0:-1], 1) if found else rewards
    if length_normalized:
        total = total / counted.flip(1).cumsum(1).flip(1).clamp(min=1)
    return total.masked_fill(~counted, 0.0)


def whiten(values: Tensor, counted: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """``(values - mean) / sqrt(variance + epsilon)`` with both over what counts, all of the batch; 0 elsewhere.

    Args:
        values: ``[B, T]``; what stands where a token does not count has no influence.
        counted: bool ``[B, T]``.
        epsilon: added to the (population) variance.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    check_counted(values, counted)
    values = values.masked_fill(~counted, 0.0)
    count = counted.sum().clamp(min=1)
    centred = (values - values.sum() / count).masked_fill(~counted, 0.0)
    variance = centred.square().sum() / count
    return centred * (variance + epsilon).rsqrt()


def log_mixture(teacher_log_probs: Tensor, student_log_probs: Tensor, share: float) -> Tensor:
    """``log(a p + (1 - a) q)`` of taken tokens: the distribution that teacher-mixed sampling draws from, ``share`` = a.

    ``student_log_probs - log_mixture(..)`` is the logarithm of the importance weight q / (a p + (1 - a) q).
    """
    check_floating("teacher_log_probs", teacher_log_probs)
    check_floating("student_log_probs", student_log_probs)
    a = check_real("share", share)
    if not 0 <= a <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    if a == 0:
        return student_log_probs
    if a == 1:
        return teacher_log_probs
    return torch.logaddexp(teacher_log_probs + math.log(a), student_log_probs + math.log1p(-a))


class Acceptance(NamedTuple):
    """What speculative sampling makes of proposed tokens."""

    accepted: Tensor
    """bool ``[...]``: the proposal is among the teacher's most probable."""
    token_ids: Tensor
    """int64 ``[...]``: the proposal, or what was drawn from the teacher instead."""


def speculative_acceptance(
    teacher: Source,
    proposed: Tensor,
    k: int = 25,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    candidates: int = 1024,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Acceptance:
    """Keeps the student's tokens that are among the teacher's top k, and draws the others anew from the teacher.

    Speculative knowledge distillation (ICLR 2025) proposes a few tokens, takes them up to the first that is not accepted and
    its replacement, and goes on from there. Ranks are counted (``kd.token_ranks``), so that tokens as probable as the k-th
    are accepted, too. No gradient.

    Args:
        teacher: logits ``[..., V]`` or ``kd.LMHead`` of the rows that predict the proposals (nothing is shifted).
        proposed: token ids ``[...]``.
        k: 25 in the paper's code.
        temperature, top_p: of the draws; 0.2 and 0.5 in the paper's code. None: the whole distribution.
        candidates: with ``top_p``, the most ids that a draw chooses among.
        generator: of the random numbers.
        memory_budget, backend: see ``kd.token_ranks``.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    if check_integer("k", k) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_integral("proposed", proposed)
    accepted = token_ranks(teacher, proposed, memory_budget=memory_budget, backend=backend) < k
    if top_p is None:
        sampled = sample_logits(
            teacher, 1, generator=generator, temperature=temperature, memory_budget=memory_budget, backend=backend
        )
        drawn = sampled.ids.squeeze(-1)
    else:
        found = topk_logits(
            teacher,
            min(check_integer("candidates", candidates), vocabulary(teacher)),
            top_p=top_p,
            temperature=temperature,
            memory_budget=memory_budget,
            backend=backend,
        )
        # A row without a distribution (NaN) has no entries; it gets the id -1 as it does above.
        probabilities = found.log_probs.exp().nan_to_num(0.0).reshape(-1, found.ids.shape[-1])
        nothing = probabilities.sum(-1, keepdim=True) == 0
        place = torch.multinomial(probabilities + nothing, 1, generator=generator)
        drawn = found.ids.reshape(place.shape[0], -1).gather(-1, place).reshape(proposed.shape)
    return Acceptance(accepted, torch.where(accepted, proposed.long(), drawn))


def vocabulary(source: Source) -> int:
    """Entries of a source's vocabulary."""
    return source.weight.shape[0] if isinstance(source, LMHead) else tensor_of("teacher", source).shape[-1]


def use_student_data(fraction: float, *, generator: torch.Generator | None = None) -> bool:
    """GKD's choice for a batch: True with probability ``fraction`` (lambda): let the student generate its responses.

    Args:
        fraction: in [0, 1].
        generator: on the CPU; give all processes equal ones, so that they choose alike.
    """
    if not 0 <= check_real("fraction", fraction) <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    return float(torch.rand((), generator=generator, dtype=torch.float64)) < fraction


def generalized_jsd(beta: float) -> Divergence:
    """GKD's divergence: ``kd.JSD(beta)``, but the forward KL at 0 and the reverse KL at 1, as its special cases have it.

    The value jumps there: ``JSD(beta) / beta`` tends to the forward KL for small beta, JSD itself to 0.
    """
    share = check_real("beta", beta)
    if share == 0:
        return ForwardKL()
    return ReverseKL() if share == 1 else JSD(share)

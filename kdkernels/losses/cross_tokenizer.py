"""Losses between models whose tokenizers differ, on chunks of text that both cover with whole tokens (``kd.alignment``)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdkernels.alignment import Chunks, chunk_sums, first_tokens, last_tokens, merge_chunks
from kdkernels.arguments.rows import check_memory_budget, side
from kdkernels.checks import check_choice, check_flag, check_floating, check_integral, check_real
from kdkernels.functional import sorted_l1, token_log_probs, token_set_log_probs
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import (
    IGNORED,
    batch_of,
    check_ids,
    check_mask,
    cross_entropy,
    detached,
    mean_over,
    next_tokens,
    take_tokens,
)
from kdkernels.reference.rows import side_logits, tempered_log_softmax
from kdkernels.sources import Source

__all__ = ["ALM", "GOLD", "ALMLatents"]

MEASURES = (
    "binary_ce",
    "reverse_binary_kl",
    "temperature_limit",
    "abs",
    "abs_exp",
    "renyi",
    "k2",
    "k3",
)
NUMERATORS = ("chunk_count", "token_count", "log1p_token_count")
DENOMINATORS = ("chunk_count", "token_count")


class TokenScores(NamedTuple):
    """What ALM asks of a model: two numbers per token, which may be stored.

    log_probs: ``[B, T]``, the log-probability of each token given those in front of it; the first is not looked at.
    space: ``[B, T]``, the log-probability that whitespace begins behind each token, or None.
    """

    log_probs: Tensor
    space: Tensor | None = None


@register("alm")
class ALM(nn.Module):
    """Approximate likelihood matching: both models should find a chunk of text equally likely.

    With ``P`` the product of the token probabilities of a chunk, ``a = log P_teacher / temperature - epsilon`` and
    ``b = log P_student / temperature - epsilon``, the loss of a chunk is ``-(e^a b + (1 - e^a) log(1 - e^b))``; or another
    ``measure``:

    ======================  ======================================================================
    "binary_ce"             the above
    "reverse_binary_kl"     ``e^b (b - a) + (1 - e^b) (log(1 - e^b) - log(1 - e^a))``
    "abs_exp"               ``|e^a - e^b|``
    "temperature_limit"     ``(a - b) + a log(-b) - a log(-a)``, without temperature
    "renyi"                 Renyi divergence of order ``renyi_alpha`` of the two outcomes, without temperature
    "abs"                   ``|log P_teacher - log P_student|``, without temperature and epsilon
    "k2", "k3"              ``r^2 / 2`` and ``e^r - 1 - r`` with ``r = (log P_teacher - log P_student) / temperature``
    ======================  ======================================================================

    A chunk's probability is biased by what its last token excludes. If the sets of tokens that begin with whitespace are
    given, the log-probability that whitespace follows the chunk is added to both ``log P`` ("append_space" in the authors'
    code), and with ``merge_threshold`` a chunk behind which the teacher finds whitespace less likely than that is merged
    with the next ("merge_by_space_prob").

    Source: Minixhofer et al. 2025 (arXiv 2503.20083). Confidence: from the authors' code (JAX). Two things differ: a chunk
    counts only if all its tokens on both sides have a probability and are in the masks (there, what is left of it counts),
    and the denominator counts merged chunks (there, the map of the merge is applied to it twice).

    Args:
        measure: see above.
        temperature: of the probabilities of chunks, not of tokens.
        epsilon: keeps probabilities below 1.
        numerator: the weight of a chunk: "chunk_count" (1), "token_count" (the teacher's tokens in it) or
            "log1p_token_count".
        denominator: "chunk_count" or "token_count", what the weighted sum is divided by.
        renyi_alpha: order of the Renyi divergence, positive and other than 1; the authors' value was not available.
        student_space, teacher_space: ids ``[K]`` or bool ``[V]`` of the tokens that begin with whitespace (see
            ``kd.alignment.space_tokens``), or None. With both the log-probabilities of chunks are corrected.
        merge_threshold: None, or the probability below which chunks are merged; needs ``teacher_space``. The authors use
            0.1 with all chunks, and 1e-4.
        backend: of the kernels, see ``kd.token_log_probs``.
    """

    def __init__(
        self,
        measure: str = "binary_ce",
        *,
        temperature: float = 100.0,
        epsilon: float = 1e-6,
        numerator: str = "chunk_count",
        denominator: str = "chunk_count",
        renyi_alpha: float = 2.0,
        student_space: Tensor | None = None,
        teacher_space: Tensor | None = None,
        merge_threshold: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.measure = check_choice("measure", measure, MEASURES)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.numerator = check_choice("numerator", numerator, NUMERATORS)
        self.denominator = check_choice("denominator", denominator, DENOMINATORS)
        self.renyi_alpha = check_real("renyi_alpha", renyi_alpha, positive=True)
        if self.renyi_alpha == 1:
            raise ValueError("renyi_alpha must be a positive number other than 1, got 1")
        if student_space is not None and teacher_space is None:
            raise ValueError("student_space needs teacher_space: both log-probabilities are corrected, or neither")
        if merge_threshold is not None and teacher_space is None:
            raise ValueError("merge_threshold needs teacher_space, whose probability it is compared with")
        self.merge_threshold = (
            None if merge_threshold is None else check_real("merge_threshold", merge_threshold, positive=True)
        )
        self.student_space: Tensor | None
        self.teacher_space: Tensor | None
        self.register_buffer("student_space", student_space, persistent=False)
        self.register_buffer("teacher_space", teacher_space, persistent=False)

    def forward(
        self,
        student: Source,
        teacher: Source | TokenScores,
        student_ids: Tensor,
        teacher_ids: Tensor | None,
        chunks: Chunks,
        *,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a 0-d tensor; the gradient flows to the student. 0 if no chunk counts.

        Args:
            student: logits ``[B, T, V]`` or ``kd.LMHead`` with hidden states ``[B, T, H]``; what stands at a token predicts
                the next one, as models give it. Nothing is to be shifted.
            teacher: the same of the teacher ``[B, S, ...]`` with its own vocabulary, or its stored ``scores``.
            student_ids, teacher_ids: the token ids ``[B, T]`` and ``[B, S]``; those of stored scores may be None.
            chunks: from ``kd.alignment.collate``.
            student_mask, teacher_mask: bool, True where a token counts; None: everywhere. The first token never does, for
                nothing predicts it.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_ids("student_ids", student_ids, batch_of("student", student), "student")
        if not isinstance(teacher, TokenScores):
            if teacher_ids is None:
                raise TypeError("teacher_ids must be a tensor of token ids, got None")
            check_ids("teacher_ids", teacher_ids, batch_of("teacher", teacher), "teacher")
        valid = counted_chunks(chunks, student_ids.shape, student_mask, teacher_mask)
        if not isinstance(teacher, TokenScores):
            assert teacher_ids is not None
            with torch.no_grad():
                teacher = self.scores(teacher, teacher_ids, self.teacher_space, chunks.teacher, valid)
        own = self.scores(student, student_ids, self.student_space, chunks.student, valid)
        return self.from_scores(own, teacher, chunks, student_mask=student_mask, teacher_mask=teacher_mask)

    def scores(
        self, source: Source, ids: Tensor, space: Tensor | None, chunk_ids: Tensor, valid: Tensor | None = None
    ) -> TokenScores:
        """What a teacher's store has to keep: the scores of the tokens in chunks, 0 elsewhere.

        Args:
            source, ids: of one model, ``[B, T]``.
            space: its tokens that begin with whitespace, or None.
            chunk_ids: its half of the chunks.
            valid: bool ``[B, C]``, the chunks that are wanted; None: all.
        """
        wanted = chunk_ids >= 0
        if valid is not None:
            wanted &= valid.gather(-1, chunk_ids.clamp(min=0))
        labels = next_tokens(ids.masked_fill(~wanted, IGNORED))
        log_probs = token_log_probs(source, labels, backend=self.backend)
        log_probs = torch.cat([torch.zeros_like(log_probs[:, :1]), log_probs[:, :-1]], 1)
        if space is None:
            return TokenScores(log_probs)
        ends = wanted & (chunk_ids != next_tokens(chunk_ids, -2))
        return TokenScores(log_probs, token_set_log_probs(source, space, mask=ends, backend=self.backend).clamp(max=0))

    def from_scores(
        self,
        student: TokenScores,
        teacher: TokenScores,
        chunks: Chunks,
        *,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss from scores of both models, see ``TokenScores`` and ``forward``."""
        check_scores("student", student, chunks.student, self.student_space is not None)
        check_scores("teacher", teacher, chunks.teacher, self.teacher_space is not None)
        valid = counted_chunks(chunks, student.log_probs.shape, student_mask, teacher_mask)
        if self.merge_threshold is not None:
            assert teacher.space is not None
            followed = at_ends(teacher.space, chunks.teacher, chunks.size).exp() > self.merge_threshold
            chunks = merge_chunks(chunks, followed | ~valid)
            valid = counted_chunks(chunks, student.log_probs.shape, student_mask, teacher_mask)
        log_q = self.chunk_log_probs(student, chunks.student, chunks.size)
        log_p = self.chunk_log_probs(teacher, chunks.teacher, chunks.size).detach()
        # Chunks that do not count get a probability that every measure can digest.
        log_p, log_q = (each.masked_fill(~valid, -1.0) for each in (log_p, log_q))
        values = self.chunk_measure(log_p.to(log_q.dtype), log_q)
        tokens = chunk_sums(torch.ones_like(chunks.teacher), chunks.teacher, chunks.size).to(values.dtype)
        weights = {"chunk_count": torch.ones_like(tokens), "token_count": tokens, "log1p_token_count": tokens.log1p()}
        total = (weights[self.numerator] * values).masked_fill(~valid, 0).sum()
        count = weights[self.denominator].masked_fill(~valid, 0).sum()
        return total / count.clamp(min=1)

    def chunk_log_probs(self, scores: TokenScores, chunk_ids: Tensor, size: int) -> Tensor:
        found = chunk_sums(scores.log_probs, chunk_ids, size).clamp(max=0)
        if scores.space is None or self.student_space is None:
            return found
        return found + at_ends(scores.space, chunk_ids, size)

    def chunk_measure(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The loss of each chunk from the log-probabilities ``[...]`` of teacher and student."""
        if self.measure == "abs":
            return (log_p - log_q).abs()
        ratio = (log_p - log_q) / self.temperature
        if self.measure == "k2":
            return ratio.square() / 2
        if self.measure == "k3":
            return torch.expm1(ratio) - ratio
        tempered = self.measure not in {"temperature_limit", "renyi"}
        a, b = (each / (self.temperature if tempered else 1.0) - self.epsilon for each in (log_p, log_q))
        if self.measure == "temperature_limit":
            return (a - b) + a * torch.log(-b) - a * torch.log(-a)
        if self.measure == "abs_exp":
            return (a.exp() - b.exp()).abs()
        if self.measure == "renyi":
            alpha = self.renyi_alpha
            outcomes = alpha * a + (1 - alpha) * b, alpha * log1mexp(a) + (1 - alpha) * log1mexp(b)
            return torch.logaddexp(*outcomes) / (alpha - 1)
        if self.measure == "reverse_binary_kl":
            return b.exp() * (b - a) - torch.expm1(b) * (log1mexp(b) - log1mexp(a))
        return torch.expm1(a) * log1mexp(b) - a.exp() * b


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for ``x < 0`` without loss of digits near 0 and far from it (Maechler 2012)."""
    near = x > -math.log(2)
    # The branch not taken must not send NaN into the gradient either.
    return torch.where(
        near, torch.log(-torch.expm1(x.masked_fill(~near, -1))), torch.log1p(-torch.exp(x.masked_fill(near, -1)))
    )


def at_ends(values: Tensor, chunk_ids: Tensor, size: int) -> Tensor:
    """``[B, C]``: the values ``[B, T]`` at the last token of each chunk, 0 for chunks without tokens."""
    last = last_tokens(chunk_ids, size)
    return values.gather(-1, last.clamp(min=0)).masked_fill(last < 0, 0)


def check_chunks(chunks: Chunks, student: torch.Size, teacher: torch.Size | None = None) -> None:
    if not isinstance(chunks, Chunks):
        raise TypeError(f"chunks must be kd.alignment.Chunks, got {type(chunks).__name__}")
    for name, shape in (("student", student), ("teacher", teacher)):
        given = getattr(chunks, name)
        if shape is not None and given.shape != shape:
            raise ValueError(
                f"chunks: {name} must have the shape {tuple(shape)} of the tokens, got {tuple(given.shape)}"
            )


def counted_chunks(
    chunks: Chunks, student_shape: torch.Size, student_mask: Tensor | None, teacher_mask: Tensor | None
) -> Tensor:
    """bool ``[B, C]``: the chunks all of whose tokens count on both sides."""
    check_chunks(chunks, student_shape)
    counted = torch.arange(chunks.size, device=chunks.counts.device) < chunks.counts.unsqueeze(-1)
    for name, ids, mask in (
        ("student_mask", chunks.student, student_mask),
        ("teacher_mask", chunks.teacher, teacher_mask),
    ):
        missing = ~check_mask(name, mask, ids)
        missing[:, :1] = True  # nothing predicts the first token
        counted = counted & (chunk_sums(missing.long(), ids, chunks.size) == 0)
    return counted


def check_scores(name: str, scores: TokenScores, chunk_ids: Tensor, with_space: bool) -> None:
    """Scores must be one per token, with those of whitespace where they are asked for."""
    for field, values in (("log_probs", scores.log_probs), ("space", scores.space)):
        if values is None and with_space:
            raise ValueError(f"{name}: the scores lack {field}, which {name}_space asks for")
        if values is not None:
            check_floating(f"{name}: {field}", values)
            if values.shape != chunk_ids.shape:
                raise ValueError(
                    f"{name}: {field} must have the shape {tuple(chunk_ids.shape)} of the chunks, got {tuple(values.shape)}"
                )


@register("alm_latents")
class ALMLatents(nn.Module):
    """The latent loss that may accompany ALM: hidden states should agree where chunks end.

    ``mean over chunks and channels of (h_S - h_T)^2 / (mean over chunks of h_T^2 + epsilon)``, the mean square of the
    teacher per channel ("l2_channelwise") or of all channels ("l2"). Source and confidence as of ``ALM``, from the authors'
    code; a student of another width is projected by a linear layer.

    Args:
        student_size, teacher_size: widths of the hidden states; without them, or if they are equal, nothing is projected.
        channelwise: which normalisation.
        epsilon: keeps it from dividing by 0.
    """

    def __init__(
        self,
        student_size: int | None = None,
        teacher_size: int | None = None,
        *,
        channelwise: bool = True,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.channelwise = channelwise
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.projector: nn.Linear | None = None
        if student_size is not None and teacher_size is not None and student_size != teacher_size:
            self.projector = nn.Linear(student_size, teacher_size)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, chunks: Chunks) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and the projector.

        Args:
            student_hidden: ``[B, T, d_S]``.
            teacher_hidden: ``[B, S, d_T]``.
            chunks: from ``kd.alignment.collate``.
        """
        check_floating("student_hidden", student_hidden)
        check_floating("teacher_hidden", teacher_hidden)
        check_chunks(chunks, batch_of("student_hidden", student_hidden), batch_of("teacher_hidden", teacher_hidden))
        counted = (torch.arange(chunks.size, device=chunks.counts.device) < chunks.counts.unsqueeze(-1)).unsqueeze(-1)

        def states(hidden: Tensor, ids: Tensor) -> Tensor:
            taken = take_tokens(hidden, last_tokens(ids, chunks.size))
            assert isinstance(taken, Tensor)
            return taken.masked_fill(~counted, 0).to(torch.promote_types(taken.dtype, torch.float32))

        own, target = states(student_hidden, chunks.student), states(teacher_hidden.detach(), chunks.teacher)
        if self.projector is not None:
            own = self.projector(own)
        if own.shape[-1] != target.shape[-1]:
            raise ValueError(
                f"student_hidden has width {own.shape[-1]} and teacher_hidden {target.shape[-1]}; give both sizes to project"
            )
        count = counted.sum().clamp(min=1)
        size = target.square().sum((0, 1), keepdim=True) / count
        if not self.channelwise:
            size = size.mean()
        loss = (own - target).square() / (size + self.epsilon)
        return loss.masked_fill(~counted, 0).sum() / (count * own.shape[-1])


@register("gold")
class GOLD(nn.Module):
    """General online logit distillation: distributions at the chunks that both tokenizations share, sorted or matched.

    Where a chunk has several tokens, one distribution of them is multiplied by the probabilities of the chunk's other
    tokens, so that the entry of the token that did occur is the probability of the chunk:

    - merge="observed": the distribution of the first token, times the probabilities of those behind it;
    - merge="bayesian": the distribution of the last token, times the probabilities of those in front of it, which is the
      chain rule for every entry.

    The loss of a chunk is ``sum_r |q_(r) - p_(r)|`` of the merged distributions (as in ``ULD``). The hybrid loss compares
    the entries that both vocabularies write alike by a generalised Jensen-Shannon divergence, ``beta KL(p||m) + (1 - beta)
    KL(q||m)`` with ``m = beta p + (1 - beta) q`` (beta = 0: ``KL(p||q)``, 1: ``KL(q||p)``), and only the others sorted:
    ``matched_weight JSD + unmatched_weight L1``. The result is the mean over the chunks of each text, then over the batch.

    Chunks of one token on both sides run in the kernels of ``kd.sorted_l1``; merged and hybrid ones, whose entries do not add
    up to 1, in plain PyTorch a block at a time, picked out with a synchronisation on GPUs.

    Source: Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family", as TRL's ``GOLDTrainer`` computes it
    (version of 2026; facts only). Confidence: from the authors' code.

    Args:
        merge: see above.
        shifted: whether a token's distribution is the one that predicts it. False takes the one at the token itself, as the
            trainer does for "observed"; None: as the trainer, True for "bayesian" alone.
        weight, ce_weight: of the distance and of the student's cross-entropy.
        temperature, teacher_temperature: of the probabilities.
        matched: int64 ``[K, 2]``, ids of student and teacher that mean the same (``kd.alignment.common_tokens``), for the
            hybrid loss; None: all entries are sorted.
        beta: of the divergence, in [0, 1].
        matched_weight, unmatched_weight: None for both: K over the teacher's vocabulary, and the rest to 1.
        floor: probabilities are no less than this in products and logarithms.
        memory_budget: bytes for temporary rows of the vocabularies.
        backend: of the kernels, see ``kd.sorted_l1``.
    """

    def __init__(
        self,
        merge: str = "observed",
        *,
        shifted: bool | None = None,
        weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        matched: Tensor | None = None,
        beta: float = 0.5,
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        floor: float = 1e-8,
        memory_budget: int = 256 << 20,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.merge = check_choice("merge", merge, ("observed", "bayesian"))
        self.shifted = merge == "bayesian" if shifted is None else check_flag("shifted", shifted)
        self.weight = check_real("weight", weight)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.teacher_temperature = check_real("teacher_temperature", teacher_temperature, positive=True)
        self.beta = check_real("beta", beta)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        if (matched_weight is None) != (unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight must both be given, or neither")
        self.weights = None
        if matched_weight is not None:
            self.weights = (
                check_real("matched_weight", matched_weight),
                check_real("unmatched_weight", unmatched_weight),
            )
        self.floor = check_real("floor", floor, positive=True)
        check_memory_budget(memory_budget)
        self.memory_budget = memory_budget
        if matched is not None:
            check_integral("matched", matched)
            if matched.dim() != 2 or matched.shape[1] != 2 or not len(matched):
                raise ValueError(f"matched must have the shape [K, 2] with K > 0, got {tuple(matched.shape)}")
        self.matched: Tensor | None
        self.register_buffer("matched", matched, persistent=False)

    def forward(
        self,
        student: Source,
        teacher: Source,
        student_ids: Tensor,
        teacher_ids: Tensor,
        chunks: Chunks,
        *,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a 0-d tensor; the gradient flows to the student. Arguments as of ``ALM``."""
        check_ids("student_ids", student_ids, batch_of("student", student), "student")
        check_ids("teacher_ids", teacher_ids, batch_of("teacher", teacher), "teacher")
        check_chunks(chunks, student_ids.shape, teacher_ids.shape)
        valid = counted_chunks(chunks, student_ids.shape, student_mask, teacher_mask)
        rows, scales = self.merged(student, student_ids, chunks.student, valid, self.temperature)
        with torch.no_grad():
            target = self.merged(detached(teacher), teacher_ids, chunks.teacher, valid, self.teacher_temperature)
        values = self.compare(rows, target[0], scales, target[1], valid)
        loss = self.weight * mean_over(values, valid, 1).mean()
        if self.ce_weight == 0:
            return loss
        kept = check_mask("student_mask", student_mask, student_ids)
        return loss + self.ce_weight * cross_entropy(student, student_ids.masked_fill(~kept, IGNORED))

    def merged(
        self, source: Source, ids: Tensor, chunk_ids: Tensor, valid: Tensor, temperature: float
    ) -> tuple[Source, Tensor]:
        """The distribution of each chunk, as a source ``[B, C]``, and the logarithm ``[B, C]`` of what multiplies it."""
        size = valid.shape[1]
        base = (last_tokens if self.merge == "bayesian" else first_tokens)(chunk_ids, size)
        is_base = torch.arange(ids.shape[1], device=ids.device) == base.gather(-1, chunk_ids.clamp(min=0))
        factor = (chunk_ids >= 0) & ~is_base & valid.gather(-1, chunk_ids.clamp(min=0))
        labels = ids.masked_fill(~factor, IGNORED)
        if self.shifted:
            log_probs = token_log_probs(source, next_tokens(labels), temperature=temperature, backend=self.backend)
            log_probs = torch.cat([torch.zeros_like(log_probs[:, :1]), log_probs[:, :-1]], 1)
        else:
            log_probs = token_log_probs(source, labels, temperature=temperature, backend=self.backend)
        scale = chunk_sums(log_probs.clamp(min=math.log(self.floor)), chunk_ids, size)
        places = (base - int(self.shifted)).masked_fill(~valid, 0)
        return take_tokens(source, places), scale

    def compare(self, student: Source, teacher: Source, scales: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """``[B, C]``, 0 where a chunk does not count."""
        single = valid & (scales == 0) & (targets == 0) if self.matched is None else torch.zeros_like(valid)
        values = scales.new_zeros(valid.shape)
        if self.matched is None:
            kernel = sorted_l1(
                student,
                teacher,
                temperature=self.temperature,
                teacher_temperature=self.teacher_temperature,
                mask=single,
                backend=self.backend,
            )
            assert isinstance(kernel, Tensor)
            values = values + kernel
        # Products of probabilities are no softmax of anything, which is all that kernels take.
        places = (valid & ~single).reshape(-1).nonzero().squeeze(-1)
        if not len(places):
            return values
        block = max(1, self.memory_budget // (32 * self.width(student, teacher)))
        found = [
            checkpoint(self.compare_rows, student, teacher, scales, targets, part, use_reentrant=False)
            for part in torch.split(places, block)
        ]
        return values.reshape(-1).index_add(0, places, torch.cat(found).to(values.dtype)).reshape(valid.shape)

    def width(self, student: Source, teacher: Source) -> int:
        return side("student", student, None)[2] + side("teacher", teacher, None)[2]

    def compare_rows(self, student: Source, teacher: Source, scales: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """``[n]``, the values of some chunks."""
        q = probabilities(student, places, self.temperature, scales)
        p = probabilities(teacher, places, self.teacher_temperature, targets)
        if self.matched is None:
            return sorted_distance(q, p)
        mine, theirs = self.matched.unbind(1)
        weights = self.weights
        if weights is None:
            weights = len(self.matched) / p.shape[1], 1 - len(self.matched) / p.shape[1]
        matched = self.divergence(p[:, theirs].clamp(min=self.floor).log(), q[:, mine].clamp(min=self.floor).log())
        rest = unmatched(q, mine), unmatched(p, theirs)
        if not all(each.shape[1] for each in rest):
            return weights[0] * matched
        return weights[0] * matched + weights[1] * sorted_distance(*rest)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The generalised divergence of the logarithms ``[n, K]``, which need not be normalised."""
        if self.beta == 0:
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        if self.beta == 1:
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        terms = self.beta * log_p.exp() * (log_p - log_m) + (1 - self.beta) * log_q.exp() * (log_q - log_m)
        return terms.sum(-1)


def probabilities(source: Source, places: Tensor, temperature: float, log_scales: Tensor) -> Tensor:
    """``[n, V]`` of some tokens of a source, times their scales."""
    rows, _, _ = side("source", source, None)
    logits = side_logits(rows._replace(tensor=rows.tensor[places]))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = tempered_log_softmax(logits, rows.softcap, temperature, dtype)
    return (log_probs + log_scales.reshape(-1)[places].to(dtype).unsqueeze(-1)).exp()


def unmatched(values: Tensor, ids: Tensor) -> Tensor:
    """The columns that are not among the ids."""
    kept = torch.ones(values.shape[1], dtype=torch.bool, device=values.device).index_fill(0, ids.long(), False)
    return values[:, kept]


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """``sum_r |q_(r) - p_(r)|`` of rows that need not sum to 1, the shorter padded with zeros."""
    q, p = q.sort(-1, descending=True).values, p.sort(-1, descending=True).values
    width = max(q.shape[1], p.shape[1])
    q, p = (nn.functional.pad(each, (0, width - each.shape[1])) for each in (q, p))
    return (q - p).abs().sum(-1)

"""Losses on the order of a vocabulary, of classes, or of the documents of a query."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdkernels.arguments.divergence import REDUCTIONS
from kdkernels.checks import check_choice, check_floating, check_integral, check_real
from kdkernels.debugging import values_are_checked
from kdkernels.functional import distillation_loss, plackett_luce, token_log_probs
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import check_mask, detached, mean_over
from kdkernels.sources import Source

__all__ = [
    "CPRD",
    "PLD",
    "CADETListwise",
    "DiSCoRetrieval",
    "MarginMSE",
    "TransEncoder",
    "flops",
    "percentile_scaled",
]


@register("pld")
class PLD(nn.Module):
    """The Plackett-Luce likelihood of the label and then the teacher's order, each rank weighted by its probability.

    ``L = mean_n sum_k w_k (logsumexp_{l >= k} s[pi_l] - s[pi_k])``, ``pi`` the label and then the other classes by falling
    teacher logit, ``w = softmax(t / temperature)[pi]``. It stands in the place of a cross-entropy and a KL divergence, without
    a weight between them. See ``kd.plackett_luce``.

    Source: PLD, NeurIPS 2025. Confidence: from the paper's text and another implementation.

    Args:
        temperature: of the weights.
        top_k: None: all classes, as published. A number: only so many ranks, with one sum over all other classes behind them,
            which costs no sort.
        reduction: "mean" over the rows that count, "sum" or "none".
        backend: of the kernels.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.top_k = top_k
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, labels: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor, or ``[...]`` without reduction; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``.
            labels: ``[...]``, -100 drops a row; None: the teacher alone says what comes first.
            mask: bool ``[...]``, True where a row counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        return plackett_luce(
            student,
            detached(teacher),
            labels=labels,
            temperature=self.temperature,
            top_k=self.top_k,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )


def check_lists(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[B, n]`` and a bool mask like them; the teacher without gradient."""
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.dim() != 2 or teacher.shape != student.shape:
        raise ValueError(
            f"student and teacher must be scores of the same lists, shape [B, n], got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    mask = check_mask("mask", mask, student)
    return student, teacher.detach().masked_fill(~mask, 0.0), mask


def listwise_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, teacher_temperature: float, backend: str | None
) -> Tensor:
    """``KL(softmax(t / teacher_temperature) || softmax(s / temperature))`` over the documents that count, the mean of lists."""
    return distillation_loss(
        student.masked_fill(~mask, -math.inf),
        teacher.masked_fill(~mask, -math.inf),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask.any(-1),
        backend=backend,
    )


@register("margin_mse")
class MarginMSE(nn.Module):
    """The squared error of differences of scores between documents of one query.

    ``mean ((s_i - s_j) - (t_i - t_j))^2`` over pairs of a list, then over the lists. All pairs ``(i, j)`` of n documents are
    ``2 Var(s - t)``, in O(n).

    Source: Hofstätter et al. 2020 (arXiv 2010.02666). Confidence: from the authors' code, which has pairs, n = 2. An ensemble
    of teachers is the mean of their scores.

    Args:
        pairs: "positive": the first document of a list against each of the others, as published. "all": every ordered pair,
            i = j among them.
    """

    def __init__(self, pairs: str = "positive") -> None:
        super().__init__()
        self.pairs = check_choice("pairs", pairs, ("positive", "all"))

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: scores ``[B, n]`` of the n documents of B queries, the positive one first.
            mask: bool ``[B, n]``, True where there is a document. Lists without a pair do not count.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        student, teacher, mask = check_lists(student, teacher, mask)
        difference = student.masked_fill(~mask, 0.0) - teacher
        if self.pairs == "all":
            centred = difference - mean_over(difference, mask, -1).unsqueeze(-1)
            return mean_over(2 * mean_over(centred.square(), mask, -1), mask.any(-1))
        others = mask[:, 1:] & mask[:, :1]
        errors = (difference[:, :1] - difference[:, 1:]).square()
        return mean_over(mean_over(errors, others, -1), others.any(-1))


def percentile_scaled(scores: Tensor, *, mask: Tensor | None = None, low: float = 1.0, high: float = 99.0) -> Tensor:
    """Scores brought to [0, 1]: their percentile ``low`` to 0 and ``high`` to 1, what lies beyond clipped.

    Args:
        scores: of any shape; the percentiles are those of all of them (where the ``mask`` is True).
        low, high: 0 <= low < high <= 100.

    Returns:
        Like ``scores``; zeros where both percentiles are equal.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    check_floating("scores", scores)
    if not 0 <= check_real("low", low) < check_real("high", high) <= 100:
        raise ValueError(f"low and high must satisfy 0 <= low < high <= 100, got {low} and {high}")
    counted = scores if mask is None else scores[check_mask("mask", mask, scores)]
    if not counted.numel():
        return torch.zeros_like(scores)
    ends = torch.tensor([low / 100, high / 100], dtype=torch.float64, device=scores.device)
    bottom, top = torch.quantile(counted.double().flatten(), ends)
    width = top - bottom
    scaled: Tensor = ((scores.double() - bottom) / torch.where(width > 0, width, 1.0)).clamp(0, 1)
    return torch.where(width > 0, scaled, 0.0).to(scores.dtype)


@register("cadet_listwise")
class CADETListwise(nn.Module):
    """Listwise distillation of a retriever, at two temperatures, and a contrastive loss without probable false negatives.

    ``KL(softmax(t / teacher_temperature) || softmax(s / temperature)) + contrastive_weight InfoNCE``, where InfoNCE is
    ``-log softmax(s / contrastive_temperature)`` of the first document, over it and the negatives whose teacher score is not
    above ``threshold`` times the list's largest. Both are means over the lists.

    Source: CADET, arXiv 2502.19712. Confidence: from the authors' code, in which the teacher's scores are scaled by
    ``percentile_scaled`` over the data beforehand and lists hold 20 documents.

    Args:
        temperature, teacher_temperature: of the divergence. There is no factor of their squares.
        contrastive_weight, contrastive_temperature, threshold: of InfoNCE.
        backend: of the kernels.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        teacher_temperature: float = 0.3,
        *,
        contrastive_weight: float = 0.1,
        contrastive_temperature: float = 0.01,
        threshold: float = 0.6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.teacher_temperature = check_real("teacher_temperature", teacher_temperature, positive=True)
        self.contrastive_weight = check_real("contrastive_weight", contrastive_weight)
        self.contrastive_temperature = check_real("contrastive_temperature", contrastive_temperature, positive=True)
        self.threshold = check_real("threshold", threshold)
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: scores ``[B, n]``, inner products of query and documents, the positive document first.
            teacher: scores ``[B, n]`` in [0, 1].
            mask: bool ``[B, n]``, True where there is a document.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        student, teacher, mask = check_lists(student, teacher, mask)
        loss = listwise_kl(student, teacher, mask, self.temperature, self.teacher_temperature, self.backend)
        if self.contrastive_weight == 0:
            return loss
        largest = teacher.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
        kept = mask & (teacher <= self.threshold * largest)
        kept[:, 0] = mask[:, 0]
        log_probs = token_log_probs(
            student.masked_fill(~kept, -math.inf),
            torch.zeros_like(student[:, 0], dtype=torch.int64),
            temperature=self.contrastive_temperature,
            mask=mask[:, 0],
            backend=self.backend,
        )
        return loss - self.contrastive_weight * mean_over(log_probs, mask[:, 0])


def flops(representations: Tensor) -> Tensor:
    """How many products sparse vectors cost: ``sum_j (mean_i |x_ij|)^2`` of ``[..., V]`` (Paria et al. 2020)."""
    check_floating("representations", representations)
    activity: Tensor = representations.reshape(-1, representations.shape[-1]).abs().mean(0)
    return activity.square().sum()


@register("disco_retrieval")
class DiSCoRetrieval(nn.Module):
    """Distillation of similarity scores into a sparse retriever.

    ``KL(softmax(t) || softmax(s))`` over one positive document and n - 1 negatives, ``s`` the inner product of sparse vectors
    of query and document; several teachers are fused by the mean of their scores. To it can be added the cross-entropy of
    the first document, all-pairs Margin-MSE, and a penalty on the vectors' density.

    Source: DiSCo, SIGIR 2025. Confidence: from the authors' code for the forms; it has weights of 0.01, 0.05 and 0.99 for its
    options, whose assignment was not available, so that the options are off by default.

    Args:
        temperature: of both sides. There is no factor of its square.
        contrastive_weight, margin_weight: of the other two terms on scores.
        query_sparsity, document_sparsity: weights of the penalties.
        sparsity: "flops" (``flops``) or "l1", the mean over the vectors of their L1 norm.
        backend: of the kernels.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        contrastive_weight: float = 0.0,
        margin_weight: float = 0.0,
        query_sparsity: float = 0.0,
        document_sparsity: float = 0.0,
        sparsity: str = "flops",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.contrastive_weight = check_real("contrastive_weight", contrastive_weight)
        self.margin_weight = check_real("margin_weight", margin_weight)
        self.query_sparsity = check_real("query_sparsity", query_sparsity)
        self.document_sparsity = check_real("document_sparsity", document_sparsity)
        self.sparsity = check_choice("sparsity", sparsity, ("flops", "l1"))
        self.margins = MarginMSE("all")
        self.backend = backend

    def forward(self, queries: Tensor, documents: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to queries and documents.

        Args:
            queries, documents: vectors ``[B, V]`` and ``[B, n, V]``, the positive document first.
            teacher: scores ``[B, n]``, or ``[M, B, n]`` of M teachers.
            mask: bool ``[B, n]``, True where there is a document.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        for name, tensor, dims in (("queries", queries, 2), ("documents", documents, 3)):
            check_floating(name, tensor)
            if tensor.dim() != dims:
                raise ValueError(f"{name} must have {dims} dimensions, got the shape {tuple(tensor.shape)}")
        check_floating("teacher", teacher)
        fused = teacher.mean(0) if teacher.dim() == 3 else teacher
        scores = (documents @ queries.unsqueeze(-1)).squeeze(-1)
        student, fused, mask = check_lists(scores, fused, mask)
        loss = listwise_kl(student, fused, mask, self.temperature, self.temperature, self.backend)
        if self.contrastive_weight:
            first = torch.zeros_like(student[:, 0], dtype=torch.int64)
            log_probs = token_log_probs(
                student.masked_fill(~mask, -math.inf), first, mask=mask[:, 0], backend=self.backend
            )
            loss = loss - self.contrastive_weight * mean_over(log_probs, mask[:, 0])
        if self.margin_weight:
            loss = loss + self.margin_weight * self.margins(student, fused, mask=mask)
        for weight, vectors in ((self.query_sparsity, queries), (self.document_sparsity, documents)):
            if weight:
                penalty = flops(vectors) if self.sparsity == "flops" else vectors.abs().sum(-1).mean()
                loss = loss + weight * penalty
        return loss


@register("cprd")
class CPRD(nn.Module):
    """Contrastive partial ranking: a cross encoder orders the hard negatives that a dual encoder proposes.

    For every rank i of the candidates that count, ordered by falling teacher score, the loss is
    ``-log(exp(s_i / T) / (exp(s_i / T) + sum_{ranked lower} exp(s_j / T) + sum_easy exp(s_j / T)))``, and the mean over the
    ranks of a query, then over the queries. That is a Plackett-Luce likelihood truncated to the candidates, with everything
    else in one sum behind them. Use both directions, images and texts, and take the mean.

    Source: CVPR 2024, "How to Make Cross Encoder a Good Teacher for Efficient Image-Text Retrieval?". Confidence: from
    summaries of the paper; the number of candidates and T were not available.

    Args:
        temperature: T.
        backend: of the kernels.
    """

    def __init__(self, temperature: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        candidates: Tensor,
        teacher: Tensor,
        *,
        valid: Tensor | None = None,
        easy: Tensor | None = None,
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: scores ``[B, n]`` of B queries and all n items of the batch.
            candidates: ids int64 or int32 ``[B, K]`` of items to be ordered, each at most once.
            teacher: their scores ``[B, K]``; of equal ones the first comes first.
            valid: bool ``[B, K]``, True for the candidates that have a rank. Those that have none are left out altogether.
            easy: bool ``[B, n]``, True for the easy negatives; None: everything that is no candidate.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_floating("student", student)
        check_floating("teacher", teacher)
        check_integral("candidates", candidates)
        if student.dim() != 2 or candidates.dim() != 2 or candidates.shape[0] != student.shape[0]:
            raise ValueError(
                f"student must have the shape [B, n] and candidates [B, K], got {tuple(student.shape)} and "
                f"{tuple(candidates.shape)}"
            )
        if teacher.shape != candidates.shape:
            raise ValueError(
                f"teacher must have the candidates' shape {tuple(candidates.shape)}, got {tuple(teacher.shape)}"
            )
        if values_are_checked(candidates) and not bool(((candidates >= 0) & (candidates < student.shape[1])).all()):
            raise ValueError(f"candidates must be ids in [0, {student.shape[1]})")
        ranked = check_mask("valid", valid, candidates)
        places = torch.sort(
            teacher.detach().masked_fill(~ranked, -math.inf), dim=-1, descending=True, stable=True
        ).indices
        # A candidate with a score of -inf must not come behind one that has no rank.
        places = places.gather(-1, torch.sort((~ranked.gather(-1, places)).to(torch.int8), dim=-1, stable=True).indices)
        order = candidates.long().gather(-1, places).masked_fill(~ranked.gather(-1, places), -1)
        named = torch.zeros_like(student, dtype=torch.bool).scatter(-1, candidates.long(), True)
        behind = ~named if easy is None else check_mask("easy", easy, student) & ~named
        present = behind.scatter(-1, candidates.long(), ranked)
        count = ranked.sum(-1, keepdim=True)
        weights = ranked.new_ones(candidates.shape, dtype=torch.float64) / count.clamp(min=1)
        return plackett_luce(
            (student / self.temperature).masked_fill(~present, -math.inf),
            order,
            weights=weights,
            mask=count.squeeze(-1) > 0,
            backend=self.backend,
        )


@register("trans_encoder")
class TransEncoder(nn.Module):
    """One direction of Trans-Encoder's cycles between a bi-encoder and a cross-encoder of sentence pairs.

    Into the cross-encoder: the binary cross-entropy of its logits with the bi-encoder's cosines as targets. Into the
    bi-encoder: the squared error of its cosines and the cross-encoder's scores. With several teachers (mutual distillation)
    the target is the mean of their scores. Means over the pairs.

    Source: Trans-Encoder, ICLR 2022. Confidence: from the authors' code; that the cross-entropy takes raw cosines, which may
    be negative, is its behaviour and recalled.

    Args:
        student: "cross" or "bi", which model learns.
    """

    def __init__(self, student: str = "cross") -> None:
        super().__init__()
        self.student = check_choice("student", student, ("cross", "bi"))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: ``[B]``, logits of the cross-encoder or cosines of the bi-encoder.
            teacher: ``[B]``, the other model's scores, or ``[K, B]`` of K models.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_floating("student", student)
        check_floating("teacher", teacher)
        if student.dim() != 1 or teacher.shape[-1:] != student.shape or teacher.dim() > 2:
            raise ValueError(
                f"student must have the shape [B] and teacher [B] or [K, B], got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        target = teacher.detach()
        target = target.mean(0) if target.dim() == 2 else target
        if self.student == "bi":
            return functional.mse_loss(student, target.to(student.dtype))
        return functional.binary_cross_entropy_with_logits(student, target.to(student.dtype))

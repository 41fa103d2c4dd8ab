"""``plackett_luce`` and ``token_ranks``."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.functional.divergence import refuse_temperature_gradient
from kdkernels.ops import ranking as ranking_ops
from kdkernels.reductions import reduce_rows
from kdkernels.reference.ranking import plackett_luce_rows, rank_rows
from kdkernels.sources import Source

__all__ = ["plackett_luce", "token_ranks"]


def plackett_luce(
    student: Source,
    teacher_or_order: Source,
    *,
    labels: Tensor | None = None,
    weights: str | Tensor = "softmax",
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """How unlikely the student finds the teacher's ranking: the Plackett-Luce negative log-likelihood, weighted by rank.

    With ``pi`` the ids by rank, ``L = sum_k w_k (logsumexp_{l >= k} s[pi_l] - s[pi_k])``: at every rank a cross-entropy over
    what has not been taken yet. ``pi`` is the label, if labels are given, then all other ids by falling teacher logit, equal
    ones by rising id. The gradient is ``ds[pi_j] = sum_{k <= j} w_k exp(s[pi_j] - lse_k) - w_j``; it flows to the student
    alone. Sums have terms of one sign and an origin that moves with the suffix, so that logits may differ by any amount.

    With the weights (1, 0, ..) it is the cross-entropy of the label, with "uniform" ListMLE (Xia et al. 2008), with "softmax"
    PLD (NeurIPS 2025). Truncated to ``top_k`` ranks, or to those an order names, the terms of those ranks are the same; all
    other ids come behind them in one sum.

    Args:
        student: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time, once for the values and once more for the gradient; float32, bfloat16, float16 or float64. At most
            2^24 entries of vocabulary.
        teacher_or_order: the teacher's logits, likewise; or an order, ids ``[..., K]`` of int64 or int32 from the first rank
            on, each at most once, -1 past the last rank.
        labels: token ids ``[...]`` that come first; a label equal to ``ignore_index`` drops the token. Not with an order.
        weights: by rank. "softmax": the teacher's probabilities, over the full vocabulary also where that is truncated.
            "uniform": 1. A tensor ``[K]`` or ``[..., K]``, at least 0, without gradient; K is V without ``top_k``.
        temperature: positive number, or tensor ``[...]`` with one per token (not with ``top_k``), that divides the teacher's
            logits in the softmax of the weights.
        top_k: how many ranks count; None: all. With it nothing is sorted but the ``top_k`` largest of a token.
        mask: bool ``[...]``, True where a token counts. What stands elsewhere has no influence, even NaN.
        reduction: "none" gives ``[...]``, "sum" the sum, "mean" the mean over the tokens that count (0 if there are none).
        vocab_size: use only the first so many entries of either vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of LMHead sources; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu" or "triton"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Returns:
        A 0-d tensor, or ``[...]`` without reduction: float32, or float64 if a side is float64. Ids that the teacher masks
        (logits not above -1e5) have no weight, except for a label with a given weight. A token whose teacher logits hold NaN
        or +inf has the value NaN.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a temperature that requires grad, or a backend in a function transformation.
    """
    arguments.check_memory_budget(memory_budget)
    ranking, total = arguments.prepare_plackett_luce(
        student,
        teacher_or_order,
        labels=labels,
        weights=weights,
        temperature=temperature,
        top_k=top_k,
        mask=mask,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab_size=vocab_size,
    )
    problem = ranking.problem
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "ranking")
    refuse_temperature_gradient(problem)
    with autocast_disabled(device):
        if backend == "reference":
            values = plackett_luce_rows(ranking)
        else:
            values = ranking_ops.rows(ranking, memory_budget, backend)
        return reduce_rows(values, problem, total)


def token_ranks(
    source: Source,
    ids: Tensor,
    *,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """How many entries of a token's vocabulary have a larger logit than an id has: 0 for the largest. No gradient.

    One sweep that counts; nothing is sorted. ``token_ranks(teacher, ids) < k`` says whether ids are among the teacher's k
    most probable.

    Args:
        source: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time; float32, bfloat16, float16 or float64.
        ids: int64 or int32 ``[...]``, or ``[..., m]`` for several of each token; -1: none. Nothing is shifted:
            ``ids[..., t]`` is looked up in ``source[..., t]``.
        vocab_size: use only the first so many entries of the vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu" or "triton"; None takes the best available.

    Returns:
        int64, the shape of the ids; -1 where the id is. Logits are compared before a softcap, as they are: equal ones share
        the lowest rank, -inf lies below all finite ones, NaN is above nothing, and an id whose own logit is NaN has rank V.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    arguments.check_memory_budget(memory_budget)
    counting = arguments.prepare_token_ranks(source, ids, vocab_size=vocab_size)
    device = counting.source.tensor.device.type
    backend = backend_for(backend, device, "ranking")
    with autocast_disabled(device):
        if backend == "reference":
            return rank_rows(counting).reshape(counting.shape)
        return ranking_ops.token_ranks(counting, memory_budget, backend).reshape(counting.shape)

"""The public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled, autocast_dtype
from kdkernels.backends import row_backend
from kdkernels.backends import select as select_backend
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.ops import divergence as divergence_ops
from kdkernels.ops import linear_divergence as linear_divergence_ops
from kdkernels.ops import sparse_divergence as sparse_divergence_ops
from kdkernels.ops import token_statistics as token_statistics_ops
from kdkernels.ops import topk as topk_ops
from kdkernels.picking import sampled_logits, top_k_logits, uniform_numbers
from kdkernels.reductions import reduce_rows, row_scales
from kdkernels.reference import divergence as divergence_reference
from kdkernels.reference import records as records_reference
from kdkernels.reference import topk as topk_reference
from kdkernels.reference.token_statistics import statistics as reference_statistics
from kdkernels.sources import PackedLogits, SampledLogits, Source, SparseTeacher, TopKLogits
from kdkernels.statistics import TokenStatistics
from kdkernels.transforms import transformed

__all__ = ["distillation_loss", "pack", "sample_logits", "token_statistics", "topk_logits", "unpack"]


def distillation_loss(
    student: Source,
    teacher: Source | SparseTeacher,
    divergence: Divergence = ForwardKL(),  # noqa: B008 - immutable
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    gradient_tolerance: float = 0.0,
    gradient_rounding: str = "nearest",
    generator: torch.Generator | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence of a student from a teacher over the vocabulary, by fused kernels.

    The loss of a token is ``D(p, q)`` (times ``temperature ** 2`` if asked for) plus ``ce_weight`` times the cross-entropy
    of its label at temperature 1, where ``p = softmax(teacher / teacher_temperature)`` and
    ``q = softmax(student / temperature)``. Gradients flow to everything that requires grad: logits, hidden states, weights
    and biases of either side, and ``weight``.

    Args:
        student, teacher: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, in any pairing; float32,
            bfloat16, float16 or float64. Sums run in float32 at least. The teacher may also be truncated or sampled, see
            below.
        divergence: an instance such as ``kd.ForwardKL()`` or ``kd.JSD(0.5)``.
        temperature: positive number, or tensor ``[...]`` with one per token.
        teacher_temperature: the same for the teacher; None: that of the student. What is stored of a sparse teacher is
            brought from its own temperature to this one if its tail allows, else both must be equal.
        weight: weight per token ``[...]``.
        mask: bool ``[...]``, True where a token counts. What stands elsewhere has no influence, even NaN.
        labels: token ids ``[...]``; a label equal to ``ignore_index`` drops the token.
        ce_weight: weight of the hard-label term; other than 0 it needs labels.
        reduction: "none" gives ``[...]``, "sum" the weighted sum, "mean" divides it by the sum of the weights of the
            tokens that count (0 if there are none).
        normalizer: divides the weighted sum instead of that, for instance the tokens of all accumulated batches.
        temperature_squared: multiplies the divergence by ``temperature ** 2``, which keeps its gradient's size (Hinton et
            al. 2015); never done unasked.
        vocab_size: use only the first so many entries of either vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of LMHead sources; None: 128 MiB on the CPU, 1 GiB on a GPU.
        gradient_tolerance: how much of its L2 norm each token's gradient to the logits of an ``LMHead`` may lose, which
            spares most of the backward's matrix products: 1e-3 costs about what rounding the gradient to bfloat16 does. A
            permission: the CPU backend makes use of it, in float32, bfloat16 and float16. ``kd.GradientReport`` tells
            what was lost. 0: exact.
        gradient_rounding: "nearest" replaces the smallest entries by their mean. "stochastic" rounds small entries at random
            to 0 or up, so that the expected gradient is exact; the tolerance then bounds the root of the expected squared
            error.
        generator: of the random numbers, on the CPU; None: torch's own.
        process_group: only None, an unsharded vocabulary.
        backend: "reference", "cpu" or "triton"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Sparse teachers. Of a truncated teacher, ``kd.TopKLogits`` or ``kd.PackedLogits`` for tokens ``[...]``, the named ids
    K have the probabilities p, and r is left. q_r is the student's mass outside K, summed there and not as a difference.

    - tail="bucket": D of the outcomes (p, q) for K and (r, q_r). Exact for what is stored, and a lower bound of the
      divergence of the whole vocabulary.
    - tail="renormalize": p / (1 - r) on K and 0 elsewhere; ReverseKL, Jeffreys and AlphaDivergence below 0 are infinite
      then, and refused. Exact at any temperature: the softmax over K.
    - tail="uniform": r / (V - k) on each other id; at another temperature that flat tail is tempered as well.
    - tail="drop": the terms of K alone, which may be negative. Renyi: the sum inside its logarithm is over K.

    A token without entries is all tail; under "renormalize" and "drop" it says nothing and its divergence is 0. With all
    the vocabulary in K, every tail gives what dense logits give. Of ``kd.SampledLogits`` only ForwardKL can be computed:
    ``-sum weights log q``, less the entropy if it is known (Sparse Logit Sampling, arXiv 2503.16870, equation 4).

    Returns:
        A 0-d tensor, or ``[...]`` without reduction: float32, or float64 if a side is float64 (of sparse teachers: the
        student).

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: ``process_group``, or a backend in a function transformation.
    """
    if process_group is not None:
        raise NotImplementedError(
            "process_group must be None: a vocabulary sharded over processes is not supported yet"
        )
    arguments.check_memory_budget(memory_budget)
    problem, total = arguments.prepare_loss(
        student,
        teacher,
        divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        weight=weight,
        mask=mask,
        labels=labels,
        ignore_index=ignore_index,
        ce_weight=ce_weight,
        reduction=reduction,
        normalizer=normalizer,
        temperature_squared=temperature_squared,
        vocab_size=vocab_size,
    )
    problem = arguments.with_tolerance(problem, gradient_tolerance, gradient_rounding, generator)
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device)
    if backend == "reference":
        return divergence_reference.loss(problem, total)
    refuse_temperature_gradient(problem)
    sides = [side for side in (problem.student, problem.teacher) if side is not None]
    linear = any(side.weight is not None for side in sides)
    # Half precision underflows unless the gradient is made with its upstream factor, such as a GradScaler's.
    half = torch.float16 in {side.tensor.dtype for side in sides}
    if autocast_dtype(device):
        with autocast_disabled(device):
            return fused_loss(problem, total, linear, half, memory_budget, backend)
    return fused_loss(problem, total, linear, half, memory_budget, backend)


def backend_for(requested: str | None, device: str) -> str:
    """The backend requested or, without a request, the best; in function transformations only the reference works."""
    name: str = select_backend(requested, device)
    if name == "reference" or torch.compiler.is_compiling() or not transformed():
        return name
    if requested is not None:
        raise NotImplementedError(
            f"backend={requested!r} does not work in torch.func transformations and forward-mode differentiation; "
            "leave it at None, which takes the reference there"
        )
    return "reference"


def fused_loss(
    problem: arguments.Problem,
    total: arguments.Total,
    linear: bool,
    half: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """The loss by operators: as a total with its gradient where that is possible, else row by row."""
    if total.reduction != "none" and not half:
        scales = row_scales(problem, total)
        if problem.sparse is not None:
            return sparse_divergence_ops.total(problem, scales, memory_budget, backend)
        if linear:
            return linear_divergence_ops.total(problem, scales, memory_budget, backend)
        if divergence_ops.has_total(backend, scales):
            return divergence_ops.total(problem, scales, backend)
    if problem.sparse is not None:
        value, cross_entropy = sparse_divergence_ops.rows(problem, memory_budget, backend)
    elif linear:
        value, cross_entropy = linear_divergence_ops.rows(problem, memory_budget, backend)
    else:
        value, cross_entropy = divergence_ops.rows(problem, backend)
    value = value * total.divergence_scale
    if problem.spec.labels is not None:
        value = value + total.cross_entropy_scale * cross_entropy
    return reduce_rows(value, problem, total)


def refuse_temperature_gradient(problem: arguments.Problem) -> None:
    spec = problem.spec
    for name, rows in (
        ("temperature", spec.student_temperatures),
        ("teacher_temperature", spec.teacher_temperatures),
    ):
        if rows is not None and rows.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} requires grad, which the fused kernels do not support: detach it, or use backend='reference'"
            )


def token_statistics(
    student: Source,
    teacher: Source | None = None,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """Per-token quantities of one or two distributions over the vocabulary, in one streaming pass. No gradient.

    Args:
        student, teacher: logits ``[..., V]`` or ``kd.LMHead``; without a teacher its columns are None.
        labels: token ids ``[...]`` whose log-probabilities are wanted; ``ignore_index`` drops the token.
        mask: bool ``[...]``, True where a token counts; elsewhere every statistic is 0.
        temperature, teacher_temperature, vocab_size, memory_budget, backend: as in ``distillation_loss``.

    Returns:
        ``TokenStatistics``, every field ``[...]``.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``distillation_loss``.
    """
    arguments.check_memory_budget(memory_budget)
    problem = arguments.prepare_statistics(
        student,
        teacher,
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    backend = backend_for(backend, problem.student.tensor.device.type)
    with torch.no_grad():
        if backend == "reference":
            return reference_statistics(problem)
        return token_statistics_ops.statistics(problem, memory_budget, backend)


def topk_logits(
    source: Source,
    k: int,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TopKLogits:
    """The ``k`` most probable ids of each token, with their log-probabilities over the full vocabulary. No gradient.

    The selection is exact, and so are the normaliser and the tail, whose mass is summed, not taken from 1: it keeps its
    digits however small it is. The logits are read once.

    Args:
        source: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time; float32, bfloat16, float16 or float64. At most 2^24 entries of vocabulary.
        k: ids per token, from 1 to V.
        top_p: None, or keep only the shortest prefix whose probability reaches ``top_p``, in (0, 1], at least one id.
        temperature: positive number that divides the logits.
        vocab_size: use only the first so many entries of the vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu" or "triton"; None takes the best available.

    Returns:
        ``TopKLogits`` with ``ids`` int64 ``[..., k]`` in the order of falling logits, equal ones by rising id;
        ``log_probs`` ``[..., k]`` and ``log_tail_mass`` ``[...]`` float32, or float64 if the source is. Logits are compared
        before a softcap, which keeps their order but makes large ones equal. An id of -1 with a log-probability of -inf
        stands where there is no entry: past the cut by ``top_p``, whose mass the tail gets, and where fewer than k logits
        are above -1e5 (-inf is masked vocabulary, never named). ``log_tail_mass`` is -inf where every id is named, 0 where
        none is. In a token whose logits hold NaN or +inf (after the softcap), the ids are -1 and all else is NaN.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    arguments.check_memory_budget(memory_budget)
    picking = arguments.prepare_topk(source, k, top_p=top_p, temperature=temperature, vocab_size=vocab_size)
    device = picking.source.tensor.device.type
    backend = backend_for(backend, device)
    with torch.no_grad(), autocast_disabled(device):
        if backend == "reference":
            rows = topk_reference.topk_rows(picking)
        else:
            rows = topk_ops.topk(picking, memory_budget, backend)
        return top_k_logits(picking, rows, top_p)


def sample_logits(
    source: Source,
    n: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> SampledLogits:
    """``n`` ids per token drawn with replacement, weighted so that sums over them are unbiased. No gradient.

    With ``p = softmax(z / temperature)`` the ids are drawn from ``softmax(z / (temperature * proposal_temperature))``, and
    the weight of an id is ``p`` over ``n`` times the probability it is drawn with (Sparse Logit Sampling, arXiv
    2503.16870): the expectation of ``sum_j weights[j] g(ids[j])`` is ``sum_v p_v g(v)``.

    Args:
        source, temperature, vocab_size, memory_budget, backend: as in ``topk_logits``.
        n: draws per token, at least 1.
        generator: where the random numbers come from; None: torch's default generator. Equal generators give equal draws,
            whatever the memory budget, the number of threads and (but for rounding) the backend.
        proposal_temperature: positive number; 1 draws from the teacher itself, more draws improbable ids more often.

    Returns:
        ``SampledLogits`` with ``ids`` int64 ``[..., n]``, ``weights`` ``[..., n]``, which are 1 / n without a proposal
        temperature, and the ``entropy`` ``[...]`` of p in nats; float32, or float64 if the source is. Logits not above -1e5
        (-inf is masked vocabulary) are never drawn; a token that has no others gets ids -1, weights and entropy 0. In a
        token whose logits hold NaN or +inf (after the softcap), the ids are -1 and all else is NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``topk_logits``.
    """
    arguments.check_memory_budget(memory_budget)
    picking = arguments.prepare_sample(
        source,
        n,
        generator=generator,
        temperature=temperature,
        proposal_temperature=proposal_temperature,
        vocab_size=vocab_size,
    )
    device = picking.source.tensor.device.type
    backend = backend_for(backend, device)
    with torch.no_grad(), autocast_disabled(device):
        uniforms = uniform_numbers(picking, generator)
        if backend == "reference":
            rows = topk_reference.sample_rows(picking, uniforms)
        else:
            rows = topk_ops.sample(picking, uniforms, memory_budget, backend)
        return sampled_logits(picking, rows)


def pack(topk: TopKLogits, codec: str = "q6") -> PackedLogits:
    """A truncated teacher as records, one per token: what a store keeps.

    Token ids are kept exactly (a sorted set in Elias-Fano form), the mass of the named ids within a factor of
    1 +- 0.0005 of the odds, and the distances of the log-probabilities from the token's largest on a grid of 16, 64 or 256
    steps that is fitted to the token ("q4", "q6", "q8"; distances beyond 32 nats become 32), or as a bfloat16 ("bf16").
    A record of c of V entries at b bits takes ``4 + ceil((c * (b + 1 + l) + ((V - 1) >> l)) / 8)`` bytes with
    ``l = floor(log2(V / c))`` (2 instead of 4 for "bf16"): at V = 131,072 and "q6" 125 bytes for 50 entries and 292
    for 128. The bytes depend on nothing but the entries, whatever the machine, the backend and the order of the ids.

    Args:
        topk: ids with log-probabilities ``[..., K]``, from ``topk_logits`` or elsewhere, as float32. Entries with the id
            -1 or the log-probability -inf are left out; a token without entries takes no bytes, and its tail is then
            the whole mass. Without ``log_tail_mass`` the tail is what the entries leave.
        codec: "q4", "q6", "q8" or "bf16".

    Returns:
        ``PackedLogits`` with the tokens ``[...]``, the tail policy and the temperature of ``topk``, on its device.

    Raises:
        TypeError, ValueError: an argument is refused: an id outside the vocabulary or twice in a token, a log-probability
            that is NaN or above 0 (0.05 is let pass, for logarithms in low precision).
    """
    return arguments.pack_rows(topk, codec, records_room(getattr(topk, "ids", None), "pack_records").pack_records)


def unpack(packed: PackedLogits) -> TopKLogits:
    """The entries of records, each token's ids in ascending order.

    Args:
        packed: from ``pack`` or a store; its bytes are not trusted.

    Returns:
        ``TopKLogits``: ids int64 and log-probabilities float32 ``[..., K]`` with K the largest count, past a token's count
        -1 and -inf, and ``log_tail_mass`` ``[...]``, on the device of ``packed``. ``exp(log_probs)`` and
        ``exp(log_tail_mass)`` sum to 1.

    Raises:
        TypeError: ``packed`` is not ``PackedLogits``.
        ValueError: counts are outside the vocabulary or do not agree with the data, or a record is malformed; the text
            names the token.
    """
    return arguments.unpack_rows(packed, records_room(getattr(packed, "data", None), "unpack_records").unpack_records)


def records_room(tensor: Tensor | None, function: str) -> Any:
    """The module that does this to records on the device of the tensor: the best backend's if it can, or the reference."""
    name = "reference" if tensor is None else select_backend(None, tensor.device.type)
    module = records_reference if name == "reference" else row_backend(name)
    return module if hasattr(module, function) else records_reference

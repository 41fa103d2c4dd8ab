"""``relation_loss``."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import relation as relation_ops
from kdkernels.reductions import reduce_rows, row_scales
from kdkernels.reference.relation import loss as reference_loss

__all__ = ["relation_loss"]


def relation_loss(
    student_left: Tensor,
    student_right: Tensor,
    teacher_left: Tensor | None = None,
    teacher_right: Tensor | None = None,
    divergence: Divergence = ForwardKL(),  # noqa: B008 - immutable
    *,
    score: str = "dot",
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence between the softmax relations of a student and of a teacher, with memory linear in the rows.

    A relation is ``R = softmax(scale * left right^T)`` over the rows of ``right``: attention of queries and keys, the
    value relation of MiniLM (arXiv 2002.10957), Q-Q, K-K and V-V of MiniLMv2 (both arguments the same
    tensor), or the similarities of samples. The loss of row i is ``D(R^T_i, R^S_i)`` plus ``ce_weight`` times the
    cross-entropy ``-log R^S_i[labels_i]``. With labels and no teacher that is InfoNCE. Gradients flow to everything that
    requires grad, of either side, and to ``weight``.

    Args:
        student_left: ``[..., n, d]``; float32, bfloat16, float16 or float64, read and computed in float32 at least.
        student_right: ``[..., m, d]``; may be ``student_left`` itself.
        teacher_left, teacher_right: the same with a ``d`` of their own, or None both where only labels count.
        divergence: an instance such as ``kd.ForwardKL()``.
        score: "dot"; "cosine", of rows divided by their norms; or "sqeuclidean", ``-|left_i - right_j|^2``.
        student_scale, teacher_scale: numbers that multiply the scores, the inverse of a temperature; None: ``d ** -0.5`` of
            their own side for "dot", else 1.
        row_mask: bool, broadcasts to ``[..., n]``: True where a left row counts. What stands elsewhere has no influence.
        column_mask: bool, broadcasts to ``[..., m]``: True where a right row takes part in the softmaxes.
        pair_mask: bool ``[n, m]`` or ``[..., n, m]``: True where a pair does.
        lengths: integers that broadcast to ``[...]``: neither left nor right rows from there on count (n = m).
        causal: row i meets the right rows up to i alone (n = m).
        weight: weight per left row ``[..., n]``.
        labels: right rows ``[..., n]``, integers; -100 drops a row.
        ce_weight: of the cross-entropy; None: 0 with a teacher, 1 without.
        reduction: "none" gives ``[..., n]``, "sum" the weighted sum, "mean" divides it by the sum of the weights of the
            rows that count (0 if there are none). A row without any column does not count.
        memory_budget: bytes for the scores of a chunk; None: at most 2 MiB per thread on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Returns:
        A 0-d tensor, or ``[..., n]`` without reduction: float32, or float64 if a side is float64.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a backend in a function transformation.
    """
    arguments.check_memory_budget(memory_budget)
    relation = arguments.prepare_relation(
        (student_left, student_right, teacher_left, teacher_right),
        divergence,
        score=score,
        scales=(student_scale, teacher_scale),
        row_mask=row_mask,
        column_mask=column_mask,
        pair_mask=pair_mask,
        lengths=lengths,
        causal=causal,
        weight=weight,
        labels=labels,
        ce_weight=ce_weight,
        reduction=reduction,
    )
    device = student_left.device.type
    backend = backend_for(backend, device, "relation")
    with autocast_disabled(device):
        if backend == "reference":
            return reference_loss(relation)
        relations, problem, total = relation
        if total.reduction != "none":
            return relation_ops.total(relations, row_scales(problem, total), memory_budget, backend)
        value, cross_entropy = relation_ops.rows(relations, memory_budget, backend)
        value = value * total.divergence_scale
        if relations.spec.labels is not None:
            value = value + total.cross_entropy_scale * cross_entropy
        return reduce_rows(value, problem, total)

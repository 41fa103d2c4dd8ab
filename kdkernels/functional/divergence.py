"""``distillation_loss``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled, autocast_dtype
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import divergence as divergence_ops
from kdkernels.ops import linear_divergence as linear_divergence_ops
from kdkernels.ops import sparse_divergence as sparse_divergence_ops
from kdkernels.ops import token_statistics as token_statistics_ops
from kdkernels.reductions import reduce_rows, row_scales
from kdkernels.reference import divergence as divergence_reference
from kdkernels.sources import DenseTeacher, Source, SparseTeacher

__all__ = ["distillation_loss"]


def distillation_loss(
    student: Source,
    teacher: DenseTeacher | SparseTeacher,
    divergence: Divergence = ForwardKL(),  # noqa: B008 - immutable
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float | Tensor = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    gradient_tolerance: float = 0.0,
    gradient_rounding: str = "nearest",
    generator: torch.Generator | None = None,
    vocabulary_order: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence of a student from a teacher over the vocabulary, by fused kernels.

    The loss of a token is ``D(p, q)`` (times ``temperature ** 2`` if asked for) plus ``ce_weight`` times the cross-entropy
    of its label at temperature 1, where ``p = softmax(teacher / teacher_temperature)`` and
    ``q = softmax(student / temperature)``. Gradients flow to everything that requires grad: logits, hidden states, weights
    and biases of either side, ``weight`` and ``ce_weight``.

    Args:
        student, teacher: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, in any pairing; float32,
            bfloat16, float16 or float64. Sums run in float32 at least. The teacher may also be a ``kd.LogitMixture`` of
            several, or truncated or sampled, see below.
        divergence: an instance such as ``kd.ForwardKL()`` or ``kd.JSD(0.5)``; its parameter may be a tensor per token where
            it says so.
        temperature: positive number, or tensor ``[...]`` with one per token.
        teacher_temperature: the same for the teacher; None: that of the student. What is stored of a sparse teacher is
            brought from its own temperature to this one if its tail allows, else both must be equal.
        weight: weight per token ``[...]``.
        mask: bool ``[...]``, True where a token counts. What stands elsewhere has no influence, even NaN.
        labels: token ids ``[...]``; a label equal to ``ignore_index`` drops the token.
        ce_weight: weight of the hard-label term, a number or a tensor ``[...]`` or 0-d; other than 0 it needs labels.
        reduction: "none" gives ``[...]``, "sum" the weighted sum, "mean" divides it by the sum of the weights of the
            tokens that count (0 if there are none).
        normalizer: divides the weighted sum instead of that, for instance the tokens of all accumulated batches.
        temperature_squared: multiplies the divergence by ``temperature ** 2``, which keeps its gradient's size (Hinton et
            al. 2015); never done unasked.
        vocab_size: use only the first so many entries of either vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of LMHead sources; None: 128 MiB on the CPU, 1 GiB on a GPU. Where it
            holds fewer than 512 tokens (and not all of them), the triton backend takes kernels that make the logits on the
            chip and never write them, which costs 6 matrix products instead of 4 (8 for divergences of mixtures; not timed
            on a GPU): so 0 there means no logits at all, but for float64, ``kd.Decoupled`` and ``kd.LogitMixture``. Else,
            and on the other backends, a budget that is too small, 0 too, means one token at a time.
        gradient_tolerance: how much of its L2 norm each token's gradient to the logits of an ``LMHead`` may lose, which
            spares most of the backward's matrix products: 1e-3 costs about what rounding the gradient to bfloat16 does. A
            permission: the CPU backend makes use of it, in float32, bfloat16 and float16, and the triton backend where
            ``memory_budget`` makes it work without logits, by tiles. ``kd.GradientReport`` tells what was lost. 0: exact.
        gradient_rounding: "nearest" replaces the smallest entries by their mean. "stochastic" rounds small entries at random
            to 0 or up, so that the expected gradient is exact; the tolerance then bounds the root of the expected squared
            error. On the triton backend the gradient is exact then.
        generator: of the random numbers, on the CPU; None: torch's own.
        vocabulary_order: integer ``[V]``, each id once, likely ones together, see ``kd.vocabulary_order``. It says which ids
            are neighbours in the tiles that the triton backend may leave out under a tolerance; it changes nothing else.
        process_group: only None, an unsharded vocabulary.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available, and in ``torch.func`` transformations and
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
    the vocabulary in K, every tail gives what dense logits give. Of ``kd.SampledLogits`` only SoftCrossEntropy and
    ForwardKL can be computed: ``-sum weights log q``, for ForwardKL less the entropy if it is known (Sparse Logit
    Sampling, arXiv 2503.16870, equation 4).

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
    problem = arguments.with_tolerance(problem, gradient_tolerance, gradient_rounding, generator, vocabulary_order)
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "divergence" if problem.sparse is None else "sparse_divergence")
    if backend == "reference":
        return divergence_reference.loss(problem, total)
    refuse_temperature_gradient(problem)
    sides = [side for side in (problem.student, problem.teacher) if side is not None]
    linear = any(side.weight is not None for side in (*sides, *composition_sides(problem.spec)))
    # Half precision underflows unless the gradient is made with its upstream factor, such as a GradScaler's.
    half = torch.float16 in {side.tensor.dtype for side in sides}
    if autocast_dtype(device):
        with autocast_disabled(device):
            return fused_loss(problem, total, linear, half, memory_budget, backend)
    return fused_loss(problem, total, linear, half, memory_budget, backend)


def composition_sides(spec: RowSpec) -> tuple[Side, ...]:
    """What the teacher is made of besides its first source."""
    return () if spec.teacher_composition is None else spec.teacher_composition.others


def fused_loss(
    problem: arguments.Problem,
    total: arguments.Total,
    linear: bool,
    half: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """The loss by operators: as a total with its gradient where that is possible, else row by row."""
    problem = arguments.with_normalisers(
        problem, lambda rows: token_statistics_ops.statistics(rows, memory_budget, backend).lse_student
    )
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
        ("the parameter of the divergence", spec.parameters),
        ("target_weight of the divergence", spec.target_weights),
        ("rest_weight of the divergence", spec.rest_weights),
    ):
        if rows is not None and rows.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} requires grad, which the fused kernels do not support: detach it, or use backend='reference'"
            )

"""``bernoulli_loss``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.functional.divergence import refuse_temperature_gradient
from kdkernels.ops import bernoulli as bernoulli_ops
from kdkernels.reductions import reduce_rows, row_scales
from kdkernels.reference import bernoulli as bernoulli_reference
from kdkernels.sources import Source
from kdkernels.targets import SparseTargets

__all__ = ["bernoulli_loss"]


def bernoulli_loss(
    student: Source,
    teacher: Source | SparseTargets,
    *,
    form: str = "cross_entropy",
    probabilities: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocabulary: str = "sum",
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """A loss of sigmoids: every entry of the vocabulary is a yes-or-no question of its own. Fused kernels.

    With ``x = student / temperature``, ``y = teacher / teacher_temperature``, ``a = sigmoid(x)`` and ``b = sigmoid(y)``, the
    value of a token is the sum over the vocabulary of one of the forms

    ===============  ==========================================================================================
    "cross_entropy"  ``-b log a - (1 - b) log(1 - a)``: binary cross-entropy with logits, soft targets
    "kl"             ``b log(b / a) + (1 - b) log((1 - b) / (1 - a))``, the same less the entropy of the target
    "half"           the KL divergence of (1/2, 1/2) from ``sigmoid(x - y)`` (BinaryKL-Norm of DHKD, Yang et al. 2024)
    ===============  ==========================================================================================

    computed from ``exp(-|x|)`` and ``exp(-|y|)`` without cancellation. The gradient flows to the student: logits, hidden
    states, weight and bias of its head, and to ``weight``.

    Args:
        student: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``; float32, bfloat16, float16 or float64.
        teacher: logits likewise, which must not require grad; with ``probabilities`` a tensor of targets b in [0, 1]
            ``[..., V]``; or ``kd.SparseTargets``, which are made dense a chunk of tokens at a time.
        form: see above; "half" needs logits of a teacher.
        probabilities: whether the teacher is a tensor of targets instead of logits.
        temperature: positive number, or tensor ``[...]`` with one per token.
        teacher_temperature: the same for a teacher's logits; None: that of the student.
        weight, mask, reduction, normalizer, temperature_squared, vocab_size, memory_budget, backend: as in
            ``distillation_loss``.
        vocabulary: "sum", or "mean" over the entries of the vocabulary.

    Returns:
        A 0-d tensor, or ``[...]`` without reduction: float32, or float64 if a side is float64. Where the student masks an
        entry (-inf) that the teacher affirms, the entry's value is finite but large; it has no gradient.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a teacher or temperature that requires grad.
    """
    arguments.check_memory_budget(memory_budget)
    problem, targets, total = arguments.prepare_bernoulli(
        student,
        teacher,
        form=form,
        probabilities=probabilities,
        temperature_of=temperature,
        teacher_temperature=teacher_temperature,
        weight=weight,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        temperature_squared=temperature_squared,
        vocabulary=vocabulary,
        vocab_size=vocab_size,
    )
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "bernoulli")
    if backend == "reference":
        return bernoulli_reference.loss(problem, targets, total)
    refuse_temperature_gradient(problem)
    with autocast_disabled(device):
        # Half precision underflows unless the gradient is made with its upstream factor, such as a GradScaler's.
        if total.reduction != "none" and problem.student.tensor.dtype != torch.float16:
            scales, _ = row_scales(problem, total).per_row(
                problem.student.tensor.shape[0], problem.student.tensor.new_empty(0, dtype=problem.dtype)
            )
            return bernoulli_ops.total(problem, targets, scales, memory_budget, backend)
        values = bernoulli_ops.rows(problem, targets, memory_budget, backend) * total.divergence_scale
        return reduce_rows(values, problem, total)

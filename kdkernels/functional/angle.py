"""``angle_loss``."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import angle as angle_ops
from kdkernels.reference.angle import loss as reference_loss

__all__ = ["angle_loss"]


def angle_loss(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """The smooth L1 distance between the angles in all triples of a student's points and of a teacher's.

    With ``psi(i, j, k) = <u_ij, u_kj>``, ``u_ij = (e_i - e_j) / |e_i - e_j|``, the mean over all ``B ** 3`` triples of
    ``x ** 2 / 2`` where ``x = |psi_student - psi_teacher|`` is below 1, else ``x - 1/2`` (Relational Knowledge
    Distillation, arXiv 1904.05068). Computed from the Gram matrices: nothing is larger than ``[B, B]``.
    Where two points coincide psi is 0 and has no gradient.

    Args:
        student: points ``[B, d]``; float32, bfloat16, float16 or float64, computed in float64.
        teacher: points ``[B, d']``; no gradient flows to them.
        backend: "reference", "cpu" or "triton"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Returns:
        A 0-d tensor, float32, or float64 if a side is float64; 0 without points.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a backend in a function transformation.
    """
    arguments.check_points(student, teacher)
    device = student.device.type
    backend = backend_for(backend, device, "angle")
    with autocast_disabled(device):
        if backend == "reference":
            return reference_loss(student, teacher)
        return angle_ops.loss(student, teacher, backend)

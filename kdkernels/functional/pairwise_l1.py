"""``pairwise_l1``."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import pairwise_l1 as pairwise_l1_ops
from kdkernels.reference.pairwise_l1 import distances as reference_distances
from kdkernels.sources import Source

__all__ = ["pairwise_l1"]


def pairwise_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """All pairs of L1 distances between the softmax rows of two sources: a cost matrix at the scale of the vocabulary.

    ``distance_ij = sum_v |softmax(s_i / temperature)_v - softmax(t_j / teacher_temperature)_v|``, from 0 to 2: the cost of
    the Sinkhorn distance in SinKD (arXiv 2402.17110, its code's ``torch.cdist(p=1)``). The probabilities are made tile by
    tile and never stored. Gradients flow to everything that requires grad: logits, hidden states, weights and biases of
    either side. Where two probabilities are equal the derivative of their distance is taken as 0.

    Args:
        student: ``n`` rows of logits ``[..., n, V]`` (a tensor or ``kd.Logits``), or a ``kd.LMHead`` with hidden states
            ``[..., n, H]``; float32, bfloat16, float16 or float64. Sums run in float32 at least.
        teacher: ``m`` rows likewise, with the same batch ``[...]`` and vocabulary.
        temperature: positive number that divides the student's logits.
        teacher_temperature: the same for the teacher; None: that of the student.
        vocab_size: use only the first so many entries of either vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of LMHead sources, which are made for a part of the vocabulary at a
            time; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Returns:
        ``[..., n, m]``, float32, or float64 if a side is float64. Logits of -inf are masked vocabulary: probability and
        gradient 0. A row that holds NaN or +inf has NaN for its distances.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a backend in a function transformation.
    """
    arguments.check_memory_budget(memory_budget)
    pairs = arguments.prepare_pairs(
        student, teacher, temperature=temperature, teacher_temperature=teacher_temperature, vocab_size=vocab_size
    )
    device = pairs.student.tensor.device.type
    backend = backend_for(backend, device, "pairwise_l1")
    with autocast_disabled(device):
        if backend == "reference":
            return reference_distances(pairs)
        return pairwise_l1_ops.distances(pairs, memory_budget, backend)

"""``mass_threshold`` and ``head_tail_gap``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import HeadProblem
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import head_mass as head_mass_ops
from kdkernels.reference.head_mass import head_mass_rows
from kdkernels.sources import Source

__all__ = ["head_tail_gap", "mass_threshold"]


def mass_threshold(
    source: Source,
    mass: float | Tensor,
    *,
    crossing: bool = False,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The lowest logit of each token's head: of its most probable ids that together hold a given mass. No gradient.

    With ``p = softmax(source / temperature)``, an id belongs to the head if it and all ids at least as probable as it hold
    no more than ``mass``; the most probable id always does. Ids with equal logits are in it together or not at all. So
    the head is ``logits >= threshold``. Nothing is sorted; the result is exact but for the rounding of the sums.

    Args:
        source: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time; float32, bfloat16, float16 or float64.
        mass: number in [0, 1], or tensor ``[...]`` with one per token. At 1 every id is in the head.
        crossing: whether the ids that cross the mass are of the head, too: those that are less probable than ids of less than
            ``mass`` together.
        temperature: positive number, or tensor ``[...]`` with one per token.
        vocab_size: use only the first so many entries of the vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu" or "triton"; None takes the best available.

    Returns:
        Logits ``[...]``, after scale and softcap, not divided by the temperature; float32, or float64 if the source is.
        NaN in a token whose logits hold NaN or +inf.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    arguments.check_memory_budget(memory_budget)
    problem = arguments.prepare_mass_threshold(
        source, mass, crossing=crossing, temperature_of=temperature, vocab_size=vocab_size
    )
    return rows(problem, memory_budget, backend)[0].reshape(problem.batch_shape)


def head_tail_gap(
    student: Source,
    teacher: Source,
    mass: float | Tensor = 0.5,
    *,
    crossing: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How far the student is from the teacher on the teacher's head and on its tail, token by token. No gradient.

    ``sum |p - q|`` over the ids of the teacher's head (see ``kd.mass_threshold``) and over all others, with
    ``p = softmax(teacher / teacher_temperature)`` and ``q = softmax(student / temperature)``: the two gaps that Adaptive KL
    weighs its divergences by (Wu et al., COLING 2025, arXiv 2404.02657).

    Args:
        student, teacher: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, in any pairing.
        mass, crossing: of the head, see ``kd.mass_threshold``.
        mask: bool ``[...]``, True where a token counts; elsewhere both gaps are 0.
        temperature, teacher_temperature, vocab_size, memory_budget, backend: as in ``distillation_loss``.

    Returns:
        The gaps of head and tail, each ``[...]``; float32, or float64 if a side is float64.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``mass_threshold``.
    """
    arguments.check_memory_budget(memory_budget)
    problem = arguments.prepare_head_tail_gap(
        student,
        teacher,
        mass,
        crossing=crossing,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        vocab_size=vocab_size,
    )
    head, tail = rows(problem, memory_budget, backend)[1].unbind(-1)
    return head.reshape(problem.batch_shape), tail.reshape(problem.batch_shape)


def rows(problem: HeadProblem, memory_budget: int | None, backend: str | None) -> tuple[Tensor, Tensor]:
    device = problem.teacher.tensor.device.type
    backend = backend_for(backend, device, "head_mass")
    with torch.no_grad(), autocast_disabled(device):
        if backend == "reference":
            return head_mass_rows(problem)
        return head_mass_ops.rows(problem, memory_budget, backend)

"""``vocabulary_order``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments.rows import side
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.chunked_head import Head, Needs, chunks
from kdkernels.reference.rows import effective_logits
from kdkernels.sources import Source

__all__ = ["vocabulary_order"]


@torch.no_grad()
def vocabulary_order(teacher: Source, *, vocab_size: int | None = None, memory_budget: int | None = None) -> Tensor:
    """The ids of a vocabulary by falling mean probability under a teacher: ``vocabulary_order`` of ``distillation_loss``.

    Computed once, over some thousand tokens of the kind that will be trained on. In plain PyTorch, on any device.

    Args:
        teacher: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``.
        vocab_size: use only the first so many entries, for padded heads; the same as in the loss.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.

    Returns:
        int32 ``[V]``, on the teacher's device. Equal ones by their ids.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
    """
    arguments.check_memory_budget(memory_budget)
    source, _, vocab = side("teacher", teacher, vocab_size)
    mass = torch.zeros(vocab, dtype=torch.float64, device=source.tensor.device)
    with autocast_disabled(source.tensor.device.type):
        head = Head(source, Needs(False), None)
        for chunk in chunks([source], memory_budget):
            logits = effective_logits(head.logits(chunk), source.softcap, torch.float32)
            mass += torch.softmax(logits, -1).sum(0, dtype=torch.float64)
    return mass.argsort(descending=True, stable=True).to(torch.int32)

"""What a head of its own costs at least, if every entry of its logits' gradient counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels.backends.chunked_head import chunks
from kdkernels.backends.rows import Side

__all__ = ["GEMMS", "head_gemms"]

GEMMS = "its GEMMs, same chunks"


def head_gemms(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """The three matrix products of the head, chunk by chunk, into memory that is there already."""
    hidden, weight = hidden.detach(), weight.detach()
    slices = [slice(part.start, min(part.stop, len(hidden))) for part in chunks([Side(hidden, weight)], None)]
    logits = hidden.new_zeros(max(part.stop - part.start for part in slices), weight.shape[0])
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> object:
        for index, part in enumerate(slices):
            made = logits[: part.stop - part.start]
            torch.mm(hidden[part], weight.t(), out=made)
            torch.mm(made, weight, out=grad_hidden[part])
            grad_weight.addmm_(made.t(), hidden[part], beta=0 if index == 0 else 1)
        return grad_hidden, grad_weight

    return run

"""The family token_set in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch

__all__ = ["token_set"]


def token_set(
    logits: Tensor, members: Tensor, spec: RowSpec, grad_values: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """The values [N], see ``kdkernels.backends.rows``."""
    rows, vocab_size = logits.shape
    values = torch.empty(rows, dtype=compute_dtype(logits, None), device=logits.device)
    launch = prepare_launch(logits, gradient, kernel="token_set")
    if rows:
        with on_device_of(logits, "token_set"):
            load_kernels().token_set.token_set_kernel[(rows,)](
                logits,
                gradient,
                launch.stride(logits),
                launch.stride(gradient),
                vocab_size,
                members.contiguous(),
                values,
                grad_values,
                spec.active,
                spec.student_temperatures,
                spec.student_temperature,
                spec.student_softcap,
                HAS_CAP=spec.student_softcap != 0,
                **launch.options,
            )
    return values

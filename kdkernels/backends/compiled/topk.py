"""The family topk in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.compiled.library import DTYPES, FLOAT64, Library
from kdkernels.backends.rows import Tempering, compute_dtype

__all__ = ["sample", "topk"]


def _source(library: Library, logits: Tensor) -> tuple[Any, ...]:
    """The leading arguments of the kernels that read one matrix."""
    dtype = DTYPES[logits.dtype]
    return (library.place(logits), dtype == FLOAT64, *logits.shape, logits.data_ptr(), logits.stride(0), dtype)


def topk(library: Library, logits: Tensor, k: int, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    ids = logits.new_empty(rows, k, dtype=torch.int64)
    log_probs = logits.new_empty(rows, k, dtype=compute_dtype(logits, None))
    log_tail_mass = log_probs.new_empty(rows)
    results = ids.data_ptr(), log_probs.data_ptr(), log_tail_mass.data_ptr()
    if rows:
        library.module().topk(*_source(library, logits), tempering.temperature, tempering.softcap, k, *results)
    return ids, log_probs, log_tail_mass


def sample(library: Library, logits: Tensor, uniforms: Tensor, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    ids = logits.new_empty(uniforms.shape, dtype=torch.int64)
    weights = logits.new_empty(uniforms.shape, dtype=compute_dtype(logits, None))
    entropy = weights.new_empty(uniforms.shape[0])
    if not len(uniforms):
        return ids, weights, entropy
    uniforms = uniforms.contiguous()
    library.module().sample(
        *_source(library, logits),
        tempering.temperature,
        tempering.proposal_temperature,
        tempering.softcap,
        uniforms.shape[1],
        uniforms.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        entropy.data_ptr(),
    )
    return ids, weights, entropy

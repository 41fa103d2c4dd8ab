"""Records of stored teachers, unpacked by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.triton.launching import load_kernels, on_device_of

__all__ = ["unpack_records"]

_RECORD_BLOCK = 128
"""Entries of a record that a warp decodes at a time."""


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = len(counts)
    ids = torch.empty(rows, width, dtype=torch.int32, device=data.device)
    log_probs = torch.empty(rows, width, device=data.device)
    log_tail_mass = torch.empty(rows, device=data.device)
    well_formed = torch.empty(rows, dtype=torch.int32, device=data.device)
    if rows:
        with on_device_of(data, "unpack"):
            load_kernels().records.unpack_records_kernel[(rows,)](
                data,
                offsets,
                counts,
                vocab,
                width,
                ids,
                log_probs,
                log_tail_mass,
                well_formed,
                BITS=bits,
                BLOCK=_RECORD_BLOCK,
                num_warps=1,
            )
        if not bool(well_formed.all()):
            records.refuse_record(int((well_formed == 0).nonzero()[0, 0]))
    return ids.long(), log_probs, log_tail_mass

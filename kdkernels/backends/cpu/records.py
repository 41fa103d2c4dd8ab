"""Records of stored teachers on the CPU: packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.cpu.launching import module

__all__ = ["pack_records", "unpack_records"]


def pack_records(
    ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.reference.records.pack_records``: the same bytes."""
    ids, log_probs, log_tail_mass, counts = records.rows_to_pack(ids, log_probs, log_tail_mass)
    sizes = records.record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    data = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8)
    offsets = ends - sizes
    rows, width = ids.shape
    wrong = module().pack_records(
        torch.get_num_threads(),
        rows,
        width,
        vocab,
        bits,
        counts.data_ptr(),
        offsets.data_ptr(),
        data.data_ptr(),
        ids.data_ptr(),
        log_probs.data_ptr(),
        log_tail_mass.data_ptr(),
    )
    if wrong < rows:
        records.check_entries(ids, log_probs, vocab)
    return data, counts


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = len(counts)
    ids = torch.empty(rows, width, dtype=torch.int64)
    log_probs = torch.empty(rows, width)
    log_tail_mass = torch.empty(rows)
    wrong = module().unpack_records(
        torch.get_num_threads(),
        rows,
        width,
        vocab,
        bits,
        counts.data_ptr(),
        offsets.data_ptr(),
        data.data_ptr(),
        ids.data_ptr(),
        log_probs.data_ptr(),
        log_tail_mass.data_ptr(),
    )
    if wrong < rows:
        records.refuse_record(wrong)
    return ids, log_probs, log_tail_mass

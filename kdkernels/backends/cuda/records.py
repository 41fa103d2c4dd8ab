"""The family records in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.compiled.records import call_kernel, empty_rows
from kdkernels.backends.cuda.launching import LIBRARY

__all__ = ["pack_records", "unpack_records"]

_WORD = 4
"""Bytes that the kernel writes at once."""


def pack_records(
    ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.reference.records.pack_records``: the same bytes. The order of the entries is made here."""
    ids, log_probs, log_tail_mass, counts = records.rows_to_pack(ids, log_probs, log_tail_mass)
    sizes = records.record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    size = int(ends[-1]) if len(ends) else 0
    data = torch.zeros(-(-size // _WORD) * _WORD, dtype=torch.uint8, device=ids.device)[:size]
    if len(ids):
        last = torch.iinfo(torch.int64).max
        ascending, order = ids.masked_fill(~records.present_entries(ids, log_probs), last).sort(-1)
        faults = torch.empty_like(counts)
        rows = ascending, log_probs.gather(-1, order), log_tail_mass
        call_kernel(LIBRARY, "pack_records", vocab, bits, counts, ends - sizes, data, rows, faults)
        if bool(faults.any()):
            records.check_entries(ids, log_probs, vocab)
    return data, counts


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = empty_rows(data, len(counts), width)
    if len(counts):
        faults = torch.empty_like(counts)
        call_kernel(LIBRARY, "unpack_records", vocab, bits, counts, offsets, data, rows, faults)
        if bool(faults.any()):
            records.refuse_record(int(faults.nonzero()[0, 0]))
    return rows

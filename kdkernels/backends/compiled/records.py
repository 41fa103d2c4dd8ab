"""Records of stored teachers in C++: packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.compiled.library import Library

__all__ = ["pack_records", "unpack_records"]


def pack_records(
    library: Library, ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.reference.records.pack_records``: the same bytes."""
    ids, log_probs, log_tail_mass, counts = records.rows_to_pack(ids, log_probs, log_tail_mass)
    sizes = records.record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    data = ids.new_empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8)
    offsets = ends - sizes
    rows, width = ids.shape
    wrong = library.module().pack_records(
        library.place(ids),
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


def unpack_records(
    library: Library, data: Tensor, counts: Tensor, vocab: int, bits: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = len(counts)
    ids = data.new_empty(rows, width, dtype=torch.int64)
    log_probs = data.new_empty(rows, width, dtype=torch.float32)
    log_tail_mass = log_probs.new_empty(rows)
    wrong = library.module().unpack_records(
        library.place(data),
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

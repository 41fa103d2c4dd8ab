"""Records of stored teachers in C++: packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.compiled.library import Library, address

__all__ = ["call_kernel", "empty_rows", "pack_records", "unpack_records"]


def call_kernel(
    library: Library,
    kernel: str,
    vocab: int,
    bits: int,
    counts: Tensor,
    offsets: Tensor,
    data: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    faults: Tensor | None = None,
) -> int:
    """The first row that is malformed, or their number. On a GPU ``faults`` int32 ``[N]`` say later which are.

    Args:
        rows: contiguous ids int64 and log-probabilities fp32 ``[N, K]``, log tail mass fp32 ``[N]``; read or written.
    """
    wrong: int = getattr(library.module(), kernel)(
        library.place(data),
        *rows[0].shape,
        vocab,
        bits,
        *(each.data_ptr() for each in (counts, offsets, data, *rows)),
        address(faults),
    )
    return wrong


def pack_records(
    library: Library, ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.reference.records.pack_records``: the same bytes."""
    ids, log_probs, log_tail_mass, counts = records.rows_to_pack(ids, log_probs, log_tail_mass)
    sizes = records.record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    data = ids.new_empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8)
    rows = ids, log_probs, log_tail_mass
    if call_kernel(library, "pack_records", vocab, bits, counts, ends - sizes, data, rows) < len(ids):
        records.check_entries(ids, log_probs, vocab)
    return data, counts


def unpack_records(
    library: Library, data: Tensor, counts: Tensor, vocab: int, bits: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = empty_rows(data, len(counts), width)
    wrong = call_kernel(library, "unpack_records", vocab, bits, counts, offsets, data, rows)
    if wrong < len(counts):
        records.refuse_record(wrong)
    return rows


def empty_rows(data: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what records are unpacked to, on the device of ``data``."""
    ids = data.new_empty(rows, width, dtype=torch.int64)
    log_probs = data.new_empty(rows, width, dtype=torch.float32)
    return ids, log_probs, log_probs.new_empty(rows)

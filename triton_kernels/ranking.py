# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The rank of an entry of a row, by counting what lies above it in one sweep."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride", "vocab_size"])
def token_ranks_kernel(logits, stride: tl.int64, vocab_size, ids, ranks, TILE: tl.constexpr):
    """One program per row and id. ids, ranks: int64 [rows, m], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    entries = logits + row * stride
    wanted = tl.load(ids + place)
    own = tl.load(entries + tl.maximum(wanted, 0)).to(
        tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    )
    counts = tl.zeros((TILE,), tl.int32)
    for start in range(0, vocab_size, TILE):
        columns = start + tl.arange(0, TILE)
        found = tl.load(entries + columns, mask=columns < vocab_size, other=float("-inf")).to(own.dtype)
        counts += (found > own).to(tl.int32)
    rank = tl.sum(counts, 0).to(tl.int64)
    rank = tl.where(own != own, vocab_size, rank)
    tl.store(ranks + place, tl.where(wanted < 0, -1, rank))

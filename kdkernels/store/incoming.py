"""What callers append to a store: checked, and encoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdkernels.checks import check_integer
from kdkernels.records import MASS_SLACK, check_tail
from kdkernels.sources import PackedLogits, TopKLogits
from kdkernels.store import records
from kdkernels.store.description import Description
from kdkernels.store.files import Bytes

__all__ = ["Encoded", "Teacher", "encode", "input_ids", "sequence_ids", "sources"]

Teacher = TopKLogits | PackedLogits
Encoded = tuple[Bytes, npt.NDArray[np.int32], int]
"""The records of a sequence, the entries of each, and the most that there may be."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sources(topk: object) -> list[Teacher]:
    """One source with all sequences, or one per sequence."""
    listed = isinstance(topk, list | tuple)
    found: list[Teacher] = []
    for number, source in enumerate(topk if isinstance(topk, list | tuple) else [topk]):
        name = f"append: topk[{number}]" if listed else "append: topk"
        if not isinstance(source, TopKLogits | PackedLogits):
            raise TypeError(f"{name} must be kd.TopKLogits or kd.PackedLogits, got {type(source).__name__}")
        shape = tuple(source.batch_shape)
        if len(shape) != (1 if listed else 2):
            allowed = "[tokens, K]" if listed else "[sequences, tokens, K]; for one sequence, pass a list of one source"
            raise ValueError(f"{name} must have the shape {allowed}; got tokens of the shape {list(shape)}")
        found.append(source)
    return found


def sequence_ids(given: Sequence[int] | Tensor, sequences: int) -> list[int]:
    """The ids as integers: one per sequence, each once."""
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    if len(values) != sequences:
        raise ValueError(
            f"append: sequence_ids must have one id for each of the {sequences} sequences, got {len(values)}"
        )
    ids = [check_integer(f"append: sequence_ids[{place}]", value) for place, value in enumerate(values)]
    seen: set[int] = set()
    for sequence_id in ids:
        if not -(1 << 63) <= sequence_id < 1 << 63:
            raise ValueError(f"append: sequence_ids must fit into 64 bits, got {sequence_id}")
        if sequence_id in seen:
            raise ValueError(f"append: sequence_ids has {sequence_id} twice")
        seen.add(sequence_id)
    return ids


def input_ids(
    given: Tensor | Sequence[Tensor] | None, tokens: Sequence[int], vocab_size: int
) -> list[npt.NDArray[np.int32]] | None:
    """The token ids of each sequence, whose tokens are ``tokens`` many."""
    if given is None:
        return None
    if len(given) != len(tokens):
        raise ValueError(
            f"append: input_ids must have one row for each of the {len(tokens)} sequences, got {len(given)}"
        )
    found = []
    for place, (row, count) in enumerate(zip(given, tokens, strict=True)):
        values = torch.as_tensor(row)
        if values.dtype not in INTEGERS and values.numel():
            raise TypeError(f"append: input_ids[{place}] must be integers, got {values.dtype}")
        if values.shape != (count,):
            raise ValueError(f"append: input_ids[{place}] must have the shape [{count}], got {list(values.shape)}")
        values = values.detach().cpu()
        outside = (values < 0) | (values >= vocab_size)
        if bool(outside.any()):
            raise ValueError(
                f"append: input_ids[{place}] must lie in [0, {vocab_size}), got {int(values[outside][0])} for token "
                f"{int(outside.nonzero()[0, 0])}"
            )
        found.append(values.to(torch.int32).numpy().copy())
    return found


def encode(source: Teacher, description: Description) -> list[Encoded]:
    """The sequences of one source, in the store's codec."""
    for name in ("vocab_size", "temperature", "tail"):
        if getattr(source, name) != getattr(description, name):
            raise ValueError(
                f"append: topk has {name}={getattr(source, name)!r}, and the store {name}={getattr(description, name)!r}"
            )
    if isinstance(source, PackedLogits):
        width, data, counts = packed(source, description)
    else:
        width = source.ids.shape[-1]
        data, counts = rows(source, description)
    if width > description.widest:
        entries = int(counts.max()) if counts.numel() else 0
        if entries > description.widest:
            raise ValueError(
                f"append: a token has {entries} entries, and this store takes at most {description.widest}"
            )
        width = description.widest
    shape = source.batch_shape
    sequences, tokens = (1, shape[0]) if len(shape) == 1 else shape
    ends = records.record_sizes(counts, description.vocab_size, description.bits).cumsum(0)
    stops = [int(ends[tokens * (place + 1) - 1]) if tokens else 0 for place in range(sequences)]
    return [
        # Copied, so that no sequence keeps the memory of its whole batch.
        (data[start:stop].numpy().copy(), part.numpy().copy(), width)
        for start, stop, part in zip([0, *stops], stops, counts.view(sequences, tokens), strict=False)
    ]


def rows(source: TopKLogits, description: Description) -> tuple[Tensor, Tensor]:
    """Records and counts of the tokens of a ``TopKLogits``."""
    ids = source.ids.detach().flatten(0, -2).cpu().long()
    log_probs = source.log_probs.detach().flatten(0, -2).cpu().float()
    tail = source.log_tail_mass
    tail = None if tail is None else tail.detach().reshape(-1).cpu().float()
    check_mass(log_probs.masked_fill(ids < 0, -torch.inf), tail)
    return records.pack(ids, log_probs, tail, description.vocab_size, description.bits)


def check_mass(log_probs: Tensor, tail: Tensor | None) -> None:
    """Refuses rows that have more than all probability; the codec checks the rest of them."""
    if tail is not None:
        check_tail(tail)
    # An entry of its own that is not a number is left to the codec, which names it.
    mass = log_probs.exp().nan_to_num().sum(-1)
    wrong = mass > 1 + MASS_SLACK
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"append: topk: log_probs must be those of one distribution; token {token} has probabilities with the sum "
            f"{mass[token].item():.6g}"
        )


def packed(source: PackedLogits, description: Description) -> tuple[int, Tensor, Tensor]:
    """The largest count, the records and the counts of a ``PackedLogits``, once its records are seen to be sound."""
    if source.codec != description.codec:
        raise ValueError(f"append: topk has codec={source.codec!r}, and the store codec={description.codec!r}")
    data, counts = source.data.detach().cpu().contiguous(), source.counts.detach().cpu().reshape(-1)
    if bool((counts < 0).any()):
        raise ValueError("append: topk: counts must not be negative")
    width = int(counts.max()) if counts.numel() else 0
    if width > description.widest:
        raise ValueError(f"append: a token has {width} entries, and this store takes at most {description.widest}")
    size = int(records.record_sizes(counts, description.vocab_size, description.bits).sum())
    if size != data.numel():
        raise ValueError(f"append: topk: counts ask for {size} bytes of records, and data has {data.numel()}")
    records.unpack(data, counts, description.vocab_size, description.bits, width)
    return width, data, counts

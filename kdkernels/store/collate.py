"""Batches of sequences of different length, for ``DataLoader(ds, collate_fn=kd.store.collate)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.sources import PackedLogits, TopKLogits

__all__ = ["collate"]


def collate(items: Sequence[dict[str, Any]], *, pad_token_id: int = 0) -> dict[str, Any]:
    """Items of a store, padded at their ends to the longest.

    A token of padding has no entries: ids -1, log-probabilities -inf, all mass in the tail, no record.

    Args:
        items: what ``ds[i]`` gives.
        pad_token_id: fills up ``input_ids``.

    Returns:
        "sequence_id" int64 ``[B]``; "topk" ``TopKLogits [B, T, K]`` or, of packed items, "packed" ``PackedLogits [B, T]``;
        "input_ids" int64 ``[B, T]``, or None if any item has none; "mask" bool ``[B, T]``, False for padding.
    """
    if not items:
        raise ValueError("collate: items must not be empty")
    kind = "packed" if "packed" in items[0] else "topk"
    sources = [item[kind] for item in items]
    lengths = [source.batch_shape[0] for source in sources]
    for name in ("vocab_size", "tail", "temperature", *(["codec"] if kind == "packed" else [])):
        values = {getattr(source, name) for source in sources}
        if len(values) > 1:
            raise ValueError(f"collate: items must have the same {name}, got {', '.join(map(str, values))}")
    input_ids = None
    if all(item["input_ids"] is not None for item in items):
        input_ids = padded([item["input_ids"] for item in items], pad_token_id)
    return {
        "sequence_id": torch.tensor([item["sequence_id"] for item in items]),
        kind: packed_batch(sources) if kind == "packed" else topk_batch(sources),
        "input_ids": input_ids,
        "mask": torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1),
    }


def padded(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def topk_batch(sources: Sequence[TopKLogits]) -> TopKLogits:
    width = max(source.ids.shape[-1] for source in sources)

    def wide(rows: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]), value=value)

    tails = [source.log_tail_mass for source in sources]
    known = [tail for tail in tails if tail is not None]
    first = sources[0]
    return TopKLogits(
        padded([wide(source.ids, -1) for source in sources], -1),
        padded([wide(source.log_probs, -torch.inf) for source in sources], -torch.inf),
        vocab_size=first.vocab_size,
        tail=first.tail,
        temperature=first.temperature,
        log_tail_mass=padded(known, 0.0) if len(known) == len(tails) else None,
    )


def packed_batch(sources: Sequence[PackedLogits]) -> PackedLogits:
    first = sources[0]
    return PackedLogits(
        torch.cat([source.data for source in sources]),
        padded([source.counts for source in sources], 0),
        vocab_size=first.vocab_size,
        codec=first.codec,
        tail=first.tail,
        temperature=first.temperature,
    )

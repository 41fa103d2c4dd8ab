"""``pack`` and ``unpack``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels import arguments
from kdkernels.backends import able, row_backend
from kdkernels.backends import select as select_backend
from kdkernels.reference import records as records_reference
from kdkernels.sources import PackedLogits, TopKLogits

__all__ = ["pack", "unpack"]


def pack(topk: TopKLogits, codec: str = "q6") -> PackedLogits:
    """A truncated teacher as records, one per token: what a store keeps.

    Token ids are kept exactly (a sorted set in Elias-Fano form), the mass of the named ids within a factor of
    1 +- 0.0005 of the odds, and the distances of the log-probabilities from the token's largest on a grid of 16, 64 or 256
    steps that is fitted to the token ("q4", "q6", "q8"; distances beyond 32 nats become 32), or as a bfloat16 ("bf16").
    A record of c of V entries at b bits takes ``4 + ceil((c * (b + 1 + l) + ((V - 1) >> l)) / 8)`` bytes with
    ``l = floor(log2(V / c))`` (2 instead of 4 for "bf16"): at V = 131,072 and "q6" 125 bytes for 50 entries and 292
    for 128. The bytes depend on nothing but the entries, whatever the machine, the backend and the order of the ids.

    Args:
        topk: ids with log-probabilities ``[..., K]``, from ``topk_logits`` or elsewhere, as float32. Entries with the id
            -1 or the log-probability -inf are left out; a token without entries takes no bytes, and its tail is then
            the whole mass. Without ``log_tail_mass`` the tail is what the entries leave.
        codec: "q4", "q6", "q8" or "bf16".

    Returns:
        ``PackedLogits`` with the tokens ``[...]``, the tail policy and the temperature of ``topk``, on its device.

    Raises:
        TypeError, ValueError: an argument is refused: an id outside the vocabulary or twice in a token, a log-probability
            that is NaN or above 0 (0.05 is let pass, for logarithms in low precision).
    """
    return arguments.pack_rows(topk, codec, records_room(getattr(topk, "ids", None), "pack_records").pack_records)


def unpack(packed: PackedLogits) -> TopKLogits:
    """The entries of records, each token's ids in ascending order.

    Args:
        packed: from ``pack`` or a store; its bytes are not trusted.

    Returns:
        ``TopKLogits``: ids int64 and log-probabilities float32 ``[..., K]`` with K the largest count, past a token's count
        -1 and -inf, and ``log_tail_mass`` ``[...]``, on the device of ``packed``. ``exp(log_probs)`` and
        ``exp(log_tail_mass)`` sum to 1.

    Raises:
        TypeError: ``packed`` is not ``PackedLogits``.
        ValueError: counts are outside the vocabulary or do not agree with the data, or a record is malformed; the text
            names the token.
    """
    return arguments.unpack_rows(packed, records_room(getattr(packed, "data", None), "unpack_records").unpack_records)


def records_room(tensor: Tensor | None, function: str) -> Any:
    """The module that does this to records on the device of the tensor: that of the best backend that can, or the reference."""
    if tensor is None or select_backend(None, tensor.device.type, "records") == "reference":
        return records_reference
    names, _ = able(tensor.device.type, "records")
    return next((module for module in map(row_backend, names) if hasattr(module, function)), records_reference)

"""What holds of records (``csrc/math/records.h``) whoever reads or writes them: sizes, and what may be in them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BITS",
    "MASS_SLACK",
    "check_entries",
    "check_tail",
    "header_bytes",
    "low_bits",
    "present_entries",
    "record_offsets",
    "record_sizes",
    "refuse_record",
    "rows_to_pack",
]

BITS = {"q4": 4, "q6": 6, "q8": 8, "bf16": 16}
"""Bits per value of each codec."""

MASS_SLACK = 0.05
"""By how much logarithms of probabilities may exceed 0: in bfloat16 they are that coarse."""


def header_bytes(bits: int) -> int:
    return 2 if bits == 16 else 4


def low_bits(counts: Tensor, vocab: int) -> Tensor:
    """``floor(log2(vocab / count))`` for counts from 1 to the vocabulary, int64."""
    quotient = torch.div(vocab, counts.long(), rounding_mode="floor")
    return torch.frexp(quotient.double()).exponent.long() - 1


def record_sizes(counts: Tensor, vocab: int, bits: int) -> Tensor:
    """Bytes of each record, int64, for counts from 0 to the vocabulary."""
    entries = counts.long()
    low = low_bits(entries.clamp(min=1), vocab)
    fields = entries * (bits + 1 + low) + torch.bitwise_right_shift(torch.full_like(low, vocab - 1), low)
    return torch.where(entries > 0, header_bytes(bits) + (fields + 7) // 8, 0)


def record_offsets(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> Tensor:
    """Where in ``data`` the record of each token begins, int64 ``[N]``.

    Checks that no count exceeds the vocabulary or ``width``, and that the records fill the data.
    """
    most = min(vocab, width)
    wrong = (counts < 0) | (counts > most)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"packed: counts must be between 0 and {most} (vocabulary {vocab}, width {width}), "
            f"token {token} has {int(counts[token])}"
        )
    sizes = record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    wanted = int(ends[-1]) if len(ends) else 0
    if wanted != data.numel():
        raise ValueError(f"packed: data has {data.numel()} bytes, and records of these counts have {wanted}")
    return ends - sizes


def present_entries(ids: Tensor, log_probs: Tensor) -> Tensor:
    """Which entries are there, ``[N, K]``: an entry of probability zero is none."""
    return (ids != -1) & (log_probs != -torch.inf)


def rows_to_pack(ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids int64 ``[N, K]``, log-probabilities fp32 ``[N, K]``, log tail mass fp32 ``[N]``, counts int32 ``[N]``)."""
    present = present_entries(ids, log_probs)
    if log_tail_mass is None:
        mass = log_probs.double().exp().masked_fill(~present, 0).sum(-1)
        log_tail_mass = torch.log1p(-mass.clamp(max=1))
    return (
        ids.long().contiguous(),
        log_probs.float().contiguous(),
        log_tail_mass.float().contiguous(),
        present.sum(-1, dtype=torch.int32),
    )


def check_entries(ids: Tensor, log_probs: Tensor, vocab: int) -> None:
    """Refuses rows ``[N, K]`` that are no truncated distribution, by the token and what is wrong with it."""
    present = present_entries(ids, log_probs)
    outside = (ids < -1) | (ids >= vocab)
    refuse_entry("topk: ids must be -1 or in the vocabulary", f"[0, {vocab})", outside, ids)
    too_large = present & ~(log_probs <= MASS_SLACK)
    refuse_entry("topk: log_probs must be logarithms of probabilities,", "at most 0", too_large, log_probs)
    ascending = ids.masked_fill(~present, -1).sort(-1).values
    repeated = torch.zeros_like(present)
    repeated[:, 1:] = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    refuse_entry("topk: ids must be", "different from one another", repeated, ascending)


def refuse_entry(rule: str, allowed: str, wrong: Tensor, values: Tensor) -> None:
    if bool(wrong.any()):
        token, entry = wrong.nonzero()[0].tolist()
        raise ValueError(f"{rule} {allowed}; token {token} has {values[token, entry].item()}")


def check_tail(log_tail_mass: Tensor) -> None:
    wrong = ~(log_tail_mass <= MASS_SLACK)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"topk: log_tail_mass must be the logarithm of a probability, at most 0; "
            f"token {token} has {log_tail_mass[token].item()}"
        )


def refuse_record(token: int) -> None:
    raise ValueError(f"packed: data: the record of token {token} is malformed")

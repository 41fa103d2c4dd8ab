"""Rows of a sparse teacher, and what they say once their entries are sorted, tempered and their tail is known.

Shared by the reference, the Triton backend and the dense path; the CPU kernels do the same in the scratch of a row
(``csrc/cpu/sparse_divergence.cpp``).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.rows import NOTHING, RowSpec, row_temperature
from kdkernels.divergences import Kind
from kdkernels.records import record_offsets, record_sizes

__all__ = ["NOTHING", "Entries", "Policy", "Records", "SparseRows", "dense_rows", "entries", "needs_dense_rows"]

LOG_FLOOR = -1e5
"""Log-probabilities are clamped here from below, as logits are: probability 0, and every product stays finite."""


class Policy(enum.IntEnum):
    """What stands for the vocabulary that a row does not name. The numbers are shared with the C++ and Triton sources."""

    BUCKET = 0
    RENORMALIZE = 1
    UNIFORM = 2
    DROP = 3
    SAMPLED = 4


class Records(NamedTuple):
    """Rows as packed records (``csrc/math/records.h``).

    data: uint8 ``[bytes]``. counts: int32 ``[N]``, entries of each row. bits: of a value.
    offsets: int64 ``[N]``, where in the data a row begins; None: one record after the other, all of the data.
    """

    data: Tensor
    counts: Tensor
    bits: int
    offsets: Tensor | None = None

    def located(self, vocab: int) -> Records:
        """With offsets. Counts that do not go with the data are refused: nothing is read outside it afterwards."""
        if self.offsets is not None:
            return self
        return self._replace(offsets=record_offsets(self.data, self.counts, vocab, self.bits, vocab))

    def take(self, index: slice | Tensor) -> Records:
        """Some of the rows, once they are located."""
        assert self.offsets is not None
        return self._replace(counts=self.counts[index], offsets=self.offsets[index])


class SparseRows(NamedTuple):
    """A sparse teacher as rows: ids and values, or records.

    ids: ``[N, K]``, int64 or int32, adjacent in a row; those outside the vocabulary are no entries.
    values: ``[N, K]``, log-probabilities, or weights if the policy is ``SAMPLED``; adjacent in a row.
    constants: ``[N]``, the log tail mass, or the entropy of a sampled teacher; None: not known.
    """

    policy: int
    ids: Tensor | None = None
    values: Tensor | None = None
    constants: Tensor | None = None
    records: Records | None = None

    def located(self, vocab: int) -> SparseRows:
        """With the place of every record."""
        return self if self.records is None else self._replace(records=self.records.located(vocab))

    def take(self, index: slice | Tensor) -> SparseRows:
        """Some of the rows, once they are located."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return SparseRows(
            self.policy,
            pick(self.ids),
            pick(self.values),
            pick(self.constants),
            None if self.records is None else self.records.take(index),
        )

    def unpacked(self, vocab: int, unpack_records: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> SparseRows:
        """Records as ids, log-probabilities and log tail masses, by the function of a backend."""
        if self.records is None:
            return self
        located = self.records.located(vocab)
        assert located.offsets is not None
        data, counts = located.data, located.counts
        if self.records.offsets is not None:  # some of the rows: gather their bytes
            sizes = record_sizes(counts, vocab, located.bits)
            starts = (located.offsets - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
            data = data[starts + torch.arange(len(starts), device=data.device)]
        width = int(counts.max()) if len(counts) else 0
        ids, log_probs, log_tail = unpack_records(data, counts, vocab, located.bits, width)
        return SparseRows(self.policy, ids, log_probs, log_tail)


class Entries(NamedTuple):
    """The outcomes that rows name. Where there is no entry, the id is ``vocab`` and the value NOTHING (weights: 0).

    ids: int64 ``[N, K]``, ascending, each at most once. values: ``[N, K]``, log p or weights.
    log_tail: ``[N]``, the logarithm of the mass of everything else; NOTHING where that is no outcome of its own.
    """

    ids: Tensor
    values: Tensor
    log_tail: Tensor


def needs_dense_rows(policy: int, kind: int) -> bool:
    """Whether a divergence needs the tail entry by entry, so that the teacher's rows have to be filled in."""
    if policy == Policy.UNIFORM:
        return kind not in (Kind.FORWARD_KL, Kind.SOFT_CROSS_ENTROPY)
    return policy == Policy.RENORMALIZE and kind == Kind.AB


def entries(teacher: SparseRows, spec: RowSpec, vocab: int, dtype: torch.dtype) -> Entries:
    """The entries of unpacked rows at the teacher's temperature, which counts from the one they are stored at.

    Computed in float64, and rounded once.
    """
    assert teacher.ids is not None
    assert teacher.values is not None
    ids = teacher.ids.long()
    present = (ids >= 0) & (ids < vocab)
    if spec.active is not None:
        present = present & spec.active.unsqueeze(-1)
    ids, order = ids.masked_fill(~present, vocab).sort(-1)
    present = ids < vocab
    values = teacher.values.double().gather(-1, order)
    if teacher.policy == Policy.SAMPLED:
        ids, values = merged(ids, values.masked_fill(~present, 0.0), vocab)
        return Entries(ids, values.to(dtype), values.new_full(ids.shape[:1], NOTHING, dtype=dtype))
    log_p = values.clamp(min=LOG_FLOOR).masked_fill(~present, NOTHING)
    outside = vocab - present.sum(-1)
    if teacher.constants is None:
        log_tail = torch.log1p(-log_p.exp().sum(-1).clamp(max=1))
    else:
        log_tail = teacher.constants.double()
    log_tail = log_tail.clamp(min=LOG_FLOOR)
    if spec.active is not None:
        log_tail = log_tail.masked_fill(~spec.active, 0.0)
    temperature = row_temperature(spec.teacher_temperature, spec.teacher_temperatures)
    if teacher.policy == Policy.RENORMALIZE:
        log_p = (log_p / temperature).masked_fill(~present, NOTHING)
        log_p = (log_p - log_p.logsumexp(-1, keepdim=True)).masked_fill(~present, NOTHING)
        log_tail = torch.full_like(log_tail, NOTHING)
    elif teacher.policy == Policy.UNIFORM:
        log_count = outside.clamp(min=1).double().log().unsqueeze(-1)
        tail = (log_tail.unsqueeze(-1) - log_count) / temperature + log_count
        tail = tail.masked_fill((outside == 0).unsqueeze(-1), NOTHING)
        log_p = (log_p / temperature).masked_fill(~present, NOTHING)
        total = torch.cat([log_p, tail], -1).logsumexp(-1, keepdim=True)
        log_p, log_tail = (log_p - total).masked_fill(~present, NOTHING), (tail - total).squeeze(-1)
    elif teacher.policy == Policy.DROP:
        log_tail = torch.full_like(log_tail, NOTHING)
    log_tail = log_tail.masked_fill(outside == 0, NOTHING)
    return Entries(ids, log_p.to(dtype), log_tail.to(dtype))


def merged(ids: Tensor, weights: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Ascending ids, each once, with the sums of their weights."""
    if not ids.shape[-1]:
        return ids, weights
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1
    sums = torch.zeros_like(weights).scatter_add(-1, place, weights)
    return torch.full_like(ids, vocab).scatter(-1, place, ids), sums


def dense_rows(teacher: SparseRows, spec: RowSpec, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Of unpacked rows: log-probabilities ``[N, V]``, the tail filled in (evenly, or with probability 0), and which say nothing."""
    found = entries(teacher, spec, vocab, dtype)
    outside = vocab - (found.ids < vocab).sum(-1)
    silent = None if teacher.policy == Policy.UNIFORM else outside == vocab
    fill = found.log_tail - outside.clamp(min=1).to(dtype).log()
    # Columns behind the vocabulary take what is no entry, and start every row on a boundary that vectors like.
    rows = fill.clamp(min=LOG_FLOOR).unsqueeze(-1).repeat(1, (vocab // 16 + 1) * 16)
    return rows.scatter_(-1, found.ids, found.values.clamp(min=LOG_FLOOR))[:, :vocab], silent

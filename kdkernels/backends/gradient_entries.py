"""The gradient of logits as lists of its large entries, and their products with what made the logits.

Under a tolerance, a row kernel writes into the storage of a row not its gradient but the list of the entries it must keep,
chosen in ``csrc/cpu/gradient_entries.h``. ``ListProducts`` gathers the lists of many chunks: so the weight is read, and its
gradient written, once for all of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import row_backend

__all__ = ["ENTRY_BYTES", "LARGEST_SHARE", "EntryLists", "GradientReport", "ListProducts", "report_lists"]

LARGEST_SHARE = 0.12
"""Of a chunk's entries in its lists: beyond it, products of lists take longer than dense ones."""

ENTRY_BYTES = 8
"""Of a list: an id and a value."""


class EntryLists(NamedTuple):
    """What a row kernel says of the lists of a chunk.

    counts: int32 ``[n]``, the entries of each list, -1 where the row is dense: then its storage holds its gradient.
    summaries: float64 ``[n, 3]``, the squared norms of the row's gradient and of the error, and the number that every entry
    of the row gets beside the list.
    """

    counts: Tensor
    summaries: Tensor

    @staticmethod
    def empty(rows: int) -> EntryLists:
        return EntryLists(torch.empty(rows, dtype=torch.int32), torch.empty(rows, 3, dtype=torch.float64))

    def entries(self, vocab: int) -> int:
        """Of all lists, with dense rows listed whole."""
        return int(torch.where(self.counts < 0, vocab, self.counts).sum())

    def sparse(self, vocab: int) -> bool:
        """Whether products of these lists are worth it."""
        return self.entries(vocab) <= LARGEST_SHARE * vocab * self.counts.shape[0]


class ListProducts:
    """The lists of consecutive rows of one head, until they are multiplied.

    Args:
        backend: the row backend.
        weight: the head's weight ``[V, H]``.
        bytes_: memory for the lists; at least what ``rows`` rows, the longest chunk, can need.
    """

    def __init__(self, backend: str, weight: Tensor, rows: int, bytes_: int) -> None:
        self.kernels: Any = row_backend(backend)
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        capacity = max(bytes_ // ENTRY_BYTES, rows * math.ceil(LARGEST_SHARE * weight.shape[0]))
        self.columns = torch.empty(capacity, dtype=torch.int32)
        self.values = torch.empty(capacity, dtype=torch.float32)
        self.counts: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.used = 0
        self.first_row = 0

    @functools.cached_property
    def weight_total(self) -> Tensor:
        return self.weight.sum(0, dtype=torch.float32)

    @property
    def rows(self) -> slice:
        """Those whose lists are held."""
        return slice(self.first_row, self.first_row + sum(len(counts) for counts in self.counts))

    def fits(self, lists: EntryLists) -> bool:
        return self.used + lists.entries(self.weight.shape[0]) <= self.columns.numel()

    def add(self, storage: Tensor, lists: EntryLists, first_row: int) -> None:
        """Takes the lists of a chunk over from the storage of its rows."""
        if not self.counts:
            self.first_row = first_row
        self.kernels.collect_entries(storage, lists, self.columns[self.used :], self.values[self.used :])
        self.counts.append(torch.where(lists.counts < 0, self.weight.shape[0], lists.counts))
        self.shares.append(lists.summaries[:, 2].float())
        self.used += int(self.counts[-1].sum())

    def multiply(
        self, hidden: Tensor, scale: float, to_hidden: bool, weight_sum: Tensor | None, bias_sum: Tensor | None
    ) -> Tensor | None:
        """Adds to the sums, returns what goes to the rows' hidden states, float32; then there are no lists.

        ``hidden`` are these hidden states, float32. ``scale`` is the head's: what makes its logits is ``scale * hidden``.
        """
        counts = torch.cat(self.counts)
        offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=offsets[1:])
        columns, values = self.columns[: self.used], self.values[: self.used]
        shares = torch.cat(self.shares)
        if scale != 1:
            values.mul_(scale)
            shares.mul_(scale)
        hidden = hidden.contiguous()
        out = hidden.new_empty(hidden.shape) if to_hidden else None
        if out is not None or weight_sum is not None:
            everywhere = None if weight_sum is None else shares @ hidden
            self.kernels.sparse_products(offsets, columns, values, self.weight, hidden, everywhere, out, weight_sum)
        if out is not None:
            out.addr_(shares, self.weight_total)
        if bias_sum is not None:
            bias_sum.index_add_(0, columns, values).add_(shares.sum())
        self.counts.clear()
        self.shares.clear()
        self.used = 0
        return out


class GradientReport:
    """What ``gradient_tolerance`` did to the logit gradients of the losses made in the block, in their order.

        with kd.GradientReport() as report:
            loss = kd.distillation_loss(student, teacher, gradient_tolerance=1e-3)
            loss.backward()
        report.relative_error.max(), report.density.mean()

    relative_error: float64 ``[rows]``, the error of a row's gradient over its norm, in L2.
    density: float64 ``[rows]``, the share of the vocabulary whose gradient was kept; 1 where the row stayed dense.

    Rows are those of every ``LMHead`` that receives a gradient, chunk by chunk; of a pair of heads the student's come first
    in each chunk. Blocks may be nested; each reports what happened inside it.
    """

    active: list[GradientReport] = []  # noqa: RUF012 - one list for all

    def __init__(self) -> None:
        self._error: list[Tensor] = []
        self._density: list[Tensor] = []

    def __enter__(self) -> GradientReport:
        GradientReport.active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        GradientReport.active.remove(self)

    @property
    def relative_error(self) -> Tensor:
        return torch.cat(self._error) if self._error else torch.empty(0, dtype=torch.float64)

    @property
    def density(self) -> Tensor:
        return torch.cat(self._density) if self._density else torch.empty(0, dtype=torch.float64)

    def add(self, lists: EntryLists, vocab: int) -> None:
        norm, error = lists.summaries[:, :2].unbind(1)
        relative = (error / torch.where(norm > 0, norm, 1.0)).sqrt()
        share = lists.counts.double() / vocab
        self.note(relative, torch.where(lists.counts < 0, 1.0, share))

    def note(self, relative_error: Tensor, density: Tensor) -> None:
        """Adds some rows, float64 ``[n]`` each."""
        self._error.append(relative_error)
        self._density.append(density)


def report_lists(lists: EntryLists, vocab: int) -> None:
    for report in GradientReport.active:
        report.add(lists, vocab)

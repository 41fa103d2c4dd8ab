"""What a gradient tolerance leaves of the gradient of logits that comes in tiles, blocks of rows x columns.

A GPU multiplies tiles, so it can only skip whole ones. The gradient comes strip by strip of the vocabulary, and the norm of a
row is known only at the end. So a row may have lost, after the strips so far, ``share * tolerance ** 2`` of the squared norm
that it has had so far, where ``share`` is the part of the vocabulary that is done: at the end that is the promise. As in
``gradient_entries``, what is left out of a strip is replaced by its mean, so that the sum of each row stays what it was: over
a skipped tile that is one number per row, whose products take vectors instead of matrices. Nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.gradient_entries import GradientReport

__all__ = ["TileChooser", "TileNotes", "Tiles"]

ROUNDING = 2.0**-12
"""Of the tolerance's square, held back for the rounding of the sums of squares, whose terms are float32."""


class TileNotes(NamedTuple):
    """What is noted of a strip's gradient.

    squares, sums: float32 ``[tiles, blocks * block_rows]``, over a row's entries in a tile; 0 past the last row.
    masked: int32 ``[tiles, blocks]``, whether a tile holds an entry on the floor, whose gradient is exactly 0.
    """

    squares: Tensor
    sums: Tensor
    masked: Tensor

    @staticmethod
    def empty(tiles: int, blocks: int, block_rows: int, device: torch.device) -> TileNotes:
        squares = torch.empty(tiles, blocks * block_rows, dtype=torch.float32, device=device)
        return TileNotes(squares, torch.empty_like(squares), squares.new_empty(tiles, blocks, dtype=torch.int32))


class Tiles(NamedTuple):
    """The tiles of a strip to multiply, and what stands in for the others.

    kept: bool ``[tiles, blocks]``. means: float32 ``[blocks * block_rows]``, each entry of a row in the skipped tiles.
    """

    kept: Tensor
    means: Tensor

    def of_blocks(self) -> tuple[Tensor, Tensor]:
        """For each block of rows the tiles kept: int32 ``[blocks, tiles]``, these first, and how many, int32 ``[blocks]``."""
        return lists(self.kept.t())

    def of_tiles(self) -> tuple[Tensor, Tensor]:
        """For each tile the blocks of rows that keep it, in the same way."""
        return lists(self.kept)

    def to_hidden(self, weight: Tensor, columns: int) -> Tensor:
        """Per block, the sums of the rows of a strip's weight ``[strip, H]`` in skipped tiles: float32 ``[blocks, H]``."""
        return (~self.kept).t().float() @ tile_sums(weight, columns)

    def to_weight(self, hidden: Tensor) -> Tensor:
        """Per tile, what the means make of hidden states ``[N, H]`` in blocks that skip it: float32 ``[tiles, H]``."""
        block_rows = self.means.shape[0] // self.kept.shape[1]
        return (~self.kept).float() @ tile_sums(hidden * self.means[: hidden.shape[0], None], block_rows)

    def to_bias(self) -> Tensor:
        """Per tile, the sum of the means of rows in blocks that skip it: float32 ``[tiles]``."""
        return (~self.kept).float() @ self.means.view(self.kept.shape[1], -1).sum(1)


def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    order = kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return order.to(torch.int32).contiguous(), kept.sum(1, dtype=torch.int32)


def tile_sums(matrix: Tensor, size: int) -> Tensor:
    """The sums of each ``size`` rows of a matrix ``[n, H]``, float32 ``[ceil(n / size), H]``."""
    whole = matrix.shape[0] // size
    parts = [matrix[: whole * size].reshape(whole, size, matrix.shape[1]).sum(1, dtype=torch.float32)]
    if whole * size < matrix.shape[0]:
        parts.append(matrix[whole * size :].sum(0, keepdim=True, dtype=torch.float32))
    return torch.cat(parts)


class TileChooser:
    """Picks the tiles of one head, strip by strip.

    Args:
        rows, vocab: of the gradient.
        block_rows, block_columns: of a tile; the last tile may be cut by the vocabulary's end.
        tolerance: of each row's L2 norm.
    """

    def __init__(self, rows: int, vocab: int, block_rows: int, block_columns: int, tolerance: float) -> None:
        self.rows, self.vocab = rows, vocab
        self.block_rows, self.block_columns = block_rows, block_columns
        self.allowed = (1 - ROUNDING) * tolerance * tolerance
        self.columns = 0
        self.seen: Tensor | None = None
        self.lost: Tensor | None = None
        self.error: Tensor | None = None
        self.kept: Tensor | None = None

    def choose(self, notes: TileNotes) -> Tiles:
        """The tiles of the next strip to keep.

        Those of a block of rows are sorted by the largest share that any of its rows has in them, and skipped in that order
        as long as every row may lose what it then has lost.
        """
        tiles, blocks = notes.masked.shape
        squares = notes.squares.double().view(tiles, blocks, self.block_rows)
        zero = squares.new_zeros(blocks, self.block_rows)
        strip = min(tiles * self.block_columns, self.vocab - self.columns)
        self.columns += strip
        widths = squares.new_full((tiles,), self.block_columns)
        widths[-1:] = strip - (tiles - 1) * self.block_columns
        self.seen = squares.sum(0) + (zero if self.seen is None else self.seen)
        lost = zero if self.lost is None else self.lost
        size = torch.where(self.seen == 0, 1.0, self.seen)
        shares = squares / size
        order = shares.amax(-1).argsort(dim=0, stable=True)
        running = shares.gather(0, order.unsqueeze(-1).expand_as(shares)).cumsum_(0).add_(lost / size).amax(-1)
        # A row without a finite norm fails every comparison, so that all of its block is kept.
        may = running <= self.columns / self.vocab * self.allowed
        skipped = torch.zeros_like(may).scatter_(0, order, may)
        entries = (skipped * widths.unsqueeze(-1)).sum(0)  # [blocks]
        replaceable = (entries > 0) & ~(skipped & (notes.masked != 0)).any(0)
        sums = torch.where(skipped.unsqueeze(-1), notes.sums.double().view_as(squares), 0.0).sum(0)
        means = torch.where(replaceable.unsqueeze(-1), sums / entries.clamp(min=1).unsqueeze(-1), 0.0)
        gone = torch.where(skipped.unsqueeze(-1), squares, 0.0).sum(0)
        self.lost = lost + gone
        if GradientReport.active:
            error = gone - means.square() * entries.unsqueeze(-1)
            self.error = error if self.error is None else self.error + error
            kept = strip - entries
            self.kept = kept if self.kept is None else self.kept + kept
        return Tiles(~skipped, means.float().view(-1))

    def report(self) -> None:
        """Tells the open reports what was lost and kept of each row."""
        if self.error is None or self.kept is None or self.seen is None:
            return
        relative = (self.error.clamp(min=0) / torch.where(self.seen > 0, self.seen, 1.0)).sqrt()
        density = (self.kept / self.vocab).repeat_interleave(self.block_rows)
        for report in GradientReport.active:
            report.note(relative.view(-1)[: self.rows], density[: self.rows])

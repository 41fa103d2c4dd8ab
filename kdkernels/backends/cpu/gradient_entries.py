"""Lists of gradient entries on the CPU, and their products."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.compiled.divergence import lists_arguments
from kdkernels.backends.cpu.launching import DTYPES, address, module
from kdkernels.backends.gradient_entries import EntryLists

__all__ = ["collect_entries", "expand_entries", "sparse_products"]


def collect_entries(storage: Tensor, lists: EntryLists, columns: Tensor, values: Tensor) -> None:
    """Moves the lists of a chunk's rows from ``storage`` [n, V] to ``columns`` and ``values``; dense rows are listed whole."""
    module().collect_entries(*_entry_chunk(storage, lists), columns.data_ptr(), values.data_ptr())


def expand_entries(storage: Tensor, lists: EntryLists) -> None:
    """Makes the rows of a chunk dense again, in their storage."""
    module().expand_entries(torch.get_num_threads(), *_entry_chunk(storage, lists))


def _entry_chunk(storage: Tensor, lists: EntryLists) -> tuple[int, ...]:
    return *storage.shape, storage.data_ptr(), storage.stride(0), DTYPES[storage.dtype], *lists_arguments(lists)


def sparse_products(
    offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    hidden: Tensor,
    everywhere: Tensor | None,
    to_hidden: Tensor | None,
    to_weight: Tensor | None,
) -> None:
    """Of G [n, V], whose row i has ``values`` at ``columns`` from ``offsets[i]`` to ``offsets[i + 1]``, columns ascending.

    Writes G W to ``to_hidden`` [n, H] and adds G^T hidden, and ``everywhere`` [H] to each row, to ``to_weight`` [V, H]; all
    float32 and contiguous. ``weight`` [V, H], its rows contiguous; ``hidden`` [n, H] float32.
    """
    module().sparse_products(
        torch.get_num_threads(),
        hidden.shape[0],
        *weight.shape,
        offsets.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        DTYPES[weight.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        address(everywhere),
        address(to_hidden),
        address(to_weight),
    )

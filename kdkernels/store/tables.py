"""Teachers in tables of Parquet and Arrow, as others keep them, read a batch of rows at a time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdkernels.sources import TopKLogits, check_sparse_vocab_size

__all__ = ["from_table"]

ROWS = 256
ROLES = ("ids", "log_probs", "input_ids")


class Columns(NamedTuple):
    """Arrays of Arrow with an entry per token; the first two hold lists."""

    ids: Any
    log_probs: Any
    input_ids: Any


def from_table(
    table: Any,
    *,
    vocab_size: int,
    ids: str = "ids",
    log_probs: str = "log_probs",
    sequence_ids: str | None = None,
    input_ids: str | None = None,
    temperature: float = 1.0,
    tail: str = "bucket",
) -> Iterator[dict[str, Any]]:
    """Sequences from columns of token ids and log-probabilities, in the form of a dataset's items.

    A row is a sequence where the two columns are lists of lists, and a token where they are lists of numbers. Then rows
    with the same value of ``sequence_ids``, one after another, are one sequence. Ids of -1 are no entries, and a null is
    an empty list. Needs pyarrow (``pip install kdkernels[parquet]``)::

        for item in kd.store.from_table("teacher.parquet", vocab_size=V):
            w.append([item["topk"]], [item["sequence_id"]])

    Args:
        table: a path of a Parquet or Arrow (IPC) file, a ``pyarrow.Table``, or an iterable of record batches.
        vocab_size: entries of the vocabulary.
        ids, log_probs: names of the columns; log-probabilities are those over the full vocabulary.
        sequence_ids: the column of the sequences' ids, whole numbers; None: sequences are counted from 0.
        input_ids: the column of the tokens that the teacher read, or None.
        temperature, tail: as in ``TopKLogits``.
    """
    size = check_sparse_vocab_size("from_table", vocab_size)
    names = {"ids": ids, "log_probs": log_probs, "sequence_ids": sequence_ids, "input_ids": input_ids}
    for place, (key, pieces) in enumerate(_sequences(table, names)):
        sequence_id = place if sequence_ids is None else key
        if type(sequence_id) is not int:
            raise TypeError(f"from_table: column {sequence_ids!r} must hold whole numbers, got {sequence_id!r:.80}")
        yield _item(sequence_id, pieces, names, size, temperature, tail)


def _batches(table: Any) -> Iterator[Any]:
    """Record batches of whatever holds them."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("from_table needs pyarrow: pip install 'kdkernels[parquet]'") from error
    if isinstance(table, str | os.PathLike):
        path = os.fspath(table)
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic[:4] == b"PAR1":
            with pyarrow.parquet.ParquetFile(path) as parquet:
                yield from parquet.iter_batches(ROWS)
            return
        with pa.memory_map(path) as source:
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(source)
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(source)
    elif isinstance(table, pa.Table):
        yield from table.to_batches(ROWS)
    else:
        yield from table


def _sequences(table: Any, names: Mapping[str, str | None]) -> Iterator[tuple[Any, list[Columns]]]:
    """Ids of sequences, and the columns of their tokens in pieces."""
    current: tuple[Any, list[Columns]] | None = None
    for batch in _batches(table):
        columns: dict[str, Any] = {}
        for role, name in names.items():
            if name is not None and name not in batch.schema.names:
                raise ValueError(f"from_table: there is no column {name!r}, only {', '.join(batch.schema.names)}")
            columns[role] = None if name is None else batch.column(name)
        keys = None if columns["sequence_ids"] is None else columns["sequence_ids"].to_pylist()
        if _is_list(_value_type(columns["ids"].type)):
            for row in range(batch.num_rows):
                yield None if keys is None else keys[row], [Columns(*(_cell(columns[role], row) for role in ROLES))]
            continue
        if keys is None:
            raise ValueError(
                f"from_table: column {names['ids']!r} has one token per row, so name a column sequence_ids"
            )
        start = 0
        for key, members in itertools.groupby(keys):
            stop = start + sum(1 for _ in members)
            piece = Columns(*(None if columns[role] is None else columns[role][start:stop] for role in ROLES))
            start = stop
            if current is not None and current[0] == key:
                current[1].append(piece)
                continue
            if current is not None:
                yield current
            current = (key, [piece])
    if current is not None:
        yield current


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _value_type(kind: Any) -> Any:
    if not _is_list(kind):
        raise TypeError(f"from_table: the columns of ids and log-probabilities must hold lists, got {kind}")
    return kind.value_type


def _cell(column: Any, row: int) -> Any:
    """What the list in a row holds, as an array."""
    return None if column is None else column[row].values


def _item(
    sequence_id: int,
    pieces: list[Columns],
    names: Mapping[str, str | None],
    vocab_size: int,
    temperature: float,
    tail: str,
) -> dict[str, Any]:
    lengths, ids = _flat([piece.ids for piece in pieces], names["ids"])
    other, log_probs = _flat([piece.log_probs for piece in pieces], names["log_probs"])
    if not np.array_equal(lengths, other):
        raise ValueError(
            f"from_table: sequence {sequence_id}: {names['ids']!r} and {names['log_probs']!r} must have lists of the same lengths"
        )
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"from_table: column {names['ids']!r} must hold whole numbers, got {ids.dtype}")
    shape = (lengths.size, int(lengths.max(initial=0)))
    present = np.arange(shape[1]) < lengths[:, None]
    all_ids, all_log_probs = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
    all_ids[present], all_log_probs[present] = ids, log_probs
    all_ids[np.isneginf(all_log_probs)] = -1
    tokens = None
    if pieces[0].input_ids is not None:
        tokens = torch.from_numpy(np.concatenate([piece.input_ids.to_numpy(zero_copy_only=False) for piece in pieces]))
    topk = TopKLogits(
        torch.from_numpy(all_ids),
        torch.from_numpy(all_log_probs),
        vocab_size=vocab_size,
        temperature=temperature,
        tail=tail,
    )
    return {"sequence_id": sequence_id, "topk": topk, "input_ids": tokens}


def _flat(pieces: list[Any], name: str | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """The lengths of lists, and their values end to end. A list that is null is empty."""
    import pyarrow.compute as pc

    if any(piece is None or not _is_list(piece.type) for piece in pieces):
        raise TypeError(f"from_table: column {name!r} must have one list per token")
    lengths = [pc.fill_null(pc.list_value_length(piece), 0).to_numpy(zero_copy_only=False) for piece in pieces]
    values = [piece.flatten() for piece in pieces]
    if any(value.null_count for value in values):
        raise ValueError(
            f"from_table: column {name!r} has nulls within its lists; leave entries out that are not there"
        )
    flat = [value.to_numpy(zero_copy_only=False) for value in values]
    return np.concatenate(lengths).astype(np.int64), np.concatenate(flat)

"""Writes a store, or goes on with one."""

from __future__ import annotations

import contextlib
import os
import secrets
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from kdkernels.checks import check_integer
from kdkernels.store import incoming, manifest, records, shards
from kdkernels.store.description import Description
from kdkernels.store.files import Files, files_at
from kdkernels.store.incoming import Teacher
from kdkernels.store.shards import StoredSequence

__all__ = ["Writer", "write"]

SHARD_BYTES = 1 << 26


def write(
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    codec: str = "q6",
    tokenizer: Any = None,
    teacher: str | None = None,
    data: str | None = None,
    k: int | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    tail: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    storage_options: dict[str, Any] | None = None,
) -> Writer:
    """Opens a store for writing: a new one, or one that goes on where other writers stopped.

    Any number of writers may write to one store at once, from any number of processes and machines; each owns its shards
    and waits for nobody. A sequence is safe once its shard is complete: after ``flush``, ``close`` or ``shard_bytes`` of
    further records. Use it in one process and one thread, as a context manager or with ``close()``.

    Args:
        path: a folder, or a URL that fsspec knows (``s3://...``, ``memory://...``).
        vocab_size: entries of the vocabulary, at most 2^24.
        codec: how log-probabilities are stored: "q4", "q6", "q8" or "bf16".
        tokenizer: a transformers tokenizer or its fingerprint (``kd.store.tokenizer_fingerprint``).
        teacher: a name for the model.
        data: a name for what the teacher read, a fingerprint for instance.
        k, top_p: how the teacher is cut; kept for readers, and no token may have more than ``k`` entries.
        temperature, tail: of the sources that will be appended; None: those of the first. Later ones must have the same.
        shard_bytes: a shard is written when its records reach this size. As much is held in memory, and lost in a crash.
        storage_options: for fsspec.

    Raises:
        ValueError: the path holds a store that is described differently. What is None here is taken from there.
    """
    files = files_at(path, storage_options)
    if check_integer("store.write: shard_bytes", shard_bytes) < 1:
        raise ValueError(f"store.write: shard_bytes must be at least 1, got {shard_bytes}")
    asked = Description.check(
        vocab_size=vocab_size,
        codec=codec,
        tail="bucket" if tail is None else tail,
        temperature=1.0 if temperature is None else temperature,
        k=k,
        top_p=top_p,
        tokenizer=tokenizer,
        teacher=teacher,
        data=data,
    )
    open_fields = {
        name
        for name, value in (
            ("tail", tail),
            ("temperature", temperature),
            ("k", k),
            ("top_p", top_p),
            ("tokenizer", tokenizer),
            ("teacher", teacher),
            ("data", data),
        )
        if value is None
    }
    return Writer(files, asked, frozenset(open_fields), shard_bytes)


class Writer:
    """See ``write``."""

    def __init__(self, files: Files, asked: Description, open_fields: frozenset[str], shard_bytes: int) -> None:
        self._files = files
        self._asked = asked
        self._open_fields = open_fields
        self._shard_bytes = shard_bytes
        self._process = os.getpid()
        self._name = secrets.token_hex(8)
        self._shards = 0
        self._closed = False
        self._description: Description | None = None
        self._stored: dict[int, str] = {}
        self._seen: dict[str, manifest.ShardEntry] = {}
        self._pending: dict[int, StoredSequence] = {}
        self._pending_bytes = 0
        records.single_thread_after_fork()
        files.tidy()
        with contextlib.suppress(FileNotFoundError):
            self._settle(manifest.read(files).description)
            self._look_around()

    # --- what is stored ------------------------------------------------------------------------------------------------

    @property
    def done(self) -> frozenset[int]:
        """Ids of the sequences that are stored safely, by whichever writer, as far as this one has seen."""
        return frozenset(self._stored)

    def contains(self, sequence_id: int) -> bool:
        """Whether a sequence is stored or has been appended, so that there is nothing left to do for it."""
        return sequence_id in self._stored or sequence_id in self._pending

    __contains__ = contains

    def _settle(self, found: Description) -> None:
        """Takes the description of the store that exists."""
        different = [name for name in found.differences(self._asked) if name not in self._open_fields]
        if different:
            name = different[0]
            raise ValueError(
                f"store.write: {name} is {getattr(self._asked, name)!r}, and the store in "
                f"{self._files.where(manifest.MANIFEST)} has {getattr(found, name)!r}"
            )
        self._description = found

    def _described(self, like: Teacher | None) -> Description:
        """The store's description; creates the store if need be."""
        if self._description is None:
            values = self._asked.values()
            if like is not None:
                for name in self._open_fields & {"tail", "temperature"}:
                    values[name] = getattr(like, name)
            self._settle(manifest.create(self._files, Description(**values)).description)
        assert self._description is not None
        return self._description

    def _look_around(self) -> None:
        """Reads the index of every shard that is new since the last look."""
        description = self._described(None)
        for name in manifest.shard_names(self._files):
            if name not in self._seen:
                shard = shards.read_index(self._files, name, description)
                self._remember(shard.entry, shard.sequence_ids.tolist())

    def _remember(self, entry: manifest.ShardEntry, sequence_ids: Sequence[int]) -> None:
        self._seen[entry.file] = entry
        self._stored.update(dict.fromkeys(sequence_ids, entry.file))

    # --- appending -----------------------------------------------------------------------------------------------------

    def append(
        self,
        topk: Teacher | Sequence[Teacher],
        sequence_ids: Sequence[int] | Tensor,
        input_ids: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Adds sequences: all of them, or with an error none.

        Args:
            topk: a source ``[sequences, tokens, K]``, or a list of sources ``[tokens, K]``: ``TopKLogits``, or
                ``PackedLogits`` (whose shape has no K) of the store's codec. Entries of probability 0 are left out.
            sequence_ids: one whole number of 64 bits per sequence, which no sequence of the store has yet.
            input_ids: the token ids that the teacher read, ``[sequences, tokens]`` or a list of ``[tokens]``. All
                sequences of a writer have them, or none.

        Raises:
            OSError: the sequences were taken in and filled a shard, which could not be written; see ``flush``.
        """
        if self._closed:
            raise ValueError("append: this writer is closed")
        self._check_process()
        sources = incoming.sources(topk)
        if not sources:
            if len(sequence_ids):
                raise ValueError(f"append: sequence_ids has {len(sequence_ids)} entries, and topk no sequences")
            return
        description = self._described(sources[0])
        found = [sequence for source in sources for sequence in incoming.encode(source, description)]
        ids = incoming.sequence_ids(sequence_ids, len(found))
        for sequence_id in ids:
            if sequence_id in self:
                where = self._stored.get(sequence_id, "this writer")
                raise ValueError(f"append: sequence_ids: {sequence_id} is in the store already, in {where}")
        tokens = incoming.input_ids(input_ids, [counts.size for _, counts, _ in found], description.vocab_size)
        if self._pending:
            before = next(iter(self._pending.values())).input_ids is not None
            if before != (tokens is not None):
                raise ValueError(f"append: input_ids must {'' if before else 'not '}be given, as in the calls before")
        for place, (sequence_id, (data, counts, width)) in enumerate(zip(ids, found, strict=True)):
            row = None if tokens is None else tokens[place]
            sequence = StoredSequence(sequence_id, data, counts, row, width)
            self._pending[sequence_id] = sequence
            self._pending_bytes += sequence.bytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("a writer belongs to the process that opened it: open one in each process")

    # --- storing -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Completes the current shard. With an error, a full disk say, the sequences stay here and may be flushed again.

        Raises:
            ValueError: another writer has meanwhile stored some of the same sequences. They are left out here, and all
                others have been written.
            OSError: the shard could not be written.
        """
        self._check_process()
        if not self._pending:
            return
        self._look_around()
        stored = sorted(self._pending.keys() & self._stored.keys())
        for sequence_id in stored:
            self._pending_bytes -= self._pending.pop(sequence_id).bytes
        if self._pending:
            self._write_shard()
        # This writer's own shards may hold them if an earlier flush was interrupted at its end.
        twice = [sequence_id for sequence_id in stored if self._name not in self._stored[sequence_id]]
        if twice:
            raise ValueError(
                f"flush: {len(twice)} sequences were stored by another writer too, and its records are kept: "
                f"sequence_ids {', '.join(map(str, twice[:8]))}{', ...' if len(twice) > 8 else ''}"
            )

    def _write_shard(self) -> None:
        file = f"shard-{self._name}-{self._shards:06d}.safetensors"
        self._shards += 1  # a name is never used twice, whatever becomes of the file
        data, checksum = shards.encode(self._described(None), list(self._pending.values()))
        tokens = sum(sequence.counts.size for sequence in self._pending.values())
        try:
            self._files.write(file, data, replace=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}: {len(self._pending)} sequences could not be stored; the store keeps the "
                f"{len(self._stored)} it has",
                self._files.where(file),
            ) from error
        self._remember(manifest.ShardEntry(file, len(data), len(self._pending), tokens, checksum), list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Completes the current shard and lets all shards in the folder join the manifest."""
        if self._closed:
            return
        self._described(None)
        try:
            self.flush()
        finally:
            manifest.join(self._files, self._entry)
        self._closed = True

    def _entry(self, file: str) -> manifest.ShardEntry:
        if file not in self._seen:
            self._look_around()
        return self._seen[file]

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:  # what was appended is complete, whatever went wrong afterwards
            self.close()
        except (OSError, ValueError, RuntimeError) as second:
            warnings.warn(f"the store's writer could not be closed: {second}", RuntimeWarning, stacklevel=2)

"""Opens a store for reading: a dataset over its sequences, in ascending order of their ids."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdkernels.checks import check_flag, check_integer
from kdkernels.sources import PackedLogits, TopKLogits
from kdkernels.store import manifest, records
from kdkernels.store.description import Description, tokenizer_fingerprint
from kdkernels.store.errors import StoreError
from kdkernels.store.files import Bytes, Files, LocalFiles, files_at
from kdkernels.store.shards import Place, Shard, read_index

__all__ = ["StoreDataset", "open_store"]

LARGEST_SEQUENCE = 1 << 28
"""Entries of one sequence once it is unpacked to a rectangle: over 3 GB."""

Item = dict[str, Any]


class StoredTokens(NamedTuple):
    """One sequence, verified and still packed."""

    data: Bytes
    counts: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32] | None


def open_store(
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    ignore_tokenizer: bool = False,
    packed: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> StoreDataset:
    """Opens a store as it is now: every complete shard, whether its writer has finished or was killed.

    Args:
        path: a folder, or a URL that fsspec knows.
        vocab_size: what the student expects; another one in the store is an error.
        tokenizer: the student's tokenizer or its fingerprint; another one in the store, or none, is an error ...
        ignore_tokenizer: ... unless this is True.
        packed: items hold ``PackedLogits`` under "packed" for losses that decode in the kernel, not "topk".
        storage_options: for fsspec.

    Raises:
        FileNotFoundError: there is no store.
        StoreError: a file is damaged or is not what it should be.
        ValueError: the store is sound, but not the one that was asked for.
    """
    files = files_at(path, storage_options)
    found = load_manifest(files)
    description = found.description
    where = files.where(manifest.MANIFEST)
    if vocab_size is not None and check_integer("vocab_size", vocab_size) != description.vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, and {where} has vocab_size {description.vocab_size}")
    if tokenizer is not None and not check_flag("ignore_tokenizer", ignore_tokenizer):
        expected = tokenizer_fingerprint(tokenizer)
        if expected != description.tokenizer:
            raise ValueError(
                f"tokenizer has the fingerprint {expected}, and {where} has tokenizer {description.tokenizer}; "
                f"pass ignore_tokenizer=True if you know that their token ids mean the same"
            )
    return StoreDataset(files, description, load_shards(files, found), check_flag("packed", packed))


def load_manifest(files: Files) -> manifest.Manifest:
    try:
        return manifest.read(files)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{files.where(manifest.MANIFEST)}: there is no such file, so this is no store"
        ) from None


def load_shard(files: Files, file: str, description: Description, entry: manifest.ShardEntry | None) -> Shard:
    """The index of a shard, which must be the one that the manifest lists if it lists it."""
    shard = read_index(files, file, description)
    for name in ("bytes", "sequences", "tokens", "checksum"):
        if entry is not None and getattr(entry, name) != getattr(shard.entry, name):
            raise StoreError(
                shard.where,
                f"{name} is {getattr(shard.entry, name)}, and {manifest.MANIFEST} lists {getattr(entry, name)}",
            )
    return shard


def listed_shards(files: Files, found: manifest.Manifest) -> dict[str, manifest.ShardEntry | None]:
    """All shards, by name: those of the manifest, and those that have not joined it yet."""
    listed: dict[str, manifest.ShardEntry | None] = dict.fromkeys(manifest.shard_names(files))
    listed.update((entry.file, entry) for entry in found.shards)
    return dict(sorted(listed.items()))


def load_shards(files: Files, found: manifest.Manifest) -> list[Shard]:
    listed = listed_shards(files, found)

    def load(file: str) -> Shard:
        return load_shard(files, file, found.description, listed[file])

    if isinstance(files, LocalFiles) or len(listed) < 2:
        return list(map(load, listed))
    with ThreadPoolExecutor(16) as pool:  # each of them waits for the network
        return list(pool.map(load, listed))


class StoreDataset(Dataset[Item]):
    """The sequences of a store, in ascending order of their ids. See ``open_store``.

    ``ds[i]`` is ``{"sequence_id": int, "topk": TopKLogits [tokens, K], "input_ids": Tensor [tokens] or None}``, or with
    ``packed=True`` ``"packed": PackedLogits [tokens]`` instead of "topk". The ids of a token ascend. Every read verifies the
    sequence's checksum. A dataset may be pickled, and used in threads and in forked and spawned processes; it has torch run
    single-threaded in a forked process, where OpenMP would wait for threads that are not there.
    """

    def __init__(self, files: Files, description: Description, found: Sequence[Shard], packed: bool) -> None:
        self.description = description
        self._files = files
        self._packed = packed
        self.shards = list(found)
        sizes = [len(shard.sequence_ids) for shard in self.shards]
        ids = concatenated([shard.sequence_ids for shard in self.shards])
        tokens = concatenated([np.diff(shard.token_ends, prepend=0) for shard in self.shards])
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        self._shard = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._row = concatenated([np.arange(size) for size in sizes])[order]
        self._token_ends = np.cumsum(tokens[order])
        twice = np.flatnonzero(self._ids[1:] == self._ids[:-1])
        if twice.size:
            first, second = (self.shards[self._shard[place]] for place in (twice[0], twice[0] + 1))
            raise StoreError(
                second.where,
                f"index.sequence_ids: sequence {self._ids[twice[0]]} is in {first.file} too; "
                f"kd.store.remove_shard takes one of them out",
            )

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.description.vocab_size

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return int(self._token_ends[-1]) if len(self) else 0

    @property
    def k(self) -> int:
        """The last dimension of the ``TopKLogits`` that this dataset gives."""
        return max((shard.width for shard in self.shards), default=0)

    @property
    def token_ends(self) -> Tensor:
        """int64 ``[len(ds)]``: where each sequence ends in the numbering of ``tokens``."""
        return torch.from_numpy(self._token_ends.copy())

    @property
    def sequence_ids(self) -> Tensor:
        """int64 ``[len(ds)]``."""
        return torch.from_numpy(self._ids.copy())

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items at once, as ``DataLoader`` asks for them: one round trip where the store is remote."""
        places = [self._position(index) for index in indices]
        return [self._item(place, found) for place, found in zip(places, self._load(places), strict=True)]

    def packed(self, index: int) -> PackedLogits:
        """The records ``[tokens]`` of a sequence as they are stored."""
        return self._as_packed(self._load([self._position(index)])[0])

    def tokens(self, start: int, stop: int) -> TopKLogits:
        """The tokens ``start`` to ``stop`` of all sequences, one after another: ``[stop - start, K]``."""
        first, last = check_integer("start", start), check_integer("stop", stop)
        if not 0 <= first <= last <= self.num_tokens:
            raise IndexError(
                f"start and stop must satisfy 0 <= start <= stop <= {self.num_tokens}, got {start} and {stop}"
            )
        begin = int(np.searchsorted(self._token_ends, first, side="right"))
        end = int(np.searchsorted(self._token_ends, last, side="left")) + 1
        places = list(range(begin, end)) if first < last else []
        found = []
        for place, sequence in zip(places, self._load(places), strict=True):
            offset = int(self._token_ends[place - 1]) if place else 0
            found.append(self._cut(sequence, max(0, first - offset), last - offset))
        data = concatenated([sequence.data for sequence in found], np.uint8)
        counts = concatenated([sequence.counts for sequence in found], np.int32)
        try:
            return self._topk(*self._unpack(StoredTokens(data, counts, None), self.k))
        except ValueError:
            for place, sequence in zip(places, found, strict=True):  # which of them?
                self._unpack_sequence(place, sequence)
            raise

    def chunks(self, start: int, stop: int, tokens: int) -> Iterator[TopKLogits]:
        """The sequences ``start`` to ``stop``, read at once, one after another and cut into pieces of so many tokens.

        The last dimension of a piece is the most entries that one of its tokens has.
        """
        found = self._load(range(start, stop))
        data = concatenated([sequence.data for sequence in found], np.uint8)
        counts = concatenated([sequence.counts for sequence in found], np.int32)
        sizes = records.record_sizes(torch.from_numpy(counts), self.vocab_size, self.description.bits).numpy()
        record_ends = np.concatenate([[0], np.cumsum(sizes)])
        for begin in range(0, counts.size, tokens):
            end = min(begin + tokens, counts.size)
            piece = StoredTokens(data[record_ends[begin] : record_ends[end]], counts[begin:end], None)
            yield self._topk(*self._unpack(piece, int(piece.counts.max())))

    def _cut(self, sequence: StoredTokens, start: int, stop: int) -> StoredTokens:
        if start == 0 and stop >= sequence.counts.size:
            return sequence
        sizes = records.record_sizes(torch.from_numpy(sequence.counts), self.vocab_size, self.description.bits).numpy()
        skipped = int(sizes[:start].sum())
        data = sequence.data[skipped : skipped + int(sizes[start:stop].sum())]
        return StoredTokens(data, sequence.counts[start:stop], None)

    def _position(self, index: int) -> int:
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"the store has {len(self)} sequences, and {place} was asked for")
        return place % len(self)

    def _shard_of(self, place: int) -> tuple[Shard, int, Place]:
        shard, row = self.shards[self._shard[place]], int(self._row[place])
        return shard, row, shard.place(row)

    def _load(self, places: Sequence[int]) -> list[StoredTokens]:
        """The bytes of sequences, verified."""
        records.single_thread_after_fork()
        wanted = [self._shard_of(place) for place in places]
        parts = self._files.read([piece for shard, _, place in wanted for piece in shard.ranges(place)])
        return [
            StoredTokens(*shard.sequence(row, place, parts[3 * number : 3 * number + 3], self.description))
            for number, (shard, row, place) in enumerate(wanted)
        ]

    def _item(self, place: int, found: StoredTokens) -> Item:
        input_ids = None if found.input_ids is None else torch.from_numpy(found.input_ids).long()
        item: Item = {"sequence_id": int(self._ids[place])}
        if self._packed:
            return item | {"packed": self._as_packed(found), "input_ids": input_ids}
        return item | {"topk": self._topk(*self._unpack_sequence(place, found)), "input_ids": input_ids}

    def _as_packed(self, found: StoredTokens) -> PackedLogits:
        return PackedLogits(
            torch.from_numpy(found.data),
            torch.from_numpy(found.counts),
            vocab_size=self.vocab_size,
            codec=self.description.codec,
            tail=self.description.tail,
            temperature=self.description.temperature,
        )

    def _unpack(self, found: StoredTokens, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities and log tail mass of tokens; ValueError if their records are malformed."""
        data, counts = torch.from_numpy(found.data), torch.from_numpy(found.counts)
        return records.unpack(data, counts, self.vocab_size, self.description.bits, width)

    def _unpack_sequence(self, place: int, found: StoredTokens) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one sequence, which an error names."""
        if found.counts.size * self.k > LARGEST_SEQUENCE:
            raise ValueError(
                f"{found.counts.size} tokens of {self.k} entries are too many to unpack at once; ds.packed gives the records"
            )
        try:
            return self._unpack(found, self.k)
        except ValueError as error:
            shard, row, _ = self._shard_of(place)
            raise shard.damaged(row, f"records are malformed: {error}") from None

    def _topk(self, ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor) -> TopKLogits:
        return TopKLogits(
            ids,
            log_probs,
            vocab_size=self.vocab_size,
            tail=self.description.tail,
            temperature=self.description.temperature,
            log_tail_mass=log_tail_mass,
        )


def concatenated(parts: Sequence[npt.NDArray[Any]], dtype: type[Any] = np.int64) -> npt.NDArray[Any]:
    """The parts end to end; none make an empty array."""
    return np.concatenate(parts) if parts else np.empty(0, dtype)

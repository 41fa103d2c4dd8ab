"""One shard: a safetensors file with the records of some sequences, in ascending order of their ids.

Tensors, in the order in which they lie in the file (safetensors puts wide types first, then goes by name):

====================  ======  ==========  ======================================================================
index.checksums       int64   sequences   first 8 bytes of the SHA-256 of a sequence's records, counts and input ids
index.record_ends     int64   sequences   where a sequence's records end in ``records``
index.sequence_ids    int64   sequences   ascending
index.token_ends      int64   sequences   where a sequence's tokens end in ``counts`` and ``input_ids``
seal                  int64   4           SHA-256 of all bytes of the file before it: the header and the index
input_ids             int32   tokens      only if the writer was given them
counts                uint8,  tokens      entries of each token, in the narrowest type that serves; only if they
                      uint16              are not all ``k``
records               uint8   bytes       one record after another
====================  ======  ==========  ======================================================================

The seal covers the checksums and they cover the rest, so a sequence is verified without reading the others, and the seal
stands for the whole file. The header's metadata repeat the store's description: a shard explains itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdkernels.store import records
from kdkernels.store.description import Description
from kdkernels.store.errors import StoreError
from kdkernels.store.files import Bytes, Files, Range
from kdkernels.store.manifest import FORMAT, VERSION, ShardEntry, check_format
from kdkernels.store.strict_json import Fields, parse_object

__all__ = ["Part", "Place", "Shard", "StoredSequence", "encode", "read_index", "sequence_checksum"]

Int64s = npt.NDArray[np.int64]

INDEX = ("index.checksums", "index.record_ends", "index.sequence_ids", "index.token_ends")
SEAL = "seal"
LARGEST_HEADER = 1 << 16
FIRST_READ = 1 << 14
"""Enough for the header and, of most shards, the index."""


@dataclass(frozen=True)
class StoredSequence:
    """The records of one sequence on their way into a shard."""

    sequence_id: int
    data: Bytes
    counts: npt.NDArray[np.int32]
    """Per token."""
    input_ids: npt.NDArray[np.int32] | None
    width: int
    """The K that the sequence was given with: a token has at most so many entries."""

    @property
    def bytes(self) -> int:
        """About what it takes in a shard."""
        return self.data.nbytes + self.counts.nbytes + (0 if self.input_ids is None else self.input_ids.nbytes)


class Part(NamedTuple):
    """Where one tensor lies in the file."""

    start: int
    stop: int
    dtype: np.dtype[Any]


class Place(NamedTuple):
    """Where the parts of one sequence lie in a shard's tensors."""

    token_start: int
    token_stop: int
    record_start: int
    record_stop: int


@dataclass(frozen=True)
class Shard:
    """What is known of a shard once its header and index are read."""

    file: str
    where: str
    bytes: int
    width: int
    tokens: int
    checksum: str
    sequence_ids: Int64s
    token_ends: Int64s
    record_ends: Int64s
    checksums: Int64s
    records: Part
    counts: Part | None
    input_ids: Part | None

    @property
    def entry(self) -> ShardEntry:
        return ShardEntry(self.file, self.bytes, len(self.sequence_ids), self.tokens, self.checksum)

    def place(self, row: int) -> Place:
        """Where the sequence number ``row`` of this shard lies."""
        before = row - 1
        return Place(
            int(self.token_ends[before]) if row else 0,
            int(self.token_ends[row]),
            int(self.record_ends[before]) if row else 0,
            int(self.record_ends[row]),
        )

    def ranges(self, place: Place) -> list[Range]:
        """The bytes of a sequence: records, counts, input ids; empty where the shard has none."""
        found = [Range(self.file, self.records.start + place.record_start, self.records.start + place.record_stop)]
        for part in (self.counts, self.input_ids):
            if part is None:
                found.append(Range(self.file, 0, 0))
            else:
                size = part.dtype.itemsize
                found.append(
                    Range(self.file, part.start + size * place.token_start, part.start + size * place.token_stop)
                )
        return found

    def damaged(self, row: int, problem: str) -> StoreError:
        return StoreError(self.where, f"sequence {int(self.sequence_ids[row])}: {problem}")

    def sequence(
        self, row: int, place: Place, parts: Sequence[Bytes], description: Description
    ) -> tuple[Bytes, npt.NDArray[np.int32], npt.NDArray[np.int32] | None]:
        """Records, counts and input ids of a sequence from the bytes of its ``ranges``, which are verified."""
        data, stored_counts, stored_ids = parts
        if sequence_checksum(data, stored_counts, stored_ids) != int(self.checksums[row]):
            raise self.damaged(row, "its checksum does not belong to its bytes: the file is damaged")
        tokens = place.token_stop - place.token_start
        if self.counts is None:
            counts = np.full(tokens, self.width, np.int32)
        else:
            counts = stored_counts.view(self.counts.dtype).astype(np.int32)
            if counts.size and int(counts.max()) > self.width:
                raise self.damaged(row, f"counts name {int(counts.max())} entries, and k is {self.width}")
        if self.counts is not None and record_bytes(counts, description) != data.size:
            raise self.damaged(
                row, f"counts ask for {record_bytes(counts, description)} bytes of records, not {data.size}"
            )
        if self.input_ids is None:
            return data, counts, None
        input_ids = stored_ids.view(self.input_ids.dtype)
        if input_ids.size and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < description.vocab_size:
            raise self.damaged(row, f"input_ids lie outside the vocabulary of {description.vocab_size}")
        return data, counts, input_ids


def sequence_checksum(*parts: Bytes) -> int:
    """Of the bytes of one sequence, as a signed number of 64 bits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def record_bytes(counts: npt.NDArray[np.int32], description: Description) -> int:
    """The size of records with so many entries, all together."""
    return int(records.record_sizes(torch.from_numpy(counts), description.vocab_size, description.bits).sum())


def encode(description: Description, sequences: Sequence[StoredSequence]) -> tuple[bytearray, str]:
    """The file of a shard with at least one sequence, and its checksum."""
    from safetensors.numpy import save

    sequences = sorted(sequences, key=lambda sequence: sequence.sequence_id)
    width = max(sequence.width for sequence in sequences)
    counts = np.concatenate([sequence.counts for sequence in sequences])
    narrow = counts.astype(np.uint8 if width < 1 << 8 else np.uint16)
    if width and bool((counts == width).all()):
        narrow = narrow[:0]
    with_input_ids = sequences[0].input_ids is not None
    tensors: dict[str, npt.NDArray[Any]] = {"records": np.concatenate([sequence.data for sequence in sequences])}
    ids = np.empty(0, np.int32)
    if with_input_ids:
        ids = np.concatenate([part for part in (sequence.input_ids for sequence in sequences) if part is not None])
        tensors["input_ids"] = ids
    if narrow.size:
        tensors["counts"] = narrow
    token_ends = np.cumsum([sequence.counts.size for sequence in sequences], dtype=np.int64)
    record_ends = np.cumsum([sequence.data.size for sequence in sequences], dtype=np.int64)
    checksums = [
        sequence_checksum(
            sequence.data,
            narrow[start:stop].view(np.uint8),
            ids[start:stop].view(np.uint8),
        )
        for sequence, (start, stop) in zip(sequences, pairwise([0, *token_ends.tolist()]), strict=True)
    ]
    values = (checksums, record_ends, [sequence.sequence_id for sequence in sequences], token_ends)
    tensors |= {name: np.asarray(value, np.int64) for name, value in zip(INDEX, values, strict=True)}
    tensors[SEAL] = np.zeros(4, np.int64)
    metadata = {"format": FORMAT, "version": str(VERSION), "store": description.text(), "k": str(width)}
    file = bytearray(save(tensors, metadata))
    parts = _parts("a new shard", parse_header("a new shard", bytes(file[: LARGEST_HEADER + 8]), len(file)), len(file))
    seal = parts[SEAL]
    digest = hashlib.sha256(memoryview(file)[: seal.start]).digest()
    file[seal.start : seal.stop] = digest
    return file, digest.hex()


def parse_header(where: str, beginning: bytes, size: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the header's JSON. ``beginning`` holds at least the whole header."""
    length = header_length(where, beginning, size)
    return 8 + length, parse_object(where, "the header", beginning[8 : 8 + length])


def header_length(where: str, beginning: bytes, size: int) -> int:
    if len(beginning) < 8:
        raise StoreError(where, f"has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(beginning[:8], "little")
    if length > LARGEST_HEADER or 8 + length > size:
        raise StoreError(
            where,
            f"the header's length, {length}, exceeds the file of {size} bytes or the {LARGEST_HEADER} bytes allowed",
        )
    return length


def _parts(where: str, header: tuple[int, dict[str, Any]], size: int) -> dict[str, Part]:
    """Where the tensors lie: without gaps, in the order above, to the end of the file."""
    start, tensors = header
    dtypes: dict[str, tuple[str, ...]] = dict.fromkeys((*INDEX, SEAL), ("I64",))
    dtypes |= {"input_ids": ("I32",), "counts": ("U8", "U16"), "records": ("U8",)}
    numpy_dtypes = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "|u1"}
    found: dict[str, Part] = {}
    position = 0
    fields = Fields(where, "", {name: value for name, value in tensors.items() if name != "__metadata__"})
    for name, allowed in dtypes.items():
        if name in ("input_ids", "counts") and name not in fields.values:
            continue
        tensor = Fields(where, f"{name}.", fields.take(name))
        dtype = tensor.text("dtype", 16)
        if dtype not in allowed:
            raise tensor.error("dtype", f"must be {' or '.join(allowed)}, not {dtype}")
        kind = np.dtype(numpy_dtypes[dtype])
        shape, offsets = tensor.items("shape"), tensor.items("data_offsets")
        tensor.end()
        if len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] <= size:
            raise tensor.error("shape", f"must be one number of at most the file's {size} bytes, not {shape!r:.80}")
        if offsets != [position, position + shape[0] * kind.itemsize]:
            raise tensor.error(
                "data_offsets", f"must be {[position, position + shape[0] * kind.itemsize]}, not {offsets!r:.80}"
            )
        found[name] = Part(start + offsets[0], start + offsets[1], kind)
        position = offsets[1]
    fields.end()
    if start + position != size:
        raise StoreError(where, f"has {size} bytes, and its header describes {start + position}")
    return found


def _metadata(where: str, given: object, description: Description) -> int:
    """Checks that the header's metadata are those of this store, and returns k."""
    fields = Fields(where, "__metadata__.", given)
    for name in ("version", "k"):
        text = fields.text(name, 16)
        if not (text.isascii() and text.isdigit()):
            raise fields.error(name, f"must be a whole number, not {text!r}")
        fields.values[name] = int(text)
    check_format(fields)
    stored = Fields(
        where, "__metadata__.store.", parse_object(where, "__metadata__.store", fields.text("store", 1 << 15))
    )
    different = Description.read(stored).differences(description)
    stored.end()
    if different:
        raise fields.error("store", f"is not this store's: {', '.join(different)} differ from the manifest")
    width = fields.size("k", description.widest)
    fields.end()
    return width


def _check_ends(where: str, name: str, ends: Int64s) -> int:
    """That positions never go back; the last of them."""
    if int(ends[0]) < 0 or not bool((ends[1:] >= ends[:-1]).all()):
        raise StoreError(where, f"{name} must not be negative or descend")
    return int(ends[-1])


def _check_fixed_sizes(
    where: str, width: int, token_ends: Int64s, record_ends: Int64s, description: Description
) -> None:
    """That without counts every token has a record of ``width`` entries."""
    if width == 0:
        raise StoreError(where, "counts are missing, and k is 0")
    size = record_bytes(np.array([width], np.int32), description)
    # Exact in Python's integers where a hostile file would overflow 64 bits.
    if int(token_ends[-1]) * size != int(record_ends[-1]) or not bool((token_ends * size == record_ends).all()):
        raise StoreError(where, f"counts are missing, and index.record_ends are not index.token_ends times {size}")


def read_index(files: Files, file: str, description: Description) -> Shard:
    """Reads and verifies the header and the index of a shard."""
    where = files.where(file)
    try:
        size = files.size(file)
    except FileNotFoundError:
        raise StoreError(where, "the shard is missing") from None
    beginning = files.read([Range(file, 0, min(size, FIRST_READ))])[0].tobytes()

    def upto(stop: int) -> bytes:
        nonlocal beginning
        if len(beginning) < stop:
            beginning += files.read([Range(file, len(beginning), stop)])[0].tobytes()
        return beginning

    start, tensors = parse_header(where, upto(8 + header_length(where, beginning, size)), size)
    parts = _parts(where, (start, tensors), size)
    seal = parts[SEAL]
    if seal.stop - seal.start != hashlib.sha256().digest_size:
        raise StoreError(where, f"seal.shape must be [4], not [{(seal.stop - seal.start) // 8}]")
    data = upto(seal.stop)
    digest = hashlib.sha256(memoryview(data)[: seal.start]).digest()
    if digest != data[seal.start : seal.stop]:
        raise StoreError(where, "seal does not belong to the header and the index: the file is damaged")
    width = _metadata(where, tensors.get("__metadata__"), description)
    checksums, record_ends, sequence_ids, token_ends = (
        np.frombuffer(data, "<i8", (parts[name].stop - parts[name].start) // 8, parts[name].start) for name in INDEX
    )
    sequences = len(sequence_ids)
    for name in INDEX:
        if parts[name].stop - parts[name].start != 8 * sequences:
            raise StoreError(where, f"{name}.shape must be [{sequences}] like that of index.sequence_ids")
    if sequences == 0:
        raise StoreError(where, "index.sequence_ids.shape must not be [0]: a shard has at least one sequence")
    if not bool((sequence_ids[1:] > sequence_ids[:-1]).all()):
        raise StoreError(where, "index.sequence_ids must ascend, no id twice")
    tokens = _check_ends(where, "index.token_ends", token_ends)
    if _check_ends(where, "index.record_ends", record_ends) != parts["records"].stop - parts["records"].start:
        raise StoreError(where, f"index.record_ends end at {record_ends[-1]}, and records have another size")
    for name in ("counts", "input_ids"):
        part = parts.get(name)
        if part is not None and part.stop - part.start != tokens * part.dtype.itemsize:
            raise StoreError(where, f"{name}.shape must be [{tokens}], one per token")
    if "counts" not in parts:
        _check_fixed_sizes(where, width, token_ends, record_ends, description)
    return Shard(
        file,
        where,
        size,
        width,
        tokens,
        digest.hex(),
        sequence_ids,
        token_ends,
        record_ends,
        checksums,
        parts["records"],
        parts.get("counts"),
        parts.get("input_ids"),
    )

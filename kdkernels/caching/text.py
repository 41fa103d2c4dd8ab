"""Text files as token sequences of one length: documents one after another, a separator after each.

What the teacher reads is one long stream of tokens, cut every ``sequence_length`` tokens; the last sequence is shorter.
Sequence ``i`` is the same in every run and every process, so that its number serves as its id in the store.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdkernels.caching.errors import CachingError

__all__ = ["SUFFIXES", "TokenSequences", "find_files", "read_tokens", "total_bytes"]

JSON_LINES = ".jsonl"
SUFFIXES = (".txt", ".text", ".md", ".rst", JSON_LINES)
"""Of the files that are taken from a folder."""

PIECE_CHARACTERS = 1 << 20
"""A longer document is read and tokenised in pieces that end with a line: memory does not grow with the file."""


class Piece(NamedTuple):
    """Part of a document."""

    text: str
    ends_document: bool
    file_bytes: int
    """How much of the file has been read."""


def find_files(data: Path, pattern: str | None = None) -> list[Path]:
    """The files to read, in the order of their names.

    Args:
        data: a file, of whatever name, or a folder, which is searched with all folders below it.
        pattern: which files of a folder, "*.py" for instance; None: those whose names end as text files' do.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise CachingError(f"--data {data}: there is no such file or folder")
    inside = (path.relative_to(data) for path in data.rglob(pattern or "*"))
    found = [
        path
        for path in inside
        if (data / path).is_file()
        and not any(part.startswith(".") for part in path.parts)
        and (pattern is not None or path.suffix.lower() in SUFFIXES)
    ]
    if not found:
        raise CachingError(f"--data {data}: no file in this folder has a name like {pattern or ', '.join(SUFFIXES)}")
    return [data / path for path in sorted(found, key=lambda path: path.as_posix())]


def read_pieces(file: Path) -> Iterator[Piece]:
    """The documents of a file: its text is one, and in a .jsonl file the "text" of every line is one."""
    try:
        with file.open(encoding="utf-8") as stream:
            read = read_json_lines if file.suffix.lower() == JSON_LINES else read_text
            yield from read(file, stream)
    except UnicodeDecodeError as error:
        raise CachingError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise CachingError(f"{file}: {error.strerror}") from None


def read_text(_: Path, stream: IO[str]) -> Iterator[Piece]:
    text = read_lines(stream)
    while text:
        following = read_lines(stream)
        yield Piece(text, not following, stream.buffer.tell())  # type: ignore[attr-defined]
        text = following


def read_lines(stream: IO[str]) -> str:
    text = stream.read(PIECE_CHARACTERS)
    return text + stream.readline(PIECE_CHARACTERS) if len(text) == PIECE_CHARACTERS else text


def read_json_lines(file: Path, stream: IO[str]) -> Iterator[Piece]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise CachingError(f'{file}: line {number} is not a JSON object with a string "text"')
        yield Piece(text, True, stream.buffer.tell())  # type: ignore[attr-defined]


class TokenSequences:
    """Token ids on disk, cut into sequences.

    Args:
        tokens: int32 ``[tokens]``.
        sequence_length: of every sequence but the last.
        digest: SHA-256 of the tokens.
    """

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.int32]], sequence_length: int, digest: str) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.fingerprint = f"{len(tokens):,} tokens in sequences of {sequence_length:,}, sha256:{digest}"
        """What tells this text, so cut, from any other."""

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.sequence_length)

    def rows(self, sequences: range) -> Tensor:
        """Consecutive sequences of equal length, int64 ``[sequences, tokens]``."""
        start, stop = (place * self.sequence_length for place in (sequences.start, sequences.stop))
        found = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
        return found.view(len(sequences), -1)

    def batches(self, sequences: int) -> list[range]:
        """The text in order, so many sequences at once; a last, shorter one is a batch of its own."""
        whole = len(self.tokens) // self.sequence_length
        found = [range(start, min(start + sequences, whole)) for start in range(0, whole, sequences)]
        return found + [range(whole, len(self))] * (len(self) > whole)


def read_tokens(
    files: list[Path],
    tokenizer: Any,
    *,
    sequence_length: int,
    separator: int,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda file_bytes: None,
) -> TokenSequences:
    """Tokenises the files into a temporary file on disk, which goes away with the result.

    Args:
        tokenizer: a transformers tokenizer; it adds no special tokens of its own here.
        separator: token id that ends every document.
        limit: stop after so many tokens.
        advance: is told how many bytes of text have been read since the last call.
    """
    digest = hashlib.sha256()
    count = 0
    with tempfile.TemporaryFile() as stream:
        for piece, ends_document, read in pieces_of(files):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            block = np.asarray([*ids, separator] if ends_document else ids, np.int32)
            if limit is not None:
                block = block[: limit - count]
            stream.write(block.data)
            digest.update(block.data)
            count += len(block)
            advance(read)
            if count == limit:
                break
        stream.flush()
        if count == 0:
            raise CachingError(f"{files[0]}{' and the other files' * (len(files) > 1)}: there is no text in there")
        tokens = np.memmap(stream, np.int32, "r", shape=(count,))
    return TokenSequences(tokens, sequence_length, digest.hexdigest())


def pieces_of(files: list[Path]) -> Iterator[tuple[str, bool, int]]:
    """The text of all documents that have any, whether it ends one, and the bytes read for it."""
    for file in files:
        before = 0
        for piece in read_pieces(file):
            if piece.text:
                yield piece.text, piece.ends_document, piece.file_bytes - before
            before = piece.file_bytes


def total_bytes(files: list[Path]) -> int:
    return sum(os.path.getsize(file) for file in files)

"""Two tokenizations of one text: the chunks of it that both cover with whole tokens.

Models with different tokenizers can be compared where their tokens begin and end at the same place. From the offsets of both
tokenizations alone, ``align`` finds the finest such chunks, and ``collate`` makes of them tensors for sums over chunks::

    found = [kd.alignment.align(text, s, t) for text, s, t in zip(texts, student_offsets, teacher_offsets)]
    chunks = kd.alignment.collate(found)
    loss = kd.losses.ALM()(student_logits, teacher_logits, student_ids, teacher_ids, chunks)

Offsets are what Hugging Face tokenizers return for ``return_offsets_mapping=True``: characters of the text. Every position is
brought to bytes of its UTF-8 form, so that a tokenizer that counts bytes goes with one that counts characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.checks import check_choice, check_integer

__all__ = [
    "Alignment",
    "Chunks",
    "align",
    "byte_offsets",
    "chunk_sums",
    "collate",
    "common_tokens",
    "first_tokens",
    "last_tokens",
    "merge_chunks",
    "space_tokens",
    "token_bytes",
]

UNITS = ("characters", "bytes")

Offsets = Sequence[Sequence[int] | None]
Span = tuple[int, int]


class Alignment(NamedTuple):
    """The chunks of one text.

    student, teacher: for every token the number of its chunk, -1 where it is in none (special tokens).
    spans: for every chunk its first byte of the text and the one behind its last; the chunks follow one another without
        gaps and cover the text.
    """

    student: list[int]
    teacher: list[int]
    spans: list[Span]

    def token_ranges(self) -> list[tuple[range, range]]:
        """For every chunk the student's and the teacher's tokens, first to last."""
        return list(
            zip(ranges_of(self.student, len(self.spans)), ranges_of(self.teacher, len(self.spans)), strict=True)
        )


class Chunks(NamedTuple):
    """The chunks of a batch of texts.

    student: int64 ``[B, T]``, for every token of the student's the number of its chunk in its text, -1 where it is in none.
    teacher: int64 ``[B, S]``, the same of the teacher's.
    counts: int64 ``[B]``, chunks of each text.
    size: the largest count, at least 1: the width of sums over chunks.
    """

    student: Tensor
    teacher: Tensor
    counts: Tensor
    size: int

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Chunks:
        """On another device."""
        student, teacher, counts = (tensor.to(device, non_blocking=non_blocking) for tensor in self[:3])
        return Chunks(student, teacher, counts, self.size)


def ranges_of(ids: Sequence[int], count: int) -> list[range]:
    first, last = [0] * count, [-1] * count
    for token, chunk in enumerate(ids):
        if chunk >= 0:
            if last[chunk] < 0:
                first[chunk] = token
            last[chunk] = token
    return [range(start, stop + 1) for start, stop in zip(first, last, strict=True)]


def align(
    text: str,
    student_offsets: Offsets,
    teacher_offsets: Offsets,
    *,
    student_unit: str = "characters",
    teacher_unit: str = "characters",
) -> Alignment:
    """The finest chunks of a text that whole tokens of both tokenizations cover.

    A chunk ends wherever both tokenizations have a token boundary at the same byte. What stands between two tokens of one
    side (spaces that its tokenizer drops, or leaves out of the offsets) is in neither of them: there that side's boundary
    can be anywhere, and a chunk ends at the first place the other side allows, so that spaces dropped by both belong to the
    chunk that follows. What stands in front of the first token belongs to the first chunk, what stands behind the last
    token to the last. Tokens that share a character (pieces of one that is several bytes long, seen through character
    offsets) have no boundary between them, unless ``byte_offsets`` is told how long they are.

    Args:
        text: what was tokenized; offsets count its characters.
        student_offsets, teacher_offsets: ``(start, end)`` of every token in the order of the tokens. None and ``(0, 0)`` are
            special tokens, in no chunk. Other tokens may be empty; an end-of-text token that stands at the end of the text
            as an empty one should be None unless both sides have it.
        student_unit, teacher_unit: "characters", or "bytes" for offsets into the text's UTF-8 form (see ``byte_offsets``).

    Returns:
        ``Alignment``; without chunks if either side has no tokens that cover text.

    Raises:
        TypeError, ValueError: the text is no string or holds lone surrogates, or an offset is outside it.
    """
    positions = byte_positions(text)
    sides = []
    for name, offsets, unit in (
        ("student", student_offsets, student_unit),
        ("teacher", teacher_offsets, teacher_unit),
    ):
        in_bytes = check_choice(f"{name}_unit", unit, UNITS) == "bytes"
        checked = check_offsets(f"{name}_offsets", offsets, positions[-1] if in_bytes else len(text))
        sides.append(
            [span if span is None or in_bytes else (positions[span[0]], positions[span[1]]) for span in checked]
        )
    student, teacher = ([token for token, span in enumerate(side) if span is not None] for side in sides)
    found = Alignment([-1] * len(sides[0]), [-1] * len(sides[1]), [])
    if not student or not teacher:
        return found
    ends = common_boundaries(boundaries(sides[0]), boundaries(sides[1]))
    ends.append((len(student), len(teacher), positions[-1]))
    start = (0, 0, 0)
    for chunk, end in enumerate(ends):
        for token in student[start[0] : end[0]]:
            found.student[token] = chunk
        for token in teacher[start[1] : end[1]]:
            found.teacher[token] = chunk
        found.spans.append((start[2], end[2]))
        start = end
    return found


def boundaries(spans: Sequence[Span | None]) -> list[tuple[int, int, int]]:
    """``(tokens in front, earliest, latest)`` of every place between tokens where one chunk may end and the next begin."""
    covering = [span for span in spans if span is not None]
    ends = list(accumulate((end for _, end in covering), max))
    starts = list(accumulate((start for start, _ in reversed(covering)), min))[::-1]
    return [
        (token, ends[token - 1], starts[token]) for token in range(1, len(covering)) if ends[token - 1] <= starts[token]
    ]


def common_boundaries(
    student: Sequence[tuple[int, int, int]], teacher: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """``(student's tokens in front, teacher's, byte)`` of the places where both can part, as many as there are.

    Places of a side are in order of both their ends, so that pairing the first two that overlap never costs a pair.
    """
    found = []
    mine = theirs = 0
    while mine < len(student) and theirs < len(teacher):
        one, other = student[mine], teacher[theirs]
        if one[2] < other[1]:
            mine += 1
        elif other[2] < one[1]:
            theirs += 1
        else:
            found.append((one[0], other[0], max(one[1], other[1])))
            mine, theirs = mine + 1, theirs + 1
    return found


def byte_positions(text: str) -> list[int]:
    """Where in the UTF-8 form each character begins, and at last how long that is."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    if text.isascii():
        return list(range(len(text) + 1))
    try:
        return list(accumulate((len(character.encode()) for character in text), initial=0))
    except UnicodeEncodeError as error:
        raise ValueError(f"text must not hold lone surrogates, which have no UTF-8 form: {error}") from None


def check_offsets(name: str, offsets: Offsets, length: int) -> list[Span | None]:
    """The offsets as pairs of ints, None for special tokens."""
    checked: list[Span | None] = []
    for token, pair in enumerate(offsets):
        if pair is None:
            checked.append(None)
            continue
        try:
            start, end = (int(place) for place in pair)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must hold pairs (start, end) or None; token {token} has {pair!r}") from None
        if not 0 <= start <= end <= length:
            raise ValueError(f"{name} must have 0 <= start <= end <= {length}; token {token} has {(start, end)}")
        checked.append(None if end == 0 else (start, end))
    return checked


def byte_offsets(text: str, offsets: Offsets, lengths: Sequence[int] | None = None) -> list[Span | None]:
    """Byte offsets of tokens from their character offsets.

    Pieces of a character all have that character's offsets. Where it is known how many bytes each token stands for, and the
    lengths of tokens that share characters add up to the bytes they cover together, they are laid out one after the
    other; else every token keeps all the bytes of its characters, which is correct, only coarser.

    Args:
        text: what was tokenized.
        offsets: ``(start, end)`` in characters, None or ``(0, 0)`` for special tokens.
        lengths: bytes of every token, for instance ``[len(each) for each in token_bytes(tokens)]``; None: not known.

    Returns:
        ``(start, end)`` in bytes for every token, None for special tokens.

    Raises:
        TypeError, ValueError: as in ``align``, or ``lengths`` has another number of tokens.
    """
    positions = byte_positions(text)
    characters = check_offsets("offsets", offsets, len(text))
    found: list[Span | None] = [
        None if span is None else (positions[span[0]], positions[span[1]]) for span in characters
    ]
    if lengths is None:
        return found
    if len(lengths) != len(found):
        raise ValueError(f"lengths must have one entry per token, {len(found)}, got {len(lengths)}")
    tokens = [token for token, span in enumerate(found) if span is not None]
    cuts = [0, *(token for token, _, _ in boundaries(found)), len(tokens)]
    for first, last in pairwise(cuts):
        group = tokens[first:last]
        spans = [span for span in (found[token] for token in group) if span is not None]
        if len(group) < 2:
            continue
        start = min(span[0] for span in spans)
        ends = list(accumulate((check_integer("lengths", lengths[token]) for token in group), initial=start))
        if ends[-1] == max(span[1] for span in spans):
            for token, place in zip(group, pairwise(ends), strict=True):
                found[token] = place
    return found


def byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes (Radford et al. 2019): printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + place): byte for place, byte in enumerate(others)},
    }


BYTE_LEVEL = byte_level_alphabet()

KINDS = ("byte_level", "sentencepiece")


def token_bytes(tokens: Sequence[str], kind: str) -> list[bytes]:
    """What tokens as vocabularies write them (``convert_ids_to_tokens``) stand for, before any stripping of spaces.

    Args:
        tokens: entries of a vocabulary.
        kind: "byte_level" (GPT-2 and its heirs, one character per byte; other characters, as in special tokens, stand for
            themselves), or "sentencepiece" (U+2581 for a space, ``<0x0A>`` for a byte).

    Raises:
        TypeError, ValueError: ``kind`` is another.
    """
    if check_choice("kind", kind, KINDS) == "byte_level":
        return [
            b"".join(bytes([BYTE_LEVEL[each]]) if each in BYTE_LEVEL else each.encode() for each in token)
            for token in tokens
        ]
    return [
        bytes([int(token[3:5], 16)])
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        else token.replace("\u2581", " ").encode()
        for token in tokens
    ]


def collate(
    alignments: Sequence[Alignment],
    *,
    student_length: int | None = None,
    teacher_length: int | None = None,
    padding_side: str = "right",
) -> Chunks:
    """The chunks of several texts as tensors, padded with -1.

    Args:
        alignments: one per text, in the order of the batch.
        student_length, teacher_length: tokens per text of the batch, at least those of the longest; None: those.
        padding_side: "right" or "left", where the batch is padded.

    Raises:
        TypeError, ValueError: a length is too short, or there is no text.
    """
    left = check_choice("padding_side", padding_side, ("right", "left")) == "left"
    if not alignments:
        raise ValueError("alignments must hold at least one text, got none")

    def padded(name: str, rows: list[list[int]], length: int | None) -> Tensor:
        longest = max(len(row) for row in rows)
        width = longest if length is None else check_integer(name, length)
        if width < longest:
            raise ValueError(f"{name} must be at least the {longest} tokens of the longest text, got {length}")
        filling = [[-1] * (width - len(row)) for row in rows]
        joined = [fill + row if left else row + fill for row, fill in zip(rows, filling, strict=True)]
        return torch.tensor(joined, dtype=torch.int64).reshape(len(rows), width)

    counts = [len(each.spans) for each in alignments]
    return Chunks(
        padded("student_length", [each.student for each in alignments], student_length),
        padded("teacher_length", [each.teacher for each in alignments], teacher_length),
        torch.tensor(counts, dtype=torch.int64),
        max(1, *counts),
    )


def chunk_sums(values: Tensor, chunk_ids: Tensor, size: int) -> Tensor:
    """Sums over the tokens of each chunk, differentiable.

    Args:
        values: ``[..., T]``, one per token; what stands at tokens in no chunk has no influence, not even NaN.
        chunk_ids: int64 ``[..., T]`` in [-1, size), such as ``Chunks.student``.
        size: chunks per text.

    Returns:
        ``[..., size]`` in the dtype of ``values``.
    """
    outside = chunk_ids < 0
    values = values.masked_fill(outside, 0)
    sums = values.new_zeros(*values.shape[:-1], size + 1)
    return sums.scatter_add(-1, chunk_ids.masked_fill(outside, size), values)[..., :size]


def last_tokens(chunk_ids: Tensor, size: int) -> Tensor:
    """Int64 ``[..., size]``: the place of the last token of each chunk, -1 of a chunk without tokens."""
    return extreme_tokens(chunk_ids, size, -1, "amax")


def first_tokens(chunk_ids: Tensor, size: int) -> Tensor:
    """Int64 ``[..., size]``: the place of the first token of each chunk, -1 of a chunk without tokens."""
    found = extreme_tokens(chunk_ids, size, chunk_ids.shape[-1], "amin")
    return found.masked_fill(found == chunk_ids.shape[-1], -1)


def extreme_tokens(chunk_ids: Tensor, size: int, start: int, reduce: str) -> Tensor:
    places = torch.arange(chunk_ids.shape[-1], device=chunk_ids.device).expand(chunk_ids.shape)
    found = torch.full((*chunk_ids.shape[:-1], size + 1), start, dtype=torch.int64, device=chunk_ids.device)
    return found.scatter_reduce(-1, chunk_ids.masked_fill(chunk_ids < 0, size), places, reduce)[..., :size]


def merge_chunks(chunks: Chunks, kept: Tensor) -> Chunks:
    """Larger chunks: one that is not ``kept`` ends no more, and goes on with the next one of its text.

    Args:
        chunks: of a batch.
        kept: bool ``[B, size]``, which chunks still end where they do. The last of a text does in any case.

    Returns:
        ``Chunks`` of the same ``size``, though there may be fewer.
    """
    ends = kept.long()
    merged = ends.cumsum(-1) - ends  # chunks that end in front of each

    def renumbered(ids: Tensor) -> Tensor:
        return merged.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -1)

    last = merged.gather(-1, (chunks.counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counts = torch.where(chunks.counts > 0, last + 1, 0)
    return Chunks(renumbered(chunks.student), renumbered(chunks.teacher), counts, chunks.size)


def space_tokens(parts: Sequence[bytes], *, also: Sequence[int] = ()) -> Tensor:
    """The ids, int64 ``[K]``, of the tokens that begin with a space, a tab or a newline.

    Args:
        parts: what each id of the vocabulary stands for, for instance from ``token_bytes``.
        also: ids that end a text as well, such as that of the end-of-text token.
    """
    found = [token for token, part in enumerate(parts) if part[:1] in {b" ", b"\t", b"\n"}]
    return torch.tensor(sorted({*found, *also}), dtype=torch.int64)


def common_tokens(student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int]) -> Tensor:
    """Int64 ``[K, 2]``: the student's and the teacher's id of the entries that both vocabularies write alike."""
    pairs = [(mine, teacher_vocab[token]) for token, mine in student_vocab.items() if token in teacher_vocab]
    return torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)

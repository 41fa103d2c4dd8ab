"""Chunks of two tokenizations against a search over all pairs of places, on random texts and tokenizations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from kdkernels import alignment

Span = tuple[int, int]

COMBINING = "e\u0301 \u1112\u1161\u11ab x\u0328\u0301"
HARD = ["🙂🙂", "👩‍👩‍👧", "日本 語", "naïve", COMBINING, " \t\n ", "a", "  ", "𝔘nicode", "\u00a0x\u3000y"]

texts = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.lists(st.sampled_from(HARD), min_size=1, max_size=5).map("".join),
)


def cut(draw: Any, length: int) -> list[Span]:
    """``[0, length)`` in random pieces."""
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=length)) if length > 1 else set()
    return list(pairwise([0, *sorted(inner), length])) if length else []


def characters_of(text: str, span: Span) -> Span:
    """The characters that bytes touch, as byte-level tokenizers report them."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    return owner[span[0]], owner[span[1] - 1] + 1


@st.composite
def tokenizations(draw: Any, text: str) -> list[Span | None]:
    """Character offsets of a random tokenizer: of characters or of bytes, that may drop spaces and add special tokens."""
    if draw(st.booleans()):
        spans = cut(draw, len(text))
    else:
        spans = [characters_of(text, span) for span in cut(draw, len(text.encode()))]
    drops = draw(st.sampled_from(["nothing", "spaces", "leading spaces", "spaces as empty tokens"]))
    found: list[Span | None] = []
    for first, last in spans:
        start, end = first, last
        if drops != "nothing":
            while start < end and text[start].isspace():
                start += 1
        if drops == "spaces":
            while start < end and text[end - 1].isspace():
                end -= 1
        if start < end or (drops == "spaces as empty tokens" and end > 0):
            found.append((start, end))
    for place in sorted(draw(st.sets(st.integers(0, len(found)), max_size=2)), reverse=True):
        found.insert(place, draw(st.sampled_from([None, (0, 0)])))
    return found


@st.composite
def pairs(draw: Any) -> tuple[str, list[Span | None], list[Span | None]]:
    text = draw(texts)
    return text, draw(tokenizations(text)), draw(tokenizations(text))


def in_bytes(text: str, offsets: Sequence[Span | None]) -> dict[int, Span]:
    """The bytes of every token that is none of the special ones."""
    return {
        token: (len(text[: span[0]].encode()), len(text[: span[1]].encode()))
        for token, span in enumerate(offsets)
        if span is not None and span != (0, 0)
    }


def may_part(front: Sequence[Span], behind: Sequence[Span], place: int) -> bool:
    return all(end <= place for _, end in front) and all(start >= place for start, _ in behind)


def most_chunks(text: str, student: Sequence[Span], teacher: Sequence[Span]) -> int:
    """The largest number of chunks, by trying every pair of cuts at every byte."""
    size = len(text.encode())

    def cuts(tokens: Sequence[Span]) -> list[set[int]]:
        return [
            {place for place in range(size + 1) if may_part(tokens[:count], tokens[count:], place)}
            for count in range(1, len(tokens))
        ]

    mine, theirs = cuts(student), cuts(teacher)
    best = [[0] * (len(theirs) + 1) for _ in range(len(mine) + 1)]
    for i in range(len(mine)):
        for j in range(len(theirs)):
            both = best[i][j] + bool(mine[i] & theirs[j])
            best[i + 1][j + 1] = max(both, best[i][j + 1], best[i + 1][j])
    return 1 + best[-1][-1]


@pytest.mark.slow
@settings(max_examples=100)
@given(pairs())
def test_chunks_are_the_finest_that_whole_tokens_cover(pair: tuple[str, list[Span | None], list[Span | None]]) -> None:
    text, student_offsets, teacher_offsets = pair
    found = alignment.align(text, student_offsets, teacher_offsets)
    sides = [in_bytes(text, offsets) for offsets in (student_offsets, teacher_offsets)]
    ids = [found.student, found.teacher]
    assert [len(each) for each in ids] == [len(student_offsets), len(teacher_offsets)]
    if not all(sides):
        assert found.spans == []
        assert set(found.student + found.teacher) <= {-1}
        return
    assert found.spans[0][0] == 0
    assert found.spans[-1][1] == len(text.encode())
    assert all(one[1] == other[0] for one, other in pairwise(found.spans))
    for spans, chunk_of in zip(sides, ids, strict=True):
        assert [chunk >= 0 for chunk in chunk_of] == [token in spans for token in range(len(chunk_of))]
        chunks = [chunk for chunk in chunk_of if chunk >= 0]
        assert chunks == sorted(chunks)
        assert set(chunks) == set(range(len(found.spans)))
        for token, (start, end) in spans.items():
            low, high = found.spans[chunk_of[token]]
            assert low <= start <= end <= high
    assert len(found.spans) == most_chunks(text, list(sides[0].values()), list(sides[1].values()))
    mirrored = alignment.align(text, teacher_offsets, student_offsets)
    assert mirrored == (found.teacher, found.student, found.spans)


@pytest.mark.slow
@given(texts, st.data())
def test_a_tokenization_parts_from_itself_at_every_token(text: str, data: Any) -> None:
    spans = cut(data.draw, len(text))
    found = alignment.align(text, spans, spans)
    assert found.student == found.teacher == list(range(len(spans)))
    assert found.spans == [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]


@given(texts, st.data())
def test_lengths_of_tokens_recover_the_bytes(text: str, data: Any) -> None:
    spans = cut(data.draw, len(text.encode()))
    characters = [characters_of(text, span) for span in spans]
    assert alignment.byte_offsets(text, characters, [end - start for start, end in spans]) == spans
    other = cut(data.draw, len(text.encode()))
    found = alignment.align(text, spans, other, student_unit="bytes", teacher_unit="bytes")
    ends = {end for _, end in spans} & {end for _, end in other}
    assert [end for _, end in found.spans] == sorted(ends)


def test_lengths_that_do_not_add_up_are_not_used() -> None:
    pieces = [(0, 1), (0, 1), (1, 2)]
    assert alignment.byte_offsets("🙂a", pieces, [1, 1, 1]) == [(0, 4), (0, 4), (4, 5)]
    assert alignment.byte_offsets("🙂a", pieces, [1, 3, 1]) == [(0, 1), (1, 4), (4, 5)]
    assert alignment.byte_offsets("🙂a", [None, *pieces, (0, 0)]) == [None, (0, 4), (0, 4), (4, 5), None]


@pytest.mark.parametrize(
    ("student", "teacher", "chunks"),
    [
        ([(0, 2), (3, 5)], [(0, 2), (2, 5)], [(0, 2), (2, 5)]),  # dropped here, in front of the word there
        ([(0, 2), (3, 5)], [(0, 3), (3, 5)], [(0, 3), (3, 5)]),  # behind the word there
        ([(0, 2), (3, 5)], [(0, 2), (2, 3), (3, 5)], [(0, 2), (2, 5)]),  # a token of its own there
        ([(0, 2), (3, 5)], [(0, 2), (3, 5)], [(0, 2), (2, 5)]),  # dropped on both sides: with what follows
        ([(0, 2), (3, 3), (3, 5)], [(0, 2), (2, 3), (3, 5)], [(0, 2), (2, 3), (3, 5)]),  # an empty token stands for it
        ([(0, 5)], [(0, 2), (3, 5)], [(0, 5)]),
        ([(0, 4), (1, 2), (4, 5)], [(0, 2), (2, 3), (3, 4), (4, 5)], [(0, 4), (4, 5)]),  # a token inside another
    ],
)
def test_spaces(student: list[Span], teacher: list[Span], chunks: list[Span]) -> None:
    assert alignment.align("ab cd", student, teacher).spans == chunks
    assert alignment.align("ab cd", teacher, student).spans == chunks


def tokenizer(kind: str, sample: Sequence[str]) -> Tokenizer:
    """A small tokenizer of each family there is."""
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if kind.startswith("byte_level"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        if kind.endswith("trimmed"):
            made.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "byte_fallback":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
        sample = ["the cat sat on the mat"]
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="[UNK]", show_progress=False)
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    made.train_from_iterator(sample, trainer)
    if kind == "word_piece":
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return made


FAMILIES = ["byte_level", "byte_level trimmed", "byte_fallback", "unigram", "word_piece"]
SENTENCE = "The naïve 🙂🙂 cat  ate 日本 cafe\u0301\n and sat."


@pytest.fixture(scope="module")
def families() -> dict[str, Tokenizer]:
    return {kind: tokenizer(kind, [SENTENCE, "the cat sat on the mat"]) for kind in FAMILIES}


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
def test_real_tokenizers(families: dict[str, Tokenizer], student: str, teacher: str) -> None:
    offsets = [families[kind].encode(SENTENCE).offsets for kind in (student, teacher)]
    found = alignment.align(SENTENCE, *offsets)
    sides = [list(in_bytes(SENTENCE, each).values()) for each in offsets]
    assert len(found.spans) == most_chunks(SENTENCE, *sides)
    ends = {SENTENCE.encode()[: span[1]].decode().rstrip() for span in found.spans}
    assert {"The naïve 🙂🙂", "The naïve 🙂🙂 cat  ate 日本", SENTENCE} <= ends


@given(texts)
def test_byte_level_tokens_are_as_long_as_they_say(families: dict[str, Tokenizer], text: str) -> None:
    encoded = families["byte_level"].encode(text)
    parts = alignment.token_bytes(encoded.tokens, "byte_level")
    assert b"".join(parts) == text.encode()
    exact = alignment.byte_offsets(text, encoded.offsets, [len(part) for part in parts])
    assert [text.encode()[slice(*span)] for span in exact if span] == parts


def test_sentencepiece_tokens() -> None:
    assert alignment.token_bytes(["▁Hi", "<0xF0>", "▁"], "sentencepiece") == [b" Hi", b"\xf0", b" "]
    with pytest.raises(ValueError, match="kind must be one of byte_level, sentencepiece"):
        alignment.token_bytes([], "wordpiece")


def test_batches() -> None:
    first = alignment.align("ab cd", [None, (0, 2), (2, 5)], [(0, 2), (2, 3), (3, 5), None])
    second = alignment.align("x", [(0, 1)], [(0, 1)])
    assert first.token_ranges() == [(range(1, 2), range(1)), (range(2, 3), range(1, 3))]
    found = alignment.collate([first, second], teacher_length=5)
    assert found.student.tolist() == [[-1, 0, 1], [0, -1, -1]]
    assert found.teacher.tolist() == [[0, 1, 1, -1, -1], [0, -1, -1, -1, -1]]
    assert (found.counts.tolist(), found.size) == ([2, 1], 2)
    left = alignment.collate([first, second], padding_side="left")
    assert left.student.tolist() == [[-1, 0, 1], [-1, -1, 0]]
    assert torch.equal(left.to("cpu").student, left.student)
    with pytest.raises(ValueError, match="student_length must be at least the 3 tokens of the longest text, got 2"):
        alignment.collate([first], student_length=2)
    with pytest.raises(ValueError, match="at least one text"):
        alignment.collate([])


def test_sums_over_chunks() -> None:
    ids = torch.tensor([[0, 0, -1, 1], [0, -1, -1, -1]])
    values = torch.tensor([[1.0, 2.0, torch.nan, 4.0], [5.0, torch.inf, 7.0, torch.nan]], requires_grad=True)
    sums = alignment.chunk_sums(values, ids, 3)
    assert sums.tolist() == [[3, 4, 0], [5, 0, 0]]
    sums.backward(torch.tensor([[2.0, 3.0, 9.0], [4.0, 9.0, 9.0]]))
    assert values.grad is not None
    assert values.grad.tolist() == [[2, 2, 0, 3], [4, 0, 0, 0]]
    assert alignment.last_tokens(ids, 3).tolist() == [[1, 3, -1], [0, -1, -1]]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 3)], r"student_offsets must have 0 <= start <= end <= 2; token 0 has \(0, 3\)"),
        ([(0, 1), (2, 1)], "token 1 has"),
        ([(-1, 1)], "token 0 has"),
    ],
)
def test_offsets_outside_the_text(offsets: list[Span], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alignment.align("ab", offsets, [(0, 2)])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"student_offsets must hold pairs \(start, end\) or None; token 0 has 7"):
        alignment.align("ab", [7], [(0, 2)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        alignment.align(b"ab", [], [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lone surrogates"):
        alignment.align("a\ud800", [(0, 2)], [(0, 2)])
    with pytest.raises(ValueError, match="teacher_unit must be one of characters, bytes, got 'words'"):
        alignment.align("ab", [], [], teacher_unit="words")
    with pytest.raises(ValueError, match="lengths must have one entry per token, 1, got 2"):
        alignment.byte_offsets("ab", [(0, 2)], [1, 1])

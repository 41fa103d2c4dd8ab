"""A second real vocabulary: Mistral's SentencePiece tokenizer of 32,768 pieces, from the PyPI package ``mistral-common``.

It cuts text otherwise than SmolLM2's byte-level BPE does: spaces lead their words as ``▁``, and a character that is no
piece becomes one piece for each of its bytes. Only the package's data file is used, never its code.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from smollm2 import MissingRequirementError

PACKAGE = "mistral_common"
FILE = "mistral_instruct_tokenizer_240323.model.v3"
NAME = "Mistral v3 (SentencePiece, 32,768 pieces)"
SPACE = "▁"


def find_file() -> Path:
    """The tokenizer's file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(folder) / "data" / FILE
        if file.exists():
            return file
    raise MissingRequirementError(
        "the student's tokenizer is missing; install it: pip install --no-deps mistral-common"
    )


@dataclass(frozen=True)
class Tokens:
    """A text in tokens: ``ids``, and the bytes of UTF-8 that each stands for, as (start, end)."""

    ids: list[int]
    spans: list[tuple[int, int]]


class MistralTokenizer:
    """Text to token ids and back to bytes."""

    def __init__(self) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingRequirementError("sentencepiece is missing; install it: pip install sentencepiece") from error
        self.pieces = SentencePieceProcessor(model_file=str(find_file()))
        self.document_end = self.pieces.eos_id()

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def piece_bytes(self, token: int) -> bytes:
        """What the token adds to the text; nothing for a control token."""
        if self.pieces.is_control(token) or self.pieces.is_unknown(token):
            return b""
        piece = self.pieces.id_to_piece(token)
        return bytes([int(piece[1:-1], 16)]) if self.pieces.is_byte(token) else piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> Tokens:
        """SentencePiece puts a space before the text, which is part of the first token but of no byte."""
        ids, spans, position = self.pieces.encode(text), [], -1
        for token in ids:
            end = position + len(self.piece_bytes(token))
            spans.append((max(position, 0), end))
            position = end
        if position != len(text.encode()):
            raise ValueError("the pieces do not spell the text: it holds what this tokenizer normalises")
        return Tokens(ids, spans)


def revocabulate(student: torch.nn.Module, tokenizer: MistralTokenizer, spell: Sequence[list[int]]) -> torch.nn.Module:
    """A copy of ``student`` for another vocabulary.

    The embedding of a new token is the mean of those of the old tokens that spell it; ``spell`` lists them by new token.
    Tokens that spell nothing get the mean of all. The head shares the embedding, as the student's does.
    """
    old = student.get_input_embeddings().weight.detach()
    rows = [old[torch.tensor(ids)].mean(0) if ids else old.mean(0) for ids in spell]
    new = copy.deepcopy(student)
    new.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        new.get_input_embeddings().weight.copy_(torch.stack(rows))
    new.tie_weights()
    return new


def spellings(tokenizer: MistralTokenizer, teacher_tokenizer: object) -> list[list[int]]:
    """By token of the new vocabulary, the teacher's tokens for the same text."""
    texts = [tokenizer.piece_bytes(token).decode(errors="replace") for token in range(len(tokenizer))]
    return teacher_tokenizer(texts, add_special_tokens=False)["input_ids"]

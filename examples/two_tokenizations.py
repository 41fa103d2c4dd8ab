"""Passages of text in the tokens of two tokenizers, in batches, with the chunks that both cover."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mistral_vocabulary import MistralTokenizer
from smollm2 import DOCUMENT_END
from torch import Tensor

import kdkernels as kd

IGNORED = -100


@dataclass(frozen=True)
class Passage:
    """Token ids of both sides, each after a start token, and what aligns them."""

    bytes: int
    student: list[int]
    teacher: list[int]
    alignment: kd.alignment.Alignment


@dataclass(frozen=True)
class Batch:
    """Passages side by side, padded.

    ids and labels are int64 ``[passages, length]``; the labels are the ids, with ``IGNORED`` at the start token and the
    padding. ``chunks`` number the tokens.
    """

    bytes: int
    student_ids: Tensor
    teacher_ids: Tensor
    student_labels: Tensor
    teacher_labels: Tensor
    chunks: kd.alignment.Chunks

    @property
    def student_tokens(self) -> int:
        return int((self.student_labels != IGNORED).sum())


def cut_passages(documents: Iterable[str], size: int) -> Iterator[str]:
    """Runs of whole lines of at least ``size`` bytes, but for the last of a document."""
    for text in documents:
        passage = ""
        for line in re.findall(r".*\n?", text):
            passage += line
            if len(passage.encode()) >= size:
                yield passage
                passage = ""
        if passage.strip():
            yield passage


class Tokenizers:
    """The teacher's and the student's, for the same passages."""

    def __init__(self, teacher: object, student: MistralTokenizer) -> None:
        self.teacher, self.student = teacher, student

    def passage(self, text: str) -> Passage:
        encoded = self.teacher(text, return_offsets_mapping=True, add_special_tokens=False)
        own = self.student.encode(text)
        alignment = kd.alignment.align(
            text,
            [None, *own.spans],
            [None, *encoded["offset_mapping"]],
            student_unit="bytes",
        )
        student = [self.student.document_end, *own.ids]
        teacher = [DOCUMENT_END, *encoded["input_ids"]]
        return Passage(len(text.encode()), student, teacher, alignment)


def predicted(labels: Tensor) -> Tensor:
    """The label that each position predicts: that of the next one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def pad(rows: Sequence[list[int]], filling: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filling)


def collate(passages: Sequence[Passage]) -> Batch:
    """Causal models read the padding only behind the text, where nothing is predicted."""
    ids = {side: [getattr(each, side) for each in passages] for side in ("student", "teacher")}
    labels = {side: [[IGNORED, *row[1:]] for row in rows] for side, rows in ids.items()}
    return Batch(
        sum(each.bytes for each in passages),
        *(pad(rows, 0) for rows in ids.values()),
        *(pad(rows, IGNORED) for rows in labels.values()),
        kd.alignment.collate([each.alignment for each in passages]),
    )


def shuffled(passages: Sequence[Passage], count: int, seed: int) -> Iterator[Batch]:
    """Endless batches of ``count`` passages, every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < count:
            order += torch.randperm(len(passages), generator=generator).tolist()
        yield collate([passages[place] for place in order[:count]])
        order = order[count:]


def in_batches(passages: Sequence[Passage], count: int) -> list[Batch]:
    return [collate(passages[start : start + count]) for start in range(0, len(passages), count)]

"""Awkward inputs for the kernels: vocabularies of odd sizes, masked columns and rows, temperatures, labels, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence, OneParameter
from kdkernels.sources import DenseTeacher, Source, SparseTeacher

__all__ = ["Case", "Inputs", "head_cases", "logit_cases"]

IGNORE_INDEX = -100
HIDDEN = {"student": 24, "teacher": 40}
TOP = 16
"""Ids per token that are picked, or that a truncated teacher names."""
TINY_BUDGET = 1
"""Bytes for the logits of a head: far too few, so that every token is a chunk of its own."""


class Inputs(NamedTuple):
    """The arguments of one call."""

    leaves: dict[str, Tensor]
    """What gradients are wanted of, by name."""
    polluted: dict[str, Tensor]
    """The same, but with NaN at the tokens that do not count."""
    sources: Callable[[dict[str, Tensor]], tuple[Source, DenseTeacher | SparseTeacher]]
    """Student and teacher, made from such leaves."""
    options: dict[str, Any]
    """Keyword arguments of ``distillation_loss``, as far as ``token_statistics`` has them too."""
    loss_options: dict[str, Any]
    """The others."""
    upstream: Tensor
    """Gradients that are sent to the losses of the single tokens."""
    shares: Tensor | None = None
    """Per token, in the place of a divergence's parameter."""
    decoupled: bool = False
    """The labels' entries stand apart."""

    def adapted(self, divergence: Divergence) -> Divergence:
        """The divergence with what these inputs change of it."""
        if self.shares is not None and isinstance(divergence, OneParameter):
            divergence = divergence.with_parameters(self.shares)
        return kd.Decoupled(divergence, target_weight=0.7) if self.decoupled else divergence


@dataclass(frozen=True)
class Case:
    """One kind of awkwardness. The tokens stand in a batch of the shape ``[2, rows / 2]``."""

    name: str
    vocab: int
    rows: int = 6
    spread: float = 2.0
    """Standard deviation of the logits."""
    term_size: float = 0.0
    """Size of the terms that cancel in the gradient, where it is larger than the gradient: errors are measured by it."""
    masked_columns: bool = False
    """A third of the vocabulary is -inf in both."""
    masked_rows: bool = False
    """Some tokens do not count and hold NaN."""
    temperature: float = 1.0
    teacher_temperature: float | None = None
    per_token: bool = False
    """Temperatures, weights and the parameters of divergences are tensors."""
    labels: bool = False
    decoupled: bool = False
    """The labels' entries stand apart."""
    padded: bool = False
    """Both vocabularies are padded, each to its own size, and ``vocab_size`` cuts them."""
    teacher_dtype: torch.dtype | None = None
    bias: bool = False
    softcap: float | None = None
    logit_scale: float | None = None
    many_chunks: bool = False
    no_logits: bool = False
    """The memory budget is 0: where a backend has kernels that never write the logits of heads, it takes them."""

    @property
    def pickable(self) -> bool:
        """Whether the functions that pick ids, which know only one source and one temperature, have such a case."""
        return not (self.per_token or self.masked_rows or self.labels or self.teacher_dtype)

    @property
    def pairable(self) -> bool:
        """Whether the functions of all pairs of tokens, in which every token counts, have such a case."""
        return not (self.per_token or self.masked_rows or self.labels)

    @property
    def deviating(self) -> bool:
        """Whether the rows have a standard deviation, and it alone is asked for."""
        return self.pickable and not (self.masked_columns or self.temperature != 1)

    def logits(self, dtype: torch.dtype, device: str) -> Inputs:
        """Both sides are logits, the teacher's of ``teacher_dtype`` if there is one."""
        random = Random(self, device)
        leaves = {}
        for name, padding in (("student", 3), ("teacher", 8)):
            logits = random.normal(self.vocab + padding if self.padded else self.vocab, self.spread)
            if self.masked_columns:
                logits[..., 1 : self.vocab : 3] = -torch.inf
            leaves[name] = logits.to(self.teacher_dtype if name == "teacher" and self.teacher_dtype else dtype)

        def sources(leaves: dict[str, Tensor]) -> tuple[Source, Source]:
            return leaves["student"], leaves["teacher"]

        return self.inputs(random, leaves, sources)

    def truncated(self, dtype: torch.dtype, device: str) -> Inputs:
        """The student is logits, of the teacher's only the largest are known. Those are data, the same in every dtype."""
        both = self.logits(dtype, device)
        student, teacher = both.leaves["student"], both.leaves["teacher"].float()
        stored = kd.reference.topk_logits(teacher, min(TOP, self.vocab), vocab_size=self.vocab)

        def sources(leaves: dict[str, Tensor]) -> tuple[Source, SparseTeacher]:
            return leaves["student"], stored

        return both._replace(
            leaves={"student": student},
            polluted={"student": both.polluted["student"]},
            sources=sources,
            options=both.options | {"teacher_temperature": stored.temperature},
        )

    def mixed(self, dtype: torch.dtype, device: str) -> Inputs:
        """Both sides are logits, the teacher's mixed with the student's and clipped, in either space. It is data, like those."""
        both = self.logits(dtype, device)
        student, teacher = both.leaves["student"], both.leaves["teacher"]
        of_logits = self.temperature == 1

        def sources(leaves: dict[str, Tensor]) -> tuple[Source, DenseTeacher]:
            mixture = kd.LogitMixture(
                [teacher, leaves["student"]],
                [0.75, 0.25],
                space="logits" if of_logits else "probabilities",
                lower=-4 * self.spread if of_logits else None,
            )
            return leaves["student"], mixture

        return both._replace(
            leaves={"student": student}, polluted={"student": both.polluted["student"]}, sources=sources
        )

    def heads(self, dtype: torch.dtype, device: str) -> Inputs:
        """Both sides are language-model heads of different widths."""
        random = Random(self, device)
        leaves = {}
        for name, hidden in HIDDEN.items():
            leaves[f"{name} hidden"] = random.normal(hidden, 1.0)
            leaves[f"{name} weight"] = random.matrix(self.vocab, hidden, self.spread * hidden**-0.5)
            if self.bias:
                leaves[f"{name} bias"] = random.matrix(1, self.vocab, 1.0).squeeze(0)
        leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}

        def sources(leaves: dict[str, Tensor]) -> tuple[Source, Source]:
            student, teacher = (
                kd.LMHead(
                    leaves[f"{name} hidden"],
                    leaves[f"{name} weight"],
                    leaves.get(f"{name} bias"),
                    softcap=self.softcap,
                    logit_scale=self.logit_scale,
                )
                for name in HIDDEN
            )
            return student, teacher

        return self.inputs(random, leaves, sources)

    def inputs(
        self,
        random: Random,
        leaves: dict[str, Tensor],
        sources: Callable[[dict[str, Tensor]], tuple[Source, DenseTeacher | SparseTeacher]],
    ) -> Inputs:
        options: dict[str, Any] = {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature}
        loss_options: dict[str, Any] = {}
        if self.per_token:
            options["temperature"] = random.positive()
            options["teacher_temperature"] = random.positive()
            loss_options["weight"] = random.positive()
            loss_options["temperature_squared"] = True
        if self.masked_rows:
            options["mask"] = random.mask
        if self.labels:
            labels = random.labels(self.vocab)
            options |= {"labels": labels, "ignore_index": IGNORE_INDEX}
            loss_options["ce_weight"] = 0.5
        if self.padded:
            options["vocab_size"] = self.vocab
        shares = (random.positive() - 0.5) / 2 if self.per_token else None
        polluted = self.polluted(leaves, random.mask)
        return Inputs(
            leaves, polluted, sources, options, loss_options, random.positive(), shares, decoupled=self.decoupled
        )

    def polluted(self, leaves: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        if not self.masked_rows:
            return leaves
        elsewhere = ~mask.unsqueeze(-1)
        return {
            name: leaf.masked_fill(elsewhere, torch.nan) if leaf.shape[:-1] == mask.shape else leaf
            for name, leaf in leaves.items()
        }


class Random:
    """The tensors of a case, the same at every call. They are drawn on the CPU, so that every device gets the same."""

    def __init__(self, case: Case, device: str) -> None:
        self.shape = (2, case.rows // 2)
        self.device = device
        self.generator = torch.Generator().manual_seed(case.vocab)
        self.mask = torch.ones(self.shape, dtype=torch.bool)
        self.mask.view(-1)[1::3] = False
        self.mask = self.mask.to(device)

    def matrix(self, rows: int, columns: int, spread: float) -> Tensor:
        return (torch.randn(rows, columns, generator=self.generator) * spread).to(self.device)

    def normal(self, columns: int, spread: float) -> Tensor:
        return self.matrix(self.shape[0] * self.shape[1], columns, spread).view(*self.shape, columns)

    def positive(self) -> Tensor:
        """One number per token, between 0.5 and 2.5."""
        return (torch.rand(self.shape, generator=self.generator) * 2 + 0.5).to(self.device)

    def labels(self, vocab: int) -> Tensor:
        labels = torch.randint(vocab, self.shape, generator=self.generator)
        labels[0, 0] = IGNORE_INDEX
        return labels.to(self.device)


def plain_cases(vocabularies: Sequence[int]) -> list[Case]:
    return [Case(f"V = {vocab}", vocab, rows=6 if vocab < 10_000 else 2) for vocab in vocabularies]


def logit_cases(vocabularies: Sequence[int], odd: int, wide: int) -> list[Case]:
    """Cases where both sides are logits: plain ones of these vocabularies, and each awkwardness at one of two others."""
    return [
        *plain_cases(vocabularies),
        Case("temperatures 2 and 0.7", wide, temperature=2.0, teacher_temperature=0.7),
        Case("temperature and weight per token", odd, per_token=True),
        Case("-inf columns", wide, masked_columns=True),
        Case("masked tokens holding NaN", odd, masked_rows=True),
        Case("labels", wide, labels=True, temperature=1.5),
        Case("labels apart", odd, labels=True, decoupled=True, temperature=1.5, masked_columns=True),
        Case("padded vocabularies", odd, padded=True, masked_columns=True),
        Case("logits of hundreds", wide, spread=200.0, term_size=200.0),
        Case("all at once", odd, masked_columns=True, masked_rows=True, per_token=True, padded=True),
        Case("float32 teacher", odd, teacher_dtype=torch.float32),
    ]


def head_cases(vocabularies: Sequence[int], odd: int) -> list[Case]:
    """Cases where both sides are language-model heads."""
    return [
        *plain_cases(vocabularies),
        Case(
            "bias, logit scale, temperatures", odd, bias=True, logit_scale=0.5, temperature=2.0, teacher_temperature=0.7
        ),
        Case("softcap, labels", odd, softcap=5.0, labels=True),
        Case("masked tokens holding NaN, weights", odd, masked_rows=True, per_token=True),
        Case("one token per chunk", odd, many_chunks=True, bias=True, labels=True),
        Case("no logits in memory", odd, no_logits=True, bias=True, masked_rows=True, labels=True),
    ]

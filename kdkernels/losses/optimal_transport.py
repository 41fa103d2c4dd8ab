"""Losses by optimal transport, between tokens or between the entries of two vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels.checks import check_choice, check_flag, check_real
from kdkernels.functional import sorted_l1
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import (
    IGNORED,
    batch_of,
    check_ids,
    cross_entropy,
    detached,
    mean_over,
    take_tokens,
)
from kdkernels.sources import Source

__all__ = ["ULD"]


@register("uld")
class ULD(nn.Module):
    """Universal logit distillation: the Wasserstein distance between distributions over different vocabularies.

    ``ce_weight CE + weight (1/B) sum_b (1/n_b) sum_{t <= n_b} sum_r |q_(r) - p_(r)|`` with the probabilities of each token
    sorted in descending order and the shorter vocabulary padded with zeros after that. Answers are compared from their
    first token on, position by position: ``n_b`` is the length of the shorter one.

    Source: Boizard et al. 2025 (TMLR; arXiv 2402.12030). Confidence: from the authors' code.

    Args:
        weight: of the distance.
        ce_weight: of the student's cross-entropy, the mean over the labels of the batch.
        temperature, teacher_temperature: of the probabilities; the teacher's defaults to the student's.
        skip_student_eos, skip_teacher_eos: leave out the last token of the student's or teacher's answers, an end-of-text
            token that the other may not have.
        reduction: "sequence", the mean over the tokens of each answer and then over the batch, or "token", one mean over
            the tokens of the batch, as in the code base of ALM.
        error_bound: how much the distance of a token may be off, see ``kd.sorted_l1``.
    """

    def __init__(
        self,
        weight: float = 1.5,
        ce_weight: float = 1.0,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
        reduction: str = "sequence",
        error_bound: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.teacher_temperature = (
            self.temperature
            if teacher_temperature is None
            else check_real("teacher_temperature", teacher_temperature, positive=True)
        )
        self.skip_student_eos = check_flag("skip_student_eos", skip_student_eos)
        self.skip_teacher_eos = check_flag("skip_teacher_eos", skip_teacher_eos)
        self.reduction = check_choice("reduction", reduction, ("sequence", "token"))
        self.error_bound = check_real("error_bound", error_bound)

    def forward(self, student: Source, teacher: Source, student_labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """The loss of a batch, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[B, T, V]`` or ``kd.LMHead`` with hidden states ``[B, T, H]``; what stands at a token predicts
                the next one, as models give it. Nothing is to be shifted.
            teacher: the same of the teacher ``[B, S, ...]`` with its own vocabulary.
            student_labels, teacher_labels: token ids ``[B, T]`` and ``[B, S]``, -100 in front of the answer and behind it.
                The distributions compared are those that predict the answer; without a -100 in front of it, those at its
                tokens, from the first on.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_ids("student_labels", student_labels, batch_of("student", student), "student")
        check_ids("teacher_labels", teacher_labels, batch_of("teacher", teacher), "teacher")
        if student_labels.shape[0] != teacher_labels.shape[0]:
            raise ValueError(
                f"student_labels and teacher_labels must have as many sequences, "
                f"got {student_labels.shape[0]} and {teacher_labels.shape[0]}"
            )
        starts, lengths = answers(student_labels, self.skip_student_eos)
        teacher_starts, teacher_lengths = answers(teacher_labels, self.skip_teacher_eos)
        width = min(student_labels.shape[1], teacher_labels.shape[1])
        steps = torch.arange(width, device=student_labels.device)
        counted = steps < torch.minimum(lengths, teacher_lengths).unsqueeze(-1)

        def answer(source: Source, first: Tensor) -> Source:
            return take_tokens(source, (first.unsqueeze(-1) + steps).masked_fill(~counted, 0))

        values = sorted_l1(
            answer(student, starts),
            answer(detached(teacher), teacher_starts),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=counted,
            error_bound=self.error_bound,
        )
        assert isinstance(values, Tensor)
        if self.reduction == "token":
            distance = mean_over(values, counted)
        else:
            distance = mean_over(values, counted, 1).mean()
        loss = self.weight * distance
        return loss if self.ce_weight == 0 else loss + self.ce_weight * cross_entropy(student, student_labels)


def answers(labels: Tensor, skip_last: bool) -> tuple[Tensor, Tensor]:
    """Where each answer is first predicted, and how many tokens it has: int64 ``[B]`` both."""
    given = labels != IGNORED
    leading = (given.cumsum(-1) == 0).sum(-1)
    lengths = given.sum(-1) - int(skip_last)
    return (leading - 1).clamp(min=0), lengths.clamp(min=0)

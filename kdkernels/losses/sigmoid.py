"""Losses of sigmoids: every class is a yes-or-no question of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels.arguments.rows import side
from kdkernels.checks import check_choice, check_floating, check_integer, check_integral, check_real, is_real
from kdkernels.functional import bernoulli_loss
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import detached
from kdkernels.sources import Source
from kdkernels.targets import SparseTargets

__all__ = ["CED", "DHKD", "MultiAspectKD"]


@register("dhkd")
class DHKD(nn.Module):
    """Dual-head knowledge distillation: the loss of the auxiliary head.

    ``weight T^2 mean_n sum_c BinKL(1/2, sigmoid((s - t) / T))`` (BinaryKL-Norm), which pulls the student's logits to the
    teacher's without a softmax; or with ``form="plain"`` ``BinKL(sigmoid(t / T), sigmoid(s / T))``. The head that the
    cross-entropy trains is another one. The paper's alignment of the two gradients on the backbone is not part of it.

    Source: Yang et al. 2024, Dual-Head Knowledge Distillation. Confidence: from the authors' code, whose clamp at 1e-8 is not
    needed here.

    Args:
        temperature: T.
        weight: alpha; 1 for CIFAR, 0.1 for ImageNet.
        form: "half" as published, or "plain".
        backend: of the kernels, see ``kd.bernoulli_loss``.
    """

    def __init__(
        self, temperature: float = 2.0, *, weight: float = 1.0, form: str = "half", backend: str | None = None
    ) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.weight = check_real("weight", weight)
        self.form = check_choice("form", form, ("half", "plain"))
        self.backend = backend

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits of the auxiliary head ``[..., C]``, or ``kd.LMHead``.
            teacher: logits ``[..., C]``, or ``kd.LMHead``.
            mask: bool ``[...]``, True where a row counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        return self.weight * bernoulli_loss(
            student,
            detached(teacher),
            form="half" if self.form == "half" else "kl",
            temperature=self.temperature,
            temperature_squared=True,
            mask=mask,
            backend=self.backend,
        )


@register("multi_aspect_kd")
class MultiAspectKD(nn.Module):
    """Class logits learn the labels, aspect logits what a multimodal language model answers to questions about the image.

    The student has C + Q outputs. The loss is ``CE(labels) + weight mean_nq BCE(sigmoid(s_q), P_q)``, where ``P_q`` is the
    language model's probability of "yes" to question q, from the logits of its tokens "yes" and "no".

    Source: Lee et al. 2025, Multi-aspect Knowledge Distillation with Large Language Model (arXiv 2501.13341). Confidence: from
    summaries of the paper; its weight was not available.

    Args:
        classes: C.
        weight: of the aspects.
        backend: of the kernels, see ``kd.bernoulli_loss``.
    """

    def __init__(self, classes: int, *, weight: float = 1.0, backend: str | None = None) -> None:
        super().__init__()
        self.classes = check_integer("classes", classes)
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.weight = check_real("weight", weight)
        self.backend = backend

    def forward(self, student: Tensor, aspects: Tensor, labels: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[B, C + Q]``.
            aspects: probabilities of "yes" ``[B, Q]``, in [0, 1].
            labels: classes ``[B]``.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_floating("student", student)
        check_floating("aspects", aspects)
        check_integral("labels", labels)
        shape = (*student.shape[:1], student.shape[-1] - self.classes)
        if student.dim() != 2 or shape[-1] < 1 or aspects.shape != shape:
            raise ValueError(
                f"student and aspects must have the shapes [B, {self.classes} + Q] and [B, Q], got "
                f"{tuple(student.shape)} and {tuple(aspects.shape)}"
            )
        logits = student[:, : self.classes]
        hard = nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.long())
        soft = bernoulli_loss(
            student[:, self.classes :],
            aspects.detach(),
            probabilities=True,
            vocabulary="mean",
            backend=self.backend,
        )
        return hard + self.weight * soft


FILLS = ("last_mean", "zero", "half_least", "random")


@register("ced_topk_bce")
class CED(nn.Module):
    """Consistent ensemble distillation: binary cross-entropy to a stored top-k of scores.

    ``mean_nc BCE(sigmoid(s), b)``, where b holds the stored scores of the k best classes and a fill for all others: in
    "last_mean" ``min_k(scores) / (C - k)``.

    Source: Dinkel et al. 2024 (ICASSP), CED: consistent ensemble distillation for audio tagging. Confidence: from the authors'
    code, which takes the cross-entropy of sigmoid outputs: the same until they saturate.

    Args:
        fill: "last_mean", "zero", "half_least" (half of the smallest stored score), "random" (uniform below it, one number
            per row from torch's generator, where the code draws one per class) or a number in [0, 1], such as 1 / 527.
        backend: of the kernels, see ``kd.bernoulli_loss``.
    """

    def __init__(self, fill: str | float = "last_mean", *, backend: str | None = None) -> None:
        super().__init__()
        self.fill: str | float = check_real("fill", fill) if is_real(fill) else check_choice("fill", fill, FILLS)
        if isinstance(self.fill, float) and not 0 <= self.fill <= 1:
            raise ValueError(f"fill must be one of {', '.join(FILLS)} or a number in [0, 1], got {fill!r}")
        self.backend = backend

    def forward(self, student: Source, ids: Tensor, scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[..., C]``, or ``kd.LMHead``.
            ids: classes ``[..., k]`` of the stored scores.
            scores: ``[..., k]``, in [0, 1].
            mask: bool ``[...]``, True where a row counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_floating("scores", scores)
        _, _, classes = side("student", student, None)
        least = scores.to(torch.promote_types(scores.dtype, torch.float32)).amin(-1)
        fill: float | Tensor
        if isinstance(self.fill, float):
            fill = self.fill
        elif self.fill == "last_mean":
            fill = least / max(1, classes - scores.shape[-1])
        elif self.fill == "half_least":
            fill = least / 2
        elif self.fill == "random":
            fill = least * torch.rand_like(least)
        else:
            fill = torch.zeros_like(least)
        targets = SparseTargets(ids.long(), scores, fill)
        return bernoulli_loss(student, targets, mask=mask, vocabulary="mean", backend=self.backend)

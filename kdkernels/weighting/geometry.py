"""Learnt weights between teacher and label, from where a sample's prediction, teacher and label lie."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels.checks import check_count, check_dense, check_floating

__all__ = ["TrilateralWeights", "class_means"]


def class_means(probabilities: Tensor, labels: Tensor, classes: int | None = None) -> Tensor:
    """``[C, C]``: row y the mean of the teacher's probabilities ``[N, C]`` over the samples of class y (0 if there are none)."""
    check_floating("probabilities", probabilities)
    check_dense("labels", labels, (torch.int64,))
    rows = probabilities.shape[-1] if classes is None else check_count("classes", classes)
    sums = probabilities.new_zeros(rows, probabilities.shape[-1]).index_add(0, labels, probabilities.detach())
    counts = sums.new_zeros(rows).index_add(0, labels, sums.new_ones(len(labels)))
    return sums / counts.clamp(min=1).unsqueeze(-1)


class TrilateralWeights(nn.Module):
    """How much each sample should follow its teacher rather than its label (TGeo-KD).

    ``a = sigmoid(MLP([S, T, G, M, (M - S)^2, (G - S)^2, (T - S)^2, (T - G)^2, (M - G)^2]))`` with the student's and teacher's
    probabilities S and T, the one-hot label G and M the teacher's mean prediction for the class: 9 C inputs. The loss is
    ``mean(a T^2 KL + (1 - a) CE)``, a linear function of the unreduced losses: the gradient to the weights is exact, and
    also through a step of the student (``torch.func`` or ``create_graph``), which is how the paper trains them on
    validation data.

    Source: Hu et al. 2024 (ICLR; arXiv 2312.15112). Confidence: from another implementation, so the sizes and Adam at 0.1
    with a weight decay of 0.05.

    Args:
        classes: C.
        hidden: widths of the hidden layers.
    """

    def __init__(self, classes: int, hidden: Sequence[int] = (32, 16)) -> None:
        super().__init__()
        self.classes = check_count("classes", classes)
        sizes = [9 * self.classes, *(check_count("hidden", size) for size in hidden)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, teacher_means: Tensor) -> Tensor:
        """``[N]``, between 0 and 1, with a gradient to the network alone.

        Args:
            student, teacher: probabilities ``[N, C]``.
            labels: int64 ``[N]``.
            teacher_means: ``[C, C]`` from ``class_means``.
        """
        for name, tensor in (("student", student), ("teacher", teacher)):
            check_floating(name, tensor)
            if tensor.dim() != 2 or tensor.shape[-1] != self.classes or tensor.shape != student.shape:
                raise ValueError(f"{name} must have the shape [N, {self.classes}], got {tuple(tensor.shape)}")
        check_dense("labels", labels, (torch.int64,))
        if labels.shape != student.shape[:1]:
            raise ValueError(f"labels must have the shape [{len(student)}], got {tuple(labels.shape)}")
        check_floating("teacher_means", teacher_means)
        if teacher_means.shape != (self.classes, self.classes):
            raise ValueError(
                f"teacher_means must have the shape [{self.classes}, {self.classes}], got {tuple(teacher_means.shape)}"
            )
        s, t = student.detach(), teacher.detach()
        # Not one_hot, which looks at the labels and so waits for their device.
        g = (torch.arange(self.classes, device=labels.device) == labels.unsqueeze(-1)).to(s.dtype)
        m = teacher_means.detach()[labels]
        edges = [(m - s).square(), (g - s).square(), (t - s).square(), (t - g).square(), (m - g).square()]
        weights: Tensor = self.network(torch.cat([s, t, g, m, *edges], -1)).squeeze(-1).sigmoid()
        return weights

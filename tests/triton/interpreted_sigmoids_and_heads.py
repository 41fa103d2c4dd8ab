"""What the tests of bernoulli, head_mass and row_deviation run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

from typing import Any

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import triton
from kdkernels.reference import row_deviation as reference_deviation


def bernoulli(
    student: Tensor, teacher: Tensor, upstream: Tensor, options: dict[str, Any], backend: str = "triton"
) -> tuple[Tensor, Tensor]:
    """Values ``[N]`` and the gradient to the student."""
    leaf = student.detach().clone().requires_grad_()
    value = kd.bernoulli_loss(leaf, teacher, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), gradient


def head_mass(
    student: Tensor, teacher: Tensor, options: dict[str, Any], backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor]:
    """The thresholds of the teacher, and the gaps of head and tail."""
    own = {name: value for name, value in options.items() if name != "mask"}
    threshold = kd.mass_threshold(teacher, backend=backend, **own)
    return threshold, *kd.head_tail_gap(student, teacher, backend=backend, **options)


def row_deviation(logits: Tensor, gradient: Tensor, least: float, backend: str = "triton") -> tuple[Tensor, ...]:
    """Means and deviations ``[N]``, and what becomes of the gradient ``[N, V]``."""
    module: Any = triton if backend == "triton" else reference_deviation
    means, deviations = module.row_deviation(logits, least)
    gradient = gradient.clone(memory_format=torch.preserve_format)
    module.row_deviation_backward(logits, means, deviations, gradient)
    return means, deviations, gradient


def standardised(student: Tensor, teacher: Tensor, backend: str = "triton") -> tuple[Tensor, ...]:
    """The loss of standardised logits and its gradient, through a gradient whose columns do not lie side by side, too."""
    leaf = student.detach().clone().requires_grad_()
    loss = kd.losses.LogitStd(1.5, backend=backend)(leaf, teacher)
    turned = leaf.mT.contiguous().mT
    other = kd.losses.LogitStd(backend=backend)(turned, teacher)
    (gradient,) = torch.autograd.grad(loss + other, leaf)
    return loss.detach(), other.detach(), gradient

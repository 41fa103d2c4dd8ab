"""What the tests of bernoulli and head_mass run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

from typing import Any

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from torch import Tensor

import kdkernels as kd


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

"""What the tests of relation and angle run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import triton

Sides = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def results(name: str, given: Sequence[Tensor], options: dict[str, Any], backend: str = "triton") -> list[Tensor]:
    """The loss, and its gradients to the tensors that have one."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    loss = getattr(kd, name)(*leaves, backend=backend, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def angle(sides: Sides, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backend's function, in tiles and parts so small that few points are several of them."""
    with mock.patch.multiple("kdkernels.backends.triton.angle", TILE=8, SMALLEST_SPLIT=4):
        return triton.angle(*sides, corners)

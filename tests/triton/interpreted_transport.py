"""What the tests of sinkhorn, pairwise_l1 and sorted_l1 run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from kdkernels.triton_kernels import tiling
from torch import Tensor

import kdkernels as kd

SMALL_TILE = (8, 8)
"""So that a streamed problem is several of them."""


def sinkhorn(
    problem: tuple[Tensor | None, ...],
    upstream: dict[str, Tensor],
    options: dict[str, Any],
    backend: str = "triton",
    streamed: bool = False,
) -> dict[str, Tensor | None]:
    """Results, and the gradients of the sum of ``upstream`` times the results it names to (cost, a, b)."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in problem]
    cost = leaves[0]
    assert cost is not None
    nowhere = dict.fromkeys(tiling.ON_CHIP, 0) if streamed else tiling.ON_CHIP
    solver = dict.fromkeys(tiling.MATRIX_ON_CHIP, 0) if streamed else tiling.MATRIX_ON_CHIP
    with (
        warnings.catch_warnings(),
        mock.patch.multiple(tiling, ON_CHIP=nowhere, MATRIX_ON_CHIP=solver, STREAMED_TILE=SMALL_TILE),
    ):
        warnings.simplefilter("ignore")  # that it has not converged
        result = kd.sinkhorn(cost, *leaves[1:], backend=backend, **options)
        found = {name: getattr(result, name) for name in ("distance", "value", "f", "g", "marginal_error")}
        found["plan"] = result.plan()
        terms = [(found[name] * weight.to(found[name].dtype)).sum() for name, weight in upstream.items()]
        if terms:
            torch.stack(terms).sum().backward()
    gradients = {
        f"grad_{name}": None if leaf is None else leaf.grad
        for name, leaf in zip(("cost", "a", "b"), leaves, strict=True)
    }
    return {name: each.detach() for name, each in found.items()} | gradients | {"iterations": result.iterations}


def complaint(function: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a public function says of arguments that it refuses."""
    try:
        getattr(kd, function)(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


def rows(
    function: str,
    sources: tuple[Tensor, ...],
    upstream: Tensor | None,
    options: dict[str, Any],
    backend: str = "triton",
) -> tuple[Tensor, ...]:
    """A public function of two sources of logits, and its gradients."""
    leaves = [source.detach().clone().requires_grad_(upstream is not None) for source in sources]
    value = getattr(kd, function)(*leaves, backend=backend, **options)
    if upstream is None:
        return (value,)
    value.backward(upstream.to(value.dtype))
    return (value.detach(), *(leaf.grad for leaf in leaves))


def head_rows(
    function: str, heads: tuple[dict[str, Any], ...], upstream: Tensor, options: dict[str, Any], backend: str = "triton"
) -> tuple[Tensor, ...]:
    """The same for two language-model heads: the value, and the gradients to all tensors of both."""
    tensors = [
        {
            name: each.detach().clone().requires_grad_() if isinstance(each, Tensor) else each
            for name, each in head.items()
        }
        for head in heads
    ]
    value = getattr(kd, function)(*(kd.LMHead(**head) for head in tensors), backend=backend, **options)
    value.backward(upstream.to(value.dtype))
    leaves = [each for head in tensors for each in head.values() if isinstance(each, Tensor)]
    return (value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))

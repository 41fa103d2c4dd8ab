"""What the tests of losses share: students and teachers as logits and heads, and the comparison with a plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kdkernels as kd

TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Relative to the loss, and to the largest entry of each gradient."""

HEAD = {"softcap": 7.0, "logit_scale": 0.8}

each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
each_kind = pytest.mark.parametrize("kind", ["logits", "head"])
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(None, id="default"), pytest.param("reference", marks=pytest.mark.slow)]
)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def copy(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf of its own."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


class Model(NamedTuple):
    """The leaves of a source, in float64."""

    leaves: list[Tensor]

    @classmethod
    def make(cls, kind: str, batch: tuple[int, ...], vocab: int, seed: int) -> Model:
        if kind == "logits":
            return cls([2 * noise(*batch, vocab, seed=seed)])
        return cls([noise(*batch, 5, seed=seed), noise(vocab, 5, seed=seed + 1), noise(vocab, seed=seed + 2)])

    def to(self, dtype: torch.dtype) -> Model:
        return Model([copy(leaf, dtype) for leaf in self.leaves])

    def source(self) -> Any:
        return self.leaves[0] if len(self.leaves) == 1 else kd.LMHead(*self.leaves, **HEAD)

    def logits(self) -> Tensor:
        if len(self.leaves) == 1:
            return self.leaves[0]
        hidden, weight, bias = self.leaves
        softcap = HEAD["softcap"]
        return softcap * torch.tanh(HEAD["logit_scale"] * (hidden @ weight.T + bias) / softcap)


def compare(
    ours: Callable[[Any, Any], Tensor],
    plain: Callable[[Tensor, Tensor], Tensor],
    student: Model,
    teacher: Model,
    dtype: torch.dtype,
) -> None:
    """The loss of the sources and its gradient to the student, against the formula on logits in float64."""
    mine, other = student.to(dtype), teacher.to(dtype)
    loss = ours(mine.source(), other.source())
    assert loss.dim() == 0
    assert loss.dtype == dtype
    loss.backward()
    assert all(leaf.grad is None for leaf in other.leaves)
    true = student.to(torch.float64)
    expected = plain(true.logits(), teacher.logits())
    expected.backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for found, right in zip(mine.leaves, true.leaves, strict=True):
        assert found.grad is not None
        assert right.grad is not None
        size = float(right.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=0, atol=tolerance * size)

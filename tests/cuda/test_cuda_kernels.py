"""Every CUDA kernel, run on the host, over the inputs on which `kdkernels check` holds backends against the truth.

The verdict is that of the command: per row, an error no larger than that of plain PyTorch in the same dtype, plus a little
that is measured in the size of what is computed, so that a gradient of zeros fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as there
import pytest
import torch

import kdkernels as kd
from kdkernels.divergences import Divergence
from kdkernels.validation.comparison import Target, make_plan

DIVERGENCES: list[Divergence] = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.Jeffreys(0.3),
    kd.JSD(0.3),
    kd.SkewForwardKL(0.1),
    kd.SkewReverseKL(0.2),
    kd.TVD(),
    kd.AlphaDivergence(0.3),
    kd.Renyi(0.6),
    kd.ABDivergence(0.4, 0.7),
    kd.SoftCrossEntropy(),
]

Emulated = Callable[..., Any]


def name(target: Target) -> str:
    divergence = "" if target.divergence is None else repr(target.divergence)
    return f"{target.operation} {divergence} {str(target.dtype).removeprefix('torch.')}".replace("  ", " ")


OF_ROWS = ("divergence", "sparse_divergence", "token_statistics", "topk_logits", "pairwise_l1")
"""The operations that convert what they read, each in its own way."""

EVERYTHING = make_plan(["cuda"], DIVERGENCES, [torch.float32], quick=True)
OTHER_DTYPES = [
    target
    for dtype, operations in (
        (torch.bfloat16, OF_ROWS),
        (torch.float16, ("divergence",)),
        (torch.float64, OF_ROWS),  # of transport, test_cuda_sinkhorn is in float64
    )
    for target in make_plan(["cuda"], [kd.JSD(0.3)], [dtype], quick=True, operations=operations)
]
OTHER_DTYPES += make_plan(["cuda"], [kd.ForwardKL()], [torch.bfloat16], quick=True, operations=["linear_divergence"])


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERYTHING + OTHER_DTYPES, ids=name)
def test_kernels_are_right(target: Target, emulated: Emulated) -> None:
    found = emulated(there.findings, target)
    assert found
    wrong = [one for one in found if not one.passed]
    assert not wrong, "\n".join(str(one) for one in wrong)

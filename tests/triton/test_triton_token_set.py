"""The Triton kernel of the family token_set: in the interpreter against the reference in float64, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accuracy
import aot_transport
import interpreted_transport
import pytest
import torch
from aot import ITEMSIZE, TARGETS
from aot_transport import Case
from kdkernels.triton_kernels.tiling import choose_tiling
from torch import Tensor

pytestmark = pytest.mark.slow

Worker = Callable[..., Any]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("columns", [37, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows(interpreter: Worker, dtype: torch.dtype, columns: int) -> None:
    logits = (3 * noise(6, columns + 3, seed=0)).to(dtype)[:, :columns]
    members = torch.arange(columns) % 3 == 1
    logits[1, ::5] = -math.inf
    logits[2, ~members] += 300  # the set is unlikely altogether
    logits[3, ~members] = -math.inf  # it is all there is
    logits[4] = math.nan
    upstream = torch.linspace(-1.5, 2.0, 6)
    mask = torch.arange(6) != 4
    options = {"token_set": members, "temperature": torch.linspace(0.6, 2.0, 6), "mask": mask}
    call, name = interpreted_transport.rows, "token_set_log_probs"
    found = interpreter(call, name, (logits,), upstream, options)
    plain = call(name, (logits,), upstream, options, "reference")
    truth = call(name, (logits.double(),), upstream, options, "reference")
    accuracy.check("value", found[0], plain[0], truth[0], truth[0].abs() + 10)
    terms = (upstream.double().abs() / options["temperature"]).unsqueeze(-1).expand(logits.shape)
    kept = mask & (torch.arange(6) != 3)  # whose gradient is 0, from terms of this size
    assert bool(truth[1][kept].abs().amax(-1).gt(0.01).all())
    accuracy.check("gradient", found[1], plain[1], truth[1], truth[1].abs() + 0.01 * terms)
    assert not bool(found[1][4].any())


def test_heads(interpreter: Worker) -> None:
    head = {
        "hidden": noise(5, 7, seed=1).float(),
        "weight": noise(37, 7, seed=2).float(),
        "bias": noise(37, seed=3).float(),
    }
    options = {"token_set": torch.tensor([1, 5, 30]), "memory_budget": 300}
    upstream = torch.linspace(-1.0, 2.0, 5)
    capped = {"softcap": 4.0, "logit_scale": 0.8}
    call, name = interpreted_transport.head_rows, "token_set_log_probs"
    found = interpreter(call, name, (head | capped,), upstream, options)
    double = {key: each.double() for key, each in head.items()}
    truth = call(name, (double | capped,), upstream, {"token_set": options["token_set"]}, "reference")
    assert len(found) == len(truth) == 4
    for ours, right in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-5 * float(right.abs().max()))


def case(target: str, dtype: str, *, cap: bool, aligned: bool = True) -> Case:
    tiling = choose_tiling(151_936, ITEMSIZE[dtype], aligned, TARGETS[target][2])
    constants = {"HAS_CAP": cap, "UNROLL": tiling.unroll, "LANES": tiling.lanes, "WIDTH": tiling.width}
    return Case("token_set", target, dtype, tuple(constants.items()), tiling.num_warps, (), "token_set")


CASES = [case("sm_90", "fp32", cap=True, aligned=False), case("gfx942", "bf16", cap=True)]
"""Beside those that the record of the GPU kernels holds."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


def test_sizes_and_hyperparameters_never_recompile(compiler: Worker) -> None:
    assert len(set(compiler(aot_transport.specialisations, "token_set", "token_set"))) == 1

"""The Triton kernels of the family topk: in the interpreter against the reference in float64, and compiled for every target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import aot_topk
import pytest
import torch
from aot import TARGETS
from aot_topk import Case
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import triton as backend
from kdkernels.backends.rows import Tempering

pytestmark = pytest.mark.slow

Worker = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rows(vocab: int, dtype: torch.dtype) -> Tensor:
    """Ordinary logits, equal ones, a far-off tail, masked entries, nothing but them, and NaN."""
    logits = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1] = torch.where(torch.arange(vocab) % 2 == 0, -0.0, 0.0)
    logits[2, vocab // 2 :] -= 2e4
    logits[3, : vocab // 2] = -math.inf
    logits[4] = -math.inf
    logits[5, vocab - 1] = math.nan
    return logits.to(dtype)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=4 * eps, atol=32 * eps, equal_nan=True)


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (127, 5), (127, 127), (1100, 20)])
@each_dtype
def test_topk(interpreter: Worker, dtype: torch.dtype, vocab: int, k: int) -> None:
    logits, softcap = rows(vocab, dtype), 0.0
    source: Any = logits.double()
    if k == 20:
        logits, softcap = logits[:3], 2.0  # the matrix product of a head would spread NaN and infinity
        source = kd.LMHead(logits.double(), torch.eye(vocab, dtype=torch.float64), softcap=softcap)
    ids, log_probs, log_tail_mass = interpreter(backend.topk, logits, k, Tempering(0.7, softcap))
    exact = kd.reference.topk_logits(source, k, temperature=0.7)
    assert exact.log_tail_mass is not None
    assert torch.equal(ids, exact.ids)
    assert_close(log_probs, exact.log_probs)
    assert_close(log_tail_mass, exact.log_tail_mass)


@pytest.mark.parametrize("proposal", [1.0, 2.5])
@pytest.mark.parametrize("vocab", [1, 1100])
@each_dtype
def test_sample(interpreter: Worker, dtype: torch.dtype, vocab: int, proposal: float) -> None:
    logits = rows(vocab, dtype)
    uniforms = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, weights, entropy = interpreter(backend.sample, logits, uniforms, Tempering(0.7, 0.0, 0.7 * proposal))
    exact = kd.reference.sample_logits(
        logits.double(),
        4,
        temperature=0.7,
        proposal_temperature=proposal,
        generator=torch.Generator().manual_seed(1),
    )
    assert exact.entropy is not None
    assert torch.equal(ids, exact.ids)
    torch.testing.assert_close(weights.double(), exact.weights, rtol=1e-4, atol=0, equal_nan=True)
    assert_close(entropy, exact.entropy)


def test_no_rows(interpreter: Worker) -> None:
    assert [tuple(part.shape) for part in interpreter(backend.topk, torch.zeros(0, 9), 3, Tempering(1.0))] == [
        (0, 3),
        (0, 3),
        (0,),
    ]
    uniforms = torch.zeros(0, 3, dtype=torch.float64)
    found = interpreter(backend.sample, torch.zeros(0, 9), uniforms, Tempering(1.0))
    assert [tuple(part.shape) for part in found] == [(0, 3), (0, 3), (0,)]


CASES = [Case(kernel, target, dtype) for kernel in aot_topk.KERNELS for target in TARGETS for dtype in ("fp32", "bf16")]
CASES += [Case("topk", "sm_90", dtype) for dtype in ("fp16", "fp64")]
CASES += [Case(kernel, "sm_90", "bf16", softcap=True, aligned=False) for kernel in aot_topk.KERNELS]
CASES += [Case("draw", "sm_80", "fp64", softcap=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_topk.spilled_bytes, case) == 0


@pytest.mark.parametrize("kernel", aot_topk.KERNELS)
def test_sizes_and_hyperparameters_never_recompile(kernel: str, compiler: Worker) -> None:
    more = {"topk": ["k"]}.get(kernel, [])
    calls = [
        {"vocab_size": size, "stride": stride, **dict.fromkeys(aot_topk.NUMBERS, number), **dict.fromkeys(more, size)}
        for size, stride, number in [(1, 1, 1.0), (16, 16, 0.5), (151_936, 2**33 + 1, 1e-3)]
    ]
    signatures = compiler(aot_topk.specialisations, kernel, calls)
    assert len(set(signatures)) == 1, signatures

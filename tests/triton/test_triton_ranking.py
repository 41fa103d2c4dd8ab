"""The Triton kernel of the family ranking: in the interpreter against the reference, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import aot_transport
import pytest
import torch
from aot_transport import Case

import kdkernels as kd
from kdkernels.backends import triton as backend
from kdkernels.backends.triton.ranking import COUNTING_THREADS, COUNTING_TILE

pytestmark = pytest.mark.slow

Worker = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_ranks(interpreter: Worker, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 2100, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, ::2] = -math.inf
    logits[2, :2000] = math.nan
    ids = torch.tensor([[0, 2099, 7], [0, 1, 3], [0, 2050, -1], [9, 9, 8]])
    found = interpreter(backend.token_ranks, logits, ids)
    assert torch.equal(found, kd.reference.token_ranks(logits, ids))
    assert found[2].tolist()[::2] == [2100, -1]


CASES = [
    Case("token_ranks", target, dtype, (("TILE", COUNTING_TILE),), COUNTING_THREADS // lanes, family="ranking")
    for target, dtype, lanes in (("sm_90", "bf16", 32), ("gfx942", "fp32", 64))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    assert compiler(aot_transport.compiled_resources, case)["spilled_bytes"] == 0


def test_sizes_never_recompile(compiler: Worker) -> None:
    signatures = compiler(aot_transport.specialisations, "ranking", "token_ranks")
    assert len(set(signatures)) == 1, signatures

"""Top-k and draws in CUDA C++, run on the host, against the reference in float64 and the CPU backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import emulated as there
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.backends import cuda as backend
from kdkernels.backends.rows import Tempering

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

ON_CHIP = 2048
"""Entries that a kernel sorts in shared memory; more than that take another sweep, or are sorted elsewhere."""


def random_row(vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab + seed))


def rows(vocab: int, dtype: torch.dtype) -> Tensor:
    """Ordinary logits, equal ones, a far-off tail, masked entries, nothing but them, NaN, and infinity."""
    logits = torch.stack([random_row(vocab, seed) for seed in range(7)])
    logits[1] = torch.where(torch.arange(vocab) % 2 == 0, -0.0, 0.0)
    logits[2, vocab // 2 :] -= 2e4
    logits[3, : vocab // 2] = -math.inf
    logits[4] = -math.inf
    logits[5, vocab - 1] = math.nan
    logits[6, vocab // 2] = math.inf
    return logits.to(dtype)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact.double(), rtol=4 * eps, atol=32 * eps, equal_nan=True)


def check_topk(emulated: Emulated, logits: Tensor, k: int) -> None:
    found = emulated(backend.topk, logits, k, Tempering(0.7))
    exact = kd.reference.topk_logits(logits.double(), k, temperature=0.7)
    assert exact.log_tail_mass is not None
    assert torch.equal(found[0], exact.ids)
    assert torch.equal(found[0], cpu.topk(logits, k, Tempering(0.7))[0])
    assert_close(found[1], exact.log_probs)
    assert_close(found[2], exact.log_tail_mass)


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (2, 1), (127, 5), (127, 127)])
@each_dtype
def test_sizes(emulated: Emulated, dtype: torch.dtype, vocab: int, k: int) -> None:
    check_topk(emulated, rows(vocab, dtype), k)


LONG_ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": random_row,
    "one value": lambda vocab: torch.full((vocab,), -3.0),
    "a few values": lambda vocab: (torch.arange(vocab) * 7 % 5).float(),
    "alike in their first bits": lambda vocab: 1e4 + torch.rand(vocab, generator=torch.Generator().manual_seed(1)),
    "thousands apart": lambda vocab: 300 * random_row(vocab),
    "masked but for a few": lambda vocab: torch.where(torch.arange(vocab) % 700 == 3, random_row(vocab), -math.inf),
}


@pytest.mark.slow
@pytest.mark.parametrize("k", [30, ON_CHIP + 50])
@pytest.mark.parametrize("kind", LONG_ROWS)
def test_more_entries_than_are_sorted_on_chip(emulated: Emulated, kind: str, k: int) -> None:
    """Logits are told apart by one sweep, by several, or not at all: then ids are."""
    logits = LONG_ROWS[kind](ON_CHIP + 200)
    for dtype in (torch.float32, torch.bfloat16) if k == 30 else (torch.float32,):
        check_topk(emulated, logits.to(dtype).unsqueeze(0), k)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_keys_of_other_dtypes(emulated: Emulated, dtype: torch.dtype) -> None:
    logits = LONG_ROWS["alike in their first bits"](ON_CHIP + 200)
    check_topk(emulated, logits.to(dtype).unsqueeze(0), 30)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "ascending"])
def test_a_whole_vocabulary(emulated: Emulated, order: str) -> None:
    """Once there are k candidates, what is below them is not even counted; of rising logits those come last."""
    logits = random_row(151_936)
    check_topk(emulated, (logits.sort().values if order == "ascending" else logits).bfloat16().unsqueeze(0), 64)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_strides_change_nothing(emulated: Emulated, offset: int) -> None:
    """Rows on 16-byte boundaries are read in vectors, others entry by entry."""
    logits = rows(127, torch.float32)
    wide = torch.full((7, 127 + offset + 9), 1e3)
    view = wide[:, offset : offset + 127]
    view.copy_(logits)
    check_topk(emulated, view, 9)
    uniforms = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (emulated(backend.sample, each, uniforms, Tempering(1.0)) for each in (view, logits))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_softcap(emulated: Emulated) -> None:
    """Saturated logits are equal after the cap, and still in the order they had before."""
    logits = torch.stack([random_row(300), 1e3 * random_row(300)])
    ids, log_probs, log_tail_mass = emulated(backend.topk, logits, 20, Tempering(0.7, 2.0))
    capped = torch.log_softmax(2 * torch.tanh(logits.double() / 2) / 0.7, -1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids, order[:, :20])
    assert_close(log_probs, capped.gather(-1, order[:, :20]))
    assert_close(log_tail_mass, torch.logsumexp(capped.gather(-1, order[:, 20:]), -1))


@pytest.mark.parametrize("distance", [60.0, 200.0])
def test_a_small_tail_keeps_its_digits(emulated: Emulated, distance: float) -> None:
    logits = random_row(300).clamp(-8, 8)
    logits[100:140] += distance
    _, _, log_tail_mass = emulated(backend.topk, logits.unsqueeze(0), 40, Tempering(1.0))
    exact = kd.reference.topk_logits(logits.double(), 40).log_tail_mass
    assert exact is not None
    assert float(exact) < 15 - 0.99 * distance
    assert_close(log_tail_mass[0], exact)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_ragged_rows(emulated: Emulated, top_p: float) -> None:
    """The cut by probability is made above the backend."""
    logits = torch.stack([random_row(300, seed) for seed in range(4)])
    found = emulated(there.topk_logits, logits, 40, {"top_p": top_p, "backend": "cuda"})
    expected = kd.topk_logits(logits, 40, top_p=top_p, backend="cpu")
    lengths = (found.ids >= 0).sum(-1)
    assert bool((lengths > 0).all())
    assert (top_p == 1) == bool((lengths == 40).all())
    assert torch.equal(found.ids, expected.ids)
    assert_close(found.log_probs, expected.log_probs)
    assert found.log_tail_mass is not None
    assert expected.log_tail_mass is not None
    assert_close(found.log_tail_mass, expected.log_tail_mass)


@pytest.mark.parametrize("proposal", [1.0, 2.5])
@pytest.mark.parametrize("vocab", [1, 127, pytest.param(1100, marks=pytest.mark.slow)])
@each_dtype
def test_draws(emulated: Emulated, dtype: torch.dtype, vocab: int, proposal: float) -> None:
    """The ids that the reference draws with the same numbers."""
    logits = rows(vocab, dtype)
    uniforms = torch.rand(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, weights, entropy = emulated(backend.sample, logits, uniforms, Tempering(0.7, 0.0, 0.7 * proposal))
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


def test_draws_at_both_ends_of_the_distribution(emulated: Emulated) -> None:
    """No number draws what is masked, and the first entry that is not has a share however small it is."""
    logits = torch.full((2, 3000), -math.inf)
    logits[:, 5:2995] = random_row(2990)
    logits[1, 5:1500] -= 1e4
    uniforms = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64).expand(2, 2)
    ids, weights, _ = emulated(backend.sample, logits, uniforms, Tempering(1.0))
    assert ids[0].tolist() == [5, 2994]
    assert 5 <= ids[1, 0] <= 1500
    assert ids[1, 1] == 2994
    assert weights.eq(0.5).all()


@pytest.mark.slow
def test_many_draws_of_a_whole_vocabulary(emulated: Emulated) -> None:
    """All segments of a row are drawn from, each as often as the CPU's draws with the same numbers."""
    logits = random_row(151_936).bfloat16().unsqueeze(0)
    uniforms = torch.linspace(0.001, 0.999, 40, dtype=torch.float64).unsqueeze(0)
    found = emulated(backend.sample, logits, uniforms, Tempering(1.0, 0.0, 1.5))
    expected = cpu.sample(logits, uniforms, Tempering(1.0, 0.0, 1.5))
    # Sums of this many terms in another order move a number across the end of an id's share once in a while.
    assert (found[0] != expected[0]).sum() <= 1
    assert (found[0] - expected[0]).abs().max() <= 100
    same = found[0] == expected[0]
    torch.testing.assert_close(found[1][same], expected[1][same], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0)


def test_no_rows(emulated: Emulated) -> None:
    found = emulated(backend.topk, torch.zeros(0, 9), 3, Tempering(1.0))
    assert [tuple(part.shape) for part in found] == [(0, 3), (0, 3), (0,)]
    found = emulated(backend.sample, torch.zeros(0, 9), torch.zeros(0, 3, dtype=torch.float64), Tempering(1.0))
    assert [tuple(part.shape) for part in found] == [(0, 3), (0, 3), (0,)]

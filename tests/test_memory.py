"""The memory that a loss takes on top of its inputs, measured as the peak resident size of a fresh process."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import memory_probe
import pytest
from memory_probe import HIDDEN, TOKENS, VOCAB

import kdkernels as kd
from kdkernels.benchmarking.memory import ALLOCATOR_SETTINGS

MIB = 1 << 20
LOGITS = TOKENS * VOCAB * 4
HEAD_GRADIENTS = (VOCAB + TOKENS) * HIDDEN * 4
SLACK = 16 * MIB
"""For buffers of the matrix products and of the threads; a sixth of the logits of one side."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here"),
    pytest.mark.skipif(not kd.backends()["cpu"].available, reason=kd.backends()["cpu"].reason),
]

Measure = Callable[..., int]


@pytest.fixture(scope="module")
def extra() -> Iterator[Measure]:
    """``extra(name of a step, **options)``: peak extra bytes, each step in a process forked from one that has torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kdkernels"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALLOCATOR_SETTINGS.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:

            @functools.cache
            def measure(step: str, **options: Any) -> int:
                return pool.submit(memory_probe.peak_extra_bytes, step, options).result()

            yield measure


def test_peak_is_measured(extra: Measure) -> None:
    """What every other test leans on: plain PyTorch must show the whole tensors it makes."""
    assert extra("plain_logits") > 3 * LOGITS


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_stay_within_the_budget(extra: Measure, reduction: str) -> None:
    budget = 16 * MIB
    fused = extra("fused_heads", memory_budget=budget, reduction=reduction)
    assert fused <= budget + HEAD_GRADIENTS + SLACK
    assert extra("plain_heads") > 5 * fused


def test_the_budget_is_used(extra: Measure) -> None:
    small, large = (extra("fused_heads", memory_budget=budget * MIB) for budget in (8, 96))
    assert large - small > 60 * MIB
    assert large <= 96 * MIB + HEAD_GRADIENTS + SLACK


@pytest.mark.parametrize("step", ["fused_heads_without_gradient", "statistics_of_heads"])
def test_heads_without_gradient_take_the_budget_alone(extra: Measure, step: str) -> None:
    assert extra(step, memory_budget=8 * MIB) <= 8 * MIB + SLACK


def test_logits_take_their_gradient_alone(extra: Measure) -> None:
    fused = extra("fused_logits")
    assert LOGITS - SLACK <= fused <= LOGITS + SLACK


def test_logits_by_rows_take_their_gradient_alone(extra: Measure) -> None:
    assert extra("fused_logits", reduction="none") <= LOGITS + SLACK


@pytest.mark.parametrize("step", ["donated_logits", "fused_logits_without_gradient", "statistics_of_logits"])
def test_nothing_of_the_size_of_the_logits(extra: Measure, step: str) -> None:
    assert extra(step) <= SLACK

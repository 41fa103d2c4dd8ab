"""Tuned launch sizes of the Triton kernels: every candidate computes the same and none spills, and what is stored is launched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import aot_topk
import interpreted_tuning
import pytest
import torch
from aot import TARGETS, Case
from kdkernels.triton_kernels.tiling import ROW_KERNELS, LaunchSizes, candidate_sizes

Worker = Callable[..., Any]

pytestmark = pytest.mark.slow

JSD, RENYI = 3, 9


def test_the_command_measures_and_keeps(interpreter: Worker, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--kernel", "bernoulli", "--vocab", "40", "--json"]
    arguments += ["--tokens", "1", "--dtype", "float32", "--seconds", "0"]
    status, output, _ = interpreter(interpreted_tuning.command, tmp_path, *arguments, "--dry-run")
    assert status == 0
    assert json.loads(output)["file"] is None
    assert not list(tmp_path.glob("*.json"))
    status, output, _ = interpreter(interpreted_tuning.command, tmp_path, *arguments)
    assert status == 0
    found = json.loads(output)
    assert found["meaningless"]
    (result,) = found["results"]
    assert (result["kernel"], result["skipped"], result["problem"]) == ("bernoulli", [], "")
    assert len(result["candidates"]) == len(candidate_sizes("bernoulli", 32))
    assert all(one["seconds"] > 0 for one in result["candidates"])
    (kept,) = interpreter(interpreted_tuning.kept, tmp_path).values()
    (entry,) = kept["entries"]
    assert (entry["kernel"], entry["vocabulary"], entry["itemsize"]) == ("bernoulli", 64, 4)


def test_a_table_of_what_was_measured(interpreter: Worker, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--kernel", "bernoulli", "--vocab", "33", "--dtype", "float32"]
    status, output, _ = interpreter(interpreted_tuning.command, tmp_path, *arguments, "--tokens", "1", "--seconds", "0")
    assert status == 0
    for words in ("bernoulli", "float32", "64 × 32 B", "times mean nothing", str(tmp_path)):
        assert words in output


def test_what_is_kept_is_launched_and_computes_the_same(interpreter: Worker, tmp_path: Path) -> None:
    names = ("divergence_forward", "divergence_backward")
    plain, launches = interpreter(interpreted_tuning.losses_and_launches, None, {})
    assert launches == dict.fromkeys(names, 64)
    sizes = {names[0]: LaunchSizes(256, 16), names[1]: LaunchSizes(128, 32), "topk": LaunchSizes(128, 16)}
    tuned, launches = interpreter(interpreted_tuning.losses_and_launches, tmp_path, sizes)
    assert launches == {name: one.threads for name, one in sizes.items()}
    for ours, expected in zip(tuned, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [1, 301])
def test_every_candidate_computes_the_same(interpreter: Worker, vocab: int) -> None:
    kernels = [name for name in ROW_KERNELS if vocab == 1 or name != "head_mass"]  # which is slow to interpret
    assert interpreter(interpreted_tuning.disagreements, kernels, vocab) == {}


def test_a_candidate_that_computes_something_else_does_not_win(interpreter: Worker) -> None:
    found = interpreter(interpreted_tuning.wrong_answer, "token_statistics")
    assert "something else" in found["128"]
    assert found["best"] == "256"


CASES = [
    (Case(kernel, target, dtype, kind), sizes)
    for sizes in (LaunchSizes(256, 16), LaunchSizes(64, 32))
    for kernel, target, dtype, kind in [
        ("divergence_forward", "sm_90", "bf16", JSD),
        ("divergence_backward", "sm_80", "bf16", RENYI),
        ("divergence_backward", "gfx942", "fp32", JSD),
        ("token_statistics", "sm_100", "bf16", 0),
        ("sparse_divergence_forward", "sm_90", "fp32", JSD),
    ]
]


@pytest.mark.parametrize(("case", "sizes"), CASES, ids=lambda value: str(value) if isinstance(value, Case) else None)
def test_no_candidate_spills(compiler: Worker, case: Case, sizes: LaunchSizes) -> None:
    found = compiler(aot.compile_case, case, sizes)
    assert found.spilled_bytes == 0
    assert found.vector_loads >= found.wanted_vector_loads
    assert found.shuffles_in_loops in (0, None)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_candidate_of_topk_spills(compiler: Worker, target: str) -> None:
    for sizes in candidate_sizes("topk", TARGETS[target][2]):
        assert compiler(aot_topk.spilled_bytes, aot_topk.Case("topk", target, "fp32"), sizes) == 0


def test_the_oldest_architecture_that_is_not_refused(compiler: Worker) -> None:
    assert compiler(aot.compile_case, Case("divergence_backward", "sm_75", "bf16", JSD)).spilled_bytes == 0

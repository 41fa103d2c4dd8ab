"""What the tests of tuned launch sizes run where Triton's interpreter is on, see ``interpreted``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import interpreted  # noqa: F401 - makes the interpreter fast
import torch
from kdkernels.triton_kernels.tiling import LaunchSizes, candidate_sizes
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels.backends.triton import launching
from kdkernels.cli import app
from kdkernels.tuning import measurement, table


def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and complaints of ``kdkernels tune`` with its files in that folder."""
    with mock.patch.dict(os.environ, {"KDKERNELS_TUNING_DIR": str(folder), "KDKERNELS_TUNING": "1"}):
        launching.tuned_table.cache_clear()
        result = CliRunner().invoke(app, ["tune", *arguments])
    launching.tuned_table.cache_clear()
    return result.exit_code, result.stdout, result.stderr


def kept(folder: Path) -> dict[str, Any]:
    return json.loads(command(folder, "--show", "--json")[1])


def losses_and_launches(
    folder: Path | None, sizes: dict[str, LaunchSizes]
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Divergence, gradient and top ids with these sizes in the device's file, and the threads of each kernel's launch."""
    seen: dict[str, int] = {}
    prepare, pick = launching.prepare_launch, launching.tuned_sizes

    def noted(*arguments: Any, kernel: str = "") -> Any:
        launch = prepare(*arguments, kernel=kernel)
        seen[kernel] = launch.lanes
        return launch

    student, teacher = torch.randn(2, 2, 96, generator=torch.Generator().manual_seed(0)).unbind()
    environment = {"KDKERNELS_TUNING": "0"}
    if folder is not None:
        environment = {"KDKERNELS_TUNING": "1", "KDKERNELS_TUNING_DIR": str(folder)}
    with mock.patch.dict(os.environ, environment):
        device = launching.tuneable(launching.INTERPRETER)
        if folder is not None:
            entries = [table.Entry(table.Key.of(name, 96, 4, True), one, 1.0, 2.0) for name, one in sizes.items()]
            table.store(device, entries)
        launching.tuned_table.cache_clear()
        with mock.patch("kdkernels.backends.triton.divergence.prepare_launch", noted):
            leaf = student.clone().requires_grad_()
            loss = kd.distillation_loss(leaf, teacher, kd.JSD(0.3), backend="triton")
            loss.backward()
        top = kd.topk_logits(teacher, 5, backend="triton")
        picked = pick(teacher, "topk", 96, 4, True)
        if picked is not None:
            seen["topk"] = picked.threads
    launching.tuned_table.cache_clear()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad, top.ids, top.log_probs], seen


def disagreements(kernels: list[str], vocab: int) -> dict[str, str]:
    """The candidates whose answer is not that of the default sizes, over kernels."""
    found = {}
    for kernel in kernels:
        job = measurement.Job(kernel, vocab, torch.float32, 2, "cpu")
        outcome = measurement.tune(job, 0.0, clock=lambda calls: {sizes: [1.0] for sizes in calls})
        expected = set(candidate_sizes(kernel, 32))
        if outcome.problem or outcome.skipped or set(outcome.seconds) != expected:
            found[kernel] = f"{outcome.problem} {outcome.skipped} {set(outcome.seconds) ^ expected}"
    return found


def wrong_answer(kernel: str) -> dict[str, str]:
    """What tuning says of candidates when all but the default sizes compute something else."""
    right = measurement.WORK[kernel]

    def wrong(student: torch.Tensor, teacher: torch.Tensor) -> measurement.Work:
        work = right(student, teacher)
        return lambda: tuple(part * 1.01 if launching.TRIALS[kernel].threads == 128 else part for part in work())

    with mock.patch.dict(measurement.WORK, {kernel: wrong}):
        job = measurement.Job(kernel, 40, torch.float32, 2, "cpu")
        outcome = measurement.tune(job, 0.0, clock=lambda calls: {one: [1.0 / one.threads] for one in calls})
    return {f"{sizes.threads}": reason for sizes, reason in outcome.skipped.items()} | {
        "best": str(outcome.best.threads)
    }

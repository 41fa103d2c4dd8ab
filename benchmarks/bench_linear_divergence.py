"""Divergences of LM heads on the CPU, forward and backward, beside their own matrix products."""

from __future__ import annotations

import pytest
from reporting import SideBySide, Target

import kdkernels as kd
from kdkernels.benchmarking.contenders import CONTENDERS
from kdkernels.benchmarking.memory import peak_extra_bytes
from kdkernels.benchmarking.workloads import Operation, Workload

TOKENS, STUDENT_HIDDEN, TEACHER_HIDDEN = 2048, 576, 1024
GEMMS = "its GEMMs, same chunks"


@pytest.mark.parametrize("vocab", [49_152, 151_936])
def test_forward_kl(side_by_side: SideBySide, vocab: int) -> None:
    workload = Workload(Operation.HEAD, kd.ForwardKL(), TOKENS, vocab, STUDENT_HIDDEN, TEACHER_HIDDEN)
    # First, while this process holds no memory that the measuring ones need.
    peaks = {name: peak_extra_bytes(workload, name) for name in ("kdkernels", "eager")}
    inputs = workload.inputs()
    names = ("kdkernels", GEMMS, "its GEMMs, unchunked", "eager")
    calls = {name: CONTENDERS[name].prepare(workload, inputs) for name in names}
    side_by_side.measure(
        workload.title,
        calls,
        rounds=5 if vocab < 100_000 else 3,
        columns=workload.columns,
        peaks=peaks,
        gradient_bytes=workload.gradient_bytes,
    )
    side_by_side.ratio(f"LM head, V = {vocab:,}: ours in its own GEMMs", "kdkernels", GEMMS, 1.05)
    temporary = {name: peak - workload.gradient_bytes for name, peak in peaks.items()}
    side_by_side.targets.append(
        Target(
            f"LM head, V = {vocab:,}: temporary memory beside the gradients",
            temporary["kdkernels"] / 1e6,
            200,
            unit=" MB",
        )
    )
    if vocab > 100_000:
        ratio = temporary["eager"] / temporary["kdkernels"]
        what = f"LM head, V = {vocab:,}: eager's temporary memory in ours, beside the gradients"
        side_by_side.targets.append(Target(what, ratio, 30, at_least=True))

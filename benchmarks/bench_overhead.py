"""What a call costs when there is nothing to compute: one token, a vocabulary of 128."""

from __future__ import annotations

import pytest
from reporting import SideBySide

import kdkernels as kd
from kdkernels.benchmarking.contenders import CONTENDERS
from kdkernels.benchmarking.workloads import Operation, Workload


@pytest.mark.parametrize("operation", [Operation.DENSE, Operation.FORWARD])
def test_one_token(side_by_side: SideBySide, operation: Operation) -> None:
    workload = Workload(operation, kd.ForwardKL(), 1, 128, 0, 0)
    inputs = workload.inputs()
    calls = {name: CONTENDERS[name].prepare(workload, inputs) for name in ("kdkernels", "eager")}
    side_by_side.measure(workload.title, calls, rounds=51, repeats=200, columns=workload.columns)
    if operation is Operation.DENSE:
        side_by_side.ratio("one token, forward+backward: ours in eager", "kdkernels", "eager", 1.5)
    else:
        side_by_side.time("one token, forward only", "kdkernels", 30)

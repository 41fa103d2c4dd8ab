"""What the divergence in CUDA C++ moves of its rows, counted on the emulated device: recorded, and no more than recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_report import cuda_traffic
from gpu_report.calls import named
from gpu_report.page import TARGET_BYTES
from gpu_report.tables import LongestRow, RowTraffic, read

from kdkernels.divergences import Kind

RECORDED = Path(__file__).parents[2] / "docs" / "gpu"
ROWS = read(RECORDED / "cuda_traffic.csv", RowTraffic)

Emulated = Callable[..., Any]


def test_the_record_is_complete() -> None:
    assert {(row.divergence, row.dtype) for row in ROWS} == {
        (named(kind), dtype) for kind, dtype in cuda_traffic.tasks()
    }


@pytest.mark.parametrize("dtype", TARGET_BYTES)
def test_value_and_gradient_stay_within_the_goal_where_rows_are_kept(dtype: str) -> None:
    kept = [row for row in ROWS if row.kernels == "divergence_on_chip" and row.call == "fused" and row.dtype == dtype]
    assert len(kept) == len(Kind)
    assert all(row.bytes <= TARGET_BYTES[dtype] for row in kept)


def hold(kind: Kind, dtype: str, emulated: Emulated) -> None:
    before = {(row.call, row.kernels): row.bytes for row in ROWS if (row.divergence, row.dtype) == (named(kind), dtype)}
    found = {(row.call, row.kernels): row.bytes for row in emulated(cuda_traffic.counted, kind, dtype)}
    assert found.keys() == before.keys(), "run `make gpu-report`"
    assert all(found[call] <= most + 0.005 for call, most in before.items()), found


def test_bytes_do_not_grow(emulated: Emulated) -> None:
    hold(Kind.JSD, "bf16", emulated)


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_bytes_of_other_divergences_do_not_grow(kind: Kind, emulated: Emulated) -> None:
    hold(kind, "fp32", emulated)


def test_rows_that_are_kept_do_not_shrink(emulated: Emulated) -> None:
    recorded = read(RECORDED / "cuda_rows.csv", LongestRow)
    found = [row for dtype in ("fp32", "bf16") for row in emulated(cuda_traffic.longest_rows, dtype)]
    assert [(row.target, row.dtype) for row in found] == [(row.target, row.dtype) for row in recorded]
    assert all(row.vocab >= before.vocab for row, before in zip(found, recorded, strict=True))

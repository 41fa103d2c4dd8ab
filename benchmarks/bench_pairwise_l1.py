"""All pairs of L1 distances between softmax rows on the CPU, beside ``torch.cdist`` and the heads' own matrix products."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from reporting import SideBySide, Target
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.chunked_pairs import chunks
from kdkernels.backends.rows import Side
from kdkernels.benchmarking.memory import ALLOCATOR_SETTINGS, resident_bytes
from kdkernels.benchmarking.plain import pair_distances

ROWS, VOCAB, HIDDEN = 64, 151_936, 1024
OURS, PLAIN, GEMMS = "kdkernels", "softmax + torch.cdist", "its GEMMs, same chunks"
GRADIENT_BYTES = ROWS * VOCAB * 4


def columns(operation: str) -> dict[str, str | int]:
    return {"operation": operation, "rows": ROWS, "vocab": VOCAB, "dtype": "float32", "device": "cpu"}


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(ROWS, VOCAB, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def step(distances: Callable[..., Tensor], sources: Sequence[object], wanted: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(distances(*sources).sum(), wanted)


CONTENDERS: dict[str, Callable[..., Tensor]] = {OURS: kd.pairwise_l1, PLAIN: pair_distances}


def peak_extra_bytes(name: str) -> int:
    """How far the resident size of this process rises during forward and backward."""
    student, teacher = logits()
    step(CONTENDERS[name], (student[:2, :500], teacher[:2, :500]), [student])  # loads what is loaded once
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    kept = step(CONTENDERS[name], (student, teacher), [student])
    peak = resident_bytes("VmHWM")
    assert all(bool(gradient.isfinite().all()) for gradient in kept)
    return peak - before


def measured_peak(name: str) -> int:
    """The same in a fresh process."""
    program = f"import bench_pairwise_l1 as bench; print(bench.peak_extra_bytes({name!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parent,
        env={**os.environ, **ALLOCATOR_SETTINGS},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


def test_logits(side_by_side: SideBySide) -> None:
    peaks = {name: measured_peak(name) for name in CONTENDERS}
    student, teacher = logits()
    calls: dict[str, Callable[[], object]] = {
        name: lambda distances=distances: step(distances, (student, teacher), [student])
        for name, distances in CONTENDERS.items()
    }
    side_by_side.measure(
        f"pairwise L1, forward+backward: {ROWS} × {ROWS} rows × {VOCAB:,}, float32, cpu",
        calls,
        rounds=7,
        columns=columns("pairwise_l1"),
        peaks=peaks,
        gradient_bytes=GRADIENT_BYTES,
    )
    side_by_side.ratio("softmax + torch.cdist in pairwise_l1, forward+backward", PLAIN, OURS, 5, at_least=True)
    extra = (peaks[OURS] - GRADIENT_BYTES) / 1e6
    side_by_side.targets.append(Target("pairwise_l1: memory beside the gradient", extra, 16, unit=" MB"))


def test_forward(side_by_side: SideBySide) -> None:
    student, teacher = logits()

    def alone(distances: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return distances(student, teacher)

    calls: dict[str, Callable[[], object]] = {
        name: lambda distances=distances: alone(distances) for name, distances in CONTENDERS.items()
    }
    title = f"pairwise L1, forward only: {ROWS} × {ROWS} rows × {VOCAB:,}, float32, cpu"
    side_by_side.measure(title, calls, rounds=7, columns=columns("pairwise_l1 forward"))
    side_by_side.ratio("softmax + torch.cdist in pairwise_l1, forward only", PLAIN, OURS, 5, at_least=True)


def test_heads(side_by_side: SideBySide) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(ROWS, HIDDEN, generator=generator) for _ in range(2))
    weight, teacher_weight = (3 * HIDDEN**-0.5 * torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    wanted = [hidden.requires_grad_(), weight.requires_grad_()]
    parts = chunks((Side(hidden, weight), Side(teacher_hidden, teacher_weight)), None)

    def gemms() -> object:
        """The logits of both sides, twice, and the student's two gradients: what any streaming computation needs."""
        with torch.no_grad():
            grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
            for _ in range(2):
                for part in parts:
                    made = hidden @ weight[part].t()
                    teacher_hidden @ teacher_weight[part].t()
            for part in parts:
                grad_hidden.addmm_(made[:, : part.stop - part.start], weight[part])
                torch.mm(made[:, : part.stop - part.start].t(), hidden, out=grad_weight[part])
            return grad_hidden, grad_weight

    def ours() -> object:
        sources = kd.LMHead(hidden, weight), kd.LMHead(teacher_hidden, teacher_weight)
        return step(kd.pairwise_l1, sources, wanted)

    def plain() -> object:
        return step(pair_distances, (hidden @ weight.t(), teacher_hidden @ teacher_weight.t()), wanted)

    calls: dict[str, Callable[[], object]] = {OURS: ours, GEMMS: gemms, PLAIN: plain}
    title = (
        f"pairwise L1 of LM heads, forward+backward: {ROWS} × {ROWS} rows × {VOCAB:,}, hidden {HIDDEN}, float32, cpu"
    )
    side_by_side.measure(title, calls, rounds=5, columns=columns("pairwise_l1 of heads") | {"hidden": HIDDEN})
    side_by_side.ratio("pairwise_l1 of LM heads in its own GEMMs", OURS, GEMMS, 1.3)

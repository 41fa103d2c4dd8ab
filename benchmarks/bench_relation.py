"""Relations on the CPU beside plain PyTorch: softmax relations, the angles of RKD, Gram matrices."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from reporting import SideBySide
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

import kdkernels as kd
from kdkernels.benchmarking.memory import ALLOCATOR_SETTINGS, resident_bytes

HEADS, WIDTH = 12, 64
POINTS, DIMENSIONS = 256, 512
OURS, PLAIN = "kdkernels", "plain PyTorch"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(batch: int, rows: int) -> list[Tensor]:
    """Queries and keys of the student and of the teacher."""
    tensors = [random(batch, HEADS, rows, WIDTH, seed=seed) for seed in range(4)]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return tensors


def plain_relation(queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor) -> Tensor:
    student = queries @ keys.mT * WIDTH**-0.5
    teacher = teacher_queries @ teacher_keys.mT * WIDTH**-0.5
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


RELATIONS: dict[str, Callable[..., Tensor]] = {OURS: kd.relation_loss, PLAIN: plain_relation}


def gradients(loss: Callable[..., Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(*given), [tensor for tensor in given if tensor.requires_grad])


def peak_extra_bytes(name: str, batch: int, rows: int) -> int:
    """How far the resident size of this process rises during forward and backward."""
    gradients(RELATIONS[name], heads(1, 8))  # loads what is loaded once
    given = heads(batch, rows)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    kept = gradients(RELATIONS[name], given)
    peak = resident_bytes("VmHWM")
    assert all(bool(gradient.isfinite().all()) for gradient in kept)
    return peak - before


def measured_peak(name: str, batch: int, rows: int) -> int:
    """The same in a fresh process."""
    program = f"import bench_relation as bench; print(bench.peak_extra_bytes({name!r}, {batch}, {rows}))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parent,
        env={**os.environ, **ALLOCATOR_SETTINGS},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


@pytest.mark.parametrize(("batch", "rows"), [(1, 512), (4, 512), (1, 2048)])
def test_softmax_relation(side_by_side: SideBySide, batch: int, rows: int) -> None:
    given = heads(batch, rows)
    calls: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: gradients(loss, given) for name, loss in RELATIONS.items()
    }
    what = f"{batch} × {HEADS} heads × {rows} rows, d = {WIDTH}"
    side_by_side.measure(
        f"relation KL, forward+backward: {what}, float32, cpu",
        calls,
        rounds=9,
        columns={"operation": "relation", "batch": batch, "rows": rows, "dtype": "float32", "device": "cpu"},
        peaks={name: measured_peak(name, batch, rows) for name in RELATIONS},
        gradient_bytes=2 * given[0].numel() * 4,
    )
    side_by_side.ratio(f"plain PyTorch in relation KL, {what}", PLAIN, OURS, 3, at_least=True)


def plain_angle(student: Tensor, teacher: Tensor) -> Tensor:
    angles = []
    for points in (student, teacher):
        legs = normalize(points.unsqueeze(0) - points.unsqueeze(1), dim=-1)
        angles.append(legs @ legs.mT)
    return smooth_l1_loss(*angles)  # type: ignore[arg-type]


def test_angle(side_by_side: SideBySide) -> None:
    given = random(POINTS, DIMENSIONS, seed=0).requires_grad_(), random(POINTS, DIMENSIONS, seed=1)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: gradients(kd.angle_loss, given),
        PLAIN: lambda: gradients(plain_angle, given),
    }
    title = f"RKD angle, forward+backward: {POINTS} points, d = {DIMENSIONS}, float32, cpu"
    side_by_side.measure(title, calls, rounds=5, columns={"operation": "angle", "rows": POINTS, "device": "cpu"})
    side_by_side.ratio(f"plain PyTorch in RKD angle, {POINTS} points, d = {DIMENSIONS}", PLAIN, OURS, 5, at_least=True)


def test_gram(side_by_side: SideBySide) -> None:
    student, teacher = random(64, 64, 8, 8, seed=0).requires_grad_(), random(64, 64, 8, 8, seed=1)
    loss = kd.losses.DisWOT()
    embeddings = random(POINTS, DIMENSIONS, seed=0).requires_grad_(), random(POINTS, DIMENSIONS, seed=1)
    calls: dict[str, Callable[[], object]] = {
        "SP + ICKD": lambda: gradients(loss, (student, teacher)),
        "RKD": lambda: gradients(kd.losses.RKD(), embeddings),
    }
    title = f"Gram losses, forward+backward: 64 × 64 × 8 × 8 maps, {POINTS} × {DIMENSIONS} points, float32, cpu"
    side_by_side.measure(title, calls, rounds=9, columns={"operation": "gram", "device": "cpu"})

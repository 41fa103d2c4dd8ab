"""Finds the launch sizes that are fastest on a device, of those that compute the same.

A job is one kernel over one vocabulary in one dtype. Each candidate's answer is held against that of the default sizes; those
that agree take turns on the clock, so that whatever else the machine does strikes them alike.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import triton
from kdkernels.backends.bernoulli import BernoulliForm
from kdkernels.backends.rows import RowSpec, Tempering, compute_dtype
from kdkernels.backends.sparse_rows import Policy, SparseRows
from kdkernels.backends.triton.launching import device_of, trial
from kdkernels.benchmarking.timing import median_ratio, side_by_side
from kdkernels.triton_kernels.tiling import ROW_KERNELS, VECTOR_BYTES, LaunchSizes, candidate_sizes, default_sizes
from kdkernels.tuning.table import Entry, Key

__all__ = ["Job", "Outcome", "rows_that_fit", "tune"]

Answer = tuple[Tensor, ...]
Work = Callable[[], Answer]
Samples = Mapping[LaunchSizes, list[float]]
Clock = Callable[[Mapping[LaunchSizes, Callable[[], object]]], Samples]
"""Calls in turn, and the seconds that each took, one entry per round."""

WORTHWHILE = 0.98
"""The time in that of the default sizes that others must stay below to replace them: less is noise."""

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far a row of an answer may be from that of the default sizes, relatively, because sums are in another order."""

TOP = 64
"""Ids that are picked, or that a truncated teacher names."""

COMPARED_ROWS = 256
"""At a time, so that the comparison needs little memory."""


@dataclass(frozen=True)
class Job:
    kernel: str
    vocab: int
    dtype: torch.dtype
    tokens: int
    device: str

    @property
    def aligned(self) -> bool:
        return bool(self.vocab * self.dtype.itemsize % VECTOR_BYTES == 0)

    @property
    def key(self) -> Key:
        return Key.of(self.kernel, self.vocab, self.dtype.itemsize, self.aligned)

    def work(self) -> Work:
        """What is measured, on random logits."""
        generator = torch.Generator(self.device).manual_seed(0)
        student, teacher = (
            torch.empty(self.tokens, self.vocab, dtype=self.dtype, device=self.device).normal_(generator=generator)
            for _ in range(2)
        )
        return WORK[self.kernel](student, teacher)


@dataclass
class Outcome:
    """What a job has found; times are medians in seconds."""

    job: Job
    default: LaunchSizes
    best: LaunchSizes
    seconds: dict[LaunchSizes, float] = field(default_factory=dict)
    ratios: dict[LaunchSizes, float] = field(default_factory=dict)
    """Of the time to that of the default sizes."""
    skipped: dict[LaunchSizes, str] = field(default_factory=dict)
    """Candidates that were not timed, and why."""
    problem: str = ""
    """Why nothing was measured."""

    @property
    def entry(self) -> Entry | None:
        if self.problem:
            return None
        return Entry(self.job.key, self.best, self.seconds[self.best], self.seconds[self.default])


def tune(
    job: Job, seconds: float, *, advance: Callable[[float], object] = lambda fraction: None, clock: Clock | None = None
) -> Outcome:
    """Measures the candidates of a job for about so many seconds, once they are compiled."""
    clock = clock or functools.partial(side_by_side, device=job.device, seconds=seconds, advance=advance)
    work = job.work()
    device = device_of(torch.empty(0, device=job.device))
    default = default_sizes(job.kernel, job.vocab, job.dtype.itemsize, device.warp_size, device.architecture)
    outcome = Outcome(job, default, default)

    def call(sizes: LaunchSizes) -> Answer:
        with trial(job.kernel, sizes):
            return work()

    try:
        answer = call(default)
        expected = tuple(part.clone() for part in answer)
    except Exception as error:  # noqa: BLE001 - whatever the device has against it is why there is nothing to tune
        outcome.problem = first_line(error)
        return outcome
    calls = {default: functools.partial(call, default)}
    for sizes in candidate_sizes(job.kernel, device.warp_size):
        if sizes == default:
            continue
        for part in answer:  # what a candidate does not write must not look right
            part.fill_(torch.nan if part.is_floating_point() else -1)
        try:
            answer = call(sizes)
            difference = disagreement(answer, expected)
        except Exception as error:  # noqa: BLE001 - a device may refuse some sizes
            difference = first_line(error)
        if difference:
            outcome.skipped[sizes] = difference
        else:
            calls[sizes] = functools.partial(call, sizes)
    del answer, expected
    samples = clock(calls)
    outcome.seconds = {sizes: statistics.median(times) for sizes, times in samples.items()}
    outcome.ratios = {sizes: median_ratio(times, samples[default]) for sizes, times in samples.items()}
    fastest = min(outcome.ratios, key=outcome.ratios.__getitem__)
    if outcome.ratios[fastest] < WORTHWHILE:
        outcome.best = fastest
    return outcome


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def disagreement(answer: Answer, expected: Answer) -> str:
    """How an answer differs from the one expected; empty if by rounding only."""
    for ours, theirs in zip(answer, expected, strict=True):
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return "it computes other ids"
            continue
        error = max(
            map(row_error, torch.split(ours, COMPARED_ROWS), torch.split(theirs, COMPARED_ROWS)),
            default=0.0,
        )
        if not error <= AGREEMENT[ours.dtype]:
            return f"it computes something else: relative error {error:.1e}"
    return ""


def row_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative error of a row. What is infinite or NaN must be so in both."""
    rows = (len(theirs), -1)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = (ours.double() - theirs.double()).masked_fill(same, 0.0).reshape(rows).norm(dim=-1)
    size = theirs.double().nan_to_num(0.0, 0.0, 0.0).reshape(rows).norm(dim=-1)
    relative = difference / size.clamp(min=torch.finfo(torch.float64).tiny)
    return float(relative.nan_to_num(torch.inf).max())


def rows_that_fit(vocab: int, dtype: torch.dtype, wanted: int, free_bytes: int) -> int:
    """As many rows as are wanted, if two matrices of logits and two gradients take no more than half the free memory."""
    return max(1, min(wanted, free_bytes // 2 // (4 * vocab * dtype.itemsize)))


# --- what is measured: the functions of the backend, for kernels of two forms both of them ----------------------------------

SPECS = tuple(RowSpec(*divergence.form) for divergence in (kd.ForwardKL(), kd.JSD(0.5)))
"""A divergence of one sweep and one of two."""


def upstream(student: Tensor) -> Tensor:
    return torch.ones(len(student), dtype=compute_dtype(student, None), device=student.device)


def divergence_forward(student: Tensor, teacher: Tensor) -> Work:
    return lambda: tuple(triton.divergence_forward(student, teacher, spec)[0] for spec in SPECS)


def divergence_backward(student: Tensor, teacher: Tensor) -> Work:
    kept = [triton.divergence_forward(student, teacher, spec)[2] for spec in SPECS]
    gradients = tuple(torch.empty_like(student) for _ in SPECS)
    scale = upstream(student)

    def run() -> Answer:
        for spec, saved, gradient in zip(SPECS, kept, gradients, strict=True):
            triton.divergence_backward(student, teacher, saved, spec, scale, None, gradient, None)
        return gradients

    return run


def token_statistics(student: Tensor, teacher: Tensor) -> Work:
    return lambda: triton.token_statistics(student, teacher, SPECS[0])


def truncated(teacher: Tensor) -> SparseRows:
    ids, log_probs, log_tail_mass = triton.topk(teacher, min(TOP, teacher.shape[1]), Tempering(1.0))
    return SparseRows(Policy.BUCKET, ids, log_probs, log_tail_mass)


def sparse_divergence_forward(student: Tensor, teacher: Tensor) -> Work:
    stored = truncated(teacher)
    return lambda: triton.sparse_divergence_fused(student, stored, SPECS[0], None, None, None)[:1]


def sparse_divergence_backward(student: Tensor, teacher: Tensor) -> Work:
    """With the forward, as it always runs."""
    stored, scale, gradient = truncated(teacher), upstream(student), torch.empty_like(student)

    def run() -> Answer:
        triton.sparse_divergence_fused(student, stored, SPECS[0], scale, None, gradient)
        return (gradient,)

    return run


def bernoulli(student: Tensor, teacher: Tensor) -> Work:
    scale, gradient = upstream(student), torch.empty_like(student)
    spec = RowSpec(BernoulliForm.KL, 0.0, 0.0)
    return lambda: (triton.bernoulli(student, teacher, spec, scale, gradient), gradient)


def head_mass(student: Tensor, teacher: Tensor) -> Work:
    return lambda: triton.head_mass(teacher, student, RowSpec(0, 0.5, 0.0))


def row_deviation(student: Tensor, teacher: Tensor) -> Work:
    return lambda: triton.row_deviation(student, 0.0)


def row_deviation_backward(student: Tensor, teacher: Tensor) -> Work:
    """With a copy of the gradient, which it changes in place."""
    moments, gradient = triton.row_deviation(student, 0.0), torch.empty_like(student)

    def run() -> Answer:
        gradient.copy_(teacher)
        triton.row_deviation_backward(student, *moments, gradient)
        return (gradient,)

    return run


def token_set(student: Tensor, teacher: Tensor) -> Work:
    """Of every other token."""
    members = torch.arange(student.shape[1], device=student.device) % 2 == 0
    scale, gradient = upstream(student), torch.empty_like(student)
    return lambda: (triton.token_set(student, members, SPECS[0], scale, gradient), gradient)


def topk(student: Tensor, teacher: Tensor) -> Work:
    return lambda: triton.topk(teacher, min(TOP, teacher.shape[1]), Tempering(1.0))


WORK: dict[str, Callable[[Tensor, Tensor], Work]] = {
    "divergence_forward": divergence_forward,
    "divergence_backward": divergence_backward,
    "token_statistics": token_statistics,
    "sparse_divergence_forward": sparse_divergence_forward,
    "sparse_divergence_backward": sparse_divergence_backward,
    "bernoulli": bernoulli,
    "head_mass": head_mass,
    "row_deviation": row_deviation,
    "row_deviation_backward": row_deviation_backward,
    "token_set": token_set,
    "topk": topk,
}
assert set(WORK) == set(ROW_KERNELS)

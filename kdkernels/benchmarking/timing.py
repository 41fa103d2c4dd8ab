"""Time, measured side by side: the contenders take turns, so that whatever else the machine does strikes them alike.

On a GPU a call is timed by the GPU itself, from its first kernel to its last, with the cache emptied beforehand: within a
training step, other layers have filled it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["median_ratio", "side_by_side", "time_call"]

Name = TypeVar("Name")

LARGEST_CACHE = 256 << 20
"""Bytes, where torch does not say what a GPU has: as much as any so far."""


def time_call(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds per call, over ``repeats`` calls in a row. What the last call returns is freed off the clock."""
    if torch.device(device).type == "cuda":
        return time_on_gpu(call, device, repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    seconds = (time.perf_counter() - start) / repeats
    del result
    return seconds


def time_on_gpu(call: Callable[[], object], device: str, repeats: int) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # The GPU is busy with this while the call's first kernels are being launched.
        cache_filler(device).zero_()
        start.record()
        for _ in range(repeats):
            result = call()
        end.record()
        end.synchronize()
    del result
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / repeats


@functools.cache
def cache_filler(device: str) -> Tensor:
    """Twice the size of the last-level cache."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or LARGEST_CACHE
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def side_by_side(
    calls: Mapping[Name, Callable[[], object]],
    device: str,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 100),
    advance: Callable[[float], object] = lambda fraction: None,
) -> dict[Name, list[float]]:
    """Seconds per call of each contender, one entry per round.

    Args:
        calls: what is measured; called once beforehand, off the record.
        device: where it runs.
        seconds: for how long rounds are started, within the limits of ``rounds``.
        rounds: at least and at most so many.
        advance: told after every call what fraction of the whole is done.
    """
    least, most = rounds
    names = list(calls)
    for call in calls.values():
        time_call(call, device)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    done = 0
    while done < most and (done < least or time.perf_counter() - start < seconds):
        # Every contender follows every other in turn: who comes after whom matters to caches.
        order = names[done % len(names) :] + names[: done % len(names)]
        for name in order:
            samples[name].append(time_call(calls[name], device))
            by_time = (time.perf_counter() - start) / seconds if seconds > 0 else 1.0
            by_count = sum(map(len, samples.values())) / (least * len(names))
            advance(min(1.0, by_time, by_count))
        done += 1
    advance(1.0)
    return samples


def median_ratio(samples: list[float], base: list[float]) -> float:
    """The median over the rounds of one contender's time in another's."""
    return statistics.median(one / other for one, other in zip(samples, base, strict=True))

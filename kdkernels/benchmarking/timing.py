"""Time, measured side by side: the contenders take turns, so that whatever else the machine does strikes them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["median_ratio", "side_by_side", "time_call"]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds per call, over ``repeats`` calls in a row. What the last call returns is freed off the clock."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    synchronize(device)
    seconds = (time.perf_counter() - start) / repeats
    del result
    return seconds


def side_by_side(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 100),
    advance: Callable[[float], object] = lambda fraction: None,
) -> dict[str, list[float]]:
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
    samples: dict[str, list[float]] = {name: [] for name in names}
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

"""A MODEL of how long a kernel takes per logit: no measurement, and no claim of one.

The kernel is as slow as the slowest of what it asks for, each at the full rate of the data sheet and all at the same time:
bytes of memory, instructions started, single-precision arithmetic, special functions, and loads whose latency the warps
that fit on a multiprocessor have to hide (Little's law: bytes under way = bandwidth * latency).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from operator import itemgetter

from .hardware import LATENCY, Device
from .objects import Loop

__all__ = ["Modelled", "Work", "model", "work_per_logit"]


@dataclass(frozen=True)
class Work:
    """Of a kernel's loops, per logit; every number is one of machine code."""

    instructions: float
    arithmetic: float
    special: float
    bytes_under_way: int
    """What a thread has loaded, at least, before it needs the first of it."""


def work_per_logit(loops: Sequence[Loop], itemsize: int, streams: int) -> Work | None:
    """From loops that are sweeps over rows of `streams` matrices with elements of `itemsize` bytes.

    Those that load most per turn do the whole tiles; masked and smaller ones finish a row, or look for something in it.
    """
    whole = [loop for loop in loops if not loop.masked] or loops
    sweeps = [loop for loop in whole if loop.loaded_bytes == max(each.loaded_bytes for each in whole)]
    if not sweeps:
        return None
    turns = [itemsize * streams / loop.loaded_bytes for loop in sweeps]
    pairs = list(zip(sweeps, turns, strict=True))
    return Work(
        instructions=sum(loop.instructions * turn for loop, turn in pairs),
        arithmetic=sum(loop.arithmetic * turn for loop, turn in pairs),
        special=sum(loop.special * turn for loop, turn in pairs),
        bytes_under_way=min(loop.loaded_bytes for loop in sweeps),
    )


@dataclass(frozen=True)
class Modelled:
    """Seconds per logit that each thing takes by itself."""

    memory: float
    instructions: float
    arithmetic: float
    special: float
    latency: float

    @property
    def bound(self) -> str:
        return max(asdict(self).items(), key=itemgetter(1))[0]

    @property
    def time(self) -> float:
        return float(max(astuple(self)))


def model(device: Device, loaded: float, stored: float, work: Work, threads: int) -> Modelled:
    """loaded, stored: bytes per logit. threads: that a multiprocessor holds at once."""
    cycles = device.units * device.clock
    return Modelled(
        memory=(loaded + stored) / device.bandwidth,
        instructions=work.instructions / (device.issued * cycles),
        arithmetic=work.arithmetic / (device.fp32 * cycles),
        special=work.special / (device.special * cycles),
        latency=loaded * LATENCY / (device.units * threads * work.bytes_under_way),
    )

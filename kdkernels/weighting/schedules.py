"""Numbers that change from step to step: ramps, plateaus, decays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kdkernels.checks import check_choice, check_count, check_real

__all__ = ["ExponentialDecay", "LogarithmicDecay", "Ramp", "Schedule", "WarmupStableDecay"]

SHAPES = ("linear", "cosine", "sine")


class Schedule:
    """A number for every step: ``at(step)`` wherever steps are counted, or ``value`` and ``step()``, which counts them here.

    The counter is all its state; ``state_dict()`` saves it. Numbers of Python, so that nothing waits for a device; kernels
    are not compiled anew when they change.
    """

    def __init__(self) -> None:
        self.count = 0

    def at(self, step: float) -> float:
        """The number at a step; the first step is 0."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is at a step")

    @property
    def value(self) -> float:
        """The number now."""
        return self.at(self.count)

    def step(self) -> float:
        """Counts a step; the number from then on."""
        self.count += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another left off."""
        self.count = check_count("state_dict: count", state["count"], 0)


def eased(shape: str, share: float) -> float:
    """From 0 to 1 as ``share`` goes from 0 to 1, and no further."""
    share = min(1.0, max(0.0, share))
    if shape == "cosine":
        return (1 - math.cos(math.pi * share)) / 2
    if shape == "sine":
        return math.sin(math.pi / 2 * share)
    return share


class Ramp(Schedule):
    """From ``start`` at step 0 to ``end`` at step ``steps``, constant after that.

    Linear warm-ups and annealings, PS-KD's ``alpha_T (e + 1) / E`` (``Ramp(0, 0.8, E).at(e + 1)``), MDCS's
    ``0.6 min(e / 20, 1)``, PromptKD's ``1 - step / total``, Medusa's sine.

    Args:
        start, end: the numbers at both ends.
        steps: how many steps it takes, at least 1.
        shape: "linear"; "cosine", slow at both ends; "sine", slow at the end alone.
        delay: steps at ``start`` before it.
    """

    def __init__(self, start: float, end: float, steps: int, *, shape: str = "linear", delay: int = 0) -> None:
        super().__init__()
        self.start = check_real("start", start)
        self.end = check_real("end", end)
        self.steps = check_count("steps", steps)
        self.shape = check_choice("shape", shape, SHAPES)
        self.delay = check_count("delay", delay, 0)

    def at(self, step: float) -> float:
        return self.start + (self.end - self.start) * eased(self.shape, (step - self.delay) / self.steps)


class WarmupStableDecay(Schedule):
    """Up from ``floor`` to ``peak`` in ``warmup`` steps, there until the last ``decay`` of ``steps``, and down to ``floor``.

    With a learning rate of the same form the best of the weights tried by Peng et al. 2025 (ACL; arXiv 2410.16215).

    Args:
        peak, floor: the numbers.
        steps: all steps, at least ``warmup + decay``.
        warmup, decay: steps up and down, each at least 0.
        shape: of both, as in ``Ramp``.
    """

    def __init__(
        self, peak: float, steps: int, *, warmup: int, decay: int, floor: float = 0.0, shape: str = "linear"
    ) -> None:
        super().__init__()
        self.peak = check_real("peak", peak)
        self.floor = check_real("floor", floor)
        self.steps = check_count("steps", steps)
        self.warmup = check_count("warmup", warmup, 0)
        self.decay = check_count("decay", decay, 0)
        self.shape = check_choice("shape", shape, SHAPES)
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup and decay must be at most the {steps} steps together, got {warmup} and {decay}")

    def at(self, step: float) -> float:
        up = step / self.warmup if self.warmup else 1.0
        down = (self.steps - step) / self.decay if self.decay else 1.0
        return self.floor + (self.peak - self.floor) * eased(self.shape, min(up, down))


class ExponentialDecay(Schedule):
    """``floor + (start - floor) factor ** step``: kickstarting multiplies its weight by 0.99998 each step."""

    def __init__(self, start: float, factor: float, *, floor: float = 0.0) -> None:
        super().__init__()
        self.start = check_real("start", start)
        self.factor = check_real("factor", factor, positive=True)
        self.floor = check_real("floor", floor)
        if self.factor > 1:
            raise ValueError(f"factor must be greater than 0 and at most 1, got {factor}")

    def at(self, step: float) -> float:
        return self.floor + (self.start - self.floor) * math.pow(self.factor, step)


class LogarithmicDecay(Schedule):
    """``start log(steps / (2 (step + 1))) / log(steps / 2)``, which is 0 from half of the steps on.

    The weight of a lexical prior in Ding et al. 2021 (ICLR; arXiv 2012.14583). Confidence: general form, from memory.

    Args:
        start: at step 0.
        steps: all steps, at least 3.
    """

    def __init__(self, start: float, steps: int) -> None:
        super().__init__()
        self.start = check_real("start", start)
        self.steps = check_count("steps", steps, 3)

    def at(self, step: float) -> float:
        if 2 * (step + 1) >= self.steps:
            return 0.0
        return self.start * math.log(self.steps / (2 * (step + 1))) / math.log(self.steps / 2)

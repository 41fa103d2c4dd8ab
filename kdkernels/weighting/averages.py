"""Teachers that are moving averages of the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.checks import check_count, check_flag, check_real

__all__ = ["MovingAverages"]


class MovingAverages(nn.Module):
    """Exponential moving averages of a model at one or several rates, to teach it.

    ``theta_T += rate / (1 - (1 - rate)^n) (theta_S - theta_T)`` at update n: the first one copies the student, and early
    averages are not drawn to where they began. Buffers are copied.

    Several rates with a correction: Michel et al. 2024 (ICML; arXiv 2309.02870; 0.1, 0.05, 0.01 and 0.005). Their code does
    something else, which ``correction="published"`` does: it begins with ``rate / (1 - rate) theta_S`` and then takes
    ``(1 - rate) theta_T + rate / (1 - rate^m) theta_S``, m the updates before this one over 10 and at least 1, so that the
    first teachers are a student shrunk to a tenth and less. Averages of chosen parameters (``masks``) are the general form
    of parameter-selective adaptation.

    Args:
        model: the student; its parameters' values are where the averages begin. It is copied once per rate.
        rates: how much of the student comes in at each update, above 0 and at most 1; 0.001 is the usual "0.999".
        correction: "unbiased" as above, "published", or None.
    """

    def __init__(
        self, model: nn.Module, rates: Sequence[float] = (0.001,), *, correction: str | None = "unbiased"
    ) -> None:
        super().__init__()
        if not rates:
            raise ValueError("rates must hold at least one number, got none")
        for rate in rates:
            if not 0 < check_real("rates", rate) <= 1:
                raise ValueError(f"rates must be above 0 and at most 1, got {rate}")
        if correction not in {"unbiased", "published", None}:
            raise ValueError(f"correction must be 'unbiased', 'published' or None, got {correction!r}")
        if correction == "published" and max(rates) == 1:
            raise ValueError("rates must be below 1 with the published correction, got 1")
        self.rates = tuple(float(rate) for rate in rates)
        self.correction = correction
        self.updates = 0
        self.models = nn.ModuleList(copy.deepcopy(model) for _ in self.rates)
        self.models.requires_grad_(False)
        self.models.eval()
        if correction == "published":
            for rate, average in zip(self.rates, self.models, strict=True):
                for parameter in average.parameters():
                    parameter.data.mul_(rate / (1 - rate))

    def train(self, mode: bool = True) -> MovingAverages:
        """Averages teach and do not train: their dropout stays off."""
        check_flag("mode", mode)
        self.training = mode
        return self

    def shares(self, rate: float) -> tuple[float, float]:
        """What the average and the student count at an update, the ``updates``-th."""
        if self.correction == "published":
            return 1 - rate, rate / (1 - rate ** max(1, (self.updates - 1) // 10))
        share = rate if self.correction is None else rate / (1 - (1 - rate) ** self.updates)
        return 1 - share, share

    @torch.no_grad()
    def update(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Moves the averages towards the model.

        Args:
            model: the student.
            masks: by name of the parameter, bool like it: only where True does the average move (those with a large
                Fisher information, for instance). Parameters that are not named move whole.
        """
        self.updates += 1
        for rate, average in zip(self.rates, self.models, strict=True):
            kept, added = self.shares(rate)
            targets = dict(average.named_parameters())
            for name, parameter in model.named_parameters():
                target = targets[name]
                moved = kept * target + added * parameter.detach().to(target.dtype)
                target.copy_(moved if masks is None or name not in masks else torch.where(masks[name], moved, target))
            buffers = dict(average.named_buffers())
            for name, buffer in model.named_buffers():
                buffers[name].copy_(buffer)

    def forward(self, *arguments: Any, **keywords: Any) -> list[Any]:
        """What each average answers, in the order of the rates; without gradient."""
        with torch.no_grad():
            return [model(*arguments, **keywords) for model in self.models]

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = check_count("state_dict: updates", state["updates"], 0)

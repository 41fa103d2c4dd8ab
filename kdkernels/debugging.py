"""When the values of tensors are looked at, rather than their shapes and dtypes alone."""

from __future__ import annotations

import os

from torch import Tensor

from kdkernels.transforms import values_are_known

__all__ = ["debug", "values_are_checked"]


class debug:  # noqa: N801 - called like a function
    """Checks the values of GPU tensors (labels, sparse teachers) too, at the price of a synchronisation per call.

    ``kd.debug(True)`` from then on, ``with kd.debug(True):`` in a block. On CPU tensors values are always checked;
    ``KDKERNELS_DEBUG=1`` switches it on for a whole process.
    """

    enabled = os.environ.get("KDKERNELS_DEBUG", "") not in {"", "0"}

    def __init__(self, enabled: bool = True) -> None:
        self.before = debug.enabled
        debug.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        debug.enabled = self.before


def values_are_checked(tensor: Tensor) -> bool:
    """Whether looking at values is possible and costs nothing much."""
    return (tensor.device.type == "cpu" or debug.enabled) and values_are_known()

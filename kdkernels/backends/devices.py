"""The GPUs of this machine as kernels see them, and why there are none."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

__all__ = ["Device", "gpu", "why_no_gpu"]


class Device(NamedTuple):
    name: str
    architecture: str
    """Such as "sm_90" or "gfx942"."""
    warp_size: int


@functools.cache
def gpu(index: int) -> Device:
    """The GPU that torch calls ``cuda:index``."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        return Device(properties.name, f"sm_{properties.major}{properties.minor}", 32)
    architecture = properties.gcnArchName.partition(":")[0]
    # Waves of 64 lanes up to GCN and CDNA (gfx9), of 32 in RDNA (gfx10 and later).
    return Device(properties.name, architecture, 64 if int(architecture[3:-2]) < 10 else 32)


def why_no_gpu() -> str:
    """Why PyTorch finds no GPU here, in its own words where it has some."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} finds no CUDA or ROCm device here: it is built for neither"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says the same in the exception
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch {torch.__version__} finds no CUDA or ROCm device here: {' '.join(str(error).split())}"
    return f"PyTorch {torch.__version__} finds no CUDA or ROCm device here"

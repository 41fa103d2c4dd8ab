"""What can be named on the command line."""

from __future__ import annotations

import enum

import torch

import kdkernels as kd
from kdkernels.backends.devices import why_no_gpu
from kdkernels.cli.terminal import fail
from kdkernels.divergences import Divergence

__all__ = ["DIVERGENCES", "Codec", "DivergenceName", "Dtype", "check_device"]

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": kd.ForwardKL(),
    "reverse_kl": kd.ReverseKL(),
    "jeffreys": kd.Jeffreys(),
    "jsd": kd.JSD(),
    "skew_forward_kl": kd.SkewForwardKL(),
    "skew_reverse_kl": kd.SkewReverseKL(),
    "tvd": kd.TVD(),
    "alpha": kd.AlphaDivergence(0.7),
    "hellinger": kd.Hellinger(),
    "renyi": kd.Renyi(0.7),
    "ab": kd.ABDivergence(0.6, 0.5),
    "soft_cross_entropy": kd.SoftCrossEntropy(),
}
"""Every divergence, with parameters that are nobody's special case."""


class DivergenceName(str, enum.Enum):
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JEFFREYS = "jeffreys"
    JSD = "jsd"
    SKEW_FORWARD_KL = "skew_forward_kl"
    SKEW_REVERSE_KL = "skew_reverse_kl"
    TVD = "tvd"
    ALPHA = "alpha"
    HELLINGER = "hellinger"
    RENYI = "renyi"
    AB = "ab"
    SOFT_CROSS_ENTROPY = "soft_cross_entropy"


class Dtype(str, enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"

    @property
    def torch(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.value)
        return found


class Codec(str, enum.Enum):
    Q4 = "q4"
    Q6 = "q6"
    Q8 = "q8"
    BF16 = "bf16"


def check_device(device: str) -> str:
    """The device, or the end of the command if it is not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        fail(f"--device {device}: not the name of a device, such as cpu or cuda")
    if kind not in {"cpu", "cuda"}:
        fail(f"--device {device}: only cpu and cuda (which is also what PyTorch calls ROCm) are supported")
    if kind == "cuda" and not torch.cuda.is_available():
        fail(f"--device {device}: {why_no_gpu()}")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: there are only {torch.cuda.device_count()} CUDA or ROCm devices here")
    return device

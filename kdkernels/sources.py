"""Sources: where a distribution over the vocabulary comes from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LMHead", "Logits", "Source"]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(owner: str, name: str, value: object) -> None:
    """``name`` must be a dense floating-point tensor of a supported type."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in LOGIT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in LOGIT_DTYPES)
        raise TypeError(f"{owner}: {name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{owner}: {name} must be a dense tensor, got layout {value.layout}")


def check_number(owner: str, name: str, value: float | None, positive: bool) -> float | None:
    """``name`` must be None or a finite number; positive, or at least not zero."""
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number) or (number <= 0 if positive else number == 0):
        kind = "positive" if positive else "other than 0"
        raise ValueError(f"{owner}: {name} must be None or a finite number {kind}, got {value!r}")
    return number


class Logits:
    """A tensor of logits ``[..., V]``. A bare tensor means the same.

    Args:
        tensor: logits, float32, bfloat16, float16 or float64; entries of -inf are masked vocabulary.
        donate: permits the gradient to be written over ``tensor``, which halves the peak memory of a loss with a scalar
            reduction. The logits are then gone: nothing else may use them, and second derivatives are refused. It is a
            permission; where the kernels cannot use it, nothing happens.
    """

    __slots__ = ("donate", "tensor")

    def __init__(self, tensor: Tensor, *, donate: bool = False) -> None:
        check_floating("Logits", "tensor", tensor)
        if tensor.dim() < 1:
            raise ValueError("Logits: tensor must have the shape [..., V], got a 0-d tensor")
        self.tensor = tensor
        self.donate = bool(donate)


class LMHead:
    """Logits that are never stored whole: ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    Args:
        hidden: hidden states ``[..., H]``.
        weight: weight of the language-model head ``[V, H]``, in the dtype of ``hidden`` (under autocast any).
        bias: ``[V]`` or None.
        softcap: ``c`` in ``c * tanh(logit / c)`` (Gemma 2 uses 30), or None.
        logit_scale: factor on the logits before the softcap (Cohere's ``logit_scale``, the inverse of Granite's
            ``logits_scaling``), or None.
    """

    __slots__ = ("bias", "hidden", "logit_scale", "softcap", "weight")

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
    ) -> None:
        check_floating("LMHead", "hidden", hidden)
        check_floating("LMHead", "weight", weight)
        if hidden.dim() < 1:
            raise ValueError("LMHead: hidden must have the shape [..., H], got a 0-d tensor")
        if weight.dim() != 2:
            raise ValueError(f"LMHead: weight must have the shape [V, H], got {tuple(weight.shape)}")
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LMHead: hidden has size {hidden.shape[-1]} and weight {tuple(weight.shape)} expects {weight.shape[1]}"
            )
        if bias is not None:
            check_floating("LMHead", "bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"LMHead: bias must have the shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.device != hidden.device:
                raise ValueError(f"LMHead: {name} is on {tensor.device} and hidden on {hidden.device}")
            if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
                raise TypeError(
                    f"LMHead: {name} is {tensor.dtype} and hidden {hidden.dtype}; they may differ only under autocast"
                )
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.softcap = check_number("LMHead", "softcap", softcap, positive=True)
        self.logit_scale = check_number("LMHead", "logit_scale", logit_scale, positive=False)


Source = Tensor | Logits | LMHead

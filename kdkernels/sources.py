"""Sources: where a distribution over the vocabulary comes from."""

from __future__ import annotations

from torch import Tensor

from kdkernels.autocast import autocast_dtype
from kdkernels.checks import check_flag, check_floating, check_real

__all__ = ["LMHead", "Logits", "Source"]


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
        check_floating("Logits: tensor", tensor)
        if tensor.dim() < 1:
            raise ValueError("Logits: tensor must have the shape [..., V], got a 0-d tensor")
        self.tensor = tensor
        self.donate = check_flag("Logits: donate", donate)


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
        check_floating("LMHead: hidden", hidden)
        check_floating("LMHead: weight", weight)
        if hidden.dim() < 1:
            raise ValueError("LMHead: hidden must have the shape [..., H], got a 0-d tensor")
        if weight.dim() != 2:
            raise ValueError(f"LMHead: weight must have the shape [V, H], got {tuple(weight.shape)}")
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LMHead: hidden has size {hidden.shape[-1]} and weight {tuple(weight.shape)} expects {weight.shape[1]}"
            )
        if bias is not None:
            check_floating("LMHead: bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"LMHead: bias must have the shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.device != hidden.device:
                raise ValueError(f"LMHead: {name} is on {tensor.device} and hidden on {hidden.device}")
            if tensor.dtype != hidden.dtype and autocast_dtype(hidden.device.type) is None:
                raise TypeError(
                    f"LMHead: {name} is {tensor.dtype} and hidden {hidden.dtype}; they may differ only under autocast"
                )
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.softcap = None if softcap is None else check_real("LMHead: softcap", softcap, positive=True)
        self.logit_scale = None if logit_scale is None else check_real("LMHead: logit_scale", logit_scale)
        if self.logit_scale == 0:
            raise ValueError("LMHead: logit_scale must be a number other than 0, got 0")


Source = Tensor | Logits | LMHead

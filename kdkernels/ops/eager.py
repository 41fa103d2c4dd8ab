"""What eager mode does without the dispatcher, which would cost more than a small loss does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["save", "saved", "take_scaled", "traced"]

# Questions to torch that have no public form; without them the careful answer is assumed.
_keeps_graph: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_dispatch_stack: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def keeps_graph() -> bool:
    """Whether the backward that is running may be repeated, so that what was saved must survive it."""
    return bool(_keeps_graph())


def traced(*tensors: Tensor | None) -> bool:
    """Whether an operator must be seen by the dispatcher: under compilation, for tensor subclasses and in modes."""
    if torch.compiler.is_compiling():
        return True
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter):
            return True
    return bool(_dispatch_stack())


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, also for tensors made in inference mode, such as a teacher's.

    Torch refuses to save these because their versions are not counted; outside inference mode nothing can modify them.
    """
    ctx.unversioned = {
        place: tensor for place, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()
    }
    ctx.save_for_backward(*(None if place in ctx.unversioned else tensor for place, tensor in enumerate(tensors)))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What ``save`` was given."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if not ctx.unversioned:
        return tensors
    return tuple(ctx.unversioned.get(place, tensor) for place, tensor in enumerate(tensors))


def take_scaled(ctx: Any, factor: Tensor) -> list[Tensor | None]:
    """The gradients made in the forward, times the upstream one; the last backward gives them away.

    ``ctx.gradients`` holds the only reference to each, so that what receives it may keep it without a copy.
    """
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError("distillation_loss: trying to backward a second time; use retain_graph=True the first time")
    if keeps_graph():
        return [None if gradient is None else gradient * factor for gradient in gradients]
    ctx.gradients = None
    # On the CPU looking at the number is free; elsewhere it would synchronise.
    if factor.device.type == "cpu" and factor.item() == 1:
        return list(gradients)
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]

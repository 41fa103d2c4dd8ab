"""What eager mode does without the dispatcher, which would cost more than a small loss does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["save", "saved", "take_scaled", "take_scaled_rows", "traced"]

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


def save(ctx: Any, *tensors: Tensor | list[Tensor | None] | None) -> None:
    """``ctx.save_for_backward``, also for lists of tensors, and for tensors made in inference mode, such as a teacher's.

    Torch refuses to save these because their versions are not counted; outside inference mode nothing can modify them.
    """
    ctx.lists = {place: len(entry) for place, entry in enumerate(tensors) if isinstance(entry, list)}
    flat = [tensor for entry in tensors for tensor in (entry if isinstance(entry, list) else (entry,))]
    ctx.unversioned = {
        place: tensor for place, tensor in enumerate(flat) if tensor is not None and tensor.is_inference()
    }
    ctx.save_for_backward(*(None if place in ctx.unversioned else tensor for place, tensor in enumerate(flat)))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What ``save`` was given."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if ctx.unversioned:
        tensors = tuple(ctx.unversioned.get(place, tensor) for place, tensor in enumerate(tensors))
    if not ctx.lists:
        return tensors
    entries: list[Any] = list(tensors)
    for place, length in ctx.lists.items():  # by rising place, so that what stands before is folded already
        entries[place : place + length] = [entries[place : place + length]]
    return tuple(entries)


def take(ctx: Any) -> tuple[list[Tensor | None], bool]:
    """The gradients made in the forward, and whether they may be changed: the last backward gives them away.

    ``ctx.gradients`` holds the only reference to each, so that what receives it may keep it without a copy.
    """
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError("kdkernels: trying to backward a second time; use retain_graph=True the first time")
    if keeps_graph():
        return list(gradients), False
    ctx.gradients = None
    return list(gradients), True


def take_scaled(ctx: Any, factor: Tensor) -> list[Tensor | None]:
    """The gradients made in the forward, times the upstream one of a scalar."""
    gradients, ours = take(ctx)
    if not ours:
        return [None if gradient is None else gradient * factor for gradient in gradients]
    # On the CPU looking at the number is free; elsewhere it would synchronise.
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradients
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def take_scaled_rows(ctx: Any, factors: Tensor) -> list[Tensor | None]:
    """The gradients ``[N, ...]`` made in the forward, each row times the upstream one of its value ``[N]``."""
    gradients, ours = take(ctx)
    column = factors.unsqueeze(-1)
    return [
        None if gradient is None else gradient.mul_(column) if ours else (gradient * column).to(gradient.dtype)
        for gradient in gradients
    ]

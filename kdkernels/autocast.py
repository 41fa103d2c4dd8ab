"""Autocast on devices of any type; some, such as "meta", do not know it and torch answers questions about it with an error."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["autocast_disabled", "autocast_dtype"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on a device of this type, None where it is not enabled."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_disabled(device: str) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on devices of this type."""
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else contextlib.nullcontext()

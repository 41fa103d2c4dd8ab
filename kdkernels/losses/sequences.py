"""Sources and labels as batches of sequences ``[B, T]``, and the means over them that losses take."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from kdkernels.checks import check_dense, check_integral
from kdkernels.functional.token_log_probs import token_log_probs
from kdkernels.sources import LMHead, Logits, Source

__all__ = [
    "IGNORED",
    "batch_of",
    "check_ids",
    "check_mask",
    "counted_labels",
    "cross_entropy",
    "detached",
    "mean_over",
    "next_tokens",
    "take_tokens",
    "tensor_of",
    "with_tensor",
]

IGNORED = -100
"""The label of tokens that do not count."""


def tensor_of(name: str, source: Source) -> Tensor:
    """The logits or hidden states."""
    found = source.hidden if isinstance(source, LMHead) else source.tensor if isinstance(source, Logits) else source
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, kd.Logits or kd.LMHead, got {type(source).__name__}")
    return found


def batch_of(name: str, source: Source) -> torch.Size:
    """The shape ``[B, T]`` of a source of sequences."""
    shape = tensor_of(name, source).shape
    if len(shape) != 3:
        raise ValueError(f"{name} must have the shape [B, T, ...], got {tuple(shape)}")
    return torch.Size(shape[:-1])


def with_tensor(source: Source, tensor: Tensor) -> Source:
    """The same source of other tokens."""
    if not isinstance(source, LMHead):
        return tensor
    head = copy(source)
    head.hidden = tensor
    return head


def detached(source: Source) -> Source:
    """The same source, to which no gradient flows."""
    found = with_tensor(source, tensor_of("teacher", source).detach())
    if isinstance(found, LMHead):
        found.weight = found.weight.detach()
        found.bias = None if found.bias is None else found.bias.detach()
    return found


def take_tokens(source: Source, places: Tensor) -> Source:
    """The tokens at ``places`` int64 ``[B, n]`` of each sequence of a source ``[B, T]``; below 0: any of them."""
    tensor = tensor_of("source", source)
    starts = torch.arange(tensor.shape[0], device=tensor.device).unsqueeze(-1) * tensor.shape[1]
    rows = (starts + places.clamp(min=0)).reshape(-1)
    taken = tensor.reshape(-1, tensor.shape[-1]).index_select(0, rows)
    return with_tensor(source, taken.reshape(*places.shape, tensor.shape[-1]))


def next_tokens(labels: Tensor, fill: int = IGNORED) -> Tensor:
    """``[B, T]``: at every token the label of the one behind it, which is what is predicted there."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), fill)], 1)


def check_ids(name: str, ids: Tensor, shape: torch.Size, owner: str) -> None:
    """Ids or labels must be one for each token of ``owner``."""
    check_integral(name, ids)
    if ids.shape != shape:
        raise ValueError(f"{name} must have the shape of the {owner}'s tokens, {tuple(shape)}, got {tuple(ids.shape)}")


def check_mask(name: str, mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask like the ids ``like``; None: all True."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    check_dense(name, mask, (torch.bool,))
    if mask.shape != like.shape:
        raise ValueError(f"{name} must have the shape {tuple(like.shape)}, got {tuple(mask.shape)}")
    return mask


def counted_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens count: those with a label, where the mask, if any, is True."""
    given = labels != IGNORED
    return given if mask is None else mask & given


def mean_over(values: Tensor, counted: Tensor, dim: int | None = None) -> Tensor:
    """The mean of the values that count, 0 where there are none."""
    values = values.masked_fill(~counted, 0)
    if dim is None:
        return values.sum() / counted.sum().clamp(min=1)
    return values.sum(dim) / counted.sum(dim).clamp(min=1)


def cross_entropy(student: Source, labels: Tensor) -> Tensor:
    """The mean over the labels ``[B, T]`` that are not ``IGNORED``, each predicted by the token in front of it."""
    following = next_tokens(labels)
    return -mean_over(token_log_probs(student, following), following != IGNORED)

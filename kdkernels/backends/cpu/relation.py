"""The family relation on the CPU: whole problems in one kernel, where their numbers are float32 and their shapes suit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.cpu.launching import address, module
from kdkernels.backends.relations import Relations
from kdkernels.backends.rows import RowSpec

__all__ = ["relation", "relation_applies"]

WIDTHS = 16
"""The widths of left and right must be multiples of this."""

PROBLEMS = 8
"""With fewer, matrix products that share out one problem are better. Not the threads: results must not depend on them."""


def relation_applies(relations: Relations) -> bool:
    """Whether the kernel takes these relations."""
    widths = {tensor.shape[-1] for tensor in relations.tensors if tensor is not None}
    spec = relations.spec._replace(labels=None, active=None)
    plain = not any(isinstance(field, Tensor) for field in spec) and spec == RowSpec(*spec[:3])
    return (
        plain
        and relations.dtype == torch.float32
        and relations.shape[0] >= PROBLEMS
        and all(width % WIDTHS == 0 for width in widths)
    )


def relation(
    relations: Relations,
    tensors: Sequence[Tensor | None],
    scales: tuple[Tensor, Tensor | None] | None,
    gradients: Sequence[Tensor | None],
    divergence: Tensor,
    cross_entropy: Tensor,
) -> None:
    """Writes the values of the rows and the gradients of ``sum(scales * values)``, None where not wanted.

    ``tensors`` are those of the relations, float32, contiguous and blank where nothing counts.
    """

    def side(first: int, scale: float) -> tuple[Any, ...]:
        left, right = tensors[first : first + 2]
        width = 0 if left is None else left.shape[-1]
        found = gradients[first : first + 2]
        return address(left), address(right), width, scale, address(found[0]), address(found[1])

    spec, masks = relations.spec, relations.masks
    columns = None if masks.columns is None else masks.columns.contiguous()
    pairs = None if masks.pairs is None else masks.pairs.contiguous()
    module().relation(
        torch.get_num_threads(),
        *relations.shape,
        side(0, relations.student_scale),
        side(2, relations.teacher_scale),
        address(columns),
        address(pairs),
        pairs is not None and pairs.dim() == 2,
        masks.causal,
        *spec[:3],
        address(spec.labels),
        address(spec.active),
        address(divergence),
        address(cross_entropy),
        *((0, 0) if scales is None else (address(scales[0]), address(scales[1]))),
    )

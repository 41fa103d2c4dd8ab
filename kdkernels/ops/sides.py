"""The part of an operator's schema that gives two sources: logits, or a language-model head with its weight and bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kdkernels.backends.chunked_head import Needs
from kdkernels.backends.rows import Side

__all__ = [
    "SIDES",
    "SIDES_LENGTH",
    "TENSORS",
    "Arguments",
    "gradients_like",
    "or_empty",
    "pack_sides",
    "scattered",
    "side_needs",
    "unpack_sides",
    "wanted_gradients",
]

SIDES = (
    "Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, "
    "Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale"
)
SIDES_LENGTH = 8
TENSORS = (0, 1, 2, 4, 5, 6)
"""Where the tensors stand among the arguments of ``SIDES``."""

Arguments = tuple[Any, ...]


def unpack_sides(sides: Arguments) -> tuple[Side, Side]:
    return Side(*sides[:4]), Side(*sides[4:])


def pack_sides(student: Side, teacher: Side) -> Arguments:
    return (*student[:4], *teacher[:4])


def side_needs(wanted: list[bool]) -> tuple[Needs, Needs]:
    return Needs(*wanted[:3]), Needs(*wanted[3:])


def wanted_gradients(sides: Arguments) -> list[bool]:
    return [sides[place] is not None and sides[place].requires_grad for place in TENSORS]


def gradients_like(sides: Arguments, wanted: list[bool]) -> list[Tensor]:
    tensors = [sides[place] for place in TENSORS]
    return [
        sides[0].new_empty(0) if not want else tensor.new_empty(tensor.shape)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]


def or_empty(gradients: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator returns an empty tensor for a gradient that is not wanted."""
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


def scattered(gradients: list[Tensor | None]) -> Arguments:
    """The gradients at the places of ``SIDES``."""
    places = dict(zip(TENSORS, gradients, strict=True))
    return tuple(places.get(place) for place in range(SIDES_LENGTH))

"""The part of an operator's schema that says how rows are read: a ``RowSpec`` on its way in and back out.

Numbers that may change from step to step go in as tensors. Under ``torch.compile`` a float argument of an operator is a
constant, and every new value of it would compile the whole graph anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.rows import Composition, RowSpec, Side

__all__ = ["SPEC", "SPEC_LENGTH", "TAGS", "as_numbers", "has_labels", "pack_spec", "spec_gradients", "unpack_spec"]

SPEC = (
    "int kind, Tensor numbers, Tensor? student_temperatures, Tensor? teacher_temperatures, Tensor? labels, Tensor? active, "
    "Tensor? gradient_seed, Tensor?[] more"
)

SPEC_LENGTH = 8

MORE = RowSpec._fields.index("parameters")
PLAIN = tuple(RowSpec._field_defaults[name] for name in RowSpec._fields[MORE:])

# Kernels are launched with numbers read on the host, which a captured CUDA graph would keep for ever.
TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def as_numbers(values: Sequence[float]) -> Tensor:
    """A float64 tensor on the CPU; in a compiled graph, products of a constant, which is what keeps the values variable."""
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


def pack_spec(spec: RowSpec) -> tuple[Any, ...]:
    """The arguments of ``SPEC``. What few losses have is in the list ``more``, which else is empty."""
    numbers = [
        spec.a,
        spec.b,
        spec.student_temperature,
        spec.teacher_temperature,
        spec.student_softcap,
        spec.teacher_softcap,
        spec.gradient_tolerance,
    ]
    more: list[Tensor | None] = []
    if spec[MORE:] != PLAIN:
        numbers += [spec.target_weight, spec.rest_weight]
        more = [spec.parameters, spec.targets, spec.target_weights, spec.rest_weights, spec.vocabulary_order]
        for composition in (spec.student_composition, spec.teacher_composition):
            numbers.append(-1.0 if composition is None else float(len(composition.others)))
            if composition is None:
                continue
            more += composition[1:]
            for other in composition.others:
                numbers += [other.scale, other.softcap]
                more += other[:3]
    tensors = spec.student_temperatures, spec.teacher_temperatures, spec.labels, spec.active, spec.gradient_seed
    return spec.kind, as_numbers(numbers), *tensors, more


def unpack_spec(packed: Sequence[Any]) -> RowSpec:
    """The specification from the arguments of ``SPEC``."""
    kind, numbers, student_temperatures, teacher_temperatures, labels, active, gradient_seed, more = packed
    a, b, student_temperature, teacher_temperature, student_softcap, teacher_softcap, tolerance, *rest = (
        numbers.tolist()
    )
    spec = RowSpec(
        kind,
        a,
        b,
        student_temperature,
        student_temperatures,
        teacher_temperature,
        teacher_temperatures,
        student_softcap,
        teacher_softcap,
        labels,
        active,
        tolerance,
        gradient_seed,
    )
    return with_more(spec, rest, more) if rest else spec


def with_more(spec: RowSpec, numbers: Sequence[float], more: Sequence[Tensor | None]) -> RowSpec:
    """The rest of the specification."""
    (target_weight, rest_weight), left = numbers[:2], iter(numbers[2:])
    parameters, targets, target_weights, rest_weights, vocabulary_order = more[:5]
    tensors = iter(more[5:])
    compositions: list[Composition | None] = []
    for _ in range(2):
        count = int(next(left))
        own = [next(tensors) for _ in Composition._fields[1:]] if count >= 0 else []
        others = tuple(
            Side(*(next(tensors) for _ in range(3)), scale=next(left), softcap=next(left))  # type: ignore[misc,arg-type]
            for _ in range(count)
        )
        compositions.append(Composition(others, *own) if count >= 0 else None)
    return spec._replace(
        parameters=parameters,
        targets=targets,
        target_weight=target_weight,
        target_weights=target_weights,
        rest_weight=rest_weight,
        rest_weights=rest_weights,
        student_composition=compositions[0],
        teacher_composition=compositions[1],
        vocabulary_order=vocabulary_order,
    )


def has_labels(packed: Sequence[Any]) -> bool:
    """The same question as ``unpack_spec(packed).labels is not None``, which a graph in the making may ask."""
    return packed[4] is not None


def spec_gradients(ctx: Any) -> tuple[Any, ...]:
    """Autograd's answer for these arguments, the last of an operator: none of them has a gradient.

    An operator's backward answers for each tensor of a list, that of an autograd function for the list.
    """
    more = ctx.needs_input_grad[-1]
    return *(None,) * (SPEC_LENGTH - 1), [None] * len(more) if isinstance(more, list | tuple) else None

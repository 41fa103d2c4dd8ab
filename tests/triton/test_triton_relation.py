"""Relations on the Triton backend: in the interpreter against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accuracy
import interpreted_relation
import pytest
import torch
from torch import Tensor

import kdkernels as kd

Worker = Callable[..., Any]

CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "lengths": torch.tensor([5, 3])},
    "reverse, with labels": {
        "divergence": kd.ReverseKL(),
        "labels": torch.tensor([[0, 1, 4, -100, 2]] * 2),
        "ce_weight": 0.5,
        "reduction": "none",
        "memory_budget": 80,
    },
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(interpreter: Worker, name: str, given: list[Tensor], options: dict[str, Any]) -> None:
    call = interpreted_relation.results
    found = interpreter(call, name, given, options)
    options = {key: value for key, value in options.items() if key != "memory_budget"}
    plain = call(name, given, options, "reference")
    truth = call(name, [tensor.double() for tensor in given], options, "reference")
    assert len(found) == len(truth)
    for place, (one, other, right) in enumerate(zip(found, plain, truth, strict=True)):
        assert bool(right.any())
        flat = [tensor.reshape(1, -1) for tensor in (one, other, right)]
        accuracy.check(f"output {place}", *flat, right.abs().max().expand(1, right.numel()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_relations(interpreter: Worker, case: str) -> None:
    given = [random(2, 5, width, seed=seed) for seed, width in enumerate((4, 4, 3, 3))]
    check(interpreter, "relation_loss", given, CASES[case])

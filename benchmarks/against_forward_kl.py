"""A loss beside the fused forward KL and its own plain PyTorch form, value and gradient to the student, in one run."""

from __future__ import annotations

from collections.abc import Callable

from reporting import SideBySide
from torch import Tensor

import kdkernels as kd

__all__ = ["FORWARD_KL", "measure_against_forward_kl"]

FORWARD_KL = "kdkernels forward KL"
EAGER_FACTOR = 4
"""That the eager form shall take at least."""


def measure_against_forward_kl(
    side_by_side: SideBySide,
    name: str,
    student: Tensor,
    teacher: Tensor,
    ours: Callable[[], Tensor],
    eager: Callable[[], Tensor],
    bound: float,
) -> None:
    """Both forms make the loss of ``student`` ``[N, V]``; ours shall take at most ``bound`` forward KLs from ``teacher``."""
    tokens, vocab = student.shape

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            student.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return call

    mine, plain = f"kdkernels {name}", f"eager {name}"
    side_by_side.measure(
        f"{name}, forward and backward: {tokens} tokens × {vocab:,}, float32, cpu",
        {mine: step(ours), FORWARD_KL: step(lambda: kd.distillation_loss(student, teacher)), plain: step(eager)},
        rounds=7,
        columns={"operation": name, "tokens": tokens, "vocab": vocab, "dtype": "float32", "device": "cpu"},
    )
    side_by_side.ratio(f"{name} in forward KL", mine, FORWARD_KL, bound)
    side_by_side.ratio(f"{name}: eager in ours", plain, mine, EAGER_FACTOR, at_least=True)

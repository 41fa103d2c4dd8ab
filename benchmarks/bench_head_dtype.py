"""LM heads whose matrix products run in bfloat16 beside float32, and one such product by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.workloads import MODELS, Operation, Workload

TOKENS = 512
MODEL = MODELS["smollm2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_logits(side_by_side: SideBySide) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, MODEL.hidden, generator=generator)
    weight = torch.randn(MODEL.vocab, MODEL.hidden, generator=generator)

    def product(dtype: torch.dtype) -> Callable[[], Tensor]:
        left, right = hidden.to(dtype), weight.to(dtype).t()
        out = left.new_empty(TOKENS, MODEL.vocab)
        return lambda: torch.mm(left, right, out=out)

    calls = {name: product(dtype) for name, dtype in DTYPES.items()}
    side_by_side.measure(f"torch.mm, {TOKENS} × {MODEL.hidden} by {MODEL.hidden} × {MODEL.vocab:,}", calls, rounds=9)


def test_forward_kl(side_by_side: SideBySide) -> None:
    workload = Workload(Operation.HEAD, kd.ForwardKL(), TOKENS, MODEL.vocab, MODEL.hidden, MODEL.hidden)
    inputs = workload.inputs()
    assert inputs.student_weight is not None
    assert inputs.teacher_weight is not None
    student, teacher = (inputs.student, inputs.student_weight), (inputs.teacher, inputs.teacher_weight)

    def gradients(dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            heads = (kd.LMHead(*tensors, compute_dtype=dtype) for tensors in (student, teacher))
            return torch.autograd.grad(kd.distillation_loss(*heads), student)

        return run

    title = f"two heads in float32, forward and backward: {TOKENS} tokens × {MODEL.vocab:,}, hidden {MODEL.hidden}"
    side_by_side.measure(title, {name: gradients(dtype) for name, dtype in DTYPES.items()}, rounds=5)

"""Losses whose memory ``test_memory`` measures, each in a process of its own. Only that process runs what is here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kdkernels as kd
from kdkernels.benchmarking.memory import resident_bytes

TOKENS, VOCAB, HIDDEN = 512, 49_152, 128

Inputs = dict[str, Tensor]
Step = Callable[[Inputs, dict[str, Any]], Sequence[Tensor | None]]


def logits(tokens: int, grad: bool = True) -> Inputs:
    return {
        "student": torch.randn(tokens, VOCAB).requires_grad_(grad),
        "teacher": torch.randn(tokens, VOCAB),
    }


def heads(tokens: int) -> Inputs:
    return {
        "hidden": torch.randn(tokens, HIDDEN).requires_grad_(),
        "weight": torch.randn(VOCAB, HIDDEN).mul_(0.1).requires_grad_(),
        "teacher_hidden": torch.randn(tokens, HIDDEN),
        "teacher_weight": torch.randn(VOCAB, HIDDEN).mul_(0.1),
    }


def head_sources(given: Inputs) -> tuple[kd.LMHead, kd.LMHead]:
    return kd.LMHead(given["hidden"], given["weight"]), kd.LMHead(given["teacher_hidden"], given["teacher_weight"])


def backward(loss: Tensor, given: Inputs) -> list[Tensor | None]:
    loss.sum().backward()
    return [tensor.grad for tensor in given.values()]


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


def fused_heads(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return backward(kd.distillation_loss(*head_sources(given), **options), given)


def fused_heads_without_gradient(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    with torch.no_grad():
        return [kd.distillation_loss(*head_sources(given), **options)]


def statistics_of_heads(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return list(kd.token_statistics(*head_sources(given), **options))


def plain_heads(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    student = F.linear(given["hidden"], given["weight"])
    return backward(plain_kl(student, F.linear(given["teacher_hidden"], given["teacher_weight"])), given)


def fused_logits(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return backward(kd.distillation_loss(given["student"], given["teacher"], **options), given)


def donated_logits(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return backward(kd.distillation_loss(kd.Logits(given["student"], donate=True), given["teacher"], **options), given)


def fused_logits_without_gradient(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    with torch.no_grad():
        return [kd.distillation_loss(given["student"], given["teacher"], **options)]


def statistics_of_logits(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return list(kd.token_statistics(given["student"], given["teacher"], **options))


def plain_logits(given: Inputs, options: dict[str, Any]) -> list[Tensor | None]:
    return backward(plain_kl(given["student"], given["teacher"]), given)


STEPS: dict[str, tuple[Step, Callable[[int], Inputs]]] = {
    step.__name__: (step, heads if "heads" in step.__name__ else logits)
    for step in (
        fused_heads,
        fused_heads_without_gradient,
        statistics_of_heads,
        plain_heads,
        fused_logits,
        donated_logits,
        fused_logits_without_gradient,
        statistics_of_logits,
        plain_logits,
    )
}


def peak_extra_bytes(name: str, options: dict[str, Any]) -> int:
    """How far the resident size rises above where it stands with the inputs made."""
    step, make = STEPS[name]
    step(make(2), options)  # loads what is loaded once
    given = make(TOKENS)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before = resident_bytes("VmRSS")
    kept = step(given, options)
    peak = resident_bytes("VmHWM")
    assert all(tensor is None or bool(tensor.isfinite().all()) for tensor in kept)
    return peak - before

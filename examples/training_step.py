"""One step of distillation: hidden states of teacher and student, a loss between their heads, an optimiser step.

The loss comes in two forms that compute the same number: ``fused`` by kdkernels, which never stores the logits, and
``plain`` by ordinary PyTorch, which stores all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import plain_pytorch
import torch
from torch import Tensor

import kdkernels as kd

GRADIENT_CLIP = 1.0
WARM_UP_SHARE = 0.1  # of the steps
FINAL_RATE_SHARE = 0.1  # of the learning rate, at the last step

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DivergenceChoice:
    make: Callable[..., kd.Divergence]
    defaults: Mapping[str, float] = field(default_factory=dict)


DIVERGENCES: Mapping[str, DivergenceChoice] = {
    "forward_kl": DivergenceChoice(kd.ForwardKL),
    "reverse_kl": DivergenceChoice(kd.ReverseKL),
    "jsd": DivergenceChoice(kd.JSD, {"beta": 0.5}),
    "skew_forward_kl": DivergenceChoice(kd.SkewForwardKL, {"alpha": 0.1}),
    "skew_reverse_kl": DivergenceChoice(kd.SkewReverseKL, {"alpha": 0.1}),
    "tvd": DivergenceChoice(kd.TVD),
    "jeffreys": DivergenceChoice(kd.Jeffreys, {"weight": 0.5}),
    "alpha": DivergenceChoice(kd.AlphaDivergence, {"alpha": 0.5}),
    "renyi": DivergenceChoice(kd.Renyi, {"alpha": 0.5}),
    "ab": DivergenceChoice(kd.ABDivergence, {"alpha": 0.5, "beta": 0.5}),
    "hellinger": DivergenceChoice(kd.Hellinger),
}


HEAD_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LossSettings:
    """Everything that defines the loss.

    ``parameters`` are those of the divergence. ``head_dtype``, "float32" or "bfloat16", is what both heads' matrix products
    run in; None: that of the models.
    """

    divergence: str = "forward_kl"
    parameters: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    backend: str | None = None
    gradient_tolerance: float = 0.0
    gradient_rounding: str = "nearest"
    head_dtype: str | None = None

    def describe(self) -> kd.Divergence:
        return DIVERGENCES[self.divergence].make(**self.parameters)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return None if self.head_dtype is None else HEAD_DTYPES[self.head_dtype]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def fused_loss(settings: LossSettings) -> LossFunction:
    """Mean divergence per token times temperature squared; takes ``hidden [..., H]`` and ``weight [V, H]`` of each."""
    divergence, dtype = settings.describe(), settings.compute_dtype

    def loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return kd.distillation_loss(
            kd.LMHead(student_hidden, student_weight, compute_dtype=dtype),
            kd.LMHead(teacher_hidden, teacher_weight, compute_dtype=dtype),
            divergence,
            temperature=settings.temperature,
            temperature_squared=True,
            gradient_tolerance=settings.gradient_tolerance,
            gradient_rounding=settings.gradient_rounding,
            backend=settings.backend,
        )

    return loss


def plain_loss(settings: LossSettings) -> LossFunction:
    """The same loss in plain PyTorch."""
    divergence, dtype = plain_pytorch.DIVERGENCES[settings.divergence], settings.compute_dtype

    def loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = plain_pytorch.log_probabilities(teacher_hidden, teacher_weight, settings.temperature, dtype)
        log_q = plain_pytorch.log_probabilities(student_hidden, student_weight, settings.temperature, dtype)
        tokens = student_hidden.shape[:-1].numel()
        return divergence(log_p, log_q, **settings.parameters) * (settings.temperature**2 / tokens)

    return loss


LOSSES: Mapping[str, Callable[[LossSettings], LossFunction]] = {"fused": fused_loss, "plain": plain_loss}


def make_optimizer(student: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to ``FINAL_RATE_SHARE``."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, steps - warm_up)
        return FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def training_step(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    token_ids: Tensor,
    loss_function: LossFunction,
) -> Tensor:
    """Train the student on ``token_ids [sequences, length]``; the loss before the update, a detached scalar.

    Both models are run up to their last hidden states: the logits belong to the loss.
    """
    with torch.no_grad():
        teacher_hidden = teacher.model(token_ids).last_hidden_state
    return student_step(
        student,
        optimizer,
        token_ids,
        lambda hidden, weight: loss_function(hidden, weight, teacher_hidden, teacher.lm_head.weight),
    )


def student_step(
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    token_ids: Tensor,
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The student's part of a step: ``loss_function`` takes its hidden states and head weight."""
    loss = loss_function(student.model(token_ids).last_hidden_state, student.lm_head.weight)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), GRADIENT_CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

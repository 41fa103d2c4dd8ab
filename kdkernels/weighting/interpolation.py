"""How far a target between student and teacher has moved: the schedule of TAID."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdkernels.checks import check_integer, check_real

__all__ = ["TAIDSchedule"]


class TAIDSchedule(nn.Module):
    """The share of the teacher in TAID's target, which grows with the loss's progress.

    After a step with loss L, and L' before it: ``r = (L' - L) / (L' + 1e-15)``, ``m <- beta m + (1 - beta) r``,
    ``c <- min(end, max(start + (end - start) step / total_steps, c + alpha sigmoid(m) (1 - c)))``. The first step only keeps
    its loss. L is the soft cross-entropy: a KL divergence, which lacks the changing entropy of the target, would drive another
    schedule.

    All of the state is tensors on the device of the losses, updated without a synchronisation; ``state_dict`` holds it.

    Source: Shing et al. 2025 (ICLR; arXiv 2501.16937). Confidence: from the authors' code.

    Args:
        total_steps: of the training.
        start, end: the first share, 0.4 in the code (one script has 0.2), and the last.
        alpha: the largest increase of a step.
        beta: of the running mean m.
    """

    coefficient: Tensor
    """The share of the teacher, a 0-d tensor."""
    previous_loss: Tensor
    momentum: Tensor
    step: Tensor

    def __init__(
        self, total_steps: int, start: float = 0.4, end: float = 1.0, *, alpha: float = 5e-4, beta: float = 0.99
    ) -> None:
        super().__init__()
        self.total_steps = check_integer("total_steps", total_steps)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        self.start, self.end = check_real("start", start), check_real("end", end)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end must have 0 <= start <= end <= 1, got {start!r} and {end!r}")
        self.alpha, self.beta = check_real("alpha", alpha), check_real("beta", beta)
        for name, value in (
            ("coefficient", self.start),
            ("previous_loss", math.inf),
            ("momentum", 0.0),
            ("step", 0.0),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @torch.no_grad()
    def update(self, loss: Tensor, step: int | None = None) -> None:
        """Moves the share after a step.

        Args:
            loss: that of the step, 0-d.
            step: its number, from 0; None: that after the last one's.

        Raises:
            ValueError: ``loss`` is not 0-d.
        """
        if loss.dim() != 0:
            raise ValueError(f"loss must be 0-d, got the shape {tuple(loss.shape)}")
        if self.coefficient.device != loss.device:
            self.to(loss.device)
        loss = loss.detach().to(self.coefficient.dtype)
        if step is not None:
            self.step.fill_(check_integer("step", step))
        first = self.previous_loss.isinf()
        change = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * change
        adaptive = self.coefficient + self.alpha * torch.sigmoid(momentum) * (1 - self.coefficient)
        linear = self.start + (self.end - self.start) * self.step / self.total_steps
        moved = torch.maximum(linear, adaptive).clamp(max=self.end)
        self.momentum.copy_(torch.where(first, self.momentum, momentum))
        self.coefficient.copy_(torch.where(first, self.coefficient, moved))
        self.previous_loss.copy_(loss)
        self.step.add_(1)

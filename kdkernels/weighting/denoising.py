"""Weights of samples whose labels may be wrong, from the distribution of their losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.checks import check_count, check_floating, check_real

__all__ = ["LossMixture", "denoising_weights", "fit_loss_mixture"]


class LossMixture(NamedTuple):
    """Two normal distributions of losses, the first with the lower mean: clean samples; each tensor float64 ``[2]``."""

    shares: Tensor
    means: Tensor
    deviations: Tensor

    def log_densities(self, losses: Tensor, inflation: float = 1.0) -> Tensor:
        """``[2, ...]``, log(share times density), the clean component's deviation multiplied by ``inflation``."""
        shape = (2, *(1,) * losses.dim())
        clean, noisy = self.deviations.unbind()
        deviations = torch.stack([inflation * clean, noisy]).reshape(shape)
        distance = (losses.double() - self.means.reshape(shape)) / deviations
        return self.shares.log().reshape(shape) - deviations.log() - 0.5 * (distance.square() + math.log(2 * math.pi))


def fit_loss_mixture(losses: Tensor, *, iterations: int = 50, floor: float = 1e-3) -> LossMixture:
    """A mixture of two normal distributions of losses, by expectation maximisation from the quartiles on.

    A fixed number of iterations on the device of the losses: nothing waits for the host.

    Args:
        losses: of all samples of an epoch, ``[N]``.
        iterations: at least 1.
        floor: the least deviation of a component.
    """
    check_floating("losses", losses)
    floor = check_real("floor", floor, positive=True)
    if losses.dim() != 1 or losses.shape[0] < 2:
        raise ValueError(f"losses must have the shape [N] with N of at least 2, got {tuple(losses.shape)}")
    values = losses.detach().double()
    means = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device=values.device))
    spread = values.std(unbiased=False).clamp(min=floor)
    mixture = LossMixture(torch.full_like(means, 0.5), means, torch.stack([spread, spread]))
    for _ in range(check_count("iterations", iterations)):
        belongs = mixture.log_densities(values).softmax(0)
        mass = belongs.sum(-1).clamp(min=1e-12)
        means = (belongs * values).sum(-1) / mass
        variance = (belongs * (values - means.unsqueeze(-1)).square()).sum(-1) / mass
        mixture = LossMixture(mass / mass.sum(), means, variance.sqrt().clamp(min=floor))
    order = mixture.means.argsort()
    return LossMixture(*(tensor[order] for tensor in mixture))


def denoising_weights(losses: Tensor, mixture: LossMixture, *, inflation: float = 9.0) -> Tensor:
    """``(w_c + e^-loss w_n) / (w_c + w_n)`` per sample: how much a sample that may be noise should count (KADEL).

    ``w_c`` and ``w_n`` are share times density of the clean and the noisy component. Source: Tao et al. 2024 (TOSEM;
    arXiv 2401.08376), used after three epochs of warm-up. Confidence: from the authors' code, which multiplies the clean
    component's deviation by 9.

    Args:
        losses: ``[...]``, the mean cross-entropy of each sample.
        mixture: from ``fit_loss_mixture``.
        inflation: of the clean component's deviation.

    Returns:
        ``[...]``, in the dtype of the losses, without gradient.
    """
    check_floating("losses", losses)
    values = losses.detach()
    clean = mixture.log_densities(values, check_real("inflation", inflation, positive=True)).softmax(0)[0]
    return (clean + (1 - clean) * (-values.double()).exp()).to(losses.dtype)

"""What is right, in plain PyTorch: every divergence as its definition reads, gradients by autograd.

In float64 this is the truth the kernels are held against; in float32 it is what a user would have written without them,
whose error is the yardstick (see ``accuracy``). It shares no code with the library's own reference, on purpose.

Teacher ``p``, student ``q``; both arrive as log-probabilities ``[..., V]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdkernels as kd

LOGIT_FLOOR = -1e5
"""The library's contract for masked vocabulary: lower logits count as this, and get no gradient."""

Formula = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A divergence of the library and the formula it stands for."""

    name: str
    divergence: kd.Divergence
    formula: Formula
    factor: float = 1.0
    """In front of the sums, and of their rounding errors."""


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def log_mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """``log(share a + (1 - share) b)``."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def affinity(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    """``sum p^a q^b``."""
    return (a * log_p + b * log_q).exp().sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = log_mixture(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def ab_divergence(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    own = a / (a + b) * affinity(log_p, log_q, a + b, 0) + b / (a + b) * affinity(log_p, log_q, 0, a + b)
    return -(affinity(log_p, log_q, a, b) - own) / (a * b)


def forward_kl() -> Case:
    return Case("forward_kl", kd.ForwardKL(), kl)


def reverse_kl() -> Case:
    return Case("reverse_kl", kd.ReverseKL(), lambda p, q: kl(q, p))


def jeffreys(weight: float) -> Case:
    return Case(f"jeffreys({weight})", kd.Jeffreys(weight), lambda p, q: weight * kl(p, q) + (1 - weight) * kl(q, p))


def jensen_shannon(beta: float) -> Case:
    return Case(f"jsd({beta})", kd.JSD(beta), lambda p, q: jsd(p, q, beta))


def skew_forward_kl(alpha: float) -> Case:
    return Case(f"skew_forward_kl({alpha})", kd.SkewForwardKL(alpha), lambda p, q: kl(p, log_mixture(alpha, p, q)))


def skew_reverse_kl(alpha: float) -> Case:
    return Case(f"skew_reverse_kl({alpha})", kd.SkewReverseKL(alpha), lambda p, q: kl(q, log_mixture(alpha, q, p)))


def tvd() -> Case:
    return Case("tvd", kd.TVD(), lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(-1))


def alpha_divergence(alpha: float) -> Case:
    return Case(
        f"alpha({alpha})",
        kd.AlphaDivergence(alpha),
        lambda p, q: (1 - affinity(p, q, alpha, 1 - alpha)) / (alpha * (1 - alpha)),
        factor=abs(1 / (alpha * (1 - alpha))),
    )


def renyi(alpha: float) -> Case:
    return Case(
        f"renyi({alpha})",
        kd.Renyi(alpha),
        lambda p, q: torch.logsumexp(alpha * p + (1 - alpha) * q, -1) / (alpha - 1),
        factor=abs(1 / (alpha - 1)),
    )


def alpha_beta(alpha: float, beta: float) -> Case:
    return Case(
        f"ab({alpha},{beta})",
        kd.ABDivergence(alpha, beta),
        lambda p, q: ab_divergence(p, q, alpha, beta),
        factor=1 / (alpha * beta),
    )


def hellinger() -> Case:
    return Case("hellinger", kd.Hellinger(), lambda p, q: 1 - affinity(p, q, 0.5, 0.5))


EVERY_DIVERGENCE = [
    forward_kl(),
    reverse_kl(),
    jeffreys(0.3),
    jensen_shannon(0.5),
    skew_forward_kl(0.1),
    skew_reverse_kl(0.1),
    tvd(),
    alpha_divergence(0.3),
    renyi(0.6),
    alpha_beta(0.4, 0.7),
    hellinger(),
]
"""One of each."""

OTHER_PARAMETERS = [
    jeffreys(0.0),
    jeffreys(1.0),
    jensen_shannon(0.1),
    jensen_shannon(0.95),
    skew_forward_kl(0.7),
    skew_reverse_kl(0.7),
    alpha_divergence(1.7),
    alpha_divergence(-0.4),
    renyi(0.2),
    renyi(2.5),
    alpha_beta(1.0, 1.0),
    alpha_beta(0.2, 1.3),
]
"""The same formulas elsewhere in their range, where a mistake in a coefficient shows that cancels at the usual values."""


def each(quick: Iterable[Case], slow: Iterable[Case] = ()) -> pytest.MarkDecorator:
    """Runs a test for each case; ``slow`` are those that the quick run leaves out."""
    parameters = [pytest.param(case, id=case.name) for case in quick]
    parameters += [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("case", parameters)


each_divergence = each(EVERY_DIVERGENCE)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What plain PyTorch computes in: float32 for the half types."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities of tempered logits; a tensor of temperatures has one per token."""
    tau = (
        temperature.to(logits.dtype).unsqueeze(-1)
        if isinstance(temperature, Tensor) and temperature.dim()
        else temperature
    )
    return torch.log_softmax(logits.clamp(min=LOGIT_FLOOR) / tau, -1)


def row_losses(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    temperature_squared: bool = False,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    """The loss of every token ``[...]`` from logits ``[..., V]``, in their dtype."""
    if teacher_temperature is None:
        teacher_temperature = temperature
    value = case.formula(log_softmax(teacher, teacher_temperature), log_softmax(student, temperature))
    if temperature_squared:
        value = value * (temperature.to(value.dtype) if isinstance(temperature, Tensor) else temperature) ** 2
    if ce_weight:
        assert labels is not None
        value = value - ce_weight * log_softmax(student).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return value


class Result(NamedTuple):
    """The loss per token ``[N]``, the gradients of sum(upstream * loss), and the size of the terms these are sums of."""

    value: Tensor
    student: Tensor
    teacher: Tensor
    value_size: Tensor
    gradient_size: Tensor


def evaluate(
    case: Case, student: Tensor, teacher: Tensor, upstream: Tensor, dtype: torch.dtype, **options: Any
) -> Result:
    """Plain PyTorch in ``dtype``, whatever the logits are stored in. ``options`` as for ``row_losses``."""
    leaves = [logits.detach().to(dtype, copy=True).requires_grad_() for logits in (student, teacher)]
    value = row_losses(case, *leaves, **options)
    gradients = torch.autograd.grad(value, leaves, upstream.to(dtype))
    with torch.no_grad():
        tau = options.get("temperature", 1.0)
        logs = torch.stack(
            [log_softmax(leaves[0], tau), log_softmax(leaves[1], options.get("teacher_temperature", tau))]
        )
        size = case.factor * value.abs().clamp(min=1)
        # An exponential errs by its exponent's rounding, which grows with the exponent.
        gradient_size = (upstream.to(dtype).abs() * size).unsqueeze(-1) * (logs.exp() * (1 - logs)).sum(0)
        # The entropies and log-sum-exps that a value is the difference of.
        value_size = size.clamp(min=case.factor * math.log(student.shape[-1]))
    return Result(value.detach(), *gradients, value_size, gradient_size)


class Head(NamedTuple):
    """The arguments of ``kd.LMHead``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None

    def source(self) -> kd.LMHead:
        return kd.LMHead(self.hidden, self.weight, self.bias, softcap=self.softcap, logit_scale=self.logit_scale)

    def logits(self, vocab_size: int | None = None) -> Tensor:
        """The logits made whole, in the dtype of the head but softcapped in no less than float32."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        logits = logits[..., :vocab_size].to(compute_dtype(logits.dtype))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_leaves(self, dtype: torch.dtype | None = None) -> Head:
        """Copies of the tensors that require grad."""
        return self._replace(**{name: leaf(tensor, dtype) for name, tensor in self.tensors().items()})


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that requires grad."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def loss(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Tensor:
    """The contract of ``kd.distillation_loss`` on logits ``[..., V]``: tokens that do not count are left out by indexing."""
    shape = student.shape[:-1]
    kept = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        kept = kept & mask
    if labels is not None:
        kept = kept & (labels != ignore_index)
    for name in ("temperature", "teacher_temperature"):
        value = options.get(name)
        if isinstance(value, Tensor) and value.dim():
            options[name] = value[kept]
    rows = row_losses(
        case,
        student[..., :vocab_size][kept],
        teacher[..., :vocab_size][kept],
        labels=None if labels is None else labels[kept],
        **options,
    )
    weights = torch.ones_like(rows) if weight is None else weight[kept].to(rows.dtype)
    if reduction == "none":
        return rows.new_zeros(shape).index_put((kept,), weights * rows)
    total = (weights * rows).sum()
    if reduction == "sum":
        return total
    if normalizer is not None:
        return total / normalizer
    return total / weights.sum() if bool(weights.sum()) else total


def random_logits(
    vocab: int, dtype: torch.dtype = torch.float32, *, rows: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(student, teacher) ``[rows, V]``: flat and peaked rows, students that are close to their teacher and far from it."""
    scale = torch.tensor([1.0, 3.0, 6.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    distance = torch.tensor([0.3, 0.3, 0.3, 2.0, 2.0, 4.0], dtype=torch.float64)
    rows = len(scale) if rows is None else rows
    scale, distance = scale.repeat(-(-rows // 6))[:rows, None], distance.repeat(-(-rows // 6))[:rows, None]
    generator = torch.Generator().manual_seed(1000 * vocab + seed)
    noise = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    student = scale * noise[0]
    return student.to(dtype), (student + distance * noise[1]).to(dtype)

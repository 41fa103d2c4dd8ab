"""Standard forms that other losses are built of: adaptive KL, standardised logits, learned temperature, correlations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.arguments.rows import side
from kdkernels.backends.rows import compute_dtype
from kdkernels.checks import check_choice, check_real
from kdkernels.divergences import Jeffreys
from kdkernels.functional import distillation_loss, head_tail_gap, token_log_probs
from kdkernels.functional.choosing import backend_for
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import detached, tensor_of, with_tensor
from kdkernels.ops.eager import take_scaled
from kdkernels.ops.row_deviation import ThroughDeviation, row_deviation
from kdkernels.reference.rows import effective_logits, side_logits
from kdkernels.sources import LMHead, Source

__all__ = ["AKL", "CTKD", "DIST", "LogitStd", "MixKDStd"]

BLOCK_BYTES = 2 << 20
"""Of the rows of one tensor that are worked on at a time on the CPU, so that they stay in its caches."""


def blocks(logits: Tensor) -> Iterator[slice]:
    """Runs of rows of logits ``[N, V]``; on the CPU as many as stay in its caches, elsewhere all."""
    rows, vocab = logits.shape
    size = max(1, BLOCK_BYTES // (logits.element_size() * vocab)) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def dense(name: str, source: Source) -> tuple[Tensor, torch.Size]:
    """The logits of a source whole, ``[N, V]``, after softcap and floor, and the shape of its batch."""
    rows, shape, _ = side(name, source, None)
    logits = side_logits(rows)
    if rows.weight is None and rows.softcap == 0:
        return logits, shape
    return effective_logits(logits, rows.softcap, compute_dtype(logits, None)), shape


@register("akl")
class AKL(nn.Module):
    """Adaptive Kullback-Leibler divergence: of each token the direction that looks where the student is furthest away.

    ``w KL(p||q) + (1 - w) KL(q||p)`` with ``w = g_head / (g_head + g_tail)``, no gradient through w, and ``g`` the sums of
    ``|p - q|`` over the teacher's head, its most probable ids that hold up to ``mass``, and over all others.

    Source: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models (COLING 2025,
    arXiv 2404.02657). Confidence: from the authors' code. The copy in DSKD takes as head the ids whose cumulative probability
    from the least probable on exceeds ``mass``, which is the top ``1 - mass`` with the id that crosses it (``head="ascending"``).

    Args:
        mass: mu, of the head.
        head: "descending" as in the authors' code, or "ascending" as in DSKD's.
        temperature: of both sides.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        mass: float = 0.5,
        *,
        head: str = "descending",
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.mass = check_real("mass", mass)
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass must be in [0, 1], got {mass!r}")
        self.head = check_choice("head", head, ("descending", "ascending"))
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def weights(self, student: Source, teacher: Source, mask: Tensor | None = None) -> Tensor:
        """``[...]``, w of each token: 1/2 where student and teacher agree."""
        head, tail = head_tail_gap(
            student,
            teacher,
            self.mass if self.head == "descending" else 1 - self.mass,
            crossing=self.head == "ascending",
            temperature=self.temperature,
            mask=mask,
            backend=self.backend,
        )
        total = head + tail
        return torch.where(total > 0, head / total.masked_fill(total <= 0, 1), 0.5)

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The mean over the tokens that count, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``, in any pairing.
            mask: bool ``[...]``, True where a token counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        teacher = detached(teacher)
        divergence = Jeffreys(self.weights(student, teacher, mask))
        return distillation_loss(
            student, teacher, divergence, temperature=self.temperature, mask=mask, backend=self.backend
        )


class Standardised(nn.Module):
    """What losses of standardised logits share."""

    backend: str | None

    def sides(
        self, student: Source, teacher: Source, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits and standard deviations of the student, whose gradient goes through both, and of the teacher."""
        mine, shape = dense("student", student)
        theirs, _ = dense("teacher", detached(teacher))
        if mask is not None and (mask.shape, mask.dtype) == (shape, torch.bool):  # another mask is refused by the loss
            # Tokens that do not count may hold anything; 0 * NaN is no 0.
            mine, theirs = (logits.masked_fill(~mask.reshape(-1, 1), 0.0) for logits in (mine, theirs))
        with torch.no_grad():
            backend = backend_for(self.backend, mine.device.type, "row_deviation")
            mean, deviation = row_deviation(mine, backend)
            teacher_deviation = row_deviation(theirs, backend)[1]
        through: Tensor = ThroughDeviation.apply(mine, mean, deviation, backend)  # type: ignore[no-untyped-call]
        logits = through.reshape(*shape, through.shape[-1])
        return logits, deviation.reshape(shape), theirs.reshape(logits.shape), teacher_deviation.reshape(shape)

    def divergence(
        self, sides: tuple[Tensor, Tensor, Tensor, Tensor], temperature: float, mask: Tensor | None
    ) -> Tensor:
        student, deviation, teacher, teacher_deviation = sides
        # The factor is part of what the sum is divided by, so that no gradient need be multiplied by it.
        count = deviation.numel() if mask is None else mask.sum().clamp(min=1)
        return distillation_loss(
            student,
            teacher,
            temperature=temperature * deviation,
            teacher_temperature=temperature * teacher_deviation,
            mask=mask,
            normalizer=max(count, 1) / temperature**2 if mask is None else count / temperature**2,
            backend=self.backend,
        )


@register("logit_std")
class LogitStd(Standardised):
    """Logit standardisation: both sides' logits are divided by their own standard deviation.

    ``T^2 mean_n KL(softmax(t / (std(t) T)) || softmax(s / (std(s) T)))``, with the standard deviation over the classes by
    1 / (C - 1). The gradient goes through that of the student. Masked vocabulary (-inf) has no standard deviation.

    Source: Sun et al., Logit Standardization in Knowledge Distillation (CVPR 2024, arXiv 2403.01427). Confidence: from the
    authors' code, which also subtracts the mean, to no effect, and adds 1e-7 to the deviation; here it is at least that.

    Args:
        temperature: T; the paper's base temperature.
        weight: of the loss; 9 in most of the authors' CIFAR-100 runs, beside a cross-entropy.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(self, temperature: float = 2.0, *, weight: float = 1.0, backend: str | None = None) -> None:
        super().__init__()
        self.temperature = check_real("temperature", temperature, positive=True)
        self.weight = check_real("weight", weight)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``, whose logits are made whole.
            mask: bool ``[...]``, True where a token counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        return self.weight * self.divergence(self.sides(student, teacher, mask), self.temperature, mask)


@register("mix_kd_std")
class MixKDStd(Standardised):
    """Distillation on mixed inputs, with the standard deviation of each row's logits as its temperature.

    ``alpha mean_n KL(softmax(t / std(t)) || q) + gamma mean_n SCE(y, q)`` with ``q = softmax(s / std(s))``; ``y`` is the mixture
    ``lam e_i + (1 - lam) e_j`` of the labels of the two inputs. The gradient goes through ``std(s)``. No factor T^2.

    Source: Choi et al., Understanding the Role of Mixup in Knowledge Distillation (WACV 2023, arXiv 2211.03946). Confidence:
    from the authors' code.

    Args:
        alpha, gamma: weights of the two terms.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(self, alpha: float = 0.9, gamma: float = 0.1, *, backend: str | None = None) -> None:
        super().__init__()
        self.alpha = check_real("alpha", alpha)
        self.gamma = check_real("gamma", gamma)
        self.backend = backend

    def forward(
        self,
        student: Source,
        teacher: Source,
        labels: Tensor,
        mixed_labels: Tensor | None = None,
        mixing: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., C]`` or ``kd.LMHead``, of the mixed inputs.
            labels, mixed_labels: classes ``[...]`` of the first and of the second input of each mixture; None: unmixed.
            mixing: lam, the share of the first: a number or ``[...]``.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        sides = self.sides(student, teacher)
        logits, deviation = sides[:2]

        def surprise(wanted: Tensor) -> Tensor:
            return -token_log_probs(logits, wanted, temperature=deviation, backend=self.backend)

        hard = surprise(labels)
        if mixed_labels is not None:
            hard = mixing * hard + (1 - mixing) * surprise(mixed_labels)
        return self.alpha * self.divergence(sides, 1.0, None) + self.gamma * hard.mean()


class Reversed(torch.autograd.Function):
    """A tensor itself, whose gradient comes back times a factor that is 0 or less."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, strength: Tensor) -> Tensor:
        ctx.save_for_backward(strength)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.saved_tensors[0] * gradient, None


class ThroughTemperature(torch.autograd.Function):
    """Tensors themselves, for a loss whose temperature T is given as a number: logits, or what a head's logits are linear in.

    A loss of ``z / T`` has ``dL/dT = -<g, z> / T``, with g the gradient to z. Where ``z = W h + b``, ``<g, z>`` is the sum of the
    products of h and of b with their own gradients.
    """

    @staticmethod
    def forward(ctx: Any, temperature: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(temperature, *tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        temperature, *tensors = ctx.saved_tensors
        products = [
            torch.dot(gradient.reshape(-1).to(temperature.dtype), tensor.reshape(-1).to(temperature.dtype))
            for gradient, tensor in zip(gradients, tensors, strict=True)
        ]
        return -torch.stack(products).sum() / temperature, *gradients


@register("ctkd")
class CTKD(nn.Module):
    """Curriculum temperature: a learned temperature that makes the student's task harder.

    ``T^2 mean_n KL(softmax(t / T) || softmax(s / T))`` with ``T = 1 + 20 sigmoid(theta)``. The student minimises it, theta
    maximises it: on the way to theta the gradient is multiplied by -lambda, which rises from 0 to 1 over the first loops,
    ``lambda = (1 - cos(pi loop / loops)) / 2``. Call ``set_loop`` once an epoch; theta, and where the curriculum stands, are
    in the ``state_dict``.

    Source: Li et al., Curriculum Temperature for Knowledge Distillation (AAAI 2023, arXiv 2211.16231). Confidence: from the
    authors' code, the global temperature. (A copy in another repository multiplies by +lambda, without the change of sign.)

    Args:
        theta: where it starts.
        lowest, span: T is between ``lowest`` and ``lowest + span``.
        loops: of the curriculum.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    loop: Tensor

    def __init__(
        self,
        theta: float = 1.0,
        *,
        lowest: float = 1.0,
        span: float = 20.0,
        loops: float = 10.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(check_real("theta", theta)))
        self.lowest = check_real("lowest", lowest, positive=True)
        self.span = check_real("span", span, positive=True)
        self.loops = check_real("loops", loops, positive=True)
        self.backend = backend
        self.register_buffer("loop", torch.zeros(()))

    def set_loop(self, loop: float) -> None:
        """Says where the curriculum stands: epochs (or parts of them) since the beginning."""
        self.loop.fill_(check_real("loop", loop))

    @property
    def strength(self) -> Tensor:
        """lambda, 0-d."""
        return (1 - torch.cos(math.pi * (self.loop / self.loops).clamp(0, 1))) / 2

    @property
    def temperature(self) -> Tensor:
        """T, 0-d, whose gradient to theta is reversed."""
        theta: Tensor = Reversed.apply(self.theta, self.strength)  # type: ignore[no-untyped-call]
        return self.lowest + self.span * torch.sigmoid(theta)

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and to theta.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead`` without a softcap, in any pairing.
            mask: bool ``[...]``, True where a token counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        temperature = self.temperature
        student, teacher = through_temperature(temperature, student, detached(teacher))
        value = distillation_loss(student, teacher, temperature=temperature.detach(), mask=mask, backend=self.backend)
        return temperature.square() * value


def through_temperature(temperature: Tensor, *sources: Source) -> list[Source]:
    """The sources, from whose gradients that of the temperature is made."""
    parts: list[Tensor] = []
    for source in sources:
        if isinstance(source, LMHead) and source.softcap is not None:
            raise ValueError(
                "CTKD: a head's softcap stands between its hidden states and the temperature; make its logits first"
            )
        parts.append(tensor_of("source", source))
        if isinstance(source, LMHead) and source.bias is not None:
            parts.append(source.bias)
    through = iter(ThroughTemperature.apply(temperature, *parts))  # type: ignore[no-untyped-call]
    found: list[Source] = []
    for source in sources:
        one = with_tensor(source, next(through))
        if isinstance(one, LMHead) and one.bias is not None:
            one.bias = next(through)
        found.append(one)
    return found


class Correlations(torch.autograd.Function):
    """``beta (1 - mean_n r_n) + gamma (1 - mean_v r_v)`` with the correlations r of rows and columns of probabilities.

    Works on two matrices of probabilities in blocks of rows; the first becomes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, beta: float, gamma: float, eps: float
    ) -> Tensor:
        rows, vocab = student.shape
        dtype = compute_dtype(student, teacher)
        q, p = (torch.empty(rows, vocab, dtype=dtype, device=student.device) for _ in range(2))
        for block in blocks(q):
            q[block] = torch.softmax(student[block].to(dtype) / temperature, -1)
            p[block] = torch.softmax(teacher[block].to(dtype) / temperature, -1)
        mean_q, mean_p = q.mean(0), p.mean(0)
        by_row, by_column = q.new_empty(3, rows), q.new_zeros(3, vocab)
        for block in blocks(q):
            centred = q[block] - 1 / vocab, p[block] - 1 / vocab
            by_row[:, block] = torch.stack(products(*centred, -1))
            by_column += torch.stack(products(q[block] - mean_q, p[block] - mean_p, 0))
        (r_rows, *of_rows), (r_columns, *of_columns) = correlation(by_row, eps), correlation(by_column, eps)
        value = beta * (1 - r_rows.mean()) + gamma * (1 - r_columns.mean())
        if not ctx.needs_input_grad[0]:
            return value
        row_p, row_q = (-beta / rows * factor.unsqueeze(-1) for factor in of_rows)
        column_p, column_q = (-gamma / vocab * factor for factor in of_columns)
        for block in blocks(q):
            mine, theirs = q[block], p[block]
            slope = row_p[block] * (theirs - 1 / vocab) - row_q[block] * (mine - 1 / vocab)
            slope += column_p * (theirs - mean_p) - column_q * (mine - mean_q)
            slope -= torch.linalg.vecdot(mine, slope).unsqueeze(-1)
            mine.mul_(slope.div_(temperature))
        ctx.gradients = [q.to(student.dtype)]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *take_scaled(ctx, gradient), None, None, None, None, None


def products(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of x y, x x and y y."""
    return (x * y).sum(dim), x.square().sum(dim), y.square().sum(dim)


def correlation(sums: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums of centred x y, x x and y y: ``r = xy / (|x| |y| + eps)`` and the factors f, g in ``dr/dx = f y - g x``."""
    cross, own, other = sums
    lengths = own.sqrt(), other.sqrt()
    inverse = (lengths[0] * lengths[1] + eps).reciprocal()
    r = cross * inverse
    return r, inverse, r * inverse * lengths[1] / lengths[0].clamp(min=torch.finfo(sums.dtype).tiny)


@register("dist")
class DIST(nn.Module):
    """Distillation from a stronger teacher: correlations in place of a divergence.

    ``T^2 (beta (1 - mean_n r(q_n, p_n)) + gamma (1 - mean_c r(q_c, p_c)))`` with Pearson's correlation r of the probabilities
    of each row (between classes) and of each column (within a class, over the batch).

    Source: Huang et al., Knowledge Distillation from A Stronger Teacher (NeurIPS 2022, arXiv 2205.10536). Confidence: from the
    authors' code.

    Args:
        beta, gamma: weights of rows and columns; the authors' configurations for classifiers take 2 and 2 beside a cross-entropy.
        temperature: T of both sides.
        eps: added to what a correlation is divided by, as the code does. With many classes columns are short: then it counts.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, *, temperature: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.beta = check_real("beta", beta)
        self.gamma = check_real("gamma", gamma)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.eps = check_real("eps", eps, positive=True)

    def forward(self, student: Source, teacher: Source) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., C]`` or ``kd.LMHead``, whose logits are made whole. All rows are one batch.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        mine, shape = dense("student", student)
        with torch.no_grad():
            theirs, teacher_shape = dense("teacher", detached(teacher))
        if mine.shape != theirs.shape or shape != teacher_shape:
            raise ValueError(
                f"student and teacher must have the same shape, got {(*shape, mine.shape[-1])} and "
                f"{(*teacher_shape, theirs.shape[-1])}"
            )
        squared = self.temperature**2
        value: Tensor = Correlations.apply(  # type: ignore[no-untyped-call]
            mine, theirs, self.temperature, squared * self.beta, squared * self.gamma, self.eps
        )
        return value

"""Divergences between a teacher ``p`` and a student ``q``: immutable descriptions, no computation.

Each lowers to a ``Form``: the number of a formula that every backend implements, and its two parameters. The formulas
are tabulated in ``csrc/math/divergence.h``. A parameter that says so may also be a tensor, with one number per token
``[...]`` or 0-d, on the student's device: nothing is compiled anew when it changes, and its values are looked at on the CPU
alone (elsewhere under ``kd.debug``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

from kdkernels.checks import check_real

__all__ = [
    "JSD",
    "TVD",
    "ABDivergence",
    "AlphaDivergence",
    "Decoupled",
    "Divergence",
    "Form",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "Kind",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
]


class Kind(enum.IntEnum):
    """The formulas the kernels know. The numbers are shared with the C++ and Triton sources."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    JEFFREYS = 2
    JSD = 3
    SKEW_FORWARD_KL = 4
    SKEW_REVERSE_KL = 5
    TVD = 6
    ALPHA = 7
    RENYI = 8
    AB = 9
    SOFT_CROSS_ENTROPY = 10


class Form(NamedTuple):
    """What a kernel is told about a divergence."""

    kind: int
    a: float = 0.0
    b: float = 0.0


FORWARD_KL = Form(int(Kind.FORWARD_KL))
REVERSE_KL = Form(int(Kind.REVERSE_KL))


class Divergence:
    """Base of all divergences."""

    @property
    def form(self) -> Form:
        raise NotImplementedError(f"{type(self).__name__} does not say which formula computes it")

    @property
    def parameters(self) -> Tensor | None:
        """Stands in the place of the form's ``a`` where given: 0-d or per token ``[...]``, between 0 and 1."""
        return None


def checked(owner: object, name: str, allowed: str, accepted: bool, limits: Mapping[float, str] | None = None) -> None:
    """Raises the error for a parameter that is not accepted; ``limits`` names the divergence at values just outside."""
    if not accepted:
        value = getattr(owner, name)
        limit = (limits or {}).get(value)
        hint = "" if limit is None else f"; the limit there is {limit}"
        raise ValueError(f"{type(owner).__name__}: {name} must be {allowed}, got {value!r}{hint}")


class WithTensors(Divergence):
    """Of those whose parameters may be tensors: equal where numbers are equal, and tensors the same object."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return all(
            mine is theirs if isinstance(mine, Tensor) or isinstance(theirs, Tensor) else mine == theirs
            for mine, theirs in pairs
        )

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, field.name) for field in fields(self))))  # type: ignore[arg-type]


class OneParameter(WithTensors):
    """Of those whose only parameter may be a tensor."""

    @property
    def parameters(self) -> Tensor | None:
        value = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return value if isinstance(value, Tensor) else None


def as_number_or_tensor(owner: object, name: str) -> float | None:
    """The parameter as a finite float, which is also what the frozen instance keeps; None if it is a tensor."""
    return None if isinstance(getattr(owner, name), Tensor) else as_number(owner, name)


def form_of(kind: Kind, parameter: float | Tensor, without: Form | None = None) -> Form:
    """The form of a formula with one parameter; ``without`` is what is left of it at 0."""
    if isinstance(parameter, Tensor):
        return Form(int(kind))
    return without if without is not None and not parameter else Form(int(kind), parameter)


def as_number(owner: object, name: str) -> float:
    """The parameter as a finite float, which is also what the frozen instance keeps."""
    number = check_real(f"{type(owner).__name__}: {name}", getattr(owner, name))
    object.__setattr__(owner, name, number)
    return number


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``KL(p || q) = sum p log(p / q)``, which makes the student cover the teacher (Hinton et al. 2015, with entropy)."""

    @property
    def form(self) -> Form:
        return FORWARD_KL


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``KL(q || p) = sum q log(q / p)``, which makes the student seek the teacher's modes (MiniLLM, arXiv 2306.08543)."""

    @property
    def form(self) -> Form:
        return REVERSE_KL


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """``-sum p log q``, the cross-entropy from the teacher's probabilities: forward KL plus the teacher's entropy.

    The student's gradient is that of the forward KL; only the value differs, and the gradient to the teacher.
    """

    @property
    def form(self) -> Form:
        return Form(int(Kind.SOFT_CROSS_ENTROPY))


@dataclass(frozen=True, eq=False)
class Jeffreys(OneParameter):
    """``weight KL(p || q) + (1 - weight) KL(q || p)``, ``0 <= weight <= 1``; at 0.5 half the symmetric Jeffreys sum.

    ``weight`` may be a tensor.
    """

    weight: float | Tensor = 0.5

    def __post_init__(self) -> None:
        weight = as_number_or_tensor(self, "weight")
        checked(self, "weight", "between 0 and 1", weight is None or 0 <= weight <= 1)

    @property
    def form(self) -> Form:
        return form_of(Kind.JEFFREYS, self.weight)


@dataclass(frozen=True, eq=False)
class JSD(OneParameter):
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``, ``0 < beta < 1``.

    ``beta`` sits on the teacher, as in GKD (arXiv 2306.13649, equation 2). The value vanishes as beta tends to 0 or 1;
    divided by beta (or 1 - beta) it tends to the forward (or reverse) KL. ``beta`` may be a tensor, in which 0 and 1 are
    allowed as well: such tokens have value and gradient 0.
    """

    beta: float | Tensor = 0.5

    def __post_init__(self) -> None:
        beta = as_number_or_tensor(self, "beta")
        inside = beta is None or 0 < beta < 1
        checked(self, "beta", "strictly between 0 and 1", inside, {0.0: "ForwardKL()", 1.0: "ReverseKL()"})

    @property
    def form(self) -> Form:
        return form_of(Kind.JSD, self.beta)


@dataclass(frozen=True, eq=False)
class SkewForwardKL(OneParameter):
    """``KL(p || alpha p + (1 - alpha) q)``, ``0 <= alpha < 1`` (DistiLLM, arXiv 2402.03898); at 0 the forward KL.

    ``alpha`` may be a tensor, in which 1 is allowed as well: such tokens have value and gradient 0.
    """

    alpha: float | Tensor = 0.1

    def __post_init__(self) -> None:
        alpha = as_number_or_tensor(self, "alpha")
        checked(self, "alpha", "at least 0 and less than 1", alpha is None or 0 <= alpha < 1)

    @property
    def form(self) -> Form:
        return form_of(Kind.SKEW_FORWARD_KL, self.alpha, FORWARD_KL)


@dataclass(frozen=True, eq=False)
class SkewReverseKL(OneParameter):
    """``KL(q || (1 - alpha) p + alpha q)``, ``0 <= alpha < 1`` (DistiLLM, arXiv 2402.03898); at 0 the reverse KL.

    ``alpha`` may be a tensor, in which 1 is allowed as well: such tokens have value and gradient 0.
    """

    alpha: float | Tensor = 0.1

    def __post_init__(self) -> None:
        alpha = as_number_or_tensor(self, "alpha")
        checked(self, "alpha", "at least 0 and less than 1", alpha is None or 0 <= alpha < 1)

    @property
    def form(self) -> Form:
        return form_of(Kind.SKEW_REVERSE_KL, self.alpha, REVERSE_KL)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance ``0.5 sum |p - q|``, between 0 and 1. Where ``p = q`` the subgradient 0 is used."""

    @property
    def form(self) -> Form:
        return Form(int(Kind.TVD))


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """``(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha))`` (Amari); at 1 the forward, at 0 the reverse KL.

    Outside [0, 1] the sum is unbounded: each of its terms saturates at e^60.
    """

    alpha: float

    def __post_init__(self) -> None:
        as_number(self, "alpha")

    @property
    def form(self) -> Form:
        if self.alpha == 0:
            return REVERSE_KL
        if self.alpha == 1:
            return FORWARD_KL
        return Form(int(Kind.ALPHA), self.alpha, 1 / (self.alpha * (1 - self.alpha)))


@dataclass(frozen=True)
class Renyi(Divergence):
    """``log(sum p^alpha q^(1 - alpha)) / (alpha - 1)`` of order ``alpha > 0``; at 1 the forward KL."""

    alpha: float

    def __post_init__(self) -> None:
        alpha = as_number(self, "alpha")
        checked(self, "alpha", "greater than 0", alpha > 0)

    @property
    def form(self) -> Form:
        return FORWARD_KL if self.alpha == 1 else Form(int(Kind.RENYI), self.alpha)


@dataclass(frozen=True)
class ABDivergence(Divergence):
    """Alpha-beta divergence (Cichocki et al. 2011, equation 4; for distillation ABKD, arXiv 2505.04560).

    ``-1/(alpha beta) sum(p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta))``, both
    parameters greater than 0. The limits (1, 0) and (0, 1) are the forward and the reverse KL.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        alpha, beta = as_number(self, "alpha"), as_number(self, "beta")
        checked(self, "alpha", "greater than 0", alpha > 0, {0.0: "ReverseKL()"} if beta == 1 else None)
        checked(self, "beta", "greater than 0", beta > 0, {0.0: "ForwardKL()"} if alpha == 1 else None)

    @property
    def form(self) -> Form:
        return Form(int(Kind.AB), self.alpha, self.beta)


@dataclass(frozen=True)
class Hellinger(Divergence):
    """Squared Hellinger distance ``1 - sum sqrt(p q)``, between 0 and 1."""

    @property
    def form(self) -> Form:
        return Form(int(Kind.ALPHA), 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Decoupled(WithTensors):
    """``rest_weight D(N(p), N(q)) + target_weight KL((p_y, 1 - p_y) || (q_y, 1 - q_y))``, the label y apart from the rest.

    N is the softmax over all entries but y (Decoupled Knowledge Distillation, arXiv 2203.08679, equation 7). With
    ``D = ForwardKL()``, ``target_weight=1`` and ``rest_weight=1 - p_y`` this is the forward KL of the whole. Needs
    ``labels``, and logits or heads on both sides. Sums are over the other entries, so that nothing cancels as p_y or q_y
    tends to 1. In a vocabulary of one entry it is 0.

    Args:
        divergence: D, over the rest.
        target_weight, rest_weight: numbers, or tensors with one number per token ``[...]`` or 0-d.
    """

    divergence: Divergence = ForwardKL()
    target_weight: float | Tensor = 1.0
    rest_weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence) or isinstance(self.divergence, Decoupled):
            raise TypeError(
                f"Decoupled: divergence must be an instance such as ForwardKL(), and none of Decoupled, "
                f"got {self.divergence!r}"
            )
        as_number_or_tensor(self, "target_weight")
        as_number_or_tensor(self, "rest_weight")

    @property
    def form(self) -> Form:
        return self.divergence.form

    @property
    def parameters(self) -> Tensor | None:
        return self.divergence.parameters

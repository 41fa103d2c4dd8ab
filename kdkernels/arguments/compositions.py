"""How the logits of a side are made from several sources, or with a bias: mixtures and ``class_bias`` as a ``Composition``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels.arguments.rows import REAL_DTYPES, Problem, per_token, side, temperature
from kdkernels.backends.rows import Composition, RowSpec, Side
from kdkernels.checks import check_real, is_real
from kdkernels.debugging import values_are_checked
from kdkernels.sources import MAX_REPLACED, Coefficient, LMHead, LogitMixture, Logits, Source

__all__ = ["first_source", "with_compositions", "with_normalisers"]


def first_source(source: Source | LogitMixture) -> Source:
    """What stands for a source where a side has only one: the first of a mixture, without its gradient and bias."""
    if isinstance(source, LogitMixture):
        return constant(source.sources[0])
    if isinstance(source, Logits) and source.class_bias is not None:
        return Logits(source.tensor, donate=source.donate)
    return source


def constant(source: Source) -> Source:
    """The same source, to which no gradient flows."""
    if isinstance(source, LMHead):
        return LMHead(
            source.hidden.detach(),
            source.weight.detach(),
            None if source.bias is None else source.bias.detach(),
            softcap=source.softcap,
            logit_scale=source.logit_scale,
            compute_dtype=source.compute_dtype,
        )
    return (source.tensor if isinstance(source, Logits) else source).detach()


def with_compositions(
    problem: Problem, student: Source, teacher: Source | LogitMixture | None, vocab_size: int | None
) -> Problem:
    """A pair of the first sources, to which it adds what the student and the teacher are made of besides."""
    of_student = composed("student", student, problem, vocab_size, student)
    of_teacher = None if teacher is None else composed("teacher", teacher, problem, vocab_size, student)
    if of_student is None and of_teacher is None:
        return problem
    if isinstance(teacher, LogitMixture) and teacher.sources[0] is student:
        problem = problem._replace(teacher=detached(problem.student))
    spec = problem.spec._replace(student_composition=of_student, teacher_composition=of_teacher)
    return problem._replace(spec=spec)


def detached(side: Side) -> Side:
    """The same rows, which may then be recognised by their memory."""
    tensor, weight, bias = (None if part is None else part.detach() for part in side[:3])
    assert tensor is not None
    return side._replace(tensor=tensor, weight=weight, bias=bias, donate=False)


def composed(
    name: str, source: Source | LogitMixture, problem: Problem, vocab_size: int | None, student: Source
) -> Composition | None:
    """The composition of a side; None where there is none."""
    device, shape, vocab, dtype = problem.student.tensor.device, problem.batch_shape, problem.vocab, problem.dtype
    bias = source.class_bias if isinstance(source, Logits | LogitMixture) else None
    if bias is not None:
        bias = class_bias(name, bias, vocab, vocab_size is None, device, dtype)
    if not isinstance(source, LogitMixture):
        return None if bias is None else Composition(class_bias=bias)
    others = []
    for place, other in enumerate(source.sources[1:], start=1):
        owner = f"{name}: sources[{place}]"
        if other is student:
            others.append(detached(problem.student))
            continue
        found, other_shape, other_vocab = side(owner, constant(other), vocab_size)
        if (other_shape, other_vocab) != (shape, vocab):
            raise ValueError(
                f"{owner} must have the tokens and the vocabulary of the others, {(*shape, vocab)}, "
                f"got {(*other_shape, other_vocab)}"
            )
        if found.tensor.device != device:
            raise ValueError(f"{owner} is on {found.tensor.device}, the student on {device}")
        if found.tensor.dtype == torch.float64 and dtype != torch.float64:
            raise TypeError(f"{owner} is float64; then the student or the first source must be float64 too")
        others.append(found)
    coefficients, offsets = weights(name, source, shape, device, dtype)
    limits = bounds(name, source, shape, device, dtype)
    return Composition(
        tuple(others), coefficients, offsets, bias, limits, *replaced(name, source, shape, vocab, device, dtype)
    )


def class_bias(name: str, bias: Tensor, vocab: int, whole: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[V]``; unless ``whole`` it may be that of a padded vocabulary."""
    if bias.shape[0] < vocab or (whole and bias.shape[0] != vocab):
        raise ValueError(f"{name}: class_bias must have {vocab} entries, got {bias.shape[0]}")
    if bias.device != device:
        raise ValueError(f"{name}: class_bias is on {bias.device}, the logits on {device}")
    return bias.detach()[:vocab].to(dtype).contiguous()


def rows_of(name: str, value: Coefficient, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number per token, ``[N]``, from one for all or one each; without a synchronisation, and constant."""
    if isinstance(value, Tensor):
        return per_token(name, "real", value, REAL_DTYPES, shape, device).detach().to(dtype)
    # A product, not a fill: in a compiled graph the number stays variable.
    return torch.ones(shape.numel(), dtype=dtype, device=device) * check_real(name, value)


def weights(
    name: str, mixture: LogitMixture, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The coefficients ``[N, M]`` and, of probabilities, the logarithms of the weights, yet without the normalisers."""
    count = len(mixture.sources)
    given = mixture.coefficients or (1 / count,) * count
    columns = [rows_of(f"{name}: coefficients[{i}]", value, shape, device, dtype) for i, value in enumerate(given)]
    found = torch.stack(columns, -1)
    if values_are_checked(found) and not bool(found.isfinite().all()):
        raise ValueError(f"{name}: coefficients must be finite for every token")
    if mixture.space == "logits":
        return found, None
    if values_are_checked(found) and not bool((found >= 0).all()):
        raise ValueError(f"{name}: coefficients of probabilities must not be negative, got {float(found.min())}")
    number, per_row = temperature(f"{name}: temperature", mixture.temperature, shape, device, dtype)
    tempered = torch.ones_like(found) / (number if per_row is None else per_row.detach().unsqueeze(-1))
    return tempered, found.log()


def bounds(
    name: str, mixture: LogitMixture, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """``[N, 2]``, or None where nothing is clipped."""
    if mixture.lower is None and mixture.upper is None:
        return None
    columns = []
    for bound, value, nothing in (("lower", mixture.lower, -math.inf), ("upper", mixture.upper, math.inf)):
        if value is None or (is_real(value) and value == nothing):
            columns.append(torch.full((shape.numel(),), nothing, dtype=dtype, device=device))
        else:
            columns.append(rows_of(f"{name}: {bound}", value, shape, device, dtype))
    found = torch.stack(columns, -1)
    if values_are_checked(found) and bool((found[:, 0] > found[:, 1]).any()):
        raise ValueError(f"{name}: lower must not exceed upper for any token")
    return found


def replaced(
    name: str, mixture: LogitMixture, shape: torch.Size, vocab: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    ids, values = mixture.replaced_ids, mixture.replacements
    if ids is None or values is None:
        return None, None
    if ids.shape == shape:
        ids, values = ids.unsqueeze(-1), values.unsqueeze(-1)
    if ids.shape[:-1] != shape or not 1 <= ids.shape[-1] <= MAX_REPLACED:
        raise ValueError(
            f"{name}: replaced_ids must have the shape {tuple(shape)} or {(*shape, 'R')} with R at most {MAX_REPLACED}, "
            f"got {tuple(ids.shape)}"
        )
    for what, tensor in (("replaced_ids", ids), ("replacements", values)):
        if tensor.device != device:
            raise ValueError(f"{name}: {what} are on {tensor.device}, the logits on {device}")
    count = ids.shape[-1]
    ids = ids.reshape(-1, count).long().contiguous()
    if values_are_checked(ids) and not bool(((ids >= -1) & (ids < vocab)).all()):
        wrong = ids[(ids < -1) | (ids >= vocab)][0].item()
        raise ValueError(f"{name}: replaced_ids must be token ids in [0, {vocab}) or -1, got {wrong}")
    return ids, values.detach().reshape(-1, count).to(dtype).contiguous()


def with_normalisers(problem: Problem, log_sum_exp: Callable[[Problem], Tensor]) -> Problem:
    """The same problem where each source of a mixture of probabilities is divided by its sum.

    ``log_sum_exp`` gives that of the student of a problem, ``[N]``.
    """
    composition = problem.spec.teacher_composition
    if composition is None or composition.offsets is None or composition.coefficients is None:
        return problem
    assert problem.teacher is not None
    active = problem.spec.active
    columns = []
    sides = (problem.teacher._replace(softcap=problem.spec.teacher_softcap), *composition.others)
    with torch.no_grad():
        for place, source in enumerate(sides):
            offset = composition.offsets[:, place]
            read = offset > -math.inf
            spec = RowSpec(
                0,
                0.0,
                0.0,
                student_temperatures=composition.coefficients[:, place].reciprocal(),
                student_softcap=source.softcap,
                active=read if active is None else read & active,
            )
            rows = problem._replace(
                student=source, teacher=None, batch_shape=offset.shape, spec=spec, dtype=problem.dtype
            )
            columns.append(offset - log_sum_exp(rows).to(problem.dtype))
    composition = composition._replace(offsets=torch.stack(columns, -1))
    return problem._replace(spec=problem.spec._replace(teacher_composition=composition))

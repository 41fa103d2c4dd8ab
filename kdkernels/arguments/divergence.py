"""The arguments of ``distillation_loss`` and ``token_statistics``."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments import sparse_teacher
from kdkernels.arguments.compositions import first_source, with_compositions
from kdkernels.arguments.rows import (
    CPU,
    INTEGER_DTYPES,
    REAL_DTYPES,
    Problem,
    active_rows,
    pair,
    per_token,
    side,
    temperature,
)
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import Policy
from kdkernels.checks import check_choice, check_flag, check_real
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import Decoupled, Divergence, Form, Kind
from kdkernels.sources import (
    DenseTeacher,
    LogitMixture,
    PackedLogits,
    SampledLogits,
    Source,
    SparseTeacher,
    TopKLogits,
)

__all__ = ["Total", "prepare_loss", "prepare_statistics", "with_tolerance"]

REDUCTIONS = ("none", "sum", "mean")

ROUNDINGS = ("nearest", "stochastic")


class Total(NamedTuple):
    """How the rows of a loss are scaled and summed. Weights are ``[N]`` of the compute type."""

    reduction: str
    divergence_scale: float | Tensor
    cross_entropy_scale: float | Tensor
    weight: Tensor | None
    normalizer: float | Tensor | None


def sparse_pair(
    student: Source,
    teacher: SparseTeacher,
    divergence: Divergence,
    vocab_size: int | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
) -> Problem:
    student_side, shape, vocab = side("student", student, vocab_size)
    device = student_side.tensor.device
    sparse_teacher.check_divergence(divergence, sparse_teacher.policy_of(teacher))
    rows = sparse_teacher.sparse_rows(teacher, shape, vocab, device)
    dtype = torch.float64 if student_side.tensor.dtype == torch.float64 else torch.float32
    number = temperature("temperature", student_temperature, shape, device, dtype)
    teachers = number
    if teacher_temperature is not None:
        teachers = temperature("teacher_temperature", teacher_temperature, shape, device, dtype)
    relative = sparse_teacher.relative_temperature(teacher, *teachers, of_student=teacher_temperature is None)
    if divergence.form.kind == Kind.SOFT_CROSS_ENTROPY and rows.policy == Policy.SAMPLED:
        rows = rows._replace(constants=None)  # the entropy, which is what the forward KL takes off
    spec = RowSpec(*divergence.form, *number, *relative, student_side.softcap)
    return Problem(student_side, None, shape, vocab, dtype, spec, rows)


def dense_pair(
    student: Source,
    teacher: DenseTeacher | None,
    form: Form,
    vocab_size: int | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
) -> Problem:
    """Two sources, each of which may be composed."""
    if isinstance(student, LogitMixture):
        raise TypeError("student is a LogitMixture, which may only be a teacher")
    firsts = first_source(student), None if teacher is None else first_source(teacher)
    problem = pair(*firsts, form, vocab_size, student_temperature, teacher_temperature)
    return with_compositions(problem, student, teacher, vocab_size)


def unit_interval(name: str, value: Tensor, problem: Problem) -> Tensor:
    """A parameter per token as ``[N]`` of the compute type."""
    rows = per_problem(name, value, problem)
    if values_are_checked(rows):
        allowed = (rows >= 0) & (rows <= 1)
        if not bool(allowed.all()):
            raise ValueError(f"{name} must be between 0 and 1 for every token, got {rows[~allowed][0].item()}")
    return rows


def per_problem(name: str, value: Tensor, problem: Problem) -> Tensor:
    """Real numbers per token as ``[N]`` of the compute type."""
    rows = per_token(name, "real", value, REAL_DTYPES, problem.batch_shape, problem.student.tensor.device)
    return rows.to(problem.dtype).contiguous()


def with_parameters(problem: Problem, divergence: Divergence) -> Problem:
    """Adds a parameter that is a tensor."""
    if isinstance(divergence, Decoupled):
        return with_parameters(problem, divergence.divergence)
    parameters = divergence.parameters
    if parameters is None:
        return problem
    name = f"{type(divergence).__name__}: {dataclasses.fields(divergence)[0].name}"  # type: ignore[arg-type]
    return problem._replace(spec=problem.spec._replace(parameters=unit_interval(name, parameters, problem)))


def with_targets(problem: Problem, divergence: Decoupled) -> Problem:
    """Adds the column that stands apart, which the labels name, and the weights of both parts."""
    spec = problem.spec
    assert spec.labels is not None
    if problem.vocab == 1:  # nothing stands beside the target: both parts are 0, and so is the divergence of the whole
        return problem
    targets = spec.labels if spec.active is None else spec.labels.masked_fill(~spec.active, -1)
    target_weight, target_weights = number_or_rows("Decoupled: target_weight", divergence.target_weight, problem)
    rest_weight, rest_weights = number_or_rows("Decoupled: rest_weight", divergence.rest_weight, problem)
    return problem._replace(
        spec=spec._replace(
            targets=targets,
            target_weight=target_weight,
            target_weights=target_weights,
            rest_weight=rest_weight,
            rest_weights=rest_weights,
        )
    )


def number_or_rows(name: str, value: float | Tensor, problem: Problem) -> tuple[float, Tensor | None]:
    """A number for all rows, or one per row."""
    return (1.0, per_problem(name, value, problem)) if isinstance(value, Tensor) else (value, None)


def check_normalizer(normalizer: object, device: torch.device) -> None:
    if not isinstance(normalizer, Tensor):
        check_real("normalizer", normalizer, positive=True)
        return
    if normalizer.dim() != 0 or normalizer.dtype not in REAL_DTYPES:
        raise TypeError(
            f"normalizer must be a number or a 0-d real tensor, got {normalizer.dtype} {tuple(normalizer.shape)}"
        )
    if normalizer.device not in (device, CPU):
        raise ValueError(f"normalizer is on {normalizer.device}, the student on {device}")
    if values_are_checked(normalizer):
        check_real("normalizer", normalizer.item(), positive=True)


def prepare_loss(
    student: Source,
    teacher: DenseTeacher | SparseTeacher,
    divergence: Divergence,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    ce_weight: float | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    temperature_squared: bool,
    vocab_size: int | None,
) -> tuple[Problem, Total]:
    """Checks the arguments of ``distillation_loss``."""
    if not isinstance(divergence, Divergence):
        hint = f"{divergence.__name__}()" if isinstance(divergence, type) else "kd.ForwardKL()"
        raise TypeError(f"divergence must be an instance such as {hint}, got {divergence!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if teacher is None:
        raise TypeError("teacher must be a tensor of logits, kd.Logits, kd.LMHead or a sparse teacher, got None")
    if not isinstance(ce_weight, Tensor):
        ce_weight = check_real("ce_weight", ce_weight)
    hard = isinstance(ce_weight, Tensor) or ce_weight != 0
    if hard and labels is None:
        raise ValueError(f"ce_weight={ce_weight} asks for a hard-label term, which needs labels")
    if labels is None and isinstance(divergence, Decoupled):
        raise ValueError("divergence Decoupled sets the labels' entries apart, and needs labels")
    if isinstance(teacher, TopKLogits | SampledLogits | PackedLogits):
        problem = sparse_pair(student, teacher, divergence, vocab_size, temperature, teacher_temperature)
    else:
        problem = dense_pair(student, teacher, divergence.form, vocab_size, temperature, teacher_temperature)
    problem = with_parameters(problem, divergence)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"normalizer replaces the count of reduction='mean'; it cannot go with reduction={reduction!r}"
            )
        check_normalizer(normalizer, problem.student.tensor.device)
    if mask is not None or labels is not None:
        problem = active_rows(problem, mask, labels, ignore_index)
        if isinstance(divergence, Decoupled):
            problem = with_targets(problem, divergence)
        if not hard:
            problem = problem._replace(spec=problem.spec._replace(labels=None))
    spec = problem.spec
    if problem.sparse is not None:
        sparse_teacher.check_values(problem.sparse, problem.vocab, spec.active)
    if weight is not None:
        device = problem.student.tensor.device
        weight = per_token("weight", "real", weight, REAL_DTYPES, problem.batch_shape, device).to(problem.dtype)
        if spec.active is not None:
            weight = weight.masked_fill(~spec.active, 0.0)
    if isinstance(ce_weight, Tensor):
        ce_weight = per_problem("ce_weight", ce_weight, problem)
        if spec.active is not None:
            ce_weight = ce_weight.masked_fill(~spec.active, 0.0)
    scale: float | Tensor = 1.0
    if check_flag("temperature_squared", temperature_squared):
        rows = spec.student_temperatures
        scale = spec.student_temperature**2 if rows is None else rows.square()
    return problem, Total(reduction, scale, ce_weight, weight, normalizer)


def prepare_statistics(
    student: Source,
    teacher: DenseTeacher | None,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    vocab_size: int | None,
) -> Problem:
    """Checks the arguments of ``token_statistics``."""
    problem = dense_pair(student, teacher, Form(0), vocab_size, temperature, teacher_temperature)
    return active_rows(problem, mask, labels, ignore_index)


def check_order(order: Tensor, problem: Problem) -> Tensor:
    """An order of the vocabulary as int32 ``[V]``."""
    if not isinstance(order, Tensor) or order.dtype not in INTEGER_DTYPES or order.shape != (problem.vocab,):
        given = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"vocabulary_order must be an integer tensor of shape ({problem.vocab},), got {given}")
    if order.device != problem.student.tensor.device:
        raise ValueError(f"vocabulary_order is on {order.device}, the student on {problem.student.tensor.device}")
    ids = torch.arange(problem.vocab, device=order.device)
    if values_are_checked(order) and not torch.equal(order.long().sort()[0], ids):
        raise ValueError(f"vocabulary_order must have each id in [0, {problem.vocab}) once")
    return order.to(torch.int32).contiguous()


def with_tolerance(
    problem: Problem,
    tolerance: float,
    rounding: str,
    generator: torch.Generator | None,
    order: Tensor | None = None,
) -> Problem:
    """Says what the logit gradients of LM heads may leave out."""
    eps = check_real("gradient_tolerance", tolerance)
    if not 0 <= eps < 1:
        raise ValueError(f"gradient_tolerance must be at least 0 and less than 1, got {tolerance!r}")
    stochastic = check_choice("gradient_rounding", rounding, ROUNDINGS) == "stochastic"
    if generator is not None:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            given = f"one on {generator.device}" if isinstance(generator, torch.Generator) else type(generator).__name__
            raise TypeError(f"generator must be a torch.Generator on the CPU, got {given}")
        if not stochastic:
            raise ValueError(f"generator is for gradient_rounding='stochastic', not for {rounding!r}")
    if order is not None:
        order = check_order(order, problem)
    if eps == 0:
        return problem
    seed = torch.randint(1 << 62, (), generator=generator) if stochastic else None
    return problem._replace(
        spec=problem.spec._replace(gradient_tolerance=eps, gradient_seed=seed, vocabulary_order=order)
    )

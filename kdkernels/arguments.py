"""Public arguments, checked and brought into the shape that operators work on: rows ``[N, ...]``.

Every refusal happens here, before a kernel runs, and names the argument, what was given and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import sparse_arguments
from kdkernels.autocast import autocast_dtype
from kdkernels.backends.rows import RowSpec, Side, Tempering
from kdkernels.backends.sparse_rows import SparseRows
from kdkernels.checks import LOGIT_DTYPES, check_choice, check_flag, check_floating, check_integer, check_real
from kdkernels.debugging import debug, values_are_checked
from kdkernels.divergences import Divergence, Form
from kdkernels.records import BITS, check_tail
from kdkernels.sources import (
    CODECS,
    MAX_VOCAB_SIZE,
    LMHead,
    Logits,
    PackedLogits,
    SampledLogits,
    Source,
    SparseTeacher,
    TopKLogits,
)

__all__ = [
    "Picking",
    "Problem",
    "Total",
    "check_memory_budget",
    "debug",
    "pack_rows",
    "prepare_loss",
    "prepare_sample",
    "prepare_statistics",
    "prepare_topk",
    "unpack_rows",
    "with_tolerance",
]

CPU = torch.device("cpu")
REDUCTIONS = ("none", "sum", "mean")
ROUNDINGS = ("nearest", "stochastic")
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REAL_DTYPES = LOGIT_DTYPES + INTEGER_DTYPES


class Problem(NamedTuple):
    """A pair of sources whose rows, vocabulary and device agree."""

    student: Side
    teacher: Side | None
    batch_shape: torch.Size
    vocab: int
    dtype: torch.dtype
    """The compute type."""
    spec: RowSpec
    sparse: SparseRows | None = None
    """A teacher that is truncated or sampled; there is no other then."""


class Total(NamedTuple):
    """How the rows of a loss are scaled and summed. Weights are ``[N]`` of the compute type."""

    reduction: str
    divergence_scale: float | Tensor
    cross_entropy_scale: float
    weight: Tensor | None
    normalizer: float | Tensor | None


class Picking(NamedTuple):
    """A source that ids are picked from, and what they are picked by."""

    source: Side
    batch_shape: torch.Size
    vocab: int
    entries: int
    """Ids per token."""
    tempering: Tempering


def side(name: str, source: Source, vocab_size: int | None) -> tuple[Side, torch.Size, int]:
    """The rows of a source, the shape of its batch and its vocabulary."""
    if isinstance(source, LMHead):
        return head_side(source, vocab_size, name)
    donate = isinstance(source, Logits) and source.donate
    if isinstance(source, Logits):
        source = source.tensor
    elif not isinstance(source, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, kd.Logits or kd.LMHead, got {type(source).__name__}")
    check_floating(f"{name}: logits", source)
    shape = source.shape
    if not shape:
        raise ValueError(f"{name}: logits must have the shape [..., V], got a 0-d tensor")
    vocab = shape[-1]
    if vocab_size is not None:
        check_vocab_size(name, vocab_size, vocab)
        source = source[..., :vocab_size]
        vocab = vocab_size
    if vocab == 0:
        raise ValueError(f"{name}: the vocabulary is empty, shape {tuple(source.shape)}")
    rows = source if len(shape) == 2 else source.reshape(-1, vocab)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return Side(rows, None, None, 1.0, 0.0, donate), shape[:-1], vocab


def head_side(source: LMHead, vocab_size: int | None, name: str) -> tuple[Side, torch.Size, int]:
    hidden, weight, bias = source.hidden, source.weight, source.bias
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    vocab = weight.shape[0]
    if vocab_size is not None:
        check_vocab_size(name, vocab_size, vocab)
        weight = weight[:vocab_size]
        bias = None if bias is None else bias[:vocab_size]
        vocab = vocab_size
    if vocab == 0:
        raise ValueError(f"{name}: the vocabulary is empty, weight {tuple(weight.shape)}")
    scale = 1.0 if source.logit_scale is None else source.logit_scale
    softcap = 0.0 if source.softcap is None else source.softcap
    rows = hidden.reshape(-1, hidden.shape[-1])
    return Side(rows, weight, bias, scale, softcap), hidden.shape[:-1], vocab


def check_vocab_size(name: str, vocab_size: int, vocab: int) -> None:
    if not 1 <= check_integer("vocab_size", vocab_size) <= vocab:
        raise ValueError(f"vocab_size must be between 1 and the {name}'s vocabulary of {vocab}, got {vocab_size!r}")


def per_token(
    name: str, kind: str, value: object, dtypes: Container[torch.dtype], problem_shape: torch.Size, device: torch.device
) -> Tensor:
    """A per-token tensor as ``[N]``; 0-d tensors serve every token."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout != torch.strided:
        given = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a dense {kind} tensor with one entry per token, got {given}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}")
    if value.dim() == 0:
        return value.expand(problem_shape.numel())
    if value.shape != problem_shape:
        raise ValueError(
            f"{name} must have one entry per token, shape {tuple(problem_shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(-1)


def temperature(
    name: str, value: float | Tensor, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        rows = per_token(name, "real", value, REAL_DTYPES, shape, device).to(dtype).contiguous()
        if values_are_checked(rows):
            allowed = (rows > 0) & (rows < math.inf)
            if not bool(allowed.all()):
                raise ValueError(f"{name} must be positive and finite for every token, got {rows[~allowed][0].item()}")
        return 1.0, rows
    return check_real(name, value, positive=True), None


def pair(
    student: Source,
    teacher: Source | None,
    form: Form,
    vocab_size: int | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
) -> Problem:
    student_side, shape, vocab = side("student", student, vocab_size)
    device = student_side.tensor.device
    double = student_side.tensor.dtype == torch.float64
    teacher_side = None
    if teacher is not None:
        teacher_side, teacher_shape, teacher_vocab = side("teacher", teacher, vocab_size)
        if teacher_shape != shape:
            raise ValueError(
                f"student and teacher must have the same tokens: the student's batch has the shape {tuple(shape)}, "
                f"the teacher's {tuple(teacher_shape)}"
            )
        if teacher_vocab != vocab:
            raise ValueError(
                f"student and teacher have vocabularies of {vocab} and {teacher_vocab} entries. If the larger is the "
                f"same vocabulary with padding, use vocab_size={min(vocab, teacher_vocab)}; different tokenizers need "
                f"a cross-tokenizer loss"
            )
        if teacher_side.tensor.device != device:
            raise ValueError(f"the student is on {device} and the teacher on {teacher_side.tensor.device}")
        double = double or teacher_side.tensor.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    number, rows = temperature("temperature", student_temperature, shape, device, dtype)
    teacher_number, teacher_rows = number, rows
    if teacher_temperature is not None:
        teacher_number, teacher_rows = temperature("teacher_temperature", teacher_temperature, shape, device, dtype)
    spec = RowSpec(
        form.kind,
        form.a,
        form.b,
        number,
        rows,
        teacher_number,
        teacher_rows,
        student_side.softcap,
        0.0 if teacher_side is None else teacher_side.softcap,
    )
    return Problem(student_side, teacher_side, shape, vocab, dtype, spec)


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
    sparse_arguments.check_divergence(divergence, sparse_arguments.policy_of(teacher))
    rows = sparse_arguments.sparse_rows(teacher, shape, vocab, device)
    dtype = torch.float64 if student_side.tensor.dtype == torch.float64 else torch.float32
    number = temperature("temperature", student_temperature, shape, device, dtype)
    teachers = number
    if teacher_temperature is not None:
        teachers = temperature("teacher_temperature", teacher_temperature, shape, device, dtype)
    relative = sparse_arguments.relative_temperature(teacher, *teachers, of_student=teacher_temperature is None)
    spec = RowSpec(*divergence.form, *number, *relative, student_side.softcap)
    return Problem(student_side, None, shape, vocab, dtype, spec, rows)


def active_rows(problem: Problem, mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Problem:
    """Adds which rows count, and the labels."""
    device, shape = problem.student.tensor.device, problem.batch_shape
    active = None
    if mask is not None:
        active = per_token("mask", "bool", mask, (torch.bool,), shape, device)
    if labels is not None:
        labels = per_token("labels", "integer", labels, INTEGER_DTYPES, shape, device).long().contiguous()
        kept = labels != check_integer("ignore_index", ignore_index)
        active = kept if active is None else active & kept
        in_range = (labels >= 0) & (labels < problem.vocab) | ~active
        if values_are_checked(labels):
            if not bool(in_range.all()):
                row = int((~in_range).nonzero()[0, 0])
                raise ValueError(
                    f"labels must be token ids in [0, {problem.vocab}) or ignore_index={ignore_index}; "
                    f"token {row} has {int(labels[row])}"
                )
        elif device.type != "cpu":
            torch._assert_async(in_range.all(), f"labels must be token ids in [0, {problem.vocab}) or ignore_index")
    if active is not None:
        active = active.contiguous()
    return problem._replace(spec=problem.spec._replace(labels=labels, active=active))


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


def check_memory_budget(memory_budget: object) -> None:
    if memory_budget is not None and check_integer("memory_budget", memory_budget) <= 0:
        raise ValueError(f"memory_budget must be None or a positive number of bytes, got {memory_budget!r}")


def prepare_loss(
    student: Source,
    teacher: Source | SparseTeacher,
    divergence: Divergence,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    ce_weight: float,
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
    ce_weight = check_real("ce_weight", ce_weight)
    if ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} asks for a hard-label term, which needs labels")
    if isinstance(teacher, TopKLogits | SampledLogits | PackedLogits):
        problem = sparse_pair(student, teacher, divergence, vocab_size, temperature, teacher_temperature)
    else:
        problem = pair(student, teacher, divergence.form, vocab_size, temperature, teacher_temperature)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"normalizer replaces the count of reduction='mean'; it cannot go with reduction={reduction!r}"
            )
        check_normalizer(normalizer, problem.student.tensor.device)
    if mask is not None or labels is not None:
        problem = active_rows(problem, mask, labels, ignore_index)
        if ce_weight == 0:
            problem = problem._replace(spec=problem.spec._replace(labels=None))
    spec = problem.spec
    if problem.sparse is not None:
        sparse_arguments.check_values(problem.sparse, problem.vocab, spec.active)
    if weight is not None:
        device = problem.student.tensor.device
        weight = per_token("weight", "real", weight, REAL_DTYPES, problem.batch_shape, device).to(problem.dtype)
        if spec.active is not None:
            weight = weight.masked_fill(~spec.active, 0.0)
    scale: float | Tensor = 1.0
    if check_flag("temperature_squared", temperature_squared):
        rows = spec.student_temperatures
        scale = spec.student_temperature**2 if rows is None else rows.square()
    return problem, Total(reduction, scale, ce_weight, weight, normalizer)


def prepare_statistics(
    student: Source,
    teacher: Source | None,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    vocab_size: int | None,
) -> Problem:
    """Checks the arguments of ``token_statistics``."""
    problem = pair(student, teacher, Form(0), vocab_size, temperature, teacher_temperature)
    return active_rows(problem, mask, labels, ignore_index)


def with_tolerance(problem: Problem, tolerance: float, rounding: str, generator: torch.Generator | None) -> Problem:
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
    if eps == 0:
        return problem
    seed = torch.randint(1 << 62, (), generator=generator) if stochastic else None
    return problem._replace(spec=problem.spec._replace(gradient_tolerance=eps, gradient_seed=seed))


def picking(
    source: Source, name: str, entries: int, temperature: float, proposal: float, vocab_size: int | None
) -> Picking:
    side_rows, shape, vocab = side("source", source, vocab_size)
    if vocab > MAX_VOCAB_SIZE:
        raise ValueError(f"source: the vocabulary must have at most {MAX_VOCAB_SIZE} entries, got {vocab}")
    if check_integer(name, entries) < 1:
        raise ValueError(f"{name} must be at least 1, got {entries}")
    tau = check_real("temperature", temperature, positive=True)
    proposal_tau = tau * check_real("proposal_temperature", proposal, positive=True)
    return Picking(side_rows, shape, vocab, entries, Tempering(tau, side_rows.softcap, proposal_tau))


def prepare_topk(source: Source, k: int, *, top_p: float | None, temperature: float, vocab_size: int | None) -> Picking:
    """Checks the arguments of ``topk_logits``."""
    found = picking(source, "k", k, temperature, 1.0, vocab_size)
    if k > found.vocab:
        raise ValueError(f"k must be at most the source's vocabulary of {found.vocab}, got {k}")
    if top_p is not None and not 0 < check_real("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be None or in (0, 1], got {top_p!r}")
    return found


def prepare_sample(
    source: Source,
    n: int,
    *,
    generator: torch.Generator | None,
    temperature: float,
    proposal_temperature: float,
    vocab_size: int | None,
) -> Picking:
    """Checks the arguments of ``sample_logits``."""
    found = picking(source, "n", n, temperature, proposal_temperature, vocab_size)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be None or a torch.Generator, got {generator!r}")
        if generator.device.type != found.source.tensor.device.type:
            raise ValueError(f"generator is on {generator.device}, the source on {found.source.tensor.device}")
    return found


def pack_rows(topk: TopKLogits, codec: str, pack_records: Callable[..., tuple[Tensor, Tensor]]) -> PackedLogits:
    """``pack`` with the row function of a backend."""
    if not isinstance(topk, TopKLogits):
        raise TypeError(f"topk must be kd.TopKLogits, got {type(topk).__name__}")
    check_choice("codec", codec, CODECS)
    width = topk.ids.shape[-1]
    log_tail_mass = None
    if topk.log_tail_mass is not None:
        log_tail_mass = topk.log_tail_mass.detach().reshape(-1)
        check_tail(log_tail_mass)
    rows = topk.batch_shape.numel()
    data, counts = pack_records(
        topk.ids.reshape(rows, width),
        topk.log_probs.detach().reshape(rows, width),
        log_tail_mass,
        topk.vocab_size,
        BITS[codec],
    )
    return PackedLogits(
        data,
        counts.reshape(topk.batch_shape),
        vocab_size=topk.vocab_size,
        codec=codec,
        tail=topk.tail,
        temperature=topk.temperature,
    )


def unpack_rows(packed: PackedLogits, unpack_records: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> TopKLogits:
    """``unpack`` with the row function of a backend."""
    if not isinstance(packed, PackedLogits):
        raise TypeError(f"packed must be kd.PackedLogits, got {type(packed).__name__}")
    counts = packed.counts.reshape(-1)
    # A hostile count must not decide how much memory is asked for: each entry takes a bit at least.
    width = min(max(0, int(counts.max())) if counts.numel() else 0, 8 * packed.data.numel())
    ids, log_probs, log_tail_mass = unpack_records(packed.data, counts, packed.vocab_size, BITS[packed.codec], width)
    return TopKLogits(
        ids.view(*packed.batch_shape, width),
        log_probs.view(*packed.batch_shape, width),
        vocab_size=packed.vocab_size,
        tail=packed.tail,
        temperature=packed.temperature,
        log_tail_mass=log_tail_mass.view(packed.batch_shape),
    )

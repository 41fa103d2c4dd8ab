"""Sources and per-token arguments as rows ``[N, ...]``."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.autocast import autocast_dtype
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.backends.sparse_rows import SparseRows
from kdkernels.checks import LOGIT_DTYPES, check_floating, check_integer, check_real
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import Form
from kdkernels.sources import (
    LMHead,
    LogitMixture,
    Logits,
    Source,
)

__all__ = [
    "CPU",
    "INTEGER_DTYPES",
    "REAL_DTYPES",
    "Problem",
    "active_rows",
    "check_memory_budget",
    "check_same_device",
    "check_same_tokens",
    "check_same_vocab",
    "pair",
    "per_token",
    "side",
    "temperature",
]

CPU = torch.device("cpu")

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


def side(name: str, source: Source, vocab_size: int | None) -> tuple[Side, torch.Size, int]:
    """The rows of a source, the shape of its batch and its vocabulary."""
    if isinstance(source, LMHead):
        return head_side(source, vocab_size, name)
    donate = isinstance(source, Logits) and source.donate
    if isinstance(source, Logits):
        if source.class_bias is not None:
            raise TypeError(
                f"{name}: a class_bias is supported only by distillation_loss with dense teachers and token_statistics"
            )
        source = source.tensor
    elif isinstance(source, LogitMixture):
        raise TypeError(
            f"{name} is a LogitMixture, which may only be the teacher of distillation_loss and token_statistics"
        )
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
    dtype = source.compute_dtype
    if dtype is None and hidden.dtype != torch.float64:
        dtype = autocast_dtype(hidden.device.type)
    if dtype is not None:
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


def check_same_vocab(student_vocab: int, teacher_vocab: int) -> None:
    if teacher_vocab != student_vocab:
        raise ValueError(
            f"student and teacher have vocabularies of {student_vocab} and {teacher_vocab} entries. If the larger is the "
            f"same vocabulary with padding, use vocab_size={min(student_vocab, teacher_vocab)}; different tokenizers need "
            f"a cross-tokenizer loss"
        )


def check_same_tokens(shape: torch.Size, teacher_shape: torch.Size) -> None:
    if teacher_shape != shape:
        raise ValueError(
            f"student and teacher must have the same tokens: the student's batch has the shape {tuple(shape)}, "
            f"the teacher's {tuple(teacher_shape)}"
        )


def check_same_device(student: Side, teacher: Side) -> None:
    device, teacher_device = student.tensor.device, teacher.tensor.device
    if teacher_device != device:
        raise ValueError(f"the student is on {device} and the teacher on {teacher_device}")


def pair(
    student: Source,
    teacher: Source | None,
    form: Form,
    vocab_size: int | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    *,
    same_vocabulary: bool = True,
) -> Problem:
    """Two sources of the same tokens; where their vocabularies may differ, ``Problem.vocab`` is the student's."""
    student_side, shape, vocab = side("student", student, vocab_size)
    device = student_side.tensor.device
    double = student_side.tensor.dtype == torch.float64
    teacher_side = None
    if teacher is not None:
        teacher_side, teacher_shape, teacher_vocab = side("teacher", teacher, vocab_size)
        check_same_tokens(shape, teacher_shape)
        if same_vocabulary:
            check_same_vocab(vocab, teacher_vocab)
        check_same_device(student_side, teacher_side)
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


def check_memory_budget(memory_budget: object) -> None:
    if memory_budget is not None and check_integer("memory_budget", memory_budget) < 0:
        raise ValueError(f"memory_budget must be None or a number of bytes, 0 or more, got {memory_budget!r}")

"""What the tests run in a process of its own, where the CUDA kernels are emulated (see the fixture `emulated`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import cuda as backend
from kdkernels.backends.cuda.launching import module
from kdkernels.backends.cuda.sparse_divergence import SPARSE_STATISTICS
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import SparseRows
from kdkernels.validation.comparison import Finding, Target, validate

UNTOUCHED = 7.0
"""Fills gradient buffers beforehand, so that an element that was not written shows."""


def availability() -> dict[str, Any]:
    return {"status": backend.status(), "cpu": backend.supports("cpu"), "cuda": backend.supports("cuda")}


def findings(target: Target) -> list[Finding]:
    """What the backend makes of all cases of an operation, held against the truth."""
    return list(validate(target, "cpu"))


def loss_and_gradients(
    student: Tensor, teacher: Tensor, divergence: kd.Divergence, options: dict[str, Any], backend: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient to the student, gradient to the teacher)."""
    leaves = [logits.detach().requires_grad_() for logits in (student, teacher)]
    loss = kd.distillation_loss(*leaves, divergence, backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def loss(student: Tensor, teacher: Tensor, divergence: kd.Divergence, backend: str = "cuda") -> Tensor:
    """Of each row, and no gradients."""
    return kd.distillation_loss(student, teacher, divergence, reduction="none", backend=backend)


def divergence(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grads: tuple[bool, bool] = (True, True),
    in_place: bool = False,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(divergence, cross_entropy, grad_student, grad_teacher); the gradients' rows have `padding` more elements."""

    def buffer(logits: Tensor, wanted: bool) -> Tensor | None:
        if not wanted or in_place:
            return logits if wanted else None
        rows, vocab_size = logits.shape
        return torch.full((rows, vocab_size + padding), UNTOUCHED, dtype=logits.dtype)

    to_student, to_teacher = buffer(student, grads[0]), buffer(teacher, grads[1])
    views = [None if each is None else each[:, : student.shape[1]] for each in (to_student, to_teacher)]
    grad_cross_entropy = None if spec.labels is None else grad_divergence
    values = backend.divergence_fused(student, teacher, spec, grad_divergence, grad_cross_entropy, *views)
    return *values, to_student, to_teacher


def sparse_divergence(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None = None,
    in_place: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(divergence, cross_entropy, grad_student); with an `offset`, rows begin there in longer ones of odd length.

    What surrounds the gradient's rows then must stay as it was.
    """
    rows, vocab = student.shape
    surrounding = 2 * offset + 1 if offset else 0
    within = slice(offset, offset + vocab)
    logits = student.new_full((rows, vocab + surrounding), torch.nan)
    logits[:, within] = student
    gradient = logits if in_place else torch.full_like(logits, UNTOUCHED)
    wanted = None if grad_divergence is None else gradient[:, within]
    around = gradient.clone()
    values = backend.sparse_divergence_fused(
        logits[:, within], teacher, spec, grad_divergence, grad_cross_entropy, wanted
    )
    around[:, within] = gradient[:, within]
    torch.testing.assert_close(gradient, around, rtol=0, atol=0, equal_nan=True)
    return *values, None if wanted is None else wanted.contiguous()


def saved_statistics() -> tuple[int, int]:
    """Columns of what the forward of a divergence leaves to its backward, by the kernels and by the backend."""
    return module().SAVED_STATISTICS, backend.SAVED_STATISTICS


def sparse_statistics() -> tuple[int, int]:
    """Columns of what the launches of a sparse divergence leave to each other, by the kernels and by the backend."""
    return module().SPARSE_STATISTICS, SPARSE_STATISTICS


def refusal(function: str, *arguments: Any, **options: Any) -> str:
    """The text of what a public function raises with the backend asked for by name."""
    try:
        getattr(kd, function)(*arguments, backend="cuda", **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def topk_logits(logits: Tensor, k: int, options: dict[str, Any]) -> kd.TopKLogits:
    return kd.topk_logits(logits, k, **options)


def refused_or(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the text of the ValueError that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def faulty_kernels() -> list[str]:
    return module().faulty_kernels()


def run_faulty(name: str) -> str:
    """What the emulator says of a kernel that is wrong in one way."""
    return module().run_faulty(name)


class Device(NamedTuple):
    """What a block of the emulated device has of shared memory, and whether blocks come in clusters."""

    shared_bytes: int
    clusters: bool = True


def on_device(device: Device, function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """What a function returns on that device; by the names of kernels (bytes loaded, stored, blocks of a cluster)."""
    emulated = module()
    emulated.forget_records()
    emulated.emulate_device(*device)
    try:
        return function(*arguments), emulated.records()
    finally:
        emulated.emulate_device(48 << 10, True)


def each(function: Callable[..., Any], cases: Sequence[Sequence[Any]]) -> list[Any]:
    return [function(*arguments) for arguments in cases]

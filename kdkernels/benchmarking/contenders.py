"""Who computes a workload: ours, plain PyTorch, others' kernels, and the floors ours is held against.

A contender is prepared once for a workload and its inputs; the call it then gives back is what is measured. Losses answer
``(loss, *gradients)``, floors whatever they have written.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import kdkernels as kd
from kdkernels.backends import NAMES, row_backend, select, serves
from kdkernels.backends.chunked_head import chunks
from kdkernels.backends.rows import RowSpec, Side, compute_dtype
from kdkernels.benchmarking.plain import (
    mean_divergence,
    mean_divergence_from_stored,
    pair_distances,
    sinkhorn_distances,
    top_log_probs,
)
from kdkernels.benchmarking.workloads import EPSILON, ITERATIONS, TOP, Inputs, Operation, Workload
from kdkernels.divergences import Kind
from kdkernels.environment import package_version

__all__ = ["CONTENDERS", "FLOORS", "LOSSES", "OURS", "Call", "Contender", "ours_on"]

Call = Callable[[], tuple[Tensor, ...]]
OURS = "kdkernels"


def always(workload: Workload) -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    name: str
    prepare: Callable[[Workload, Inputs], Call]
    why_not: Callable[[Workload], str] = always
    """Why it cannot run that workload here; empty if it can."""
    compiles: bool = False
    """Whether the first call compiles for the shapes it is given, which is not part of what it costs."""


def loss_and_gradients(loss: Callable[[], Tensor], workload: Workload, inputs: Inputs) -> Call:
    if not workload.operation.differentiates:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(),)

        return forward

    def forward_backward() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, inputs.wanted)

    return forward_backward


# --- ours ---------------------------------------------------------------------------------------------------------------


def prepare_ours(workload: Workload, inputs: Inputs, backend: str | None = None) -> Call:
    student, teacher = inputs.student, inputs.teacher

    def divergence() -> Tensor:
        source: kd.Logits | kd.LMHead | Tensor = student
        target: kd.TopKLogits | kd.LMHead | Tensor = teacher
        if inputs.student_weight is not None and inputs.teacher_weight is not None:
            source, target = kd.LMHead(student, inputs.student_weight), kd.LMHead(teacher, inputs.teacher_weight)
        elif inputs.ids is not None:
            target = kd.TopKLogits(inputs.ids, teacher, vocab_size=workload.vocab)
        return kd.distillation_loss(source, target, workload.divergence, backend=backend)

    def top() -> Tensor:
        return kd.topk_logits(student, min(TOP, workload.vocab), backend=backend).log_probs.mean()

    def transport() -> Tensor:
        # Eager PyTorch differentiates what it has computed, too.
        options: dict[str, Any] = {"epsilon": EPSILON, "max_iterations": ITERATIONS, "gradient": "unrolled"}
        return kd.sinkhorn(student, **options, backend=backend).distance.mean()

    def pairs() -> Tensor:
        return kd.pairwise_l1(student, teacher, backend=backend).mean()

    losses = {Operation.TOPK: top, Operation.SINKHORN: transport, Operation.PAIRS: pairs}
    return loss_and_gradients(losses.get(workload.operation, divergence), workload, inputs)


def why_not_on(workload: Workload, backend: str) -> str:
    served, reason = serves(backend, workload.operation.family)
    if not served:
        return reason
    try:
        select(backend, torch.device(workload.device).type)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def ours_on(backend: str) -> Contender:
    """Ours on one backend, whichever is the best."""
    return Contender(
        f"{OURS} ({backend})",
        functools.partial(prepare_ours, backend=backend),
        functools.partial(why_not_on, backend=backend),
    )


def prepare_into_buffer(workload: Workload, inputs: Inputs) -> Call:
    """The row kernel alone; its gradient goes to memory that is there already."""
    kernels = row_backend(select(None, torch.device(workload.device).type))
    student, teacher = inputs.student.detach(), inputs.teacher
    gradient = torch.zeros_like(student)
    spec = RowSpec(*workload.divergence.form)
    scale = torch.full(
        (workload.tokens,), 1 / workload.tokens, dtype=compute_dtype(student, teacher), device=workload.device
    )

    def run() -> tuple[Tensor, ...]:
        divergence, _ = kernels.divergence_fused(student, teacher, spec, scale, None, gradient, None)
        return divergence.mean(), gradient

    return run


def why_not_into_buffer(workload: Workload) -> str:
    if workload.operation is not Operation.DENSE:
        return "only the gradient of logits can go to a ready buffer"
    if select(None, torch.device(workload.device).type) == "reference":
        return "no kernels are available on this device"
    return ""


# --- plain PyTorch ------------------------------------------------------------------------------------------------------


def plain_loss(workload: Workload) -> Callable[..., Tensor]:
    of_logits = mean_divergence(workload.divergence)

    def of_heads(student: Tensor, teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor) -> Tensor:
        return of_logits(functional.linear(student, student_weight), functional.linear(teacher, teacher_weight))

    def top(logits: Tensor, _: Tensor) -> Tensor:
        return top_log_probs(logits, min(TOP, workload.vocab)).mean()

    def transport(cost: Tensor, _: Tensor) -> Tensor:
        return sinkhorn_distances(cost, EPSILON, ITERATIONS).mean()

    def pairs(student: Tensor, teacher: Tensor) -> Tensor:
        return pair_distances(student, teacher).mean()

    losses: dict[Operation, Callable[..., Tensor]] = {
        Operation.HEAD: of_heads,
        Operation.STORED: mean_divergence_from_stored(workload.divergence),
        Operation.TOPK: top,
        Operation.SINKHORN: transport,
        Operation.PAIRS: pairs,
    }
    return losses.get(workload.operation, of_logits)


def given(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor is not None)


def prepare_eager(workload: Workload, inputs: Inputs) -> Call:
    loss = plain_loss(workload)
    return loss_and_gradients(lambda: loss(*given(inputs)), workload, inputs)


def prepare_compiled(workload: Workload, inputs: Inputs) -> Call:
    loss = torch.compile(plain_loss(workload), fullgraph=True, dynamic=False)
    return loss_and_gradients(lambda: loss(*given(inputs)), workload, inputs)


def why_not_compiled(workload: Workload) -> str:
    return "compiling the unrolled loop takes minutes" if workload.operation is Operation.SINKHORN else ""


# --- Liger-Kernel -------------------------------------------------------------------------------------------------------
# Its forward KL, reverse KL and JSD mean the same as ours: 0, 1 and beta on the teacher's side of the mixture.


def liger_beta(workload: Workload) -> float | None:
    kind, a, _ = workload.divergence.form
    return {Kind.FORWARD_KL: 0.0, Kind.REVERSE_KL: 1.0, Kind.JSD: a}.get(Kind(kind))


def why_not_liger_chunked(workload: Workload) -> str:
    if package_version("liger-kernel") is None:
        return "liger-kernel is not installed"
    if workload.operation is not Operation.HEAD:
        return "it computes LM heads only"
    if liger_beta(workload) is None:
        return f"it has no {workload.divergence!r}"
    return ""


def why_not_liger_triton(workload: Workload) -> str:
    if package_version("liger-kernel") is None:
        return "liger-kernel is not installed"
    if torch.device(workload.device).type == "cpu":
        return "its kernels are written in Triton, which does not run on the CPU"
    if workload.operation not in {Operation.DENSE, Operation.FORWARD, Operation.HEAD}:
        return "it has no such operation"
    kind = workload.divergence.form.kind
    if liger_beta(workload) is None and not (kind == Kind.TVD and workload.operation is not Operation.HEAD):
        return f"it has no {workload.divergence!r} for these inputs"
    return ""


def prepare_liger_triton(workload: Workload, inputs: Inputs) -> Call:
    liger: Any = importlib.import_module("liger_kernel.transformers.functional")
    beta = liger_beta(workload)
    dtype = torch.promote_types(workload.dtype, torch.float32)

    def of_logits(prepared: Callable[..., Tensor], function: Callable[..., Tensor], **options: Any) -> Tensor:
        """Liger's divergences take probabilities or their logarithms, which PyTorch has to make."""
        return function(prepared(inputs.student, -1, dtype=dtype), prepared(inputs.teacher, -1, dtype=dtype), **options)

    def loss() -> Tensor:
        if workload.operation is Operation.HEAD:
            of_heads: Callable[..., Tensor] = liger.liger_fused_linear_jsd
            return of_heads(inputs.student, inputs.student_weight, inputs.teacher, inputs.teacher_weight, jsd_beta=beta)
        if beta is None:
            return of_logits(functional.softmax, liger.liger_tvd, reduction="batchmean")
        if beta == 0:
            return of_logits(functional.log_softmax, liger.liger_kl_div, reduction="batchmean", log_target=True)
        return of_logits(functional.log_softmax, liger.liger_jsd, beta=beta)

    return loss_and_gradients(loss, workload, inputs)


def prepare_liger_chunked(workload: Workload, inputs: Inputs) -> Call:
    chunked: Any = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    beta = liger_beta(workload)
    function: Callable[..., Tensor] = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta
    )
    labels = torch.zeros(workload.tokens, dtype=torch.int64, device=workload.device)

    def loss() -> Tensor:
        return function(inputs.student, inputs.student_weight, inputs.teacher, inputs.teacher_weight, labels)

    return loss_and_gradients(loss, workload, inputs)


# --- floors -------------------------------------------------------------------------------------------------------------


def prepare_add(workload: Workload, inputs: Inputs) -> Call:
    """Two reads and a write of the size of the logits: what forward and backward must move at least."""
    student, teacher = inputs.student.detach(), inputs.teacher
    out = torch.zeros_like(student)
    return lambda: (torch.add(student, teacher, out=out),)


def why_not_add(workload: Workload) -> str:
    return "" if workload.operation is Operation.DENSE else "a floor for the gradient of logits only"


def why_not_gemms(workload: Workload) -> str:
    return "" if workload.operation is Operation.HEAD else "a floor for LM heads only"


def gemms(workload: Workload, inputs: Inputs, slices: list[slice]) -> Call:
    """The four matrix products of LM heads chunk by chunk, all of them into memory that is there already."""
    student, teacher, student_weight, teacher_weight = (tensor.detach() for tensor in given(inputs))
    longest = max(part.stop - part.start for part in slices)
    student_logits, teacher_logits = (student.new_zeros(longest, workload.vocab) for _ in range(2))
    grad_student, grad_weight = torch.zeros_like(student), torch.zeros_like(student_weight)
    # As in the chunk loop, the weight's gradient of half-precision inputs is accumulated in float32.
    half = workload.dtype.itemsize < 4
    if half:
        grad_weight = grad_weight.float()

    def run() -> tuple[Tensor, ...]:
        for index, part in enumerate(slices):
            hidden, logits = student[part], student_logits[: part.stop - part.start]
            torch.mm(hidden, student_weight.t(), out=logits)
            torch.mm(teacher[part], teacher_weight.t(), out=teacher_logits[: part.stop - part.start])
            torch.mm(logits, student_weight, out=grad_student[part])
            if half:
                grad_weight.add_(logits.t() @ hidden)
            else:
                grad_weight.addmm_(logits.t(), hidden, beta=0 if index == 0 else 1)
        return grad_student, grad_weight

    return run


def prepare_chunked_gemms(workload: Workload, inputs: Inputs) -> Call:
    student = Side(inputs.student, inputs.student_weight)
    teacher = Side(inputs.teacher, inputs.teacher_weight)
    slices = [slice(part.start, min(part.stop, workload.tokens)) for part in chunks([student, teacher], None)]
    return gemms(workload, inputs, slices)


def prepare_whole_gemms(workload: Workload, inputs: Inputs) -> Call:
    return gemms(workload, inputs, [slice(0, workload.tokens)])


LOSSES = (
    Contender(OURS, prepare_ours),
    Contender("eager", prepare_eager),
    Contender("torch.compile", prepare_compiled, why_not_compiled, compiles=True),
    Contender("Liger (Triton)", prepare_liger_triton, why_not_liger_triton),
    Contender("Liger (chunked)", prepare_liger_chunked, why_not_liger_chunked, compiles=True),
)
"""All that compute the same loss."""

FLOORS = (
    Contender("kdkernels, ready buffer", prepare_into_buffer, why_not_into_buffer),
    Contender("3-stream add", prepare_add, why_not_add),
    Contender("its GEMMs, same chunks", prepare_chunked_gemms, why_not_gemms),
    Contender("its GEMMs, unchunked", prepare_whole_gemms, why_not_gemms),
)
"""What ours is held against besides."""

CONTENDERS = {contender.name: contender for contender in (*LOSSES, *map(ours_on, NAMES), *FLOORS)}

"""The Triton backend: launches the kernels of ``kdkernels.triton_kernels`` on CUDA and ROCm tensors.

With ``TRITON_INTERPRET=1`` set before triton is imported, they run in Triton's interpreter instead, on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends.rows import STATISTICS, RowSpec, Tempering, compute_dtype
from kdkernels.backends.sparse_rows import Policy, SparseRows, entries

__all__ = [
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "sample",
    "sparse_divergence_fused",
    "status",
    "supports",
    "token_statistics",
    "topk",
    "unpack_records",
]


SAVED_STATISTICS = 7
"""Columns of the statistics that the forward hands to the backward."""

_RECORD_BLOCK = 128
"""Entries of a record that a warp decodes at a time."""


class _Kernels(NamedTuple):
    """The modules that need triton, imported at first use so that the package works without it."""

    language: ModuleType
    jit_function: type
    divergence: ModuleType
    records: ModuleType
    sparse_divergence: ModuleType
    token_statistics: ModuleType
    topk: ModuleType
    tiling: ModuleType
    interpreted: bool


@functools.cache
def _kernels() -> _Kernels:
    import triton.language

    from kdkernels.triton_kernels import (
        divergence,
        online_softmax,
        records,
        sparse_divergence,
        tiling,
        token_statistics,
        topk,
    )

    return _Kernels(
        triton.language,
        triton.JITFunction,
        divergence,
        records,
        sparse_divergence,
        token_statistics,
        topk,
        tiling,
        bool(online_softmax.INTERPRETED.value),
    )


def _is_hip() -> bool:
    return torch.version.hip is not None


def status() -> tuple[bool, str]:
    """Whether the backend can be used, and on which devices or the reason why not."""
    try:
        kernels = _kernels()
    except ImportError as error:
        return False, f"triton could not be imported: {error}"
    if isinstance(kernels.language.sum, kernels.jit_function) == kernels.interpreted:
        return False, "TRITON_INTERPRET was changed after triton had been imported; set it before Python starts"
    if kernels.interpreted:
        return True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter on the CPU)"
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return True, f"{'ROCm' if _is_hip() else 'CUDA'}: {', '.join(names)}"


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    wanted = "cpu" if _kernels().interpreted else "cuda"
    if device != wanted:
        how = "with TRITON_INTERPRET=1" if wanted == "cpu" else "without TRITON_INTERPRET=1"
        return False, f"{how} the triton backend takes {wanted} tensors, and these are on {device}"
    return True, ""


class _Launch(NamedTuple):
    """Sizes of one launch, common to all kernels."""

    width: int
    """Logits per vector load; row strides are counted in these."""
    unroll: int
    lanes: int
    num_warps: int
    compute: Any
    fast_log: bool

    def stride(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0) // self.width


def _launch(student: Tensor, *others: Tensor | None) -> _Launch:
    """`student` [N, V] and whatever else [N, V] the kernel reads or writes."""
    kernels = _kernels()
    operands = [student, *(tensor for tensor in others if tensor is not None)]
    aligned = all(
        tensor.data_ptr() % kernels.tiling.VECTOR_BYTES == 0
        and tensor.stride(0) * tensor.element_size() % kernels.tiling.VECTOR_BYTES == 0
        for tensor in operands
    )
    itemsize = max(tensor.element_size() for tensor in operands)
    tiling = kernels.tiling.choose_tiling(student.shape[1], itemsize, aligned, warp_size=64 if _is_hip() else 32)
    double = any(tensor.dtype == torch.float64 for tensor in operands)
    return _Launch(
        width=tiling.width,
        unroll=tiling.unroll,
        lanes=tiling.lanes,
        num_warps=tiling.num_warps,
        compute=kernels.language.float64 if double else kernels.language.float32,
        fast_log=not (double or kernels.interpreted or _is_hip()),
    )


def _row_arguments(spec: RowSpec) -> dict[str, Any]:
    """The arguments that say how the rows are to be read."""
    return {
        "active": spec.active,
        "student_temperatures": spec.student_temperatures,
        "teacher_temperatures": spec.teacher_temperatures,
        "student_temperature": spec.student_temperature,
        "teacher_temperature": spec.teacher_temperature,
        "student_softcap": spec.student_softcap,
        "teacher_softcap": spec.teacher_softcap,
        "HAS_STUDENT_CAP": spec.student_softcap != 0,
        "HAS_TEACHER_CAP": spec.teacher_softcap != 0,
    }


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, so it must be the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], cross_entropy [N] or [0], statistics [N, SAVED_STATISTICS])."""
    rows, vocab_size = student.shape
    kernels = _kernels()
    launch = _launch(student, teacher)
    divergence = torch.empty(rows, dtype=compute_dtype(student, teacher), device=student.device)
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    statistics = divergence.new_empty(rows, SAVED_STATISTICS)
    if rows:
        with _on_device_of(student):
            kernels.divergence.divergence_forward_kernel[(rows,)](
                student,
                teacher,
                launch.stride(student),
                launch.stride(teacher),
                vocab_size,
                divergence,
                None if spec.labels is None else cross_entropy,
                statistics,
                spec.labels,
                **_row_arguments(spec),
                a=spec.a,
                b=spec.b,
                KIND=spec.kind,
                FAST_LOG=launch.fast_log,
                COMPUTE=launch.compute,
                UNROLL=launch.unroll,
                LANES=launch.lanes,
                WIDTH=launch.width,
                num_warps=launch.num_warps,
            )
    return divergence, cross_entropy, statistics


def divergence_backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Writes the wanted gradients; `statistics` are those that `divergence_forward` returned."""
    rows, vocab_size = student.shape
    if not rows or (grad_student is None and grad_teacher is None):
        return
    launch = _launch(student, teacher, grad_student, grad_teacher)
    hard = grad_cross_entropy is not None and grad_student is not None
    with _on_device_of(student):
        _kernels().divergence.divergence_backward_kernel[(rows,)](
            student,
            teacher,
            grad_student,
            grad_teacher,
            launch.stride(student),
            launch.stride(teacher),
            launch.stride(grad_student),
            launch.stride(grad_teacher),
            vocab_size,
            statistics,
            grad_divergence.contiguous(),
            grad_cross_entropy.contiguous() if hard and grad_cross_entropy is not None else None,
            spec.labels if hard else None,
            **_row_arguments(spec),
            a=spec.a,
            b=spec.b,
            KIND=spec.kind,
            FAST_LOG=launch.fast_log,
            COMPUTE=launch.compute,
            TILE=launch.unroll * launch.lanes * launch.width,
            REST_TILE=launch.lanes * launch.width,
            WIDTH=launch.width,
            num_warps=launch.num_warps,
        )


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward, two launches; (divergence [N], cross_entropy [N] or [0])."""
    divergence, cross_entropy, statistics = divergence_forward(student, teacher, spec)
    divergence_backward(
        student, teacher, statistics, spec, grad_divergence, grad_cross_entropy, grad_student, grad_teacher
    )
    return divergence, cross_entropy


def sparse_divergence_fused(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values and, where `grad_student` is given, the gradient: two launches."""
    rows, vocab_size = student.shape
    kernels = _kernels().sparse_divergence
    divergence = torch.empty(rows, dtype=compute_dtype(student, None), device=student.device)
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    if not rows:
        return divergence, cross_entropy
    found = entries(teacher.unpacked(vocab_size, unpack_records), spec, vocab_size, divergence.dtype)
    ids = found.ids.masked_fill(found.ids >= vocab_size, kernels.NO_ID.value).int()
    count = ids.shape[1]
    statistics = divergence.new_empty(rows, kernels.STATISTICS.value)
    gathered, terms = torch.empty_like(found.values), torch.empty_like(found.values)
    entropy = teacher.constants if teacher.policy == Policy.SAMPLED else None
    launch = _launch(student, grad_student)
    student_arguments = {
        "labels": spec.labels,
        "active": spec.active,
        "student_temperatures": spec.student_temperatures,
        "student_temperature": spec.student_temperature,
        "student_softcap": spec.student_softcap,
        "HAS_STUDENT_CAP": spec.student_softcap != 0,
        "COMPUTE": launch.compute,
        "LANES": launch.lanes,
        "WIDTH": launch.width,
        "num_warps": launch.num_warps,
    }
    with _on_device_of(student):
        kernels.sparse_divergence_forward_kernel[(rows,)](
            student,
            launch.stride(student),
            vocab_size,
            ids,
            found.values.contiguous(),
            found.log_tail.contiguous(),
            None if entropy is None else entropy.to(divergence.dtype),
            count,
            divergence,
            None if spec.labels is None else cross_entropy,
            statistics,
            gathered,
            terms,
            **student_arguments,
            a=spec.a,
            b=spec.b,
            KIND=spec.kind,
            POLICY=teacher.policy,
            FAST_LOG=launch.fast_log,
            UNROLL=launch.unroll,
        )
        if grad_student is not None and grad_divergence is not None:
            kernels.sparse_divergence_backward_kernel[(rows,)](
                student,
                grad_student,
                launch.stride(student),
                launch.stride(grad_student),
                vocab_size,
                ids,
                count,
                statistics,
                gathered,
                terms,
                grad_divergence.contiguous(),
                None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
                **student_arguments,
                TILE=launch.unroll * launch.lanes * launch.width,
                REST_TILE=launch.lanes * launch.width,
            )
    return divergence, cross_entropy


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """(values [N, 10], columns as `rows.STATISTICS` names them; argmax int64 [N, 2])."""
    rows, vocab_size = student.shape
    launch = _launch(student, teacher)
    values = torch.empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher), device=student.device)
    argmax = torch.empty(rows, 2, dtype=torch.int64, device=student.device)
    if rows:
        with _on_device_of(student):
            _kernels().token_statistics.token_statistics_kernel[(rows,)](
                student,
                teacher,
                launch.stride(student),
                launch.stride(teacher),
                vocab_size,
                values,
                argmax,
                spec.labels,
                **_row_arguments(spec),
                COMPUTE=launch.compute,
                UNROLL=launch.unroll,
                LANES=launch.lanes,
                WIDTH=launch.width,
                num_warps=launch.num_warps,
            )
    return values, argmax


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = len(counts)
    ids = torch.empty(rows, width, dtype=torch.int32, device=data.device)
    log_probs = torch.empty(rows, width, device=data.device)
    log_tail_mass = torch.empty(rows, device=data.device)
    well_formed = torch.empty(rows, dtype=torch.int32, device=data.device)
    if rows:
        with _on_device_of(data):
            _kernels().records.unpack_records_kernel[(rows,)](
                data,
                offsets,
                counts,
                vocab,
                width,
                ids,
                log_probs,
                log_tail_mass,
                well_formed,
                BITS=bits,
                BLOCK=_RECORD_BLOCK,
                num_warps=1,
            )
        if not bool(well_formed.all()):
            records.refuse_record(int((well_formed == 0).nonzero()[0, 0]))
    return ids.long(), log_probs, log_tail_mass


_PICKING_TILE = 1024
"""Logits that a program of the family topk has in hand at once."""

_PICKING_WARPS = 8
"""Of such a program; with half as many some of its registers spill."""

_KEYS = {torch.float32: (0, 4), torch.bfloat16: (16, 2), torch.float16: (8, 3), torch.float64: (0, 8)}
"""Of integers in the order of the logits: the trailing bits that say nothing, and the digits of 8 bits that are left."""


def _picking_arguments(logits: Tensor, temperature: float, softcap: float) -> dict[str, Any]:
    """The arguments that the kernels of the family topk share."""
    launch = _launch(logits)
    return {
        "source": logits,
        "stride": launch.stride(logits),
        "vocab_size": logits.shape[1],
        "temperature": temperature,
        "softcap": softcap,
        "HAS_CAP": softcap != 0,
        "COMPUTE": launch.compute,
        "WIDTH": launch.width,
        "num_warps": _PICKING_WARPS,
    }


def topk(logits: Tensor, k: int, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, k], log_probs [N, k], log_tail_mass [N]). The kernel finds the ids; their order is made here."""
    rows = logits.shape[0]
    found = torch.full((rows, k), -math.inf, dtype=compute_dtype(logits, None), device=logits.device)
    ids = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    rest = found.new_empty(rows, 2)
    shift, passes = _KEYS[logits.dtype]
    if rows:
        with _on_device_of(logits):
            _kernels().topk.topk_kernel[(rows,)](
                k=k,
                logits_out=found,
                ids_out=ids,
                rest_out=rest,
                SHIFT=shift,
                PASSES=passes,
                TILE=_PICKING_TILE,
                **_picking_arguments(logits, tempering.temperature, tempering.softcap),
            )
    found += 0.0  # -0 sorts as 0
    found, order = torch.sort(found, dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if tempering.softcap:
        found = (tempering.softcap * torch.tanh(found / tempering.softcap)).masked_fill(ids < 0, -math.inf)
    maximum, total = rest.unbind(-1)
    top = torch.maximum(found[:, 0], maximum)
    relative = torch.cat([found, maximum.unsqueeze(-1)], -1).sub_(top.unsqueeze(-1)).div_(tempering.temperature)
    relative[:, -1] += total.log()
    log_p = relative - torch.logsumexp(relative, -1, keepdim=True)
    valid = ~log_p.isnan().any(-1)
    log_p = log_p.where(valid.unsqueeze(-1), math.nan)
    return ids.where(valid.unsqueeze(-1), -1), log_p[:, :-1].contiguous(), log_p[:, -1].contiguous()


def sample(logits: Tensor, uniforms: Tensor, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, n], weights [N, n], entropy [N]): first the block of each draw is found, then the id in it."""
    rows, draws = uniforms.shape
    dtype = compute_dtype(logits, None)
    spec = RowSpec(0, 0.0, 0.0, student_temperature=tempering.temperature, student_softcap=tempering.softcap)
    statistics, _ = token_statistics(logits, None, spec)
    maxima = statistics[:, STATISTICS.index("max_student")].contiguous()
    entropy = statistics[:, STATISTICS.index("entropy_student")]
    cumulative = _block_sums(logits, maxima, tempering.proposal_temperature, tempering.softcap).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    empty, valid = total.squeeze(-1) == 0, total.squeeze(-1) > 0  # neither where it is NaN
    targets = uniforms * total
    blocks = torch.searchsorted(cumulative, targets, right=True)
    # The last block that anything can be drawn from; by rounding a target may lie past it.
    blocks = torch.minimum(blocks, torch.searchsorted(cumulative, total).clamp(max=cumulative.shape[1] - 1))
    upto = cumulative.gather(-1, blocks)
    before = torch.cat([torch.zeros_like(total), cumulative], -1).gather(-1, blocks)
    ids = torch.empty(rows, draws, dtype=torch.int64, device=logits.device)
    drawn = torch.empty(rows, draws, dtype=dtype, device=logits.device)
    if rows:
        with _on_device_of(logits):
            _kernels().topk.draw_kernel[(rows, draws)](
                blocks=blocks,
                fractions=(targets - before) / (upto - before),
                ids=ids,
                logits_out=drawn,
                BLOCK=_PICKING_TILE,
                **_picking_arguments(logits, tempering.proposal_temperature, tempering.softcap),
            )
    weights = torch.full_like(drawn, 1 / draws)
    if tempering.proposal_temperature != tempering.temperature:
        plain = _block_sums(logits, maxima, tempering.temperature, tempering.softcap).sum(-1, keepdim=True)
        factor = 1 / tempering.temperature - 1 / tempering.proposal_temperature
        log_ratio = (drawn.double() - maxima.unsqueeze(-1)) * factor + (total / plain).log()
        weights = (log_ratio.exp() / draws).to(dtype)
    nothing = torch.where(empty, 0.0, math.nan).to(dtype)
    return (
        ids.where(valid.unsqueeze(-1), -1),
        weights.where(valid.unsqueeze(-1), nothing.unsqueeze(-1)),
        entropy.where(valid, nothing),
    )


def _block_sums(logits: Tensor, maxima: Tensor, temperature: float, softcap: float) -> Tensor:
    """Of the exponentials in each block of a row, relative to its maximum, float64 [N, blocks]."""
    rows, vocab_size = logits.shape
    blocks = -(-vocab_size // _PICKING_TILE)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    if rows:
        with _on_device_of(logits):
            _kernels().topk.block_sums_kernel[(rows, blocks)](
                maxima=maxima, sums=sums, BLOCK=_PICKING_TILE, **_picking_arguments(logits, temperature, softcap)
            )
    return sums

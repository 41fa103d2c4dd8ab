"""The native CPU backend: hands addresses of torch tensors to the C++ kernels (families in ``csrc/cpu``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import records
from kdkernels.backends import native
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import STATISTICS, RowSpec, Scales, Tempering, compute_dtype
from kdkernels.backends.sparse_rows import Records, SparseRows

__all__ = [
    "SAVED_STATISTICS",
    "collect_entries",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "divergence_total",
    "expand_entries",
    "pack_records",
    "sample",
    "sparse_divergence_fused",
    "sparse_products",
    "status",
    "supports",
    "token_statistics",
    "topk",
    "unpack_records",
]

SAVED_STATISTICS = 0
"""Columns of the statistics that the forward hands to the backward."""

_FLOAT64 = 3
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: _FLOAT64}
NO_SCALES = Scales(0.0, None, 0.0, None)


def status() -> tuple[bool, str]:
    """Whether the backend can be used, and its instruction set or the reason why not."""
    if native.module is None:
        return False, native.reason
    try:
        return True, f"instruction set {native.module.isa()}, {torch.get_num_threads()} threads"
    except RuntimeError as error:
        return False, str(error)


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    return device == "cpu", f"the cpu backend takes cpu tensors, and these are on {device}"


def _module() -> Any:
    if native.module is None:
        raise RuntimeError(f"the cpu backend is not available: {native.reason}")
    return native.module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sides(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Any, ...]:
    """The leading arguments that all kernels share."""
    rows, vocab = student.shape
    student_temperature, student_rows, teacher_temperature, teacher_rows, *softcaps, labels, active = spec[3:11]
    student_type = _DTYPES[student.dtype]
    teacher_type = student_type if teacher is None else _DTYPES[teacher.dtype]
    return (
        torch.get_num_threads(),
        student_type == _FLOAT64 or teacher_type == _FLOAT64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        student_type,
        0 if teacher is None else teacher.data_ptr(),
        0 if teacher is None else teacher.stride(0),
        teacher_type,
        student_temperature,
        _address(student_rows),
        teacher_temperature,
        _address(teacher_rows),
        *softcaps,
        _address(labels),
        _address(active),
    )


def _lists(lists: EntryLists | None) -> tuple[int, int]:
    return (0, 0) if lists is None else (lists.counts.data_ptr(), lists.summaries.data_ptr())


def _rule(spec: RowSpec) -> tuple[float, bool, int, int]:
    """(tolerance, whether stochastic, seed, number of the first row)."""
    seed = spec.gradient_seed
    return spec.gradient_tolerance, seed is not None, 0 if seed is None else int(seed), spec.first_row


def _launch(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    scales: Scales = NO_SCALES,
    *,
    divergence: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    grad_student: Tensor | None = None,
    grad_teacher: Tensor | None = None,
    total: Tensor | None = None,
    fresh_gradients: bool = False,
    lists: tuple[EntryLists | None, EntryLists | None] = (None, None),
) -> None:
    _module().divergence(
        *_sides(student, teacher, spec),
        *spec[:3],
        _address(divergence),
        _address(cross_entropy),
        scales.divergence_factor,
        _address(scales.divergence),
        scales.cross_entropy_factor,
        _address(scales.cross_entropy),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *((0, 0) if grad_teacher is None else (grad_teacher.data_ptr(), grad_teacher.stride(0))),
        _address(total),
        fresh_gradients,
        *_lists(lists[0]),
        *_lists(lists[1]),
        *_rule(spec),
    )


def _values(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    rows = student.shape[0]
    return torch.empty(rows, dtype=dtype), torch.empty(0 if spec.labels is None else rows, dtype=dtype)


def divergence_forward(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    _launch(student, teacher, spec, divergence=divergence, cross_entropy=cross_entropy)
    return divergence, cross_entropy, divergence.new_empty(divergence.shape[0], SAVED_STATISTICS)


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
    # The rows are in the cache when the gradient is written, so the normalisers are found anew: no statistics.
    scales = Scales(0.0, grad_divergence, 0.0, grad_cross_entropy)
    _launch(student, teacher, spec, scales, grad_student=grad_student, grad_teacher=grad_teacher)


def divergence_fused(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    lists: tuple[EntryLists | None, EntryLists | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    divergence, cross_entropy = _values(student, teacher, spec)
    _launch(
        student,
        teacher,
        spec,
        Scales(0.0, grad_divergence, 0.0, grad_cross_entropy),
        divergence=divergence,
        cross_entropy=cross_entropy,
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        lists=lists,
    )
    return divergence, cross_entropy


def divergence_total(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    scales: Scales,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> Tensor:
    """The sum over the rows of scale times value, and its gradients; nothing is kept per row.

    The gradients' memory is taken for new: missing pages are brought in a row at a time, not one by one as they fault.
    """
    total = torch.empty((), dtype=compute_dtype(student, teacher))
    _launch(
        student,
        teacher,
        spec,
        scales,
        grad_student=grad_student,
        grad_teacher=grad_teacher,
        total=total,
        fresh_gradients=True,
    )
    return total


def sparse_divergence_fused(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
    lists: EntryLists | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = student.shape
    divergence = torch.empty(rows, dtype=compute_dtype(student, None))
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    student_type = _DTYPES[student.dtype]
    wrong = _module().sparse_divergence(
        torch.get_num_threads(),
        student_type == _FLOAT64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        student_type,
        spec.student_temperature,
        _address(spec.student_temperatures),
        spec.teacher_temperature,
        _address(spec.teacher_temperatures),
        spec.student_softcap,
        _address(spec.labels),
        _address(spec.active),
        *spec[:3],
        teacher.policy,
        *_entries(teacher),
        *_records(teacher.records, rows),
        divergence.data_ptr(),
        _address(cross_entropy),
        _address(grad_divergence),
        _address(grad_cross_entropy),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *_lists(lists),
        *_rule(spec),
    )
    if wrong < rows:
        records.refuse_record(wrong)
    return divergence, cross_entropy


def _entries(teacher: SparseRows) -> tuple[Any, ...]:
    """(entries per row, ids and their stride, whether int64, values, their stride and dtype, constants and dtype)."""
    ids, values, constants = teacher.ids, teacher.values, teacher.constants
    if ids is None or values is None:
        return (0, 0, 0, True, 0, 0, 0, 0, 0)
    constant = (0, 0) if constants is None else (constants.data_ptr(), _DTYPES[constants.dtype])
    wide = ids.dtype == torch.int64
    return (
        ids.shape[1],
        ids.data_ptr(),
        ids.stride(0),
        wide,
        values.data_ptr(),
        values.stride(0),
        _DTYPES[values.dtype],
        *constant,
    )


def _records(packed: Records | None, rows: int) -> tuple[int, ...]:
    """(data, where each row's record begins, counts, the largest, bits)."""
    if packed is None:
        return (0, 0, 0, 0, 0)
    assert packed.offsets is not None
    largest = int(packed.counts.max()) if rows else 0
    return packed.data.data_ptr(), packed.offsets.data_ptr(), packed.counts.data_ptr(), largest, packed.bits


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    rows = student.shape[0]
    values = torch.empty(rows, len(STATISTICS), dtype=compute_dtype(student, teacher))
    argmax = torch.empty(rows, 2, dtype=torch.int64)
    _module().token_statistics(*_sides(student, teacher, spec), values.data_ptr(), argmax.data_ptr())
    return values, argmax


def pack_records(
    ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.reference.records.pack_records``: the same bytes."""
    ids, log_probs, log_tail_mass, counts = records.rows_to_pack(ids, log_probs, log_tail_mass)
    sizes = records.record_sizes(counts, vocab, bits)
    ends = sizes.cumsum(0)
    data = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8)
    offsets = ends - sizes
    rows, width = ids.shape
    wrong = _module().pack_records(
        torch.get_num_threads(),
        rows,
        width,
        vocab,
        bits,
        counts.data_ptr(),
        offsets.data_ptr(),
        data.data_ptr(),
        ids.data_ptr(),
        log_probs.data_ptr(),
        log_tail_mass.data_ptr(),
    )
    if wrong < rows:
        records.check_entries(ids, log_probs, vocab)
    return data, counts


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.reference.records.unpack_records``."""
    data, counts = data.contiguous(), counts.contiguous()
    offsets = records.record_offsets(data, counts, vocab, bits, width)
    rows = len(counts)
    ids = torch.empty(rows, width, dtype=torch.int64)
    log_probs = torch.empty(rows, width)
    log_tail_mass = torch.empty(rows)
    wrong = _module().unpack_records(
        torch.get_num_threads(),
        rows,
        width,
        vocab,
        bits,
        counts.data_ptr(),
        offsets.data_ptr(),
        data.data_ptr(),
        ids.data_ptr(),
        log_probs.data_ptr(),
        log_tail_mass.data_ptr(),
    )
    if wrong < rows:
        records.refuse_record(wrong)
    return ids, log_probs, log_tail_mass


def collect_entries(storage: Tensor, lists: EntryLists, columns: Tensor, values: Tensor) -> None:
    """Moves the lists of a chunk's rows from ``storage`` [n, V] to ``columns`` and ``values``; dense rows are listed whole."""
    _module().collect_entries(*_entry_chunk(storage, lists), columns.data_ptr(), values.data_ptr())


def expand_entries(storage: Tensor, lists: EntryLists) -> None:
    """Makes the rows of a chunk dense again, in their storage."""
    _module().expand_entries(torch.get_num_threads(), *_entry_chunk(storage, lists))


def _entry_chunk(storage: Tensor, lists: EntryLists) -> tuple[int, ...]:
    return *storage.shape, storage.data_ptr(), storage.stride(0), _DTYPES[storage.dtype], *_lists(lists)


def sparse_products(
    offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    hidden: Tensor,
    everywhere: Tensor | None,
    to_hidden: Tensor | None,
    to_weight: Tensor | None,
) -> None:
    """Of G [n, V], whose row i has ``values`` at ``columns`` from ``offsets[i]`` to ``offsets[i + 1]``, columns ascending.

    Writes G W to ``to_hidden`` [n, H] and adds G^T hidden, and ``everywhere`` [H] to each row, to ``to_weight`` [V, H]; all
    float32 and contiguous. ``weight`` [V, H], its rows contiguous; ``hidden`` [n, H] float32.
    """
    _module().sparse_products(
        torch.get_num_threads(),
        hidden.shape[0],
        *weight.shape,
        offsets.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        _DTYPES[weight.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        _address(everywhere),
        _address(to_hidden),
        _address(to_weight),
    )


def _source(logits: Tensor) -> tuple[Any, ...]:
    """The leading arguments of the kernels that read one matrix."""
    dtype = _DTYPES[logits.dtype]
    return (torch.get_num_threads(), dtype == _FLOAT64, *logits.shape, logits.data_ptr(), logits.stride(0), dtype)


def topk(logits: Tensor, k: int, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    ids = torch.empty(rows, k, dtype=torch.int64)
    log_probs = torch.empty(rows, k, dtype=compute_dtype(logits, None))
    log_tail_mass = log_probs.new_empty(rows)
    results = ids.data_ptr(), log_probs.data_ptr(), log_tail_mass.data_ptr()
    _module().topk(*_source(logits), tempering.temperature, tempering.softcap, k, *results)
    return ids, log_probs, log_tail_mass


def sample(logits: Tensor, uniforms: Tensor, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.empty(uniforms.shape, dtype=torch.int64)
    weights = torch.empty(uniforms.shape, dtype=compute_dtype(logits, None))
    entropy = weights.new_empty(uniforms.shape[0])
    uniforms = uniforms.contiguous()
    _module().sample(
        *_source(logits),
        tempering.temperature,
        tempering.proposal_temperature,
        tempering.softcap,
        uniforms.shape[1],
        uniforms.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        entropy.data_ptr(),
    )
    return ids, weights, entropy

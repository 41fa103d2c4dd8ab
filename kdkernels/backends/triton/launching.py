"""What every family needs to launch the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.rows import Composition, RowSpec

__all__ = [
    "composed_of",
    "composition_arguments",
    "dot_precision",
    "load_kernels",
    "on_device_of",
    "precision",
    "prepare_launch",
    "row_arguments",
    "status",
    "supports",
    "warp_size",
]


class Kernels(NamedTuple):
    """The modules that need triton, imported at first use so that the package works without it."""

    language: ModuleType
    jit_function: type
    bernoulli: ModuleType
    divergence: ModuleType
    head_mass: ModuleType
    linear_divergence: ModuleType
    pairwise_l1: ModuleType
    ranking: ModuleType
    records: ModuleType
    sinkhorn: ModuleType
    sorted_l1: ModuleType
    sparse_divergence: ModuleType
    token_statistics: ModuleType
    topk: ModuleType
    tiling: ModuleType
    interpreted: bool


@functools.cache
def load_kernels() -> Kernels:
    import triton.language

    from kdkernels.triton_kernels import (
        bernoulli,
        divergence,
        head_mass,
        linear_divergence,
        online_softmax,
        pairwise_l1,
        ranking,
        records,
        sinkhorn,
        sorted_l1,
        sparse_divergence,
        tiling,
        token_statistics,
        topk,
    )

    return Kernels(
        triton.language,
        triton.JITFunction,
        bernoulli,
        divergence,
        head_mass,
        linear_divergence,
        pairwise_l1,
        ranking,
        records,
        sinkhorn,
        sorted_l1,
        sparse_divergence,
        token_statistics,
        topk,
        tiling,
        bool(online_softmax.INTERPRETED.value),
    )


def is_hip() -> bool:
    return torch.version.hip is not None


def warp_size() -> int:
    return 64 if is_hip() else 32


def precision(double: bool) -> dict[str, Any]:
    """What a kernel computes in, and whether it may take the hardware's logarithm."""
    kernels = load_kernels()
    return {
        "compute": kernels.language.float64 if double else kernels.language.float32,
        "fast_log": not (double or kernels.interpreted or is_hip()),
    }


def dot_precision() -> str:
    """How tensor cores multiply float32, as PyTorch is told to: exactly, or rounded to TF32 where that was allowed."""
    return "ieee" if is_hip() or torch.get_float32_matmul_precision() == "highest" else "tf32"


def status() -> tuple[bool, str]:
    """Whether the backend can be used, and on which devices or the reason why not."""
    try:
        kernels = load_kernels()
    except ImportError as error:
        return False, f"triton could not be imported: {error}"
    if isinstance(kernels.language.sum, kernels.jit_function) == kernels.interpreted:
        return False, "TRITON_INTERPRET was changed after triton had been imported; set it before Python starts"
    if kernels.interpreted:
        return True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter on the CPU)"
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return True, f"{'ROCm' if is_hip() else 'CUDA'}: {', '.join(names)}"


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    wanted = "cpu" if load_kernels().interpreted else "cuda"
    if device != wanted:
        how = "with TRITON_INTERPRET=1" if wanted == "cpu" else "without TRITON_INTERPRET=1"
        return False, f"{how} the triton backend takes {wanted} tensors, and these are on {device}"
    return True, ""


class Launch(NamedTuple):
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


def prepare_launch(student: Tensor, *others: Tensor | None) -> Launch:
    """`student` [N, V] and whatever else [N, V] the kernel reads or writes."""
    kernels = load_kernels()
    operands = [student, *(tensor for tensor in others if tensor is not None)]
    double = any(tensor.dtype == torch.float64 for tensor in operands)
    aligned = all(
        tensor.data_ptr() % kernels.tiling.VECTOR_BYTES == 0
        and tensor.stride(0) * tensor.element_size() % kernels.tiling.VECTOR_BYTES == 0
        for tensor in operands
    )
    itemsize = max(tensor.element_size() for tensor in operands)
    tiling = kernels.tiling.choose_tiling(student.shape[1], itemsize, aligned, warp_size())
    return Launch(
        width=tiling.width,
        unroll=tiling.unroll,
        lanes=tiling.lanes,
        num_warps=tiling.num_warps,
        **precision(double),
    )


def row_arguments(spec: RowSpec) -> dict[str, Any]:
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


def composition_arguments(spec: RowSpec) -> dict[str, Any]:
    """The arguments that say how the logits of the sides are made, see ``triton_kernels/compositions.py``."""
    return {
        "student_composition": composition(spec.student_composition),
        "teacher_composition": composition(spec.teacher_composition),
    }


def composition(parts: Composition | None) -> tuple[Any, ...] | None:
    if parts is None:
        return None
    return (
        tuple(other.tensor for other in parts.others),
        tuple(other.tensor.stride(0) for other in parts.others),
        tuple(other.softcap or None for other in parts.others),
        parts.coefficients,
        parts.offsets,
        parts.class_bias,
        parts.bounds,
        None if parts.columns is None else parts.columns.unbind(-1),
        None if parts.values is None else parts.values.unbind(-1),
    )


def composed_of(spec: RowSpec) -> list[Tensor]:
    """The logits that are read besides those of the sides."""
    compositions = (spec.student_composition, spec.teacher_composition)
    return [other.tensor for parts in compositions if parts is not None for other in parts.others]


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, so it must be the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

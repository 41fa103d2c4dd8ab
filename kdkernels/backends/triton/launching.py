"""What every family needs to launch the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.devices import Device, gpu, why_no_gpu
from kdkernels.backends.rows import Composition, RowSpec
from kdkernels.triton_kernels.tiling import LaunchSizes
from kdkernels.tuning import table

__all__ = [
    "composed_of",
    "composition_arguments",
    "device_of",
    "dot_precision",
    "load_kernels",
    "on_device_of",
    "precision",
    "prepare_launch",
    "register_limit",
    "row_arguments",
    "split_of",
    "status",
    "supports",
    "trial",
    "tuneable",
    "tuned_sizes",
    "warp_size",
]

LEAST_CAPABILITY = (7, 5)
"""Of NVIDIA's GPUs: the oldest that the tests compile the kernels for."""

INTERPRETER = Device("Triton's interpreter", "interpreter", 32)


class Kernels(NamedTuple):
    """The modules that need triton, imported at first use so that the package works without it."""

    language: ModuleType
    jit_function: type
    triton_error: type[Exception]
    out_of_resources: type[Exception]
    version: str
    angle: ModuleType
    bernoulli: ModuleType
    divergence: ModuleType
    head_mass: ModuleType
    linear_divergence: ModuleType
    pairwise_l1: ModuleType
    ranking: ModuleType
    records: ModuleType
    row_deviation: ModuleType
    sinkhorn: ModuleType
    sorted_l1: ModuleType
    sparse_divergence: ModuleType
    token_set: ModuleType
    token_statistics: ModuleType
    topk: ModuleType
    tiling: ModuleType
    interpreted: bool


@functools.cache
def load_kernels() -> Kernels:
    import triton.language
    from triton.runtime.errors import OutOfResources, TritonError

    from kdkernels.triton_kernels import (
        angle,
        bernoulli,
        divergence,
        head_mass,
        linear_divergence,
        online_softmax,
        pairwise_l1,
        ranking,
        records,
        row_deviation,
        sinkhorn,
        sorted_l1,
        sparse_divergence,
        tiling,
        token_set,
        token_statistics,
        topk,
    )

    return Kernels(
        triton.language,
        triton.JITFunction,
        TritonError,
        OutOfResources,
        triton.__version__,
        angle,
        bernoulli,
        divergence,
        head_mass,
        linear_divergence,
        pairwise_l1,
        ranking,
        records,
        row_deviation,
        sinkhorn,
        sorted_l1,
        sparse_divergence,
        token_set,
        token_statistics,
        topk,
        tiling,
        bool(online_softmax.INTERPRETED.value),
    )


def is_hip() -> bool:
    return torch.version.hip is not None


def device_of(tensor: Tensor) -> Device:
    return gpu(tensor.device.index) if tensor.is_cuda else INTERPRETER


PROGRAMS = 1024
"""Of a launch at least, where its work can be split: more than run on a GPU at once."""


def split_of(size: int, programs: int, smallest: int, step: int = 1) -> int:
    """Entries of a part, where a sum over so many entries may be made in parts of a few programs each.

    By the shape alone, so that sums repeat. smallest: entries that a part is worth a program for; step: the loop's.
    """
    parts = max(1, min(-(-PROGRAMS // programs), size // smallest))
    return -(-size // parts // step) * step


def warp_size(tensor: Tensor) -> int:
    """Of the device that the tensor is on."""
    return device_of(tensor).warp_size


def precision(double: bool) -> dict[str, Any]:
    """What a kernel computes in, and whether it may take the hardware's logarithm."""
    kernels = load_kernels()
    return {
        "compute": kernels.language.float64 if double else kernels.language.float32,
        "fast_log": not (double or kernels.interpreted or is_hip()),
    }


def register_limit(most: int | None) -> dict[str, int]:
    """The option of a launch that limits the registers of a thread, which NVIDIA's compiler alone knows."""
    return {} if most is None or is_hip() else {"maxnreg": most}


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
        return False, f"{why_no_gpu()} (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter on the CPU)"
    found = [(gpu(index).name, why_not(index)) for index in range(torch.cuda.device_count())]
    if all(reason for _, reason in found):
        return False, "; ".join(sorted({reason for _, reason in found}))
    names = sorted({name for name, reason in found if not reason})
    return True, f"{'ROCm' if is_hip() else 'CUDA'}: {', '.join(names)}"


@functools.cache
def why_not(index: int) -> str:
    """Why the kernels do not run on a GPU; empty if they do."""
    capability = torch.cuda.get_device_capability(index)
    if is_hip() or capability >= LEAST_CAPABILITY:
        return ""
    given, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
    return f"{gpu(index).name} has compute capability {given}, and the kernels need {least} or later"


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    wanted = "cpu" if load_kernels().interpreted else "cuda"
    if device != wanted:
        how = "with TRITON_INTERPRET=1" if wanted == "cpu" else "without TRITON_INTERPRET=1"
        elsewhere = f"; move them there with .to({wanted!r})" + (", or leave out backend=" if device == "cpu" else "")
        return False, f"{how} the triton backend takes {wanted} tensors, and these are on {device}{elsewhere}"
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

    @property
    def options(self) -> dict[str, Any]:
        """What kernels take that walk a row tile by tile."""
        return {
            "COMPUTE": self.compute,
            "UNROLL": self.unroll,
            "LANES": self.lanes,
            "WIDTH": self.width,
            "num_warps": self.num_warps,
        }


def prepare_launch(student: Tensor, *others: Tensor | None, kernel: str = "") -> Launch:
    """`student` [N, V] and whatever else [N, V] the kernel reads or writes. `kernel`: whose sizes may have been tuned."""
    kernels = load_kernels()
    operands = [student, *(tensor for tensor in others if tensor is not None)]
    double = any(tensor.dtype == torch.float64 for tensor in operands)
    aligned = all(
        tensor.data_ptr() % kernels.tiling.VECTOR_BYTES == 0
        and tensor.stride(0) * tensor.element_size() % kernels.tiling.VECTOR_BYTES == 0
        for tensor in operands
    )
    itemsize = max(tensor.element_size() for tensor in operands)
    device = device_of(student)
    vocab_size = student.shape[1]
    tiling = kernels.tiling.choose_tiling(
        vocab_size,
        itemsize,
        aligned,
        device.warp_size,
        architecture=device.architecture,
        sizes=tuned_sizes(student, kernel, vocab_size, itemsize, aligned),
    )
    return Launch(
        width=tiling.width,
        unroll=tiling.unroll,
        lanes=tiling.lanes,
        num_warps=tiling.num_warps,
        **precision(double),
    )


TRIALS: dict[str, LaunchSizes] = {}
"""Sizes that are being measured, by kernel."""


@contextlib.contextmanager
def trial(kernel: str, sizes: LaunchSizes) -> Iterator[None]:
    """Launches of the kernel have these sizes meanwhile, in the whole process."""
    TRIALS[kernel] = sizes
    try:
        yield
    finally:
        del TRIALS[kernel]


def tuned_sizes(tensor: Tensor, kernel: str, vocab_size: int, itemsize: int, aligned: bool) -> LaunchSizes | None:
    """The sizes of a launch that were found by measuring, if they were."""
    if not kernel:
        return None
    if TRIALS and kernel in TRIALS:
        return TRIALS[kernel]
    found = tuned_table(device_of(tensor))
    return found.get(table.Key.of(kernel, vocab_size, itemsize, aligned)) if found else None


@functools.cache
def tuned_table(device: Device) -> Mapping[table.Key, LaunchSizes]:
    """What a device's file says, read at the first launch; `cache_clear` makes the next launch read it again."""
    return table.load(tuneable(device))


def tuneable(device: Device) -> table.TuneableDevice:
    """The device, with the versions that measurements on it hold for."""
    try:
        ours = version("kdkernels")
    except PackageNotFoundError:  # a source tree that is not installed
        ours = "0+unknown"
    return table.TuneableDevice(*device, load_kernels().version, ours)


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


WAY_OUT = "backend='reference' computes it in plain PyTorch"


class LaunchContext:
    """Around the launches of an op: on the tensor's device, and what goes wrong says where and what to do."""

    __slots__ = ("device", "op", "tensor")

    def __init__(self, tensor: Tensor, op: str) -> None:
        self.tensor = tensor
        self.op = op
        # Triton launches on the current device, so it must be the tensors' own.
        self.device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

    def __enter__(self) -> None:
        if self.tensor.is_cuda and why_not(self.tensor.device.index):
            raise RuntimeError(f"{self.op} on {self.tensor.device}: {why_not(self.tensor.device.index)}; {WAY_OUT}")
        self.device.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.device.__exit__(kind, error, traceback)
        if error is not None and of_the_device(error):
            raise RuntimeError(explained(error, self.op, self.tensor)) from error


def of_the_device(error: BaseException) -> bool:
    """Whether the compiler, the driver or the device refused; memory that is short says so itself."""
    return isinstance(error, (load_kernels().triton_error, RuntimeError)) and not isinstance(
        error, torch.OutOfMemoryError
    )


def explained(error: BaseException, op: str, tensor: Tensor) -> str:
    device = device_of(tensor)
    text = f"{op} on {tensor.device} ({device.name}, {device.architecture}): {type(error).__name__}: {error}; {WAY_OUT}"
    if isinstance(error, load_kernels().out_of_resources) and tuned_table(device):
        text += f", and KDKERNELS_TUNING=0 leaves out the launch sizes of {table.file_of(tuneable(device))}"
    return text


def on_device_of(tensor: Tensor, op: str) -> LaunchContext:
    """For the launches of the family ``op``, see ``LaunchContext``."""
    return LaunchContext(tensor, op)

"""Compiles the kernels of the families sinkhorn, pairwise_l1, sorted_l1 and ranking ahead of time, see ``aot``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import aot
from gpu_report.objects import read_resources

INTEGERS = {"rows", "columns", "max_iterations", "max_steps"}
INTEGERS |= {"points", "corner_count"}
INTEGERS |= {
    "vocab_size",
    "students",
    "teachers",
    "own_rows",
    "other_rows",
    "split_size",
    "student_vocab",
    "teacher_vocab",
}
TYPES: dict[str, str] = dict.fromkeys(INTEGERS, "i32")
TYPES |= dict.fromkeys(("row_lengths", "column_lengths", "student_order", "teacher_order"), "*i64")
TYPES |= dict.fromkeys(("ids", "ranks", "corners"), "*i64")
TYPES |= {"iterations": "*i64", "status": "*i32", "active": "*i1", "members": "*i1"}


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    kernel: str
    target: str
    dtype: str
    sizes: tuple[tuple[str, Any], ...]
    """Constants of the kernel."""
    num_warps: int
    absent: tuple[str, ...] = ()
    """Optional tensors that are not given."""
    family: str = "sinkhorn"

    def __str__(self) -> str:
        sizes = [f"{name.lower()}{value}" for name, value in self.sizes]
        return "-".join([self.kernel, self.target, self.dtype, *sizes, *self.absent])


def compiled_resources(case: Case) -> dict[str, Any]:
    """Registers and spilled bytes of a thread."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"kdkernels.triton_kernels.{case.family}")
    kernel = getattr(module, f"{case.kernel}_kernel")
    target = GPUTarget(*aot.TARGETS[case.target])
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    constants = {"COMPUTE": tl.float64 if compute == "fp64" else tl.float32, **dict(case.sizes)}
    inputs = {"cost", "cost_gradient", "student", "teacher", "source", "gradient", "own", "other"}
    inputs |= {"grad_student", "grad_teacher", "logits"}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in case.absent:
            signature[name] = "constexpr"
            constexprs[name] = constants[name] if parameter.is_constexpr else None
        else:
            signature[name] = (
                parameter.annotation_type or TYPES.get(name) or (f"*{case.dtype}" if name in inputs else f"*{compute}")
            )
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs), target=target, options={"num_warps": case.num_warps}
    )
    return vars(read_resources(compiled))


def specialisations(family: str, kernel: str) -> list[str]:
    """What small and large numbers make Triton compile for sm_90: one text if all share one compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = getattr(importlib.import_module(f"kdkernels.triton_kernels.{family}"), f"{kernel}_kernel")
    backend = make_backend(GPUTarget(*aot.TARGETS["sm_90"]))
    bind = create_function_from_signature(function.signature, function.params, backend)
    texts = []
    for size, stride, number in [(1, 1, 1.0), (16, 16, 0.5), (151_936, 2**33 + 1, 1e-3)]:
        call: dict[str, Any] = dict.fromkeys(function.arg_names)
        for parameter in function.params:
            if parameter.is_constexpr:
                continue
            if parameter.name in INTEGERS:
                call[parameter.name] = size
            elif parameter.annotation_type:
                call[parameter.name] = stride if parameter.annotation_type == "i64" else number
        texts.append(str(bind(**call)[1]))
    return texts

"""Compiles the Triton kernels ahead of time, without a GPU, and reads registers and spills from the compiled object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_report.compilation import TARGETS
from gpu_report.objects import Resources, read_resources
from kdkernels.triton_kernels.tiling import LaunchSizes

VOCABULARY = 151_936
OLDER = {"sm_75": ("cuda", 75, 32)}
"""Not refused, and compiled for once."""
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
KERNELS = {
    "divergence_forward": "divergence",
    "divergence_backward": "divergence",
    "sparse_divergence_forward": "sparse_divergence",
    "sparse_divergence_backward": "sparse_divergence",
    "token_statistics": "token_statistics",
}
VECTORS = {"student", "teacher", "grad_student", "grad_teacher"}
TWO_SWEEP_KINDS = {3, 4, 5, 6, 7, 9}


# Optional tensors that are not given, by what such a call is called.
VARIANTS = {
    "plain": {
        "student_temperatures",
        "teacher_temperatures",
        "labels",
        "cross_entropy",
        "grad_cross_entropy",
        "constants",
        "parameters",
        "targets",
        "target_weights",
        "rest_weights",
    },
    "everything": {"parameters", "targets", "target_weights", "rest_weights"},
}
VARIANTS["decoupled"] = VARIANTS["plain"] - VARIANTS["everything"]
VARIANTS["student_only"] = VARIANTS["plain"] | {"teacher", "grad_teacher"}


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    kernel: str
    target: str
    dtype: str
    kind: int = 0
    variant: str = "plain"
    aligned: bool = True
    softcap: bool = False
    maxnreg: int | None = None
    policy: int = 0
    """Of a sparse teacher."""
    composed: bool = False
    """Whether the teacher is a mixture of three, of logits or, with ``softcap``, of probabilities, with all that may be."""

    def __str__(self) -> str:
        kind = f"kind{self.kind}" if self.kernel != "token_statistics" else ""
        extras = [f"policy{self.policy}" if self.kernel == "sparse_divergence_forward" else ""]
        extras += ["" if self.aligned else "unaligned", "softcap" if self.softcap else ""]
        extras += ["composed" if self.composed else ""]
        return "-".join(filter(None, [self.kernel, kind, self.target, self.dtype, self.variant, *extras]))

    @property
    def absent(self) -> set[str]:
        absent = VARIANTS[self.variant]
        return absent if self.kernel == "token_statistics" else absent - {"teacher"}


@dataclass(frozen=True)
class Compiled(Resources):
    wanted_vector_loads: int
    """What they number if every load of a whole tile is one."""
    wanted_vector_stores: int


def compile_case(case: Case, sizes: LaunchSizes | None = None) -> Compiled:
    """With the default launch sizes, or others."""
    import importlib

    import triton
    import triton.language as tl
    from kdkernels.triton_kernels.tiling import choose_tiling
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"kdkernels.triton_kernels.{KERNELS[case.kernel]}")
    kernel = getattr(module, f"{case.kernel}_kernel")
    target = GPUTarget(*(TARGETS | OLDER)[case.target])
    tiling = choose_tiling(VOCABULARY, ITEMSIZE[case.dtype], case.aligned, target.warp_size, sizes=sizes)
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    constants = {
        "KIND": case.kind,
        "POLICY": case.policy,
        "FAST_LOG": target.backend == "cuda" and case.dtype != "fp64",
        "HAS_STUDENT_CAP": case.softcap,
        "HAS_TEACHER_CAP": case.softcap,
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32,
        "UNROLL": tiling.unroll,
        "LANES": tiling.lanes,
        "WIDTH": tiling.width,
        "TILE": tiling.unroll * tiling.lanes * tiling.width,
        "REST_TILE": tiling.lanes * tiling.width,
    }
    types = {
        "labels": "*i64",
        "targets": "*i64",
        "argmax": "*i64",
        "active": "*i1",
        "vocab_size": "i32",
        "ids": "*i32",
        "entries": "i32",
    }
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name == "teacher_composition" and case.composed:
            parts, nothings = mixture(case, compute)
            signature[name] = parts
            constexprs |= {(len(signature) - 1, *path): None for path in nothings}
        elif parameter.is_constexpr or name in case.absent or name.endswith("composition"):
            signature[name] = "constexpr"
            constexprs[name] = constants[name] if parameter.is_constexpr else None
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif name in VECTORS:
            signature[name] = f"*{case.dtype}"
        else:
            signature[name] = types.get(name, f"*{compute}")
    aligned = [path for path, kind in leaves(tuple(signature.values())) if kind.startswith("*") or kind == "i32"]
    sizes = [(index,) for index, kind in enumerate(signature.values()) if kind == "i32"]
    attributes = {path: [["tt.divisibility", 16]] for path in aligned if path not in sizes} if case.aligned else {}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=target,
        options={"num_warps": tiling.num_warps, "maxnreg": case.maxnreg},
    )
    sweeps = 2 if case.kernel == "divergence_forward" and case.kind in TWO_SWEEP_KINDS else 1
    given = VECTORS & signature.keys() - case.absent
    per_tile = tiling.unroll if case.aligned else 0
    wanted = {
        "wanted_vector_loads": sweeps * per_tile * len(given & {"student", "teacher"}),
        "wanted_vector_stores": per_tile * len(given & {"grad_student", "grad_teacher"}),
    }
    return Compiled(**vars(read_resources(compiled)), **wanted)


def mixture(case: Case, compute: str) -> tuple[tuple[Any, ...], list[tuple[int, ...]]]:
    """The types of a composition of three sources as the kernels get it, and where in it nothing is given."""
    others, strides = (f"*{case.dtype}",) * 2, ("i32",) * 2
    numbers = f"*{compute}"
    if not case.softcap:
        caps, offsets, nothings = ("constexpr",) * 2, "constexpr", [(2, 0), (2, 1), (4,)]
    else:
        caps, offsets, nothings = ("fp32", "constexpr"), numbers, [(2, 1)]
    return (others, strides, caps, numbers, offsets, numbers, numbers, ("*i64",) * 2, (numbers,) * 2), nothings


def leaves(types: tuple[Any, ...], path: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], str]]:
    """The types within tuples, each with the way there."""
    found: list[tuple[tuple[int, ...], str]] = []
    for index, kind in enumerate(types):
        here = (*path, index)
        found += leaves(kind, here) if isinstance(kind, tuple) else [(here, kind)]
    return found


def compile_records(target: str, bits: int) -> dict[str, Any]:
    """Registers and spills of the kernel that decodes records of a codec."""
    import triton
    from kdkernels.triton_kernels.records import unpack_records_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[target])
    constexprs = {"BITS": bits, "BLOCK": 128}
    types = {"data": "*u8", "offsets": "*i64", "counts": "*i32", "vocab_size": "i32", "width": "i32", "ids": "*i32"}
    types |= {"log_probs": "*fp32", "log_tail_mass": "*fp32", "well_formed": "*i32", "BITS": "constexpr"}
    signature = types | {"BLOCK": "constexpr"}
    compiled = triton.compile(
        ASTSource(unpack_records_kernel, signature, constexprs), target=gpu, options={"num_warps": 1}
    )
    return vars(read_resources(compiled))


def specialisations(kernel: str, calls: list[dict[str, Any]]) -> list[str]:
    """What each call's arguments make Triton compile for sm_90: calls with equal texts share one compiled kernel."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = getattr(importlib.import_module(f"kdkernels.triton_kernels.{KERNELS[kernel]}"), f"{kernel}_kernel")
    backend = make_backend(GPUTarget(*TARGETS["sm_90"]))
    bind = create_function_from_signature(function.signature, function.params, backend)
    defaults = dict.fromkeys(function.arg_names)
    return [str(bind(**{**defaults, **call})[1]) for call in calls]

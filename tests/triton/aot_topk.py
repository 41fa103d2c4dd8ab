"""Compiles the kernels of the family topk ahead of time, see ``aot``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aot
from gpu_report.objects import read_resources
from kdkernels.triton_kernels.tiling import LaunchSizes, default_sizes

KERNELS = ("topk", "block_sums", "draw")
NUMBERS = ("temperature", "softcap")


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    kernel: str
    target: str
    dtype: str
    softcap: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        extras = ["softcap" if self.softcap else "", "" if self.aligned else "unaligned"]
        return "-".join(filter(None, [self.kernel, self.target, self.dtype, *extras]))


def spilled_bytes(case: Case, sizes: LaunchSizes | None = None) -> int:
    """Local memory of a thread: the kernels have no arrays, so all of it is spilled registers."""
    import torch
    import triton
    import triton.language as tl
    from kdkernels.triton_kernels import topk
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels.backends.triton.topk import KEYS

    kernel = getattr(topk, f"{case.kernel}_kernel")
    target = GPUTarget(*aot.TARGETS[case.target])
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    sizes = sizes or default_sizes("topk", aot.VOCABULARY, aot.ITEMSIZE[case.dtype], target.warp_size)
    tile = sizes.threads * sizes.bytes_per_thread // 4
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    shift, passes = KEYS[names[case.dtype]]
    constants = {
        "HAS_CAP": case.softcap,
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32,
        "SHIFT": shift,
        "PASSES": passes,
        "TILE": tile,
        "BLOCK": tile,
        "WIDTH": 16 // aot.ITEMSIZE[case.dtype] if case.aligned else 1,
    }
    types = {"source": f"*{case.dtype}", "vocab_size": "i32", "k": "i32", "sums": "*fp64", "fractions": "*fp64"}
    types |= dict.fromkeys(("ids", "ids_out", "blocks"), "*i64")
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            signature[name] = parameter.annotation_type or types.get(name, f"*{compute}")
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers} if case.aligned else {}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=target,
        options={"num_warps": sizes.threads // target.warp_size},
    )
    return read_resources(compiled).spilled_bytes


def specialisations(kernel: str, calls: list[dict[str, Any]]) -> list[str]:
    """What each call's arguments make Triton compile for sm_90: calls with equal texts share one compiled kernel."""
    from kdkernels.triton_kernels import topk
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = getattr(topk, f"{kernel}_kernel")
    backend = make_backend(GPUTarget(*aot.TARGETS["sm_90"]))
    bind = create_function_from_signature(function.signature, function.params, backend)
    defaults = dict.fromkeys(function.arg_names)
    return [str(bind(**{**defaults, **call})[1]) for call in calls]

"""Compiles the kernels of linear_divergence ahead of time, see ``aot``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import aot
from gpu_report.objects import read_resources

ROWS, VOCABULARY, HIDDEN = 4096, 151_936, 4096
"""Of the problems that are compiled for: they decide the tiling and how addresses are aligned."""

NOTES = ("*fp32", "*fp32", "*i32")

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""What a block may have."""


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel. ``tolerant``: tiles are noted, or walked by lists."""

    kernel: str
    target: str
    dtype: str
    kind: int = 0
    everything: bool = False
    """Labels, masks, biases, softcaps, an order of the vocabulary, temperatures and parameters per token."""
    both: bool = False
    """Whether the teacher has a gradient as well."""
    tolerant: bool = False
    tf32: bool = False
    tiling: Any = None

    def __str__(self) -> str:
        kind = f"kind{self.kind}" if self.kernel in ("sweep", "terms", "gradient") else ""
        flags = [name for name in ("everything", "both", "tolerant", "tf32") if getattr(self, name)]
        return "-".join(filter(None, [self.kernel, kind, self.target, self.dtype, *flags]))


def side(case: Case) -> tuple[tuple[Any, ...], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The types of a side as kernels get it, where in it nothing is given, and which of it are multiples of 16."""
    optional = {4: f"*{case.dtype}", 7: "fp32", 9: "*fp32"}
    types: list[str] = [f"*{case.dtype}", "i32", f"*{case.dtype}", "i32", "", "i32", "fp32", "", "fp32", ""]
    for place, kind in optional.items():
        types[place] = kind if case.everything else "constexpr"
    nothings = [] if case.everything else [(place,) for place in optional]
    return tuple(types), nothings, [(0,), (1,), (2,), (3,), (5,), *([(4,), (9,)] if case.everything else [])]


def compiled(case: Case) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory."""
    import triton
    from kdkernels.triton_kernels import linear_divergence
    from kdkernels.triton_kernels.tiling import choose_linear_tiling
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(linear_divergence, f"linear_divergence_{case.kernel}_kernel")
    target = GPUTarget(*aot.TARGETS[case.target])
    tiling = case.tiling or choose_linear_tiling(
        ROWS, aot.ITEMSIZE[case.dtype], case.both, case.tf32, aot.TARGETS[case.target][2]
    )
    splits = -(-VOCABULARY // tiling.split)
    constants = {
        "KIND": case.kind,
        "FAST_LOG": target.backend == "cuda",
        "PRECISION": "tf32" if case.tf32 else "ieee",
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "HIDDEN": tiling.hidden,
        "PRODUCT": tiling.product,
        "SPLIT": tiling.split,
        "SPLITS": 1 << (splits - 1).bit_length(),
        "FIRST": False,
    }
    absent = set() if case.everything else {"labels", "active", "parameters", "grad_cross_entropy", "cross_entropy"}
    absent |= set() if case.everything else {"order", "student_temperatures", "teacher_temperatures"}
    absent |= set() if case.both else {"grad_teacher"}
    listed = {"student_notes", "teacher_notes", "lists", "counts", "means", "skipped"}
    absent |= set() if case.tolerant else listed
    absent.add("grad_bias")
    if "grad_teacher" in absent:
        absent.add("teacher_notes")
    inputs = {"grad_student", "grad_teacher", "gradient", "weight", "hidden", "grad_weight", "grad_bias"}
    types = dict.fromkeys(inputs, f"*{case.dtype}")
    types |= dict.fromkeys(("row_count", "vocab_size", "splits", "first_column", "tiles", "blocks"), "i32")
    types |= dict.fromkeys(("hidden_size", "weight_stride", "hidden_stride"), "i32")
    types |= dict.fromkeys(("lists", "counts", "order"), "*i32")
    types |= dict.fromkeys(("a", "b", "scale", "student_temperature", "teacher_temperature"), "fp32")
    types |= {"labels": "*i64", "active": "*i1"}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in ("student", "teacher"):
            signature[name], nothings, multiples = side(case)
            constexprs |= {(place, *path): None for path in nothings}
            aligned += [(place, *path) for path in multiples]
        elif parameter.is_constexpr or name in absent:
            signature[name] = "constexpr"
            constexprs[name] = constants[name] if parameter.is_constexpr else None
        elif name.endswith("_notes"):
            signature[name] = NOTES
            aligned += [(place, index) for index in range(len(NOTES))]
        else:
            signature[name] = parameter.annotation_type or types.get(name, "*fp32")
            if signature[name].startswith("*") or name in ("hidden_size", "weight_stride", "hidden_stride"):
                aligned.append((place,))
    warps, most_registers = tiling.launch(case.kernel)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": tiling.num_stages, "maxnreg": most_registers}
    if case.kernel in ("merge", "value"):
        options = {"num_warps": 1}
    made = triton.compile(
        ASTSource(kernel, signature, constexprs, {path: [["tt.divisibility", 16]] for path in aligned}),
        target=target,
        options=options,
    )
    found = read_resources(made)
    text = made.asm.get("ptx", made.asm.get("amdgcn", ""))
    return {
        "registers": found.registers,
        "spilled_bytes": found.spilled_bytes,
        "scalars_in_lanes": found.scalars_in_lanes,
        "shared": found.shared_bytes,
        "tensor_cores": any(word in text for word in ("wgmma", "mma.sync", "tcgen05.mma", "mfma")),
    }


def with_tiling(case: Case, **sizes: int) -> Case:
    """The same with another tiling, to try it."""
    from kdkernels.triton_kernels.tiling import choose_linear_tiling

    tiling = choose_linear_tiling(ROWS, aot.ITEMSIZE[case.dtype], case.both, case.tf32, aot.TARGETS[case.target][2])
    return replace(case, tiling=replace(tiling, **sizes))


def launched(numbers: tuple[float, ...], target: str) -> set[str]:
    """What a loss and its gradients make Triton compile: launches of equal texts share one compiled kernel.

    numbers: the divergence's two, both temperatures, both softcaps, both scales; and how many rows there are.
    """
    import torch
    from gpu_report.compilation import launches_of

    from kdkernels.backends import triton as backend
    from kdkernels.backends.chunked_head import Needs
    from kdkernels.backends.rows import RowSpec, Side
    from kdkernels.divergences import Kind

    a, b, student, teacher, student_cap, teacher_cap, scale, teacher_scale, rows = numbers
    count, vocab, hidden = int(rows), 5000, 16
    weight = torch.zeros(vocab, hidden)
    sides = Side(torch.zeros(count, hidden), weight, scale=scale), Side(weight[:count], weight, scale=teacher_scale)
    spec = RowSpec(int(Kind.AB), a, b, student, None, teacher, None, student_cap, teacher_cap)
    needs = Needs(tensor=True, weight=True, bias=False), Needs(tensor=False, weight=False, bias=False)
    found = launches_of(lambda: backend.linear_divergence(*sides, spec, torch.ones(count), None, needs), target)
    return {launch.key for launch in found}

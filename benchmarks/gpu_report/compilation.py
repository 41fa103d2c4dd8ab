"""Compiles what the Triton backend launches, for GPUs that are not there.

The backend is called as ever, on CPU tensors; in the place of a launch stands a recorder, which does what Triton does ahead of
one and keeps the kernel's types and constants. So nothing about a launch is written down twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from .objects import Loop, Resources, cuda_loops, hip_loops, read_resources

__all__ = ["TARGETS", "CompiledKernel", "Launch", "compile_call", "compile_launch", "launches_of", "recorded"]

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""The arguments of Triton's ``GPUTarget``."""

CHOSEN = ("num_warps", "num_stages", "maxnreg")
"""Options of the compiler that a launch may choose."""


@dataclass(frozen=True)
class Launch:
    """What one launch asks of the compiler."""

    kernel: str
    source: Any
    target: Any
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Launches of equal keys share one compiled kernel."""
        return f"{self.kernel} {self.source.signature} {self.source.constants} {self.source.attrs} {self.options}"


@dataclass(frozen=True)
class CompiledKernel:
    kernel: str
    num_warps: int
    resources: Resources
    loops: list[Loop]


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Launches are recorded, not made: what they should have written is left as it was."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from kdkernels.backends.devices import Device
    from kdkernels.backends.triton import launching

    gpu = GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*arguments, **keywords)
        parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        chosen = {name: value for name in CHOSEN if (value := getattr(parsed, name, None)) is not None}
        launches.append(Launch(self.__name__, source, gpu, chosen))

    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(launching, "is_hip", return_value=gpu.backend == "hip"),
        # Where the backend finds tensors of the CPU, and what it chooses launch sizes for.
        mock.patch.object(launching, "INTERPRETER", Device(target, target, gpu.warp_size)),
    ):
        yield launches


def compile_launch(launch: Launch) -> CompiledKernel:
    import triton

    compiled = triton.compile(launch.source, target=launch.target, options=launch.options)
    on_cuda = launch.target.backend == "cuda"
    loops = cuda_loops(compiled.asm["cubin"]) if on_cuda else hip_loops(compiled.asm["amdgcn"])
    return CompiledKernel(launch.kernel, compiled.metadata.num_warps, read_resources(compiled), loops)


def launches_of(call: Callable[[], object], target: str) -> list[Launch]:
    """What the call launches, every version of a kernel once; a launch that its kernel does not take raises."""
    # What follows a launch finds no results and may refuse them.
    with recorded(target) as launches, contextlib.suppress(ValueError):
        call()
    return list({launch.key: launch for launch in launches}.values())


def compile_call(call: Callable[[], object], target: str) -> list[CompiledKernel]:
    """Every kernel that the call launches, once."""
    return [compile_launch(launch) for launch in launches_of(call, target)]

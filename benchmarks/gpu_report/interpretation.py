"""Counts what kernels move and compute, in Triton's interpreter.

Bytes are those of the elements that a load or store names and its mask lets through: what a kernel asks for, caches or not.
Arithmetic is what the source says: additions, multiplications, comparisons to a maximum and the steps of reductions in floating
point, each 1; divisions, exponentials and logarithms apart. What lies outside a row counts, if it is computed.
Only where ``TRITON_INTERPRET=1`` was set before triton was imported.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Counts", "count", "count_call", "observed"]

Counts = Counter[str]
"""By "loaded" and "stored" (bytes), "arithmetic", "special", "divisions"."""

ARITHMETIC = {"add", "subtract", "multiply", "fmax", "fmin", "maximum", "minimum", "absolute", "negative", "fabs"}
SPECIAL = {"exp2", "log2", "exp", "log", "sqrt", "sin", "cos", "tanh"}
DIVISIONS = {"divide", "true_divide"}


def load_helpers_once() -> None:
    """Triton's interpreter prepares triton.language at every call of a helper; once per helper is far faster."""
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1":
    load_helpers_once()

Access = Callable[[str, Any, Any, int], None]
"""Gets "load" or "store", the addresses, the mask and the bytes of an element."""


@contextlib.contextmanager
def observed(access: Access) -> Iterator[None]:
    """Calls `access` for every load and store of the interpreter; plain ones go through the masked ones, all ones."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    originals = {"load": Builder.create_masked_load, "store": Builder.create_masked_store}

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        access("load", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return originals["load"](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        access("store", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return originals["store"](self, ptrs, value, mask, *rest)

    with mock.patch.multiple(Builder, create_masked_load=load, create_masked_store=store):
        yield


@contextlib.contextmanager
def count() -> Iterator[dict[str, Counts]]:
    """What the kernels that are launched inside move and compute, by their names."""
    from triton.runtime import interpreter

    builder, grids, reductions = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.ReduceOps
    found: dict[str, Counts] = defaultdict(Counter)
    running = [""]
    originals = {
        "launch": grids.__call__,
        "unary": builder.unary_op,
        "binary": builder.binary_op,
        "fma": builder.create_fma,
        "reduce": reductions.apply_impl,
    }

    def access(action: str, _: Any, mask: Any, width: int) -> None:
        found[running[0]]["loaded" if action == "load" else "stored"] += int(mask.sum()) * width

    def launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        running[0] = self.fn.__name__
        try:
            with _disable_current_modes():  # the interpreter copies what a kernel gets
                return originals["launch"](self, *arguments, **keywords)
        finally:
            running[0] = ""

    def operation(name: str, result: Any) -> None:
        if not result.dtype.scalar.is_floating():
            return
        for kind, names in (("arithmetic", ARITHMETIC), ("special", SPECIAL), ("divisions", DIVISIONS)):
            if name in names:
                found[running[0]][kind] += result.data.size

    def unary(self: Any, argument: Any, function: Any) -> Any:
        result = originals["unary"](self, argument, function)
        operation(function.__name__, result)
        return result

    def binary(self: Any, left: Any, right: Any, function: Any) -> Any:
        result = originals["binary"](self, left, right, function)
        operation(function.__name__, result)
        return result

    def fma(self: Any, *arguments: Any) -> Any:
        result = originals["fma"](self, *arguments)
        found[running[0]]["arithmetic"] += 2 * result.data.size
        return result

    def reduce(self: Any, inputs: Any) -> Any:
        first = inputs[0]
        if first.dtype.scalar.is_floating():
            size = int(first.handle.data.size)
            found[running[0]]["arithmetic"] += size - size // (
                size if self.axis is None else int(first.handle.data.shape[self.axis])
            )
        return originals["reduce"](self, inputs)

    with (
        observed(access),
        mock.patch.multiple(builder, unary_op=unary, binary_op=binary, create_fma=fma),
        mock.patch.object(grids, "__call__", launch),
        mock.patch.object(reductions, "apply_impl", reduce),
    ):
        yield found


def count_call(call: Callable[[], int]) -> tuple[dict[str, Counts], int]:
    """(counts by kernel, what the call returned: how many units it worked on)."""
    with count() as found:
        units = call()
    return dict(found), units

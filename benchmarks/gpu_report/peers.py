"""Other libraries' kernels beside ours by the same count: a loss from logits, and from two language-model heads between its GEMMs.

Kernels are counted in the interpreter, PyTorch's operations by the sizes of their operands: each is read once and each result
written once, which is the least they can move. Matrix products are left out on all sides, and of all tensors only those with
one number per token and vocabulary entry count. The libraries are no dependency: those that cannot be imported are named so.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd

from .calls import DTYPES, logits
from .interpretation import count

__all__ = ["CONTENDERS", "PeerTraffic", "compare"]

ROWS, VOCAB, HIDDEN = 4, 16_384, 24


@dataclass(frozen=True)
class PeerTraffic:
    """Bytes per logit position, forward and backward; those of PyTorch's operations apart from those of kernels."""

    library: str
    version: str
    loss: str
    dtype: str
    kernels_loaded: float
    kernels_stored: float
    torch_loaded: float
    torch_stored: float
    problem: str = ""
    """Why nothing was counted."""

    @property
    def total(self) -> float:
        return self.kernels_loaded + self.kernels_stored + self.torch_loaded + self.torch_stored


MOVES_NOTHING = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
MOVES_NOTHING |= {"mm", "addmm", "addmm_", "bmm"}  # matrix products: on all sides alike
ONLY_WRITES = {
    "zero_",
    "fill_",
    "zeros",
    "zeros_like",
    "new_zeros",
    "full",
    "full_like",
    "new_full",
    "ones_like",
    "new_ones",
}


class OperandBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sizes of the operands of PyTorch's operations that have a number per logit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loaded = self.stored = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if own := OPDEFS.get(function._schema.name):
            with self:  # what the operator is made of
                return own._init_fn(*arguments, **keywords)
        given = tensors_of([arguments, keywords])
        result = function(*arguments, **keywords)
        name = function.overloadpacket.__name__
        if function.is_view or name in MOVES_NOTHING:
            return result
        results = tensors_of(result)
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        if name not in ONLY_WRITES:
            self.loaded += sum(map(logit_bytes, given[1:] if name == "copy_" else given))
        # A result that shares its storage and is no in-place operation's is a view after all.
        in_place = name.endswith("_") or "out" in keywords
        self.stored += sum(
            logit_bytes(tensor) for tensor in results if in_place or tensor.untyped_storage().data_ptr() not in storages
        )
        return result


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def logit_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor [tokens, vocabulary]; 0 of others. What is broadcast is there once."""
    if tensor.dim() != 2 or tensor.shape[1] != VOCAB or tensor.shape[0] == HIDDEN or 0 in tensor.stride():
        return 0
    return tensor.numel() * tensor.element_size()


def pair(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return logits(dtype, ROWS, VOCAB, 0).requires_grad_(), logits(dtype, ROWS, VOCAB, 1)


def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(hidden, weight) of the student and of the teacher."""
    hidden = [logits(dtype, ROWS, HIDDEN, seed) for seed in (0, 1)]
    weights = [0.2 * logits(dtype, VOCAB, HIDDEN, seed) for seed in (2, 3)]
    return hidden[0].requires_grad_(), weights[0].requires_grad_(), hidden[1], weights[1]


def ours(divergence: Any) -> Callable[..., None]:
    def run(student: Tensor, teacher: Tensor) -> None:
        torch.autograd.backward(kd.distillation_loss(student, teacher, divergence, backend="triton"))

    return run


def ours_from_heads(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    student, teacher = kd.LMHead(hidden, weight), kd.LMHead(teacher_hidden, teacher_weight)
    torch.autograd.backward(kd.distillation_loss(student, teacher, kd.JSD(), backend="triton"))


def liger_jsd(student: Tensor, teacher: Tensor) -> None:
    from liger_kernel.ops.jsd import LigerJSDFunction

    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    LigerJSDFunction.apply(log_q, log_p, None, 0.5, -100).backward()


def liger_kl(student: Tensor, teacher: Tensor) -> None:
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_q, p = torch.log_softmax(student, -1), torch.softmax(teacher, -1)
    LigerKLDivLossFunction.apply(log_q, p, "batchmean", False).backward()


def liger_tvd(student: Tensor, teacher: Tensor) -> None:
    from liger_kernel.ops.tvd import LigerTVDLossFunction

    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    LigerTVDLossFunction.apply(q, p, None, "batchmean", -100).backward()


def liger_fused_linear_jsd(*sides: Tensor) -> None:
    from liger_kernel.ops import fused_linear_jsd as module

    # On a GPU the product itself has float32 results; on the CPU a conversion follows it, which Liger's users never see.
    def project(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.float() @ weight.float().t()

    with mock.patch.object(module, "_project_to_float32", project):
        loss = module.LigerFusedLinearJSDFunction.apply(*sides, None, 0.5, -100, 1.0)
    loss.backward()


def cut_cross_entropy_lse(hidden: Tensor, weight: Tensor, *_: Tensor) -> None:
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    cce_lse_forward_kernel(hidden.detach(), weight.detach())


FROM_LOGITS, FROM_HEADS = "from logits", "two heads, between the GEMMs"
CONTENDERS: dict[tuple[str, str], tuple[Callable[..., None], Callable[[torch.dtype], tuple[Tensor, ...]]]] = {
    ("kdkernels", f"JSD {FROM_LOGITS}"): (ours(kd.JSD()), pair),
    ("liger-kernel", f"JSD {FROM_LOGITS}"): (liger_jsd, pair),
    ("kdkernels", f"forward KL {FROM_LOGITS}"): (ours(kd.ForwardKL()), pair),
    ("liger-kernel", f"forward KL {FROM_LOGITS}"): (liger_kl, pair),
    ("kdkernels", f"TVD {FROM_LOGITS}"): (ours(kd.TVD()), pair),
    ("liger-kernel", f"TVD {FROM_LOGITS}"): (liger_tvd, pair),
    ("kdkernels", f"JSD of {FROM_HEADS}"): (ours_from_heads, heads),
    ("liger-kernel", f"JSD of {FROM_HEADS}"): (liger_fused_linear_jsd, heads),
    ("cut-cross-entropy", "log-sum-exp of a head, no distillation (forward)"): (cut_cross_entropy_lse, heads),
}


@contextlib.contextmanager
def numbers_as_tensors() -> Iterator[None]:
    """Kernels get their float arguments as tensors, as compiled ones do; the interpreter hands them on as they are."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_all(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    with mock.patch.object(interpreter, "_implicit_cvt", convert_all):
        yield


def compare(library: str, loss: str, dtype: str) -> PeerTraffic:
    """One contender; in a process where the interpreter is on."""
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return PeerTraffic(library, "", loss, dtype, 0, 0, 0, 0, "not installed")
    floats = contextlib.nullcontext() if library == "kdkernels" else numbers_as_tensors()
    run, make = CONTENDERS[library, loss]
    inputs = make(DTYPES[dtype])
    try:
        with floats, count() as kernels, OperandBytes() as operations:
            run(*inputs)
    except Exception as error:  # noqa: BLE001 - foreign code, which need not run in an interpreter; the reason is reported
        return PeerTraffic(
            library, version, loss, dtype, 0, 0, 0, 0, f"{type(error).__name__}: {error}".splitlines()[0]
        )
    loaded, stored = (sum(each[name] for each in kernels.values()) for name in ("loaded", "stored"))
    size = ROWS * VOCAB
    return PeerTraffic(
        library, version, loss, dtype, loaded / size, stored / size, operations.loaded / size, operations.stored / size
    )

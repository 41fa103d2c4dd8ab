"""The codec family ``records`` as the store uses it: natively where possible, and also in forked processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import cpu
from kdkernels.records import record_sizes
from kdkernels.reference import records as reference

__all__ = ["pack", "record_sizes", "single_thread_after_fork", "unpack"]


class Process:
    """The process that this module was imported in, or that has seen to its threads since."""

    pid = os.getpid()


def single_thread_after_fork() -> None:
    """A forked process computes in one thread from now on; to be called before anything is computed.

    For libgomp, the OpenMP runtime of torch and of the extension, waits for ever in a forked child for threads that stayed
    with its parent.
    """
    if Process.pid != os.getpid():
        torch.set_num_threads(1)
        Process.pid = os.getpid()


def backend() -> Any:
    """The native codec, or the reference where there is no extension."""
    return cpu if cpu.status()[0] else reference


def pack(
    ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Records of ids and log-probabilities ``[N, K]``: their bytes, and the entries of each, int32 ``[N]``."""
    packed: tuple[Tensor, Tensor] = backend().pack_records(ids, log_probs, log_tail_mass, vocab_size, bits)
    return packed


def unpack(data: Tensor, counts: Tensor, vocab_size: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities ``[N, width]`` and the log tail mass ``[N]`` of ``N`` records; ValueError if malformed."""
    rows: tuple[Tensor, Tensor, Tensor] = backend().unpack_records(data, counts, vocab_size, bits, width)
    return rows

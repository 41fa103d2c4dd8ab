"""Counts what the divergence in CUDA C++ reads and writes of whole rows, on the emulated device (see ``emulation``).

Bytes are those of the logits and gradients that threads load and store, caches or not; the few numbers of each row are not
counted. Where rows fit into shared memory, and where they do not: that is for the emulated device to grant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import cuda as backend
from kdkernels.backends.compiled.library import DTYPES as NUMBERS
from kdkernels.backends.cuda.launching import module
from kdkernels.divergences import Kind

from .calls import DTYPES, divergence_spec, logits, named
from .occupancy import ARCHITECTURES
from .tables import LongestRow, RowTraffic

__all__ = ["counted", "longest_rows", "tasks"]

VOCAB = 512
"""Whole steps of every block, so that what is counted per logit holds for any whole number of steps."""

NO_SHARED_MEMORY, DEFAULT = (0, True), (48 << 10, True)
"""Devices: shared memory of a block, and whether there are clusters."""


def launches(kind: Kind, student: Tensor, teacher: Tensor) -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    """Calls by name; what each needs is made before."""
    spec, upstream = divergence_spec(kind), torch.ones(len(student))
    *_, statistics = backend.divergence_forward(student, teacher, spec)
    yield "forward", lambda _: backend.divergence_forward(student, teacher, spec)
    backward = partial(backend.divergence_backward, student, teacher, statistics, spec, upstream, None)
    yield "backward", lambda gradient: backward(gradient, None)
    fused = partial(backend.divergence_fused, student, teacher, spec, upstream, None)
    yield "fused", lambda gradient: fused(gradient, None)


def counted(kind: Kind, dtype: str) -> list[RowTraffic]:
    """Of all calls of a divergence, with shared memory and without; calls that launch the same with both, once."""
    emulated = module()
    student, teacher = (logits(DTYPES[dtype], 1, VOCAB, seed) for seed in range(2))
    found = []
    for device in (DEFAULT, NO_SHARED_MEMORY):
        emulated.emulate_device(*device)
        try:
            for name, call in launches(kind, student, teacher):
                emulated.forget_records()
                call(torch.empty_like(student))
                records: dict[str, Any] = emulated.records()
                loaded, stored = (sum(record[place] for record in records.values()) for place in range(2))
                positions = student.numel()
                found.append(
                    RowTraffic(
                        named(kind), name, dtype, " ".join(sorted(records)), loaded / positions, stored / positions
                    )
                )
        finally:
            emulated.emulate_device(*DEFAULT)
    return list(dict.fromkeys(found))


def longest_rows(dtype: str) -> list[LongestRow]:
    """For every NVIDIA architecture, where both sides have the dtype and there are rows enough for every multiprocessor."""
    emulated, number = module(), NUMBERS[DTYPES[dtype]]
    found = []
    for target, architecture in ARCHITECTURES.items():
        if not target.startswith("sm_"):
            continue
        emulated.emulate_device(architecture.shared_bytes - architecture.shared_reserved, int(target[3:]) >= 90)
        try:
            fits, fits_not = 0, 1 << 24
            while fits_not - fits > 1:
                vocab = (fits + fits_not) // 2
                if emulated.divergence_fits_on_chip(1 << 20, vocab, number, number):
                    fits = vocab
                else:
                    fits_not = vocab
        finally:
            emulated.emulate_device(*DEFAULT)
        found.append(LongestRow(target, dtype, fits))
    return found


def tasks(only: str = "") -> list[tuple[Kind, str]]:
    """What to count: divergence and dtype."""
    chosen = [kind for kind in Kind if only in f"divergence {named(kind)}"]
    return [(kind, dtype) for kind in chosen for dtype in ("fp32", "bf16")]

"""What the tests of pairwise_l1 and sinkhorn run where the CUDA kernels are emulated (see the fixture `emulated`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import chunked_pairs, row_backend
from kdkernels.backends.rows import PairSpec, Side, Tempering


def pairs(
    student: Tensor, teacher: Tensor, upstream: Tensor, options: dict[str, Any], backend: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    """(distances, gradient to the student, gradient to the teacher)."""
    leaves = [logits.detach().requires_grad_() for logits in (student, teacher)]
    distance = kd.pairwise_l1(*leaves, backend=backend, **options)
    return distance.detach(), *torch.autograd.grad(distance, leaves, upstream.to(distance.dtype))


def pair_gradients(student: Tensor, teacher: Tensor, grad: Tensor, places: tuple[str, str]) -> list[Tensor | None]:
    """The gradients to rows of one problem: "apart", "in place" of the logits, or "unwanted"."""
    spec = PairSpec(1, len(student), len(teacher), Tempering(1.3, 7.0), Tempering(0.8, 0.0))
    found = chunked_pairs.distances(Side(student), Side(teacher), spec, True, None, "cuda")
    centres = (
        (grad * found.signed_mass[0]).sum(-1),
        (grad * (found.distance - found.signed_mass)[0]).sum(-2),
    )
    given = [logits.clone() for logits in (student, teacher)]
    into = [
        {"apart": torch.full_like(logits, torch.nan), "in place": logits, "unwanted": None}[place]
        for place, logits in zip(places, given, strict=True)
    ]
    normalisers = [found.student_normalisers, found.teacher_normalisers]
    row_backend("cuda").pairwise_l1_backward(*given, spec, normalisers, grad.unsqueeze(0), centres, *into)
    return into

"""What the tests of pairwise_l1 and sinkhorn run where the CUDA kernels are emulated (see the fixture `emulated`)."""

from __future__ import annotations

import warnings
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


Problem = tuple[Tensor, Tensor | None, Tensor | None]


def transport(
    problem: Problem, options: dict[str, Any], weights: dict[str, Tensor], backend: str = "cuda"
) -> dict[str, Tensor]:
    """Results of ``sinkhorn``, and the gradients of the sum of ``weights`` times the results that they name."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in problem]
    cost = leaves[0]
    assert cost is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        result = kd.sinkhorn(cost, *leaves[1:], backend=backend, **options)
    found = {name: getattr(result, name) for name in ("distance", "value", "f", "g", "marginal_error")}
    found["plan"] = result.plan()
    terms = [(found[name] * weight.to(found[name].dtype)).sum() for name, weight in weights.items()]
    if terms:
        torch.stack(terms).sum().backward()
    found |= {
        f"gradient to {name}": leaf.grad
        for name, leaf in zip(("cost", "a", "b"), leaves, strict=True)
        if leaf is not None and leaf.grad is not None
    }
    return {name: each.detach() for name, each in found.items()} | {"iterations": result.iterations}


def fault(cost: Tensor) -> str:
    try:
        kd.sinkhorn(cost, epsilon=0.1, max_iterations=2, backend="cuda")
    except ValueError as error:
        return str(error)
    return ""

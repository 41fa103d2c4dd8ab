"""The accuracy rule: against the float64 truth, a kernel errs no more than plain PyTorch does in the same precision.

Plain PyTorch may be lucky, so a little is added to its error. It is measured by the truth itself, per row and per entry:
far below any mistake, so that a gradient that is zero, has a wrong sign, is off by a percent or wrong in one entry breaks
the rule (``test_mutations`` makes sure of that).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from truth import compute_dtype

# Under the sanitizers nothing is vectorised, so that a sum runs through one accumulator instead of sixteen.
LENIENCE = 4 if os.environ.get("KDKERNELS_TEST_SERIAL_SUMS") == "1" else 1

SLACK = {torch.float32: LENIENCE * 2e-6, torch.float64: LENIENCE * 2e-13}
"""What is added to plain PyTorch's error, relative to the truth, by the precision of the computation."""

ROUNDINGS = {torch.float32: LENIENCE * 2, torch.float64: LENIENCE * 20}
"""And how many roundings of the terms that a result is the sum of: all that is left where the truth vanishes.

In float64 the truth itself is no better than that.
"""


def complaint(
    ours: Tensor, plain: Tensor, truth: Tensor, size: Tensor | None = None, *, slack: float | None = None
) -> str | None:
    """Why a result breaks the rule, or None. The last dimension makes up a row.

    ``plain`` is compared as if rounded to the dtype of ``ours``. ``size`` is that of the terms behind each entry; where it
    is not known, an entry may err as much as any of plain PyTorch's in its row.
    """
    if ours.shape != truth.shape:
        return f"has the shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    if not bool(ours.isfinite().all()):
        return f"is not finite: {ours}"
    dtype = ours.dtype
    compute = compute_dtype(dtype)
    slack = SLACK[compute] if slack is None else slack
    ours, plain, rounded, truth = (each.double() for each in (ours, plain, plain.to(dtype), truth))
    terms = torch.zeros_like(truth) if size is None else ROUNDINGS[compute] * torch.finfo(compute).eps * size.double()
    error = (ours - truth).norm(dim=-1)
    allowed = (rounded - truth).norm(dim=-1) + slack * truth.norm(dim=-1) + terms.norm(dim=-1)
    if not bool((error <= allowed).all()):
        row = int((error - allowed).argmax())
        return f"row {row} errs by {error.flatten()[row]:.3e}, allowed are {allowed.flatten()[row]:.3e}"
    # The norm of a row would hide a wrong entry among many.
    info = torch.finfo(dtype)
    error = (ours - truth).abs()
    allowed = 0.5 * info.eps * (truth.abs() + info.tiny) + torch.finfo(compute).tiny
    if size is None:
        allowed = allowed + (plain - truth).abs().amax(-1, keepdim=True) + slack * truth.abs().amax(-1, keepdim=True)
    else:
        allowed = allowed + 2 * (plain - truth).abs() + 4 * slack * truth.abs() + 4 * terms
    if not bool((error <= allowed).all()):
        entry = int((error - allowed).argmax())
        return (
            f"entry {entry} of {tuple(ours.shape)} is {ours.flatten()[entry]:.9e}, truth {truth.flatten()[entry]:.9e}, "
            f"allowed error {allowed.flatten()[entry]:.3e}"
        )
    return None


def check(
    name: str,
    ours: Tensor | None,
    plain: Tensor,
    truth: Tensor,
    size: Tensor | None = None,
    *,
    slack: float | None = None,
) -> None:
    """Fails unless ``ours`` follows the rule."""
    assert ours is not None, f"{name} is missing"
    fault = complaint(ours, plain, truth, size, slack=slack)
    assert fault is None, f"{name} {fault}"

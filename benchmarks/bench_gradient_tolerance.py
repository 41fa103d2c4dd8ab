"""LM heads under a gradient tolerance, beside their own matrix products: a real teacher's states and a student near it.

The student is the teacher with noise on its hidden states and its weight, at the KL divergence that the titles name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from head_products import GEMMS, head_gemms
from reporting import SideBySide, Target
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking.contenders import CONTENDERS
from kdkernels.benchmarking.workloads import Operation, Workload

TOKENS, LENGTH, K = 2048, 512, 64
TOLERANCES = (1e-3, 3e-3)


@functools.cache
def real_teacher() -> tuple[Tensor, Tensor]:
    """SmolLM2's last hidden states over prose [TOKENS, H], and its head's weight [V, H]."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import smollm2

    try:
        teacher, tokenizer = smollm2.load_teacher(torch.device("cpu"))
    except smollm2.MissingRequirementError as error:
        pytest.skip(str(error))
    sequences = smollm2.load_text(tokenizer, LENGTH).training
    picked = sequences[:: len(sequences) // (TOKENS // LENGTH)][: TOKENS // LENGTH]
    with torch.no_grad():
        states = torch.cat([teacher.model(row.unsqueeze(0)).last_hidden_state[0] for row in picked])
    return states.float(), teacher.lm_head.weight.detach().float()


@functools.cache
def student() -> tuple[Tensor, Tensor]:
    hidden, weight = real_teacher()
    generator = torch.Generator().manual_seed(0)
    hidden = hidden + 0.35 * hidden.std() * torch.randn(hidden.shape, generator=generator)
    weight = weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_()


def gradients(teacher: kd.LMHead | kd.TopKLogits, **options: object) -> Callable[[], list[Tensor]]:
    hidden, weight = student()

    def run() -> list[Tensor]:
        loss = kd.distillation_loss(kd.LMHead(hidden, weight), teacher, **options)
        return list(torch.autograd.grad(loss, [hidden, weight]))

    return run


def compare(
    side_by_side: SideBySide, name: str, teacher: kd.LMHead | kd.TopKLogits, bounds: tuple[float, float]
) -> None:
    """Times, the errors made and the shares of the gradient kept."""
    settings = [(f"tolerance {eps:g}", {"gradient_tolerance": eps}) for eps in TOLERANCES]
    settings += [
        (f"tolerance {eps:g}, stochastic", {"gradient_tolerance": eps, "gradient_rounding": "stochastic"})
        for eps in TOLERANCES
    ]
    hidden, weight = student()
    with torch.no_grad():
        divergence = float(kd.distillation_loss(kd.LMHead(hidden, weight), teacher))
    exact = gradients(teacher)()
    for label, options in settings:
        with kd.GradientReport() as report:
            found = gradients(teacher, **options)()
        errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
        kept = 100 * float(report.density.mean())
        side_by_side.benchmark.extra_info[label] = f"kept {kept:.2f}%, errors {errors}"
        eps = float(options["gradient_tolerance"])
        for what, error in zip(("hidden states", "weight"), errors, strict=True):
            line = f"{name}, {label}, {kept:.2g}% kept: relative error to the {what}"
            side_by_side.targets.append(Target(line, error, eps, unit=""))
    calls: dict[str, Callable[[], object]] = {"kdkernels, exact": gradients(teacher)}
    if isinstance(teacher, kd.LMHead):
        vocab, size = weight.shape
        workload = Workload(Operation.HEAD, kd.ForwardKL(), TOKENS, vocab, size, size)
        calls[GEMMS] = CONTENDERS[GEMMS].prepare(workload, workload.inputs())
    else:
        calls[GEMMS] = head_gemms(hidden, weight)
    for label, options in settings:
        calls[label] = gradients(teacher, **options)
    title = (
        f"{name}: {TOKENS:,} tokens × {weight.shape[0]:,}, hidden {weight.shape[1]}, KL {divergence:.2f}, float32, cpu"
    )
    side_by_side.measure(title, calls, rounds=5)
    for eps, bound in zip(TOLERANCES, bounds, strict=True):
        side_by_side.ratio(f"{name}, tolerance {eps:g}: in its own GEMMs", f"tolerance {eps:g}", GEMMS, bound)


def test_two_heads(side_by_side: SideBySide) -> None:
    compare(side_by_side, "two heads", kd.LMHead(*real_teacher()), (0.70, 0.62))


def test_stored_teacher(side_by_side: SideBySide) -> None:
    compare(side_by_side, f"stored top-{K} teacher", kd.topk_logits(kd.LMHead(*real_teacher()), K), (0.58, 0.50))

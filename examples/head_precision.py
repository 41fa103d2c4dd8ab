"""What a bfloat16 head does to the loss and its gradients, on a real teacher's states and students ever closer to it.

    python examples/head_precision.py                    # about a minute on two CPU cores
    python examples/head_precision.py --tokens 512 --out out/more

Nothing is trained and nothing timed. The students are SmolLM2-135M itself with noise on its hidden states and its head's
weight. Every way to compute the loss is held against plain PyTorch in float64: the loss of each token, and the gradients of
the mean to hidden states and weight. Files under ``--out``:

    head_precision.json    of every student, divergence and way the errors
    head_precision.png     the errors of the gradients by the student's distance from its teacher
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import plain_pytorch
import smollm2
import torch
import typer
from distill_lm import prepare_folder
from distillation_job import pick_evenly
from results import row_of_axes, write_json
from rich.console import Console
from rich.table import Table
from step_cost import HeadInputs, relative_error
from torch import Tensor
from torch.nn import functional
from training_step import DIVERGENCES

import kdkernels as kd

SEQUENCE_LENGTH = 128
NOISE = (1.0, 0.3, 0.1, 0.03)
"""Of the students, in units of 0.35 standard deviations of the hidden states and 0.02 of the weight."""
COMPARED_DIVERGENCES = ("forward_kl", "jsd")
TOLERANCE = 1e-3
console = Console()

TokenLosses = Callable[[str, HeadInputs], Tensor]
"""The loss of each token ``[N]``, of the divergence of that name."""


def fused(divergence: str, inputs: HeadInputs, **options: object) -> Tensor:
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs
    dtype = options.pop("compute_dtype", None)
    return kd.distillation_loss(
        kd.LMHead(student_hidden, student_weight, compute_dtype=dtype),
        kd.LMHead(teacher_hidden, teacher_weight, compute_dtype=dtype),
        DIVERGENCES[divergence].make(**DIVERGENCES[divergence].defaults),
        reduction="none",
        **options,
    )


def fused_with_rounded_operands(divergence: str, inputs: HeadInputs) -> Tensor:
    """As far as the logits go, matrix products of bfloat16 whose results are float32."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (x.bfloat16().float() for x in inputs)
    return fused(divergence, (student_hidden, student_weight, teacher_hidden, teacher_weight))


def token_losses(divergence: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    compute = partial(plain_pytorch.DIVERGENCES[divergence], **DIVERGENCES[divergence].defaults)
    return torch.stack([compute(p, q) for p, q in zip(log_p.unbind(), log_q.unbind(), strict=True)])


def plain(divergence: str, inputs: HeadInputs) -> Tensor:
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs
    with torch.no_grad():
        log_p = plain_pytorch.log_probabilities(teacher_hidden, teacher_weight)
    return token_losses(divergence, log_p, plain_pytorch.log_probabilities(student_hidden, student_weight))


def plain_autocast(divergence: str, inputs: HeadInputs) -> Tensor:
    """All of it under autocast, which on the CPU leaves the softmax in bfloat16."""
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        return plain(divergence, inputs)


def plain_autocast_of_logits(divergence: str, inputs: HeadInputs) -> Tensor:
    """Only the logits under autocast."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        student = functional.linear(student_hidden, student_weight)
        teacher = functional.linear(teacher_hidden, teacher_weight)
    return token_losses(divergence, *(logits.float().log_softmax(-1) for logits in (teacher, student)))


WAYS: Mapping[str, TokenLosses] = {
    "kdkernels, float32": fused,
    "kdkernels, bfloat16 operands, float32 logits": fused_with_rounded_operands,
    "kdkernels, bfloat16": partial(fused, compute_dtype=torch.bfloat16),
    f"kdkernels, bfloat16, gradient_tolerance={TOLERANCE:g}": partial(
        fused, compute_dtype=torch.bfloat16, gradient_tolerance=TOLERANCE, gradient_rounding="stochastic"
    ),
    "PyTorch, logits under autocast, float32 from there": plain_autocast_of_logits,
    "PyTorch, all under autocast": plain_autocast,
}


@dataclass(frozen=True)
class Errors:
    """Of one way to compute a loss: all relative.

    mean: of the mean over the tokens, signed. token: of one token's loss, the mean of their sizes over the mean loss.
    to_hidden, to_weight: L2, of the gradients of the mean.
    """

    way: str
    divergence: str
    kl: float  # of the student, nats per token: the true forward KL
    mean: float
    token: float
    to_hidden: float
    to_weight: float


def losses_and_gradients(way: TokenLosses, divergence: str, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every token, and what its mean gives the student's hidden states and weight."""
    student = tuple(tensor.detach().requires_grad_() for tensor in inputs[:2])
    losses = way(divergence, (*student, *inputs[2:]))
    return losses.detach(), *torch.autograd.grad(losses.mean(), student)


def measure(inputs: HeadInputs) -> list[Errors]:
    """The errors of every way in every divergence for one student."""
    found, kl = [], 0.0
    precise = tuple(tensor.double() for tensor in inputs)
    for divergence in COMPARED_DIVERGENCES:
        truth = losses_and_gradients(plain, divergence, precise)
        mean = float(truth[0].mean())
        if divergence == "forward_kl":
            kl = mean
        for name, way in WAYS.items():
            torch.manual_seed(0)  # of stochastic rounding
            losses, *gradients = losses_and_gradients(way, divergence, inputs)
            difference = losses.double() - truth[0]
            to_hidden, to_weight = (relative_error(*pair) for pair in zip(gradients, truth[1:], strict=True))
            errors = float(difference.mean()) / mean, float(difference.abs().mean()) / mean, to_hidden, to_weight
            found.append(Errors(name, divergence, kl, *errors))
    return found


def students(hidden: Tensor, weight: Tensor) -> list[HeadInputs]:
    """The teacher's states ``[N, H]`` and weight ``[V, H]`` beside those of each student."""
    generator = torch.Generator().manual_seed(0)
    noise_on_hidden = 0.35 * hidden.std() * torch.randn(hidden.shape, generator=generator)
    noise_on_weight = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return [(hidden + size * noise_on_hidden, weight + size * noise_on_weight, hidden, weight) for size in NOISE]


def table(errors: list[Errors], divergence: str, kl: float) -> Table:
    found = Table(title=f"{divergence}, a student at KL {kl:.2g}: relative errors", title_justify="left")
    found.add_column("")
    for heading in ("mean loss", "a token's loss", "dH", "dW"):
        found.add_column(heading, justify="right")
    for row in errors:
        if (row.divergence, row.kl) == (divergence, kl):
            numbers = [f"{row.mean:+.1e}", *(f"{value:.1e}" for value in (row.token, row.to_hidden, row.to_weight))]
            found.add_row(row.way, *numbers)
    return found


def draw(errors: list[Errors], file: Path) -> None:
    with row_of_axes(file, 2 * len(COMPARED_DIVERGENCES), width=5, height=4.5) as panels:
        pairs = [(divergence, what) for divergence in COMPARED_DIVERGENCES for what in ("to_hidden", "to_weight")]
        for axes, (divergence, what) in zip(panels, pairs, strict=True):
            for name, style in zip(WAYS, itertools.cycle(("-", "--", ":")), strict=False):
                mine = [row for row in errors if (row.divergence, row.way) == (divergence, name)]
                axes.plot(
                    [row.kl for row in mine],
                    [getattr(row, what) for row in mine],
                    marker="o",
                    linestyle=style,
                    label=name,
                )
            of = {"to_hidden": "hidden states", "to_weight": "weight"}[what]
            axes.set(title=f"{divergence}, gradient of the {of}", xlabel="KL(teacher || student), nats per token")
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("relative L2 error")
        panels[0].legend(frameon=False, fontsize=7)


def main(
    *,
    tokens: Annotated[int, typer.Option(min=1, help="To compute the loss of, at most.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/head_precision"),
) -> None:
    """Hold the loss and gradients of bfloat16 heads against float64."""
    prepare_folder(out)
    with console.status("Loading the teacher and running it over text"):
        teacher, tokenizer = smollm2.load_teacher(torch.device("cpu"))
        text = smollm2.load_text(tokenizer, SEQUENCE_LENGTH)
        sequences = pick_evenly(text.held_out, -(-tokens // SEQUENCE_LENGTH))
        with torch.no_grad():
            hidden = teacher.model(sequences).last_hidden_state.flatten(0, 1)[:tokens]
    errors: list[Errors] = []
    with console.status("Computing the loss in every way"):
        for inputs in students(hidden, teacher.lm_head.weight.detach()):
            errors += measure(inputs)
    for divergence in COMPARED_DIVERGENCES:
        for kl in dict.fromkeys(row.kl for row in errors):
            console.print(table(errors, divergence, kl))
    write_json({"tokens": len(hidden), "errors": [asdict(row) for row in errors]}, out / "head_precision.json")
    draw(errors, out / "head_precision.png")
    for suffix in ("json", "png"):
        console.print(f"written: {out / f'head_precision.{suffix}'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)

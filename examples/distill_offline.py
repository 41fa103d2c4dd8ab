"""Distil from stored teacher logits, and see what it costs beside distilling from the teacher itself.

    python examples/distill_offline.py                        # about five minutes on two CPU cores
    python examples/distill_offline.py --k 32 --codec q4      # a smaller store
    python examples/distill_offline.py --device cuda --tokens 8192 --store-tokens 80000 --steps 200

The teacher (SmolLM2-135M-Instruct) reads Python's language reference once, as ``kdkernels cache`` runs it: its most
probable tokens go into a store, some 150 bytes per token instead of 196,608. Then the same student is trained twice, on
the same batches in the same order: offline, from the store alone, in a process that never loads the teacher and decodes
the records inside the loss; and online, with the teacher in memory. The two processes take turns, a step each.

Interrupt it whenever you like: the store goes on from where it was. What it needs is what ``distill_lm.py`` needs, and
nothing is fetched over the network. Files under ``--out``:

    results.json      settings, versions, the store's size, and of both students every loss, the held-out KL, time, memory
    curves.png        training loss and held-out KL of both
    store/            the teacher's logits: try `kdkernels inspect` and `kdkernels verify` on it
    text/, models/    what was read, and what the two processes load
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated

# Read when torch is imported. A waiting thread gives its core away: spinning ones slow a busy machine down several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import smollm2
import typer
from distill_lm import (
    DivergenceName,
    check_device,
    check_loss,
    choose_sequence_length,
    parse_parameters,
    prepare_folder,
)
from offline_job import OfflineJob, OfflineSettings
from offline_results import save, show
from rich.console import Console
from training_step import LossSettings

from kdkernels.caching.errors import CachingError
from kdkernels.cli.choices import Codec

console = Console()


def run(settings: OfflineSettings) -> int:
    """The exit status: 0, 1 where the loss is not finite, 130 where Ctrl-C ended it."""
    start = time.perf_counter()
    job = OfflineJob(settings, console)
    results, failure = job.results, None
    try:
        job.prepare()
        job.train()
    except KeyboardInterrupt:
        results.interrupted = True
    except FloatingPointError as error:
        failure = str(error)
    results.run_seconds = time.perf_counter() - start
    show(results, save(results, settings.out), console)
    console.print(f"{'Interrupted' if results.interrupted else 'Finished'} after {results.run_seconds:.0f} s.")
    if failure is not None:
        console.print(f"error: {failure}", style="red")
    if results.interrupted:
        return 130
    return 1 if failure is not None else 0


def main(
    *,
    divergence: Annotated[DivergenceName, typer.Option(help="Between teacher and student, per token.")] = "forward_kl",
    parameter: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER, of the divergence; repeatable.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the stored teacher and of the student.")] = 1.0,
    k: Annotated[int, typer.Option(min=1, help="Entries kept per token.")] = 64,
    top_p: Annotated[float | None, typer.Option(help="Keep fewer, once their probability reaches this.")] = None,
    codec: Annotated[Codec, typer.Option(help="How log-probabilities are stored.")] = Codec.Q6,
    store_tokens: Annotated[int, typer.Option(min=2, help="Training tokens the teacher reads, at most.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each student.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per step.")] = 512,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, max=8192, help="Default: 128, or --tokens if that is less.")
    ] = None,
    held_out_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to evaluate on, at most.")] = 1024,
    student_layers: Annotated[int, typer.Option(min=1, help="Of the teacher's layers, evenly spread.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Peak, after warm-up.")] = 1.5e-3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Of the losses; default: the best available.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the training text.")] = 0,
    teacher: Annotated[
        Path | None, typer.Option(help="Another teacher of the Llama family, a folder.", show_default="SmolLM2")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/offline"),
) -> None:
    """Cache a teacher's logits, train a student from them and the same one from the teacher, and compare."""
    name = DivergenceName(divergence).value
    for option, value in (("--temperature", temperature), ("--learning-rate", learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise typer.BadParameter(f"must be a positive number, got {value}", param_hint=option)
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {top_p}", param_hint="--top-p")
    check_device(device)
    loss = LossSettings(name, parse_parameters(name, parameter or []), temperature, backend)
    check_loss(loss, device)
    length = choose_sequence_length(tokens, sequence_length)
    if store_tokens < tokens:
        raise typer.BadParameter(f"must be at least --tokens, {tokens}", param_hint="--store-tokens")
    prepare_folder(out)
    settings = OfflineSettings(
        teacher=teacher,
        loss=loss,
        k=k,
        top_p=top_p,
        codec=codec.value,
        store_tokens=store_tokens // length * length,
        steps=steps,
        tokens=tokens,
        sequence_length=length,
        held_out_tokens=held_out_tokens,
        student_layers=student_layers,
        learning_rate=learning_rate,
        device=device,
        seed=seed,
        out=out,
    )
    try:
        status = run(settings)
    except (smollm2.MissingRequirementError, CachingError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    typer.run(main)

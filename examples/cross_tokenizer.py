"""Distil across tokenizers: teacher and student read the same text in different tokens.

    python examples/cross_tokenizer.py                          # six minutes on two CPU cores
    python examples/cross_tokenizer.py --losses alm --steps 20 --student-layers 30 --out out/transfer

The teacher is SmolLM2-135M-Instruct (byte-level BPE, 49,152 tokens). The student is cut from it and given the vocabulary of
Mistral's SentencePiece tokenizer (32,768 pieces), whose embeddings start as means of the teacher's. The text is Python's
language reference. No token of one side need be a token of the other, so no divergence over the vocabulary is defined;
students that start alike learn side by side from

    alm    the probabilities that both models give to the chunks of text which whole tokens of both cover
           (approximate likelihood matching: kd.losses.ALM on kd.alignment), beside the text's own next tokens
    uld    the sorted probabilities of the tokens, paired by position (kd.losses.ULD), beside the next tokens
    ce     the text's own next tokens alone: what the teacher adds is what the others have over this

They are compared in bits per byte of held-out text, which no tokenizer can flatter. Files under ``--out``:

    cross_tokenizer.json    settings, losses, and bits per byte by steps
    cross_tokenizer.png     the same as a picture
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import mistral_vocabulary
import smollm2
import torch
import typer
from distill_lm import prepare_folder
from distillation_job import TEACHER_LAYERS
from results import moving_average, two_panels, write_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from training_step import make_optimizer, make_schedule, student_step
from two_tokenizations import IGNORED, Batch, Passage, Tokenizers, cut_passages, in_batches, predicted, shuffled

import kdkernels as kd

PASSAGE_BYTES = 512
EVALUATIONS = 5  # during training, evenly spread, the last one after the last step
COLORS = {"alm": "tab:blue", "uld": "tab:orange", "ce": "tab:green"}
console = Console()

Heads = tuple[kd.LMHead, kd.LMHead]
"""Of student and teacher, on the hidden states of a batch."""


def next_tokens(heads: Heads, batch: Batch) -> Tensor:
    """Cross-entropy of the text, mean per token."""
    log_probs = kd.token_log_probs(heads[0], predicted(batch.student_labels), ignore_index=IGNORED)
    return -log_probs.sum() / batch.student_tokens


def matched_chunks(heads: Heads, batch: Batch) -> Tensor:
    """ALM and cross-entropy from the same log-probabilities of the student's tokens."""
    alm, chunks = kd.losses.ALM(), batch.chunks
    with torch.no_grad():
        teacher = alm.scores(heads[1], batch.teacher_ids, None, chunks.teacher)
    student = alm.scores(heads[0], batch.student_ids, None, chunks.student)
    distance = alm.from_scores(student, teacher, chunks)
    # Its gradient falls as its temperature grows: this makes it as large as the other's.
    return alm.temperature * distance - student.log_probs.sum() / batch.student_tokens


def sorted_probabilities(heads: Heads, batch: Batch) -> Tensor:
    """ULD, cross-entropy included."""
    return kd.losses.ULD()(*heads, batch.student_labels, batch.teacher_labels)


LOSSES: Mapping[str, Callable[[Heads, Batch], Tensor]] = {
    "alm": matched_chunks,
    "uld": sorted_probabilities,
    "ce": next_tokens,
}


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, batches: Sequence[Batch], side: str) -> float:
    """Of the text in a model's own tokens, each passage on its own."""
    bits, size = 0.0, 0
    for batch in batches:
        hidden = model.model(getattr(batch, f"{side}_ids")).last_hidden_state
        labels = predicted(getattr(batch, f"{side}_labels"))
        bits -= kd.token_log_probs(kd.LMHead(hidden, model.lm_head.weight), labels, ignore_index=IGNORED).sum().item()
        size += batch.bytes
    return bits / math.log(2) / size


@dataclass
class Run:
    """One student. ``held_out``: (steps taken, bits per byte)."""

    loss: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Trainee:
    """A student in training."""

    def __init__(self, name: str, student: torch.nn.Module, steps: int, learning_rate: float) -> None:
        self.run, self.student, self.loss = Run(name), student, LOSSES[name]
        self.optimizer = make_optimizer(student, learning_rate)
        self.schedule = make_schedule(self.optimizer, steps)

    def step(self, batch: Batch, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
        start = time.perf_counter()
        teacher = kd.LMHead(teacher_hidden, teacher_weight)
        loss = student_step(
            self.student,
            self.optimizer,
            batch.student_ids,
            lambda hidden, weight: self.loss((kd.LMHead(hidden, weight), teacher), batch),
        ).item()
        self.schedule.step()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of {self.run.loss} became {loss}; try a smaller --learning-rate")
        self.run.losses.append(loss)
        self.run.seconds.append(time.perf_counter() - start)

    def evaluate(self, held_out: Sequence[Batch]) -> None:
        self.run.held_out.append((len(self.run.losses), bits_per_byte(self.student, held_out, "student")))


def train(
    trainees: Sequence[Trainee],
    teacher: torch.nn.Module,
    passages: Sequence[Passage],
    held_out: Sequence[Batch],
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """All students, in turn on the same batches; the teacher runs once for all of them."""
    batches = shuffled(passages, batch_size, seed)
    evaluate_after = {round(i * steps / EVALUATIONS) for i in range(EVALUATIONS + 1)}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
    ) as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps + 1):
            if step in evaluate_after:
                for trainee in trainees:
                    trainee.evaluate(held_out)
                reached = ", ".join(f"{each.run.loss} {each.run.held_out[-1][1]:.3f}" for each in trainees)
                progress.console.print(f"step {step:>4}: held-out bits per byte: {reached}", highlight=False)
            if step < steps:
                batch = next(batches)
                with torch.no_grad():
                    hidden = teacher.model(batch.teacher_ids).last_hidden_state
                for turn in range(len(trainees)):
                    trainees[(turn + step) % len(trainees)].step(batch, hidden, teacher.lm_head.weight)
                progress.update(bar, advance=1)


def draw(runs: Sequence[Run], teacher_bits: float, file: Path) -> None:
    with two_panels(file, "Training loss (each its own)") as (training, held_out):
        for run in runs:
            steps = range(1, len(run.losses) + 1)
            average = moving_average(run.losses, max(1, len(run.losses) // 20))
            training.plot(steps, average, color=COLORS[run.loss], label=run.loss)
            held_out.plot(*zip(*run.held_out, strict=True), color=COLORS[run.loss], marker="o", label=run.loss)
        held_out.axhline(teacher_bits, color="black", linestyle="--", linewidth=1, label="teacher, its own tokens")
        held_out.set(title="Held-out text", ylabel="bits per byte")
        for axes in (training, held_out):
            axes.legend(frameon=False)


def table(runs: Sequence[Run], teacher_bits: float, held_out_bytes: int) -> Table:
    shown = Table(title=f"Bits per byte of {held_out_bytes:,} bytes of held-out text", title_justify="left")
    shown.add_column("")
    for heading in ("before", f"after {len(runs[0].losses)} steps", "ms per step, student"):
        shown.add_column(heading, justify="right")
    for run in runs:
        bits = [value for _, value in run.held_out]
        milliseconds = sorted(run.seconds)[len(run.seconds) // 2] * 1e3
        shown.add_row(run.loss, f"{bits[0]:.3f}", f"{bits[-1]:.3f}", f"{milliseconds:,.0f}")
    shown.add_row("teacher", f"{teacher_bits:.3f}", "", "")
    return shown


def check_losses(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in LOSSES]
    if unknown or not chosen:
        raise typer.BadParameter(f"takes names out of {', '.join(LOSSES)}; got {names!r}", param_hint="--losses")
    return list(dict.fromkeys(chosen))


def main(
    *,
    losses: Annotated[str, typer.Option(help="Which students to train, by commas.")] = ",".join(LOSSES),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    passages: Annotated[int, typer.Option(min=1, help=f"Per step, of about {PASSAGE_BYTES} bytes.")] = 4,
    held_out_passages: Annotated[int, typer.Option(min=1, help="To evaluate on, at most.")] = 24,
    student_layers: Annotated[
        int, typer.Option(min=1, max=TEACHER_LAYERS, help="Of the teacher's layers, evenly spread.")
    ] = 10,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Peak, after warm-up.")] = 1.5e-3,
    seed: Annotated[int, typer.Option(min=0, help="Order of the training text.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/cross_tokenizer"),
) -> None:
    """Distil SmolLM2-135M into a student with another tokenizer, and compare the losses in bits per byte."""
    names = check_losses(losses)
    prepare_folder(out)
    try:
        with console.status("Loading the models and aligning the text"):
            teacher, teacher_tokenizer = smollm2.load_teacher(torch.device("cpu"))
            tokenizers = Tokenizers(teacher_tokenizer, mistral_vocabulary.MistralTokenizer())
            documents = smollm2.split_documents()
            training, held_out = (
                [tokenizers.passage(text) for text in cut_passages(side.values(), PASSAGE_BYTES)]
                for side in (documents.training, documents.held_out)
            )
            spread = torch.linspace(0, len(held_out) - 1, min(held_out_passages, len(held_out))).round().long()
            held_out_batches = in_batches([held_out[place] for place in spread.tolist()], passages)
            cut = smollm2.cut_student(teacher, smollm2.spread_layers(TEACHER_LAYERS, student_layers))
            spellings = mistral_vocabulary.spellings(tokenizers.student, teacher_tokenizer)
            start = mistral_vocabulary.revocabulate(cut, tokenizers.student, spellings)
    except smollm2.MissingRequirementError as error:
        console.print(f"error: {error}", style="red")
        raise typer.Exit(1) from None
    chunks = sum(len(each.alignment.spans) for each in training)
    tokens = [sum(len(getattr(each, side)) - 1 for each in training) for side in ("teacher", "student")]
    console.print(
        f"teacher: {smollm2.TEACHER_NAME}\n"
        f"student: {student_layers} of its {TEACHER_LAYERS} layers, the vocabulary of {mistral_vocabulary.NAME}\n"
        f"text:    {tokens[0]:,} tokens of the teacher's, {tokens[1]:,} of the student's, {chunks:,} chunks common to both",
        highlight=False,
    )
    with console.status("Running the teacher on the held-out text"):
        teacher_bits = bits_per_byte(teacher, held_out_batches, "teacher")
    trainees = [Trainee(name, copy.deepcopy(start), steps, learning_rate) for name in names]
    failure = None
    try:
        train(trainees, teacher, training, held_out_batches, steps=steps, batch_size=passages, seed=seed)
    except FloatingPointError as error:
        failure = str(error)
    runs = [trainee.run for trainee in trainees]
    held_out_bytes = sum(batch.bytes for batch in held_out_batches)
    settings = {"steps": steps, "passages": passages, "student_layers": student_layers, "learning_rate": learning_rate}
    write_json(
        {
            "settings": {
                **settings,
                "seed": seed,
                "teacher": smollm2.TEACHER_NAME,
                "tokenizer": mistral_vocabulary.NAME,
            },
            "teacher_bits_per_byte": teacher_bits,
            "held_out_bytes": held_out_bytes,
            "runs": [asdict(run) for run in runs],
        },
        out / "cross_tokenizer.json",
    )
    draw(runs, teacher_bits, out / "cross_tokenizer.png")
    if runs[0].seconds:
        console.print(table(runs, teacher_bits, held_out_bytes))
    for suffix in ("json", "png"):
        console.print(f"written: {out / f'cross_tokenizer.{suffix}'}", highlight=False)
    if failure is not None:
        console.print(f"error: {failure}", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

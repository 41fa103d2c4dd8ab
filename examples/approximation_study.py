"""Does a student trained with an approximate head end where the exact one leads? Three seeds each, side by side.

    python examples/approximation_study.py                    # some twenty minutes on two CPU cores
    python examples/approximation_study.py --variant exact --variant bfloat16
    python examples/approximation_study.py --steps 20 --seeds 1 --out out/quick

The job is that of ``distill_lm.py``: SmolLM2-135M teaches a student cut from it, on Python's language reference. The
students of one seed, one for each variant of the loss, take every step together: they share the batch and the teacher's
hidden states, and their times are taken in turn. Held-out text is evaluated in float32 whatever they were trained with. The
variants:

    exact         float32, the exact gradient
    nearest       a gradient tolerance, small entries replaced by their mean
    stochastic    a gradient tolerance, small entries rounded at random without bias
    bfloat16      both heads' logits, and the products of the gradient, in bfloat16

Files under ``--out``:

    approximation_study.json    settings, and of every run the losses, held-out KL, seconds and density of each step
    approximation_study.png     held-out KL by steps, its spread at the end with a line for each seed, the time over
                                training, and with a gradient tolerance the density
"""

from __future__ import annotations

import copy
import enum
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import smollm2
import torch
import typer
from distill_lm import prepare_folder
from distillation_job import TEACHER_LAYERS, pick_evenly, shuffled_batches
from evaluation import HeldOut
from results import moving_average, row_of_axes, write_json
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from training_step import LossSettings, fused_loss, make_optimizer, make_schedule, student_step

import kdkernels as kd

EVALUATIONS = 5  # during training, evenly spread, the last one after the last step
SEQUENCE_LENGTH = 128
STUDENT_LAYERS = 10
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
console = Console()


class Variant(str, enum.Enum):
    exact = "exact"
    nearest = "nearest"
    stochastic = "stochastic"
    bfloat16 = "bfloat16"

    def loss(self, tolerance: float) -> LossSettings:
        if self is Variant.exact:
            return LossSettings()
        if self is Variant.bfloat16:
            return LossSettings(head_dtype="bfloat16")
        return LossSettings(gradient_tolerance=tolerance, gradient_rounding=self.value)


DEFAULT_VARIANTS = (Variant.exact, Variant.nearest, Variant.stochastic)


@dataclass
class Run:
    """One student. ``held_out``: (steps taken, KL to the teacher in nats per token)."""

    variant: str
    seed: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def final_kl(self) -> float:
        return self.held_out[-1][1]


class Trainee:
    """A student in training."""

    def __init__(
        self, run: Run, loss: LossSettings, student: torch.nn.Module, steps: int, learning_rate: float
    ) -> None:
        self.run, self.student, self.loss = run, student, fused_loss(loss)
        self.optimizer = make_optimizer(student, learning_rate)
        self.schedule = make_schedule(self.optimizer, steps)

    def step(self, token_ids: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
        start = time.perf_counter()
        with kd.GradientReport() as report:
            loss = student_step(
                self.student,
                self.optimizer,
                token_ids,
                lambda hidden, weight: self.loss(hidden, weight, teacher_hidden, teacher_weight),
            )
        self.schedule.step()
        self.run.losses.append(loss.item())
        self.run.seconds.append(time.perf_counter() - start)
        self.run.densities.append(float(report.density.mean()) if len(report.density) else 1.0)

    def evaluate(self, held_out: HeldOut) -> None:
        self.run.held_out.append((len(self.run.losses), held_out.measure(self.student).kl))


def train_seed(
    seed: int,
    losses: Mapping[str, LossSettings],
    teacher: torch.nn.Module,
    training: Tensor,
    held_out: HeldOut,
    *,
    steps: int,
    sequences: int,
    learning_rate: float,
    progress: Progress,
) -> list[Run]:
    """A student for each variant, all from the same start and on the same batches."""
    start = smollm2.cut_student(teacher, smollm2.spread_layers(TEACHER_LAYERS, STUDENT_LAYERS))
    trainees = [
        Trainee(Run(name, seed), loss, copy.deepcopy(start), steps, learning_rate) for name, loss in losses.items()
    ]
    torch.manual_seed(seed)  # of stochastic rounding
    batches = shuffled_batches(training, sequences, seed)
    evaluate_after = {round(i * steps / EVALUATIONS) for i in range(EVALUATIONS + 1)}
    bar = progress.add_task(f"seed {seed}", total=steps)
    for step in range(steps + 1):
        if step in evaluate_after:
            for trainee in trainees:
                trainee.evaluate(held_out)
        if step < steps:
            token_ids = next(batches)
            with torch.no_grad():
                hidden = teacher.model(token_ids).last_hidden_state
            for turn in range(len(trainees)):
                trainees[(turn + step) % len(trainees)].step(token_ids, hidden, teacher.lm_head.weight)
            progress.update(bar, advance=1)
    return [trainee.run for trainee in trainees]


def of_variant(runs: list[Run], variant: str) -> list[Run]:
    return [run for run in runs if run.variant == variant]


def final_kls(runs: list[Run], variant: str) -> list[float]:
    """Seed by seed."""
    return [run.final_kl for run in of_variant(runs, variant)]


def mean_by_step(series: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def draw(runs: list[Run], names: list[str], file: Path) -> None:
    listed = any(min(run.densities) < 1 for run in runs)
    with row_of_axes(file, 4 if listed else 3, width=5, height=4) as (curves, spread, seconds, *optional):
        curves.set(
            title="KL(teacher || student) on held-out text", xlabel="step", ylabel="nats per token", yscale="log"
        )
        spread.set(title="The same at the end, every seed", ylabel="nats per token")
        seconds.set(title="Student's part of a step", xlabel="step", ylabel="seconds")
        for position, (name, color) in enumerate(zip(names, COLORS, strict=False)):
            mine = of_variant(runs, name)
            for number, run in enumerate(mine):
                label = name if number == 0 else None
                curves.plot(*zip(*run.held_out, strict=True), color=color, marker="o", markersize=3, label=label)
            finals = final_kls(runs, name)
            spread.plot([position] * len(finals), finals, "o", color=color)
            spread.hlines(statistics.fmean(finals), position - 0.2, position + 0.2, color=color)
            steps = range(1, len(mine[0].losses) + 1)
            average = moving_average(mean_by_step([run.seconds for run in mine]), 5)
            seconds.plot(steps, average, color=color, label=name)
            for density in optional:
                density.plot(steps, mean_by_step([run.densities for run in mine]), color=color, label=name)
        for finals in zip(*(final_kls(runs, name) for name in names), strict=True):
            spread.plot(range(len(names)), finals, color="gray", linewidth=0.8, zorder=0)
        spread.set_xticks(range(len(names)), names)
        seconds.set_ylim(bottom=0)
        for density in optional:
            density.set(title="Entries kept of the logit gradient", xlabel="step", yscale="log", ylabel="share")
        for axes in (curves, seconds, *optional):
            axes.legend(frameon=False)
        for axes in (curves, spread, seconds, *optional):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)


def summary(runs: list[Run], names: list[str]) -> Table:
    table = Table(title=f"After {len(runs[0].losses)} steps", title_justify="left")
    table.add_column("")
    base = names[0]
    headings = ("held-out KL, mean", "smallest to largest", f"minus {base}'s, by seed")
    for heading in (*headings, "entries kept", "seconds per step", f"of {base}"):
        table.add_column(heading, justify="right")
    for name in names:
        mine = of_variant(runs, name)
        finals = final_kls(runs, name)
        differences = [found - other for found, other in zip(finals, final_kls(runs, base), strict=True)]
        late = slice(len(mine[0].losses) // 2, None)  # the second half, when the student resembles its teacher
        ratios = [
            a / b
            for run, other in zip(mine, of_variant(runs, base), strict=True)
            for a, b in zip(run.seconds, other.seconds, strict=True)
        ]
        table.add_row(
            name,
            f"{statistics.fmean(finals):.3f}",
            f"{min(finals):.3f} to {max(finals):.3f}",
            ", ".join(f"{difference:+.3f}" for difference in differences),
            f"{statistics.fmean(value for run in mine for value in run.densities[late]):.1%}",
            f"{statistics.median(value for run in mine for value in run.seconds[late]):.2f}",
            f"{statistics.median(ratios):.2f}",
        )
    return table


def main(
    *,
    variant: Annotated[
        list[Variant] | None, typer.Option(help="Repeatable, the first is compared with; default: all but bfloat16.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, max=0.5, help="Of nearest and stochastic.")] = 1e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with the text in another order.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 80,
    tokens: Annotated[int, typer.Option(min=SEQUENCE_LENGTH, help="Tokens per step.")] = 512,
    held_out_tokens: Annotated[int, typer.Option(min=SEQUENCE_LENGTH, help="To evaluate on, at most.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak, after warm-up.")] = 1.5e-3,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/approximation"),
) -> None:
    """Train with the exact and with approximate heads, and compare where the students end."""
    prepare_folder(out)
    with console.status("Loading the teacher and tokenising the text"):
        teacher, tokenizer = smollm2.load_teacher(torch.device("cpu"))
        text = smollm2.load_text(tokenizer, SEQUENCE_LENGTH)
        held_out = HeldOut.of(teacher, pick_evenly(text.held_out, held_out_tokens // SEQUENCE_LENGTH))
    losses = {chosen.value: chosen.loss(tolerance) for chosen in variant or DEFAULT_VARIANTS}
    settings = {
        "tolerance": tolerance,
        "seeds": seeds,
        "steps": steps,
        "tokens": tokens,
        "learning_rate": learning_rate,
    }
    runs: list[Run] = []
    with Progress(console=console) as progress:
        for seed in range(seeds):
            runs += train_seed(
                seed,
                losses,
                teacher,
                text.training,
                held_out,
                steps=steps,
                sequences=tokens // SEQUENCE_LENGTH,
                learning_rate=learning_rate,
                progress=progress,
            )
            # After every seed: a study that is cut short keeps those it finished.
            write_json({"settings": settings, "runs": [asdict(run) for run in runs]}, out / "approximation_study.json")
    names = list(losses)
    draw(runs, names, out / "approximation_study.png")
    console.print(summary(runs, names))
    for suffix in ("json", "png"):
        console.print(f"written: {out / f'approximation_study.{suffix}'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)

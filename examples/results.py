"""What a run leaves behind: ``results.json``, ``loss_curve.png``, and the tables on the screen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation import Quality
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_SHARE = 0.05  # of the steps, averaged for the thick line of the training loss
MEBIBYTE = 2**20


@dataclass
class Results:
    """Filled as the run goes, so that an interrupted run keeps what it reached. Losses are in nats per token."""

    config: Mapping[str, object]
    versions: Mapping[str, str]
    machine: Mapping[str, object]
    text: Mapping[str, object]
    interrupted: bool = False
    losses: list[float] = field(default_factory=list)  # of each step, before its update
    step_seconds: list[float] = field(default_factory=list)
    teacher_perplexity: float | None = None
    held_out: list[tuple[int, Quality]] = field(default_factory=list)  # (steps taken, quality), the first before step 1
    agreement: Mapping[str, object] | None = None
    time: dict[str, Mapping[str, object]] = field(default_factory=dict)  # by part: head, step
    peak_memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # bytes, by part
    run_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return len(self.losses) * int(self.config["tokens"]) / sum(self.step_seconds) if self.step_seconds else None

    def as_dict(self) -> dict[str, object]:
        qualities = [{"steps": steps, **asdict(quality)} for steps, quality in self.held_out]
        return {
            "config": self.config,
            "versions": self.versions,
            "machine": self.machine,
            "text": self.text,
            "interrupted": self.interrupted,
            "training": {
                "steps": len(self.losses),
                "losses": self.losses,
                "step_seconds": self.step_seconds,
                "tokens_per_second": self.tokens_per_second,
            },
            "held_out": {
                "teacher_perplexity": self.teacher_perplexity,
                "before": qualities[0] if qualities else None,
                "after": qualities[-1] if len(qualities) > 1 else None,
                "history": qualities,
            },
            "fused_against_plain": {
                "agreement": self.agreement,
                "time": self.time,
                "peak_memory": self.peak_memory,
            },
            "run_seconds": self.run_seconds,
        }


def save(results: Results, folder: Path) -> list[Path]:
    """Write the files (the curve only if there is one to draw) and return their paths."""
    written = [folder / "results.json"]
    write_json(results.as_dict(), written[0])
    if results.losses:
        written.append(folder / "loss_curve.png")
        draw_curves(results, written[-1])
    return written


def write_json(values: Mapping[str, object], file: Path) -> None:
    partial = file.with_suffix(".json.partial")  # a reader never finds half a file
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, file)


def moving_average(values: list[float], width: int) -> list[float]:
    """Over ``width`` values around each, fewer at the ends."""
    windows = (values[max(0, i - width // 2) : i + (width + 1) // 2] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


@contextmanager
def row_of_axes(file: Path, count: int, *, width: float, height: float) -> Iterator[list[Axes]]:
    """A picture of ``count`` axes beside each other, each so many inches wide and high, which the block fills."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(1, count, squeeze=False)[0])
    figure.savefig(file)


@contextmanager
def two_panels(file: Path, training_title: str) -> Iterator[tuple[Axes, Axes]]:
    """A picture with axes for the training loss and for the KL on held-out text, which the block fills."""
    from matplotlib.ticker import MaxNLocator

    with row_of_axes(file, 2, width=5, height=4) as (training, held_out):
        training.set_title(training_title)
        training.set_ylabel("mean per token")
        held_out.set_title("KL(teacher || student) on held-out text")
        held_out.set_ylabel("nats per token")
        yield training, held_out
        for axes in (training, held_out):
            axes.set_xlabel("step")
            axes.margins(x=0.08, y=0.12)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)


def draw_curves(results: Results, file: Path) -> None:
    with two_panels(file, f"Training loss ({results.config['divergence_description']})") as (training, held_out):
        steps = range(1, len(results.losses) + 1)
        width = max(1, round(SMOOTHING_SHARE * len(results.losses)))
        training.plot(steps, results.losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
        if width > 1:
            average = moving_average(results.losses, width)
            training.plot(steps, average, color="tab:blue", linewidth=2, label=f"mean of {width} steps")
            training.legend(frameon=False)

        evaluated, qualities = zip(*results.held_out, strict=True)
        values = [quality.kl for quality in qualities]
        held_out.plot(evaluated, values, color="tab:orange", marker="o", linewidth=2)
        for i in {0, len(values) - 1}:
            held_out.annotate(
                f"{values[i]:.2f}", (evaluated[i], values[i]), (0, 8), textcoords="offset points", ha="center"
            )


def show(results: Results, files: Iterable[Path], console: Console) -> None:
    """The tables and, in plain words, what they say."""
    if results.held_out:
        console.print(quality_table(results))
    if results.time or results.peak_memory:
        console.print(cost_table(results))
    if results.agreement is not None:
        console.print(agreement_table(results))
    for file in files:
        console.print(f"written: {file}", highlight=False)


def quality_table(results: Results) -> Table:
    tokens = results.text["held_out_tokens"]
    table = Table(title=f"Student on {tokens:,} tokens of held-out text (KL in nats per token)", title_justify="left")
    table.add_column("")
    for heading in ("before training", f"after {len(results.losses)} steps", "teacher"):
        table.add_column(heading, justify="right")
    before, after = results.held_out[0][1], results.held_out[-1][1]
    trained = len(results.held_out) > 1
    table.add_row("KL(teacher || student)", f"{before.kl:.3f}", f"{after.kl:.3f}" if trained else "-", "0")
    table.add_row(
        "perplexity",
        f"{before.perplexity:,.1f}",
        f"{after.perplexity:,.1f}" if trained else "-",
        f"{results.teacher_perplexity:,.1f}",
    )
    return table


def cost_table(results: Results) -> Table:
    tokens = results.config["tokens"]
    title = f"Cost of a step of {tokens:,} tokens (memory: above what was in use before)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("fused", "plain PyTorch", "fused / plain"):
        table.add_column(heading, justify="right")
    parts = {"head": "loss + gradients", "step": "whole step"}
    for part, name in parts.items():
        if part in results.time:
            time = results.time[part]
            table.add_row(
                f"time, {name}",
                f"{time['fused_seconds'] * 1e3:,.0f} ms",
                f"{time['plain_seconds'] * 1e3:,.0f} ms",
                f"{time['fused_over_plain']:.2f}",
            )
    for part, name in parts.items():
        if part in results.peak_memory:
            fused, plain = (results.peak_memory[part][f"{form}_bytes"] for form in ("fused", "plain"))
            table.add_row(
                f"peak memory, {name}",
                f"{fused / MEBIBYTE:,.0f} MiB",
                f"{plain / MEBIBYTE:,.0f} MiB",
                f"{fused / plain:.2f}" if plain else "-",  # a small step may find all it needs in use
            )
    return table


def agreement_table(results: Results) -> Table:
    agreement = results.agreement
    verdict = "fused and plain PyTorch agree" if agreement["agree"] else "[red]fused and plain PyTorch DISAGREE[/red]"
    title = f"Same loss: {verdict} (relative error against float64)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    forms = {"fused": "fused", "plain": "plain PyTorch"}
    for heading in forms.values():
        table.add_column(heading, justify="right")
    rows = {
        "loss": f"loss ({agreement['float64_loss']:.4f})",
        "hidden_gradient": "gradient to hidden states",
        "weight_gradient": "gradient to head weight",
    }
    for key, name in rows.items():
        table.add_row(name, *(f"{agreement[form]['relative_errors'][key]:.1e}" for form in forms))
    return table

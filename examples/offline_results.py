"""What the offline example leaves behind: ``results.json``, ``curves.png``, and the table on the screen."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from evaluation import Quality
from results import MEBIBYTE, SMOOTHING_SHARE, moving_average, two_panels, write_json
from rich.console import Console
from rich.table import Table

COLOURS = {"offline": "tab:blue", "online": "tab:orange"}
OUTCOMES = {
    "offline": "over the stored tokens and the rest",
    "online": "over the vocabulary",
}  # the first is never more
LINES = {"offline": "-", "online": "--"}  # where the curves lie on one another, both are seen


@dataclass
class Training:
    """One student. Losses are in nats per token."""

    losses: list[float] = field(default_factory=list)  # of each step, before its update
    step_seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, Quality]] = field(default_factory=list)  # (steps taken, quality), the first before step 1
    peak_bytes: int = 0  # of the whole process while it trains; on a GPU, of its memory

    def as_dict(self) -> dict[str, object]:
        history = [{"steps": steps, **asdict(quality)} for steps, quality in self.held_out]
        return {**asdict(self), "held_out": history}


@dataclass
class OfflineResults:
    """Filled as the run goes, so that an interrupted run keeps what it reached."""

    config: Mapping[str, object]
    versions: Mapping[str, str]
    machine: Mapping[str, object]
    interrupted: bool = False
    layers: Mapping[str, object] = field(default_factory=dict)
    store: Mapping[str, float] = field(default_factory=dict)
    cache_seconds: float | None = None  # of this run, which may have found some of it done
    held_out_tokens: int = 0
    teacher_perplexity: float | None = None
    training: dict[str, Training] = field(default_factory=lambda: {form: Training() for form in COLOURS})
    run_seconds: float = 0.0

    @property
    def pairs(self) -> int:
        """Steps that both students have taken."""
        return min(len(training.losses) for training in self.training.values())

    @property
    def step_ratio(self) -> float:
        """The time of a step offline in that of the same step online, the median."""
        offline, online = (self.training[form].step_seconds[: self.pairs] for form in ("offline", "online"))
        return statistics.median(one / other for one, other in zip(offline, online, strict=True))

    def as_dict(self) -> dict[str, object]:
        values = dict(vars(self))
        values["training"] = {form: training.as_dict() for form, training in self.training.items()}
        if self.pairs:
            values["step_seconds_offline_over_online"] = self.step_ratio
        return values


def save(results: OfflineResults, folder: Path) -> list[Path]:
    """Write the files (curves only if there are any) and return their paths."""
    written = [folder / "results.json"]
    write_json(results.as_dict(), written[0])
    if results.pairs:
        written.append(folder / "curves.png")
        draw_curves(results, written[-1])
    return written


def draw_curves(results: OfflineResults, file: Path) -> None:
    with two_panels(file, f"Training loss ({results.config['divergence_description']})") as (losses, held_out):
        for form, training in results.training.items():
            style = {"color": COLOURS[form], "linestyle": LINES[form], "linewidth": 2}
            width = max(1, round(SMOOTHING_SHARE * len(training.losses)))
            average = moving_average(training.losses, width)
            losses.plot(range(1, len(average) + 1), average, label=f"{form}, {OUTCOMES[form]}", **style)
            evaluated, qualities = zip(*training.held_out, strict=True)
            values = [quality.kl for quality in qualities]
            held_out.plot(evaluated, values, marker="o", label=f"{form}: {values[-1]:.3f} at the end", **style)
        for axes in (losses, held_out):
            axes.legend(frameon=False)


def show(results: OfflineResults, files: Iterable[Path], console: Console) -> None:
    if results.store:
        console.print(store_table(results))
    if results.pairs:
        console.print(training_table(results))
    for file in files:
        console.print(f"written: {file}", highlight=False)


def store_table(results: OfflineResults) -> Table:
    store = results.store
    table = Table(title=f"The store: {store['tokens']:,} tokens", title_justify="left")
    for heading in ("", "store", "full logits, fp32"):
        table.add_column(heading, justify="right" if heading else "left")
    dense = store["dense_bytes_per_token"]
    table.add_row("bytes per token, all files", f"{store['bytes_per_token']:.1f}", f"{dense:,.0f}")
    table.add_row(
        "size", *(f"{size * store['tokens'] / MEBIBYTE:,.1f} MiB" for size in (store["bytes_per_token"], dense))
    )
    table.add_row("entries per token", f"{store['mean_entries']:.1f}", f"{dense / 4:,.0f}")
    table.add_row("probability kept", f"{store['mean_kept_mass']:.4f}", "1")
    return table


def training_table(results: OfflineResults) -> Table:
    offline, online = (results.training[form] for form in ("offline", "online"))
    title = (
        f"The same student, {results.pairs} steps of {results.config['tokens']:,} tokens: offline from the store, online "
        f"from the teacher (KL in nats per token)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("offline", "online", "offline / online"):
        table.add_column(heading, justify="right")
    before, after = ([run.held_out[place][1] for run in (offline, online)] for place in (0, -1))
    table.add_row("held-out KL before", *(f"{quality.kl:.4f}" for quality in before))
    ratio = f"{after[0].kl / after[1].kl:.3f}"
    table.add_row("held-out KL after", *(f"{quality.kl:.4f}" for quality in after), ratio)
    teacher = f"teacher: {results.teacher_perplexity:,.1f}"
    table.add_row("perplexity after", *(f"{quality.perplexity:,.1f}" for quality in after), teacher)
    times = [statistics.median(run.step_seconds) for run in (offline, online)]
    table.add_row("step, median", *(f"{time * 1e3:,.0f} ms" for time in times), f"{results.step_ratio:.2f}")
    if all(run.peak_bytes for run in (offline, online)):
        peaks = offline.peak_bytes, online.peak_bytes
        cells = (f"{peak / MEBIBYTE:,.0f} MiB" for peak in peaks)
        table.add_row("peak memory", *cells, f"{peaks[0] / peaks[1]:.2f}")
    return table

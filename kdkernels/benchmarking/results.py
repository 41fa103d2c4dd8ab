"""What was measured: rows of a table, for the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

__all__ = ["Result", "format_bytes", "format_ratio", "format_seconds", "markdown", "table", "write_csv"]


@dataclass(frozen=True)
class Result:
    """One contender on one workload; None where nothing was measured, and then ``note`` says why."""

    workload: str
    contender: str
    seconds: float | None = None
    """Median over the rounds, per call."""
    ratio: float | None = None
    """The time in that of the first contender, median over the rounds."""
    rounds: int = 0
    peak_bytes: int | None = None
    """Rise of the peak of memory, with the gradients that are returned."""
    gradient_bytes: int | None = None
    """The part of it that any contender must return."""
    note: str = ""
    columns: Mapping[str, str | int] = field(default_factory=dict)
    """The parameters of the workload."""


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def format_bytes(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def format_ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


HEADINGS = ("contender", "time", "× the first", "rounds", "peak extra memory", "of it gradients", "note")


def cells(result: Result) -> tuple[str, ...]:
    return (
        result.contender,
        format_seconds(result.seconds),
        format_ratio(result.ratio),
        str(result.rounds) if result.rounds else "–",
        format_bytes(result.peak_bytes),
        format_bytes(result.gradient_bytes if result.peak_bytes is not None else None),
        result.note,
    )


def shown_columns(results: Sequence[Result]) -> list[int]:
    """The columns that say something."""
    rows = [cells(result) for result in results]
    return [place for place in range(len(HEADINGS)) if any(row[place] not in {"", "–"} for row in rows)]


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.workload, []).append(result)
    return groups


def table(results: Sequence[Result]) -> Table:
    """The results of one workload."""
    shown = shown_columns(results)
    found = Table()
    for place in shown:
        found.add_column(HEADINGS[place], justify="right" if 0 < place < 6 else "left", no_wrap=place < 6)
    for result in results:
        row = cells(result)
        found.add_row(*(row[place] for place in shown))
    return found


def markdown(results: Iterable[Result]) -> str:
    """One table per workload."""
    parts = []
    for workload, group in grouped(results).items():
        shown = shown_columns(group)
        lines = [f"**{workload}**", "", "| " + " | ".join(HEADINGS[place] for place in shown) + " |"]
        lines.append("|" + "|".join("--:" if 0 < place < 6 else ":--" for place in shown) + "|")
        for result in group:
            row = cells(result)
            lines.append("| " + " | ".join(row[place] for place in shown) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, results: Sequence[Result], machine: str) -> None:
    """One line per result: the workload's parameters, what was measured (seconds, bytes), and on what."""
    parameters = list(dict.fromkeys(name for result in results for name in result.columns))
    measured = ("contender", "seconds", "ratio", "rounds", "peak_bytes", "gradient_bytes", "note")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*parameters, *measured, "machine"])
        for result in results:
            values = (getattr(result, name) for name in measured)
            writer.writerow(
                [
                    *(result.columns.get(name, "") for name in parameters),
                    *("" if value is None else value for value in values),
                    machine,
                ]
            )

"""Measures contenders in turn within one test, and gathers what all tests found."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from kdkernels import environment
from kdkernels.benchmarking import figures
from kdkernels.benchmarking.results import Result, markdown, write_csv
from kdkernels.benchmarking.timing import median_ratio, time_call

__all__ = ["Report", "SideBySide", "Target"]

DEVICE = "cpu"


@dataclass(frozen=True)
class Target:
    """A number the project wants to keep to, and what was measured."""

    what: str
    measured: float
    bound: float
    at_least: bool = False
    unit: str = "×"

    @property
    def line(self) -> str:
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        asked = f"{'at least' if self.at_least else 'at most'} {self.bound:g}{self.unit}"
        return f"| {self.what} | {self.measured:.3g}{self.unit} | {asked} | {'yes' if met else '**no**'} |"


class SideBySide:
    """The contenders of one test. pytest-benchmark times the first one; between its rounds the others have their turn."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark
        self.samples: dict[str, list[float]] = {}
        self.results: list[Result] = []
        self.targets: list[Target] = []

    def measure(
        self,
        title: str,
        calls: Mapping[str, Callable[[], object]],
        *,
        rounds: int,
        repeats: int = 1,
        columns: Mapping[str, str | int] | None = None,
        peaks: Mapping[str, int] | None = None,
        gradient_bytes: int | None = None,
    ) -> None:
        """Times all contenders ``rounds`` times, ``repeats`` calls at a time, after one call off the record."""
        first, *others = calls
        self.samples = {name: [] for name in calls}
        orders = itertools.cycle(others[place:] + others[:place] for place in range(max(1, len(others))))
        for call in calls.values():
            call()

        def let_others_play() -> None:
            for name in next(orders):
                self.samples[name].append(time_call(calls[name], DEVICE, repeats))

        def play() -> None:
            for _ in range(repeats):
                calls[first]()

        self.benchmark.pedantic(play, setup=let_others_play, rounds=rounds)  # type: ignore[no-untyped-call]
        if self.benchmark.stats is None:  # --benchmark-disable
            self.samples = {}
            return
        self.samples[first] = [seconds / repeats for seconds in self.benchmark.stats.stats.data]
        peaks = peaks or {}
        for name, seconds in self.samples.items():
            self.benchmark.extra_info[name] = statistics.median(seconds)
            self.results.append(
                Result(
                    title,
                    name,
                    statistics.median(seconds),
                    median_ratio(seconds, self.samples[first]),
                    len(seconds),
                    peaks.get(name),
                    gradient_bytes,
                    columns=columns or {},
                )
            )

    def time(self, what: str, name: str, bound: float) -> None:
        """A target for the time of one contender, in µs."""
        if self.samples:
            measured = statistics.median(self.samples[name]) * 1e6
            self.targets.append(Target(what, measured, bound, unit=" µs"))

    def ratio(self, what: str, name: str, base: str, bound: float, *, at_least: bool = False) -> None:
        """A target for one contender's time in another's."""
        if self.samples:
            measured = median_ratio(self.samples[name], self.samples[base])
            self.targets.append(Target(what, measured, bound, at_least))


class Report:
    """What all tests of a session found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[Result]] = {}
        self.targets: list[Target] = []

    @property
    def empty(self) -> bool:
        return not any(self.results.values())

    def add(self, module: str, measurement: SideBySide) -> None:
        self.results.setdefault(module, []).extend(measurement.results)
        self.targets += measurement.targets

    def text(self, command: str) -> str:
        """Markdown: what was run, on what, the tables, the targets."""
        parts = [f"`{command}`", environment.machine(DEVICE), markdown(itertools.chain(*self.results.values()))]
        if self.targets:
            lines = [
                "| target | measured | asked | met |",
                "|:--|--:|--:|:--|",
                *(target.line for target in self.targets),
            ]
            parts.append("\n".join(lines) + "\n")
        return "\n\n".join(parts)

    def write(self, command: str) -> list[Path]:
        """``report.md``, and per module a CSV and, with matplotlib, a PNG."""
        self.folder.mkdir(parents=True, exist_ok=True)
        written = [self.folder / "report.md"]
        written[0].write_text(self.text(command), encoding="utf-8")
        machine = environment.machine(DEVICE)
        for module, results in self.results.items():
            if not results:
                continue
            path = self.folder / f"{module}.csv"
            write_csv(path, results, machine)
            written.append(path)
            try:
                figures.draw(path.with_suffix(".png"), results, machine)
                written.append(path.with_suffix(".png"))
            except ImportError:
                print(f"no {path.stem}.png: {figures.MISSING}")
        return written

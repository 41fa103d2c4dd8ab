"""``pytest benchmarks`` measures and leaves CSV, PNG and ``report.md`` in ``out/benchmarks``. None of it is a test."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from reporting import Report, SideBySide

REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[REPORT] = Report(config.rootpath / "out" / "benchmarks")


@pytest.fixture
def side_by_side(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[SideBySide]:
    measurement = SideBySide(benchmark)
    yield measurement
    request.config.stash[REPORT].add(request.path.stem, measurement)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if report.empty:
        return
    command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
    terminalreporter.section("side by side")
    terminalreporter.write_line(report.text(command))
    terminalreporter.write_line(f"written: {', '.join(map(str, report.write(command)))}")

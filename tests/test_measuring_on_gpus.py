"""How ``bench`` and ``validate-gpu`` measure on a GPU, as far as that shows without one: the GPU here is made up."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels.backends import NAMES
from kdkernels.benchmarking import contenders, memory, timing
from kdkernels.benchmarking.contenders import CONTENDERS, OURS
from kdkernels.benchmarking.workloads import Operation, Workload
from kdkernels.cli import app, validate_gpu
from kdkernels.cli import bench as bench_command
from kdkernels.cli.validate_gpu import Stage

needs_native = pytest.mark.skipif(not kd.backends()["cpu"].available, reason=kd.backends()["cpu"].reason)
OTHERS = (Operation.STORED, Operation.TOPK, Operation.SINKHORN, Operation.PAIRS)

# --- time and memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a GPU is told, in turn; a call takes 3 ms on it."""
    told: list[str] = []

    class Event:
        count = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.name = ("start", "end")[Event.count % 2]
            Event.count += 1

        def record(self) -> None:
            told.append(self.name)

        def synchronize(self) -> None:
            told.append(f"wait for {self.name}")

        def elapsed_time(self, end: Event) -> float:
            assert (self.name, end.name) == ("start", "end")
            return 3.0 * told.count("call")

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        told.append(f"on {name}")
        yield

    def empty(size: int, *, dtype: torch.dtype, device: str) -> Any:
        return SimpleNamespace(zero_=lambda: told.append(f"fill {size} on {device}"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(timing.torch, "empty", empty)
    timing.cache_filler.cache_clear()
    yield told
    timing.cache_filler.cache_clear()


def test_a_gpu_keeps_the_time_itself_with_an_empty_cache(events: list[str]) -> None:
    seconds = timing.time_call(lambda: events.append("call"), "cuda:1", repeats=2)
    assert seconds == pytest.approx(3e-3)
    filled = f"fill {100 << 20} on cuda:1"
    assert events == ["on cuda:1", filled, "start", "call", "call", "end", "wait for end"]


def test_memory_is_that_of_the_very_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    allocated = 100

    def answer(name: str) -> Any:
        def function(device: Any) -> int:
            asked.append((name, device))
            return {"memory_allocated": allocated, "max_memory_allocated": 170}.get(name, 0)

        return function

    names = ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, answer(name))
    assert memory.peak_of_call(lambda: asked.append(("call", "cuda:1")), "cuda:1") == 70
    assert {device for _, device in asked} == {"cuda:1"}
    assert [name for name, _ in asked] == [*names[:3], "call", names[0], names[3]]


@pytest.mark.slow
def test_other_processes_get_the_memory_that_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("given back"))

    def peak(workload: Workload, name: str) -> int:
        order.append(f"memory of {name}")
        return 1

    monkeypatch.setattr(bench_command, "peak_extra_bytes", peak)

    def broken(workload: Workload, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    short = contenders.Contender("short of memory", broken)
    workload = Workload(Operation.FORWARD, kd.ForwardKL(), 2, 9, 0, 0)
    results = bench_command.measure(workload, [CONTENDERS[OURS], short], 0.0, True, lambda done, what: None)
    assert order == ["given back", "given back", f"memory of {OURS}"]
    assert results[0].peak_bytes == 1
    assert results[1].note == "OutOfMemoryError: CUDA out of memory"


# --- contenders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OTHERS, ids=lambda one: one.value)
def test_plain_pytorch_computes_the_same(operation: Operation, dtype: torch.dtype) -> None:
    workload = Workload(operation, kd.JSD(0.3), 6, 150, 0, 0, dtype)
    inputs = workload.inputs()
    answers = {name: CONTENDERS[name].prepare(workload, inputs)() for name in (OURS, f"{OURS} (reference)", "eager")}
    for answer in answers.values():
        assert len(answer) == 1 + operation.differentiates
        for ours, theirs in zip(answers[OURS], answer, strict=True):
            assert ours.shape == theirs.shape
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    if operation.differentiates:
        assert workload.gradient_bytes == answers[OURS][1].nbytes


@pytest.mark.parametrize("vocab", [1, 2])
@pytest.mark.parametrize("operation", OTHERS, ids=lambda one: one.value)
def test_the_smallest_workloads(operation: Operation, vocab: int) -> None:
    workload = Workload(operation, kd.ForwardKL(), 1, vocab, 0, 0)
    assert math.isfinite(float(CONTENDERS[OURS].prepare(workload, workload.inputs())()[0]))


@pytest.mark.parametrize("operation", Operation, ids=lambda one: one.value)
def test_workloads_describe_themselves(operation: Operation) -> None:
    workload = Workload(operation, kd.ForwardKL(), 256, 1000, 8, 8)
    assert workload.title.startswith(operation.label)
    assert workload.columns["operation"] == operation.value
    assert bool(workload.columns["divergence"]) == operation.is_divergence
    assert math.isfinite(float(CONTENDERS[OURS].prepare(workload, workload.inputs())()[0]))


@needs_native
@pytest.mark.slow
def test_backends_side_by_side(tmp_path: Path) -> None:
    arguments = ["bench", "--tokens", "4", "--vocab", "70", "--seconds", "0", "--no-memory", "--contender", "eager"]
    arguments += ["--operation", "stored", "--operation", "topk", "--operation", "sinkhorn", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--backend", "cpu", "--backend", "reference"])
    assert result.exit_code == 0, result.output
    with (tmp_path / "bench.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [f"{OURS} (cpu)", f"{OURS} (reference)", "eager"]
    assert [row["contender"] for row in rows] == names * 3
    assert [row["operation"] for row in rows[::3]] == ["stored", "topk", "sinkhorn"]
    assert all(float(row["ratio"]) == 1 for row in rows[::3])
    assert all(float(row["seconds"]) > 0 for row in rows)


@pytest.mark.slow
def test_a_backend_that_cannot_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f"{OURS} ({name})" for name in NAMES} <= set(CONTENDERS)
    arguments = ["bench", "--tokens", "2", "--vocab", "9", "--seconds", "0", "--no-memory", "--operation", "topk"]
    arguments += ["--contender", "eager", "--out", str(tmp_path), "--backend"]
    monkeypatch.setattr(contenders, "serves", lambda name, family: (False, f"{name} has no {family}"))
    result = CliRunner().invoke(app, [*arguments, "reference"])
    assert result.exit_code == 1
    assert "not measured: kdkernels (reference), reference has no topk" in result.output
    result = CliRunner().invoke(app, [*arguments, "fpga"])
    assert result.exit_code == 2
    assert "--backend 'fpga': must be one of 'reference', 'cpu', 'triton'" in result.output


# --- all of it ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_runs_and_is_packed(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.csv").write_text("a table", encoding="utf-8")
    wanted = [Stage(("check", "--device", "tpu"), "check.json"), Stage(("tune", "--show", "--json"), "tune.json")]
    results = validate_gpu.run_stages(wanted, tmp_path)
    assert [result.status for result in results] == [2, 0]
    assert results[0].last_words.startswith("--device tpu")
    archive = validate_gpu.pack(tmp_path, "NVIDIA H100 80GB HBM3", results)
    assert archive.name == "kdkernels-NVIDIA-H100-80GB-HBM3.zip"
    validate_gpu.pack(tmp_path, "NVIDIA H100 80GB HBM3", results)
    with zipfile.ZipFile(archive) as file:
        assert set(file.namelist()) == {
            *("check.json", "check.log", "tune.json", "tune.log", "summary.json", "bench/bench.csv"),
        }
        assert json.loads(file.read("tune.json")) == {}
        summary = json.loads(file.read("summary.json"))
    assert [(one["command"], one["exit_status"]) for one in summary] == [
        ("kdkernels check --device tpu", 2),
        ("kdkernels tune --show --json", 0),
    ]


@pytest.mark.parametrize("quick", [False, True], ids=["", "quick"])
def test_every_stage_is_a_command_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    """Their options are parsed, and refused only for the GPU that is not there."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    wanted = validate_gpu.stages("cuda", tmp_path, ["triton"], quick)
    assert [stage.name for stage in wanted] == ["info", "check", "tune", "bench"]
    for stage in wanted[1:]:
        result = CliRunner().invoke(app, list(stage.command))
        assert result.exit_code == 2
        assert "finds no CUDA or ROCm device here" in result.output
    for operation in Operation:
        assert operation.value in wanted[-1].command


@needs_native
def test_a_failed_stage_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_gpu, "check_device", lambda device: "cpu")
    monkeypatch.setattr(
        validate_gpu.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=command[3] == "tune")
    )
    result = CliRunner().invoke(app, ["validate-gpu", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "to send back: " in result.output
    with zipfile.ZipFile(next(tmp_path.glob("*.zip"))) as file:
        assert [one["exit_status"] for one in json.loads(file.read("summary.json"))] == [0, 0, 1, 0]


PAGE = Path(__file__).parents[1] / "docs" / "first_gpu_run.md"
COMMANDS = re.findall(r"^kdkernels .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_has_every_command() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} == {"info", "check", "tune", "bench", "validate-gpu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_can_be_pasted(command: str) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (0 if arguments[0] == "info" else 2)
    if result.exit_code:
        assert "finds no CUDA or ROCm device here" in result.output

"""The command line: what it prints, what it measures, and that ``check`` finds a broken kernel."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import kdkernels as kd
from kdkernels import environment
from kdkernels.backends import NAMES, BackendStatus, cpu, serves, triton
from kdkernels.benchmarking import contenders, plain
from kdkernels.benchmarking.memory import peak_extra_bytes
from kdkernels.benchmarking.timing import side_by_side
from kdkernels.benchmarking.workloads import Operation, Workload
from kdkernels.cli import app
from kdkernels.cli.choices import DIVERGENCES, DivergenceName
from kdkernels.validation import comparison
from kdkernels.validation.comparison import error_of

SMALL_CHECK = ["check", "--backend", "cpu", "--device", "cpu", "--quick", "--divergence", "jsd", "--dtype", "float32"]
SMALL_BENCH = [
    "bench",
    "--device",
    "cpu",
    "--tokens",
    "4",
    "--vocab",
    "33",
    "--hidden",
    "8",
    "--seconds",
    "0",
    "--no-memory",
]
needs_native = pytest.mark.skipif(not kd.backends()["cpu"].available, reason=kd.backends()["cpu"].reason)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def bench(folder: Path, *arguments: str) -> tuple[Result, list[dict[str, str]]]:
    result = invoke(*SMALL_BENCH, "--out", str(folder), *arguments)
    with (folder / "bench.csv").open(encoding="utf-8") as file:
        return result, list(csv.DictReader(file))


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip() == kd.__version__


def test_choices_are_complete() -> None:
    assert list(DIVERGENCES) == [name.value for name in DivergenceName]
    offered = {type(divergence) for divergence in DIVERGENCES.values()}
    assert offered == concrete(kd.Divergence) - {kd.Decoupled}  # which is made of one of them


def concrete(base: type) -> set[type]:
    """The subclasses that have none themselves."""
    below = base.__subclasses__()
    return {base} if not below else set().union(*map(concrete, below))


# --- info ---------------------------------------------------------------------------------------------------------------


def test_info_gives_whole_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "because " + "of [something] very long " * 30
    monkeypatch.setattr(environment, "backends", lambda: {"triton": BackendStatus("triton", False, reason)})
    result = invoke("info")
    assert result.exit_code == 0
    assert f"not available: {reason}".strip() in result.output
    for part in (torch.__version__, f"{torch.get_num_threads()} of"):
        assert part in result.output


def test_info_as_json() -> None:
    found = json.loads(invoke("info", "--json").output)
    assert found["versions"]["torch"] == environment.package_version("torch")
    assert {name: status["reason"] for name, status in found["backends"].items()} == {
        name: status.reason for name, status in kd.backends().items()
    }
    assert found["devices"][0]["device"] == "cpu"


# --- check --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_native
def test_check_passes() -> None:
    result = invoke(*SMALL_CHECK, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    assert [line["operation"] for line in report["results"]] == [
        "divergence",
        "linear_divergence",
        "sparse_divergence",
        "mixture",
        "token_statistics",
        "topk_logits",
        "sample_logits",
        "records",
        "token_log_probs",
        "token_set_log_probs",
        "pairwise_l1",
        "pairwise_l1 of heads",
        "sorted_l1",
        "plackett_luce",
        "bernoulli_loss",
        "head_mass",
        "row_deviation",
        "relation_loss",
        "angle_loss",
        "sinkhorn",
    ]
    assert all(0 < line["error"] < 1e-5 for line in report["results"])
    assert {line["backend"] for line in report["results"]} == {"cpu"}


@needs_native
def test_check_says_what_a_backend_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def serves(name: str, family: str) -> tuple[bool, str]:
        return family != "records", f"{name} has no {family}"

    monkeypatch.setattr(comparison, "serves", serves)
    only = ["--operation", "records", "--operation", "angle_loss"]
    report = json.loads(invoke(*SMALL_CHECK, *only, "--json").stdout)
    assert [line["operation"] for line in report["results"]] == ["angle_loss"]
    assert report["not_checked"] == {"records by cpu": "cpu has no records"}
    assert "not checked: records by cpu, cpu has no records" in invoke(*SMALL_CHECK, *only).output
    result = invoke(*SMALL_CHECK, "--operation", "records")
    assert result.exit_code == 2
    assert "nothing to check" in result.output


def test_every_backend_is_asked_what_it_serves() -> None:
    for name in NAMES:
        for family in set(comparison.FAMILIES.values()):
            served, reason = serves(name, family)
            assert served or reason
            assert served or name not in {"cpu", "triton"}


@pytest.mark.slow
@needs_native
def test_check_shows_a_table() -> None:
    result = invoke(*SMALL_CHECK)
    assert result.exit_code == 0, result.output
    assert "divergence JSD(beta=0.5)" in result.output
    assert "cases pass" in result.output
    assert "FAIL" not in result.output


def scale_first(values: tuple[torch.Tensor, ...]) -> None:
    values[0].mul_(1.01)


def scale_gradients(*gradients: torch.Tensor | None) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(1.01)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "spoil", "operation", "quantity"),
    [
        ("divergence_forward", lambda values, _: scale_first(values), "divergence", "value per token"),
        (
            "divergence_backward",
            lambda _, given: scale_gradients(*given[-2:]),
            "divergence",
            "gradient to student, per token",
        ),
        ("divergence_total", lambda _, given: scale_gradients(*given[-2:]), "divergence", "gradient to student, sum"),
        ("divergence_fused", lambda _, given: scale_gradients(*given[-2:]), "linear_divergence", "gradient to student"),
        (
            "sparse_divergence_fused",
            lambda _, given: scale_gradients(given[-1]),
            "sparse_divergence",
            "gradient to student",
        ),
        ("token_statistics", lambda values, _: scale_first(values), "token_statistics", ""),
        ("topk", lambda values, _: scale_first(values[1:]), "topk_logits", "log_probs"),
        ("topk", lambda values, _: values[0].add_(1), "topk_logits", "ids"),
        ("sample", lambda values, _: scale_first(values[1:]), "sample_logits", "weights"),
        ("sample", lambda values, _: values[0].add_(1), "sample_logits", "ids"),
        ("unpack_records", lambda values, _: scale_first(values[1:]), "records", "log_probs"),
        ("sparse_divergence_fused", lambda values, _: scale_first(values), "token_log_probs", "value per token"),
        ("head_mass", lambda values, _: scale_first(values), "head_mass", "threshold"),
        ("head_mass", lambda values, _: scale_first(values[1:]), "head_mass", "gap of the"),
        ("relation", lambda _, given: scale_gradients(*given[3]), "relation_loss", "gradient to"),
        ("divergence_fused", lambda _, given: scale_gradients(*given[-2:]), "relation_loss", "gradient to"),
        ("angle", lambda values, _: values[1].mul_(1.01), "angle_loss", "gradient to student"),
        ("token_ranks", lambda values, _: values.add_(1), "plackett_luce", "ranks"),
        ("pairwise_l1_forward", lambda values, _: scale_first(values), "pairwise_l1", ""),
        ("pairwise_l1_backward", lambda _, given: scale_gradients(*given[-2:]), "pairwise_l1", "gradient to"),
        ("pairwise_l1_backward", lambda _, given: scale_gradients(*given[-2:]), "pairwise_l1 of heads", "gradient to"),
        ("sorted_l1", lambda values, _: scale_first(values), "sorted_l1", "value per token"),
        ("sorted_l1", lambda _, given: scale_gradients(*given[-2:]), "sorted_l1", "gradient to"),
        ("plackett_luce", lambda _, given: scale_gradients(given[-1]), "plackett_luce", "gradient to student"),
        ("bernoulli", lambda _, given: scale_gradients(given[-1]), "bernoulli_loss", "gradient to student"),
        ("sinkhorn_forward", lambda values, _: values[2].mul_(1.01), "sinkhorn", ""),
        ("sinkhorn_backward", lambda _, given: scale_gradients(*given[-3:]), "sinkhorn", "gradient to "),
    ],
    ids=[
        "forward",
        "backward",
        "total",
        "fused",
        "sparse",
        "token_statistics",
        "topk",
        "topk ids",
        "sample",
        "sample ids",
        "records",
        "label log-probabilities",
        "thresholds",
        "gaps",
        "relations in one kernel",
        "relations in chunks",
        "angle",
        "ranks",
        "pairs",
        "pairs backward",
        "pairs of heads",
        "sorted_l1",
        "sorted_l1 gradients",
        "plackett_luce gradients",
        "bernoulli gradients",
        "sinkhorn",
        "sinkhorn backward",
    ],
)
def test_check_finds_a_kernel_that_is_a_percent_off(
    monkeypatch: pytest.MonkeyPatch, kernel: str, spoil: Callable[[Any, Any], None], operation: str, quantity: str
) -> None:
    right = getattr(cpu, kernel)

    def wrong(*arguments: Any) -> Any:
        values = right(*arguments)
        spoil(values, arguments)
        return values

    monkeypatch.setattr(cpu, kernel, wrong)
    result = invoke(*SMALL_CHECK, "--json", "--operation", operation)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["passed"]
    failures = [fault for line in report["results"] if line["operation"] == operation for fault in line["failures"]]
    assert any(fault["quantity"].startswith(quantity) for fault in failures)


@pytest.mark.slow
@needs_native
def test_check_reports_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("it is [broken]")

    monkeypatch.setattr(cpu, "token_statistics", broken)
    result = invoke(*SMALL_CHECK)
    assert result.exit_code == 1
    assert "FAIL token_statistics, cpu, float32, case 'V = 1': RuntimeError: it is [broken]" in result.output


def test_zero_and_nan_are_errors() -> None:
    truth = torch.randn(3, 5, dtype=torch.float64)
    assert error_of(truth, truth, 0.0) == 0
    assert error_of(torch.zeros_like(truth), truth, 0.0) == pytest.approx(1)
    assert error_of(truth * torch.nan, truth, 0.0) == torch.inf
    assert error_of(truth[:, :4], truth, 0.0) == torch.inf


def test_check_says_why_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "supports", lambda device: (False, f"nothing runs on {device}"))
    result = invoke("check", "--backend", "triton", "--device", "cpu")
    assert result.exit_code == 2
    assert "triton: nothing runs on cpu" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["check", "--backend", "reference"], "--backend reference: must be one of cpu, triton, cuda"),
        (["check", "--device", "tpu"], "--device tpu"),
        (["bench", "--device", "mps"], "only cpu and cuda"),
        (["bench", "--contender", "nobody"], "must be one of 'kdkernels', 'eager'"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], complaint: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_missing_gpu_is_not_measured(command: str) -> None:
    result = invoke(command, "--device", "cuda")
    assert result.exit_code == 2
    assert "finds no CUDA or ROCm device here" in result.output


# --- bench --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(contenders, "package_version", lambda name: None)
    result, rows = bench(tmp_path, "--contender", "eager", "--contender", "Liger (chunked)", "--divergence", "jsd")
    assert result.exit_code == 0, result.output
    assert [(row["operation"], row["contender"]) for row in rows] == [
        (operation, contender)
        for operation in ("dense", "forward", "head")
        for contender in ("kdkernels", "eager", "Liger (chunked)")
    ]
    for row in rows:
        measured = row["contender"] != "Liger (chunked)"
        assert bool(row["seconds"]) == bool(row["ratio"]) == measured
        assert (row["note"] == "") == measured
        assert (row["vocab"], row["divergence"], row["peak_bytes"]) == ("33", "JSD(beta=0.5)", "")
        if row["contender"] == "kdkernels":
            assert float(row["ratio"]) == 1
    assert "not measured: Liger (chunked), liger-kernel is not installed" in result.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_takes_the_sizes_of_a_model(tmp_path: Path) -> None:
    arguments = ["bench", "--model", "smollm2", "--tokens", "1", "--contender", "kdkernels", "--operation", "head"]
    result = invoke(*arguments, "--seconds", "0", "--no-memory", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "1 token × 49,152, hidden 576, float32" in result.output


@pytest.mark.slow
def test_bench_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    result, _ = bench(tmp_path, "--contender", "kdkernels", "--operation", "forward")
    assert result.exit_code == 0, result.output
    assert 'figures need matplotlib, which is not installed: pip install "kdkernels[bench]"' in result.output
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.slow
def test_bench_does_not_time_another_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.mean_divergence
    monkeypatch.setattr(
        contenders, "mean_divergence", lambda divergence: lambda *logits: 2 * right(divergence)(*logits)
    )
    result, rows = bench(tmp_path, "--contender", "eager", "--operation", "dense")
    assert result.exit_code == 0, result.output
    assert "it computes another loss" in rows[1]["note"]
    assert not rows[1]["seconds"]


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_plain_pytorch_computes_the_same(divergence: kd.Divergence) -> None:
    student, teacher = (torch.randn(4, 50, dtype=torch.float64) for _ in range(2))
    expected = kd.reference.distillation_loss(student, teacher, divergence)
    torch.testing.assert_close(plain.mean_divergence(divergence)(student, teacher), expected)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    fractions: list[float] = []
    samples = side_by_side(calls, "cpu", seconds=0, rounds=(3, 9), advance=fractions.append)
    assert order == [*"abc", *"abc", *"bca", *"cab"]
    assert [len(times) for times in samples.values()] == [3, 3, 3]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


@pytest.mark.slow
def test_peak_memory_is_that_of_the_call() -> None:
    workload = Workload(Operation.DENSE, kd.ForwardKL(), 256, 32_000, 0, 0)
    peaks = {
        name: peak_extra_bytes(workload, name) / workload.gradient_bytes
        for name in ("3-stream add", "kdkernels", "eager")
    }
    assert peaks["3-stream add"] < 0.1  # it writes to memory that is there already
    assert 0.9 < peaks["kdkernels"] < 1.3  # the gradient
    assert 3 < peaks["eager"] < 8


@pytest.mark.slow
def test_a_failing_memory_measurement_says_why() -> None:
    workload = Workload(Operation.FORWARD, kd.ForwardKL(), 4, 32, 0, 0)
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        peak_extra_bytes(workload, "nobody")

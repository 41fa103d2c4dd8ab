"""The offline example in miniature: a tiny teacher, the real store, both trainers in processes of their own."""

from __future__ import annotations

import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_teacher import save_teacher

EXAMPLES = Path(__file__).parents[1] / "examples"

for package in ("transformers", "gguf", "accelerate", "psutil", "matplotlib"):
    pytest.importorskip(package, reason=f"the example needs {package}")
sys.path.insert(0, str(EXAMPLES))

import distill_offline  # noqa: E402
import offline_job  # noqa: E402
import smollm2  # noqa: E402
import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import kdkernels as kd  # noqa: E402
from kdkernels.cli import app as kdkernels_app  # noqa: E402

VOCABULARY = 320
SIZES = {
    "k": VOCABULARY,
    "codec": "bf16",
    "store-tokens": 512,
    "steps": 6,
    "tokens": 64,
    "sequence-length": 32,
    "held-out-tokens": 64,
    "student-layers": 2,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, list(smollm2.read_documents().values())[:2], vocab_size=VOCABULARY, layers=4)
    return folder


def words(out: Path, teacher: Path, **changed: object) -> list[str]:
    options = {**SIZES, **changed, "teacher": teacher, "out": out}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(distill_offline.main)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.mark.slow
def test_the_store_teaches_what_the_teacher_teaches(teacher: Path, tmp_path: Path) -> None:
    """With every id stored, at eight bits of precision, the two students learn the same."""
    command = [sys.executable, str(EXAMPLES / "distill_offline.py"), *words(tmp_path / "out", teacher)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    offline, online = (results["training"][form] for form in ("offline", "online"))
    assert len(offline["losses"]) == len(online["losses"]) == 6
    assert offline["losses"] == pytest.approx(online["losses"], rel=0.02)
    for training in (offline, online):
        before, after = training["held_out"][0]["kl"], training["held_out"][-1]["kl"]
        assert 0 < after < 0.97 * before
        assert training["peak_bytes"] > 2**26
        assert len(training["step_seconds"]) == 6
    assert offline["held_out"][0] == online["held_out"][0]
    assert offline["held_out"][-1]["kl"] == pytest.approx(online["held_out"][-1]["kl"], rel=0.02)
    ds = kd.store.open(tmp_path / "out" / "store")
    files = sum(path.stat().st_size for path in (tmp_path / "out" / "store").iterdir())
    assert results["store"]["tokens"] == ds.num_tokens == 512
    assert results["store"]["bytes_per_token"] == pytest.approx(files / 512)
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) >= (800, 400)
    assert len(picture) > 10_000
    line = next(line.strip() for line in finished.stdout.splitlines() if "kdkernels cache" in line)
    again = CliRunner().invoke(kdkernels_app, shlex.split(line)[1:])
    assert "nothing to do: all 16 sequences are stored" in again.output


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_reached(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offline_job.OfflineJob, "train", interrupted)
    status, output = invoke(*words(tmp_path, teacher))
    assert status == 130
    assert "Interrupted" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["interrupted"] is True
    assert results["store"]["tokens"] == 512
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 100, "sequence-length": 64}, "--tokens"),
        ({"store-tokens": 63}, "--store-tokens"),
        ({"device": "tpu"}, "--device"),
        ({"top-p": 0}, "--top-p"),
        ({"temperature": "nan"}, "--temperature"),
        ({"codec": "q5"}, "--codec"),
        ({"parameter": "beta=1"}, "no parameter"),
        ({"out": "/dev/null/out"}, "--out"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    options = {**SIZES, "out": tmp_path, **change}
    status, output = invoke(*(word for name, value in options.items() for word in (f"--{name}", str(value))))
    assert status == 2
    assert message in output

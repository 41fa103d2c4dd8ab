"""``kdkernels validate-gpu``: everything that is to be known about a GPU, in one file to send back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from kdkernels import environment
from kdkernels.benchmarking.workloads import Operation
from kdkernels.cli.choices import check_device
from kdkernels.cli.terminal import console, fail
from kdkernels.validation.comparison import servers

__all__ = ["run_validate_gpu"]


@dataclass(frozen=True)
class Stage:
    """A command, and the file that gets what it prints; its progress and complaints go to a log beside it."""

    command: tuple[str, ...]
    prints: str

    @property
    def name(self) -> str:
        return self.command[0]


@dataclass(frozen=True)
class StageResult:
    stage: Stage
    status: int
    seconds: float
    last_words: str
    """Of the log, if the command failed."""


def run_validate_gpu(
    device: Annotated[str, typer.Option(help="cuda, or cuda:1 and so on (also for ROCm).")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/gpu"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and sizes: minutes instead of an hour.")] = False,
) -> None:
    """Run info, check, tune and bench on a GPU, each in a process of its own, and pack what they say into a zip file.

    The benchmark comes after the tuning and so runs with the tuned launch sizes. The exit status is 1 if a command failed; the
    others run all the same.
    """
    device = check_device(device)
    able, reasons = servers(torch.device(device).type, None)
    if not able:
        fail(f"no kernels to validate on {device}:\n" + "\n".join(f"  {name}: {why}" for name, why in reasons.items()))
    results = run_stages(stages(device, out, able, quick), out)
    packed = pack(out, environment.device_name(device), results)
    show(results)
    typer.echo(f"to send back: {packed}")
    if any(result.status for result in results):
        raise typer.Exit(1)


def stages(device: str, out: Path, backends: Sequence[str], quick: bool) -> list[Stage]:
    check, tune = ["check", "--device", device, "--json"], ["tune", "--device", device, "--json"]
    bench = ["bench", "--device", device, "--dtype", "bfloat16", "--out", str(out / "bench")]
    for operation in Operation:
        bench += ["--operation", operation.value]
    for backend in backends:
        bench += ["--backend", backend]
    if quick:
        check += ["--quick"]
        tune += ["--vocab", "128256", "--dtype", "bfloat16", "--seconds", "0.2"]
        bench += ["--tokens", "1024", "--seconds", "2", "--no-memory"]
    else:
        bench += ["--model", "llama3", "--tokens", "8192"]
    return [
        Stage(("info", "--json"), "info.json"),
        Stage(tuple(check), "check.json"),
        Stage(tuple(tune), "tune.json"),
        Stage(tuple(bench), "bench.txt"),
    ]


def run_stages(wanted: Sequence[Stage], out: Path) -> list[StageResult]:
    """Runs every stage, whatever becomes of those before: a GPU whose context is broken gets a new one."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for place, stage in enumerate(wanted, 1):
        log = out / f"{stage.name}.log"
        start = time.perf_counter()
        with (
            (out / stage.prints).open("wb") as output,
            log.open("wb") as complaints,
            console(error=True).status(f"{stage.name}, {place} of {len(wanted)}; what it does is in {log}"),
        ):
            command = [sys.executable, "-m", "kdkernels", *stage.command]
            status = subprocess.run(command, stdout=output, stderr=complaints, check=False).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last_words = lines[-1] if status and lines else ""
        results.append(StageResult(stage, status, time.perf_counter() - start, last_words))
    return results


def pack(out: Path, device: str, results: Sequence[StageResult]) -> Path:
    """All of the folder but older archives, with how the stages ended."""
    summary = [
        {
            "command": " ".join(("kdkernels", *result.stage.command)),
            "exit_status": result.status,
            "seconds": round(result.seconds, 1),
        }
        for result in results
    ]
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    archive = out / f"kdkernels-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.suffix != ".zip":
                file.write(path, path.relative_to(out))
    return archive


def show(results: Sequence[StageResult]) -> None:
    table = Table()
    for heading in ("command", "seconds", "exit status", "last words"):
        table.add_column(heading, justify="right" if heading in {"seconds", "exit status"} else "left")
    for result in results:
        table.add_row(f"kdkernels {result.stage.name}", f"{result.seconds:.0f}", str(result.status), result.last_words)
    console().print(table, markup=False)

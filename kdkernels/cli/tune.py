"""``kdkernels tune``: the launch sizes of the Triton kernels that are fastest on this GPU, measured and kept."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kdkernels import environment
from kdkernels.backends import row_backend
from kdkernels.backends.triton.launching import INTERPRETER, device_of, tuneable, tuned_table
from kdkernels.benchmarking.results import format_ratio, format_seconds
from kdkernels.cli.choices import Dtype, check_device
from kdkernels.cli.terminal import console, fail, progress
from kdkernels.triton_kernels.tiling import ROW_KERNELS, LaunchSizes
from kdkernels.tuning import table
from kdkernels.tuning.measurement import Job, Outcome, rows_that_fit, tune

__all__ = ["run_tune"]

KernelName = enum.Enum("KernelName", {name: name for name in ROW_KERNELS}, type=str)  # type: ignore[misc]

VOCABULARIES = (32_000, 50_304, 128_256, 151_936)
"""Of Llama 2, GPT-2 (padded), Llama 3 and Qwen 3: one for each power of two that sizes are kept for."""


def run_tune(
    device: Annotated[str, typer.Option(help="cuda, or cuda:1 and so on (also for ROCm).")] = "cuda",
    kernel: Annotated[list[KernelName] | None, typer.Option(help="May be repeated.", show_default="all")] = None,
    vocab: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Sizes are kept for the powers of two between which vocabularies lie. May be repeated.",
            show_default=", ".join(map(str, VOCABULARIES)),
        ),
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="May be repeated.", show_default="bfloat16 and float32")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of logits, fewer if memory is short.")] = 4096,
    seconds: Annotated[float, typer.Option(min=0, help="For how long each kernel is timed, all sizes.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, but keep nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print what is kept, for all devices, and end.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept, for all devices, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time the Triton kernels with other launch sizes, and keep the fastest that compute the same for this device.

    Later launches use them: they are read from a file in the user's cache folder, which KDKERNELS_TUNING_DIR replaces and
    KDKERNELS_TUNING=0 leaves out. Results are the same but for rounding.
    """
    if clear:
        try:
            removed = [str(path) for path in table.clear()]
        except OSError as error:
            fail(f"not removed: {error}", 1)
        lines = [f"removed: {path}" for path in removed] or [f"nothing is kept in {table.folder()}"]
        typer.echo(json.dumps({"removed": removed}) if as_json else "\n".join(lines))
        return
    if show:
        try:
            show_kept(as_json)
        except OSError as error:
            fail(str(error), 1)
        return
    device = check_device(device)
    able, reason = row_backend("triton").supports(torch.device(device).type)
    if not able:
        fail(f"nothing to tune on {device}: {reason}")
    place = torch.empty(0, device=device)
    jobs = [
        Job(one.value, size, each.torch, rows_that_fit(size, each.torch, tokens, free_bytes(device)), device)
        for one in kernel or KernelName
        for size in vocab or VOCABULARIES
        for each in dtype or (Dtype.BFLOAT16, Dtype.FLOAT32)
    ]
    outcomes = measure(jobs, seconds)
    written = None
    if not dry_run:
        try:
            written = table.store(tuneable(device_of(place)), [one.entry for one in outcomes if one.entry is not None])
        except OSError as error:
            fail(f"the launch sizes could not be kept: {error}", 1)
        tuned_table.cache_clear()
    machine = environment.machine(device)
    meaningless = device_of(place) is INTERPRETER
    if as_json:
        answer = {
            "machine": machine,
            "device": tuneable(device_of(place))._asdict(),
            "meaningless": meaningless,
            "file": None if written is None else str(written),
            "results": [as_record(one) for one in outcomes],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        show_outcomes(outcomes, machine)
        if meaningless:
            typer.echo("in Triton's interpreter times mean nothing")
        typer.echo("nothing is kept" if written is None else f"kept in {written}")
    if any(one.problem for one in outcomes):
        raise typer.Exit(1)


def free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else 1 << 32


def measure(jobs: list[Job], seconds: float) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with progress(counted=False) as bar:
        task = bar.add_task("tuning", total=float(len(jobs)))

        def advance(done: float) -> None:
            bar.update(task, completed=len(outcomes) + done)

        for job in jobs:
            bar.update(task, completed=len(outcomes), description=f"{job.kernel}, {job.vocab:,}, {dtype_name(job)}")
            outcomes.append(tune(job, seconds, advance=advance))
            if torch.device(job.device).type == "cuda":
                torch.cuda.empty_cache()
    return outcomes


def dtype_name(job: Job) -> str:
    return str(job.dtype).removeprefix("torch.")


def named(sizes: LaunchSizes) -> str:
    return f"{sizes.threads} × {sizes.bytes_per_thread} B"


def as_record(outcome: Outcome) -> dict[str, Any]:
    job = outcome.job

    def sizes(one: LaunchSizes) -> dict[str, Any]:
        return {"threads": one.threads, "bytes_per_thread": one.bytes_per_thread}

    return {
        "kernel": job.kernel,
        "vocab": job.vocab,
        "dtype": dtype_name(job),
        "tokens": job.tokens,
        "aligned": job.aligned,
        "default": sizes(outcome.default),
        "best": sizes(outcome.best),
        "candidates": [
            sizes(one) | {"seconds": outcome.seconds[one], "ratio_to_default": outcome.ratios[one]}
            for one in outcome.seconds
        ],
        "skipped": [sizes(one) | {"reason": reason} for one, reason in outcome.skipped.items()],
        "problem": outcome.problem,
    }


def show_outcomes(outcomes: list[Outcome], machine: str) -> None:
    output = console()
    found = Table(title=f"launch sizes on {machine}", title_justify="left", title_style="bold")
    for heading in ("kernel", "dtype"):
        found.add_column(heading)
    for heading in ("vocabulary", "tokens", "default", "time", "best", "time", "best in default"):
        found.add_column(heading, justify="right", no_wrap=True)
    for one in outcomes:
        seconds = one.seconds
        found.add_row(
            one.job.kernel,
            dtype_name(one.job),
            f"{one.job.vocab:,}",
            f"{one.job.tokens:,}",
            named(one.default),
            format_seconds(seconds.get(one.default)),
            named(one.best),
            format_seconds(seconds.get(one.best)),
            format_ratio(one.ratios.get(one.best)),
        )
    output.print(found)
    output.print("sizes: threads of a program × bytes of each operand that a thread reads per tile", markup=False)
    for one in outcomes:
        about = f"{one.job.kernel}, {one.job.vocab:,}, {dtype_name(one.job)}"
        if one.problem:
            output.print(f"not measured: {about}: {one.problem}", style="red", soft_wrap=True, markup=False)
        for sizes, reason in one.skipped.items():
            output.print(f"skipped: {about}, {named(sizes)}: {reason}", soft_wrap=True, markup=False)


def show_kept(as_json: bool) -> None:
    kept: dict[str, Any] = {}
    for path in table.files():
        try:
            device, entries = table.read(path)
        except (table.TuningFileError, OSError) as error:
            kept[str(path)] = {"problem": str(error)}
            continue
        kept[str(path)] = {"device": device._asdict(), "entries": [as_kept(entry) for entry in entries]}
    if as_json:
        typer.echo(json.dumps(kept, indent=2))
        return
    if not kept:
        typer.echo(f"nothing is kept in {table.folder()}")
    output = console()
    for name, content in kept.items():
        if "problem" in content:
            output.print(f"{name}: not used, {content['problem']}", style="red", soft_wrap=True, markup=False)
            continue
        about = ", ".join(f"{key} {value}" for key, value in content["device"].items())
        found = Table(title=f"{name}: {about}", title_justify="left")
        for heading in ("kernel", "vocabularies to", "bytes per logit", "aligned", "threads", "bytes", "in default"):
            found.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
        for entry in content["entries"]:
            found.add_row(*(str(value) for value in entry.values()))
        output.print(found, soft_wrap=True)


def as_kept(entry: table.Entry) -> dict[str, Any]:
    ratio = entry.seconds / entry.default_seconds if entry.default_seconds else None
    return {
        **entry.key._asdict(),
        "threads": entry.sizes.threads,
        "bytes_per_thread": entry.sizes.bytes_per_thread,
        "ratio_to_default": format_ratio(ratio),
    }

"""``kdkernels verify``: is a store sound, and is it this teacher's?"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import kdkernels as kd
from kdkernels.benchmarking.results import format_bytes
from kdkernels.caching.errors import CachingError
from kdkernels.caching.job import device_of_share
from kdkernels.caching.recomputation import Deviation, recompute
from kdkernels.caching.teacher import load_teacher
from kdkernels.cli.choices import Dtype, check_device
from kdkernels.cli.terminal import console, fail, progress

__all__ = ["run_verify"]

LEAST_SAME_IDS = 0.95
"""Of the ids of a sequence: near-equal probabilities may change places at the end of the list, but no more."""


def run_verify(
    store: Annotated[str, typer.Argument(help="Folder of the store, or a URL that fsspec knows.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Recompute some sequences with this model, as `kdkernels cache` takes it.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many sequences to recompute, evenly spread.")] = 4,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest mean KL(teacher || stored) of a sequence, in nats per token.")
    ] = 0.02,
    gguf_file: Annotated[str | None, typer.Option(help="Which GGUF file of the folder, if it has several.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Of the teacher: cpu or cuda.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the teacher.", show_default="float32 on the CPU, else that of its weights")
    ] = None,
) -> None:
    """Read every byte of a store: checksums, ranges, every record. The exit status is 1 if something is wrong.

    With --teacher, also compute some of its sequences anew: how far the stored distributions are from the teacher's is what
    the codec costs, and far more if they come from another teacher.
    """
    try:
        problems = verify_files(store)
        if teacher is not None and problems:
            typer.echo("not compared with the teacher: the store is damaged", err=True)
        elif teacher is not None:
            place = check_device(device_of_share(device))
            with console(error=True).status("Loading the teacher"):
                model = load_teacher(
                    teacher, gguf_file=gguf_file, device=place, dtype=None if dtype is None else dtype.torch
                )
            ds = kd.store.open(store)
            named = ds.description.teacher
            if named is not None and not named.endswith(model.fingerprint()):
                typer.echo(f"the store names another teacher: {named}; this one is {model.describe()}", err=True)
            with progress(counted=True) as bar:
                places = spread(len(ds), sample)
                deviations = [
                    recompute(model, ds, position) for position in bar.track(places, description="recomputing")
                ]
            problems = judge(deviations, tolerance)
            show(deviations)
    except CachingError as error:
        fail(str(error))
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    for problem in problems:
        typer.echo(f"FAIL {problem}")
    if problems:
        raise typer.Exit(1)


def verify_files(store: str) -> list[str]:
    with progress(counted=True) as bar:
        task = bar.add_task("shards", total=None)
        found = kd.store.verify(store, progress=lambda _, done, total: bar.update(task, completed=done, total=total))
    if found.ok:
        typer.echo(
            f"{store} is sound: {counted(found.shards, 'shard')} with {counted(found.sequences, 'sequence')}, "
            f"{found.tokens:,} tokens, {format_bytes(found.bytes)}"
        )
    return found.problems


def spread(available: int, wanted: int) -> list[int]:
    """Evenly spread positions, the first and the last among them."""
    wanted = min(wanted, available)
    return sorted({round(place * (available - 1) / max(1, wanted - 1)) for place in range(wanted)})


def judge(deviations: list[Deviation], tolerance: float) -> list[str]:
    """What is wrong with sequences that are not what the teacher says."""
    problems = []
    for one in deviations:
        # Not `kl > tolerance`: that lets NaN pass.
        if not one.kl <= tolerance:
            problems.append(
                f"sequence {one.sequence_id}: {one.kl:.2g} nats per token from the teacher, more than {tolerance:g}"
            )
        elif one.same_ids < LEAST_SAME_IDS:
            problems.append(f"sequence {one.sequence_id}: only {one.same_ids:.1%} of its token ids are the teacher's")
    return problems


def show(deviations: list[Deviation]) -> None:
    table = Table(title="Stored distributions beside the teacher's", title_justify="left")
    for heading in ("sequence", "tokens", "KL(teacher || stored), nats per token", "same token ids"):
        table.add_column(heading, justify="right")
    for one in deviations:
        table.add_row(f"{one.sequence_id:,}", f"{one.tokens:,}", f"{one.kl:.2e}", f"{one.same_ids:.2%}")
    output = console()
    output.print(table)
    if deviations:
        mean = statistics.fmean(one.kl for one in deviations)
        output.print(f"mean KL of {len(deviations)} sequences: {mean:.2e} nats per token", markup=False)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

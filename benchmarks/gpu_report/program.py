"""The program: compiles, counts, models, and writes the page. Takes minutes."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kdkernels.divergences import Kind

from . import cuda_extension, cuda_traffic, emulation, matrix, page, peers, picture, processes, tables
from .calls import named

console = Console(stderr=True)


def main(
    quick: Annotated[bool, typer.Option(help="Few kernels and one dtype, in a minute.")] = False,
    only: Annotated[
        str, typer.Option(help="Only calls whose names contain this; the others and the peers keep their rows.")
    ] = "",
    again: Annotated[bool, typer.Option(help="Compile and count nothing: the page anew from its tables.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for gpu.md and gpu/.")] = Path("docs"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 2,
    peers_from: Annotated[
        Path | None, typer.Option(help="Folder with the other libraries, if they are not installed.")
    ] = None,
) -> None:
    """Write what is known of the GPU kernels without a GPU."""
    folder = out / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    kernels: list[tables.KernelRow] = []
    traffic: list[tables.TrafficRow] = []
    others: list[peers.PeerTraffic] = []
    of_cuda: list[tables.RowTraffic] = tables.read(folder / "cuda_traffic.csv", tables.RowTraffic)
    longest: list[tables.LongestRow] = tables.read(folder / "cuda_rows.csv", tables.LongestRow)
    if again or only:
        kernels = tables.read(folder / "kernels.csv", tables.KernelRow)
        traffic = tables.read(folder / "traffic.csv", tables.TrafficRow)
        others = tables.read(folder / "peers.csv", peers.PeerTraffic)
    cuda = [row for row in kernels if row.language == "CUDA"]
    if not again:
        to_compile, to_count = matrix.tasks(quick, only)
        contenders = [] if only else [(*contender, dtype) for contender in peers.CONTENDERS for dtype in PEER_DTYPES]
        new = computed(to_compile, to_count, contenders, jobs, peers_from)
        kernels, traffic = matrix.renewed(kernels, new[0]), matrix.renewed(traffic, new[1])
        others = new[2] or others
        of_cuda, longest = counted_on_emulator(of_cuda, longest, only)
    if library := cuda_extension.extension():
        cuda = cuda_extension.kernel_rows(library)
    kernels = [*matrix.renewed(kernels, []), *cuda]
    modelled = matrix.modelled_rows(kernels, traffic)
    for name, rows in (
        ("kernels", kernels),
        ("traffic", traffic),
        ("cuda_traffic", of_cuda),
        ("cuda_rows", longest),
        ("model", modelled),
        ("peers", others),
    ):
        tables.write(folder / f"{name}.csv", rows)
    picture.draw_roofline(folder / "roofline.png", modelled)
    picture.draw_bytes(folder / "bytes.png", others, of_cuda)
    versions = {name: importlib.metadata.version(name) for name in ("triton", "torch")}
    found = page.measured(folder / "measured.csv")
    text = page.page(kernels, traffic, of_cuda, longest, modelled, others, found, versions, quick)
    (out / "gpu.md").write_text(text, encoding="utf-8")
    console.print(f"written: {out / 'gpu.md'} and what it shows in {folder}")


PEER_DTYPES = ("fp32", "bf16")


def computed(
    to_compile: list[tuple[str, str, str]],
    to_count: list[tuple[str, str]],
    contenders: list[tuple[str, str, str]],
    jobs: int,
    peers_from: Path | None,
) -> tuple[list[tables.KernelRow], list[tables.TrafficRow], list[peers.PeerTraffic]]:
    folder = "" if peers_from is None else str(peers_from.resolve())
    with (
        processes.start(1, TRITON_INTERPRET="1") as interpreter,
        processes.start(jobs, TRITON_INTERPRET="0") as compiler,
    ):
        counted = [interpreter.submit(matrix.traffic_rows, *each) for each in to_count]
        compared = [interpreter.submit(with_folder, folder, peers.compare, *each) for each in contenders]
        compiled = [compiler.submit(matrix.compiled_rows, *each) for each in to_compile]
        follow([*counted, *compared, *compiled])
    return (
        [row for future in compiled for row in future.result()],
        [row for future in counted for row in future.result()],
        [future.result() for future in compared],
    )


def counted_on_emulator(
    before: list[tables.RowTraffic], longest: list[tables.LongestRow], only: str
) -> tuple[list[tables.RowTraffic], list[tables.LongestRow]]:
    """What the divergence in CUDA C++ moves, and how long rows may be that it keeps on the chip; as before where the
    emulated kernels are not built."""
    emulated, tasks = emulation.emulated_module(), cuda_traffic.tasks(only)
    if emulated is None or not tasks:
        return before, longest
    with TemporaryDirectory() as folder, emulation.start(emulated, Path(folder) / "sanitizers") as pool:
        counted = [pool.submit(cuda_traffic.counted, *task) for task in tasks]
        measured = [pool.submit(cuda_traffic.longest_rows, dtype) for dtype in PEER_DTYPES]
        follow([*counted, *measured])
    new = [row for future in counted for row in future.result()]
    done = {row.divergence for row in new}
    order = [named(kind) for kind in Kind]
    new += [row for row in before if row.divergence in order and row.divergence not in done]
    new.sort(key=lambda row: order.index(row.divergence))
    return new, [row for future in measured for row in future.result()]


def with_folder(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a process that also finds modules in the folder."""
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    return function(*arguments)


def follow(futures: Iterable[Future[Any]]) -> None:
    """A progress bar over what is computed; the first failure ends it."""
    waiting = list(futures)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling and counting", total=len(waiting))
        for future in as_completed(waiting):
            future.result()
            progress.advance(task)

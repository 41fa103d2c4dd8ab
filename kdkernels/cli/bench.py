"""``kdkernels bench``: ours beside plain PyTorch, compiled PyTorch and Liger-Kernel, on this machine."""

from __future__ import annotations

import enum
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from kdkernels import environment
from kdkernels.backends import NAMES, select
from kdkernels.benchmarking import figures
from kdkernels.benchmarking.contenders import LOSSES, OURS, Call, Contender, ours_on
from kdkernels.benchmarking.memory import peak_extra_bytes
from kdkernels.benchmarking.results import Result, grouped, table, write_csv
from kdkernels.benchmarking.timing import median_ratio, side_by_side
from kdkernels.benchmarking.workloads import MODELS, Inputs, Operation, Workload
from kdkernels.cli.choices import DIVERGENCES, DivergenceName, Dtype, check_device
from kdkernels.cli.terminal import console, fail, progress

__all__ = ["run_bench"]


class ModelName(str, enum.Enum):
    SMOLLM2 = "smollm2"
    LLAMA3 = "llama3"
    QWEN3 = "qwen3"
    GEMMA3 = "gemma3"


AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the loss of a contender may be from ours, relatively, to count as the same loss."""

DEFAULT_OPERATIONS = (Operation.DENSE, Operation.FORWARD, Operation.HEAD)

SIZES = "; ".join(
    f"{name}: {model.checkpoint}, V = {model.vocab:,}, H = {model.hidden:,}" for name, model in MODELS.items()
)


def run_bench(
    model: Annotated[ModelName, typer.Option(help=f"Sizes of a known head. {SIZES}.")] = ModelName.SMOLLM2,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of logits.")] = 512,
    vocab: Annotated[int | None, typer.Option(min=1, help="Vocabulary.", show_default="the model's")] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Student's hidden size.", show_default="the model's")
    ] = None,
    teacher_hidden: Annotated[
        int | None, typer.Option(min=1, help="Teacher's hidden size.", show_default="the student's")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of logits, hidden states and weights.")] = Dtype.FLOAT32,
    divergence: Annotated[DivergenceName, typer.Option(help="Which divergence.")] = DivergenceName.FORWARD_KL,
    operation: Annotated[
        list[Operation] | None,
        typer.Option(
            help="A divergence: dense, of logits, with gradient; forward, without; head, of LM heads; stored, from a stored "
            "top 64. Or topk; sinkhorn, of sequences of 128 tokens; pairs, L1 distances in sequences of 64. May be repeated.",
            show_default="dense, forward, head",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"Ours on it. May be repeated. {', '.join(NAMES)}.", show_default="the best"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated. {', '.join(one.name for one in LOSSES)}.", show_default="all"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (also for ROCm).")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="For how long each operation is timed, all contenders.")] = 8.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, each in a fresh process.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for bench.csv and bench.png.")] = Path("out/bench"),
) -> None:
    """Measure ours beside the others: time (median of alternated runs), its ratio to ours, peak of extra memory.

    Everyone computes the same loss, averaged over the tokens, on the same random inputs: the loss is compared before the
    clock starts. Gradients go to the student's logits, or to its hidden states and weight; the teacher is frozen. A GPU
    keeps the time itself, from a call's first kernel to its last, its cache emptied beforehand.
    """
    device = check_device(device)
    sizes = MODELS[model.value]
    hidden = hidden or sizes.hidden
    known = [one.name for one in LOSSES]
    for name in contender or []:
        if name not in known:
            fail(f"--contender {name!r}: must be one of {', '.join(map(repr, known))}")
    for name in backend or []:
        if name not in NAMES:
            fail(f"--backend {name!r}: must be one of {', '.join(map(repr, NAMES))}")
    ours = [ours_on(name) for name in backend] if backend else LOSSES[:1]
    chosen = [*ours, *(one for one in LOSSES[1:] if one.name in (contender or known))]
    workloads = [
        Workload(
            one,
            DIVERGENCES[divergence.value],
            tokens,
            vocab or sizes.vocab,
            hidden,
            teacher_hidden or hidden,
            dtype.torch,
            device,
        )
        for one in operation or DEFAULT_OPERATIONS
    ]
    results: list[Result] = []
    with progress(counted=False) as bar:
        for workload in workloads:
            task = bar.add_task(workload.operation.label, total=1.0)
            results += measure(
                workload,
                chosen,
                seconds,
                memory,
                lambda done, what, task=task, workload=workload: bar.update(  # type: ignore[misc]
                    task, completed=done, description=f"{workload.operation.label}: {what}"
                ),
            )
    out.mkdir(parents=True, exist_ok=True)
    machine = environment.machine(device)
    write_csv(out / "bench.csv", results, machine)
    output = console()
    best = "" if backend else f"; ours runs on the {select(None, torch.device(device).type)} backend"
    output.print(f"{machine}{best}", soft_wrap=True, markup=False)
    for title, group in grouped(results).items():
        output.print(f"\n{title}", style="bold", soft_wrap=True, markup=False)
        output.print(table([result for result in group if result.seconds is not None]))
        for result in group:
            if result.seconds is None:
                output.print(f"  not measured: {result.contender}, {result.note}", soft_wrap=True, markup=False)
    written = ["bench.csv"]
    try:
        figures.draw(out / "bench.png", results, machine)
        written.append("bench.png")
    except ImportError:
        output.print(f"no bench.png: {figures.MISSING}", soft_wrap=True, markup=False)
    output.print(f"written: {', '.join(str(out / name) for name in written)}", soft_wrap=True, markup=False)
    if any(result.contender.startswith(OURS) and result.seconds is None for result in results):
        raise typer.Exit(1)


Advance = Callable[[float, str], None]


def measure(
    workload: Workload, contenders: list[Contender], seconds: float, memory: bool, advance: Advance
) -> list[Result]:
    """One result per contender. Time takes the first part of the progress bar, memory the rest."""
    advance(0.0, "making inputs")
    inputs = workload.inputs()
    calls, reasons = prepare(workload, contenders, inputs, advance)
    time_share = 0.5 if memory else 0.8
    samples = side_by_side(
        calls,
        workload.device,
        seconds=seconds,
        advance=lambda done: advance(0.2 + time_share * done, "timing"),
    )
    del calls, inputs  # what memory is measured of needs the room
    give_back_memory()
    results = []
    first = contenders[0].name
    for index, contender in enumerate(contenders):
        name = contender.name
        found = Result(
            workload.title,
            name,
            gradient_bytes=workload.gradient_bytes,
            note=reasons.get(name, ""),
            columns=workload.columns,
        )
        if name in samples:
            peak, note = None, ""
            if memory:
                advance(0.2 + time_share + (0.8 - time_share) * index / len(contenders), f"memory of {name}")
                try:
                    peak = peak_extra_bytes(workload, name)
                except RuntimeError as error:
                    note = str(error)
            found = Result(
                workload.title,
                name,
                statistics.median(samples[name]),
                median_ratio(samples[name], samples[first]) if first in samples else None,
                len(samples[name]),
                peak,
                workload.gradient_bytes,
                note,
                workload.columns,
            )
        results.append(found)
    advance(1.0, "done")
    return results


def give_back_memory() -> None:
    """To the device too: other processes cannot have what PyTorch's allocator keeps for itself."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where there is no GPU


def prepare(
    workload: Workload, contenders: list[Contender], inputs: Inputs, advance: Advance
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls of those that can run, and for the others the reason why not. The losses are compared with the first's."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    ours = None
    for index, contender in enumerate(contenders):
        advance(0.2 * index / len(contenders), f"preparing {contender.name}")
        reasons[contender.name] = contender.why_not(workload)
        if reasons[contender.name]:
            continue
        try:
            call = contender.prepare(workload, inputs)
            loss = float(call()[0])
        except Exception as error:  # noqa: BLE001 - whatever another library raises is why it is not measured
            reasons[contender.name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            del error
            give_back_memory()
            continue
        ours = loss if ours is None else ours
        if abs(loss - ours) > AGREEMENT[workload.dtype] * abs(ours):
            reasons[contender.name] = f"it computes another loss: {loss:.6g} instead of {ours:.6g}"
            continue
        calls[contender.name] = call
    return calls, reasons

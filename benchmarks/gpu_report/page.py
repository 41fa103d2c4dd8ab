"""``docs/gpu.md``: what is proven of the GPU kernels, what is modelled, and where measured figures go."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .calls import CALLS
from .hardware import DEVICES, LATENCY
from .peers import PeerTraffic
from .tables import KernelRow, LongestRow, ModelRow, RowTraffic, TrafficRow

__all__ = ["measured", "page"]


def prose(text: str) -> str:
    """A paragraph, however it is broken here."""
    return " ".join(text.split())


TARGET_BYTES = {"fp32": 26, "bf16": 13}
"""Of JSD, forward and backward, per logit position."""
WHY_MORE = prose("""
    These are seven accesses, two sweeps over both rows forward, one backward, and the gradient that is written: anything
    less needs the row kept on the chip between sweeps, as the CUDA kernels do (below).
""")
TARGET_RATIO = 1.15


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first columns are text, the others numbers."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(":--" if place < left else "--:" for place in range(len(head))) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def measured(path: Path) -> dict[tuple[str, str, str], float]:
    """Picoseconds per logit by device, call and dtype; nothing where nobody has measured."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["device"], row["call"], row["dtype"]): float(row["picoseconds"]) for row in csv.DictReader(file)}


def page(
    kernels: Sequence[KernelRow],
    traffic: Sequence[TrafficRow],
    of_cuda: Sequence[RowTraffic],
    longest: Sequence[LongestRow],
    modelled: Sequence[ModelRow],
    peers: Sequence[PeerTraffic],
    found: dict[tuple[str, str, str], float],
    versions: dict[str, str],
    quick: bool,
) -> str:
    parts = [
        "# The GPU kernels, without a GPU",
        prose("""
            Written by `make gpu-report`. **No GPU was used for anything on this page**, but where a column is
            headed *measured*. Compiled code and counts are facts; times are a model of them and no measurement.
        """),
    ]
    if quick:
        parts.append("**This page was written with `--quick`: most of the matrix is missing.**")
    parts += [
        table(
            ("statement", "how it is known", "kind"),
            [
                (
                    "registers, spills, shared memory",
                    "the kernels compiled by Triton and nvcc for each GPU, read with cuobjdump or from AMD's assembly",
                    "proven",
                ),
                ("occupancy", "registers, warps and shared memory against the limits of the architecture", "computed"),
                (
                    "bytes and arithmetic per logit",
                    "every load, store and operation counted while Triton's interpreter runs the kernels",
                    "proven, without caches",
                ),
                (
                    "bytes per logit in CUDA C++",
                    "every load and store of whole rows counted while the block emulator runs the kernels",
                    "proven, without caches",
                ),
                ("instructions per logit", "the loops in the machine code", "proven"),
                ("time", "the above at the rates of the data sheets", "**modelled**"),
            ],
            left=3,
        ),
        *spills(kernels),
        *resources(kernels),
        *byte_counts(traffic),
        *cuda_byte_counts(of_cuda, longest),
        *arithmetic(traffic, kernels),
        *times(modelled, found),
        *side_by_side(peers),
        *sources(versions),
    ]
    return "\n\n".join(parts) + "\n"


def spills(kernels: Sequence[KernelRow]) -> list[str]:
    triton = [row for row in kernels if row.language == "Triton"]
    cuda = [row for row in kernels if row.language == "CUDA"]
    double = [row for row in cuda if row.dtype == "fp64"]
    spilling = [row for row in kernels if row.spilled_bytes and row.dtype != "fp64"]
    text = f"{len(triton)} compiled Triton kernels (call × dtype × architecture)"
    text += f" and {len(cuda) - len(double)} CUDA kernels below double precision" if cuda else ""
    parts = [
        "## Spills",
        f"Of {text}, {len(spilling) or 'none'} {'keep' if len(spilling) != 1 else 'keeps'} registers elsewhere.",
    ]
    if spilling:
        rows = [
            (f"`{row.kernel}`", row.call, row.dtype, row.target, f"{row.registers}", f"{row.spilled_bytes}")
            for row in spilling
        ]
        parts.append(
            table(("kernel", "call", "dtype", "target", "registers", "spilled bytes per thread"), rows, left=4)
        )
        parts.append(
            prose("""
                Left alone, NVIDIA's compiler may spill a few registers to fit one more block on a multiprocessor.
            """)
        )
    if kept := [row for row in kernels if row.scalars_in_lanes]:
        parts.append(
            prose(f"""
                On gfx942 {len(kept)} of these keep up to {max(row.scalars_in_lanes for row in kept)} scalar registers
                in lanes of a vector register: on the chip, so that they are not counted as spilled.
            """)
        )
    if not cuda:
        parts.append(
            "The CUDA extension (`csrc/cuda`) was not built where this page was written: its kernels are not in it."
        )
    else:
        parts.append(
            prose(f"""
                Of CUDA kernels the occupancy is that of the largest block that their launch bounds allow (read from
                the compiled file) and of static shared memory: a launch may take smaller blocks, and dynamic shared
                memory. All local memory counts as spilled. Of {len(double)} in double precision
                {sum(row.spilled_bytes > 0 for row in double)} spill.
            """)
        )
    return parts


def resources(kernels: Sequence[KernelRow]) -> list[str]:
    parts = [
        "## Registers and occupancy",
        prose("""
            Registers of a thread and the share of a multiprocessor's warps that fit at once: of each kernel's
            versions the one that leaves most room empty. All of them, with shared memory and what limits them:
            [gpu/kernels.csv](gpu/kernels.csv).
        """),
    ]
    for language in dict.fromkeys(row.language for row in kernels):
        rows = [row for row in kernels if row.language == language]
        targets = list(dict.fromkeys(row.target for row in rows))
        lines = []
        for kernel in dict.fromkeys(row.kernel for row in rows):
            cells = [f"`{kernel}`"]
            for target in targets:
                versions = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
                fullest = min(versions, key=lambda row: row.occupancy, default=None)
                cells.append(f"{fullest.registers}, {fullest.occupancy:.0%}" if fullest else "–")
            lines.append(cells)
        parts.append(table((f"{language} kernel", *targets), lines))
    return parts


def byte_counts(traffic: Sequence[TrafficRow]) -> list[str]:
    by: dict[tuple[str, str], list[TrafficRow]] = {}
    for row in traffic:
        by.setdefault((row.call, row.dtype), []).append(row)
    rows = []
    for name, call in CALLS.items():
        if call.family != "divergence":
            continue
        cells = [name.removeprefix("divergence ")]
        for dtype in ("fp32", "bf16"):
            sums = {row.kernel: row.bytes for row in by.get((name, dtype), [])}
            forward, backward = (sums.get(f"divergence_{way}") for way in ("forward", "backward"))
            if forward is None or backward is None:
                cells += ["–"] * 3
            else:
                cells += [f"{forward:.1f}", f"{backward:.1f}", f"**{forward + backward:.1f}**"]
        rows.append(tuple(cells))
    others = []
    for name, call in CALLS.items():
        if call.family == "divergence":
            continue
        double = call.dtypes == ("fp64",)
        totals = [by.get((name, dtype)) for dtype in (("fp64",) * 2 if double else ("fp32", "bf16"))]
        title = f"{name} (in fp64)" if double else name
        others.append(
            (title, *(f"{sum(row.bytes for row in total):.1f}" if total else "–" for total in totals), call.unit)
        )
    remarks = []
    for dtype in TARGET_BYTES:
        if members := by.get(("divergence JSD", dtype)):
            total = sum(row.bytes for row in members)
            remarks.append(against_goal(total, dtype))
    return [
        "## Bytes per logit",
        prose("""
            Loaded and stored per position of the logits, the student's gradient included, caches not counted.
            Divergences without a one-sweep form (JSD and its kind) read both rows twice in the forward; the second
            sweep goes backwards, so that it begins with what the caches still hold, of which these figures know
            nothing.
        """)
        + (f" JSD, forward and backward: {', '.join(remarks)}. {WHY_MORE}" if remarks else ""),
        table(("divergence", "fp32 forward", "backward", "both", "bf16 forward", "backward", "both"), rows),
        "All kernels of the other calls together:",
        table(("call", "fp32", "bf16", "per"), others),
        "By kernel, with what is loaded and what is stored: [gpu/traffic.csv](gpu/traffic.csv).",
    ]


def against_goal(total: float, dtype: str) -> str:
    most = TARGET_BYTES[dtype]
    return f"{total:.1f} in {dtype} ({'within' if total <= most + 0.05 else 'above'} the goal of {most})"


def cuda_byte_counts(traffic: Sequence[RowTraffic], longest: Sequence[LongestRow]) -> list[str]:
    """With rows kept on the chip, and without."""
    if not traffic:
        return []
    dtypes = ("fp32", "bf16")
    by: dict[tuple[str, str, str], list[float]] = {}
    for row in traffic:
        by.setdefault((row.divergence, row.call, row.dtype), []).append(row.bytes)
    lines = []
    for divergence in dict.fromkeys(row.divergence for row in traffic):
        cells = [divergence]
        for dtype in dtypes:
            forward, backward, fused = (by[divergence, call, dtype] for call in ("forward", "backward", "fused"))
            cells += [f"{min(forward):.1f}", f"**{min(fused):.1f}**"]
            cells += [f"{max(forward):.1f}", f"{max(backward):.1f}", f"{max(fused):.1f}"]
        lines.append(cells)
    goals = [
        ", ".join(against_goal(choose(by["JSD", "fused", dtype]), dtype) for dtype in dtypes) for choose in (min, max)
    ]
    limits = {(row.target, row.dtype): f"{row.vocab:,}" for row in longest}
    targets = dict.fromkeys(row.target for row in longest)
    head = [
        f"{dtype} {column}"
        for dtype in dtypes
        for column in ("kept: forward", "fused", "not: forward", "backward", "fused")
    ]
    return [
        "### In CUDA C++",
        prose("""
            The divergence of `csrc/cuda`, by what its threads load and store of whole rows while the block emulator runs
            it. *Kept*: a row of both sides fits into the shared memory of a block, or of the blocks of a cluster; one
            launch then reads each logit once for the value and the gradient. *Not*: it does not fit, and they are two
            launches. Forward by itself keeps rows only where it would sweep over them twice; backward by itself reads them
            once either way.
        """)
        + f" JSD, value and gradient: kept, {goals[0]}; not kept, {goals[1]}.",
        table(("divergence", *head), lines),
        "The largest vocabulary whose rows are kept, both sides of the dtype:",
        table(
            ("architecture", *dtypes), [(target, *(limits[target, dtype] for dtype in dtypes)) for target in targets]
        ),
        "With loads and stores apart: [gpu/cuda_traffic.csv](gpu/cuda_traffic.csv).",
    ]


def arithmetic(traffic: Sequence[TrafficRow], kernels: Sequence[KernelRow]) -> list[str]:
    rows = []
    for name, call in CALLS.items():
        counted = [row for row in traffic if row.call == name and row.dtype == "bf16"]
        compiled = [row for row in kernels if row.call == name and row.dtype == "bf16" and row.target == "sm_90"]
        if call.streams is None or not counted:
            continue
        sums = [sum(getattr(row, kind) for row in counted) for kind in ("arithmetic", "special", "divisions")]
        machine = [sum(getattr(row, kind) for row in compiled) for kind in ("instructions", "arithmetic", "special")]
        rows.append((name, *(f"{number:.1f}" for number in (*sums, *machine))))
    return [
        "## Arithmetic per logit",
        prose("""
            Left, what the source asks for, counted in the interpreter (bf16 logits, all kernels of a call):
            additions, multiplications, maxima and the steps of sums, one each; exponentials and logarithms;
            divisions. Right, instructions of a thread in the loops of the machine code for sm_90: all of them, of
            these single-precision additions, multiplications and both at once, and those of the special-function
            units.
        """),
        table(("call", "operations", "exp, log", "divisions", "instructions", "of these FP32", "special"), rows),
    ]


def times(modelled: Sequence[ModelRow], found: dict[tuple[str, str, str], float]) -> list[str]:
    rows = []
    for row in modelled:
        if row.call not in SHOWN or row.dtype == "fp16":
            continue
        time = found.get((row.device, row.call, row.dtype))
        rows.append(
            (
                row.device,
                row.call,
                row.dtype,
                f"{row.memory:.2f}",
                f"{row.modelled:.2f}",
                f"{row.over_memory:.2f}",
                row.bound,
                "–" if time is None else f"{time:.2f}",
            )
        )
    divergences = [row for row in modelled if row.call.startswith("divergence") and row.dtype != "fp16"]
    within = [row for row in divergences if row.over_memory <= TARGET_RATIO]
    beyond = sorted((row for row in divergences if row.over_memory > TARGET_RATIO), key=lambda row: -row.over_memory)
    remark = f"Within {TARGET_RATIO} times the time of memory alone: {len(within)} of {len(divergences)} "
    remark += "combinations of divergence, dtype and device."
    if beyond:
        listed = ", ".join(
            f"{row.call.removeprefix('divergence ')} {row.dtype} on {row.device} ({row.over_memory:.2f}, {row.bound})"
            for row in beyond[:6]
        )
        remark += f" Beyond it: {listed}{', and others' if len(beyond) > 6 else ''}."
        if any("skew" in row.call and row.bound == "special" for row in beyond):
            remark += (
                " Of special functions the skew divergences take no more than their formulas have: an exponential of each"
                " side in the first sweep, and again in the second and in the backward, where the reciprocal of the"
                " mixture and, unless the form drops it, its logarithm join them."
            )
    elsewhere = sorted(
        {
            (row.call, row.bound)
            for row in modelled
            if not row.call.startswith("divergence") and row.over_memory > TARGET_RATIO
        }
    )
    if elsewhere:
        limited: dict[str, list[str]] = {}
        for call, bound in elsewhere:
            limited.setdefault(call, []).append(bound)
        names = "; ".join(f"{call} ({', '.join(bounds)})" for call, bounds in limited.items())
        remark += f" Other kernels that the model finds limited by something else than memory on some device: {names}."
    return [
        "## Modelled time",
        prose(f"""
            **A model, not a measurement.** Each kernel takes as long as the slowest of these alone: its bytes at
            the bandwidth of the data sheet, its instructions, its single-precision arithmetic, its special
            functions at the rates of the architecture, and its loads at a latency of {LATENCY * 1e6:g} µs with as
            many of them under way as the occupancy allows. Real kernels overlap these imperfectly and no memory
            reaches its data sheet, so expect more. Picoseconds per logit position, forward and backward;
            *memory*: by bytes and bandwidth alone; *ratio*: the one in the other.
        """),
        remark,
        "![Modelled time over memory time](gpu/roofline.png)",
        table(("device", "call", "dtype", "memory", "modelled", "ratio", "bound by", "measured"), rows, left=3),
        prose("""
            All of them: [gpu/model.csv](gpu/model.csv). *Measured* is filled from `docs/gpu/measured.csv`
            (columns `device`, `call`, `dtype`, `picoseconds`), which is made on a GPU.
        """),
    ]


SHOWN = ("divergence forward KL", "divergence JSD", "sparse_divergence forward KL, bucket", "bernoulli KL")


def side_by_side(peers: Sequence[PeerTraffic]) -> list[str]:
    rows = []
    for row in peers:
        name = f"{row.library} {row.version}".strip()
        if row.problem:
            rows.append((row.loss, row.dtype, name, "–", "–", "–", row.problem.replace("|", "/")))
        else:
            kernels, operations = row.kernels_loaded + row.kernels_stored, row.torch_loaded + row.torch_stored
            rows.append((row.loss, row.dtype, name, f"{kernels:.0f}", f"{operations:.0f}", f"**{row.total:.0f}**", ""))
    return [
        "## Side by side",
        prose("""
            Bytes per logit position, forward and backward, of other libraries by the same count. Kernels are
            counted in the interpreter; PyTorch's operations around them (softmaxes, their gradients, scalings) by
            the sizes of their operands, which is the least they can move. Matrix products are left out on all
            sides. From logits, the softmaxes that a library's kernel wants beforehand count. From heads, kdkernels makes
            the logits in the dtype of the heads, and Liger-Kernel in float32 whatever that is.
        """),
        "![Bytes per logit](gpu/bytes.png)",
        table(("loss", "dtype", "library", "kernels", "PyTorch", "together", "not counted because"), rows, left=3),
    ]


def sources(versions: dict[str, str]) -> list[str]:
    return [
        "## Where the figures are from",
        "\n".join(f"- {name}: {device.source}." for name, device in DEVICES.items()),
        prose("""
            Occupancy: CUDA C++ Programming Guide, technical specifications per compute capability, with the
            arithmetic of NVIDIA's occupancy calculator; for gfx942 the limits in LLVM's AMDGPU target. Compiled with
        """)
        + " "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]

"""Records of truncated teachers on the CPU: throughput on one thread, and divergence against size beside plain formats.

The real teacher is the example's (SmolLM2-135M); without its packages that part is skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from reporting import SideBySide, Target
from torch import Tensor

import kdkernels as kd
from kdkernels.benchmarking import figures
from kdkernels.sources import CODECS

VOCAB = 131_072  # of the sizes that are promised; the ids of the real teacher fit in
ZIPF_VOCAB = 49_152
TOKENS = 1024
BATCH = 8192  # tokens whose records are timed: the same over and over
WIDTHS = (16, 24, 32, 48, 50, 64, 96, 128)
TOP_P, TOP_P_WIDTH = 0.95, 100
COUNT_BYTES = 2  # per token, where the counts differ

# DistillKit's own code on Zipf-like logits at V = 49,152: bytes per token, mean KL with the tail in nats.
PEER = "DistillKit (its own code)"
DISTILLKIT = ((114, 0.11), (129, 5.1e-4), (312, 3.8e-4), (340, 4.9e-5))


class Teacher(NamedTuple):
    """The 128 likeliest ids of some tokens ``[N, 128]``, in descending order, and their log-probabilities in float64."""

    ids: Tensor
    log_probs: Tensor

    def topk(self, width: int) -> kd.TopKLogits:
        return self.source(torch.ones(len(self.ids), width, dtype=torch.bool))

    def top_p(self, mass: float, width: int) -> kd.TopKLogits:
        """The shortest prefix of each row with so much mass."""
        before = self.log_probs[:, :width].exp().cumsum(1) - self.log_probs[:, :width].exp()
        return self.source(before < mass)

    def source(self, kept: Tensor) -> kd.TopKLogits:
        width = kept.shape[1]
        log_probs = self.log_probs[:, :width].masked_fill(~kept, -torch.inf)
        return kd.TopKLogits(
            self.ids[:, :width].masked_fill(~kept, -1),
            log_probs,
            vocab_size=VOCAB,
            log_tail_mass=torch.log1p(-log_probs.exp().sum(1)),
        )


class Point(NamedTuple):
    format: str
    entries: float
    """Per token, on average."""
    bytes_per_token: float
    divergence: float
    """Mean KL(true || stored) in nats over the stored entries and the rest as one outcome."""


@pytest.fixture(scope="module")
def real_teacher() -> Teacher:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import smollm2

    try:
        teacher, tokenizer = smollm2.load_teacher(torch.device("cpu"))
    except smollm2.MissingRequirementError as error:
        pytest.skip(str(error))
    sequences = smollm2.load_text(tokenizer, 512).training
    rows = []
    for sequence in sequences[:: len(sequences) // (TOKENS // 512)][: TOKENS // 512]:
        with torch.no_grad():
            logits = teacher(sequence[None]).logits[0].double()
        values, ids = logits.topk(max(WIDTHS), -1)
        rows.append((ids, values - torch.logsumexp(logits, -1, keepdim=True)))
    return Teacher(torch.cat([ids for ids, _ in rows]), torch.cat([log_probs for _, log_probs in rows]))


@pytest.fixture(scope="module")
def zipf_teacher() -> Teacher:
    """Logits -1.1 log(rank) with normal noise of variance 1, over a vocabulary in random order."""
    generator = torch.Generator().manual_seed(0)
    logits = -1.1 * torch.arange(1, ZIPF_VOCAB + 1).double().log()
    logits = logits + torch.randn(TOKENS, ZIPF_VOCAB, generator=generator, dtype=torch.float64)
    logits = logits[:, torch.randperm(ZIPF_VOCAB, generator=generator)]
    log_probs, ids = torch.log_softmax(logits, -1).topk(max(WIDTHS), -1)
    return Teacher(ids, log_probs)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def divergence(log_p: Tensor, tail_p: Tensor, log_q: Tensor, tail_q: Tensor) -> float:
    """Mean KL(p || q) over entries and tail; outcomes of p = 0 add nothing."""
    p, q = torch.cat([log_p, tail_p[:, None]], 1), torch.cat([log_q, tail_q[:, None]], 1)
    q = q - torch.logsumexp(q, 1, keepdim=True)
    return float(torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum(1).mean())


def packed_point(name: str, topk: kd.TopKLogits, codec: str, vocab: int) -> Point:
    """``vocab`` decides the size; it must hold the ids."""
    source = kd.TopKLogits(topk.ids, topk.log_probs, vocab_size=vocab, log_tail_mass=topk.log_tail_mass)
    packed = kd.pack(source, codec)
    found = kd.unpack(packed)
    place = topk.ids.masked_fill(topk.ids < 0, vocab).sort(1).indices[:, : found.ids.shape[1]]
    assert torch.equal(found.ids, topk.ids.gather(1, place))
    assert topk.log_tail_mass is not None
    assert found.log_tail_mass is not None
    value = divergence(
        topk.log_probs.gather(1, place), topk.log_tail_mass, found.log_probs.double(), found.log_tail_mass.double()
    )
    ragged = len(packed.counts.unique()) > 1
    size = len(packed.data) / len(packed.counts) + (COUNT_BYTES if ragged else 0)
    return Point(name, float(packed.counts.double().mean()), size, value)


def plain_point(name: str, topk: kd.TopKLogits, dtype: torch.dtype, id_bits: int) -> Point:
    """Ids of a fixed size beside log-probabilities in half precision; the tail is what they leave, at least 1e-6."""
    stored = topk.log_probs.to(dtype).double()
    tail = (1 - stored.exp().sum(1)).clamp(min=1e-6).log()
    assert topk.log_tail_mass is not None
    width = topk.ids.shape[1]
    value = divergence(topk.log_probs, topk.log_tail_mass, stored, tail)
    return Point(name, width, width * (id_bits + 16) / 8, value)


def points(teacher: Teacher, vocab: int) -> list[Point]:
    id_bits = (vocab - 1).bit_length()
    found = []
    for width in WIDTHS:
        topk = teacher.topk(width)
        found += [packed_point(codec, topk, codec, vocab) for codec in CODECS]
        found.append(plain_point(f"{id_bits}-bit ids, bf16", topk, torch.bfloat16, id_bits))
        found.append(plain_point("int32 ids, fp16", topk, torch.float16, 32))
    return found


def markdown(title: str, found: Iterable[Point]) -> str:
    lines = [
        f"**{title}**",
        "",
        "| format | entries per token | bytes per token | mean KL (nats) |",
        "|:--|--:|--:|--:|",
    ]
    lines += [
        f"| {each.format} | {each.entries:.4g} | {each.bytes_per_token:.1f} | {each.divergence:.2e} |" for each in found
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, panels: dict[str, list[Point]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(CODECS, ("#d9a441", "#1f6f8b", "#124559", "#6b8f71"), strict=True))
    for axes, (title, found) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name in dict.fromkeys(each.format for each in found):
            line = [each for each in found if each.format == name]
            sizes, values = [each.bytes_per_token for each in line], [each.divergence for each in line]
            if name == PEER:
                axes.plot(sizes, values, "*", color="#b5483a", markersize=8, label=name)
                continue
            ours = name in colours
            style = {"color": colours.get(name, "#9aa3a9" if "int32" in name else "#5c656b"), "markersize": 4}
            label = f"kdkernels {name}" if ours else name
            axes.plot(sizes, values, "o-" if ours else "s--", label=label, **style)
            for each, side in ((line[0], "right"), (line[-1], "left")):
                place = (each.bytes_per_token, each.divergence)
                offset = (-5, -2) if side == "right" else (5, -2)
                axes.annotate(f"k={each.entries:.0f}", place, offset, textcoords="offset points", fontsize=6, ha=side)
        axes.set(xscale="log", yscale="log", xlabel="bytes per token")
        axes.set_xlim(28, 1100)
        axes.set_xticks([32, 64, 128, 256, 512, 768], ["32", "64", "128", "256", "512", "768"])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9, fontweight="bold", loc="left")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean KL(true ‖ stored), nats")
    figure.savefig(path, dpi=130)


def pack_call(topk: kd.TopKLogits, codec: str) -> Callable[[], object]:
    return lambda: kd.pack(topk, codec)


def unpack_call(packed: kd.PackedLogits) -> Callable[[], object]:
    return lambda: kd.unpack(packed)


@pytest.mark.parametrize("width", [64, 128])
def test_throughput(side_by_side: SideBySide, zipf_teacher: Teacher, one_thread: None, width: int) -> None:
    repeated = (each.repeat(BATCH // TOKENS, 1) for each in zipf_teacher)
    topk = Teacher(*repeated).topk(width)
    topk.log_probs = topk.log_probs.float()
    entries = topk.ids.numel()
    calls: dict[str, Callable[[], object]] = {}
    calls |= {f"kdkernels pack {codec}": pack_call(topk, codec) for codec in CODECS}
    calls |= {f"kdkernels unpack {codec}": unpack_call(kd.pack(topk, codec)) for codec in CODECS}
    calls["torch: ids as int32, values as fp16"] = lambda: (topk.ids.int(), topk.log_probs.half())
    title = f"records, one thread: {BATCH} tokens × {width} entries, V={VOCAB:,}, cpu"
    side_by_side.measure(title, calls, rounds=15, columns={"tokens": BATCH, "entries": width, "vocab": VOCAB})
    for codec in CODECS:
        for verb, rate in (("pack", 20), ("unpack", 100)):
            what = f"{verb} {codec}, {entries:,} entries at {rate} million per second"
            side_by_side.time(what, f"kdkernels {verb} {codec}", entries / rate)


def test_divergence_by_size(
    side_by_side: SideBySide, real_teacher: Teacher, zipf_teacher: Teacher, request: pytest.FixtureRequest
) -> None:
    side_by_side.measure(
        f"records of real logits: {TOKENS} tokens × 64 entries, cpu",
        {f"kdkernels pack {codec}": pack_call(real_teacher.topk(64), codec) for codec in CODECS},
        rounds=9,
        columns={"tokens": TOKENS, "entries": 64, "vocab": VOCAB},
    )
    real, zipf = points(real_teacher, VOCAB), points(zipf_teacher, ZIPF_VOCAB)
    cut = real_teacher.top_p(TOP_P, TOP_P_WIDTH)
    name = f"top-p {TOP_P}, k ≤ {TOP_P_WIDTH}"
    ragged = [packed_point(f"{codec}, {name}", cut, codec, VOCAB) for codec in CODECS]
    panels = {
        f"SmolLM2-135M, {TOKENS} tokens; sizes at V = {VOCAB:,}": real,
        f"Zipf-like logits, V = {ZIPF_VOCAB:,}": [
            *zipf,
            *(Point(PEER, 0, size, value) for size, value in DISTILLKIT),
        ],
    }
    folder = request.config.rootpath / "out" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    tables = [markdown(title, (each for each in found if each.format != PEER)) for title, found in panels.items()]
    tables.append(markdown(f"SmolLM2-135M, {name}, two bytes of count per token included", ragged))
    (folder / "records_size.md").write_text("\n".join(tables), encoding="utf-8")
    try:
        draw(folder / "records_size.png", panels)
    except ImportError:
        print(f"no records_size.png: {figures.MISSING}")
    for width, size, value in ((50, 127, 2.5e-4), (128, 295, 4e-4)):
        point = next(each for each in real if each.format == "q6" and each.entries == width)
        targets = ((f"bytes per token, k={width}, q6", point.bytes_per_token, size, " B"),)
        targets += ((f"mean KL on real logits, k={width}, q6", point.divergence, value, " nats"),)
        side_by_side.targets += [Target(what, found, bound, unit=unit) for what, found, bound, unit in targets]
    for size, value in DISTILLKIT:
        ours = min(
            each.divergence for each in zipf if each.format in CODECS and 0.8 * size <= each.bytes_per_token <= size
        )
        what = f"Zipf-like logits, at most {size} bytes per token: mean KL, half of DistillKit's"
        side_by_side.targets.append(Target(what, ours, value / 2, unit=" nats"))

"""Bar charts of results: a row of panels per workload, time on the left, peak memory on the right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdkernels.benchmarking.results import Result, format_bytes, format_seconds, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MISSING", "draw"]

MISSING = 'figures need matplotlib, which is not installed: pip install "kdkernels[bench]"'

OURS_COLOUR, OTHER_COLOUR, GRADIENT_COLOUR = "#1f6f8b", "#b0b7bd", "#d9a441"
BAR_INCHES, TITLE_INCHES, WIDTH_INCHES = 0.36, 0.95, 11.0


def colours(results: Sequence[Result]) -> list[str]:
    return [OURS_COLOUR if result.contender.startswith("kdkernels") else OTHER_COLOUR for result in results]


def label_bars(axes: Axes, results: Sequence[Result], lengths: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_yticks(range(len(results)), [result.contender for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, max(lengths) * 1.38 or 1)
    for place, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        axes.annotate(text, (length, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.tick_params(labelsize=8, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_times(axes: Axes, results: Sequence[Result]) -> None:
    milliseconds = [result.seconds * 1e3 for result in results if result.seconds is not None]
    unit, scale = ("µs", 1e3) if max(milliseconds) < 1 else ("ms", 1.0)
    lengths = [value * scale for value in milliseconds]
    axes.barh(range(len(results)), lengths, color=colours(results), height=0.7)
    texts = [
        format_seconds(result.seconds) + ("" if result.ratio is None else f"  ({result.ratio:.2f}×)")
        for result in results
    ]
    label_bars(axes, results, lengths, texts)
    axes.set_xlabel(f"{unit}, median (× the first)", fontsize=8)


def draw_memory(axes: Axes, results: Sequence[Result]) -> None:
    peaks = [(result.peak_bytes or 0) / 2**20 for result in results]
    gradients = [min(peak, (result.gradient_bytes or 0) / 2**20) for peak, result in zip(peaks, results, strict=True)]
    axes.barh(range(len(results)), gradients, color=GRADIENT_COLOUR, height=0.7, label="gradients that are returned")
    rest = [peak - gradient for peak, gradient in zip(peaks, gradients, strict=True)]
    axes.barh(range(len(results)), rest, left=gradients, color=colours(results), height=0.7)
    label_bars(axes, results, peaks, [format_bytes(result.peak_bytes) for result in results])
    axes.set_xlabel("MiB, peak of extra memory", fontsize=8)
    if any(gradients):
        axes.legend(fontsize=7, loc="lower right", frameon=False)


def draw(path: Path, results: Sequence[Result], machine: str) -> None:
    """Writes the chart as PNG.

    Raises:
        ImportError: matplotlib is not installed; ``MISSING`` says what to do.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {
        workload: [result for result in group if result.seconds is not None]
        for workload, group in grouped(results).items()
    }
    groups = {workload: group for workload, group in groups.items() if group}
    if not groups:
        return
    with_memory = any(result.peak_bytes is not None for group in groups.values() for result in group)
    heights = [TITLE_INCHES + BAR_INCHES * len(group) for group in groups.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (workload, group) in zip(panels, groups.items(), strict=True):
        panel.suptitle(workload, fontsize=9, fontweight="bold", x=0.01, ha="left")
        axes = panel.subplots(1, 2 if with_memory else 1, squeeze=False)[0]
        draw_times(axes[0], group)
        measured = [result for result in group if result.peak_bytes is not None]
        if measured:
            draw_memory(axes[1], measured)
        elif with_memory:
            axes[1].set_axis_off()
    figure.supxlabel(textwrap.fill(machine, 150), fontsize=7, color="#555555")
    figure.savefig(path, dpi=130)

"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from .hardware import DEVICES
from .peers import PeerTraffic
from .tables import ModelRow, RowTraffic

__all__ = ["draw_bytes", "draw_roofline"]

TARGET = 1.15
MARKERS = dict(zip(DEVICES, "osD^", strict=True))


def draw_roofline(path: Path, rows: Sequence[ModelRow]) -> None:
    """Modelled time over that by bytes and bandwidth alone, of every divergence on every device."""
    dtypes = [dtype for dtype in ("fp32", "bf16") if any(row.dtype == dtype for row in rows)]
    calls = list(dict.fromkeys(row.call for row in rows if row.call.startswith("divergence")))[::-1]
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 1.6 + 0.36 * len(calls)), sharey=True, squeeze=False
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for shift, (device, marker) in enumerate(MARKERS.items()):
            points = [
                (row.over_memory, calls.index(row.call))
                for row in rows
                if row.device == device and row.dtype == dtype and row.call in calls
            ]
            panel.scatter(
                [ratio for ratio, _ in points],
                [place + 0.12 * (1.5 - shift) for _, place in points],
                marker=marker,
                s=26,
                label=device,
                zorder=3,
            )
        panel.axvline(1, color="black", linewidth=1)
        panel.axvline(TARGET, color="grey", linewidth=1, linestyle="--")
        panel.set_title(f"{dtype} logits")
        panel.set_xlabel("modelled time / time by memory alone")
        panel.set_xlim(left=0.95, right=max(1.3, *(row.over_memory + 0.05 for row in rows if row.call in calls)))
        panel.set_ylim(-0.6, len(calls) - 0.4)
        panel.set_yticks(range(len(calls)), [call.removeprefix("divergence ") for call in calls])
        panel.grid(axis="both", alpha=0.25)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Modelled, not measured: row kernels, forward and backward. Dashed: the goal of 1.15", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


ON_CHIP = "kdkernels, CUDA C++"


def kept_on_chip(peers: Sequence[PeerTraffic], of_cuda: Sequence[RowTraffic]) -> list[PeerTraffic]:
    """Of the losses that peers compute, what the divergence in CUDA C++ moves where shared memory can hold a row.

    Heads have the gradient in the launch that makes the value; of logits, autograd asks for it later.
    """
    found = []
    for loss, dtype in dict.fromkeys((row.loss, row.dtype) for row in peers):
        calls = ("fused",) if "heads" in loss else ("forward", "backward")
        mine = [row for row in of_cuda if loss.startswith(f"{row.divergence} ") and row.dtype == dtype]
        if mine:
            least = [min((row for row in mine if row.call == call), key=lambda row: row.loaded) for call in calls]
            loaded, stored = sum(row.loaded for row in least), sum(row.stored for row in least)
            found.append(PeerTraffic(ON_CHIP, "", loss, dtype, loaded, stored, 0.0, 0.0))
    return found


def draw_bytes(path: Path, peers: Sequence[PeerTraffic], of_cuda: Sequence[RowTraffic]) -> None:
    """Bytes per logit, those of kernels and those of PyTorch's operations, of every loss that two libraries were counted for."""
    counted = [row for row in (*peers, *kept_on_chip(peers, of_cuda)) if not row.problem]
    groups = [
        (loss, dtype)
        for loss, dtype in dict.fromkeys((row.loss, row.dtype) for row in counted)
        if len({row.library for row in peers if (row.loss, row.dtype, row.problem) == (loss, dtype, "")}) > 1
    ]
    bars = [
        (row, f"{row.library}, {row.dtype}") for group in groups for row in counted if (row.loss, row.dtype) == group
    ]
    figure, panel = plt.subplots(figsize=(8.5, 1.4 + 0.3 * len(bars) + 0.3 * len(groups)))
    place, ticks, names, previous = 0.0, [], [], ""
    for row, name in bars:
        if row.loss != previous:
            place -= 1.1
            panel.text(0, place, row.loss, fontsize=9, fontweight="bold", va="center")
            previous = row.loss
        place -= 0.95
        kernels, torch_bytes = row.kernels_loaded + row.kernels_stored, row.torch_loaded + row.torch_stored
        panel.barh(place, kernels, 0.75, color="#1f6fb4")
        panel.barh(place, torch_bytes, 0.75, left=kernels, color="#e0a03c")
        panel.text(row.total + 1, place, f"{row.total:.0f}", va="center", fontsize=9)
        ticks.append(place)
        names.append(name)
    panel.set_yticks(ticks, names, fontsize=9)
    panel.set_xlabel("bytes loaded and stored per logit position, forward and backward")
    panel.set_xlim(right=1.08 * max(row.total for row, _ in bars))
    panel.barh([place], [0], color="#1f6fb4", label="kernels (CUDA C++: where a row fits on the chip)")
    panel.barh([place], [0], color="#e0a03c", label="operands of PyTorch's operations")
    panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

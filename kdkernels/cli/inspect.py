"""``kdkernels inspect``: what is in a store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import kdkernels as kd
from kdkernels.benchmarking.figures import MISSING
from kdkernels.benchmarking.results import format_bytes
from kdkernels.cli.terminal import console, fail
from kdkernels.store import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["show_store"]


def show_store(
    store: Annotated[str, typer.Argument(help="Folder of the store, or a URL that fsspec knows.")],
    picture: Annotated[
        Path | None, typer.Option(help="Draw histograms of the kept mass and of the entropy into this PNG file.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Statistics are taken from about so many tokens.")] = 1 << 18,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a store holds: of which teacher and text, how large it is, how much of the distributions it keeps."""
    try:
        found = kd.store.summary(store, sample_tokens=tokens)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    if as_json:
        typer.echo(json.dumps(as_record(found), indent=2))
    else:
        show(store, found)
    if picture is not None:
        try:
            draw(picture, store, found)
        except ImportError:
            fail(f"--picture: {MISSING}", 1)
        except OSError as error:
            fail(f"--picture {picture}: {error.strerror}", 1)
        typer.echo(f"written: {picture}", err=True)


def as_record(found: Summary) -> dict[str, Any]:
    """Everything but the histograms."""
    record = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if not field.name.endswith("_histogram")
    }
    return record | {"description": found.description.values(), "bytes_per_token": found.bytes_per_token}


def show(store: str, found: Summary) -> None:
    description = found.description
    per_token = {
        "records": found.record_bytes,
        "counts": found.count_bytes,
        "input ids": found.input_id_bytes,
        "headers, index, manifest": found.bytes - found.record_bytes - found.count_bytes - found.input_id_bytes,
    }
    cut = f"{description.k or 'any number of'} entries per token"
    if description.top_p is not None:
        cut += f", fewer where they reach {description.top_p:g} of the probability"
    sections = [
        [
            ("teacher", description.teacher or "not named"),
            ("tokenizer", description.tokenizer or "not named"),
            ("text", description.data or "not named"),
            ("vocabulary", f"{description.vocab_size:,}"),
            ("temperature", f"{description.temperature:g}"),
            ("cut", cut),
            ("tail", description.tail),
            ("codec", description.codec),
        ],
        [
            ("sequences", f"{found.sequences:,}"),
            ("tokens", f"{found.tokens:,}"),
            (
                "shards",
                f"{found.shards:,}" + ("" if found.joined == found.shards else f", {found.joined:,} in the manifest"),
            ),
            ("size", format_bytes(found.bytes)),
            ("bytes per token", f"{found.bytes_per_token:.2f}"),
            *((f"  {name}", f"{size / max(1, found.tokens):.2f}") for name, size in per_token.items()),
        ],
        [
            ("entries per token", f"{found.mean_entries:.1f}"),
            ("mass kept", f"{found.mean_kept_mass:.4f}"),
            ("entropy of what is kept", f"{found.mean_kept_entropy:.3f} nats"),
            ("these means are of", f"{found.sampled_tokens:,} tokens"),
        ],
    ]
    table = Table(title=store, title_justify="left", show_header=False)
    for lines in sections:
        for name, value in lines:
            table.add_row(name, value)
        table.add_section()
    console().print(table, markup=False)


def draw(file: Path, store: str, found: Summary) -> None:
    """Two histograms as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    mass, entropy = figure.subplots(1, 2)
    draw_histogram(mass, found.kept_mass_histogram, found.mean_kept_mass, "{:.4f}", "#1f6f8b")
    mass.set_title("Probability kept")
    mass.set_xlabel("sum of the kept probabilities of a token")
    draw_histogram(entropy, found.kept_entropy_histogram, found.mean_kept_entropy, "{:.2f} nats", "#d9a441")
    entropy.set_title("Entropy of what is kept")
    entropy.set_xlabel("-sum p log p over the kept entries of a token, in nats")
    description = found.description
    figure.suptitle(
        f"{Path(store).name}: {found.tokens:,} tokens, k = {description.k}, {description.codec}, "
        f"{found.bytes_per_token:.1f} bytes per token",
        fontsize=10,
    )
    figure.savefig(file, format="png")


def draw_histogram(axes: Axes, histogram: tuple[Any, Any], mean: float, form: str, colour: str) -> None:
    counts, edges = histogram
    shares = counts / max(1, counts.sum())
    axes.bar(edges[:-1], shares, width=edges[1:] - edges[:-1], align="edge", color=colour)
    axes.axvline(mean, color="#333333", linewidth=1, linestyle="--", label=f"mean {form.format(mean)}")
    axes.set_ylabel("share of tokens")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

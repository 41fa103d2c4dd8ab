"""``kdkernels losses``: every published objective there is a way to compute here."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
from typing import Annotated

import typer
from rich.table import Table

from kdkernels.catalogue import CHAPTERS, CONFIDENCES, ENTRIES, KINDS, Entry, page
from kdkernels.cli.terminal import console, fail

__all__ = ["show_losses"]

Chapter = enum.Enum("Chapter", {chapter: chapter for chapter in CHAPTERS}, type=str)  # type: ignore[misc]
Kind = enum.Enum("Kind", {kind: kind for kind in KINDS}, type=str)  # type: ignore[misc]


def show_losses(
    key: Annotated[str | None, typer.Argument(help="Show this entry whole, with the lines that use it.")] = None,
    chapter: Annotated[Chapter | None, typer.Option(help="Only this chapter.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only entries of this kind.")] = None,
    search: Annotated[str | None, typer.Option(help="Only entries in which all of these words occur.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
) -> None:
    """List the published losses: what to call, how sure the formula is, what it costs."""
    if key is None:
        found = [
            entry
            for entry in page.search((search or "").split())
            if (chapter is None or entry.chapter == chapter.value) and (kind is None or entry.kind == kind.value)
        ]
    else:
        found = [entry_of(key)]
    if not found:
        fail("no entry of the catalogue is like that", 1)
    if as_json:
        rows = [dataclasses.asdict(entry) | {"calls": page.calls(entry)} for entry in found]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif as_markdown:
        typer.echo(page.markdown(None if len(found) == len(ENTRIES) else found), nl=False)
    elif key is not None:
        show_entry(found[0])
    else:
        show_table(found)


def entry_of(key: str) -> Entry:
    if key not in ENTRIES:
        near = difflib.get_close_matches(key, ENTRIES, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; `kdkernels losses` lists all"
        fail(f"no objective is called {key!r}{hint}")
    return ENTRIES[key]


def show_table(entries: list[Entry]) -> None:
    output = console()
    for chapter, title in CHAPTERS.items():
        members = [entry for entry in entries if entry.chapter == chapter]
        if not members:
            continue
        table = Table(title=f"{chapter}  {title}", title_justify="left")
        table.add_column("key", no_wrap=True)
        for name in ("paper", "call", "kind", "confidence"):
            table.add_column(name)
        for entry in members:
            table.add_row(entry.key, entry.title, "\n".join(page.calls(entry)), entry.kind, entry.confidence)
        output.print(table, markup=False)
    output.print("kdkernels losses KEY shows the lines that use one.", markup=False)


def show_entry(entry: Entry) -> None:
    output = console()
    output.print(entry.key, style="bold", markup=False)
    facts = [
        ("paper", entry.title),
        ("source", entry.source),
        ("chapter", f"{entry.chapter}, {CHAPTERS[entry.chapter]}"),
        ("kind", f"{entry.kind}: {KINDS[entry.kind]}"),
        ("confidence", f"{entry.confidence}: {CONFIDENCES[entry.confidence]}"),
        ("formula", entry.formula),
        ("cost", entry.cost),
        *([("notes", entry.notes)] if entry.notes else []),
    ]
    for name, text in facts:
        # Never cut, and never broken where the terminal would not: it is there to be copied.
        output.print(f"  {name:10}  {text}", soft_wrap=True, markup=False)
    output.print("\nAfter the lines of kdkernels.catalogue.PRELUDE:\n", markup=False)
    for line in entry.use.splitlines():
        output.print(f"    {line}", soft_wrap=True, markup=False)

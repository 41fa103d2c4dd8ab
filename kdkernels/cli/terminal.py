"""How the commands speak: results on the standard output, progress and complaints on the standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["console", "fail", "progress"]

FILE_WIDTH = 160


def console(*, error: bool = False) -> Console:
    """For tables: as wide as the terminal, or wide enough when the output goes to a file. ``error``: for the standard error."""
    stream = sys.stderr if error else sys.stdout
    return Console(width=None if stream.isatty() else FILE_WIDTH, highlight=False, stderr=error)


def progress(*, counted: bool, columns: Sequence[ProgressColumn] = ()) -> Progress:
    """A progress bar, with further columns at its end, that goes away when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if counted else TaskProgressColumn(),
        TimeElapsedColumn(),
        *columns,
        console=Console(stderr=True),
        transient=True,
    )


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the command."""
    typer.echo(message, err=True)
    raise typer.Exit(status)

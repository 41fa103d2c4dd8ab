"""How the commands speak: results on the standard output, progress and complaints on the standard error."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["console", "fail", "progress"]

FILE_WIDTH = 160


def console() -> Console:
    """For tables: as wide as the terminal, or wide enough when the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def progress(*, counted: bool) -> Progress:
    """A progress bar that goes away when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if counted else TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the command."""
    typer.echo(message, err=True)
    raise typer.Exit(status)

"""The command ``kdkernels``: info, check, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from kdkernels.cli.bench import run_bench
from kdkernels.cli.check import run_check
from kdkernels.cli.info import show_info
from kdkernels.environment import package_version

__all__ = ["app"]

app = typer.Typer(
    help="Fused kernels for knowledge distillation: what works here, whether it is right, and how fast it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("info")(show_info)
app.command("check")(run_check)
app.command("bench")(run_bench)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(package_version("kdkernels") or "not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass

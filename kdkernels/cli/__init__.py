"""The command ``kdkernels``: info, check, bench, tune, validate-gpu; cache, inspect, verify; losses."""

from __future__ import annotations

from typing import Annotated

import typer

from kdkernels.cli.bench import run_bench
from kdkernels.cli.cache import run_cache
from kdkernels.cli.check import run_check
from kdkernels.cli.info import show_info
from kdkernels.cli.inspect import show_store
from kdkernels.cli.losses import show_losses
from kdkernels.cli.tune import run_tune
from kdkernels.cli.validate_gpu import run_validate_gpu
from kdkernels.cli.verify import run_verify
from kdkernels.environment import package_version

__all__ = ["app"]

app = typer.Typer(
    help=(
        "Fused kernels for knowledge distillation: what works here, whether it is right, how fast it is; and teachers' "
        "logits in stores; the published losses."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("info")(show_info)
app.command("check")(run_check)
app.command("bench")(run_bench)
app.command("tune")(run_tune)
app.command("validate-gpu")(run_validate_gpu)
app.command("cache")(run_cache)
app.command("inspect")(show_store)
app.command("verify")(run_verify)
app.command("losses")(show_losses)


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

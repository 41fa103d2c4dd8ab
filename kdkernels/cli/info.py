"""``kdkernels info``: what this installation can do on this machine, and for the rest why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kdkernels import environment
from kdkernels.benchmarking.results import format_bytes
from kdkernels.cli.terminal import console

__all__ = ["show_info"]


def show_info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print versions, the backends (for those that are not available, the reason), processor and devices."""
    found = environment.describe()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    output = console()
    for heading, lines in sections(found).items():
        output.print(heading, style="bold")
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            # Never wrapped and never cut: reasons are there to be copied whole.
            output.print(f"  {name:{width}}  {text}", soft_wrap=True, markup=False)


def sections(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    versions = [("python", found["python"]), ("platform", found["platform"])]
    versions += [(name, version or "not installed") for name, version in found["versions"].items()]
    backends = [
        (name, f"{'available' if status['available'] else 'not available'}: {status['reason']}")
        for name, status in found["backends"].items()
    ]
    sets = found["instruction_sets"]
    used = sets["used"] or "none: the native kernels are not built"
    processor = [
        ("instruction set", used),
        ("kernels built for", ", ".join(sets["available"]) or "–"),
        ("PyTorch's kernels", sets["torch"]),
        ("threads", f"{found['threads']} of {found['processors']} processors (torch.set_num_threads changes it)"),
    ]
    devices = []
    for device in found["devices"]:
        extra = ""
        if "memory_bytes" in device:
            extra = f", compute capability {device['capability']}, {format_bytes(device['memory_bytes'])}"
        devices.append((device["device"], device["name"] + extra))
    return {"Versions": versions, "Backends": backends, "CPU kernels": processor, "Devices": devices}

"""``kdkernels check``: are the kernels right on this machine?"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.table import Table

from kdkernels import environment
from kdkernels.cli.choices import DIVERGENCES, DivergenceName, Dtype, check_device
from kdkernels.cli.terminal import console, fail, progress
from kdkernels.validation.comparison import (
    DTYPES,
    FAMILIES,
    KERNELS,
    Finding,
    Plan,
    Target,
    make_plan,
    servers,
    unserved,
    validate,
)

__all__ = ["run_check"]

Report = list[tuple[Target, list[Finding]]]


def run_check(
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"Check only this backend: {' or '.join(KERNELS)}.", show_default="all that serve the device"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (also for ROCm).", show_default="cuda if there is one")] = "",
    divergence: Annotated[
        list[DivergenceName] | None, typer.Option(help="May be repeated.", show_default="all")
    ] = None,
    operation: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated. {', '.join(FAMILIES)}.", show_default="all")
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="May be repeated.", show_default="all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller vocabularies.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Hold every kernel against the reference in float64, over dtypes and awkward inputs; the exit status is 1 if one fails.

    The verdict: an error no larger than that of plain PyTorch in the same dtype, plus a small tolerance. Errors are relative
    to the size of what is computed, the gradient for instance: a gradient of zeros has the error 1.

    In Triton's interpreter (TRITON_INTERPRET=1) everything takes minutes; --operation, --divergence and --dtype leave out the rest.
    """
    found = environment.describe()["devices"]
    device = check_device(device or ("cuda" if len(found) > 1 else "cpu"))
    if backend is not None and backend not in KERNELS:
        fail(f"--backend {backend}: must be one of {', '.join(KERNELS)}; the reference is what they are held against")
    operations = operation or list(FAMILIES)
    for name in operations:
        if name not in FAMILIES:
            fail(f"--operation {name}: must be one of {', '.join(FAMILIES)}")
    names, reasons = servers(device.partition(":")[0], backend)
    if not names:
        fail(f"no kernels to check on {device}:\n" + "\n".join(f"  {name}: {why}" for name, why in reasons.items()))
    reasons |= unserved(names, operations)
    divergences = [DIVERGENCES[one.value] for one in divergence or DivergenceName]
    dtypes = [one.torch for one in dtype] if dtype else DTYPES
    plan = make_plan(names, divergences, dtypes, quick, operations)
    if not plan:
        fail("nothing to check:\n" + "\n".join(f"  {name}: {why}" for name, why in reasons.items()))
    report = run(plan, device)
    failures = [(target, finding) for target, findings in report for finding in findings if not finding.passed]
    if as_json:
        answer = {
            "device": device,
            "machine": environment.machine(device),
            "passed": not failures,
            "not_checked": reasons,
            "results": [as_record(target, findings) for target, findings in report],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        show(report, failures, device, reasons)
    if failures:
        raise typer.Exit(1)


def run(plan: Plan, device: str) -> Report:
    report = []
    with progress(counted=True) as bar:
        task = bar.add_task("checking", total=sum(len(target.cases) for target in plan))
        for target in plan:
            findings = []
            for finding in validate(target, device):
                findings.append(finding)
                bar.advance(task)
            report.append((target, findings))
    return report


def dtype_name(target: Target) -> str:
    return str(target.dtype).removeprefix("torch.")


def operation_name(target: Target) -> str:
    return target.operation if target.divergence is None else f"{target.operation} {target.divergence!r}"


def as_record(target: Target, findings: list[Finding]) -> dict[str, Any]:
    def number(error: float) -> float | None:
        return error if math.isfinite(error) else None  # JSON has no infinity

    return {
        "operation": target.operation,
        "divergence": None if target.divergence is None else repr(target.divergence),
        "backend": target.backend,
        "dtype": dtype_name(target),
        "cases": len(findings),
        "error": number(max(finding.error for finding in findings)),
        "plain_error": number(max(finding.plain_error for finding in findings)),
        "tolerance": target.tolerance,
        "passed": all(finding.passed for finding in findings),
        "failures": [
            {
                "case": finding.case,
                "quantity": finding.quantity,
                "error": number(finding.error),
                "plain_error": number(finding.plain_error),
                "trouble": finding.trouble,
            }
            for finding in findings
            if not finding.passed
        ],
    }


def show(report: Report, failures: list[tuple[Target, Finding]], device: str, reasons: dict[str, str]) -> None:
    output = console()
    table = Table(title=f"kernels on {environment.machine(device)}", title_justify="left", title_style="bold")
    for heading in ("operation", "backend", "dtype"):
        table.add_column(heading)
    for heading in ("cases", "worst error", "of plain torch", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    before = None
    for target, findings in report:
        if before is not None and before != (target.backend, target.operation):
            table.add_section()
        before = target.backend, target.operation
        passed = all(finding.passed for finding in findings)
        table.add_row(
            operation_name(target),
            target.backend,
            dtype_name(target),
            str(len(findings)),
            f"{max(finding.error for finding in findings):.1e}",
            f"{max(finding.plain_error for finding in findings):.1e}",
            f"{target.tolerance:.1e}",
            "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]",
        )
    output.print(table)
    for target, finding in failures:
        what = finding.trouble or (
            f"{finding.quantity}: error {finding.error:.2e}, plain torch {finding.plain_error:.2e}, "
            f"tolerance {target.tolerance:.1e}"
        )
        line = f"FAIL {operation_name(target)}, {target.backend}, {dtype_name(target)}, case {finding.case!r}: {what}"
        output.print(line, style="red", soft_wrap=True, markup=False)
    for name, why in reasons.items():
        output.print(f"not checked: {name}, {why}", soft_wrap=True, markup=False)
    checked = sum(len(findings) for _, findings in report)
    output.print(f"{checked - len(failures)} of {checked} cases pass", style="red" if failures else "green")

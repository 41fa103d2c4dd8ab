"""Divergences of logits on the CPU, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reporting import SideBySide

import kdkernels as kd
from kdkernels.benchmarking.contenders import CONTENDERS
from kdkernels.benchmarking.workloads import Operation, Workload

TOKENS, VOCAB = 256, 151_936
FORWARD_KL = Workload(Operation.DENSE, kd.ForwardKL(), TOKENS, VOCAB, 0, 0)
MIXTURES = (kd.JSD(), kd.SkewForwardKL(), kd.SkewReverseKL())
OTHERS = (
    kd.ReverseKL(),
    kd.Jeffreys(),
    kd.TVD(),
    kd.AlphaDivergence(0.7),
    kd.Hellinger(),
    kd.Renyi(0.7),
    kd.ABDivergence(0.6, 0.5),
)


@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.JSD()], ids=["forward_kl", "jsd"])
def test_against_plain_pytorch(side_by_side: SideBySide, divergence: kd.Divergence) -> None:
    workload = replace(FORWARD_KL, divergence=divergence)
    inputs = workload.inputs()
    names = ("kdkernels", "kdkernels, ready buffer", "3-stream add", "eager", "torch.compile")
    calls = {name: CONTENDERS[name].prepare(workload, inputs) for name in names}
    side_by_side.measure(
        workload.title, calls, rounds=9, columns=workload.columns, gradient_bytes=workload.gradient_bytes
    )
    if divergence == kd.ForwardKL():
        side_by_side.ratio("forward KL: eager in ours, with allocation", "eager", "kdkernels", 10, at_least=True)
        side_by_side.ratio(
            "forward KL: torch.compile in ours, with allocation", "torch.compile", "kdkernels", 3, at_least=True
        )
        side_by_side.ratio(
            "forward KL: ours in a 3-stream add, ready buffers", "kdkernels, ready buffer", "3-stream add", 1.35
        )


def test_forms_against_forward_kl(side_by_side: SideBySide) -> None:
    inputs = FORWARD_KL.inputs()
    prepare = CONTENDERS["kdkernels, ready buffer"].prepare
    forms = (kd.ForwardKL(), *MIXTURES, *OTHERS)
    calls = {f"kdkernels {form!r}": prepare(replace(FORWARD_KL, divergence=form), inputs) for form in forms}
    title = f"forms of divergence, forward+backward into ready buffers: {TOKENS} tokens × {VOCAB:,}, float32, cpu"
    side_by_side.measure(title, calls, rounds=9, columns=FORWARD_KL.columns)
    for form in (*MIXTURES, *OTHERS):
        side_by_side.ratio(f"{form!r} in forward KL, ready buffers", f"kdkernels {form!r}", "kdkernels ForwardKL()", 2)


def test_bfloat16_against_float32(side_by_side: SideBySide) -> None:
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        workload = replace(FORWARD_KL, dtype=dtype)
        inputs = workload.inputs()
        name = str(dtype).removeprefix("torch.")
        calls[f"kdkernels {name}"] = CONTENDERS["kdkernels"].prepare(workload, inputs)
        calls[f"kdkernels {name}, ready buffer"] = CONTENDERS["kdkernels, ready buffer"].prepare(workload, inputs)
    title = f"input types, ForwardKL(), forward+backward: {TOKENS} tokens × {VOCAB:,}, cpu"
    side_by_side.measure(title, calls, rounds=15, columns=FORWARD_KL.columns)
    for suffix in ("", ", ready buffer"):
        side_by_side.ratio(
            f"bfloat16 in float32{suffix}", f"kdkernels bfloat16{suffix}", f"kdkernels float32{suffix}", 1
        )

"""The largest logits and draws on the CPU, beside one read of the logits, PyTorch's own functions and the head's GEMM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reporting import SideBySide
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.chunked_head import Head, Needs, chunks
from kdkernels.backends.rows import Side

ROWS, VOCAB, K = 512, 151_936, 64
TOKENS, HEAD_VOCAB, HIDDEN = 2048, 49_152, 576
READ, GEMM = "amax", "its GEMM, same chunks"


def columns(operation: str, tokens: int, vocab: int, **more: str | int) -> dict[str, str | int]:
    return {
        "operation": operation,
        "tokens": tokens,
        "vocab": vocab,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
    } | more


def logits() -> Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))


def pair(matrix: Tensor) -> object:
    """What says the same in PyTorch, but for the tail."""
    return torch.topk(matrix, K), torch.logsumexp(matrix, -1)


def test_logits(side_by_side: SideBySide) -> None:
    matrix = logits()
    calls: dict[str, Callable[[], object]] = {
        "kdkernels topk": lambda: kd.topk_logits(matrix, K),
        "kdkernels topk, top_p": lambda: kd.topk_logits(matrix, K, top_p=0.9),
        "kdkernels sample": lambda: kd.sample_logits(matrix, K),
        "kdkernels sample, proposal": lambda: kd.sample_logits(matrix, K, proposal_temperature=1.5),
        READ: lambda: matrix.amax(-1),
        "torch.topk + logsumexp": lambda: pair(matrix),
    }
    title = f"top {K} and log-sum-exp, or {K} draws: {ROWS} tokens × {VOCAB:,}, float32, cpu"
    side_by_side.measure(title, calls, rounds=9, columns=columns("topk", ROWS, VOCAB))
    side_by_side.ratio(f"top {K} in one read of the logits", "kdkernels topk", READ, 2)
    side_by_side.ratio(
        f"torch.topk + logsumexp in top {K}", "torch.topk + logsumexp", "kdkernels topk", 6, at_least=True
    )


def test_orders(side_by_side: SideBySide) -> None:
    """Rows in which every logit exceeds all before it, or steps of equal ones do."""
    matrix = logits()
    ascending = matrix.sort(-1).values
    orders = {
        "random": matrix,
        "ascending": ascending,
        "descending": ascending.flip(-1),
        "ascending in steps": (ascending * 16).floor(),
        "constant": torch.zeros_like(matrix),
    }
    calls = {f"kdkernels topk, {name}": lambda rows=rows: kd.topk_logits(rows, K) for name, rows in orders.items()}
    title = f"order of the logits, top {K}: {ROWS} tokens × {VOCAB:,}, float32, cpu"
    side_by_side.measure(title, calls, rounds=7, columns=columns("topk", ROWS, VOCAB))
    for name in list(orders)[1:]:
        side_by_side.ratio(f"{name} in random order", f"kdkernels topk, {name}", "kdkernels topk, random", 4)


@pytest.mark.parametrize("pick", ["topk", "sample"])
def test_head(side_by_side: SideBySide, pick: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(HEAD_VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5
    source, side = kd.LMHead(hidden, weight), Side(hidden, weight)

    def gemm() -> None:
        head = Head(side, Needs(False), None)
        for chunk in chunks([side], None):
            head.logits(chunk)

    ours = kd.topk_logits if pick == "topk" else kd.sample_logits
    calls: dict[str, Callable[[], object]] = {f"kdkernels {pick}": lambda: ours(source, K), GEMM: gemm}
    title = f"{pick} of an LM head, {K} ids: {TOKENS:,} tokens × {HEAD_VOCAB:,}, hidden {HIDDEN}, float32, cpu"
    side_by_side.measure(title, calls, rounds=9, columns=columns(pick, TOKENS, HEAD_VOCAB, hidden=HIDDEN))
    side_by_side.ratio(f"{pick} of an LM head in its own GEMM", f"kdkernels {pick}", GEMM, 1.1)

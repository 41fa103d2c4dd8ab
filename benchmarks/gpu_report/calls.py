"""What the report launches: every kernel of ``kdkernels.triton_kernels``, by the functions of the Triton backend that users reach.

A kernel that no call launches fails a test (``tests/triton/test_gpu_kernels_report.py``): its call belongs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import triton as backend
from kdkernels.backends.bernoulli import BernoulliForm
from kdkernels.backends.chunked_head import Needs
from kdkernels.backends.rows import PairSpec, RowSpec, Side, Tempering
from kdkernels.backends.sparse_rows import Policy, SparseRows
from kdkernels.backends.transport import TransportGradients, TransportSpec, transport_dtype
from kdkernels.divergences import Kind
from kdkernels.records import BITS
from kdkernels.reference.records import pack_records

__all__ = ["CALLS", "COMPILED", "COUNTED", "DTYPES", "Call", "Sizes", "named"]

MULTIPLIED = 1024
"""Multiplications that are one unit of work of LM heads: by logits, their figures would grow with the hidden size."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Heads(NamedTuple):
    """The problem of LM heads whose logits are never written."""

    rows: int
    vocab: int
    hidden: int


class Sizes(NamedTuple):
    rows: int
    vocab: int
    entries: int
    """Of a sparse teacher."""
    points: int
    """On either side of a transport problem that fits into registers."""
    streamed_points: int
    """On either side of one that does not."""
    heads: Heads


COMPILED = Sizes(2, 151_936, entries=64, points=64, streamed_points=512, heads=Heads(4096, 151_936, 4096))
COUNTED = Sizes(2, 16_384, entries=64, points=64, streamed_points=192, heads=Heads(64, 256, 128))
"""Whole tiles on every target, so that no lane idles and what is counted per logit holds for any whole number of tiles."""


@dataclass(frozen=True)
class Call:
    family: str
    """The module of ``kdkernels.triton_kernels``."""
    variant: str
    """What tells it from other calls of the family."""
    kernels: tuple[str, ...]
    """Which it launches; "_kernel" left out."""
    run: Callable[[torch.dtype, Sizes], int]
    """Returns how many units were worked on."""
    unit: str = "logit"
    """What figures are divided by: a logit position (student and teacher have one in common), a pair, an entry."""
    streams: int | None = None
    """How many matrices of logits a sweep of each kernel reads; None: not a kernel whose loops are sweeps over a row."""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """Those that it is compiled and counted for. Of a kernel with many versions not all are in fp16, which differs from bf16 in its
    conversions alone."""
    brief: bool = False
    """Whether `--quick` takes it."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.variant}".strip()


def logits(dtype: torch.dtype, rows: int, columns: int, seed: int) -> Tensor:
    return (2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(dtype: torch.dtype, sizes: Sizes) -> tuple[Tensor, Tensor]:
    return logits(dtype, sizes.rows, sizes.vocab, 0), logits(dtype, sizes.rows, sizes.vocab, 1)


PARAMETERS = {Kind.JSD: 0.5, Kind.SKEW_FORWARD_KL: 0.1, Kind.SKEW_REVERSE_KL: 0.1, Kind.JEFFREYS: 0.5}


def divergence_spec(kind: Kind) -> RowSpec:
    return RowSpec(int(kind), PARAMETERS.get(kind, 0.3), 0.6)


def divergence(kind: Kind) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        student, teacher = pair(dtype, sizes)
        upstream = torch.ones(sizes.rows)
        backend.divergence_fused(
            student, teacher, divergence_spec(kind), upstream, None, torch.empty_like(student), None
        )
        return student.numel()

    return run


def linear_divergence(kind: Kind) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        rows, vocab, hidden = sizes.heads
        # Zeros, since what is counted is the same for all numbers and memory for zeros is not taken before it is written.
        student, teacher = (
            Side(torch.zeros(rows, hidden, dtype=dtype), torch.zeros(vocab, hidden, dtype=dtype)) for _ in range(2)
        )
        needs = Needs(tensor=True, weight=True, bias=False), Needs(tensor=False, weight=False, bias=False)
        backend.linear_divergence(student, teacher, divergence_spec(kind), torch.ones(rows), None, needs)
        return rows * vocab * hidden // MULTIPLIED

    return run


def token_statistics(dtype: torch.dtype, sizes: Sizes) -> int:
    student, teacher = pair(dtype, sizes)
    backend.token_statistics(student, teacher, RowSpec(0, 0.0, 0.0))
    return student.numel()


def sparse_divergence(kind: Kind, policy: Policy) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        student, teacher = pair(dtype, sizes)
        values, ids = torch.log_softmax(teacher.float(), -1).topk(sizes.entries)
        upstream, gradient = torch.ones(sizes.rows), torch.empty_like(student)
        rows = SparseRows(int(policy), ids, values)
        backend.sparse_divergence_fused(student, rows, divergence_spec(kind), upstream, None, gradient)
        return student.numel()

    return run


def topk(dtype: torch.dtype, sizes: Sizes) -> int:
    source, _ = pair(dtype, sizes)
    backend.topk(source, sizes.entries, Tempering(1.0))
    return source.numel()


def sample(dtype: torch.dtype, sizes: Sizes) -> int:
    source, _ = pair(dtype, sizes)
    uniforms = torch.rand(sizes.rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    backend.sample(source, uniforms, Tempering(1.0))
    return source.numel()


def unpack_records(bits: int) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        _, teacher = pair(dtype, sizes)
        log_probs, ids = torch.log_softmax(teacher.float(), -1).topk(sizes.entries)
        tail = torch.log1p(-log_probs.exp().sum(-1).clamp(max=1))
        data, counts = pack_records(ids, log_probs, tail, sizes.vocab, bits)
        backend.unpack_records(data, counts, sizes.vocab, bits, sizes.entries)
        return ids.numel()

    return run


def sorted_l1(dtype: torch.dtype, sizes: Sizes) -> int:
    student, teacher = pair(dtype, sizes)
    backend.sorted_l1(student, teacher, RowSpec(0, 0.0, 0.0), 0.0, None, torch.empty_like(student), None)
    return student.numel()


def pairwise_l1(dtype: torch.dtype, sizes: Sizes) -> int:
    rows = 16
    vocab = min(sizes.vocab, 8192)
    student, teacher = logits(dtype, rows, vocab, 0), logits(dtype, rows, vocab, 1)
    spec = PairSpec(1, rows, rows, Tempering(1.0), Tempering(1.0))
    normalisers = [backend.pairwise_normalisers(side, Tempering(1.0), torch.float32) for side in (student, teacher)]
    backend.pairwise_l1_forward(student, teacher, spec, normalisers, True)
    weights, centres = torch.ones(1, rows, rows), [torch.zeros(rows), torch.zeros(rows)]
    backend.pairwise_l1_backward(
        student, teacher, spec, normalisers, weights, centres, torch.empty_like(student), torch.empty_like(teacher)
    )
    return student.numel()


def sinkhorn(gradient: str, streamed: bool) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        points = sizes.streamed_points if streamed else sizes.points
        cost = logits(torch.float32, points, points, 0).abs().to(dtype).unsqueeze(0)
        marginal = torch.full((1, points), 1 / points, dtype=transport_dtype(cost))
        spec = TransportSpec(epsilon=0.5, max_iterations=4)
        values = backend.sinkhorn_forward(cost, marginal, marginal.clone(), spec, gradient == "unrolled")
        upstream = TransportGradients(torch.ones(1), None, None, None)
        buffers = torch.empty_like(cost), torch.empty_like(marginal), torch.empty_like(marginal)
        backend.sinkhorn_backward(cost, marginal, marginal.clone(), values, spec, gradient, upstream, *buffers)
        return cost.numel()

    return run


def bernoulli(form: BernoulliForm) -> Callable[[torch.dtype, Sizes], int]:
    def run(dtype: torch.dtype, sizes: Sizes) -> int:
        student, teacher = pair(dtype, sizes)
        backend.bernoulli(student, teacher, RowSpec(int(form), 0.0, 0.0), None, torch.empty_like(student))
        return student.numel()

    return run


def head_mass(dtype: torch.dtype, sizes: Sizes) -> int:
    student, teacher = pair(dtype, sizes)
    backend.head_mass(teacher, student, RowSpec(0, 0.9, 0.0))
    return student.numel()


def row_deviation(dtype: torch.dtype, sizes: Sizes) -> int:
    source, _ = pair(dtype, sizes)
    backend.row_deviation(source, 1e-7)
    return source.numel()


def row_deviation_backward(dtype: torch.dtype, sizes: Sizes) -> int:
    source, gradient = pair(dtype, sizes)
    moments = torch.zeros(sizes.rows), torch.ones(sizes.rows)
    backend.row_deviation_backward(source, *moments, gradient)
    return source.numel()


def token_set(dtype: torch.dtype, sizes: Sizes) -> int:
    source, _ = pair(dtype, sizes)
    members = torch.arange(sizes.vocab) % 2 == 0
    backend.token_set(source, members, RowSpec(0, 0.0, 0.0), torch.ones(sizes.rows), torch.empty_like(source))
    return source.numel()


def angle(dtype: torch.dtype, sizes: Sizes) -> int:
    student, teacher = (logits(dtype, sizes.points, sizes.points, seed) for seed in range(2))
    lengths = torch.ones(sizes.points, sizes.points, dtype=dtype)
    backend.angle((student @ student.T, lengths), (teacher @ teacher.T, lengths), torch.arange(sizes.points))
    return sizes.points**3


def token_ranks(dtype: torch.dtype, sizes: Sizes) -> int:
    source, _ = pair(dtype, sizes)
    backend.token_ranks(source, torch.zeros(sizes.rows, 1, dtype=torch.int64))
    return source.numel()


def named(kind: Kind) -> str:
    """As the page calls a divergence."""
    capitals = {"kl": "KL", "jsd": "JSD", "tvd": "TVD", "ab": "AB"}
    return " ".join(capitals.get(word, word) for word in kind.name.lower().split("_"))


def dtypes(all_of_them: bool) -> tuple[str, ...]:
    return ("fp32", "bf16", "fp16") if all_of_them else ("fp32", "bf16")


def calls() -> Iterator[Call]:
    both = ("divergence_forward", "divergence_backward")
    for kind in Kind:
        yield Call(
            "divergence",
            named(kind),
            both,
            divergence(kind),
            streams=2,
            dtypes=dtypes(kind == Kind.JSD),
            brief=kind == Kind.JSD,
        )
    sweep, sums = ("sweep", "merge"), ("terms", "value")
    for kind, parts in [(Kind.JSD, (*sweep, *sums)), (Kind.FORWARD_KL, sweep)]:
        yield Call(
            "linear_divergence",
            f"{named(kind)} of two heads",
            tuple(f"linear_divergence_{part}" for part in (*parts, "gradient", "hidden", "weight")),
            linear_divergence(kind),
            unit=f"{MULTIPLIED:,} multiplications of one head's logits",
            dtypes=dtypes(kind == Kind.JSD),
        )
    yield Call("token_statistics", "", ("token_statistics",), token_statistics, streams=2)
    both = ("sparse_divergence_forward", "sparse_divergence_backward")
    for kind, policy in [
        (Kind.FORWARD_KL, Policy.BUCKET),
        (Kind.JSD, Policy.BUCKET),
        (Kind.FORWARD_KL, Policy.UNIFORM),
    ]:
        variant = f"{named(kind)}, {policy.name.lower()}"
        yield Call(
            "sparse_divergence",
            variant,
            both,
            sparse_divergence(kind, policy),
            streams=1,
            dtypes=dtypes(kind == Kind.JSD),
        )
    yield Call("topk", "", ("topk",), topk)
    yield Call("topk", "sample", ("token_statistics", "block_sums", "draw"), sample)
    for codec, bits in BITS.items():
        yield Call("records", codec, ("unpack_records",), unpack_records(bits), unit="entry", dtypes=("fp32",))
    yield Call("sorted_l1", "", ("sorted_l1",), sorted_l1)
    both = ("pairwise_l1_forward", "pairwise_l1_backward")
    yield Call("pairwise_l1", "16 × 16 rows", ("pairwise_normalisers", *both), pairwise_l1)
    product, cost = "sinkhorn_product", "sinkhorn_cost_gradient"
    for streamed, kernels in [
        (False, ("sinkhorn", product, "sinkhorn_adjoint", cost)),
        (True, ("sinkhorn_streamed", product, "sinkhorn_adjoint_streamed", cost)),
    ]:
        variant = "unrolled, 4 iterations" + (", streamed" if streamed else "")
        yield Call("sinkhorn", variant, kernels, sinkhorn("unrolled", streamed), unit="pair")
    kernels = ("sinkhorn", product, "sinkhorn_implicit", cost)
    yield Call("sinkhorn", "implicit, 4 iterations", kernels, sinkhorn("implicit", streamed=False), unit="pair")
    for form in BernoulliForm:
        words = form.name.replace("_", " ").lower().replace("kl", "KL")
        yield Call(
            "bernoulli",
            words,
            ("bernoulli",),
            bernoulli(form),
            streams=2,
            dtypes=dtypes(form == BernoulliForm.KL),
            brief=form == BernoulliForm.KL,
        )
    yield Call("head_mass", "", ("head_mass",), head_mass)
    yield Call("row_deviation", "", ("row_deviation",), row_deviation, streams=1)
    yield Call("row_deviation", "backward", ("row_deviation_backward",), row_deviation_backward, streams=2)
    yield Call("token_set", "", ("token_set",), token_set, streams=1)
    yield Call("angle", "", ("angle_gradient", "angle_sums"), angle, unit="triple", dtypes=("fp64",))
    yield Call("ranking", "", ("token_ranks",), token_ranks, streams=1, brief=True)


CALLS = {call.name: call for call in calls()}

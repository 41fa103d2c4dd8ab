"""Divergences from truncated teachers on the CPU, forward and backward: LM heads beside their GEMMs, and dense logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from head_products import GEMMS, head_gemms
from reporting import SideBySide, Target
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.chunked_head import chunks
from kdkernels.backends.rows import Side
from kdkernels.benchmarking.plain import mean_divergence_from_stored

VOCAB, K, HIDDEN = 151_936, 64, 576


def truncated(tokens: int, tail: str = "bucket") -> kd.TopKLogits:
    """Ids all over the vocabulary, in no order, which is the most work."""
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(tokens, K + 1, generator=generator).mul_(3).log_softmax(-1)[:, :K]
    places = torch.rand(tokens, K, generator=generator).argsort(-1) * (VOCAB // K)
    ids = places + torch.randint(0, VOCAB // K, (tokens, K), generator=generator)
    return kd.TopKLogits(ids, log_probs, vocab_size=VOCAB, tail=tail)


def test_head(side_by_side: SideBySide) -> None:
    tokens = 2048
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5).requires_grad_()
    teacher = truncated(tokens)

    def ours() -> object:
        return torch.autograd.grad(kd.distillation_loss(kd.LMHead(hidden, weight), teacher), [hidden, weight])

    calls = {"kdkernels": ours, GEMMS: head_gemms(hidden, weight)}
    title = f"LM head, truncated teacher: ForwardKL(), {tokens:,} tokens × {VOCAB:,}, hidden {HIDDEN}, k = {K}, float32, cpu"
    side_by_side.measure(title, calls, rounds=3)
    side_by_side.ratio("LM head, k = 64: ours in its own GEMMs", "kdkernels", GEMMS, 1.05)
    longest = next(iter(chunks([Side(hidden, weight)], None))).stop
    side_by_side.targets.append(
        Target("LM head, k = 64: temporary logits", longest * VOCAB * 4 / (1 << 20), 128, unit=" MiB")
    )


def eager_dense(student: Tensor, teacher: kd.TopKLogits) -> Tensor:
    """The other way: a dense teacher, filled in."""
    dense = torch.full_like(student, -torch.inf).scatter_(-1, teacher.ids, teacher.log_probs).softmax(-1)
    return torch.nn.functional.kl_div(student.log_softmax(-1), dense, reduction="batchmean")


def test_logits(side_by_side: SideBySide) -> None:
    tokens = 256
    student = torch.randn(tokens, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dense = torch.randn(tokens, VOCAB, generator=torch.Generator().manual_seed(2))
    teachers = {tail: truncated(tokens, tail) for tail in ("bucket", "renormalize", "uniform")}

    def call(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), student)

    calls = {
        f"kdkernels {tail}": call(lambda given=given: kd.distillation_loss(student, given))
        for tail, given in teachers.items()
    }
    eager_bucket = mean_divergence_from_stored(kd.ForwardKL())
    packed = kd.pack(teachers["bucket"])
    calls["kdkernels bucket, packed"] = call(lambda: kd.distillation_loss(student, packed))
    calls["kdkernels bucket, JSD"] = call(lambda: kd.distillation_loss(student, teachers["bucket"], kd.JSD()))
    calls["kdkernels, dense teacher"] = call(lambda: kd.distillation_loss(student, dense))
    calls["eager, gathered"] = call(lambda: eager_bucket(student, teachers["bucket"].log_probs, teachers["bucket"].ids))
    calls["eager, filled in"] = call(lambda: eager_dense(student, teachers["renormalize"]))
    side_by_side.measure(
        f"logits, truncated teacher: {tokens} tokens × {VOCAB:,}, k = {K}, float32, cpu", calls, rounds=9
    )
    side_by_side.ratio("bucket: eager, gathered in ours", "eager, gathered", "kdkernels bucket", 1, at_least=True)
    side_by_side.ratio(
        "renormalize: eager, filled in, in ours", "eager, filled in", "kdkernels renormalize", 1, at_least=True
    )

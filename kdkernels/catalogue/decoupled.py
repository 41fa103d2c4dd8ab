"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="dhkd",
        title="DHKD: dual-head knowledge distillation",
        source="Yang et al., 2024",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="T^2 mean_n sum_c BinKL(1/2, sigmoid((s - t) / T)) on an auxiliary head, T = 2",
        use="loss = kd.losses.DHKD()(student, teacher)",
        cost="one sweep for value and gradient; nothing beside",
        notes="The clamp at 1e-8 is not needed. The alignment of both heads' gradients on the backbone is not part of it.",
    ),
    Entry(
        key="mix_kd_std",
        title="MIX-KD: distillation on mixed inputs with the standard deviation as temperature",
        source="Choi et al., WACV 2023, arXiv 2211.03946",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="0.9 KL(softmax(t / std(t)) || q) + 0.1 SCE(lam e_i + (1 - lam) e_j, q), q = softmax(s / std(s)), no T^2",
        use="loss = kd.losses.MixKDStd()(student, teacher, labels, labels.roll(1), mixing=0.7)",
        cost="three sweeps for the divergence, one for each label; heads: their logits, N x V",
        notes="Mixing the inputs is the caller's: Beta(1, 1), with 90% of a batch left as it is in partial mixup.",
    ),
    Entry(
        key="multi_aspect_kd",
        title="Multi-aspect knowledge distillation with a large language model",
        source="Lee et al., CVPR workshops 2025, arXiv 2501.13341",
        chapter="A2",
        kind="loss",
        confidence="secondary",
        formula="CE(labels) on C class logits + alpha mean BCE(sigmoid(s_q), P_q(yes)) on Q aspect logits",
        use="""\
answers = torch.rand(8, 20)  # P(yes) of a language model
loss = kd.losses.MultiAspectKD(classes=30)(student, answers, labels % 30)""",
        cost="one sweep for value and gradient of the aspects, PyTorch's cross-entropy for the classes",
        notes="alpha was not available; the default is 1.",
    ),
)

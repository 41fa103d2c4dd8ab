"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="akl",
        title="AKL: adaptive Kullback-Leibler divergence",
        source="Wu et al., COLING 2025, arXiv 2404.02657",
        chapter="blocks",
        kind="loss",
        confidence="code",
        formula=(
            "w KL(p||q) + (1 - w) KL(q||p), w = g_head / (g_head + g_tail) without gradient, g = sum |p - q| over the "
            "teacher's most probable ids that hold up to half of the mass, and over all others"
        ),
        use="loss = kd.losses.AKL()(student, teacher)",
        cost="2 sweeps: one for w, which sorts nothing, one for value and gradient; a few numbers per token",
        notes=(
            "head=\"ascending\" is the head of DSKD's code. The copy in TAID's repository, whose mask is in sorted order while "
            "the gap is not, and which lets the gradient through w, is not copied."
        ),
    ),
    Entry(
        key="ctkd",
        title="CTKD: curriculum temperature",
        source="Li et al., AAAI 2023, arXiv 2211.16231",
        chapter="blocks",
        kind="loss",
        confidence="code",
        formula="T^2 KL(softmax(t / T) || softmax(s / T)), T = 1 + 20 sigmoid(theta), which maximises it",
        use="""\
ctkd = kd.losses.CTKD()
ctkd.set_loop(3)  # once an epoch
loss = ctkd(student, teacher)""",
        cost="1 sweep that makes the gradients of both sides, one product with each; logits of a teacher: N x V for its gradient",
        notes="A copy in another repository multiplies by +lambda, so that theta makes the task easier: not copied.",
    ),
    Entry(
        key="logit_std",
        title="LogitStd: logit standardisation",
        source="Sun et al., CVPR 2024, arXiv 2403.01427",
        chapter="blocks",
        kind="loss",
        confidence="code",
        formula="T^2 KL(softmax(t / (std(t) T)) || softmax(s / (std(s) T))), std of a row by 1 / (V - 1), with its gradient",
        use="loss = kd.losses.LogitStd()(student, teacher)",
        cost="3 sweeps: deviations, value and gradient, what the deviation adds to it; heads: their logits, N x V",
    ),
    Entry(
        key="dist",
        title="DIST: correlations of rows and columns",
        source="Huang et al., NeurIPS 2022, arXiv 2205.10536",
        chapter="blocks",
        kind="loss",
        confidence="code",
        formula="T^2 (beta (1 - mean_n pearson(q_n, p_n)) + gamma (1 - mean_c pearson(q_c, p_c)))",
        use="loss = kd.losses.DIST()(student, teacher)",
        cost="3 sweeps in blocks of rows; the probabilities of both sides, 2 N x V, of which one becomes the gradient",
        notes="torchdistill's DIST+ adds the correlation of channels instead of subtracting it: not copied.",
    ),
)

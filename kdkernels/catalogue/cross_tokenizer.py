"""Entries of the catalogue: across tokenizers."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="alm",
        title="ALM: approximate likelihood matching of chunks of text",
        source="Minixhofer et al. 2025, NeurIPS, arXiv 2503.20083",
        chapter="D",
        kind="loss",
        confidence="code",
        formula="mean over chunks of -(e^a b + (1 - e^a) log(1 - e^b)), a, b = log P(chunk) / 100 - 1e-6 of teacher, student",
        use="""\
loss = kd.losses.ALM(temperature=100.0)(student_sequences, teacher_sequences, token_ids, teacher_ids, chunks)""",
        cost="1 sweep of each side; a number per token (two per token store the teacher)",
        notes="The authors' denominator applies the merge map twice; here it counts merged chunks.",
    ),
    Entry(
        key="alm_latents",
        title="ALM's latent loss: hidden states where chunks end",
        source="Minixhofer et al. 2025, NeurIPS, arXiv 2503.20083",
        chapter="D",
        kind="loss",
        confidence="code",
        formula="mean over chunks and channels of (h_S - h_T)^2 / (mean h_T^2 + eps) at the last token of each chunk",
        use="""\
latents = kd.losses.ALMLatents(16, 24)
loss = latents(student_layers[-1], teacher_layers[-1], chunks)""",
        cost="nothing of the vocabulary",
    ),
    Entry(
        key="gold",
        title="GOLD: general online logit distillation across tokenizers",
        source="Patiño et al. 2025, Unlocking On-Policy Distillation for Any Model Family; TRL's GOLDTrainer",
        chapter="D",
        kind="loss",
        confidence="code",
        formula="per aligned chunk: sorted L1 of merged distributions, or JSD of the common tokens and sorted L1 of the rest",
        use="""\
loss = kd.losses.GOLD()(student_sequences, teacher_sequences, token_ids, teacher_ids, chunks)""",
        cost="sorted L1 as of ULD; chunks of several tokens in plain PyTorch, a few rows [n, V] at a time",
    ),
)

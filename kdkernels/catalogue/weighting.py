"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="speculative_kd",
        title="Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
        source="ICLR 2025",
        chapter="G",
        kind="loss",
        confidence="code",
        formula="mean over response tokens of KL(p || q), KL(q || p) or JSD(p, q), on sequences in which every token the student "
        "proposes that is not among the teacher's top 25 is drawn from the teacher",
        use="draft = teacher_sequences.argmin(-1)  # what the student proposes\n"
        "found = kd.on_policy.speculative_acceptance(teacher_sequences, draft, k=25, temperature=0.2, top_p=0.5)\n"
        "assert not found.accepted.any()\n"
        'loss = kd.losses.SpeculativeKD("forward_kl")(student_sequences, teacher_sequences, mask)',
        cost="the divergence's, 2 sweeps; acceptance counts in one sweep and draws in another, without full logits of heads",
        notes="The code's JSD has its arguments swapped and it skips the row that predicts the first response token; neither "
        "is copied. Student temperature 0.5 and top-p 0.5, 5 draft tokens a time.",
    ),
)

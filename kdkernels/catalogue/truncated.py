"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="ced_topk_bce",
        title="CED: consistent ensemble distillation for audio tagging",
        source="Dinkel et al., ICASSP 2024",
        chapter="B",
        kind="loss",
        confidence="code",
        formula="mean BCE(sigmoid(s), b), b = stored top-k scores, min(top-k) / (C - k) elsewhere",
        use="""\
scores, ids = torch.sigmoid(teacher).topk(20)  # as stored
loss = kd.losses.CED()(student, ids, scores)""",
        cost="one sweep for value and gradient; targets are made dense a chunk of rows at a time",
        notes="The code takes the cross-entropy of sigmoid outputs; this one takes logits, which do not saturate.",
    ),
)

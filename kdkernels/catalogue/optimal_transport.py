"""Entries of the catalogue: optimal transport."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="sinkd",
        title="SinKD: Sinkhorn distance minimisation",
        source="Cui et al. 2024, COLING, arXiv 2402.17110",
        chapter="C",
        kind="loss",
        confidence="code",
        formula="c sum_ij P_ij |x_i - y_j|_1 over a batch, x = softmax(s / 2), y = softmax(t / 2), P by 20 Sinkhorn iterations",
        use="""\
sinkhorn = kd.losses.SinKD(1e-3)
loss = kd.distillation_loss(student, teacher, labels=labels, ce_weight=0.1) + sinkhorn(student, teacher)""",
        cost="pairwise L1: b^2 V forward and backward for b samples; [b, b] numbers",
        notes="The published loss grows with the batch (mass='unit' does not). Its temperature is always 2, whatever is passed. "
        "Weights of the sum are settings per task.",
    ),
    Entry(
        key="uld",
        title="ULD: universal logit distillation across tokenizers",
        source="Boizard et al. 2025, TMLR, arXiv 2402.12030",
        chapter="C",
        kind="loss",
        confidence="code",
        formula="CE + 1.5 mean_b mean_t sum_r |q_(r) - p_(r)|, probabilities sorted, the shorter vocabulary padded with zeros",
        use="""\
answers = token_ids.masked_fill(~mask, -100)
loss = kd.losses.ULD(1.5)(student_sequences, torch.randn(2, 6, 70), answers, answers)""",
        cost="exact without sorting the vocabulary: about 2 sweeps, sorts of the largest; 1 more for the cross-entropy",
        notes="error_bound= leaves tails unsorted within a proven bound. Answers are compared position by position.",
    ),
    Entry(
        key="cot2align",
        title="CoT2Align: chains of thought aligned by optimal transport",
        source="CoT2Align 2025, arXiv 2502.16806",
        chapter="C",
        kind="loss",
        confidence="general",
        formula="(1 - a) CE + a (KD + L_OT + L_CRC); L_OT = <P, 1 - cos(h_S, W h_T)> between token states at chosen layers",
        use="""\
transport = kd.losses.CoT2Align([16, 16], [24, 24], alpha=0.5)
answers = token_ids.masked_fill(~mask, -100)
states = transport(student_layers[::2], teacher_layers[::5], mask, mask)
logits = kd.losses.ULD(ce_weight=0.0)(student_sequences, teacher_sequences, answers, answers)
loss = transport.combine(-kd.token_log_probs(student_sequences, token_ids, mask=mask).sum() / mask.sum(), logits, states)""",
        cost="nothing of the vocabulary; [B, n, m] costs and 100 iterations per layer",
        notes="The transport's constants are from other code, the composition from memory.",
    ),
    Entry(
        key="wcord",
        title="WCoRD: Wasserstein contrastive representation distillation",
        source="Chen et al. 2021, CVPR, arXiv 2012.08674",
        chapter="C",
        kind="loss",
        confidence="general",
        formula="0.8 L_contrast (dual, 1-Lipschitz critic, CRD form) + 0.05 <P, 1 - cos> (primal, entropic)",
        use="""\
wcord = kd.losses.WCoRD(16, 24, dataset_size=50000)
loss = wcord(student_features, teacher_features) - kd.token_log_probs(student, labels).mean()""",
        cost="nothing of the vocabulary; [B, B] costs, and [B, K] scores of negatives",
        notes="Negatives are the batch and what is passed, in place of a memory of 16384.",
    ),
)

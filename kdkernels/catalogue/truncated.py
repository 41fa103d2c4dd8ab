"""Entries of the catalogue: truncated and stored teachers."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="first_topk",
        title="FIRST: efficient trustworthy distillation from recalibrated top-5 probabilities",
        source="Shum et al. 2024, EMNLP, arXiv 2408.12168",
        chapter="B",
        kind="loss",
        confidence="code",
        formula="sum KL(p~ || q~) / batch; p~ = softmax(p_K / c) of probabilities, q~ = (q_K + eps) / sum(q_K + eps)",
        use="""\
topk = kd.topk_logits(teacher_sequences, 5)
first = kd.losses.FIRST(0.2)
first.fit(topk, token_ids)  # c by calibration, on held-out tokens
loss = first(student_sequences, topk, mask=mask)""",
        cost="1 sweep for the normaliser; k numbers per token (of a head k rows of its weight)",
        notes="The code takes probabilities for logarithms where it has the bucket, and smooths log-probabilities; neither is "
        "copied. The search for c is from summaries.",
    ),
    Entry(
        key="pretraining_distillation",
        title="Pre-training distillation: a design space exploration",
        source="Peng et al. 2025, ACL, arXiv 2410.16215",
        chapter="B",
        kind="loss",
        confidence="secondary",
        formula="(1 - a) CE + a L; L = -sum_K F log q (or KL, or squared error), F = softmax(top-p-then-k logits / tau)",
        use="""\
topk = kd.topk_logits(teacher, 20, top_p=0.95)  # or from kd.store
alpha = kd.weighting.WarmupStableDecay(0.9, 10000, warmup=500, decay=2000)
objective = kd.losses.PretrainingDistillation(temperature=0.5)
loss = objective(student, topk, labels, alpha=alpha.at(3000))""",
        cost="1 sweep, cross-entropy included; 'mse' 2",
        notes="top-p 0.95, k 100 and a = 0.9 are from memory. The student keeps its full vocabulary. kd.SampledLogits serve as "
        "an unbiased store in place of the cut one.",
    ),
    Entry(
        key="kd_topk_uniform",
        title="KD-topk, KD-pt, KD-sim: what of the teacher's distribution helps",
        source="Tang et al. 2020, arXiv 2002.03532",
        chapter="B",
        kind="loss",
        confidence="general",
        formula="(1 - lam) CE + lam tau^2 SCE(rho, q); rho = top k of p, or p_y, the rest uniform; or softmax of class similarity",
        use="""\
loss = kd.losses.TopKUniform(0.9, temperature=4.0, k=10)(student, teacher, labels)
partial = kd.losses.TopKUniform(0.9, temperature=4.0, form="label")(student, teacher, labels)
classes = torch.nn.functional.normalize(teacher_head.weight, dim=-1)  # KD-sim: a head of class similarities
similar = kd.distillation_loss(student, kd.LMHead(classes[labels], classes), teacher_temperature=0.3)""",
        cost="1 sweep, cross-entropy included, after one of the teacher; k numbers per token",
        notes="tau 3 to 5, k 10 to 50. The temperature of KD-sim was not available.",
    ),
    Entry(
        key="mqsa_ted",
        title="MQSA-TED: item transitions distilled into multi-query self-attention",
        source="Zhu et al. 2024, WSDM, arXiv 2311.01056",
        chapter="B",
        kind="loss",
        confidence="code",
        formula="CE + lam SCE(softmax((c / max c) / tau), softmax(e_i E^T / tau)), c counts of transitions from item i",
        use="""\
embedding = torch.randn(50, 16, requires_grad=True)
items = kd.LMHead(embedding[labels], embedding)
followers = torch.rand(8, 50).topk(4).indices  # ids of the counts that are not 0, -1 where there are fewer
counts = torch.tensor([5.0, 2.0, 1.0, 1.0]).expand(8, 4)
loss = kd.losses.TransitionDistillation()(items, followers, counts) - kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep; the counts stay sparse: items without a count share one logit, in closed form",
        notes="The soft term is between item embeddings, not the sequence's output. kd.losses.truncated.constant_logit_tail "
        "makes such a teacher of any named entries.",
    ),
    Entry(
        key="nat_lexical_prior",
        title="Lexical choice in non-autoregressive translation: a dictionary as a prior",
        source="Ding et al. 2021, ICLR, arXiv 2012.14583",
        chapter="B",
        kind="loss",
        confidence="general",
        formula="lam_i KL(Q || q) + (1 - lam_i) CE; lam_i = log(I / (2 (i + 1))) / log(I / 2), 0 from half of the steps on",
        use="""\
prior = kd.TopKLogits(torch.tensor([[3, 7], [4, -1]] * 4), torch.tensor([[0.7, 0.3], [1.0, 0.0]] * 4).log(), vocab_size=50)
loss = kd.losses.LexicalPrior(100000, temperature=2.0)(student, prior, labels, step=1000)""",
        cost="1 sweep, cross-entropy included; the prior's few entries per token",
        notes="The prior comes from word alignments of the raw data; kd.SampledLogits serve in kd.distillation_loss if it is "
        "sampled instead of cut.",
    ),
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
        cost="1 sweep for value and gradient; targets are made dense a chunk of rows at a time",
        notes="The code takes the cross-entropy of sigmoid outputs; this one takes logits, which do not saturate.",
    ),
)

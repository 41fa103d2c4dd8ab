"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

LISTS = "none over a vocabulary; a few tensors of the size of the scores"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="pld",
        title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        source="NeurIPS 2025",
        chapter="E",
        kind="loss",
        confidence="paper",
        formula="sum_k w_k (logsumexp_{l >= k} s[pi_l] - s[pi_k]); pi = the label, then by falling teacher logit; "
        "w = softmax(t)[pi]",
        use="loss = kd.losses.PLD()(student, teacher, labels)\n"
        "top = kd.losses.PLD(top_k=10)(student_head, teacher_head, labels)  # for large vocabularies\n"
        "loss = loss + top",
        cost="A sort of each row and two scans, no tensor of the logits' size beside the gradient. With top_k: a sweep over "
        "the teacher and two over the student, no sort.",
        notes="Replaces cross-entropy and KL without a weight between them. The truncated form is not the paper's: its terms "
        "are those of the first ranks, unchanged. The weights (1, 0, ..) give cross-entropy, uniform ones ListMLE.",
    ),
    Entry(
        key="margin_mse",
        title="Margin-MSE: Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        source="Hofstätter et al. 2020, arXiv 2010.02666",
        chapter="E",
        kind="loss",
        confidence="code",
        formula="mean ((s+ - s-) - (t+ - t-))^2; over all pairs of a list 2 Var(s - t)",
        use="loss = kd.losses.MarginMSE()(student_scores, teacher_scores)  # the first document against the others\n"
        'loss = loss + kd.losses.MarginMSE("all")(student_scores, teacher_scores)',
        cost=LISTS,
        notes="An ensemble of teachers is the mean of their scores. All pairs count i = j, which adds zeros.",
    ),
    Entry(
        key="cadet_listwise",
        title="Teaching Dense Retrieval Models to Specialize with Listwise Distillation and LLM Data Augmentation",
        source="arXiv 2502.19712",
        chapter="E",
        kind="loss",
        confidence="code",
        formula="KL(softmax(t / 0.3) || softmax(s / 0.05)) + 0.1 InfoNCE at temperature 0.01, without negatives whose "
        "teacher score exceeds 0.6 of the list's largest",
        use="scaled = kd.losses.ranking.percentile_scaled(teacher_scores)  # over the data, to [0, 1]\n"
        "loss = kd.losses.CADETListwise()(student_scores, scaled)",
        cost=LISTS,
        notes="No factor of a squared temperature. Sums run in float32 (in float64 for such scores, as the code has them).",
    ),
    Entry(
        key="disco_retrieval",
        title="DiSCo Meets LLMs: A Unified Approach for Sparse Retrieval and Contextual Distillation in Conversational Search",
        source="SIGIR 2025",
        chapter="E",
        kind="loss",
        confidence="code",
        formula="KL(softmax(t) || softmax(s)) over a positive and its negatives, s = <query, document> of sparse vectors, t the "
        "mean of several teachers; + FLOPS or L1 penalty",
        use="queries = torch.rand(4, 50, requires_grad=True)\n"
        "documents = torch.rand(4, 10, 50, requires_grad=True)\n"
        "loss = kd.losses.DiSCoRetrieval(query_sparsity=1e-3, document_sparsity=1e-3)(queries, documents, teacher_scores)",
        cost="one batched product of the vectors as they are given",
        notes="Contrastive and all-pairs Margin-MSE terms are options; which of the code's weights 0.01, 0.05 and 0.99 belongs "
        "to which was not available, so that they are off.",
    ),
    Entry(
        key="cprd",
        title="CPRD: How to Make Cross Encoder a Good Teacher for Efficient Image-Text Retrieval?",
        source="CVPR 2024",
        chapter="E",
        kind="loss",
        confidence="secondary",
        formula="mean over ranks i of -log(e^{s_i/T} / (e^{s_i/T} + sum_{ranked lower} e^{s_j/T} + sum_easy e^{s_j/T}))",
        use="similarity = torch.randn(8, 8, requires_grad=True)\n"
        "hard = torch.stack([torch.randperm(8)[:3] for _ in range(8)])\n"
        "ranked = torch.randn(8, 3)  # the cross encoder's scores of these\n"
        "cprd = kd.losses.CPRD(temperature=0.07)\n"
        "loss = (cprd(similarity, hard, ranked) + cprd(similarity.t(), hard, ranked)) / 2",
        cost="a sort of the candidates; one pass over the scores forward and one backward",
        notes="A Plackett-Luce likelihood truncated to the candidates. The number of candidates and T were not available.",
    ),
    Entry(
        key="trans_encoder",
        title="Trans-Encoder: Unsupervised sentence-pair modelling through self- and mutual-distillations",
        source="ICLR 2022",
        chapter="E",
        kind="loss",
        confidence="code",
        formula="into the cross-encoder BCE-with-logits(s, sg cos); into the bi-encoder (cos - sg s)^2; mutual: the mean of K "
        "models' scores",
        use="cosines = torch.nn.functional.cosine_similarity(student_features, student_features.detach().roll(1, 0))\n"
        'loss = kd.losses.TransEncoder("bi")(cosines, torch.rand(3, 8))\n'
        'loss = loss + kd.losses.TransEncoder("cross")(student_scores[0], teacher_scores[0].tanh())',
        cost=LISTS,
        notes="Raw cosines, which may be negative, are the targets of the cross-entropy, as in the code.",
    ),
)

"""Entries of the catalogue."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="dkd",
        title="DKD: decoupled knowledge distillation",
        source="Zhao et al. 2022 (CVPR), arXiv 2203.08679",
        chapter="blocks",
        kind="loss",
        confidence="code",
        formula="T^2 (alpha KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta KL(N(p) || N(q))), N the softmax without the label y",
        use="""\
loss = kd.losses.DKD(alpha=1.0, beta=0.5)(student, teacher, labels)
# the same of any divergence over the rest: kd.Decoupled(kd.JSD(0.5), target_weight=1.0, rest_weight=0.5)
""",
        cost="1 sweep, as the forward KL; no tensor of the logits' size beside the gradient",
        notes="alpha 1, beta 0.5 at T 1 are those of the code read; the authors set beta and T per pair of models. Copies differ "
        "in whether padding counts in the mean; here it does not.",
    ),
    Entry(
        key="atkd",
        title="ATKD: teaching modes by the teacher's certainty",
        source="Zhong et al. 2024 (ACL), arXiv 2402.11890",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="alpha mean_easy KL(N(p) || N(q)) + (1 - alpha) mean_hard (KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + "
        "KL(N(p) || N(q))); easy: 1 - p_y below the batch's lower median",
        use="loss = kd.losses.ATKD(alpha=0.2)(student, teacher, labels)\n",
        cost="1 sweep of the teacher for p_y, then one as the forward KL; both groups in the same call",
        notes="The code's TVD baseline keeps the padded tokens and its shipped DKD branch cannot run: neither is copied. "
        "reverse=True exchanges student and teacher, the split remains the teacher's.",
    ),
    Entry(
        key="nkd_uskd",
        title="NKD: normalised knowledge distillation, and USKD without a teacher",
        source="Yang et al. 2023 (ICCV), arXiv 2303.13005",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="-(1 + p_y) log q_y + gamma T^2 SCE(N(t / T), N(s / T)), N the softmax without the label y; "
        "USKD: soft labels by Zipf's law over the student's own ranks",
        use="""\
loss = kd.losses.NKD(gamma=1.5)(student, teacher, labels)
weak_head = torch.randn(8, 50, requires_grad=True)  # logits of a middle layer
loss = loss + kd.losses.USKD()(student, weak_head, labels)
""",
        cost="NKD: 1 sweep of the teacher for p_y, then one as the forward KL. USKD: a full sort of every row, and tensors "
        "like the logits",
        notes="USKD's code ranks by log q where the text has q: an argument chooses. Labels are hard here.",
    ),
    Entry(
        key="ofa_kd",
        title="OFA-KD: one for all, between heterogeneous architectures",
        source="Hao et al. 2023 (NeurIPS), arXiv 2310.19444",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="CE(y) + sum over final logits and stages of -sum_v r_v log q_v, r = (p + e_y)^epsilon - e_y",
        use="""\
stage = torch.nn.Linear(16, 50)(student_features)  # a projector of each stage to the classes
loss = kd.losses.OFAKD(epsilon=1.5)(student, teacher, labels, stages=[stage])
""",
        cost="1 sweep of the teacher, then one per group of logits as the forward KL",
        notes='The code raises all probabilities, the text that of the label alone: raised="label".',
    ),
    Entry(
        key="ttm_wttm",
        title="TTM and WTTM: (weighted) transformed teacher matching",
        source="Zheng and Yang 2024 (ICLR), arXiv 2402.11148",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="CE(y) + weight KL(softmax(gamma t) || softmax(s)); WTTM: each row times U = sum_v p_v^gamma",
        use="""\
loss = kd.losses.TTM(gamma=0.1, weight=45.0)(student, teacher, labels)
loss = loss + kd.losses.WTTM(gamma=0.2, weight=4.0)(student, teacher, labels)
""",
        cost="1 sweep, as the forward KL; WTTM one more of the teacher",
        notes="gamma and the weight are tuned for each pair of models. No factor T^2.",
    ),
    Entry(
        key="shike_dkt",
        title="SHIKE: experts taught by their hardest negatives",
        source="Jin et al. 2023 (CVPR)",
        chapter="A2",
        kind="recipe",
        confidence="general",
        formula="sum over experts e of KL(N(t) || N(s_e)), N the softmax without the label, t composed of the experts' logits",
        use="""\
experts = [student, torch.randn(8, 50, requires_grad=True), torch.randn(8, 50, requires_grad=True)]
grand_teacher = torch.stack(experts).detach().amax(0)  # of every class the most confident expert
apart = kd.Decoupled(target_weight=0.0)
loss = sum(kd.distillation_loss(e, grand_teacher, apart, temperature=2.0, labels=labels, ce_weight=1.0) for e in experts)
""",
        cost="1 sweep per expert, as the forward KL; the composed teacher is a tensor of the logits' size",
        notes="How the paper composes its teacher was not available: the largest logit of the experts keeps their hardest "
        "negatives. Its balanced softmax is a class bias of the student.",
    ),
    Entry(
        key="topkd_scaled",
        title="TopKD: the teacher's largest logits amplified, and divergences inside and outside of them",
        source="2025, arXiv 2508.04539",
        chapter="A2",
        kind="recipe",
        confidence="general",
        formula="KL(softmax(t') || q) + l1 D(t[I], s[I]) + l2 D(t[not I], s[not I]), I the teacher's k largest, t' = c t on I",
        use="""\
largest, scale = kd.topk_logits(teacher, 5).ids, 1.5
scaled = teacher.scatter(-1, largest, scale * teacher.gather(-1, largest))
inside = [logits.gather(-1, largest) for logits in (student, teacher)]
outside = [logits.scatter(-1, largest, -torch.inf) for logits in (student, teacher)]
loss = kd.distillation_loss(student, scaled) + kd.distillation_loss(*inside) + kd.distillation_loss(*outside)
""",
        cost="2 sweeps as the forward KL and one for the k largest; three tensors of the logits' size",
        notes="The paper's rule for c and its weights were not available. Another paper of that name is about topology.",
    ),
    Entry(
        key="dhkd",
        title="DHKD: dual-head knowledge distillation",
        source="Yang et al., 2024",
        chapter="A2",
        kind="loss",
        confidence="code",
        formula="T^2 mean_n sum_c BinKL(1/2, sigmoid((s - t) / T)) on an auxiliary head, T = 2",
        use="loss = kd.losses.DHKD()(student, teacher)",
        cost="1 sweep for value and gradient; nothing beside",
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
        cost="3 sweeps for the divergence, one for each label; heads: their logits, N x V",
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
        cost="1 sweep for value and gradient of the aspects, PyTorch's cross-entropy for the classes",
        notes="alpha was not available; the default is 1.",
    ),
)

"""Divergences over the vocabulary from a dense teacher, or from a target made of several sources."""

from __future__ import annotations

from functools import partial

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

entry = partial(Entry, chapter="A")

ONE_SWEEP = "1 sweep; nothing of the vocabulary's size"

ENTRIES: tuple[Entry, ...] = (
    entry(
        key="taid",
        title="TAID: temporally adaptive interpolated distillation",
        source="Shing et al., ICLR 2025, arXiv 2501.16937",
        kind="loss",
        confidence="code",
        formula="SCE(p_c, q), p_c = softmax((1 - c) sg(s) + c t); c rises with the progress of the loss",
        use="taid = kd.losses.TAID(1000)\nloss = taid(student_sequences, teacher_sequences, mask=mask)",
        cost=ONE_SWEEP + "; of heads, one product per model",
        notes="The schedule (kd.weighting.TAIDSchedule) feeds on the cross-entropy, is kept in state_dict and never leaves "
        "the device. It starts at 0.4 as in the code; one script starts at 0.2.",
    ),
    entry(
        key="gkd",
        title="GKD: generalised knowledge distillation, on-policy",
        source="Agarwal et al., ICLR 2024, arXiv 2306.13649",
        kind="loss",
        confidence="third-party",
        formula="JSD_beta(p, q), beta on the teacher; beta 0: KL(p||q), beta 1: KL(q||p)",
        use="loss = kd.losses.GKD(beta=0.5)(student_sequences, teacher_sequences, mask=mask)",
        cost="2 sweeps; one where beta is 0 or 1",
        notes="The values jump at beta 0 and 1, where JSD itself would vanish. Half of the sequences are the student's own, "
        "generated at 0.9, which the loss does not see. Another code base puts beta on the student.",
    ),
    entry(
        key="distillm_skl",
        title="DistiLLM: skew KL divergences",
        source="Ko et al., ICML 2024, arXiv 2402.03898",
        kind="arguments",
        confidence="code",
        formula="KL(p || a p + (1 - a) q), or KL(q || (1 - a) p + a q), a = 0.1",
        use="loss = kd.distillation_loss(student, teacher, kd.SkewForwardKL(0.1))\n"
        "reverse = kd.distillation_loss(student, teacher, kd.SkewReverseKL(0.1))",
        cost="2 sweeps; nothing of the vocabulary's size",
        notes="The code leaves the teacher's entropy out of the value, and gives NaN gradients where logits are -inf; this does "
        "not. Tokens with labels of -100 do not count.",
    ),
    entry(
        key="minillm",
        title="MiniLLM: reverse KL as a policy gradient, with its exact single-step part",
        source="Gu et al., ICLR 2024, arXiv 2306.08543",
        kind="loss",
        confidence="code",
        formula="PPO on r = log p(y) - log q(y) of sampled y, + mean KL(q||p), + (1 - k) CE + k SCE(p, q) on data, k = 0.5",
        use="policy = kd.losses.MiniLLM()(student_sequences, teacher_sequences, token_ids, mask)\n"
        "pretraining = kd.distillation_loss(student, teacher, kd.SoftCrossEntropy(), labels=labels, ce_weight=1.0)\n"
        "loss = policy + 0.5 * pretraining",
        cost="3 sweeps of the student's logits, three of the teacher's, and the backward's",
        notes="Several steps on one batch take rollout=MiniLLM.rollout(...). In the code padding enters the whitening and rewards "
        "are not masked; here only response tokens count.",
    ),
    entry(
        key="promptkd",
        title="PromptKD: a soft prompt makes the teacher suit the student",
        source="Kim et al., Findings of EMNLP 2024, arXiv 2402.12842",
        kind="loss",
        confidence="code",
        formula="student: KL(q||p'); prompt: KL(p'||q) + (1 - step/total) c KL(p'||p), p' the teacher behind the prompt",
        use="prompted = teacher_sequences.clone().requires_grad_()\n"
        "promptkd = kd.losses.PromptKD()\n"
        "prompt_loss = promptkd.prompt_loss(prompted, student_sequences, teacher_sequences, 0.1, mask=mask)\n"
        "prompt_loss.backward()\n"
        "loss = promptkd(student_sequences, prompted, mask=mask)",
        cost="1 sweep for the student, two for the prompt",
        notes="Two optimizers, two steps. Slice the prompt's positions off first.",
    ),
    entry(
        key="delta_kd",
        title="Delta-KD: what tuning changed in the teacher, added to the raw student",
        source="arXiv 2509.14526 (2025)",
        kind="loss",
        confidence="secondary",
        formula="lam CE + (1 - lam) KL(softmax(z/T) || softmax(s/T)), z = s_raw + alpha (t_tuned - t_raw)",
        use="raw_student, tuned_teacher, raw_teacher = teachers\n"
        "loss = kd.losses.DeltaKD(1.0, 0.5)(student, raw_student, tuned_teacher, raw_teacher, labels)",
        cost="1 sweep over four rows of logits; nothing of the vocabulary's size",
        notes="No defaults are known. The exponent form of the target is recalled, and the parallelogram variant unknown.",
    ),
    entry(
        key="self_evolution_kd",
        title="Self-Evolution KD: hard tokens learn through a helped student",
        source="Song et al., COLING 2025, arXiv 2412.15303",
        kind="loss",
        confidence="secondary",
        formula="r = w e_y + (1 - w) p; easy: KL(r||q); hard (KL > threshold): KL(r || (1 - b) q + b r)",
        use="loss = kd.losses.SelfEvolutionKD(0.5, threshold=2.0, proxy=0.5)(student, teacher, labels)",
        cost="2 sweeps, and two for statistics",
        notes="Threshold and b are tuned in the paper.",
    ),
    entry(
        key="mix_cpt_lssd",
        title="Mix-CPT: logit-swap self-distillation",
        source="Jiang et al., ICLR 2025, arXiv 2407.10804",
        kind="loss",
        confidence="third-party",
        formula="CE + a KL(softmax(t') || q), t' = t with the logits of its argmax and of the label exchanged",
        use="loss = kd.losses.LSSD(0.3)(student, teacher, labels)",
        cost="1 sweep, and 1 read of the teacher",
        notes="The weight of 0.3 is that code's, which does not mask labels of -100; this does.",
    ),
    entry(
        key="bd_kd",
        title="BD-KD: balancing the divergences by sample",
        source="Amara et al. 2022, arXiv 2212.12965",
        kind="loss",
        confidence="secondary",
        formula="CE + lam (a KL(p||q) + b KL(q||p)); (a, b) = (d, 1) where H(p) > H(q), else (1, d); teacher: CE + KL(p||sg q)",
        use="trained_teacher = teacher.clone().requires_grad_()\n"
        "bd_kd = kd.losses.BDKD()\n"
        "loss = bd_kd(student, trained_teacher, labels) + bd_kd.teacher_loss(trained_teacher, student, labels)",
        cost="1 sweep and one for statistics; one more for the teacher",
        notes="d = 2 and T = 4 are not sure; whether T^2 multiplies the divergences is an argument.",
    ),
    entry(
        key="every_expert_matters",
        title="Every Expert Matters: sampled experts of a mixture, augmented knowledge",
        source="Kim et al. 2025, arXiv 2502.12947",
        kind="loss",
        confidence="general",
        formula="(1/M) sum_m KL(q || p_m) = KL(q || softmax(mean_m t_m)) + const",
        use="loss = kd.losses.ExpertAugmentation()(student, list(teachers))",
        cost=ONE_SWEEP + "; exact_value=True reads each teacher once more for the constant",
        notes="The router's own loss, towards the student, is PromptKD.prompt_loss.",
    ),
    entry(
        key="swing_distillation",
        title="Swing distillation: hotter and noisier where tokens may be private",
        source="arXiv 2212.08349 (2022)",
        kind="arguments",
        confidence="general",
        formula="KL((1 - eta_i) softmax(t/tau_i) + eta_i u || q), tau_i and eta_i per token, u random",
        use="privacy = torch.rand(8)\n"
        "noise = torch.rand_like(teacher).log()\n"
        'mixture = kd.LogitMixture([teacher, noise], [1 - 0.1 * privacy, 0.1 * privacy], space="probabilities", '
        "temperature=1 + privacy)\n"
        "loss = kd.distillation_loss(student, mixture)",
        cost="1 sweep, and 1 read of each source; the noise is a tensor",
        notes="Range of the temperatures and scale of the noise are tuned in the paper; u is tempered like the teacher here.",
    ),
    entry(
        key="ctcd",
        title="Co-training and co-distillation",
        source="Lee et al., Findings of EMNLP 2023, arXiv 2311.02849",
        kind="loss",
        confidence="general",
        formula="a CE(small) + b KL(p_l||p_s) + a' CE(large) + b' KL(p_s||p_l), the teaching side constant",
        use="large = teacher.clone().requires_grad_()\nloss = kd.losses.CTCD()(student, large, labels)",
        cost="2 sweeps",
    ),
    entry(
        key="dac_kl",
        title="DAC-KL: a clipped teacher, and relations within spans",
        source="arXiv 2407.10068 (2024)",
        kind="loss",
        confidence="secondary",
        formula="CE + KL(softmax(clip(t, lo, hi)) || q) + mean over neighbours of a span of sum_v (q_i q_{i+1} - p_i p_{i+1})^2",
        use="spans = torch.tensor([[-1, 0, 0, 0, 1, 1], [-1, -1, 0, 0, 0, -1]])\n"
        "answers = token_ids.masked_fill(~mask, -100)\n"
        "lower, upper = teacher_sequences.quantile(torch.tensor([0.5, 0.99]), -1)\n"
        "loss = kd.losses.DACKL()(student_sequences, teacher_sequences, answers, lower=lower, upper=upper, spans=spans)",
        cost="1 sweep; the span term makes the probabilities of one sequence at a time, twice",
        notes="The bounds are constants here; the network that predicts them in the paper was not available. norm=True takes the "
        "root of each distance, as the other reading has it.",
    ),
    entry(
        key="ssld",
        title="SSLD: a simple distillation of backbones",
        source="Cui et al. 2021 (PaddleClas), arXiv 2103.05959",
        kind="arguments",
        confidence="code",
        formula="0.5 (KL(p||q) + KL(q||p))",
        use="loss = kd.distillation_loss(student, teacher, kd.Jeffreys(0.5))",
        cost=ONE_SWEEP,
        notes="The text says Jensen-Shannon; the code computes this. No hard labels.",
    ),
    entry(
        key="ff_g2m",
        title="FF-G2M: low and high frequencies of a graph network",
        source="Wu et al., AAAI 2023, arXiv 2305.10758",
        kind="loss",
        confidence="code",
        formula="lam CE + (1 - lam)(KL(t_j || s_i) + KL(softmax(|t_i - t_j|/T) || softmax(|s_i - s_j|/T))) over edges",
        use="edges = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 5, 3, 7]])\n"
        "loss = kd.losses.FFG2M()(student, teacher, edges, labels)",
        cost="2 sweeps over the edges; their logits are gathered, [E, C]",
        notes="The temperature of 1.5 is that of the second term alone. Self-loops count in the first.",
    ),
    entry(
        key="pesf_kd",
        title="PESF-KD: a teacher that adapts to the student",
        source="Rao et al. 2022, arXiv 2205.15308",
        kind="loss",
        confidence="general",
        formula="student: (1 - a) CE + a T^2 KL(p||q); adapter: CE(p) + T^2 KL(q||p)",
        use="adapted = teacher.clone().requires_grad_()\n"
        "pesf_kd = kd.losses.PESFKD()\n"
        "loss = pesf_kd(student, adapted, labels) + pesf_kd.teacher_loss(adapted, student, labels)",
        cost="1 sweep each",
        notes="Give the adapter's parameters alone to its optimizer. The sharpness gap is lse_teacher - lse_student of "
        "kd.token_statistics.",
    ),
    entry(
        key="even_your_teacher",
        title="Self-distillation with the ground truth kept in",
        source="Borup and Andersen, NeurIPS 2021, arXiv 2102.13088",
        kind="loss",
        confidence="code",
        formula="alpha MSE(q, e_y) + (1 - alpha) MSE(q, sg q_previous), means over samples and classes",
        use="loss = kd.losses.GroundTruthSelfDistillation(0.6)(student, teacher, labels)",
        cost="2 sweeps for each of two targets, and 1 read of the previous model",
        notes="alpha weights the ground truth. The theory takes outputs before the softmax; the code's penalty on un-squared "
        "norms is left to the optimizer.",
    ),
    entry(
        key="sla_sd",
        title="SLA+SD: self-supervised label augmentation",
        source="Lee et al., ICML 2020, arXiv 1910.05872",
        kind="loss",
        confidence="code",
        formula="CE(joint) + CE(single) + T^2 KL(sg softmax(a/T) || softmax(single/T)), a_c = mean_j joint(x_j)[cM + j]",
        use="joint = torch.randn(8, 4, 200, requires_grad=True)\nloss = kd.losses.SLASD()(student, joint, labels)",
        cost="1 sweep of either head",
    ),
    entry(
        key="lelp",
        title="LELP: classes split along the teacher's embeddings",
        source="Loo et al. 2024, arXiv 2409.20449",
        kind="loss",
        confidence="secondary",
        formula="SCE(p(c) softmax_k(+-u/beta), q(c, k)), u the embedding along principal directions unseen by the classifier",
        use="embeddings, classes = torch.randn(60, 24), torch.arange(60) % 5\n"
        "lelp = kd.losses.LELP(5, 24, directions=5)\n"
        "lelp.fit(embeddings, classes, torch.randn(5, 24))\n"
        "loss = lelp(student, teacher[:, :5], teacher_features)",
        cost="1 sweep; the target is a tensor [N, C K]",
        notes="That projections are divided by their standard deviations is said in one reading only (standardize).",
    ),
    entry(
        key="meal_v2",
        title="MEAL V2: the mean of several teachers",
        source="Shen and Savvides 2020, arXiv 2009.08453",
        kind="loss",
        confidence="code",
        formula="SCE((1/K) sum_k softmax(t_k), q) (+ BCE of a discriminator)",
        use="loss = kd.losses.MEALV2()(student, list(teachers[:2]))",
        cost="1 sweep, and 1 read of each teacher",
        notes="The code adds the discriminator's loss with the same sign for both networks, which makes it no adversary; it is "
        "there behind discriminator_weight, 0 unless asked for.",
    ),
    entry(
        key="random_teachers",
        title="Random teachers are good teachers",
        source="Sarnthein et al., ICML 2023, arXiv 2302.12091",
        kind="arguments",
        confidence="code",
        formula="SCE(softmax((t - centre)/tau_t), softmax(s/tau_s)), the teacher frozen at its initialisation",
        use="centre = teacher.mean(0)\n"
        "loss = kd.distillation_loss(student, kd.Logits(teacher, class_bias=-centre), kd.SoftCrossEntropy(),\n"
        "                            temperature=0.1, teacher_temperature=0.04)",
        cost=ONE_SWEEP,
        notes="The paper has both temperatures at 1 and no centre; those shown are of an older configuration and of DINO.",
    ),
)

"""Entries of the catalogue: recipes of standard losses."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

BOTH = "1 sweep, both terms"
GENERAL = "Only the general form is known."

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="medusa_heads",
        title="Medusa: decoding heads that predict further ahead",
        source="Cai et al. 2024, ICML, arXiv 2401.10774",
        chapter="H",
        kind="loss",
        confidence="code",
        formula="0.2 sum_k 0.8^k CE(head_k(h), y_{t+k+1}), k = 1..5; self-distillation: 0.01 of it + KL(sg base || with adapters)",
        use="""\
hidden = student_layers[-1]
heads = [kd.LMHead(hidden, torch.randn(50, 16, requires_grad=True)) for _ in range(5)]
ahead = kd.losses.MedusaHeads()(heads, token_ids.masked_fill(~mask, -100), weight=0.01)
loss = ahead + kd.distillation_loss(student_sequences, teacher_sequences, mask=mask)  # teacher: adapters switched off""",
        cost="1 sweep per head, one after another from one hidden state: [K, B, T, V] is never stored",
        notes="The legacy trainer has no decay; the code's KL counts padding, which is not copied.",
    ),
    Entry(
        key="mend",
        title="MEND: demonstrations distilled into a few vectors",
        source="Li et al. 2024, ICLR, arXiv 2403.06914",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="KL(sg p(. | demonstrations, x) || q(. | vectors, x)) + CE at the query's tokens, one frozen model",
        use="""\
weight = torch.randn(50, 16)  # the head of the one model
long_hidden, long_mask = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)
long_mask[0, 4:9] = long_mask[1, 5:8] = True  # the query's tokens behind the demonstrations
query = kd.LMHead(student_layers[-1][mask], weight)  # its tokens behind the vectors
full = kd.LMHead(long_hidden[long_mask], weight)
loss = kd.distillation_loss(query, full, labels=token_ids[mask], ce_weight=1.0)""",
        cost="1 sweep of the query's tokens alone; hidden states are picked out before the head",
        notes="Pretraining uses the KL alone. Both masks must pick as many tokens, in the same order.",
    ),
    Entry(
        key="mu_encoder_decoder",
        title="Mu: an encoder-decoder student of a decoder-only teacher",
        source="Return of the Encoder 2025, arXiv 2501.16273",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="0.9 KL(p || q) + 0.1 CE, teacher rows from encoder length - 1 on, both vocabularies cut before the softmax",
        use="""\
encoder_length = 4
whole = torch.randn(2, 11, 60)  # the teacher on input and output together, with another padding of the vocabulary
aligned = whole[:, encoder_length - 1 : encoder_length - 1 + 6]
loss = 0.9 * kd.distillation_loss(student_sequences, aligned, vocab_size=50, mask=mask, labels=token_ids, ce_weight=1 / 9)""",
        cost=BOTH + "; slices of hidden states or logits are not copied",
        notes="The code counts padding rows; the mask here does not. The class there defaults to 1.0 in place of 0.9.",
    ),
    Entry(
        key="llava_mod",
        title="LLaVA-MoD: mimic and preference distillation into a mixture of experts",
        source="Shu et al. 2025, ICLR, arXiv 2408.15881",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="mean SCE(p, q), and DPO with the teacher as reference: -log sigma(0.1 ((log pi_S - log pi_T)(y+) - (...)(y-)))",
        use="""\
mimic = kd.distillation_loss(student_sequences, teacher_sequences, mask=mask, vocab_size=50)
worse = torch.randint(50, (2, 6))  # the rejected answers, with both models' logits on them
student_worse, teacher_worse = torch.randn(2, 6, 50, requires_grad=True), torch.randn(2, 6, 50)
preference = kd.losses.TeacherDPO(beta=0.1)(
    student_sequences, student_worse, teacher_sequences, teacher_worse, token_ids, worse,
    chosen_mask=mask, rejected_mask=mask)
loss = mimic + preference  # two stages of the paper, one after the other""",
        cost="1 sweep to mimic; 1 of each side per answer, a number per token",
        notes="The loss mask of the code is not shifted against the logits, and its vocabulary is cut at a fixed number; neither "
        "is copied. beta = 0.1 is from memory. The KL has the gradient of SCE.",
    ),
    Entry(
        key="llm_neo",
        title="LLM-Neo: distillation through low-rank adapters",
        source="Yang et al. 2025, ICASSP, arXiv 2411.06839",
        chapter="H",
        kind="arguments",
        confidence="code",
        formula="0.5 CE + 0.5 KL(p || q), mean over the tokens of the answer",
        use="""\
loss = 0.5 * kd.distillation_loss(student_sequences, teacher_sequences, mask=mask, labels=token_ids, ce_weight=1.0)""",
        cost=BOTH,
        notes="The code's mask is not shifted: off by one where the prompt ends; not copied.",
    ),
    Entry(
        key="dho",
        title="DHO: two heads, one for labels and one for the teacher",
        source="Kang et al. 2025, ICCV, arXiv 2505.07675",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="0.5 CE(head_1, y) + 0.5 T^2 KL(head_2, all data); inference: 0.5 q_1 + 0.5 softmax(z_2 / 0.5)",
        use="""\
hard = kd.LMHead(student_features, torch.randn(50, 16, requires_grad=True))
soft = kd.LMHead(student_features, student_head.weight)
kl = kd.distillation_loss(soft, teacher, temperature=2.0, temperature_squared=True)  # once more for unlabelled samples
loss = 0.5 * kl - 0.5 * kd.token_log_probs(hard, labels).mean()""",
        cost="1 sweep per term",
        notes="The scripts for ImageNet drop both factors of 0.5.",
    ),
    Entry(
        key="align_ti",
        title="Align-TI: token interactions, not only next tokens",
        source="2026, arXiv 2602.09483",
        chapter="H",
        kind="recipe",
        confidence="secondary",
        formula="CE + KL + weighted distance of visual tokens + KL(p || q) one step behind a token drawn from the student",
        use="""\
drawn = kd.sample_logits(student_sequences, 1).ids.squeeze(-1)
student_step, teacher_step = torch.nn.Embedding(50, 50), torch.nn.Embedding(50, 50)  # a step of both models
transitions = kd.distillation_loss(student_step(drawn), teacher_step(drawn).detach(), mask=mask)
attention = torch.rand(2, 6).softmax(-1)  # of the instruction to the visual tokens
visual = (attention * (student_layers[0] - teacher_layers[0][..., :16]).square().mean(-1)).sum(-1).mean()
tokens = kd.distillation_loss(student_sequences, teacher_sequences, mask=mask, labels=token_ids, ce_weight=1.0)
loss = tokens + transitions + visual""",
        cost="1 sweep for the tokens, 1 to draw, 1 for the step behind",
        notes="Weights and how many tokens are drawn were not available.",
    ),
    Entry(
        key="quantized_distillation",
        title="Quantised distillation: a low-precision student of a full-precision teacher",
        source="Polino et al. 2018, ICLR, arXiv 1802.05668",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="0.7 tau^2 KL(p || q) + 0.3 CE, tau 2; optionally the teacher is asked only where the student is unsure or wrong",
        use="""\
found = kd.token_statistics(student, teacher, labels)
ask = (found.entropy_student > 2.0) | (found.argmax_student != labels)
soft = kd.distillation_loss(student, teacher, temperature=2.0, temperature_squared=True, mask=ask, normalizer=8)
loss = 0.7 * soft - 0.3 * kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep per term, 1 to decide whom to ask",
        notes="The code's KL is a mean over N V elements, far weaker than the formula; not copied. For translation tau 1.",
    ),
    Entry(
        key="well_read_students",
        title="Well-read students: pretrain the student, then distil on unlabelled data",
        source="Turc et al. 2019, arXiv 1908.08962",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="SCE(p, q), no labels",
        use="""\
loss = kd.distillation_loss(student, teacher)""",
        cost="1 sweep",
        notes="The KL has the gradient of SCE.",
    ),
    Entry(
        key="distilling_step_by_step",
        title="Distilling step by step: rationales as a second task",
        source="Hsieh et al. 2023, ACL Findings, arXiv 2305.02301",
        chapter="H",
        kind="recipe",
        confidence="code",
        formula="0.5 CE(label tokens) + 0.5 CE(rationale tokens); in the text L_label + lam L_rationale, lam 1",
        use="""\
rationale, rationale_ids = torch.randn(2, 6, 50, requires_grad=True), torch.randint(50, (2, 6))
answer = -kd.token_log_probs(student_sequences, token_ids, mask=mask).sum() / mask.sum()
loss = 0.5 * answer - 0.5 * kd.token_log_probs(rationale, rationale_ids).mean()""",
        cost="1 sweep per term",
        notes="The teacher writes text; there are no soft targets.",
    ),
    Entry(
        key="romanian_bert_kd",
        title="Distilled Romanian BERTs: DistilBERT's objective with several teachers",
        source="Avram et al. 2022, LREC, arXiv 2112.12650",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="5 tau^2 KL(p || q) + 2 masked-LM CE + 1 (1 - cos h), tau 2; several teachers: the mean of their probabilities",
        use="""\
target = torch.stack([teacher_sequences, torch.randn(2, 6, 50)]).log_softmax(-1).logsumexp(0)
soft = kd.distillation_loss(student_sequences, target, temperature=2.0, temperature_squared=True)
masked_lm = -kd.token_log_probs(student_sequences, token_ids, mask=mask).sum() / mask.sum()
project = torch.nn.Linear(24, 16)
cosine = torch.nn.functional.cosine_similarity(student_layers[-1], project(teacher_layers[-1]), dim=-1)
loss = 5.0 * soft + 2.0 * masked_lm + (1 - cosine).mean()""",
        cost="1 sweep per term; logits [B, T, V] of the mean",
        notes="Weights and temperature are those of DistilBERT. Widths agree there; the projection is only for other ones.",
    ),
    Entry(
        key="echoatt",
        title="Logits and hidden states while attention is shared among layers",
        source="EchoAtt 2024, arXiv 2409.14595",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="CE + KL(p || q) + mean squared error of the hidden states of kept layers",
        use="""\
project = torch.nn.Linear(16, 24)
tokens = kd.distillation_loss(student_sequences, teacher_sequences, mask=mask, labels=token_ids, ce_weight=1.0)
kept = zip(student_layers, teacher_layers[1::2])
loss = tokens + sum(torch.nn.functional.mse_loss(project(own), target) for own, target in kept)""",
        cost=BOTH + "; hidden states",
        notes=GENERAL,
    ),
    Entry(
        key="teacher_hacking",
        title="Teacher hacking: what distilling from one source of data for long does",
        source="Tiapkin et al. 2025, ICML, arXiv 2502.02671",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="E sum_t D(p || q), D forward or reverse KL or JSD, on fixed data, the teacher's or the student's samples",
        use="""\
loss = kd.distillation_loss(student_sequences, teacher_sequences, kd.JSD(0.5), mask=mask)
oracle_sequences = torch.randn(2, 6, 50)  # a third model, which nobody trains on
drift = kd.token_statistics(student_sequences, oracle_sequences, mask=mask).forward_kl.sum() / mask.sum()""",
        cost="1 sweep; 1 for the divergence from the oracle",
        notes="The paper's remedy for stored teachers is diverse data.",
    ),
    Entry(
        key="generalization_fidelity",
        title="Generalisation against fidelity in distillation",
        source="2025, ACL Findings",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="CE on the teacher's text (SeqKD), KL(p || q) at a temperature, KL(q || p)",
        use="""\
sequence_level = -kd.token_log_probs(student_sequences, token_ids, mask=mask).sum() / mask.sum()  # ids: teacher's text
forward = kd.distillation_loss(student_sequences, teacher_sequences, temperature=2.0, mask=mask)
reverse = kd.distillation_loss(student_sequences, teacher_sequences, kd.ReverseKL(), mask=mask)
loss = sequence_level + forward + reverse  # three objectives, to be used one at a time""",
        cost="1 sweep each",
        notes="A study of existing losses.",
    ),
    Entry(
        key="kd_interpretability",
        title="The impact of distillation on interpretability",
        source="Han et al. 2023, ICML, arXiv 2305.15734",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="(1 - a) CE + a tau^2 KL(p || q), tau about 4",
        use="""\
alpha = 0.9
soft = kd.distillation_loss(
    student, teacher, temperature=4.0, temperature_squared=True, labels=labels, ce_weight=(1 - alpha) / alpha
)
loss = alpha * soft""",
        cost=BOTH,
        notes="Compared with label smoothing, whose student is no easier to interpret.",
    ),
    Entry(
        key="resnet_kd_demystified",
        title="Demystification of distillation with residual networks",
        source="2020, arXiv 2006.16589",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="(1 - a) CE + a tau^2 KL(p || q)",
        use="""\
soft = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True, labels=labels, ce_weight=1 / 9)
loss = 0.9 * soft""",
        cost=BOTH,
        notes="Plain distillation; a and tau as usual for classifiers.",
    ),
    Entry(
        key="distildoc",
        title="DistilDoc: distillation for visually-rich documents",
        source="Van Landeghem et al. 2024, ICDAR, arXiv 2406.08226",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="a comparison: KL over temperatures, squared error of logits, FitNet, SimKD with a projector, others",
        use="""\
soft = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True)
logits = torch.nn.functional.mse_loss(student, teacher)
project = torch.nn.Linear(16, 24)
simkd = torch.nn.functional.mse_loss(project(student_features), teacher_features)  # then the teacher's own head
loss = soft + logits + simkd  # objectives to be used one at a time""",
        cost="1 sweep each",
        notes="No loss of its own; NKD and ReviewKD have theirs.",
    ),
    Entry(
        key="wakd",
        title="WAKD: averaged student weights under domain shift",
        source="Berezovskiy, Morozov 2023, ICCV workshops, arXiv 2309.11446",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="KL(p || q) (+ CE); the student's weights are averaged from some step on",
        use="""\
model, inputs = torch.nn.Linear(16, 50), torch.randn(8, 16)
averaged = torch.optim.swa_utils.AveragedModel(model)
loss = kd.distillation_loss(model(inputs), teacher, temperature=4.0, temperature_squared=True)
averaged.update_parameters(model)  # after each step from the start of averaging on""",
        cost="1 sweep; a copy of the model",
        notes="Averaging is the trainer's: PyTorch has it.",
    ),
    Entry(
        key="pcoreset",
        title="PCoreSet: active distillation from vision-language models",
        source="Kang et al. 2025, arXiv 2506.00910",
        chapter="H",
        kind="helper",
        confidence="general",
        formula="lam CE(labelled) + (1 - lam) KL(p || q) on all, two heads; asks about the farthest samples in probability space",
        use="""\
asked = kd.weighting.farthest_first(student.softmax(-1), 3)  # of the unlabelled
hard = kd.LMHead(student_features, torch.randn(50, 16, requires_grad=True))
soft = kd.distillation_loss(student, teacher, temperature=2.0, temperature_squared=True)
loss = 0.5 * soft - 0.5 * kd.token_log_probs(hard, labels).mean()""",
        cost="1 sweep per term; a step per chosen sample over [N, C]",
        notes="Temperature and heads as of DHO.",
    ),
    Entry(
        key="kid_text2sql",
        title="KID: distillation on imperfect data for text-to-SQL",
        source="Zhong et al. 2024, EMNLP Findings, arXiv 2410.11371",
        chapter="H",
        kind="recipe",
        confidence="secondary",
        formula="token KL on y^ (+ CE on the gold query); y^: spans of the gold query masked and filled by the student in one pass",
        use="""\
span = mask & (torch.rand(2, 6) < 0.3)
guessed = kd.token_statistics(student_sequences).argmax_student  # one parallel pass over the masked query
imperfect = torch.where(span, guessed, token_ids)  # both models then run on this
on_imperfect = kd.distillation_loss(student_sequences, teacher_sequences, kd.ReverseKL(), mask=mask)
loss = on_imperfect - kd.token_log_probs(student_sequences, token_ids, mask=mask).sum() / mask.sum()""",
        cost="1 sweep to fill the masks, 1 per term; no decoding",
        notes="The divergence and the ratio of masks are tuned in the paper; the loss is from memory.",
    ),
    Entry(
        key="rl_kickstarting",
        title="Kickstarting against forgetting when models are fine-tuned by reinforcement",
        source="Wołczyk et al. 2024, ICML, arXiv 2402.02868",
        chapter="H",
        kind="arguments",
        confidence="general",
        formula="L_RL + beta_t KL(pi* || pi) on the states visited, beta_t = beta_0 0.99998^t",
        use="""\
beta = kd.weighting.ExponentialDecay(2.0, 0.99998)
advantage = torch.randn(8)
policy = -(advantage * kd.token_log_probs(student, labels)).mean()
loss = policy + beta.at(5000) * kd.distillation_loss(student, teacher)""",
        cost="1 sweep per term",
        notes="beta_0 is tuned. Behavioural cloning: the same KL on an expert's states.",
    ),
    Entry(
        key="retain_acquire_dfkd",
        title="Learning to retain while acquiring, in adversarial data-free distillation",
        source="Patel et al. 2023, CVPR, arXiv 2302.14290",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="L_ret(theta - alpha grad L_acq(theta)) + L_acq(theta); L the L1 distance of logits, or KL",
        use="""\
new, old = torch.randn(8, 16), torch.randn(8, 16)  # generated, remembered
theta, target = torch.randn(50, 16, requires_grad=True), torch.randn(50, 16)
acquire = kd.distillation_loss(new @ theta.T, new @ target.T)
(step,) = torch.autograd.grad(acquire, theta, create_graph=True)
retain = kd.distillation_loss(old @ (theta - 0.1 * step).T, old @ target.T)
loss = acquire + retain""",
        cost="1 sweep per term; the second derivative through plain PyTorch, [N, C] a few times",
        notes="Second derivatives need dense logits, not an LM head.",
    ),
    Entry(
        key="cae_dfkd",
        title="Data-free distillation with an embedding-level contrast",
        source="CAE-DFKD 2025",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="L1 or KL of logits on generated samples + contrast of embeddings (the generator has losses of its own)",
        use="""\
logits = torch.nn.functional.l1_loss(student, teacher) + kd.distillation_loss(student, teacher)
project = torch.nn.Linear(16, 24)
scores = torch.nn.functional.normalize(project(student_features)) @ torch.nn.functional.normalize(teacher_features).T
loss = logits + torch.nn.functional.cross_entropy(scores / 0.1, torch.arange(8))""",
        cost="1 sweep; [B, B] scores",
        notes=GENERAL,
    ),
    Entry(
        key="self_judge",
        title="A judge that sees no reference, taught by itself with one",
        source="Ye et al. 2024, arXiv 2409.00935",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="NLL(score | x, y, ref) + NLL(score | x, y) + lam KL(sg p(. | x, y, ref) || q(. | x, y)) where the score stands",
        use="""\
with_reference = torch.randn(2, 6, 50, requires_grad=True)
place = torch.zeros(2, 6, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
scores = kd.token_log_probs(with_reference, token_ids, mask=place) + kd.token_log_probs(
    student_sequences, token_ids, mask=place
)
loss = kd.distillation_loss(student_sequences, with_reference.detach(), mask=place) - scores.sum() / place.sum()""",
        cost="1 sweep per term, of the places of the scores alone",
        notes=GENERAL + " lam was not available.",
    ),
    Entry(
        key="unfused_audio",
        title="Exits taught by the last one, with clusters as labels",
        source="UNFUSED 2023, ICASSP",
        chapter="H",
        kind="recipe",
        confidence="general",
        formula="CE of cluster labels at the last and at earlier exits + KL(deep || shallow) + squared error of features",
        use="""\
shallow = torch.randn(8, 50, requires_grad=True)
labelled = -kd.token_log_probs(torch.stack([student, shallow]), labels.expand(2, 8)).mean()
deep_to_shallow = kd.distillation_loss(shallow, student.detach())
project = torch.nn.Linear(16, 24)
loss = labelled + deep_to_shallow + torch.nn.functional.mse_loss(project(student_features), teacher_features)""",
        cost="1 sweep per term",
        notes=GENERAL + " Labels are clusters of k-means.",
    ),
)

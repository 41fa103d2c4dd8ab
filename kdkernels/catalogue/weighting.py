"""Entries of the catalogue: weights, schedules, choice of teachers and data."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="ddk",
        title="DDK: distilling domain knowledge, domains drawn by the student's lag",
        source="Liu et al. 2024, NeurIPS, arXiv 2407.16154",
        chapter="G",
        kind="helper",
        confidence="paper",
        formula="CE + 0.2 KL(q || p); r ~ r_i exp(ppl_S,i / ppl_T,i), r <- 0.5 r / sum r + 0.5 / N every 1000 steps",
        use="""\
domains = kd.weighting.DomainSampler(3, mixing=0.5)
domains.update(torch.tensor([9.0, 12.0, 30.0]), torch.tensor([8.0, 8.0, 10.0]))  # perplexities in validation
next_domains = domains.sample(16)
nll = -kd.token_log_probs(student, labels).mean()
loss = nll + 0.2 * kd.distillation_loss(student, teacher, kd.ReverseKL())""",
        cost="that of the loss; N numbers",
        notes="Equation 3 prints the student first, KL(q || p); take kd.ForwardKL() if the other direction is meant.",
    ),
    Entry(
        key="db_llm_dad",
        title="Weights by the entropies of both sides (DB-LLM's deviation-aware distillation)",
        source="Chen et al. 2024, ACL Findings, arXiv 2402.11960",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="w SCE(p, q), w = (share H(p) + (1 - share) H(q))^gamma",
        use="""\
weight = kd.weighting.entropy_weights(kd.token_statistics(student, teacher), exponent=0.1)
loss = kd.distillation_loss(student, teacher, weight=weight)""",
        cost="1 sweep for the entropies, 1 for the loss",
        notes="gamma is about 0.1; how the paper combines the entropies was not available. The KL has the gradient of SCE.",
    ),
    Entry(
        key="ps_kd",
        title="PS-KD: self-distillation with progressive refinement of targets",
        source="Kim et al. 2021, ICCV, arXiv 2006.12000",
        chapter="G",
        kind="recipe",
        confidence="code",
        formula="SCE((1 - a) e_y + a P_previous, q), a = 0.8 (e + 1) / E at epoch e of E",
        use="""\
alpha = kd.weighting.Ramp(0.0, 0.8, 240).at(11 + 1)  # epoch 11 of 240
previous = kd.topk_logits(teacher, 20)  # the last epoch's predictions of these samples, as stored
soft = kd.distillation_loss(student, previous, labels=labels, ce_weight=(1 - alpha) / alpha)
loss = alpha * soft""",
        cost="1 sweep, both terms; 20 numbers per stored sample in place of C",
        notes="Cross-entropy is linear in its target: the mixed target is a sum of two terms. The KL has the gradient of SCE. "
        "The first epoch uses the label alone.",
    ),
    Entry(
        key="mapk_self_kd",
        title="mAP@k: self-distillation weighted by how early the teacher is right",
        source="Carrino et al. 2023, arXiv 2309.17134",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="CE + c T^2 (KL_start + KL_end) / 2, c = mean reciprocal rank of the teacher's first near hit in its top 10",
        use="""\
quality = kd.weighting.near_hit_quality(teacher, labels, k=10)  # start positions; the same for the end
soft = kd.distillation_loss(student, teacher, temperature=2.0, temperature_squared=True)
loss = quality * soft - kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep for the loss, 1 for the cross-entropy; a top 10 of the positions",
        notes="One c per batch. A hit is in [gold - 5, gold + 4], which is not symmetric; only the first counts, whatever the "
        "name says. 'symmetric' there is the whole sum of both KLs: 2 kd.Jeffreys().",
    ),
    Entry(
        key="tgeo_kd",
        title="TGeo-KD: weights from the trilateral geometry of student, teacher and label",
        source="Hu et al. 2024, ICLR, arXiv 2312.15112",
        chapter="G",
        kind="helper",
        confidence="third-party",
        formula="mean(a T^2 KL + (1 - a) CE), a = sigmoid(MLP of S, T, G, class mean and their squared differences)",
        use="""\
weights = kd.weighting.TrilateralWeights(50)
p = teacher.softmax(-1)
a = weights(student.softmax(-1), p, labels, kd.weighting.class_means(p, labels))
soft = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True, reduction="none")
loss = (a * soft - (1 - a) * kd.token_log_probs(student, labels)).mean()""",
        cost="2 sweeps; [N, 9 C] for the network: for classifiers, not vocabularies",
        notes="The gradient reaches the network through the unreduced losses, also in a second derivative "
        "(create_graph=True), which the bilevel step on validation data needs.",
    ),
    Entry(
        key="fantastic_gains",
        title="Fantastic Gains: transfer between any models by partition of the data",
        source="Roth et al. 2024, ICLR, arXiv 2310.17653",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="mean of m KL(p || q) + (1 - m) KL(p_S0 || q), m: the teacher is surer of the label than S0, the initial student",
        use="""\
initial = student.detach().clone()
from_teacher = kd.weighting.more_confident(kd.token_statistics(initial, teacher, labels))
chosen = torch.where(from_teacher.unsqueeze(-1), teacher, initial)  # classes; of a vocabulary two weighted losses
loss = kd.distillation_loss(student, chosen)""",
        cost="1 sweep for the partition, 1 for the loss",
        notes="Compared with the current student in one reading, with the frozen initial one in the other: pass either. Without "
        "labels the largest probabilities are compared. Of several teachers: kd.weighting.most_confident.",
    ),
    Entry(
        key="mst_distill",
        title="MST-Distill: a mixture of specialised teachers, routed per sample",
        source="Li et al. 2025, ACM MM, arXiv 2507.07015",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="CE + mean over the top-k teachers of tau^2 KL(p_m || q) + KL(uniform || mean gate) / M",
        use="""\
gates = torch.randn(3, 8, requires_grad=True)
chosen = kd.weighting.route(gates, k=1)
soft = kd.distillation_loss(student.expand(3, 8, 50), teachers, temperature=4.0, temperature_squared=True,
                            weight=chosen, normalizer=8)
loss = soft - kd.token_log_probs(student, labels).mean() + kd.weighting.load_balance(gates)""",
        cost="1 sweep per teacher; rows of weight 0 may be left out with mask=chosen > 0",
        notes="The terms are not multiplied by the gate, which learns from the balance and the later stages alone.",
    ),
    Entry(
        key="classroom_kd",
        title="Classroom KD: mentors chosen per sample, with temperatures by their lead",
        source="Classroom-inspired multi-mentor distillation 2024, arXiv 2409.20237",
        chapter="G",
        kind="helper",
        confidence="secondary",
        formula="CE + sum over active mentors of w_m tau_m^2 KL(p_m || q); active: right, and surer of the label than the student",
        use="""\
found = kd.token_statistics(student.expand(3, 8, 50), teachers, labels.expand(3, 8))
ours, theirs = found.label_log_prob_student[0], found.label_log_prob_teacher
plan = kd.weighting.mentoring(theirs, ours, found.argmax_teacher == labels, temperature=12.0)
soft = kd.distillation_loss(student.expand(3, 8, 50), teachers, temperature=plan.temperatures,
                            temperature_squared=True, weight=plan.weights, normalizer=8)
loss = soft - kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep per mentor for the statistics, 1 for the loss",
        notes="The forms of weight and temperature are from memory.",
    ),
    Entry(
        key="mkd_ocl",
        title="MKD: momentum teachers in online continual learning",
        source="Michel et al. 2024, ICML, arXiv 2309.02870",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="CE + 8 mean over teachers of tau^2 (KL(T(aug) || S(aug)) + KL(T(aug) || S(raw))) / 2, teachers EMAs at four rates",
        use="""\
model, raw, augmented = torch.nn.Linear(16, 50), torch.randn(8, 16), torch.randn(8, 16)
averages = kd.weighting.MovingAverages(model, [0.1, 0.05, 0.01, 0.005])
averages.update(model)  # after each step of the optimiser
own = torch.stack([model(augmented), model(raw)])
losses = [kd.distillation_loss(own, target.expand_as(own), temperature=4.0, temperature_squared=True)
          for target in averages(augmented)]
loss = 8.0 * sum(losses) / len(losses) - kd.token_log_probs(own[1], labels).mean()""",
        cost="2 sweeps per teacher; a copy of the model per rate",
        notes="The published correction starts from parameters shrunk by the rate (correction='published'); the unbiased one is "
        "the default here. Variants by groups of classes are not here.",
    ),
    Entry(
        key="born_again",
        title="BAN: born-again networks",
        source="Furlanello et al. 2018, ICML, arXiv 1805.04770",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="SCE(p, q) from the generation before; CWTM: sum w_b CE_b / sum w, w = max p; DKPP: wrong classes permuted",
        use="""\
born_again = kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0)
weight = kd.weighting.teacher_confidence(kd.token_statistics(student, teacher))
weighted = -(weight * kd.token_log_probs(student, labels)).sum() / weight.sum()
permuted = kd.distillation_loss(student, kd.weighting.permuted_others(teacher))
loss = born_again + weighted + permuted  # three objectives of the paper, to be used one at a time""",
        cost="1 sweep each; 1 for the weights; the permutation makes logits [N, C]",
        notes="Both ablations show what of the gain is weighting, what knowledge of similar classes.",
    ),
    Entry(
        key="mdcs",
        title="MDCS: more diverse experts with consistency self-distillation, long-tailed",
        source="Zhao et al. 2023, ICCV, arXiv 2308.09922",
        chapter="G",
        kind="recipe",
        confidence="code",
        formula="per expert a in {-0.5, 1, 2.5}: CE of z + a log prior, 0.6 min(e / 20, 1) KL(weak || strong) where weak is right",
        use="""\
weak, strong = torch.randn(2, 8, 50), torch.randn(2, 8, 50, requires_grad=True)  # two of the experts
prior = torch.tensor([-0.5, 2.5]).reshape(2, 1, 1) * torch.randint(1, 900, (50,)).float().log()
targets = labels.expand(2, 8)
right = kd.token_statistics(weak + prior).argmax_student == targets
nll = -kd.token_log_probs(strong + prior, targets).mean()
loss = nll + kd.weighting.Ramp(0.0, 0.6, 20).at(5) * kd.distillation_loss(strong + prior, weak + prior, mask=right)""",
        cost="1 sweep to see what is right, 1 for the KL, 1 for the cross-entropy",
        notes="The mean is over the rows that the weak view gets right. The prior is raw counts; the temperature in the "
        "configuration is not used.",
    ),
    Entry(
        key="abd_poisoned",
        title="ABD: data-free distillation from teachers that may be poisoned",
        source="Hong et al. 2023, ICML, arXiv 2306.02368",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="mean of w T^2 KL(p || q), w small where a copy of the teacher with shuffled channels still agrees",
        use="""\
shuffled = torch.randn(8, 50)  # logits of the copy whose last layers' channels are shuffled
suspicion = kd.token_statistics(shuffled, teacher).forward_kl
weight = kd.weighting.disagreement_weights(suspicion)
loss = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True, weight=weight, normalizer=8)""",
        cost="1 sweep for the weights, 1 for the loss",
        notes="The divergences are from the code, the rule of the weight from memory. Its JS has the arguments swapped: kd.JSD() "
        "is the true one.",
    ),
    Entry(
        key="hard_augment",
        title="An augmenter that makes student and teacher disagree, against a student that follows",
        source="2023, arXiv 2305.14890",
        chapter="G",
        kind="arguments",
        confidence="general",
        formula="student: min D(p(x), q(x)) + D(p(g(x)), q(g(x))); augmenter g: max D on g(x) with the teacher's answer kept",
        use="""\
shift = torch.zeros(16, requires_grad=True)  # the augmenter
network, target = torch.nn.Linear(16, 50), torch.nn.Linear(16, 50)
inputs = student_features.detach() + shift
disagreement = kd.distillation_loss(network(inputs), target(inputs))  # the gradient flows through both sides
kept = kd.distillation_loss(target(inputs), target(inputs - shift).detach())
loss = -disagreement + 10.0 * torch.relu(kept - 0.1)  # the augmenter's turn; the student's is +disagreement""",
        cost="1 sweep each, the gradient to both sides in the same ones",
        notes="Only the general form is known.",
    ),
    Entry(
        key="miniplm",
        title="MiniPLM: pretraining data chosen by the difference of two models",
        source="Gu et al. 2025, ICLR, arXiv 2410.17215",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="r(x) = mean over tokens of log p - log p_ref; keep the half with the highest r, train with CE",
        use="""\
reference_sequences = torch.randn(2, 6, 50)
theirs = kd.token_log_probs(teacher_sequences, token_ids, mask=mask)
small = kd.token_log_probs(reference_sequences, token_ids, mask=mask)
kept = kd.weighting.best(kd.weighting.difference_scores(theirs, small, mask), fraction=0.5)
loss = -kd.token_log_probs(student_sequences[kept], token_ids[kept], mask=mask[kept]).sum() / mask[kept].sum()""",
        cost="1 sweep of each model over the corpus, once; training needs no teacher",
        notes="The readme prints a ratio; the code takes the difference.",
    ),
    Entry(
        key="good_da_cutmixpick",
        title="CutMixPick: what makes a good data augmentation in distillation",
        source="Wang et al. 2022, NeurIPS, arXiv 2012.02909",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="0.1 CE + 0.9 tau^2 KL on the originals + KL on those mixed images where the student's entropy is highest",
        use="""\
pool, answers = torch.randn(24, 50, requires_grad=True), torch.randn(24, 50)  # student and teacher on CutMix images
picked = kd.weighting.best(kd.token_statistics(pool).entropy_student, count=8)
mixed = kd.distillation_loss(pool[picked], answers[picked], temperature=4.0, temperature_squared=True)
plain = kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True)
loss = 0.9 * plain - 0.1 * kd.token_log_probs(student, labels).mean() + mixed""",
        cost="1 sweep of the pool for the entropies, 1 per loss",
        notes="Other scores of the paper: the teacher's entropy, the KL. Its metric of an augmentation is the standard deviation "
        "over the batch of the teacher's mean probability: less is better.",
    ),
    Entry(
        key="data_pruning_kd",
        title="Distilling the knowledge in data pruning",
        source="Ben-Baruch et al. 2024, arXiv 2403.07854",
        chapter="G",
        kind="recipe",
        confidence="general",
        formula="(1 - a) CE + a tau^2 KL on the samples kept, a larger the fewer are kept",
        use="""\
kept = kd.weighting.best(torch.rand(8), fraction=0.5)  # by any pruning score; random did as well in the paper
alpha = 0.9  # tuned per fraction: more of the teacher when less is kept
soft = kd.distillation_loss(student[kept], teacher[kept], temperature=4.0, temperature_squared=True)
loss = alpha * soft - (1 - alpha) * kd.token_log_probs(student[kept], labels[kept]).mean()""",
        cost="1 sweep each, of what is kept",
        notes="tau and a per fraction were not available.",
    ),
    Entry(
        key="robust_active_distillation",
        title="Robust active distillation: which samples to ask a fallible teacher about",
        source="Baykal et al. 2023, ICLR, arXiv 2210.01213",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="q_i ~ 1 / g_i on the k samples of largest gain g = 1 - margin, k = argmax (k - wrong) / sum_{i <= k} 1 / g_i",
        use="""\
gains = 1 - kd.weighting.margins(student.softmax(-1))
asked = kd.weighting.robust_sampling(gains, wrong=1.0).multinomial(4)
loss = kd.distillation_loss(student[asked], teacher[asked])""",
        cost="1 sweep of what is asked; the margins need the student's two largest probabilities",
        notes="The closed form is derived here for an adversary who spoils 'wrong' samples. The KL has the gradient of SCE.",
    ),
    Entry(
        key="distill_weighted",
        title="DistillWeighted: distilling from several source models by task similarity",
        source="Borup et al. 2023, arXiv 2304.12314",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="lam CE(labelled) + (1 - lam) sum_s w_s D(source s, student's head s), w = similarity^power / sum",
        use="""\
weight = kd.weighting.shares(torch.tensor([0.9, 0.4]), power=4.0)
trunk = student_features
heads = [torch.randn(30, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)]  # label spaces of the sources
sources = [torch.randn(8, 30), torch.randn(8, 70)]
soft = [kd.distillation_loss(kd.LMHead(trunk, head), source) for head, source in zip(heads, sources)]
loss = 0.5 * (weight * torch.stack(soft)).sum() - 0.5 * kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep per source",
        notes="power and lam were not available.",
    ),
    Entry(
        key="knfu",
        title="Fusion of peers' predictions by how well their class means agree",
        source="KnFu: effective knowledge fusion, 2024",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="CE + KL(sum_j w_ij p_j || q_i), w_ij ~ exp(-KL(mean_i || mean_j))",
        use="""\
means = teachers.softmax(-1).mean(1).log()
pairs = kd.distillation_loss(means.expand(3, 3, 50), means.unsqueeze(1).expand(3, 3, 50), reduction="none")
weight = kd.weighting.peer_weights(pairs)
fused = (weight.log().unsqueeze(-1).unsqueeze(-1) + teachers.log_softmax(-1)).logsumexp(1)
loss = kd.distillation_loss(student, fused[0]) - kd.token_log_probs(student, labels).mean()""",
        cost="1 sweep each; [M, N, C] for the fusion, which is of classifiers",
        notes="Only the general form is known; the means here are over all classes.",
    ),
    Entry(
        key="orc_role_change",
        title="A group of students, the best of whom teach the others",
        source="Network Group-based Knowledge Distillation using Online Role Change, 2023, ICCV",
        chapter="G",
        kind="recipe",
        confidence="general",
        formula="CE + tau^2 KL(softmax(mean_m t_m / tau) || q) + mutual KL; the top-ranked are promoted each iteration",
        use="""\
group = torch.randn(4, 8, 50, requires_grad=True)
ability = kd.token_log_probs(group, labels.expand(4, 8)).mean(-1)
promoted = kd.weighting.best(ability, count=2)
teacher_of_all = group[promoted].detach().mean(0)
soft = kd.distillation_loss(group, teacher_of_all.expand_as(group), temperature=3.0, temperature_squared=True)
mutual = kd.distillation_loss(group, group.detach().roll(1, 0), temperature=3.0, temperature_squared=True)
loss = soft + mutual - ability.mean()""",
        cost="1 sweep per term",
        notes="Only the general form is known; tau 3 to 4. The mean is of logits.",
    ),
    Entry(
        key="kadel",
        title="KADEL: knowledge-aware denoising by a mixture of losses",
        source="Tao et al. 2024, TOSEM, arXiv 2401.08376",
        chapter="G",
        kind="helper",
        confidence="code",
        formula="sum c CE, c = (w_c + exp(-CE) w_n) / (w_c + w_n), w share times density in a mixture of two normals",
        use="""\
losses = torch.cat([torch.rand(40), 4 + torch.rand(10)])  # of all samples in an epoch
mixture = kd.weighting.fit_loss_mixture(losses)
nll = -kd.token_log_probs(student, labels)
loss = (kd.weighting.denoising_weights(nll, mixture) * nll).mean()""",
        cost="1 sweep; a fit of numbers per sample once an epoch",
        notes="After three epochs of warm-up. The clean component's deviation is multiplied by 9. The code takes the weights of "
        "the epoch before.",
    ),
    Entry(
        key="qcrd",
        title="Rationales, good and bad, with weights by their quality",
        source="Quality-guided contrastive rationale distillation 2024, arXiv 2405.13014",
        chapter="G",
        kind="recipe",
        confidence="general",
        formula="CE(label) + lam (weighted NLL of positive rationales + margin against negative ones)",
        use="""\
negatives = torch.randint(50, (2, 6))  # rationales of an earlier checkpoint
counts = mask.sum(-1)
good = -kd.token_log_probs(student_sequences, token_ids, mask=mask).sum(-1) / counts
bad = -kd.token_log_probs(student_sequences, negatives, mask=mask).sum(-1) / counts
quality = torch.tensor([0.9, 0.5])  # of a discriminator
loss = (quality * good + torch.relu(1.0 + good - bad)).mean()""",
        cost="1 sweep per rationale; a number per token",
        notes="Only the general form is known. The label's own cross-entropy is added.",
    ),
    Entry(
        key="psmt",
        title="A mean teacher that averages chosen parameters, at test time",
        source="Parameter-selective continual test-time adaptation 2024, ECCV",
        chapter="G",
        kind="helper",
        confidence="general",
        formula="SCE(p_EMA, q), the average moves only where the Fisher information is large",
        use="""\
model, inputs = torch.nn.Linear(16, 50), torch.randn(8, 16)
average = kd.weighting.MovingAverages(model, [0.001], correction=None)
kd.token_log_probs(model(inputs), labels).mean().backward()
fisher = {name: value.grad.square() for name, value in model.named_parameters()}
average.update(model, {name: value > value.median() for name, value in fisher.items()})
loss = kd.distillation_loss(model(inputs), average(inputs)[0])""",
        cost="1 sweep; a copy of the model",
        notes="Only the general form is known; 0.999 of the average is kept. The KL has the gradient of SCE.",
    ),
    Entry(
        key="vida",
        title="ViDA: homeostatic adapters at test time, scaled by the teacher's uncertainty",
        source="Liu et al. 2024, ICLR, arXiv 2306.04344",
        chapter="G",
        kind="recipe",
        confidence="general",
        formula="SCE(p_EMA, q); adapters scaled by 1 + U and 1 - U, U the deviation of the teacher under dropout, threshold 0.2",
        use="""\
runs = torch.randn(10, 8, 50).softmax(-1)  # the teacher's answers under dropout
uncertainty = runs.std(0).mean(-1)
sign = torch.where(uncertainty > 0.2, 1.0, -1.0)
high_rank, low_rank = 1 + sign * uncertainty, 1 - sign * uncertainty  # scales of the two adapters per sample
loss = kd.distillation_loss(student, runs.mean(0).log())""",
        cost="1 sweep; the teacher runs several times",
        notes="From memory. Teacher: kd.weighting.MovingAverages at 0.001. The KL has the gradient of SCE.",
    ),
    Entry(
        key="sd_darts",
        title="A vote of earlier states as the teacher of a supernet",
        source="Improving Differentiable Architecture Search via Self-Distillation, 2023",
        chapter="G",
        kind="arguments",
        confidence="general",
        formula="CE + lam KL(mean_k p_k || q) over K earlier snapshots",
        use="""\
vote = teachers.log_softmax(-1).logsumexp(0)  # log of the summed probabilities of three snapshots
loss = kd.distillation_loss(student, vote, labels=labels, ce_weight=1.0)""",
        cost="1 sweep, cross-entropy included; [K, N, C] for the vote, which is of classifiers",
        notes="Only the general form is known; K and lam were not available.",
    ),
    Entry(
        key="mose_multi_exit",
        title="Weights of exits in hierarchical self-distillation",
        source="One model to train them all 2025, arXiv 2503.03008",
        chapter="G",
        kind="recipe",
        confidence="general",
        formula="sum over exits i of a_i L_i, a_i = i / 36 for exits at layers 4, 9, 18, 27, 36",
        use="""\
exits = {4: torch.randn(50, 16, requires_grad=True), 9: torch.randn(50, 16, requires_grad=True)}
states = {4: student_layers[0], 9: student_layers[1]}
terms = [depth / 36 * -kd.token_log_probs(kd.LMHead(states[depth], exits[depth]), token_ids).mean() for depth in exits]
loss = torch.stack(terms).sum()""",
        cost="1 sweep per exit, one after another",
        notes="No divergence between student and teacher. Only the general form is known.",
    ),
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
        cost="the divergence's, 1 sweep; acceptance counts in 1 sweep and draws in another, without full logits of heads",
        notes="The code's JSD has its arguments swapped and it skips the row that predicts the first response token; neither "
        "is copied. Student temperature 0.5 and top-p 0.5, 5 draft tokens a time.",
    ),
)

"""Hidden states, attention, relations, contrast."""

from __future__ import annotations

from kdkernels.catalogue.entry import Entry

__all__ = ["ENTRIES"]

NO_VOCABULARY = "none over a vocabulary; "

ENTRIES: tuple[Entry, ...] = (
    Entry(
        key="minilm_relation",
        title="MiniLM: attention and value relations of the last layer",
        source="Wang et al., NeurIPS 2020, arXiv 2002.10957",
        chapter="F",
        kind="loss",
        confidence="third-party",
        formula="1/(A n) sum_{a,t} KL(R^T_{a,t} || R^S_{a,t}), summed over R = softmax(Q K^T / sqrt(d)), softmax(V V^T / sqrt(d))",
        use="""\
loss = kd.losses.MiniLM()(
    (student_queries, student_keys, student_values), (teacher_queries, teacher_keys, teacher_values)
)
""",
        cost=NO_VOCABULARY + "scores made once, in chunks that fit the cache: memory linear in n",
        notes="Sum of both terms; one implementation takes their mean. The second softmax of another is not copied.",
    ),
    Entry(
        key="autodistil_relation",
        title="AutoDistil: Q-Q, K-K and V-V relations with equal relation heads (MiniLMv2)",
        source="Xu et al., NeurIPS 2022, arXiv 2201.12507",
        chapter="F",
        kind="loss",
        confidence="general",
        formula="sum_r beta_r / (A_r n) sum_a sum_t KL(R^T_r || R^S_r), R_r = softmax(r r^T / sqrt(d_r)), r in {Q, K, V}",
        use="""\
loss = kd.losses.AutoDistil(heads=4)(
    (student_queries, student_keys, student_values), (teacher_queries, teacher_keys, teacher_values)
)
""",
        cost=NO_VOCABULARY + "scores made once, in chunks that fit the cache: memory linear in n",
        notes="Equal weights and 48 heads by default, of 48 to 64 in the paper.",
    ),
    Entry(
        key="rkd",
        title="RKD: relational knowledge distillation, distances and angles",
        source="Park et al., CVPR 2019, arXiv 1904.05068",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="25 SmoothL1(|e_i - e_j| / mu) + 50 SmoothL1(cos angle(i, j, k)), student against teacher",
        use="loss = kd.losses.RKD()(student_features, teacher_features)\n",
        cost=NO_VOCABULARY + "B x B matrices in float64; no B x B x B or B x B x d",
        notes="Coinciding samples have no gradient; the code multiplies theirs by 1e12.",
    ),
    Entry(
        key="nd_loss",
        title="KD++: regularising feature norm and direction",
        source="arXiv 2305.17007",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="mean [1 - <f_S, c_y> / (|c_y| max(|f_S|, |f_T|))], c the teacher's class means",
        use="""\
class_means = torch.randn(50, 16)
loss = kd.losses.ND(class_means)(student_features, teacher_features, labels)
loss = loss + kd.distillation_loss(student, teacher, temperature=4.0, temperature_squared=True)
""",
        cost=NO_VOCABULARY + "linear in the features",
        notes="Weight 0.5 to 4.0 by pair of models; its KD part is warmed up over 20 epochs.",
    ),
    Entry(
        key="kd_qat_attention",
        title="Attention map and attention output for quantization-aware training",
        source="Kim et al., EMNLP 2022, arXiv 2211.11014",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="sum_l mean_{b,h} (1/len_b) sum_q KL(a_T || a_S) + sum_l MSE(attention output)",
        use="""\
lengths = torch.tensor([6, 4])
loss = kd.losses.QATAttention()(
    [(student_queries, student_keys)], [(teacher_queries, teacher_keys)], lengths=lengths
)
""",
        cost=NO_VOCABULARY + "maps made once from queries and keys, in chunks: memory linear in n",
        notes="The code clamps probabilities at 1e-8; not needed here. Its old score loss is an MSE of raw scores.",
    ),
    Entry(
        key="diswot_gram",
        title="DisWOT: Gram matrices of samples (SP) and channels (ICKD)",
        source="Dong et al., CVPR 2023, arXiv 2303.15678",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="sum (G_T - G_S)^2 / B^2, G = rownorm(F F^T), + sum (E_T - E_S)^2 / (B C), E = rownorm(f f^T)",
        use="loss = kd.losses.DisWOT()(student_maps, teacher_maps)\n",
        cost=NO_VOCABULARY + "B x B and B x C x C",
        notes="Rows have L2 norm 1 (a library normalises by L1). As a score of untrained students: its negative.",
    ),
    Entry(
        key="trg",
        title="Token-level relationship graph",
        source="Zhang et al. 2023, arXiv 2306.12442",
        chapter="F",
        kind="loss",
        confidence="secondary",
        formula="b KL(softmax(score_T / t) || softmax(score_S / t)) + g InfoNCE(student, teacher) + a MSE(inner similarities)",
        use="""\
loss = kd.losses.TRG(16, 24)(student_layers[-1], teacher_layers[-1])
loss = loss + kd.distillation_loss(student_sequences, teacher_sequences)
""",
        cost=NO_VOCABULARY + "relations in chunks; n x n within an image is made whole",
        notes="Weights and temperatures unknown; the score (cosine, squared distance, a graph's edges) is an argument.",
    ),
    Entry(
        key="cat_kd",
        title="CAT-KD: class attention transfer",
        source="Guo et al., CVPR 2023",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="beta MSE(phi(CAM_S), phi(CAM_T)), phi pools to r x r and may divide by the L2 norm",
        use="loss = kd.losses.CATKD(beta=0.7)(student_maps, teacher_maps)\n",
        cost=NO_VOCABULARY + "linear in the maps",
        notes="beta 0.5 to 600 and the flag normalized by pair of models; CE beside it, none in 'CAT'.",
    ),
    Entry(
        key="e2kd",
        title="e2KD: explanations beside outputs",
        source="Parchami-Araghi et al., ECCV 2024, arXiv 2402.03119",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="c_logit T^2 KL(p || q) + c_exp mean(1 - cos(E_S, E_T)), E a Grad-CAM or B-cos map",
        use="""\
logits, teacher_logits = student_maps.mean((-2, -1)), teacher_maps.mean((-2, -1))
explained = teacher_logits.argmax(-1)
student_map = kd.losses.grad_cam(student_maps, logits, explained)
teacher_map = teacher_maps.gather(1, explained.view(-1, 1, 1, 1).expand(-1, 1, 6, 6)).relu()
loss = kd.losses.E2KD(explanation_weight=5.0)(logits, teacher_logits, student_map, teacher_map)
""",
        cost="1 sweep; the gradient of an explanation is a second derivative",
        notes="Second derivatives of the KL, where a map depends on it, go through the reference.",
    ),
    Entry(
        key="mlkd_ood",
        title="Multi-level distillation for out-of-distribution detection: the nearest layers",
        source="Wu et al., ACL 2023",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="KL(p || q) + sum_l sum of w times the 2 smallest over j of MSE(h_S^l, W h_T^j), per token",
        use="""\
loss = kd.losses.MLKD(16, 24, layers=3)(student_layers, teacher_layers, mask=mask)
loss = loss + kd.distillation_loss(student_sequences, teacher_sequences, mask=mask)
""",
        cost="1 sweep for the KL; layers x layers distances per token from one product",
        notes="The weights are unconstrained, as in the code. Its 1e-10 added to logits has no effect.",
    ),
    Entry(
        key="distiller_mi_alpha",
        title="Distiller: the bound MI-alpha of mutual information",
        source="SustaiNLP 2021, arXiv 2109.11105",
        chapter="F",
        kind="loss",
        confidence="general",
        formula="-I, I = 1 + E[log(e^f / (a m + (1 - a) q))] - E_neg[e^f / (a m + (1 - a) q)], m the mean of e^f over negatives",
        use="loss = kd.losses.MIAlpha(16, 24, 32, alpha=0.9)(student_features, teacher_features)\n",
        cost=NO_VOCABULARY + "B x B",
        notes="alpha = 1: InfoNCE; 0: NWJ. q is one learned number.",
    ),
    Entry(
        key="lingugkd_infonce",
        title="LinguGKD: layer-wise InfoNCE from a language model to a graph network",
        source="Hu et al. 2024, arXiv 2402.05894",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="softmax(v)_0 NLL + softmax(v)_1 sum_l softmax(w)_l CE(cos / 0.07, diagonal), same-class pairs masked",
        use="""\
states = [layer[:, 0] for layer in student_layers], [layer[:, 0] for layer in teacher_layers[1::2]]
log_probs = student[:2].log_softmax(-1)
loss = kd.losses.LinguGKD(16, 24, layers=3)(*states, log_probs, labels[:2])
""",
        cost=NO_VOCABULARY + "scores made once, in chunks; a B x B mask",
    ),
    Entry(
        key="leader_medrec",
        title="LEADER: a medication recommender from a language model",
        source="Liu et al., TOIS 2024, arXiv 2402.02803",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="BCE + 0.1 MSE(W h_S, h_LLM) + 0.005 InfoNCE in both directions, the positive not in the denominator",
        use="""\
targets = torch.rand(8, 50) > 0.9
profiles, medications = student_features[:, :8], student_features[:, 8:]
loss = kd.losses.Leader(16, 24)(student, targets, student_features, teacher_features, profiles, medications)
""",
        cost=NO_VOCABULARY + "B x B; the teacher's states may come from disk",
        notes="align_weight 0.01 for MIMIC-IV.",
    ),
    Entry(
        key="dmae",
        title="DMAE: normalised features of visible patches",
        source="Bai et al., CVPR 2023, arXiv 2208.12256",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="L1(norm(F_T), norm(W F_S)) beside the pixel error of the masked autoencoder",
        use="loss = kd.losses.DMAE(16, 24)(student_layers[1], teacher_layers[3])\n",
        cost=NO_VOCABULARY + "linear in the features",
        notes="The teacher needs its blocks up to the one matched only; the code runs all.",
    ),
    Entry(
        key="acm_modules",
        title="Adaptive computation modules: every prefix of learners",
        source="AAAI 2025, arXiv 2312.10193",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="mean_k MSE(h_k(x), module(x)) over prefixes k; gate label: smallest k with err_k / err_{k+1} < 1.2",
        use="""\
acm = kd.losses.ACM()
prefixes, module = torch.stack(student_layers, -2), torch.randn(2, 6, 16)
loss = acm(prefixes, module)
gate_labels = acm.gates(prefixes, module)
""",
        cost=NO_VOCABULARY + "linear in the outputs of the prefixes",
        notes="End to end the paper goes on with CE, a budget, entropy and diversity.",
    ),
    Entry(
        key="dm_codec",
        title="DM-Codec: cosines along time",
        source="Ahasan et al. 2024, arXiv 2410.15017",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="120 mean_d -log sigma(cos over time(F_d, G_d)), the mean of a language and a speech teacher",
        use="""\
language, speech = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
loss = kd.losses.DMCodec()(student_layers[0], language, speech)
""",
        cost=NO_VOCABULARY + "linear in the frames",
        notes="axis='time' is the option whose code calls a function that does not exist.",
    ),
    Entry(
        key="sylber_segment",
        title="Sylber: segment means of a moving-average teacher",
        source="Cho et al., ICLR 2025, arXiv 2410.07168",
        chapter="F",
        kind="loss",
        confidence="secondary",
        formula="mean_t |h_S(t) - mean_{k in seg(t)} h_T(k)|^2, target 0 outside of segments",
        use="""\
segments = torch.tensor([[0, 0, 1, 1, 1, -1], [-1, 0, 0, 0, 1, 1]])
loss = kd.losses.Sylber()(student_layers[0], torch.randn(2, 6, 16), segments)
""",
        cost=NO_VOCABULARY + "linear in the frames",
        notes="The decay of the moving average used in training was not available.",
    ),
    Entry(
        key="sd_further_pretraining",
        title="Self-distillation for further pre-training",
        source="ICLR 2023",
        chapter="F",
        kind="recipe",
        confidence="code",
        formula="masked-autoencoder loss + (1/B) sum_b |h_S(x_b) - h_T(x_b)|^2",
        use="""\
further_pretrained = torch.randn(8, 16)
loss = (student_features - further_pretrained).square().sum(-1).mean()
""",
        cost=NO_VOCABULARY + "linear in the features",
        notes="The code matches the class token alone, on inputs that are not masked; sum over d, mean over B, weight 1.",
    ),
    Entry(
        key="layer_matching",
        title="Intermediate-layer matching by any map of layers",
        source="arXiv 2502.04499",
        chapter="F",
        kind="loss",
        confidence="general",
        formula="(1/n) sum_l MSE(W_l h_S^l, h_T^{m(l)}), m forward, reverse, all-to-one, random or none",
        use="""\
pairs = kd.losses.layer_pairs(3, 6, "reverse")
loss = kd.losses.LayerMatching(16, 24, pairs)(student_layers, teacher_layers, mask=mask)
""",
        cost=NO_VOCABULARY + "one batched product",
        notes="Weight about 1 beside the prediction loss.",
    ),
    Entry(
        key="bistil",
        title="BiStil: attention and hidden states of every k-th layer",
        source="Ansell et al., Findings of ACL 2023, arXiv 2306.01709",
        chapter="F",
        kind="loss",
        confidence="code",
        formula="mean_l MSE(a_S, a_T) where a_T is not 0 + mean_l MSE(h_S, h_T); stage 2 adds a soft CE at T = 2",
        use="""\
pairs = kd.losses.layer_pairs(3, 6, every=2)
hidden = student_layers, [torch.randn(2, 6, 16) for _ in pairs]
student_attention = [torch.softmax(student_queries @ student_keys.mT, -1) for _ in pairs]
teacher_attention = [torch.softmax(teacher_queries @ teacher_keys.mT, -1) for _ in pairs]
loss = kd.losses.BiStil()(student_attention, teacher_attention, *hidden, mask=mask)
loss = loss + kd.distillation_loss(student_sequences, teacher_sequences, temperature=2.0, mask=mask)
""",
        cost="stage 2: 1 sweep; the attention is that of the models, B x h x n x n",
        notes="T squared is not applied. The gradient of the soft CE is that of the KL.",
    ),
    Entry(
        key="ernie_tiny",
        title="Stages of latent distillation, then outputs",
        source="arXiv 2106.02241",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="attention match + hidden match per mapped layer; in the last stage KL(p || q) + CE as well",
        use="""\
pairs = kd.losses.layer_pairs(3, 6)
hidden = kd.losses.LayerMatching(16, 24, pairs)(student_layers, teacher_layers)
attention = kd.relation_loss(student_queries, student_keys, teacher_queries, teacher_keys)
loss = hidden + attention
loss = loss + kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0)
""",
        cost="1 sweep in the last stage; attention in chunks",
        notes="Stage weights unknown; the attention match is an MSE or a KL by reading.",
    ),
    Entry(
        key="talking_models",
        title="Encoded messages between a teacher and a student",
        source="arXiv 2310.03188",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="|Dec_S(Enc_T(h_T)) - h_S|^2 + |Dec(Enc(h)) - h|^2 + |m_S - m_T|^2, m the message",
        use="""\
encoder_s, encoder_t, decoder_s = torch.nn.Linear(16, 8), torch.nn.Linear(24, 8), torch.nn.Linear(8, 16)
message_s, message_t = encoder_s(student_features), encoder_t(teacher_features)
mse = torch.nn.functional.mse_loss
loss = mse(decoder_s(message_t), student_features) + mse(decoder_s(message_s), student_features)
loss = loss + mse(message_s, message_t)
""",
        cost=NO_VOCABULARY + "linear in the features",
        notes="Readings differ in the terms; weights are tuned per task.",
    ),
    Entry(
        key="meta_dmoe",
        title="Meta-DMoE: outer loss after a distilled step",
        source="NeurIPS 2022",
        chapter="F",
        kind="recipe",
        confidence="code",
        formula="inner: MSE(f_S, aggregate(experts)); outer: CE after one step along its gradient (second order)",
        use="""\
weight = torch.randn(16, 24, requires_grad=True)
inner = torch.nn.functional.mse_loss(student_features @ weight, teacher_features)
(step,) = torch.autograd.grad(inner, weight, create_graph=True)
adapted = student_features @ (weight - 0.1 * step) @ torch.randn(24, 50)
loss = torch.nn.functional.cross_entropy(adapted, labels)
""",
        cost=NO_VOCABULARY + "a second derivative through the MSE",
        notes="Losses of this library in the inner step have second derivatives too, through the reference.",
    ),
    Entry(
        key="distill_fss",
        title="DistillFSS: focal losses and coarse maps",
        source="arXiv 2512.05613",
        chapter="F",
        kind="recipe",
        confidence="code",
        formula="(focal(gamma = 2; student, argmax of the teacher) + MSE(coarse maps)) / 2",
        use="""\
chosen = teacher_maps.argmax(1)
log_q = student_maps.log_softmax(1).gather(1, chosen.unsqueeze(1))
focal = (-((1 - log_q.exp()) ** 2) * log_q).mean()
loss = (focal + torch.nn.functional.mse_loss(student_maps, teacher_maps)) / 2
""",
        cost=NO_VOCABULARY + "linear in the maps",
        notes="Refinement: a third each of the teacher's focal loss, the student's and the MSE.",
    ),
    Entry(
        key="torchdistill_zoo",
        title="torchdistill: losses by name in a weighted sum",
        source="Matsubara, arXiv 2011.12913",
        chapter="F",
        kind="helper",
        confidence="code",
        formula="sum_i factor_i loss_i",
        use="""\
names = {"rkd": 1.0, "distiller_mi_alpha": 0.1}
sizes = {"distiller_mi_alpha": (16, 24)}
parts = [kd.losses.get(key)(*sizes.get(key, ())) for key in names]
terms = [factor * part(student_features, teacher_features) for factor, part in zip(names.values(), parts)]
loss = torch.stack(terms).sum()
""",
        cost="that of its terms",
        notes="Not copied: its SPKD normalises by L1, ChSim has a factor 1/B, DIST+ adds the channel correlation.",
    ),
    Entry(
        key="kd3_webly",
        title="Weighted features of selected web images, and contrast",
        source="ICCV 2023",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="weighted MSE of features + InfoNCE of perturbed against clean ones + KD",
        use="""\
confidence = teacher.softmax(-1).amax(-1)
clean = torch.randn(8, 16)
loss = (confidence * (student_features - clean).square().mean(-1)).sum() / confidence.sum()
diagonal = torch.arange(8)
loss = loss + kd.relation_loss(student_features, clean, score="cosine", student_scale=10.0, labels=diagonal)
loss = loss + kd.distillation_loss(student, teacher, weight=confidence)
""",
        cost="1 sweep; B x B in chunks",
        notes="Weights unknown.",
    ),
    Entry(
        key="mulki",
        title="Similarity rows of two teachers, weighted per sample",
        source="arXiv 2411.06764",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="sum_k w_{k,i} KL(softmax(sim_T^k / t)_i || softmax(sim_S / t)_i), rows of image-text similarities",
        use="""\
texts, features = torch.randn(5, 16), student_features
initial, previous, weights = torch.randn(8, 16), torch.randn(8, 16), torch.rand(8, 2)
options = {"score": "cosine", "student_scale": 100.0, "teacher_scale": 100.0}
loss = kd.relation_loss(features, texts, initial, texts, weight=weights[:, 0], **options)
loss = loss + kd.relation_loss(features, texts, previous, texts, weight=weights[:, 1], **options)
""",
        cost=NO_VOCABULARY + "similarities in chunks",
        notes="How weights adapt to a sample is unknown.",
    ),
    Entry(
        key="proc_kd",
        title="Prototypes of local features",
        source="arXiv 2212.13180",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="task loss + MSE of student features augmented by attention over K prototypes of the teacher's features",
        use="""\
prototypes = torch.randn(5, 16, requires_grad=True)
attention = torch.softmax(student_features @ prototypes.T / 4, -1)
augmented = student_features + attention @ prototypes
loss = torch.nn.functional.mse_loss(augmented, torch.randn(8, 16))
""",
        cost=NO_VOCABULARY + "B x K",
        notes="Generic blocks: the paper's constants are unknown.",
    ),
    Entry(
        key="crodino_kd",
        title="Disentangled parts of two modalities",
        source="arXiv 2505.24361",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="CE per modality + |<invariant, specific>| + InfoNCE of the invariant parts",
        use="""\
invariant, specific = student_features[:, :8], student_features[:, 8:]
orthogonal = torch.nn.functional.cosine_similarity(invariant, specific).abs().mean()
other = torch.randn(8, 8)
contrast = kd.relation_loss(invariant, other, score="cosine", student_scale=10.0, labels=torch.arange(8))
loss = torch.nn.functional.cross_entropy(student, labels) + orthogonal + contrast
""",
        cost=NO_VOCABULARY + "B x B in chunks",
        notes="Generic blocks: the paper's constants are unknown.",
    ),
    Entry(
        key="prokd_ner",
        title="ProKD: prototypes for zero-resource named entities",
        source="IJCAI 2023",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="KL of label probabilities on target tokens + CE to pseudo-labels softmax(-distance to prototypes)",
        use="""\
prototypes = torch.randn(50, 16)
pseudo = torch.softmax(-torch.cdist(student_features.detach(), prototypes), -1)
loss = kd.distillation_loss(student, teacher)
loss = loss + torch.nn.functional.cross_entropy(student, pseudo)
""",
        cost="1 sweep; B x classes",
        notes="KL or MSE of probabilities by reading. The teacher aligns prototypes by InfoNCE: kd.relation_loss with labels.",
    ),
    Entry(
        key="prorec",
        title="Semantic and collaborative embeddings fused",
        source="arXiv 2502.06269",
        chapter="F",
        kind="recipe",
        confidence="general",
        formula="InfoNCE(semantic, collaborative) + MSE of each to the fused code",
        use="""\
collaborative, fused = torch.randn(8, 16), torch.randn(8, 16)
diagonal = torch.arange(8)
loss = kd.relation_loss(student_features, collaborative, score="cosine", student_scale=10.0, labels=diagonal)
loss = loss + torch.nn.functional.mse_loss(student_features, fused)
""",
        cost=NO_VOCABULARY + "B x B in chunks",
        notes="The reconstruction loss of its codes is left out.",
    ),
    Entry(
        key="pea_diffusion",
        title="PEA-Diffusion: outputs and blocks of a U-Net",
        source="ECCV 2024",
        chapter="F",
        kind="recipe",
        confidence="code",
        formula="MSE(eps_S, eps) on native texts + MSE(eps_S, eps_T) on parallel ones + 0.1 sum over blocks MSE(F_S, F_T)",
        use="""\
noise, parallel = torch.randn(4, 5, 6, 6), torch.tensor([True, False, True, True])
error = lambda x, y, counted: ((x - y).square().mean((1, 2, 3)) * counted).sum() / counted.sum().clamp(min=1)
loss = error(student_maps, noise, ~parallel) + error(student_maps, teacher_maps, parallel)
loss = loss + 0.1 * error(student_maps, teacher_maps, parallel)
""",
        cost=NO_VOCABULARY + "linear in the maps",
        notes="A flag per sample says which terms count.",
    ),
)

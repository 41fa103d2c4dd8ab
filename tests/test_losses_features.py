"""The losses of hidden states, attention, relations and contrast against their formulas, in loops and float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from loss_cases import copy, noise
from torch import Tensor
from torch.nn.functional import cross_entropy

import kdkernels as kd
from kdkernels import losses

B, H, N, D, DT = 3, 2, 5, 4, 6


def agree(
    found: Tensor, expected: Tensor, mine: Sequence[Tensor], true: Sequence[Tensor], tolerance: float = 1e-9
) -> None:
    """Value and gradients of every tensor, by name of its place."""
    assert found.dim() == 0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    for one, other in zip(torch.autograd.grad(found, mine), torch.autograd.grad(expected, true), strict=True):
        size = float(other.abs().max())
        assert size > 0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * size)


def both(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [copy(tensor) for tensor in tensors], [copy(tensor) for tensor in tensors]


def relation(left: Tensor, right: Tensor) -> Tensor:
    return torch.softmax(left @ right.T / left.shape[-1] ** 0.5, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def heads(width: int, seed: int) -> list[Tensor]:
    return [noise(B, H, N, width, seed=seed + place) for place in range(3)]


LENGTHS = torch.tensor([5, 2, 4])


def test_minilm() -> None:
    student, teacher = heads(D, 0), heads(DT, 10)
    mine, true = both(*student)
    found = losses.MiniLM(1.0, 0.5)(tuple(mine), tuple(teacher), lengths=LENGTHS)
    rows: list[list[Tensor]] = [[], []]
    for b, length in enumerate(LENGTHS.tolist()):
        for h in range(H):
            q, k, v, tq, tk, tv = (x[b, h, :length] for x in (*true, *teacher))
            rows[0] += kl(relation(tq, tk), relation(q, k))
            rows[1] += kl(relation(tv, tv), relation(v, v))
    agree(found, torch.stack(rows[0]).mean() + 0.5 * torch.stack(rows[1]).mean(), mine, true)


def test_autodistil_and_heads_split_anew() -> None:
    student, teacher = heads(D, 0), heads(DT, 10)
    mine, true = both(*student)
    found = losses.AutoDistil(4, (1.0, 2.0, 3.0))(tuple(mine), tuple(teacher))
    terms = []
    for weight, s, t in zip((1.0, 2.0, 3.0), true, teacher, strict=True):
        rows = []
        for b in range(B):
            joined = [torch.cat([x[b, h] for h in range(H)], -1) for x in (s, t)]
            for head in range(4):
                pieces = [x[:, head * x.shape[1] // 4 : (head + 1) * x.shape[1] // 4] for x in joined]
                rows.append(kl(relation(pieces[1], pieces[1]), relation(pieces[0], pieces[0])))
        terms.append(weight * torch.stack(rows).mean())
    agree(found, torch.stack(terms).sum(), mine, true)
    with pytest.raises(ValueError, match="split into 3 heads"):
        losses.resplit_heads(student[0], 3)


def smooth(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x * x / 2, x.abs() - 0.5)


def plain_rkd(student: Tensor, teacher: Tensor, weights: tuple[float, float]) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x / x.norm() if bool(x.detach().any()) else x

    count = student.shape[0]
    relative, angles = [], []
    for e in (student, teacher):
        distances = [(e[i] - e[j]).norm() if i != j else e.new_zeros(()) for i in range(count) for j in range(count)]
        table = torch.stack(distances)
        relative.append(table / table[table > 0].mean())
        legs = [[unit(e[i] - e[j]) for i in range(count)] for j in range(count)]
        angles.append(torch.stack([a @ b for corner in legs for a in corner for b in corner]))
    pairs, triples = (smooth(x[0] - x[1]).mean() for x in (relative, angles))
    return weights[0] * pairs + weights[1] * triples


def test_rkd() -> None:
    student, teacher = noise(5, D, seed=1), noise(5, DT, seed=2)
    mine, true = both(student)
    agree(losses.RKD()(mine[0], teacher), plain_rkd(true[0], teacher, (25, 50)), mine, true)


@pytest.mark.slow
def test_rkd_of_torchdistill() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = noise(9, D, seed=1), noise(9, DT, seed=2)
    mine, true = both(student)
    peer = mid_level.RKDLoss("x", "x", 25.0, 50.0, "mean")
    expected = peer({"x": {"output": true[0]}}, {"x": {"output": teacher}})
    agree(losses.RKD()(mine[0], teacher), expected, mine, true, 1e-8)


def plain_gram(student: Tensor, teacher: Tensor) -> Tensor:
    def rows(matrix: Tensor) -> Tensor:
        return torch.stack([row / row.square().sum().sqrt() for row in matrix])

    flat = [x.reshape(x.shape[0], -1) for x in (student, teacher)]
    sp = (rows(flat[1] @ flat[1].T) - rows(flat[0] @ flat[0].T)).square().sum() / student.shape[0] ** 2
    icc = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        f, g = s.reshape(s.shape[0], -1), t.reshape(t.shape[0], -1)
        icc = icc + (rows(g @ g.T) - rows(f @ f.T)).square().sum()
    return sp + 2 * icc / (student.shape[0] * student.shape[1])


def plain_cat(
    student: Tensor, teacher: Tensor, size: int, normalized: bool, binarized: bool, top: int | None
) -> Tensor:
    terms = []
    for s, t in zip(student, teacher, strict=True):
        step = s.shape[-1] // size
        pooled = []
        for maps in (s, t):
            cells = [
                maps[:, y * step : (y + 1) * step, x * step : (x + 1) * step].mean((1, 2))
                for y in range(size)
                for x in range(size)
            ]
            pooled.append(torch.stack(cells, -1))
        classes = range(s.shape[0]) if top is None else pooled[1].mean(-1).argsort(descending=True)[:top].tolist()
        for c in classes:
            a, b = pooled[0][c], pooled[1][c]
            b = (b > b.mean()).to(b.dtype) if binarized else b
            terms.append((a / a.norm() - b / b.norm() if normalized else a - b).square().mean())
    return 0.7 * torch.stack(terms).mean()


def test_maps() -> None:
    student, teacher = noise(B, 3, 4, 4, seed=1), noise(B, 3, 4, 4, seed=2)
    mine, true = both(student)
    agree(losses.DisWOT(1.0, 2.0)(mine[0], teacher), plain_gram(true[0], teacher), mine, true)
    for options in ((2, False, False, None), (4, True, False, None), (2, False, True, 2)):
        mine, true = both(student)
        size, normalized, binarized, top = options
        loss = losses.CATKD(0.7, size, normalized=normalized, binarized=binarized, top=top)
        agree(loss(mine[0], teacher), plain_cat(true[0], teacher, *options), mine, true)


def test_nd() -> None:
    student, teacher, means = noise(6, D, seed=1), noise(6, DT, seed=2), noise(3, D, seed=3)
    student[:3] *= 5
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    mine, true = both(student)
    rows = []
    for s, t, y in zip(true[0], teacher, labels, strict=True):
        longest = max(t.norm(), s.norm())
        rows.append(1 - (s * means[y]).sum() / (means[y].norm() * longest))
    loss = losses.ND(means, 2.0)
    agree(loss(mine[0], teacher, labels), 2 * torch.stack(rows).mean(), mine, true)
    assert torch.equal(loss.state_dict()["class_means"], means)


def test_quantization_aware_attention() -> None:
    student, teacher = heads(D, 0), heads(DT, 10)
    outputs = noise(B, N, 7, seed=20), noise(B, N, 7, seed=21)
    mine, true = both(*student[:2], outputs[0])
    loss = losses.QATAttention(0.5, 2.0)
    found = loss([(mine[0], mine[1])], [(teacher[0], teacher[1])], [mine[2]], [outputs[1]], lengths=LENGTHS)
    maps = []
    for b, length in enumerate(LENGTHS.tolist()):
        for h in range(H):
            q, k, tq, tk = (x[b, h, :length] for x in (*true[:2], *teacher[:2]))
            maps.append(kl(relation(tq, tk), relation(q, k)).sum() / length)
    expected = 0.5 * torch.stack(maps).mean() + 2 * (true[2] - outputs[1]).square().mean()
    agree(found, expected, mine, true)


def test_trg() -> None:
    loss = losses.TRG(D, DT, global_weight=2.0, inner_weight=3.0, temperature=0.5, contrast_temperature=0.2).double()
    student, teacher = noise(2, 3, D, seed=1), noise(2, 3, DT, seed=2)
    mine, true = both(student)
    s, t = true[0].reshape(6, D), teacher.reshape(6, DT)

    def cosines(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in y]) for a in x])

    local = kl(torch.softmax(cosines(t, t) / 0.5, -1), torch.softmax(cosines(s, s) / 0.5, -1)).mean()
    contrast = cross_entropy(cosines(loss.projector(s), t) / 0.2, torch.arange(6))
    inner = torch.stack(
        [(relation(a, a) - relation(b, b)).square().mean() for a, b in zip(true[0], teacher, strict=True)]
    )
    agree(loss(mine[0], teacher), local + 2 * contrast + 3 * inner.mean(), mine, true)


MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False], [False] * 5])


@pytest.mark.parametrize("projection", ["each", "shared"])
def test_layer_matching(projection: str) -> None:
    loss = losses.LayerMatching(D, DT, [(0, 2), (1, 0)], projection=projection).double()
    layers, teachers = noise(2, B, N, D, seed=1), noise(3, B, N, DT, seed=2)
    mine, true = both(layers)
    terms = [
        (true[0][s][b, n] @ loss.weight[place if projection == "each" else 0] - teachers[t][b, n]).square().mean()
        for place, (s, t) in enumerate([(0, 2), (1, 0)])
        for b in range(B)
        for n in range(N)
        if MASK[b, n]
    ]
    agree(loss(list(mine[0]), list(teachers), mask=MASK), torch.stack(terms).mean(), mine, true)


def test_maps_of_layers() -> None:
    assert losses.layer_pairs(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert losses.layer_pairs(3, 6, "reverse") == [(0, 5), (1, 3), (2, 1)]
    assert losses.layer_pairs(3, 6, "all-to-one") == [(0, 5), (1, 5), (2, 5)]
    assert losses.layer_pairs(2, 6, every=2) == [(0, 1), (1, 3)]
    assert losses.layer_pairs(3, 6, "none") == []
    drawn = losses.layer_pairs(4, 6, "random", generator=torch.Generator().manual_seed(0))
    assert [s for s, _ in drawn] == [0, 1, 2, 3]
    assert len({t for _, t in drawn}) == 4
    with pytest.raises(ValueError, match="every must be from 1 to 2"):
        losses.layer_pairs(3, 6, every=3)
    nothing = losses.LayerMatching(D, D, [], projection="none")([], [])
    assert nothing.item() == 0


def test_nearest_layers() -> None:
    loss = losses.MLKD(D, DT, layers=2).double()
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.5], [2.0, -0.3]]))
    layers, teachers = noise(2, B, N, D, seed=1), noise(4, B, N, DT, seed=2)
    mine, true = both(layers)
    tokens = []
    for b, n in MASK.nonzero().tolist():
        total = true[0].new_zeros(())
        for place in range(2):
            errors = [(true[0][place, b, n] - loss.projector.weight @ t[b, n]).square().mean() for t in teachers]
            for weight, error in zip(loss.weight[place], sorted(errors, key=float), strict=False):
                total = total + weight * error
        tokens.append(total)
    agree(loss(list(mine[0]), list(teachers), mask=MASK), torch.stack(tokens).mean(), mine, true)


def plain_codec(student: Tensor, teacher: Tensor, axis: str) -> Tensor:
    frames = min(student.shape[1], teacher.shape[1])
    s, t = student[:, :frames], teacher[:, :frames]
    vectors = (
        [(s[b, :, d], t[b, :, d]) for b in range(s.shape[0]) for d in range(s.shape[2])]
        if axis == "feature"
        else [(s[b, n], t[b, n]) for b in range(s.shape[0]) for n in range(frames)]
    )
    terms = torch.stack([-torch.sigmoid(a @ b / (a.norm() * b.norm())).log() for a, b in vectors])
    return terms.mean() if axis == "feature" else (s - t).abs().mean() + 0.3 * terms.mean()


def plain_segments(student: Tensor, teacher: Tensor, segments: Tensor) -> Tensor:
    terms = []
    for b in range(student.shape[0]):
        for n in range(student.shape[1]):
            same = segments[b] == segments[b, n]
            target = teacher[b][same].mean(0) if segments[b, n] >= 0 else torch.zeros_like(teacher[b, n])
            terms.append((student[b, n] - target).square().sum())
    return torch.stack(terms).mean()


def test_frames_and_tokens() -> None:
    student, speech, language = noise(B, N, D, seed=1), noise(B, 7, D, seed=2), noise(B, 4, D, seed=3)
    for axis in ("feature", "time"):
        mine, true = both(student)
        found = losses.DMCodec(axis, weight=2.0, cosine_weight=0.3)(mine[0], speech, language)
        agree(found, plain_codec(true[0], speech, axis) + plain_codec(true[0], language, axis), mine, true)
    segments = torch.tensor([[0, 0, 1, -1, -1], [2, 2, 2, 0, 0], [-1, -1, 4, 4, 4]])
    mine, true = both(student)
    teacher = speech[:, :N]
    agree(losses.Sylber()(mine[0], teacher, segments), plain_segments(true[0], teacher, segments), mine, true)
    dmae, wide = losses.DMAE(D, DT, 1.5).double(), noise(B, N, DT, seed=4)
    mine, true = both(student)
    tokens = [
        (p / p.norm() - t / t.norm()).abs()
        for p, t in zip(dmae.projector(true[0]).flatten(0, 1), wide.flatten(0, 1), strict=True)
    ]
    agree(dmae(mine[0], wide), 1.5 * torch.stack(tokens).mean(), mine, true)


def test_prefixes_of_learners() -> None:
    prefixes, module = noise(B, 3, D, seed=1), noise(B, D, seed=2)
    mine, true = both(prefixes)
    loss = losses.ACM()
    expected = torch.stack([(true[0][:, k] - module).square().mean() for k in range(3)]).mean()
    agree(loss(mine[0], module), expected, mine, true)
    errors = torch.tensor([[4.0, 2.0, 1.9], [1.0, 1.0, 1.0], [9.0, 4.0, 1.0]]).double()
    shifted = errors.sqrt().unsqueeze(-1).expand(3, 3, D)
    assert loss.gates(shifted, torch.zeros(3, D).double()).tolist() == [1, 0, 2]


def test_bistil() -> None:
    hidden, teacher_hidden = noise(B, N, D, seed=1), noise(B, N, D, seed=2)
    attention, teacher_attention = (noise(B, H, N, N, seed=seed).softmax(-1) for seed in (3, 4))
    teacher_attention[:, :, :, 3:] = 0
    mine, true = both(attention, hidden)
    found = losses.BiStil(2.0, 3.0)([mine[0]], [teacher_attention], [mine[1]], [teacher_hidden], mask=MASK)
    expected = 2 * (true[0] - teacher_attention)[..., :3].square().mean()
    expected = expected + 3 * (true[1] - teacher_hidden)[MASK].square().mean()
    agree(found, expected, mine, true)


def test_explanations_have_second_derivatives() -> None:
    features, weight = noise(B, 3, 2, 2, seed=1), noise(3, 5, seed=2)
    teacher, teacher_map = noise(B, 5, seed=3), noise(B, 2, 2, seed=4).abs()
    classes = teacher.argmax(-1)
    results = []
    for plainly in (False, True):
        w = copy(weight)
        maps = (features.clone().requires_grad_() * w.sum()).tanh()
        logits = maps.mean((2, 3)) @ w
        if not plainly:
            explanation = losses.grad_cam(maps, logits, classes)
            loss = losses.E2KD(0.5, 2.0, 3.0)(logits, teacher, explanation, teacher_map)
        else:
            # d logit_y / d feature_c is w_cy / 4 everywhere.
            terms = []
            for b, y in enumerate(classes.tolist()):
                explained = torch.relu((w[:, y].view(3, 1, 1) / 4 * maps[b]).sum(0)).flatten()
                other = teacher_map[b].flatten()
                terms.append(1 - explained @ other / (explained.norm() * other.norm()))
            p, q = (teacher / 3).softmax(-1), (logits / 3).softmax(-1)
            loss = 0.5 * 9 * kl(p, q).mean() + 2 * torch.stack(terms).mean()
        results.append((loss, w))
    (found, w), (expected, v) = results
    agree(found, expected, [w], [v])


def test_derivative_of_a_gradient_of_a_kernel() -> None:
    """The outer loss of a step made with a gradient of a loss, as in meta-learning."""
    student, teacher = noise(N, D, seed=1), noise(N, DT, seed=2)
    results = []
    for loss in (losses.RKD(), lambda s, t: plain_rkd(s, t, (25, 50))):
        leaf = copy(student)
        (step,) = torch.autograd.grad(loss(leaf, teacher), leaf, create_graph=True)
        results.append((step.square().sum(), leaf))
    (found, mine), (expected, true) = results
    agree(found, expected, [mine], [true], 1e-8)


def cosine_table(x: Tensor, y: Tensor) -> list[list[Tensor]]:
    return [[a @ b / (a.norm() * b.norm()) for b in y] for a in x]


def test_linguistic_contrast() -> None:
    loss = losses.LinguGKD(D, DT, layers=2, temperature=0.3).double()
    with torch.no_grad():
        loss.layer_logits.copy_(torch.tensor([0.2, -0.4]))
        loss.task_logits.copy_(torch.tensor([0.5, 0.1]))
    states, teachers = noise(2, 5, D, seed=1), noise(2, 5, DT, seed=2)
    log_probs, labels = noise(5, 3, seed=3).log_softmax(-1), torch.tensor([0, 1, 0, 2, 1])
    mine, true = both(states, log_probs)
    found = loss(list(mine[0]), list(teachers), mine[1], labels)
    per_layer = []
    for s, t in zip(true[0], teachers, strict=True):
        table = cosine_table(s, t @ loss.projector.weight.T)
        rows = []
        for i in range(5):
            kept = [j for j in range(5) if j == i or labels[j] != labels[i]]
            scores = torch.stack([table[i][j] / 0.3 for j in kept])
            rows.append(scores.logsumexp(0) - table[i][i] / 0.3)
        per_layer.append(torch.stack(rows).mean())
    contrast = (loss.layer_logits.softmax(0) * torch.stack(per_layer)).sum()
    nll = -torch.stack([true[1][i, y] for i, y in enumerate(labels.tolist())]).mean()
    shares = loss.task_logits.softmax(0)
    parameters = [loss.layer_logits, loss.task_logits, loss.projector.weight]
    agree(found, shares[0] * nll + shares[1] * contrast, [*mine, *parameters], [*true, *parameters])


def test_leader() -> None:
    loss = losses.Leader(D, DT, align_weight=0.3, temperature=0.5).double()
    tensors = noise(4, 7, seed=1), noise(4, D, seed=2), noise(4, 3, seed=3), noise(4, 3, seed=4)
    targets, teacher = noise(4, 7, seed=5) > 0, noise(4, DT, seed=6)
    mine, true = both(*tensors)
    found = loss(mine[0], targets, mine[1], teacher, mine[2], mine[3])
    sigma = torch.sigmoid(true[0])
    bce = -torch.where(targets, sigma.log(), (1 - sigma).log()).mean()
    mse = (true[1] @ loss.projector.weight.T + loss.projector.bias - teacher).square().mean()
    table = cosine_table(true[2], true[3])
    align = []
    for i in range(4):
        others = [j for j in range(4) if j != i]
        rows = [torch.stack([table[i][j] for j in others]), torch.stack([table[j][i] for j in others])]
        align += [(scores / 0.5).logsumexp(0) - table[i][i] / 0.5 for scores in rows]
    agree(found, bce + 0.1 * mse + 0.3 * torch.stack(align).sum() / 4, mine, true)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_bound_of_mutual_information(alpha: float) -> None:
    loss = losses.MIAlpha(D, DT, 3, alpha=alpha, temperature=2.0).double()
    with torch.no_grad():
        loss.baseline.fill_(0.3)
    student, teacher = noise(4, D, seed=1), noise(4, DT, seed=2)
    mine, true = both(student)
    f = loss.student_projector(true[0]) @ loss.teacher_projector(teacher).T / 2
    first, second = [], []
    for i in range(4):
        others = [f[i, j].exp() for j in range(4) if j != i]
        denominator = alpha * torch.stack(others).mean() + (1 - alpha) * loss.baseline.exp()
        first.append((f[i, i].exp() / denominator).log())
        second += [other / denominator for other in others]
    expected = -(1 + torch.stack(first).mean() - torch.stack(second).mean())
    agree(loss(mine[0], teacher), expected, mine, true)


STATES: dict[str, Callable[[], torch.nn.Module]] = {
    "trg": lambda: losses.TRG(D, DT),
    "layer_matching": lambda: losses.LayerMatching(D, DT, [(0, 1)]),
    "mlkd_ood": lambda: losses.MLKD(D, DT),
    "nd_loss": lambda: losses.ND(torch.randn(3, D)),
    "dmae": lambda: losses.DMAE(D, DT),
    "lingugkd_infonce": lambda: losses.LinguGKD(D, DT),
    "leader_medrec": lambda: losses.Leader(D, DT),
    "distiller_mi_alpha": lambda: losses.MIAlpha(D, DT, 3),
}


@pytest.mark.parametrize("key", STATES)
def test_states_round_trip(key: str) -> None:
    one, other = STATES[key](), STATES[key]()
    assert isinstance(one, losses.get(key))
    other.load_state_dict(one.state_dict())
    assert one.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.DisWOT()(torch.ones(2, 3, 4), torch.ones(2, 5, 4)), "as many channels"),
        (lambda: losses.CATKD()(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4)), "teacher must have the shape"),
        (lambda: losses.MLKD(D, DT)([torch.ones(2, D)], [torch.ones(2, DT)] * 3), "student must be 7 layers"),
        (lambda: losses.MIAlpha(D, DT, alpha=2.0), "alpha must lie between 0 and 1"),
        (lambda: losses.LayerMatching(D, DT, [], projection="none"), "needs one width"),
        (lambda: losses.layer_pairs(2, 4, "sideways"), "how must be one of forward, reverse"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries_run() -> None:
    from kdkernels.catalogue import PRELUDE
    from kdkernels.catalogue.features import ENTRIES

    for entry in ENTRIES:
        names: dict[str, Any] = {}
        exec(PRELUDE + entry.use, names)
        loss = names["loss"]
        assert loss.dim() == 0, entry.key
        assert bool(loss.isfinite()), entry.key
        loss.backward()
        assert entry.kind != "loss" or entry.key in kd.losses.names(), entry.key

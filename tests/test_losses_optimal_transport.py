"""``SinKD``, ``ULD``, ``CoT2Align`` and ``WCoRD`` against their formulas in loops, in float64."""

from __future__ import annotations

import pytest
import torch
from loss_cases import TOLERANCES, Model, compare, copy, each_backend, each_kind, each_precision, noise
from torch import Tensor

import kdkernels as kd
from kdkernels import losses


def transport(cost: Tensor, epsilon: float, iterations: int, mass: float) -> Tensor:
    """``<P, C>`` by matrix scaling in probability space, each row of P with the same share of the mass."""
    kernel = torch.exp(-cost / epsilon)
    rows, columns = mass / cost.shape[0], mass / cost.shape[1]
    for _ in range(iterations):
        kernel = kernel * (rows / kernel.sum(1, keepdim=True))
        kernel = kernel * (columns / kernel.sum(0, keepdim=True))
    return (kernel * cost).sum()


def distances(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return (q.unsqueeze(-2) - p.unsqueeze(-3)).abs().sum(-1)


@each_backend
@each_kind
@each_precision
@pytest.mark.parametrize("mass", ["batch", "unit"])
def test_sinkd(mass: str, dtype: torch.dtype, kind: str, backend: str | None) -> None:
    loss = losses.SinKD(weight=0.7, mass=mass, backend=backend)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        total = 6.0 if mass == "batch" else 1.0
        return 0.7 * transport(distances(student, teacher, 2.0), 0.1, 20, total)

    student, teacher = (Model.make(kind, (6,), 11, seed) for seed in (1, 2))
    compare(loss, plain, student, teacher, dtype)


@each_kind
def test_sinkd_of_rows_that_count(kind: str) -> None:
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])
    student, teacher = (Model.make(kind, (2, 5), 7, seed) for seed in (3, 4))
    for model in (student, teacher):
        model.leaves[0][~mask] = torch.nan
    loss = losses.SinKD(weight=1.0, backend="reference")
    mine = student.to(torch.float64)
    found = loss(mine.source(), teacher.source(), mask=mask)
    found.backward()
    gradient = mine.leaves[0].grad
    assert gradient is not None
    assert not gradient[~mask].any()
    true = student.to(torch.float64)
    parts = [
        transport(distances(true.logits()[row][keep], teacher.logits()[row][keep], 2.0), 0.1, 20, float(keep.sum()))
        for row, keep in enumerate(mask)
    ]
    expected = torch.stack(parts).mean()
    expected.backward()
    torch.testing.assert_close(found, expected)
    right = true.leaves[0].grad
    assert right is not None
    torch.testing.assert_close(gradient[mask], right[mask], rtol=1e-9, atol=1e-12)


def answer(labels: Tensor, skip: bool) -> tuple[int, int]:
    """By the words of the paper's code: start, length."""
    tokens = labels.tolist()
    leading = 0
    while leading < len(tokens) and tokens[leading] == -100:
        leading += 1
    length = sum(token != -100 for token in tokens) - skip
    return (leading - 1 if leading else 0), length


def plain_uld(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    teacher_labels: Tensor,
    *,
    tau: float,
    skip: bool,
    by_token: bool,
) -> Tensor:
    per_sample, per_token = [], []
    for b in range(len(student)):
        (start, length), (other_start, other_length) = answer(labels[b], skip), answer(teacher_labels[b], False)
        found = []
        for step in range(min(length, other_length)):
            q = (student[b, start + step] / tau).softmax(-1).sort(descending=True).values
            p = (teacher[b, other_start + step] / tau).softmax(-1).sort(descending=True).values
            p = torch.cat([p, p.new_zeros(len(q) - len(p))])
            found.append((q - p).abs().sum())
        per_sample.append(torch.stack(found).mean())
        per_token += found
    return torch.stack(per_token).mean() if by_token else torch.stack(per_sample).mean()


def uld_labels() -> tuple[Tensor, Tensor]:
    labels = torch.tensor([[-100, -100, 3, 4, 5, 6], [1, 2, 3, -100, -100, -100], [-100, 7, 8, 9, 1, 2]])
    teacher_labels = torch.tensor([[-100, 1, 2, 3, -100], [4, 5, 6, 7, 8], [-100, -100, -100, 1, 2]])
    return labels, teacher_labels


@each_backend
@each_kind
@each_precision
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_uld(reduction: str, dtype: torch.dtype, kind: str, backend: str | None) -> None:
    labels, teacher_labels = uld_labels()
    skip = reduction == "token"
    loss = losses.ULD(0.8, 0.5, temperature=1.3, skip_student_eos=skip, reduction=reduction, backend=backend)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        hard = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        soft = plain_uld(student, teacher, labels, teacher_labels, tau=1.3, skip=skip, by_token=skip)
        return 0.5 * hard + 0.8 * soft

    student, teacher = Model.make(kind, (3, 6), 13, 5), Model.make(kind, (3, 5), 11, 6)
    compare(lambda s, t: loss(s, t, labels, teacher_labels), plain, student, teacher, dtype)


@each_backend
def test_uld_looks_at_answers_only(backend: str | None) -> None:
    labels, teacher_labels = uld_labels()
    student, teacher = 2 * noise(3, 6, 13, seed=5).float(), noise(3, 5, 11, seed=6).float()
    loss = losses.ULD(ce_weight=0.0, backend=backend)
    expected = loss(student, teacher, labels, teacher_labels)
    student[0, 0], student[0, 5], student[1, 4:], teacher[0, 4] = (torch.nan,) * 4
    student.requires_grad_()
    found = loss(student, teacher, labels, teacher_labels)
    assert torch.equal(found, expected)
    found.backward()
    assert student.grad is not None
    assert not student.grad[0, 0].any()
    assert not student.grad[1, 4:].any()
    nothing = torch.full_like(labels, -100)
    assert float(losses.ULD(backend=backend)(student.detach(), teacher, nothing, teacher_labels)) == 0


def cosine_cost(one: Tensor, other: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(one.unsqueeze(1), other.unsqueeze(0), dim=-1)


@each_backend
@each_precision
@pytest.mark.parametrize("cost", ["cosine", "euclidean"])
def test_cot2align(cost: str, dtype: torch.dtype, backend: str | None) -> None:
    """Unequal lengths, tokens that do not count anywhere in the sequence, two layers of which one is projected."""
    torch.manual_seed(0)
    loss = losses.CoT2Align([4, 4], [6, 4], cost=cost, epsilon=0.2, max_iterations=30, backend=backend).to(dtype)
    student = [noise(2, 5, 4, seed=7), noise(2, 5, 4, seed=8)]
    teacher = [noise(2, 3, 6, seed=9), noise(2, 3, 4, seed=10)]
    mask = torch.tensor([[True, True, False, True, True], [True, True, True, False, False]])
    teacher_mask = torch.tensor([[True, True, True], [False, True, True]])
    for states, counted in ((student, mask), (teacher, teacher_mask)):
        for state in states:
            state[~counted] = torch.nan
    mine = [copy(state, dtype) for state in student]
    found = loss(mine, [state.to(dtype) for state in teacher], mask, teacher_mask)
    found.backward()

    def plain(states: list[Tensor], weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer in range(2):
            for b in range(2):
                rows, columns = states[layer][b][mask[b]], teacher[layer][b][teacher_mask[b]]
                columns = columns @ weight.T if layer == 0 else columns
                distance = cosine_cost(rows, columns) if cost == "cosine" else torch.cdist(rows, columns)
                total = total + transport(distance, 0.2, 30, 1.0) / 2
        return total

    weight = copy(loss.projectors[0].weight)
    right = [copy(state) for state in student]
    expected = plain(right, weight)
    expected.backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    for given, true in zip([*mine, loss.projectors[0].weight], [*right, weight], strict=True):
        assert given.grad is not None
        assert true.grad is not None
        size = float(true.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(given.grad.double(), true.grad, rtol=0, atol=tolerance * size)
    assert not any(given.grad[~mask].any() for given in mine if given.grad is not None)


def test_cot2align_composes() -> None:
    loss = losses.CoT2Align([4], [4], alpha=0.3)
    assert not list(loss.parameters())
    terms = [torch.tensor(value) for value in (1.0, 2.0, 3.0, 4.0)]
    torch.testing.assert_close(loss.combine(*terms), torch.tensor(0.7 * 1 + 0.3 * 9))


@each_backend
@each_precision
@pytest.mark.parametrize("extra", [None, "shared", "each"])
def test_wcord(extra: str | None, dtype: torch.dtype, backend: str | None) -> None:
    torch.manual_seed(0)
    loss = losses.WCoRD(4, 6, dataset_size=50, feature_size=8, temperature=0.5, iterations=25, backend=backend)
    loss = loss.to(dtype).eval()  # the power iteration of the spectral norm stands still
    student, teacher = noise(5, 4, seed=11), noise(5, 6, seed=12)
    negatives = {None: None, "shared": noise(3, 6, seed=13), "each": noise(5, 3, 6, seed=13)}[extra]
    mine = copy(student, dtype)
    found = loss(mine, teacher.to(dtype), None if negatives is None else negatives.to(dtype))
    found.backward()
    layers = loss.student_projection, loss.teacher_projection
    right = copy(student)

    def feature(layer: torch.nn.Linear, values: Tensor) -> Tensor:
        mapped = values @ layer.weight.detach().double().T + layer.bias.detach().double()
        return mapped / mapped.norm()

    own = [feature(layers[0], row) for row in right]
    target = [feature(layers[1], row) for row in teacher]
    count = 4 if negatives is None else 7
    contrast = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        others = [target[j] for j in range(5) if j != i]
        if negatives is not None:
            others += [feature(layers[1], row) for row in (negatives[i] if extra == "each" else negatives)]
        ratio = count / 50

        def h(other: Tensor, mine: Tensor = own[i], ratio: float = ratio) -> Tensor:
            critic = (mine @ other / 0.5).exp()
            return critic / (critic + ratio)

        contrast = contrast - h(target[i]).log() / 5
        contrast = contrast - count * torch.stack([(1 - h(other)).log() for other in others]).mean() / 5
    local = transport(cosine_cost(torch.stack(own), torch.stack(target)), 0.1, 25, 1.0)
    expected = 0.8 * contrast + 0.05 * local
    expected.backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    assert mine.grad is not None
    assert right.grad is not None
    torch.testing.assert_close(mine.grad.double(), right.grad, rtol=0, atol=tolerance * float(right.grad.abs().max()))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())


@pytest.mark.slow
def test_wcord_is_lipschitz_and_saved() -> None:
    torch.manual_seed(0)
    loss = losses.WCoRD(4, 6, dataset_size=50, feature_size=8, backend="reference")
    for _ in range(50):
        loss(noise(5, 4, seed=1).float(), noise(5, 6, seed=2).float())
    norms = [torch.linalg.matrix_norm(layer.weight, 2) for layer in (loss.student_projection, loss.teacher_projection)]
    torch.testing.assert_close(torch.stack(norms), torch.ones(2), rtol=1e-3, atol=0)
    twin = losses.WCoRD(4, 6, dataset_size=50, feature_size=8, backend="reference")
    twin.load_state_dict(loss.state_dict())
    features = noise(5, 4, seed=3).float(), noise(5, 6, seed=4).float()
    assert torch.equal(twin.eval()(*features), loss.eval()(*features))


def test_defaults_are_those_of_the_papers() -> None:
    sinkd, uld, wcord = losses.SinKD(), losses.ULD(), losses.WCoRD(2, 2, dataset_size=1)
    assert (sinkd.weight, sinkd.temperature, sinkd.epsilon, sinkd.iterations) == (1e-3, 2, 0.1, 20)
    assert (uld.weight, uld.ce_weight, uld.temperature, uld.teacher_temperature) == (1.5, 1, 1, 1)
    assert (wcord.global_weight, wcord.local_weight, wcord.temperature) == (0.8, 0.05, 0.07)
    cot2align = losses.CoT2Align([2], [2])
    assert (cot2align.epsilon, cot2align.max_iterations, cot2align.alpha) == (0.1, 100, 0.5)


def test_bad_input() -> None:
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="mass must be one of batch, unit, got 'all'"):
        losses.SinKD(mass="all")
    with pytest.raises(ValueError, match=r"mask must have the shape \(3,\) of the student's rows, got \(2,\)"):
        losses.SinKD()(logits[0], logits[0], mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"student_labels must have the shape of the student's tokens, \(2, 3\), got"):
        losses.ULD()(logits, logits, labels[:, :2], labels)
    with pytest.raises(ValueError, match="as many sequences, got 2 and 1"):
        losses.ULD()(logits, logits[:1], labels, labels[:1])
    with pytest.raises(ValueError, match=r"teacher must have the shape \[B, T, ...\], got \(3, 5\)"):
        losses.ULD()(logits, logits[0], labels, labels)
    with pytest.raises(TypeError, match=r"student must be a tensor of logits, .* got list"):
        losses.ULD()([1.0], logits, labels, labels)
    with pytest.raises(ValueError, match="as many layers, got 1 and 2"):
        losses.CoT2Align([1], [1, 2])
    with pytest.raises(ValueError, match="teacher_states must be the states of 1 layers, got 2"):
        losses.CoT2Align([5], [5])([logits], [logits, logits])
    with pytest.raises(ValueError, match="dataset_size must be at least 1, got 0"):
        losses.WCoRD(5, 5, dataset_size=0)
    with pytest.raises(ValueError, match="as many samples, got 3 and 2"):
        losses.WCoRD(5, 5, dataset_size=9)(logits[0], logits[0, :2])
    with pytest.raises(ValueError, match="more than one sample"):
        losses.WCoRD(5, 5, dataset_size=9)(logits[0, :1], logits[0, :1])


def test_heads_keep_their_options() -> None:
    options = {"softcap": 3.0, "logit_scale": 0.5, "compute_dtype": torch.bfloat16}
    weight, bias = torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(4))
    head = kd.LMHead(torch.zeros(2, 5, 3, requires_grad=True), weight, bias, **options)
    for changed in (losses.sequences.detached(head), losses.sequences.take_tokens(head, torch.zeros(2, 1).long())):
        assert isinstance(changed, kd.LMHead)
        assert {name: getattr(changed, name) for name in options} == options
    frozen = losses.sequences.detached(head)
    assert not any(tensor.requires_grad for tensor in (frozen.hidden, frozen.weight, frozen.bias))
    assert head.weight is weight

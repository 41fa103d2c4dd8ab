"""``kd.relation_loss`` against softmaxes of all pairs, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import check
from loss_cases import copy, noise
from torch import Tensor

import kdkernels as kd
import kdkernels.arguments

B, H, N, D, DT = 2, 3, 7, 5, 6


def tensors(*, columns: int = N, seed: int = 0) -> list[Tensor]:
    """Left and right of the student and of the teacher."""
    shapes = ((N, D), (columns, D), (N, DT), (columns, DT))
    return [2 * noise(B, H, *shape, seed=seed + place) for place, shape in enumerate(shapes)]


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def plain(parts: list[Tensor], allowed: Tensor | None = None) -> Tensor:
    """KL(R^T || R^S) of every row; rows without a column: 0."""
    logs = []
    for left, right, scale in ((*parts[:2], D**-0.5), (*parts[2:], DT**-0.5)):
        scores = left @ right.mT * scale
        if allowed is not None:
            empty = ~allowed.any(-1, keepdim=True)
            scores = scores.masked_fill(~(allowed | empty), -torch.inf)
        logs.append(scores.log_softmax(-1))
    log_q, log_p = (log.clamp(min=-1e9) for log in logs)
    value = kl(log_p.exp(), log_p, log_q)
    return value if allowed is None else value.masked_fill(~allowed.any(-1), 0)


def leaves_of(parts: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [copy(part, dtype) for part in parts]


def agree(found: Tensor, expected: Tensor, mine: list[Tensor], true: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    ours, right = torch.autograd.grad(found, mine), torch.autograd.grad(expected, true)
    for one, other in zip(ours, right, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("budget", [None, 1, 2000], ids=["problems", "single rows", "some rows"])
@pytest.mark.parametrize("columns", [N, 11])
def test_value_and_gradients_to_both_sides(columns: int, budget: int | None) -> None:
    parts = tensors(columns=columns)
    weight = noise(B, H, N, seed=9).square()
    mine, true = leaves_of(parts), leaves_of(parts)
    rows = kd.relation_loss(*mine, reduction="none", memory_budget=budget)
    assert rows.shape == (B, H, N)
    agree((rows * weight).sum(), (plain(true) * weight).sum(), mine, true)
    found = kd.relation_loss(*mine, weight=weight, memory_budget=budget)
    agree(found, (plain(true) * weight).sum() / weight.sum(), mine, true)


def test_the_same_tensor_twice() -> None:
    parts = tensors()
    mine, true = copy(parts[0]), copy(parts[0])
    found = kd.relation_loss(mine, mine, parts[2], parts[2])
    agree(found, plain([true, true, parts[2], parts[2]]).mean(), [mine], [true])


@pytest.mark.parametrize("divergence", [kd.ReverseKL(), kd.JSD(0.3)])
def test_divergences(divergence: kd.Divergence) -> None:
    parts = tensors()
    mine, true = leaves_of(parts), leaves_of(parts)
    logits = [left @ right.mT * left.shape[-1] ** -0.5 for left, right in (true[:2], true[2:])]
    log_q, log_p = (each.log_softmax(-1) for each in logits)
    q, p = log_q.exp(), log_p.exp()
    m = 0.3 * p + 0.7 * q
    jsd = 0.3 * kl(p, log_p, m.log()) + 0.7 * kl(q, log_q, m.log())
    expected = kl(q, log_q, log_p) if divergence == kd.ReverseKL() else jsd
    agree(kd.relation_loss(*mine, divergence=divergence), expected.mean(), mine, true)


LENGTHS = torch.tensor([[N, 3, 0], [1, 5, 2]])
INSIDE = torch.arange(N) < LENGTHS.unsqueeze(-1)
COLUMNS = torch.rand(B, 1, N, generator=torch.Generator().manual_seed(4)) > 0.4
PAIRS = torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(5)) > 0.5
TRIANGLE = torch.ones(N, N, dtype=torch.bool).tril()
MASKS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "causal": ({"causal": True}, TRIANGLE.expand(B, H, N, N)),
    "lengths": ({"lengths": LENGTHS}, INSIDE.unsqueeze(-1) & INSIDE.unsqueeze(-2)),
    "columns": ({"column_mask": COLUMNS}, COLUMNS.unsqueeze(-2).expand(B, H, N, N)),
    "columns, causal": ({"column_mask": COLUMNS, "causal": True}, COLUMNS.unsqueeze(-2) & TRIANGLE.expand(B, H, N, N)),
    "pairs": ({"pair_mask": PAIRS}, PAIRS),
    "shared pairs, columns": (
        {"pair_mask": PAIRS[0, 0], "column_mask": COLUMNS},
        (PAIRS[0, 0] & COLUMNS.unsqueeze(-2)).expand(B, H, N, N),
    ),
    "pairs, columns, rows": (
        {"pair_mask": PAIRS, "column_mask": COLUMNS, "row_mask": INSIDE},
        PAIRS & COLUMNS.unsqueeze(-2) & INSIDE.unsqueeze(-1),
    ),
}


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks(name: str, backend: str, budget: int | None) -> None:
    options, allowed = MASKS[name]
    parts = tensors()
    if backend == "cpu":
        options = {**options, "memory_budget": budget}
    polluted = [part.clone() for part in parts]
    for place in (0, 2):
        polluted[place][~allowed.any(-1)] = torch.nan
    if "lengths" in options or "column_mask" in options:
        unseen = ~allowed.any(-2) if "lengths" in options else ~COLUMNS.expand(B, H, N)
        for place in (1, 3):
            polluted[place][unseen] = torch.nan
    mine, true = leaves_of(polluted), leaves_of(parts)
    found = kd.relation_loss(*mine, **options, backend=backend)
    expected = plain(true, allowed).sum() / allowed.any(-1).sum()
    ours, right = torch.autograd.grad(found, mine), torch.autograd.grad(expected, true)
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * float(other.abs().max()))


def test_labels_without_a_teacher() -> None:
    left, right = noise(5, 4, seed=1), noise(5, 4, seed=2)
    labels = torch.tensor([0, 1, -100, 3, 4])
    kept = ~torch.eye(5, dtype=torch.bool).roll(1, 0)
    mine, true = leaves_of([left, right]), leaves_of([left, right])
    found = kd.relation_loss(*mine, score="cosine", student_scale=1 / 0.07, labels=labels, pair_mask=kept)
    unit = [each / each.norm(dim=-1, keepdim=True) for each in true]
    scores = (unit[0] @ unit[1].T / 0.07).masked_fill(~kept, -torch.inf)
    rows = [scores[i].logsumexp(0) - scores[i, i] for i in (0, 1, 3, 4)]
    agree(found, torch.stack(rows).mean(), mine, true)


def test_labels_beside_a_teacher() -> None:
    parts = tensors()
    labels = torch.randint(N, (B, H, N), generator=torch.Generator().manual_seed(3))
    mine, true = leaves_of(parts), leaves_of(parts)
    log_q = (true[0] @ true[1].mT * D**-0.5).log_softmax(-1)
    hard = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    for reduction in ("sum", "none"):
        found = kd.relation_loss(*mine, labels=labels, ce_weight=0.7, reduction=reduction).sum()
        agree(found, (plain(true) + 0.7 * hard).sum(), mine, true)
        true = leaves_of(parts)
        hard = -(true[0] @ true[1].mT * D**-0.5).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def test_relation_of_distances() -> None:
    parts = [part + 30 for part in tensors()]
    mine, true = leaves_of(parts), leaves_of(parts)
    found = kd.relation_loss(*mine, score="sqeuclidean", student_scale=0.3, teacher_scale=0.2)
    logs = [
        (-scale * (left.unsqueeze(-2) - right.unsqueeze(-3)).square().sum(-1)).log_softmax(-1)
        for left, right, scale in ((*true[:2], 0.3), (*true[2:], 0.2))
    ]
    agree(found, kl(logs[1].exp(), logs[1], logs[0]).mean(), mine, true, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype: torch.dtype) -> None:
    parts = [part.to(dtype) for part in tensors()]
    ours, plainly, true = leaves_of(parts, dtype), leaves_of(parts, torch.float32), leaves_of(parts)
    upstream = noise(B, H, N, seed=8)
    values = [kd.relation_loss(*ours, reduction="none"), plain(plainly), plain(true)]
    assert values[0].dtype == torch.float32
    check("the value", *values, values[2].abs() + 1)
    gradients = [
        torch.autograd.grad((value * upstream.to(value.dtype)).sum(), leaves)
        for value, leaves in zip(values, (ours, plainly, true), strict=True)
    ]
    for one, another, right in zip(*gradients, strict=True):
        assert one.dtype == dtype
        check("the gradient", one, another, right, 4 * right.abs().max().expand_as(right))


WIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "divergence": kd.JSD(0.4)},
    "masks": {"lengths": torch.randint(0, 102, (2, 4), generator=torch.Generator().manual_seed(1))},
    "pairs": {"pair_mask": torch.rand(101, 101, generator=torch.Generator().manual_seed(2)) > 0.4},
    "labels": {"labels": torch.arange(101).expand(2, 4, 101), "ce_weight": 0.5, "reduction": "none"},
    "labels alone": {"labels": torch.arange(101).expand(2, 4, 101), "causal": True},
}


@pytest.mark.parametrize("name", WIDE)
def test_whole_problems_in_one_kernel(name: str) -> None:
    options = WIDE[name]
    shapes = [(101, 48), (101, 48), (101, 80), (101, 80)]  # several blocks of rows, panels that are not full
    parts = [noise(2, 4, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    parts = parts[:2] if name == "labels alone" else parts
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")):
        leaves = leaves_of(parts, dtype)
        value = kd.relation_loss(*leaves, **options, backend=backend)
        upstream = torch.ones_like(value) + torch.arange(value.numel()).view(value.shape) % 3
        results.append([value.detach().reshape(1, -1), *torch.autograd.grad((value * upstream).sum(), leaves)])
    for place, (one, other, right) in enumerate(zip(*results, strict=True)):
        check(f"output {place}", one, other, right, right.abs().amax().expand_as(right))


def test_which_relations_the_kernel_takes() -> None:
    from kdkernels.backends.cpu.relation import relation_applies

    def relations(count: int, width: int, dtype: torch.dtype) -> Any:
        rows = torch.ones(count, 3, width, dtype=dtype)
        names = ("row_mask", "column_mask", "pair_mask", "lengths", "weight", "labels", "ce_weight")
        return kd.arguments.prepare_relation(
            (rows,) * 4,
            kd.ForwardKL(),
            score="dot",
            scales=(None, None),
            causal=False,
            reduction="mean",
            **dict.fromkeys(names),  # type: ignore[arg-type]
        ).relations

    assert relation_applies(relations(8, 48, torch.float32))
    assert not relation_applies(relations(7, 48, torch.float32))
    assert not relation_applies(relations(8, 47, torch.float32))
    assert not relation_applies(relations(8, 48, torch.float64))


def test_second_derivatives() -> None:
    parts = leaves_of([part[0, 0, :2, :2] for part in tensors()])
    for reduction in ("none", "mean"):
        assert torch.autograd.gradgradcheck(lambda *each, r=reduction: kd.relation_loss(*each, reduction=r), parts)


def test_reference_gradient() -> None:
    parts = leaves_of([part[0, 0, :3] for part in tensors()])
    assert torch.autograd.gradcheck(kd.reference.relation_loss, parts)


@pytest.mark.slow
def test_operators() -> None:
    from kdkernels import arguments
    from kdkernels.ops import relation as operators

    parts = leaves_of([part[0] for part in tensors()])
    relation = arguments.prepare_relation(
        tuple(parts),  # type: ignore[arg-type]
        kd.ForwardKL(),
        score="dot",
        scales=(None, None),
        row_mask=None,
        column_mask=COLUMNS[0],
        pair_mask=None,
        lengths=None,
        causal=True,
        weight=None,
        labels=torch.zeros(H, N, dtype=torch.long),
        ce_weight=0.5,
        reduction="sum",
    ).relations
    options = operators.pack(relation, None, "cpu")
    with torch.no_grad():
        factors = torch.ones(2, H * N, dtype=torch.float64).unbind()
    torch.library.opcheck(operators.relation_op, (*relation.tensors, *options))
    torch.library.opcheck(operators.relation_total_op, (*relation.tensors, *factors, [True] * 4, *options))


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    parts = tensors()

    def both(*parts: Tensor) -> Tensor:
        rows = kd.relation_loss(*parts, causal=True, reduction="none")
        return rows.sum() + kd.relation_loss(*parts, student_scale=0.5)

    mine, plainly = leaves_of(parts), leaves_of(parts)
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*mine)
    agree(found, both(*plainly), mine, plainly)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_right": torch.ones(5, 4)}, r"student_left .* and student_right .* must agree"),
        ({"teacher_left": torch.ones(3, 3)}, "teacher_left must have the rows of student_left"),
        ({"teacher_right": None}, "both be given or both be None"),
        ({"student_scale": "x"}, "student_scale must be a finite number"),
        ({"score": "sum"}, "score must be one of dot, cosine, sqeuclidean"),
        ({"lengths": torch.tensor(9)}, "lengths must lie between 0 and 5"),
        ({"row_mask": torch.ones(4, dtype=torch.bool)}, r"row_mask must broadcast to the shape \[5\]"),
        ({"column_mask": torch.ones(5)}, "column_mask must have one of the dtypes torch.bool"),
        ({"pair_mask": torch.ones(5, 4, dtype=torch.bool)}, "pair_mask must have the shape"),
        ({"labels": torch.full((5,), 5), "ce_weight": 1.0}, "labels must be token ids"),
        ({"ce_weight": 1.0}, "needs labels"),
        ({"reduction": "all"}, "reduction must be one of"),
        ({"divergence": "kl"}, "divergence must be an instance"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        name: torch.ones(5, 3) for name in ("student_left", "student_right", "teacher_left", "teacher_right")
    }
    with pytest.raises((TypeError, ValueError), match=message):
        kd.relation_loss(**{**given, **change})


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing(shape: tuple[int, ...]) -> None:
    left = torch.zeros(shape, requires_grad=True)
    loss = kd.relation_loss(left, left, left.detach(), left.detach())
    loss.backward()
    assert loss.item() == 0
    assert left.grad is not None
    assert not left.grad.any()


@pytest.mark.slow
def test_threads_do_not_matter() -> None:
    parts = [part.float() for part in tensors()]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mine = leaves_of(parts, torch.float32)
        loss = kd.relation_loss(*mine)
        results.append([loss, *torch.autograd.grad(loss, mine)])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)

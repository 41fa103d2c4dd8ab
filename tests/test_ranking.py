"""``plackett_luce`` and ``token_ranks`` against loops over ranks, by the accuracy rule (see ``accuracy``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check, complaint
from test_operators import recorded
from torch import Tensor
from truth import each_dtype, leaf

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.triton import ranking as gpu

V = 37
LABELS = torch.tensor([3, 0, V - 1, 11, 20])

each_backend = pytest.mark.parametrize("backend", [None, "reference"])


def logits(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def by_falling_logit(teacher: Tensor, label: int | None) -> list[int]:
    ids = sorted(range(len(teacher)), key=lambda v: (-float(teacher[v]), v))
    return ids if label is None else [label, *(v for v in ids if v != label)]


def likelihood(student: Tensor, orders: list[list[int]], weights: Tensor) -> Tensor:
    """The formula, rank by rank: ``[N]``."""
    values = []
    for row, order in enumerate(orders):
        rest = [v for v in range(student.shape[1]) if v not in set(order)]
        terms = [
            weights[row, k] * (torch.logsumexp(student[row, order[k:] + rest], -1) - student[row, v])
            for k, v in enumerate(order)
        ]
        values.append(torch.stack(terms).sum())
    return torch.stack(values)


def evaluate(
    student: Tensor, orders: list[list[int]], weights: Tensor, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    raised = leaf(student.to(dtype))
    values = likelihood(raised, orders, weights.to(dtype))
    values.backward(upstream.to(dtype))
    assert raised.grad is not None
    return values.detach(), raised.grad


def compare(found: Tensor, given: Tensor, orders: list[list[int]], weights: Tensor) -> None:
    """Values and gradients of the leaf ``given``, against the formula."""
    upstream = torch.linspace(-1.5, 2.0, len(found), dtype=torch.float64)
    compute = torch.promote_types(given.dtype, torch.float32)
    assert found.dtype == compute
    found.backward(upstream.to(compute))
    plain, truth = (evaluate(given, orders, weights, upstream, each) for each in (compute, torch.float64))
    ranks = max(map(len, orders))
    check("value", found.detach(), plain[0], truth[0], truth[0].abs() + weights[:, :ranks].sum(-1) * 10)
    assert given.grad is not None
    assert given.grad.dtype == given.dtype
    size = (weights.sum(-1) * upstream.abs()).unsqueeze(-1).expand(given.shape)
    check("gradient", given.grad, plain[1], truth[1], size)
    # Neither nothing nor the opposite passes for the gradient.
    assert complaint(torch.zeros_like(given.grad), plain[1], truth[1], size) is not None
    assert complaint(-given.grad, plain[1], truth[1], size) is not None


@pytest.mark.parametrize("labels", [None, LABELS], ids=["", "labels"])
@pytest.mark.parametrize("top_k", [None, 4], ids=["all", "top"])
@each_backend
@each_dtype
def test_softmax_weights(dtype: torch.dtype, backend: str | None, top_k: int | None, labels: Tensor | None) -> None:
    student, teacher = leaf(logits(dtype, 5, V, seed=0)), logits(dtype, 5, V, seed=1)
    tau = 1.7
    found = kd.plackett_luce(
        student, teacher, labels=labels, temperature=tau, top_k=top_k, reduction="none", backend=backend
    )
    orders = [
        by_falling_logit(row, None if labels is None else int(labels[i]))[:top_k] for i, row in enumerate(teacher)
    ]
    weights = torch.softmax(teacher.double() / tau, -1).gather(-1, torch.tensor(orders))
    compare(found, student, orders, weights)


@each_backend
def test_other_weights_and_orders(backend: str | None) -> None:
    student, teacher = leaf(logits(torch.float32, 5, V, seed=0)), logits(torch.float32, 5, V, seed=1)
    weights = torch.rand(5, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    orders = [by_falling_logit(row, None) for row in teacher]
    ones = torch.ones_like(weights)
    for given, expected in (("uniform", ones), (weights.float(), weights.float()), (weights[0].float(), weights[:1])):
        found = kd.plackett_luce(student, teacher, weights=given, reduction="none", backend=backend)
        compare(found, student, orders, expected.double().expand(5, V))
        student.grad = None
    lengths = [4, 1, 0, 3, 4]
    short = torch.tensor([order[:n] + [-1] * (4 - n) for order, n in zip(orders, lengths, strict=True)])
    found = kd.plackett_luce(student, short, weights=weights[:, :4], reduction="none", backend=backend)
    assert found[2] == 0
    rows = [0, 1, 3, 4]
    named = [orders[row][: lengths[row]] for row in rows]
    truth, gradient = evaluate(student[rows].detach(), named, weights[rows], torch.ones(4), torch.float64)
    torch.testing.assert_close(found[rows].double(), truth, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[rows].double(), gradient, rtol=0, atol=1e-6)
    assert not student.grad[2].any()


def test_special_weights() -> None:
    """(1, 0, ..) is the cross-entropy of what comes first; every rank of a list of two is a logistic loss."""
    student, teacher = logits(torch.float64, 5, V, seed=0), logits(torch.float64, 5, V, seed=1)
    first = torch.zeros(V)
    first[0] = 1
    found = kd.plackett_luce(student, teacher, labels=LABELS, weights=first)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(student, LABELS))
    pair = kd.plackett_luce(student[:, :2], torch.tensor([[1, 0]]).expand(5, 2), weights="uniform")
    torch.testing.assert_close(pair, torch.nn.functional.softplus(student[:, 0] - student[:, 1]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_ranks(dtype: torch.dtype) -> None:
    """Several segments and blocks, where the digits of the sort matter: equal logits, and zeros of either sign."""
    n = 4100
    student, teacher = leaf(logits(dtype, 3, n, seed=0)), logits(dtype, 3, n, seed=1)
    teacher[1] = (teacher[1] * 2).round() / 2
    teacher[1, ::7] = -0.0
    found = kd.plackett_luce(student, teacher, reduction="none")
    order = torch.sort(teacher, dim=-1, descending=True, stable=True).indices
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    found.backward(upstream)

    def plain(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        raised = leaf(student.to(compute))
        ranked = raised.gather(-1, order)
        weights = teacher.to(compute).softmax(-1).gather(-1, order)
        values = (weights * (ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked)).sum(-1)
        values.backward(upstream.to(compute))
        assert raised.grad is not None
        return values.detach(), raised.grad

    assert student.grad is not None
    for name, ours, eager, truth in zip(
        ("value", "gradient"), (found.detach(), student.grad), plain(dtype), plain(torch.float64), strict=True
    ):
        check(name, ours, eager, truth, torch.full_like(truth, 5.0) if name == "value" else None)


def hard_rows() -> Iterator[tuple[str, Tensor]]:
    """Student logits in which sums underflow unless their origin moves along."""
    falling = torch.linspace(1e4, -1e4, V)
    yield "falling", falling
    yield "rising", falling.flip(0)
    yield "alternating", torch.where(torch.arange(V) % 2 == 0, 1e4, -1e4) + torch.arange(V)
    yield "one far above", torch.where(torch.arange(V) == 5, 1e4, 0.1 * torch.arange(V))
    yield "one far below", torch.where(torch.arange(V) == 5, -1e4, 0.1 * torch.arange(V))
    yield "constant", torch.full((V,), -7e3)
    yield "masked", torch.where(torch.arange(V) % 3 == 0, -math.inf, 0.1 * torch.arange(V))


@pytest.mark.parametrize("name", [name for name, _ in hard_rows()])
@pytest.mark.parametrize("top_k", [None, 5], ids=["all", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_students(dtype: torch.dtype, top_k: int | None, name: str) -> None:
    student = leaf(dict(hard_rows())[name].to(dtype).expand(2, V))
    teacher = logits(dtype, 2, V, seed=3)
    teacher[1] = torch.arange(V).flip(0)
    order = [by_falling_logit(row, None)[:top_k] for row in teacher]
    weights = torch.ones(2, V, dtype=torch.float64)
    found = kd.plackett_luce(student, teacher, weights="uniform", top_k=top_k, reduction="none")
    found.backward(torch.ones_like(found))
    clamped = student.detach().double().clamp(min=-1e5)
    truth, gradient = evaluate(clamped, order, weights, torch.ones(2), torch.float64)
    gradient[student.detach() == -math.inf] = 0
    torch.testing.assert_close(found.detach().double(), truth, rtol=1e-6, atol=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), gradient, rtol=2e-6, atol=2e-5)


@each_backend
@pytest.mark.parametrize("top_k", [None, 6], ids=["all", "top"])
def test_teachers_that_mask(backend: str | None, top_k: int | None) -> None:
    """Masked ids have no weight, but for a label with one of its own; NaN and infinity show."""
    student, teacher = logits(torch.float32, 4, 8, seed=0), logits(torch.float32, 4, 8, seed=1)
    teacher[0, 3:] = -math.inf
    teacher[1] = -math.inf
    teacher[2, 4] = math.nan
    teacher[3, 4] = math.inf
    labels = torch.tensor([5, 5, 0, 0])
    options: dict[str, Any] = {"labels": labels, "top_k": top_k, "reduction": "none", "backend": backend}
    uniform = kd.plackett_luce(student, teacher, weights="uniform", **options)
    first = [5, *by_falling_logit(teacher[0, :3], None)]
    expected = likelihood(student[:2].double(), [first, [5]], torch.ones(2, 8))
    torch.testing.assert_close(uniform[:2].double(), expected, rtol=1e-6, atol=0)
    assert uniform[2:].isnan().all()
    softmax = kd.plackett_luce(student, teacher, **options)
    weights = torch.cat([torch.zeros(1), teacher[0].softmax(-1)[first[1:]]]).unsqueeze(0)
    expected = likelihood(student[:1].double(), [first], weights)
    torch.testing.assert_close(softmax[:1].double(), expected, rtol=1e-6, atol=0)
    assert softmax[1] == 0
    assert softmax[2:].isnan().all()


@pytest.mark.parametrize("top_k", [None, 4], ids=["all", "top"])
@pytest.mark.parametrize("budget", [None, 700])
def test_heads(budget: int | None, top_k: int | None) -> None:
    """Chunks of heads with softcaps, and tokens that do not count: against the reference, and against logits."""
    source = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 7), (V, 7), (V,), (2, 5, 4), (V, 4)]
    tensors = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(V, (2, 5), generator=source)
    labels[1, 1] = -100
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    tensors[0][0, 2] = math.nan
    tensors[3][0, 2] = math.nan
    options: dict[str, Any] = {"labels": labels, "mask": mask, "top_k": top_k, "temperature": 0.8}
    gradients, values = [], []
    for library, dtype in ((kd.reference, torch.float64), (kd, torch.float32), (kd, torch.float64)):
        leaves = [leaf(tensor.to(dtype)) for tensor in tensors]
        student = kd.LMHead(*leaves[:3], softcap=5.0, logit_scale=0.7)
        teacher = kd.LMHead(*leaves[3:], softcap=3.0)
        more = {} if library is kd.reference else {"memory_budget": budget}
        value = library.plackett_luce(student, teacher, **options, **more)
        value.backward()
        values.append(value.detach().double())
        gradients.append([each.grad.double() for each in leaves[:3] if each.grad is not None])
        assert [each.grad for each in leaves[3:]] == [None, None]
    for value, found, tolerance in zip(values[1:], gradients[1:], (2e-6, 1e-12), strict=True):
        torch.testing.assert_close(value, values[0], rtol=tolerance, atol=0)
        for ours, exact in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * float(exact.abs().max()))
    clean = [tensor.nan_to_num() for tensor in tensors]
    student_logits = 5 * torch.tanh(0.7 * (clean[0] @ clean[1].T + clean[2]) / 5)
    teacher_logits = 3 * torch.tanh(clean[3] @ clean[4].T / 3)
    kept = mask & (labels != -100)
    orders = [by_falling_logit(row, int(y))[:top_k] for row, y in zip(teacher_logits[kept], labels[kept], strict=True)]
    weights = torch.softmax(teacher_logits[kept] / 0.8, -1).gather(-1, torch.tensor(orders))
    torch.testing.assert_close(values[0], likelihood(student_logits[kept], orders, weights).mean())


def test_shapes_reductions_and_views() -> None:
    wide = logits(torch.float32, 2, 3, 2 * V, seed=0)
    student, teacher = wide[..., ::2].requires_grad_(), wide[..., 1::2]
    each = kd.plackett_luce(student, teacher, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(kd.plackett_luce(student, teacher, reduction="sum"), each.sum())
    mask = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(kd.plackett_luce(student, teacher, mask=mask), each[mask].mean())
    nothing = kd.plackett_luce(student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert nothing == 0
    (gradient,) = torch.autograd.grad(nothing, student)
    assert not gradient.any()
    torch.testing.assert_close(kd.plackett_luce(student, teacher, vocab_size=9, reduction="none")[1, 2],
                               kd.plackett_luce(student[1, 2, :9], teacher[1, 2, :9]))  # fmt: skip
    none = torch.zeros(0, V, requires_grad=True)
    for top_k in (None, 3):
        empty = kd.plackett_luce(none, torch.zeros(0, V), top_k=top_k)
        empty.backward()
        assert empty == 0
    torch.testing.assert_close(
        kd.plackett_luce(student.bfloat16(), teacher.half()), kd.plackett_luce(student.bfloat16().float(), teacher.half().float())
    )  # fmt: skip


def test_any_number_of_threads_gives_the_same_bits() -> None:
    student, teacher = logits(torch.float32, 9, 5000, seed=0).requires_grad_(), logits(torch.float32, 9, 5000, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            value = kd.plackett_luce(student, teacher)
            results.append((value, *torch.autograd.grad(value, student)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.slow
def test_gradcheck_of_the_reference_and_second_derivatives() -> None:
    student, teacher = logits(torch.float64, 2, 6, seed=0).requires_grad_(), logits(torch.float64, 2, 6, seed=1)
    for options in ({}, {"top_k": 3}, {"labels": torch.tensor([1, 5]), "weights": "uniform"}):
        for backend in ("reference", None):

            def loss(rows: Tensor, options: Any = options, backend: str | None = backend) -> Tensor:
                return kd.plackett_luce(rows, teacher, reduction="none", backend=backend, **options)

            torch.autograd.gradcheck(loss, student)
            torch.autograd.gradgradcheck(loss, student)


def test_a_repeated_backward() -> None:
    student, teacher = logits(torch.float32, 2, V, seed=0).requires_grad_(), logits(torch.float32, 2, V, seed=1)
    value = kd.plackett_luce(student, teacher)
    first = torch.autograd.grad(value, student, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(value, student)[0], first)


def test_torch_func_takes_the_reference() -> None:
    student, teacher = logits(torch.float64, 3, V, seed=0), logits(torch.float64, 3, V, seed=1)
    found = torch.func.vmap(torch.func.grad(kd.plackett_luce))(student, teacher)
    raised = student.clone().requires_grad_()
    kd.plackett_luce(raised, teacher, reduction="sum").backward()
    torch.testing.assert_close(found, raised.grad)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": [1.0]}, TypeError, "student must be a tensor"),
    ({"teacher_or_order": torch.zeros(5, V + 1)}, ValueError, "vocabularies of 37 and 38"),
    ({"teacher_or_order": torch.zeros(4, V)}, ValueError, "same tokens"),
    ({"teacher_or_order": torch.zeros(5, 2, dtype=torch.int64)}, ValueError, "at most once, token 0 names 0 again"),
    ({"teacher_or_order": torch.full((5, 2), V)}, ValueError, r"ids in \[0, 37\) or -1, got 37"),
    ({"teacher_or_order": torch.tensor([[-1, 3]]).expand(5, 2)}, ValueError, "past the last rank"),
    ({"teacher_or_order": torch.zeros(5, dtype=torch.int64)}, ValueError, "must have the shape"),
    ({"teacher_or_order": torch.arange(2).expand(5, 2)}, ValueError, "softmax.* needs the teacher"),
    ({"teacher_or_order": torch.arange(2).expand(5, 2), "labels": LABELS}, ValueError, "labels and top_k go with a teacher"),
    ({"labels": LABELS + 30}, ValueError, "labels must be token ids"),
    ({"weights": "zipf"}, ValueError, "weights must be one of softmax, uniform"),
    ({"weights": torch.ones(3)}, ValueError, "one entry per rank"),
    ({"weights": -torch.ones(V)}, ValueError, "at least 0"),
    ({"weights": torch.ones(V, requires_grad=True)}, ValueError, "weights require grad"),
    ({"top_k": 0}, ValueError, "top_k must be between 1 and"),
    ({"top_k": 3.0}, TypeError, "top_k must be an integer"),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive"),
    ({"temperature": torch.ones(5), "top_k": 3}, ValueError, "temperature must be a number where top_k"),
    ({"reduction": "median"}, ValueError, "reduction must be one of"),
    ({"mask": torch.ones(5)}, TypeError, "mask must be a dense bool"),
    ({"memory_budget": -1}, ValueError, "memory_budget"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "text"), REFUSED, ids=[text[:30] for _, _, text in REFUSED])
def test_bad_arguments_are_refused(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"student": torch.zeros(5, V), "teacher_or_order": torch.zeros(5, V)} | changed
    with pytest.raises(error, match=text):
        kd.plackett_luce(given.pop("student"), given.pop("teacher_or_order"), **given)


@each_backend
@each_dtype
def test_token_ranks(dtype: torch.dtype, backend: str | None) -> None:
    source = logits(dtype, 3, 2, 1500, seed=0)
    source[0, 0, ::3] = source[0, 0, 0]
    source[0, 1, ::2] = -math.inf
    source[1, 0, :400] = math.nan
    ids = torch.randint(1500, (3, 2, 4), generator=torch.Generator().manual_seed(1))
    ids[0, 0, 0], ids[0, 1, 0], ids[1, 0, 0], ids[2, 1, 3] = 3, 4, 7, -1
    ranks = kd.token_ranks(source, ids.int(), backend=backend)
    assert ranks.shape == ids.shape
    assert ranks.dtype == torch.int64
    assert ranks[2, 1, 3] == -1
    assert ranks[1, 0, 0] == 1500
    for row in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        for place, v in enumerate(ids[row].tolist()):
            if v >= 0 and not source[row][v].isnan():
                assert ranks[row][place] == sum(x > float(source[row][v]) for x in source[row].tolist())
    assert torch.equal(kd.token_ranks(source, ids[..., 1], backend=backend), ranks[..., 1])
    assert torch.equal(kd.token_ranks(source, source.nan_to_num(-math.inf).argmax(-1), backend=backend).bool(),
                       torch.zeros(3, 2, dtype=torch.bool))  # fmt: skip


def test_token_ranks_of_heads_views_and_nothing() -> None:
    source = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 5, generator=source), torch.randn(V, 5, generator=source)
    ids = torch.randint(V, (6, 2), generator=source)
    expected = kd.token_ranks(hidden @ weight.T, ids)
    assert torch.equal(kd.token_ranks(kd.LMHead(hidden, weight, softcap=0.1), ids, memory_budget=300), expected)
    both = kd.topk_logits(hidden @ weight.T, 5).ids
    assert torch.equal(kd.token_ranks(hidden @ weight.T, both), torch.arange(5).expand(6, 5))
    assert kd.token_ranks(torch.zeros(0, V), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert kd.token_ranks(torch.zeros(3, V), torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)
    view = (hidden @ weight.T)[:, ::2]
    assert torch.equal(kd.token_ranks(view, ids // 2), kd.token_ranks(view.clone(), ids // 2))


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.tensor([1, 2, V]), ValueError, r"ids must lie in \[0, 37\)"),
        (torch.tensor([1, 2, -2]), ValueError, "got -2"),
        (torch.zeros(3), TypeError, "ids must have one of the dtypes"),
        (torch.zeros(2, dtype=torch.int64), ValueError, "ids must have the shape"),
    ],
)
def test_bad_ids_are_refused(ids: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kd.token_ranks(torch.zeros(3, V), ids)


@pytest.mark.parametrize("top", [False, True], ids=["all", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_path(dtype: torch.dtype, top: bool) -> None:
    """Its sorts and scans are PyTorch's, and run anywhere: also with far logits, a softcap and tokens that do not count."""
    student, teacher = logits(dtype, 5, V, seed=0), logits(dtype, 5, V, seed=1)
    student[1] *= 400
    student[2, ::3] = -math.inf
    student[4] = math.nan
    active = torch.tensor([True, True, True, True, False])
    spec = RowSpec(0, 0.0, 0.0, student_softcap=900.0, active=active)
    order, weights = (kd.topk_logits(teacher, 4).ids, torch.rand(5, 4)) if top else (None, None)
    upstream = torch.linspace(-1, 1.5, 5)
    results = []
    for kernel in (gpu.plackett_luce, cpu.plackett_luce):
        gradient = torch.full_like(student, 7.0)
        values = kernel(student, None if top else teacher, order, weights, spec, upstream, gradient)
        results.append((values, gradient))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    scale = float(results[1][1].abs().max())
    assert scale > 0
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "top_k"), [("logits", None), ("half", None), ("head", 3)])
def test_operators(kind: str, top_k: int | None) -> None:
    """What is registered holds together; compiled graphs equal eager mode."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    student, teacher = logits(dtype, 3, 7, seed=0).requires_grad_(), logits(dtype, 3, 7, seed=1)
    weight = logits(dtype, V, 7, seed=2).requires_grad_()
    labels = torch.tensor([1, 2, 6])

    def loss(rows: Tensor, other: Tensor) -> Tensor:
        sources = (kd.LMHead(rows, weight), kd.LMHead(other, weight)) if kind == "head" else (rows, other)
        return kd.plackett_luce(*sources, labels=labels, top_k=top_k, temperature=1.5)

    for operator, arguments in recorded(lambda: loss(student, teacher).backward()):
        torch.library.opcheck(operator, arguments)
    student.grad = None
    expected = loss(student, teacher)
    gradient = torch.autograd.grad(expected, student)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = compiled(student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient)

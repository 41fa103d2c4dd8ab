"""``pairwise_l1``, ``pairwise_cosine`` and ``pairwise_sqeuclidean``, by the accuracy rule (see ``accuracy``).

The yardstick is ``softmax`` and ``torch.cdist(p=1)``, in float64 the truth, in float32 plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check, complaint
from test_linear_divergence import SLACK as HEAD_SLACK
from test_linear_divergence import Pair, each_pairing, random_bias, random_head, random_sides, tensors_of, with_leaves
from test_mutations import mutants, replaced
from test_operators import recorded
from test_topk import VIEWS
from torch import Tensor
from truth import Head, compute_dtype, each_dtype, leaf

import kdkernels as kd
from kdkernels.backends import native

BACKENDS = ("cpu", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
INFINITY, NAN = math.inf, math.nan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Logits ``[..., rows, V]``, rows flat and peaked in turn."""
    spread = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64).repeat(-(-shape[-2] // 3))[: shape[-2], None]
    return (spread * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def plain_distances(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, teacher_temperature: float | None = None
) -> Tensor:
    tau = temperature if teacher_temperature is None else teacher_temperature
    return torch.cdist(torch.softmax(student / temperature, -1), torch.softmax(teacher / tau, -1), p=1)


def upstream_of(distance: Tensor) -> Tensor:
    """Of both signs, as the gradient through a transport plan is not, and of unlike sizes."""
    return torch.randn(distance.shape, generator=generator(7), dtype=torch.float64).add(0.3).to(distance.dtype)


def sizes(student: Tensor, teacher: Tensor, upstream: Tensor, temperature: float, tau: float) -> tuple[Tensor, Tensor]:
    """Of the terms that the gradients to the logits are sums of; exponentials err by their exponents' roundings."""

    def of(logits: Tensor, temperature: float, weights: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.double() / temperature, -1).clamp(min=-1e4)
        return weights.unsqueeze(-1) * log_p.exp() * (1 - log_p) / temperature

    weights = upstream.double().abs()
    return of(student, temperature, weights.sum(-1)), of(teacher, tau, weights.sum(-2))


def settled(student: Tensor, teacher: Tensor, temperature: float, tau: float) -> tuple[Tensor, Tensor]:
    """Which rows of either side have no probability so close to another's that rounding decides which is larger.

    There the gradient jumps by twice the upstream one, in plain PyTorch too.
    """
    p, q = torch.softmax(student.double() / temperature, -1), torch.softmax(teacher.double() / tau, -1)
    apart = torch.stack(
        [
            ((row.unsqueeze(-2) - q).abs() > 1e-5 * q).logical_or(q + row.unsqueeze(-2) < 1e-30).all(-1)
            for row in p.unbind(-2)
        ],
        -2,
    )
    return apart.all(-1), apart.all(-2)


def evaluated(
    function: Callable[..., Tensor], student: Tensor, teacher: Tensor, dtype: torch.dtype | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(distances, gradient to the student, gradient to the teacher)."""
    leaves = leaf(student, dtype), leaf(teacher, dtype)
    distance = function(*leaves, **options)
    return distance.detach(), *torch.autograd.grad(distance, leaves, upstream_of(distance))


def check_logits(student: Tensor, teacher: Tensor, backend: str = "cpu", **options: Any) -> None:
    compute = compute_dtype(student.dtype, teacher.dtype)
    found = evaluated(kd.pairwise_l1, student, teacher, backend=backend, **options)
    near = evaluated(plain_distances, student, teacher, compute, **options)
    exact = evaluated(plain_distances, student, teacher, torch.float64, **options)
    assert found[0].dtype == compute
    assert (found[1].dtype, found[2].dtype) == (student.dtype, teacher.dtype)
    check("distance", found[0], near[0], exact[0], torch.full_like(exact[0], 2))
    taus = options.get("temperature", 1.0), options.get("teacher_temperature", options.get("temperature", 1.0))
    both = sizes(student, teacher, upstream_of(exact[0]), *taus)
    clear = settled(student, teacher, *taus)
    if exact[1].numel() * teacher.shape[-2] < 10**5:
        assert all(bool(rows.any()) for rows in clear), "no row is held against the rule"
    for place, name in enumerate(("student", "teacher")):
        gradients = [answer[place + 1] for answer in (found, near, exact)]
        rows = clear[place]
        check(f"gradient to the {name}", *(each[rows] for each in (*gradients, both[place])))
        error = (gradients[0].double() - gradients[2]).norm(dim=-1)
        allowed = 0.02 * gradients[2].norm(dim=-1) + 1e-3 * both[place].norm(dim=-1)
        assert bool((error <= allowed).all()), f"gradient to the {name}"


SIZES = [
    ((), 1, 1, 2),
    ((), 2, 3, 31),
    ((), 5, 9, 127),
    ((2,), 4, 4, 1025),
    ((2, 3), 3, 2, 64),
    ((), 9, 130, 97),
    ((), 131, 6, 33),
]
LARGE = [((), 64, 64, 4097), ((), 7, 10, 151_936), ((), 300, 260, 513)]


@pytest.mark.parametrize(
    ("batch", "n", "m", "vocab"),
    [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGE)],
    ids="{}".format,
)
@each_dtype
@each_backend
def test_equals_cdist(backend: str, dtype: torch.dtype, batch: tuple[int, ...], n: int, m: int, vocab: int) -> None:
    if backend == "reference" and n * m * vocab > 10**6:
        pytest.skip("the reference makes all differences at once")
    rows = random_rows(*batch, n, vocab, dtype=dtype), random_rows(*batch, m, vocab, dtype=dtype, seed=1)
    check_logits(*rows, backend)


@each_backend
def test_temperatures(backend: str) -> None:
    rows = random_rows(2, 5, 300), random_rows(2, 4, 300, seed=1)
    check_logits(*rows, backend, temperature=2.0)
    check_logits(*rows, backend, temperature=0.5, teacher_temperature=3.0)


@each_backend
def test_two_precisions(backend: str) -> None:
    check_logits(random_rows(5, 300).bfloat16(), random_rows(4, 300, seed=1), backend)
    check_logits(random_rows(5, 300), random_rows(4, 300, seed=1).double(), backend)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_from_zero(offset: float) -> None:
    check_logits(random_rows(5, 1100) + offset, random_rows(4, 1100, seed=1) + offset)


def test_probabilities_that_underflow() -> None:
    """Most are 0 or subnormal in float32."""
    rows = random_rows(6, 1100), random_rows(5, 1100, seed=1)
    for each in rows:
        each[:, 100:] -= torch.linspace(60, 160, 1000)
    found = evaluated(kd.pairwise_l1, *rows)
    exact = evaluated(plain_distances, *rows, dtype=torch.float64)
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-6)
        assert float(truth.abs().max()) > 0.01


@pytest.mark.parametrize("view", VIEWS)
@each_backend
def test_views(backend: str, view: str) -> None:
    student, teacher = random_rows(6, 131), random_rows(5, 131, seed=1)
    viewed = VIEWS[view](student), VIEWS[view](teacher)
    expected = evaluated(kd.pairwise_l1, student, teacher, backend=backend)
    leaves = [rows.detach().requires_grad_() for rows in viewed]
    distance = kd.pairwise_l1(*leaves, backend=backend)
    # An upstream gradient with strides of its own.
    upstream = upstream_of(distance).mT.contiguous().mT
    found = distance.detach(), *torch.autograd.grad(distance, leaves, upstream)
    for ours, other in zip(found, expected, strict=True):
        if backend == "cpu":
            assert torch.equal(ours, other)
        else:  # PyTorch sums in an order that depends on the strides
            torch.testing.assert_close(ours, other)


# --- properties --------------------------------------------------------------------------------------------------------


@each_dtype
@each_backend
def test_identical_rows(backend: str, dtype: torch.dtype) -> None:
    """Exactly 0 apart, and exactly no gradient, whatever other pairs there are."""
    student = random_rows(7, 1100, dtype=dtype)
    leaves = leaf(student), leaf(student)
    distance = kd.pairwise_l1(*leaves, backend=backend)
    assert bool((distance.detach().diagonal() == 0).all())
    assert bool((distance.detach()[~torch.eye(7, dtype=torch.bool)] > 0.01).all())
    for gradient in torch.autograd.grad(distance, leaves, torch.eye(7, dtype=distance.dtype)):
        assert bool((gradient == 0).all())


@each_dtype
def test_a_vocabulary_of_one(dtype: torch.dtype) -> None:
    found = evaluated(kd.pairwise_l1, random_rows(5, 1, dtype=dtype), random_rows(4, 1, dtype=dtype, seed=1))
    assert all(bool((each == 0).all()) for each in found)


def test_a_metric() -> None:
    rows = random_rows(40, 500)
    distance = kd.pairwise_l1(rows, rows)
    assert torch.equal(distance, distance.mT)
    assert torch.equal(kd.pairwise_l1(rows[:3], rows[3:]), kd.pairwise_l1(rows[3:], rows[:3]).mT)
    assert 0 <= float(distance.min()) < float(distance.max()) <= 2 + 1e-6
    detours = (distance.unsqueeze(1) + distance.unsqueeze(0)).amin(-1)
    assert bool((distance <= detours + 1e-6).all())


@each_backend
def test_disjoint_rows_are_two_apart(backend: str) -> None:
    """-inf is masked vocabulary: probability and gradient 0."""
    student, teacher = random_rows(4, 300), random_rows(5, 300, seed=1)
    student[:, ::2] = teacher[:, 1::2] = -INFINITY
    distance, *gradients = evaluated(kd.pairwise_l1, student, teacher, backend=backend)
    torch.testing.assert_close(distance, torch.full((4, 5), 2.0), rtol=0, atol=1e-6)
    for gradient, rows in zip(gradients, (student, teacher), strict=True):
        assert bool((gradient[rows == -INFINITY] == 0).all())
        assert float(gradient.abs().max()) < 1e-5, "moving mass within a side changes nothing"


@each_backend
def test_masked_vocabulary(backend: str) -> None:
    rows = random_rows(5, 200), random_rows(4, 200, seed=1)
    rows[0][0, 3:] = rows[0][1:3, ::3] = rows[1][:, 50:90] = -INFINITY
    check_logits(*rows, backend)


@each_backend
def test_a_row_masked_altogether(backend: str) -> None:
    """Uniform, as everywhere in the library, and without gradient."""
    student, teacher = random_rows(3, 50), random_rows(4, 50, seed=1)
    student[1] = -INFINITY
    distance, gradient, _ = evaluated(kd.pairwise_l1, student, teacher, backend=backend)
    student[1] = 0
    torch.testing.assert_close(distance, plain_distances(student, teacher))
    assert bool((gradient[1] == 0).all())
    assert bool((gradient[0] != 0).any())


@pytest.mark.parametrize("bad", [NAN, INFINITY])
@each_backend
def test_a_row_without_a_distribution_shows(backend: str, bad: float) -> None:
    """In its own distances, and nowhere else."""
    student, teacher = random_rows(5, 1100), random_rows(4, 1100, seed=1)
    expected = kd.pairwise_l1(student, teacher, backend=backend)
    student[2, 1050] = bad
    distance = kd.pairwise_l1(student, teacher, backend=backend)
    assert bool(distance[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(distance[others], expected[others])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 4, 3)], ids=str)
@each_backend
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    *batch, n, m = shape
    student, teacher = torch.zeros(*batch, n, 7, requires_grad=True), torch.zeros(*batch, m, 7, requires_grad=True)
    distance = kd.pairwise_l1(student, teacher, backend=backend)
    assert distance.shape == shape
    gradients = torch.autograd.grad(distance.sum(), (student, teacher))
    assert all(bool((gradient == 0).all()) for gradient in gradients)
    head = Head(torch.ones(*batch, n, 4), torch.ones(7, 4), torch.ones(7)).with_leaves()
    kd.pairwise_l1(head.source(), teacher, backend=backend).sum().backward()
    for name, tensor in head.tensors().items():
        assert tensor.grad is not None, name
        assert bool((tensor.grad == 0).all())


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["student", "teacher"])
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool]) -> None:
    rows = random_rows(5, 1100), random_rows(6, 1100, seed=1)
    expected = evaluated(kd.pairwise_l1, *rows)
    leaves = [each.clone().requires_grad_(want) for each, want in zip(rows, wanted, strict=True)]
    distance = kd.pairwise_l1(*leaves)
    distance.backward(upstream_of(distance))
    assert torch.equal(distance.detach(), expected[0])
    for each, want, gradient in zip(leaves, wanted, expected[1:], strict=True):
        assert each.grad is None if not want else torch.equal(each.grad, gradient)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(kd.pairwise_l1(*leaves), expected[0])
    assert not kd.pairwise_l1(*rows).requires_grad


def test_backward_twice() -> None:
    student = leaf(random_rows(5, 300))
    distance = kd.pairwise_l1(student, random_rows(6, 300, seed=1))
    first, second = (torch.autograd.grad(distance.sum(), student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_tensor_on_both_sides() -> None:
    """The gradient of a row's distances from its own batch flows through both."""
    rows = random_rows(6, 200)
    shared, apart = leaf(rows), (leaf(rows), leaf(rows))
    kd.pairwise_l1(shared, shared).square().sum().backward()
    kd.pairwise_l1(*apart).square().sum().backward()
    torch.testing.assert_close(shared.grad, apart[0].grad + apart[1].grad)  # type: ignore[operator]


def test_inference_tensors_and_inputs_unchanged() -> None:
    with torch.inference_mode():
        teacher = random_rows(4, 300, seed=1)
    student = leaf(random_rows(5, 300))
    before = student.detach().clone(), teacher.clone()
    kd.pairwise_l1(student, teacher).sum().backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("sizes", [(3, 2, 20_000), (150, 140, 3000)], ids=str)
def test_threads_change_nothing(sizes: tuple[int, int, int]) -> None:
    n, m, vocab = sizes
    rows = random_rows(2, n, vocab), random_rows(2, m, vocab, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(evaluated(kd.pairwise_l1, *rows))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


# --- language-model heads ----------------------------------------------------------------------------------------------


def head_answers(
    sides: Pair, function: Callable[..., Tensor], dtype: torch.dtype | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    sides = with_leaves(sides, dtype)
    distance = function(*sides, **options)
    distance.backward(upstream_of(distance))
    return distance.detach(), {name: tensor.grad for name, tensor in tensors_of(sides).items()}


def fused(student: Any, teacher: Any, **options: Any) -> Tensor:
    return kd.pairwise_l1(
        *(each.source() if isinstance(each, Head) else each for each in (student, teacher)), **options
    )


def whole(student: Any, teacher: Any, **options: Any) -> Tensor:
    """Logits made whole; ``vocab_size`` cuts them."""
    size = options.pop("vocab_size", None)
    options.pop("memory_budget", None)
    logits = [each.logits(size) if isinstance(each, Head) else each[..., :size] for each in (student, teacher)]
    return plain_distances(*(each.to(compute_dtype(each.dtype)) for each in logits), **options)


def check_heads(sides: Pair, **options: Any) -> None:
    value, gradients = head_answers(sides, fused, **options)
    near, near_gradients = head_answers(sides, whole, **options)
    exact, exact_gradients = head_answers(sides, whole, torch.float64, **options)
    dtype = next(iter(tensors_of(sides).values())).dtype
    flat = [each.reshape(1, -1) for each in (value, near, exact)]
    check("distance", *flat, slack=HEAD_SLACK[dtype])
    for name, gradient in gradients.items():
        expected = [each[name].reshape(1, -1) for each in (near_gradients, exact_gradients)]  # type: ignore[union-attr]
        assert gradient is not None
        assert gradient.dtype == dtype
        check(f"gradient to the {name}", gradient.reshape(1, -1), *expected, slack=HEAD_SLACK[dtype])


@pytest.mark.parametrize("memory_budget", [1, 20_000, None], ids="budget_{}".format)
@each_pairing
@each_dtype
def test_heads(dtype: torch.dtype, pairing: str, memory_budget: int | None) -> None:
    """However the vocabulary is cut: entry by entry, in chunks of unequal width, not at all."""
    vocab = 127 if memory_budget == 1 else 1031
    check_heads(random_sides(pairing, vocab, dtype), memory_budget=memory_budget, temperature=1.1)


@pytest.mark.parametrize("memory_budget", [30_000, None], ids="budget_{}".format)
def test_every_option_of_a_head(memory_budget: int | None) -> None:
    bias = random_bias(700, torch.float32)
    student = random_head(700, 24, torch.float32, 0, (2, 3), softcap=5.0, logit_scale=1.4, bias=bias)
    teacher = random_head(710, 40, torch.float32, 1, (2, 4), logit_scale=-0.8)
    options = {"temperature": 1.5, "teacher_temperature": 0.8, "vocab_size": 690, "memory_budget": memory_budget}
    check_heads((student, teacher), **options)
    check_heads((teacher, student), **options)


def test_a_frozen_weight_and_frozen_states() -> None:
    sides = random_sides("head-head", 200, torch.float32)
    _, expected = head_answers(sides, fused)
    for name in expected:
        leaves = with_leaves(sides)
        for other, tensor in tensors_of(leaves).items():
            tensor.requires_grad_(other == name)
        distance = fused(*leaves, memory_budget=10_000)
        distance.backward(upstream_of(distance))
        for other, tensor in tensors_of(leaves).items():
            if other != name:
                assert tensor.grad is None
            else:
                torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_autocast_makes_the_logits_of_a_head() -> None:
    head, teacher = random_head(300, 24, torch.float32, 0), random_rows(5, 300, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd.pairwise_l1(head.source(), teacher)
    half = Head(head.hidden.bfloat16(), head.weight.bfloat16())
    assert torch.equal(found, kd.pairwise_l1(half.source(), teacher))
    assert found.dtype == torch.float32


# --- what the tests would see ------------------------------------------------------------------------------------------


@each_dtype
def test_broken_gradients_are_rejected(dtype: torch.dtype) -> None:
    student, teacher = random_rows(5, 127, dtype=dtype), random_rows(6, 127, dtype=dtype, seed=1)
    near = evaluated(plain_distances, student, teacher, compute_dtype(dtype))
    exact = evaluated(plain_distances, student, teacher, torch.float64)
    found = evaluated(kd.pairwise_l1, student, teacher)
    both = sizes(student, teacher, upstream_of(exact[0]), 1.0, 1.0)
    for ours, *expected in zip(found[1:], near[1:], exact[1:], both, strict=True):
        assert complaint(ours, *expected) is None
        for row in range(len(ours)):
            for name, broken in mutants(ours[row]).items():
                assert complaint(replaced(ours, row, broken), *expected), f"row {row}: {name} passes"
    size = torch.full_like(exact[0], 2)
    for factor in (0.0, -1.0, 0.98, 1.02):
        assert complaint(found[0] * factor, near[0], exact[0], size), f"distances times {factor} pass"


# --- derivatives of the reference --------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    rows = [leaf(random_rows(2, size, 5, dtype=torch.float64, seed=size)) for size in (3, 4)]

    def distances(student: Tensor, teacher: Tensor) -> Tensor:
        return kd.reference.pairwise_l1(student, teacher, temperature=1.3)

    assert torch.autograd.gradcheck(distances, rows)
    assert torch.autograd.gradgradcheck(distances, rows)


@pytest.mark.parametrize("pairing", ["logits-logits", "head-logits"])
def test_second_derivatives(pairing: str) -> None:
    """Through the reference, whatever backend made the distances."""
    found = []
    for backend in BACKENDS:
        sides = with_leaves(random_sides(pairing, 30, torch.float64))
        tensors = list(tensors_of(sides).values())
        distance = fused(*sides, backend=backend)
        first = torch.autograd.grad(distance.square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), tensors))  # type: ignore[arg-type]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
    assert float(found[0][0].norm()) > 0


def test_transformations_take_the_reference() -> None:
    student, teacher = random_rows(3, 4, 20, dtype=torch.float64), random_rows(3, 5, 20, dtype=torch.float64, seed=1)
    mapped = torch.func.vmap(kd.pairwise_l1)(student, teacher)
    torch.testing.assert_close(mapped, kd.pairwise_l1(student, teacher))
    _, tangent = torch.func.jvp(lambda rows: kd.pairwise_l1(rows, teacher), (student,), (teacher[:, :4],))
    assert bool(tangent.isfinite().all())
    with pytest.raises(NotImplementedError, match=r"backend=.cpu. does not work in torch\.func"):
        torch.func.vmap(lambda one, two: kd.pairwise_l1(one, two, backend="cpu"))(student, teacher)


# --- operators ---------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "logits": lambda: (random_rows(2, 5, 37), random_rows(2, 4, 37, seed=1)),
    "heads": lambda: random_sides("head-head", 37, torch.float32, bias=random_bias(37, torch.float32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_opcheck(name: str) -> None:
    sides = with_leaves(SOURCES[name]())
    calls = recorded(lambda: fused(*sides, temperature=1.3).sum().backward())
    assert [operator._opname for operator, _ in calls] == ["pairwise_l1", "pairwise_l1_backward"]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_compiled(name: str) -> None:
    sides = with_leaves(SOURCES[name]())
    tensors = list(tensors_of(sides).values())

    def loss(temperature: float) -> Tensor:
        return fused(*sides, temperature=temperature).square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.7, 1.9, 2.5):
        ours, eager = compiled(temperature), loss(temperature)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(torch.autograd.grad(ours, tensors), torch.autograd.grad(eager, tensors))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


# --- arguments ---------------------------------------------------------------------------------------------------------

ROWS = torch.zeros(2, 3, 7)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": None}, TypeError, "student must be a tensor of logits, kd.Logits or kd.LMHead, got NoneType"),
    ({"teacher": ROWS.long()}, TypeError, r"teacher: logits must have one of the dtypes.*torch.int64"),
    ({"student": torch.zeros(7)}, ValueError, r"student must have rows to pair, shape \[..., rows, V\]"),
    ({"teacher": torch.zeros(7)}, ValueError, r"teacher must have rows to pair, shape \[..., rows, V\]"),
    (
        {"student": kd.LMHead(torch.zeros(4), torch.zeros(7, 4))},
        ValueError,
        r"student must have rows to pair.*LMHead of \[..., rows, H\]",
    ),
    (
        {"teacher": torch.zeros(3, 3, 7)},
        ValueError,
        r"must have the same batch: the student's has the shape \(2,\), the teacher's \(3,\)",
    ),
    ({"teacher": torch.zeros(2, 3, 8)}, ValueError, "vocabularies of 7 and 8 entries.*use vocab_size=7"),
    ({"teacher": torch.zeros(2, 3, 7, device="meta")}, ValueError, "the student is on cpu and the teacher on meta"),
    (
        {"student": torch.zeros(2, 3, 0)},
        ValueError,
        r"student: the vocabulary is empty, shape \(6?2?, ?3?,? ?0\)|empty",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number, got 0.0"),
    ({"temperature": torch.ones(2, 3)}, TypeError, "temperature must be a positive finite number, got tensor"),
    ({"teacher_temperature": NAN}, ValueError, "teacher_temperature must be a positive finite number, got nan"),
    ({"vocab_size": 8}, ValueError, "vocab_size must be between 1 and the student's vocabulary of 7, got 8"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be None or a number of bytes, 0 or more, got -1"),
    ({"backend": "gpu"}, ValueError, "backend must be None or one of reference, cpu, triton, cuda, got 'gpu'"),
]


@pytest.mark.parametrize(
    ("changed", "error", "text"), REFUSED, ids=[f"{i}-{'-'.join(each[0])}" for i, each in enumerate(REFUSED)]
)
def test_refuses(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    """Before a kernel runs."""

    def kernel(*_: Any) -> None:
        raise AssertionError("a kernel was called")

    if native.module is not None:
        monkeypatch.setattr(native.module, "pairwise_l1", kernel)
        monkeypatch.setattr(native.module, "pairwise_normalisers", kernel)
    arguments = {"student": ROWS, "teacher": ROWS, **changed}
    with pytest.raises(error, match=text):
        kd.pairwise_l1(**arguments)
    if not {"memory_budget", "backend"} & changed.keys():
        with pytest.raises(error, match=text):
            kd.reference.pairwise_l1(**arguments)


# --- costs between hidden states ---------------------------------------------------------------------------------------

HIDDEN: dict[str, Callable[..., Tensor]] = {
    "pairwise_cosine": kd.pairwise_cosine,
    "pairwise_sqeuclidean": kd.pairwise_sqeuclidean,
}
each_cost = pytest.mark.parametrize("cost", HIDDEN)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 24), (2, 3, 4, 576), (0, 3, 8), (3, 0, 8)], ids=str)
@each_dtype
@each_cost
def test_costs_of_hidden_states(cost: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    *batch, n, m, size = shape
    states = [torch.randn(*batch, rows, size, generator=generator(rows)).to(dtype) for rows in (n, m)]
    found = evaluated(HIDDEN[cost], *states)
    exact = evaluated(getattr(kd.reference, cost), *states, dtype=torch.float64)
    assert found[0].dtype == compute_dtype(dtype)
    assert bool((found[0] >= 0).all())
    # A matrix product sums in any order; of half types the gradient is rounded besides.
    slack = HEAD_SLACK[dtype]
    for ours, truth in zip(found, exact, strict=True):
        if size > 1 or cost == "pairwise_sqeuclidean":
            assert float((ours - truth).norm()) <= slack * float(truth.norm())
        else:  # a cosine of numbers is 1 or -1
            torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-6)


@each_cost
def test_costs_are_differentiable_twice(cost: str) -> None:
    states = [leaf(torch.randn(rows, 4, generator=generator(rows), dtype=torch.float64)) for rows in (3, 2)]
    assert torch.autograd.gradcheck(HIDDEN[cost], states)
    assert torch.autograd.gradgradcheck(HIDDEN[cost], states)


@each_cost
def test_identical_states(cost: str) -> None:
    """Nothing apart but for rounding, also where all states have a large part in common."""
    states = torch.randn(6, 64, generator=generator())
    distance = HIDDEN[cost](states, states)
    assert 0 <= float(distance.diagonal().max()) < 1e-4
    common = HIDDEN["pairwise_sqeuclidean"](states + 1000, states + 1000)
    exact = kd.reference.pairwise_sqeuclidean(states + 1000, states + 1000)
    torch.testing.assert_close(common, exact, rtol=1e-4, atol=1e-3)


def test_zero_states() -> None:
    """1 apart from every other by the cosine, and nothing is infinite."""
    states = torch.randn(3, 8, generator=generator())
    states[1] = 0
    distance, *gradients = evaluated(kd.pairwise_cosine, states, torch.randn(4, 8, generator=generator(1)))
    assert bool((distance[1] == 1).all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_autocast_leaves_costs_alone() -> None:
    states = torch.randn(3, 8, generator=generator()), torch.randn(4, 8, generator=generator(1))
    for cost in HIDDEN.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cost(*states)
        assert torch.equal(found, cost(*states))


STATES = torch.zeros(2, 3, 4)
HIDDEN_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": None}, TypeError, "student must be a torch.Tensor, got NoneType"),
    ({"teacher": STATES.long()}, TypeError, r"teacher must have one of the dtypes.*torch.int64"),
    ({"student": STATES[0, 0]}, ValueError, r"student must have the shape \[..., rows, d\], got \(4,\)"),
    ({"teacher": STATES[:1]}, ValueError, r"the student's has the shape \(2,\), the teacher's \(1,\)"),
    ({"teacher": STATES[..., :3]}, ValueError, "hidden states of 4 and 3 entries; project one of them"),
    ({"teacher": STATES.to("meta")}, ValueError, "the student is on cpu and the teacher on meta"),
]


@pytest.mark.parametrize(("changed", "error", "text"), HIDDEN_REFUSED, ids=str)
@each_cost
def test_costs_refuse(cost: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"student": STATES, "teacher": STATES, **changed}
    for function in (HIDDEN[cost], getattr(kd.reference, cost)):
        with pytest.raises(error, match=text):
            function(**arguments)


@pytest.mark.parametrize("eps", [0.0, NAN])
def test_cosine_refuses_an_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a"):
        kd.pairwise_cosine(STATES, STATES, eps)

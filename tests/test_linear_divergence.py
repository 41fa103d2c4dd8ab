"""Language-model heads on either side: everything ``distillation_loss`` accepts, by the accuracy rule (see ``accuracy``).

The yardstick makes the logits whole with ``torch.nn.functional.linear`` in the dtype of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor
from truth import DTYPES, EVERY_DIVERGENCE, Case, Head, compute_dtype, each_divergence, each_dtype, leaf, loss

import kdkernels as kd

ROWS = 7
FORWARD_KL, JSD, SKEW_REVERSE_KL = EVERY_DIVERGENCE[0], EVERY_DIVERGENCE[3], EVERY_DIVERGENCE[5]

Side = Tensor | Head
Pair = tuple[Side, Side]

SLACK = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Two ways to sum a matrix product differ by more than two ways to sum a row; with half types by a rounding of theirs."""


def random_head(
    vocab: int, hidden: int, dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (ROWS,), **options: Any
) -> Head:
    """A head whose logits have a standard deviation of about 3, without any bias."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*shape, hidden, generator=generator, dtype=torch.float64)
    weight = 3 / hidden**0.5 * torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    return Head(states.to(dtype), weight.to(dtype), **options)


def random_bias(vocab: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def random_sides(pairing: str, vocab: int, dtype: torch.dtype, **options: Any) -> Pair:
    """``pairing`` names the kind of student and teacher; both heads differ in their hidden size."""
    sides: list[Side] = []
    for place, kind in enumerate(pairing.split("-")):
        head = random_head(vocab, (24, 40)[place], dtype, seed=place, **options)
        sides.append(head if kind == "head" else head.logits().to(dtype))
    return sides[0], sides[1]


PAIRINGS = ("head-head", "head-logits", "logits-head")
each_pairing = pytest.mark.parametrize("pairing", PAIRINGS)


each_dtype_but_half = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, id=name, marks=pytest.mark.slow if dtype.itemsize == 2 else ())
        for name, dtype in DTYPES.items()
    ],
)
"""The half types too, but not in a hurry: their matrix products are slow on most CPUs."""


def tensors_of(sides: Pair) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, side in zip(("student", "teacher"), sides, strict=True):
        if isinstance(side, Head):
            named |= {f"{name}'s {part}": tensor for part, tensor in side.tensors().items()}
        else:
            named[f"{name}'s logits"] = side
    return named


def with_leaves(sides: Pair, dtype: torch.dtype | None = None) -> Pair:
    student, teacher = (side.with_leaves(dtype) if isinstance(side, Head) else leaf(side, dtype) for side in sides)
    return student, teacher


def upstream_for(value: Tensor) -> Tensor:
    """An upstream gradient per token that no two share."""
    if not value.dim():
        return torch.ones_like(value)
    return torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)


Answers = tuple[Tensor, dict[str, Tensor | None]]


def ours(case: Case, sides: Pair, **options: Any) -> Answers:
    """The loss and the gradients to every tensor, by the library."""
    sides = with_leaves(sides)
    sources = [side.source() if isinstance(side, Head) else side for side in sides]
    value = kd.distillation_loss(*sources, case.divergence, **options)
    value.backward(upstream_for(value))
    return value.detach(), {name: tensor.grad for name, tensor in tensors_of(sides).items()}


def plain(case: Case, sides: Pair, dtype: torch.dtype | None = None, **options: Any) -> Answers:
    """The same in plain PyTorch, the heads in ``dtype`` or in their own."""
    sides = with_leaves(sides, dtype)
    options.pop("memory_budget", None)
    logits = [side.logits() if isinstance(side, Head) else side.to(compute_dtype(side.dtype)) for side in sides]
    value = loss(case, *logits, **options)
    value.backward(upstream_for(value))
    return value.detach(), {name: tensor.grad for name, tensor in tensors_of(sides).items()}


def check_case(case: Case, sides: Pair, **options: Any) -> None:
    value, gradients = ours(case, sides, **options)
    near, near_gradients = plain(case, sides, **options)
    exact, exact_gradients = plain(case, sides, torch.float64, **options)
    dtype = next(iter(tensors_of(sides).values())).dtype
    assert value.dtype == near.dtype
    check("value", value.reshape(1, -1), near.reshape(1, -1), exact.reshape(1, -1), slack=SLACK[dtype])
    for name, gradient in gradients.items():
        expected = [found[name] for found in (near_gradients, exact_gradients)]
        assert expected[0] is not None
        assert expected[1] is not None
        assert gradient is not None
        assert gradient.dtype == dtype
        # A row of a weight's gradient may be next to nothing: the tensor is one vector here.
        flat = [each.reshape(1, -1) for each in (gradient, expected[0], expected[1])]
        check(f"gradient to the {name}", *flat, slack=SLACK[dtype])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_pairing
@each_divergence
def test_every_divergence_and_pairing(case: Case, pairing: str, reduction: str) -> None:
    check_case(case, random_sides(pairing, 127, torch.float32), reduction=reduction, temperature=1.5)


@each_dtype
@each_pairing
@pytest.mark.parametrize("vocab", [1, 2, 127, pytest.param(4097, marks=pytest.mark.slow)], ids="V{}".format)
def test_every_dtype_and_size(vocab: int, pairing: str, dtype: torch.dtype) -> None:
    for reduction in ("mean", "none"):
        sides = random_sides(pairing, vocab, dtype)
        if vocab > 1:
            check_case(JSD, sides, reduction=reduction, memory_budget=3 * vocab * 8)
            continue
        value, gradients = ours(JSD, sides, reduction=reduction)
        assert bool((value.abs() < 1e-6).all())
        assert all(each is not None and bool((each.abs() < 1e-6).all()) for each in gradients.values())


def every_option(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of the loss that heads must honour as logits do."""
    mask = torch.tensor([True, True, False, True, True, False, True])
    labels = torch.tensor([3, 0, 5, -100, 126, 7, 60])
    weight = torch.linspace(0.2, 2.0, ROWS)
    temperatures = torch.linspace(0.5, 3.0, ROWS)
    everything = {
        "mask": mask,
        "labels": labels,
        "weight": weight,
        "ce_weight": 0.7,
        "temperature": temperatures,
        "teacher_temperature": temperatures.flip(0),
        "temperature_squared": True,
    }
    return {
        "vocab_size": {"vocab_size": 100},
        "temperature": {"temperature": 2.0, "teacher_temperature": 0.7, "temperature_squared": True},
        "temperature_per_token": {"temperature": temperatures, "teacher_temperature": temperatures.flip(0)},
        "temperature_squared_per_token": {"temperature": temperatures, "temperature_squared": True},
        "weight": {"weight": weight},
        "mask": {"mask": mask},
        "ignore_index": {"labels": labels},
        "other_ignore_index": {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5},
        "ce_weight": {"labels": labels, "ce_weight": 0.7},
        "ce_weight_and_temperature": {"labels": labels, "ce_weight": 0.7, "temperature": 2.0},
        "sum": {"reduction": "sum"},
        "none_with_weight_and_mask": {"reduction": "none", "weight": weight, "mask": mask},
        "normalizer": {"normalizer": 12.5, "mask": mask},
        "everything": everything,
        "everything_unreduced": {**everything, "reduction": "none"},
    }


@each_dtype_but_half
@each_pairing
@pytest.mark.parametrize("option", every_option(torch.float32))
def test_options(option: str, pairing: str, dtype: torch.dtype) -> None:
    sides = random_sides(pairing, 127, dtype)
    check_case(SKEW_REVERSE_KL, sides, memory_budget=3 * 127 * 4, **every_option(dtype)[option])


HEADS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.4},
    "everything": {"bias": True, "softcap": 4.0, "logit_scale": 1.7},
}


@each_dtype_but_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_pairing
@pytest.mark.parametrize("head", HEADS)
def test_head_options(head: str, pairing: str, reduction: str, dtype: torch.dtype) -> None:
    options = dict(HEADS[head])
    if options.pop("bias", False):
        options["bias"] = random_bias(127, dtype)
    sides = random_sides(pairing, 127, dtype, **options)
    labels = torch.arange(ROWS)
    for case in (FORWARD_KL, JSD):
        check_case(case, sides, reduction=reduction, temperature=1.3, labels=labels, ce_weight=0.3, memory_budget=2048)


def test_batches_of_several_dimensions() -> None:
    sides = random_sides("head-head", 50, torch.float64, shape=(2, 3, 2))
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[1, 0] = False
    check_case(JSD, sides, mask=mask, reduction="none")
    check_case(JSD, sides, mask=mask, weight=torch.linspace(0.5, 1.5, 12).reshape(2, 3, 2))


def test_vocabularies_padded_to_different_sizes() -> None:
    student = random_head(130, 24, torch.float64, seed=0)
    teacher = random_head(127, 40, torch.float64, seed=1)
    check_case(JSD, (student, teacher), vocab_size=125)
    check_case(JSD, (student, teacher.logits()), vocab_size=125, reduction="none")
    _, gradients = ours(JSD, (student, teacher), vocab_size=125)
    weight = gradients["student's weight"]
    assert weight is not None
    assert bool((weight[125:] == 0).all())


def test_strided_hidden_states_and_weights() -> None:
    """As a model makes them: a slice of a sequence, a transposed weight."""
    wide = random_head(60, 24, torch.float64, seed=0, shape=(2, 5))
    shifted = wide._replace(hidden=wide.hidden[:, :-1], weight=wide.weight.t().contiguous().t())
    copied = wide._replace(hidden=wide.hidden[:, :-1].clone())
    teacher = random_head(60, 16, torch.float64, seed=1, shape=(2, 4))

    def run(student: Head) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = student.hidden.requires_grad_(), student.weight.requires_grad_()
        value = kd.distillation_loss(student.source(), teacher.source(), kd.JSD())
        return value, *torch.autograd.grad(value, [hidden, weight])

    for found, expected in zip(run(shifted), run(copied), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


NEEDS = {
    "nothing": (),
    "student hidden": ("student's hidden",),
    "student weight": ("student's weight",),
    "student bias": ("student's bias",),
    "student": ("student's hidden", "student's weight", "student's bias"),
    "teacher hidden": ("teacher's hidden",),
    "teacher weight": ("teacher's weight",),
    "teacher bias": ("teacher's bias",),
    "student weight, teacher hidden": ("student's weight", "teacher's hidden"),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", NEEDS.values(), ids=NEEDS)
def test_only_what_requires_grad_gets_a_gradient(needed: tuple[str, ...], reduction: str) -> None:
    sides = random_sides("head-head", 60, torch.float64, bias=random_bias(60, torch.float64))
    _, expected = plain(JSD, sides, reduction=reduction)
    sides = with_leaves(sides)
    tensors = tensors_of(sides)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    assert isinstance(sides[0], Head)
    assert isinstance(sides[1], Head)
    value = kd.distillation_loss(
        sides[0].source(), sides[1].source(), kd.JSD(), reduction=reduction, memory_budget=1500
    )
    assert value.requires_grad == bool(needed)
    if needed:
        value.backward(upstream_for(value))
    for name, tensor in tensors.items():
        if name in needed:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-10, atol=1e-13, msg=name)
        else:
            assert tensor.grad is None


def test_frozen_teacher_head_with_student_logits() -> None:
    """The everyday mixed case: nothing is made for the side that does not learn."""
    logits = random_head(60, 24, torch.float64, seed=0).logits()
    teacher = random_head(60, 40, torch.float64, seed=1)
    student = leaf(logits)
    kd.distillation_loss(student, teacher.source(), kd.JSD()).backward()
    other = leaf(logits)
    loss(JSD, other, teacher.logits()).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("donate", [False, True], ids=["head", "donated logits"])
@each_divergence
def test_frozen_teacher_with_hard_labels_at_another_temperature(case: Case, donate: bool) -> None:
    """The gradient takes the place of logits that the hard-label term still reads."""
    head = random_head(60, 24, torch.float32, seed=0)
    teacher = random_head(60, 40, torch.float32, seed=1).logits()
    options: dict[str, Any] = {"labels": torch.arange(ROWS), "ce_weight": 0.7, "temperature": 2.0}
    found, expected = [head.with_leaves() for _ in range(2)]
    logits = found.logits()
    source = kd.Logits(logits * 1, donate=True) if donate else found.source()
    kd.distillation_loss(source, teacher, case.divergence, **options).backward()
    loss(case, expected.logits(), teacher, **options).backward()
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name].grad, tensor.grad, rtol=1e-4, atol=1e-6, msg=name)


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_pairing
def test_chunks_make_no_difference(pairing: str, reduction: str, dtype: torch.dtype) -> None:
    """From a row per chunk to all at once; also where the last chunk is shorter."""
    vocab = 300
    sides = random_sides(pairing, vocab, dtype)
    labels = torch.tensor([3, 0, 5, -100, 126, 7, 60])
    options: dict[str, Any] = {"reduction": reduction, "labels": labels, "ce_weight": 0.3, "temperature": 2.0}
    row = vocab * sides[0][0].element_size() * (2 if pairing == "head-head" else 1)  # type: ignore[union-attr]
    whole_value, whole = ours(SKEW_REVERSE_KL, sides, memory_budget=1 << 30, **options)
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for budget in (1, 2 * row, 3 * row, 5 * row, None):
        value, gradients = ours(SKEW_REVERSE_KL, sides, memory_budget=budget, **options)
        torch.testing.assert_close(value, whole_value, rtol=tolerance, atol=tolerance)
        for name, gradient in gradients.items():
            expected = whole[name]
            assert gradient is not None
            assert expected is not None
            error = (gradient.double() - expected.double()).norm() / expected.double().norm()
            assert error <= tolerance, f"budget {budget}: {name} differs by {error:.2e}"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[list[int]]:
    """Numbers of threads to try; the default comes back afterwards."""
    before = torch.get_num_threads()
    yield [1, 2, 3]
    torch.set_num_threads(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pairing", [*PAIRINGS, "logits-logits"])
def test_repeats_bit_by_bit(pairing: str, dtype: torch.dtype) -> None:
    sides = random_sides(pairing, 4097, dtype)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "memory_budget": 5 * 4097 * 4}
        first_value, first = ours(JSD, sides, **options)
        for _ in range(3):
            value, gradients = ours(JSD, sides, **options)
            assert torch.equal(value, first_value)
            for name, gradient in gradients.items():
                expected = first[name]
                assert gradient is not None
                assert expected is not None
                assert torch.equal(gradient, expected), name


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@each_divergence
def test_dense_rows_do_not_depend_on_the_number_of_threads(case: Case, reduction: str, threads: list[int]) -> None:
    sides = random_sides("logits-logits", 2100, torch.float32, shape=(33,))
    answers = []
    for count in threads:
        torch.set_num_threads(count)
        answers.append(ours(case, sides, reduction=reduction))
    for value, gradients in answers[1:]:
        torch.testing.assert_close(value, answers[0][0], rtol=1e-6 if reduction == "sum" else 0, atol=0)
        for name, gradient in gradients.items():
            expected = answers[0][1][name]
            assert gradient is not None
            assert expected is not None
            assert torch.equal(gradient, expected), name


@each_pairing
def test_heads_depend_on_the_number_of_threads_by_rounding_only(pairing: str, threads: list[int]) -> None:
    """How a matrix product is shared out is the business of the BLAS library."""
    sides = random_sides(pairing, 500, torch.float64, shape=(33,))
    answers = []
    for count in threads:
        torch.set_num_threads(count)
        answers.append(ours(JSD, sides, memory_budget=500 * 8 * 10))
    for value, gradients in answers[1:]:
        torch.testing.assert_close(value, answers[0][0], rtol=1e-13, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, answers[0][1][name], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_where_no_token_counts_does_not_reach_second_derivatives(reduction: str) -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64)
    hidden[1] = torch.nan
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    head = kd.LMHead(hidden, weight)
    value = kd.distillation_loss(head, torch.randn(4, 7, dtype=torch.float64), mask=mask, reduction=reduction).sum()
    (first,) = torch.autograd.grad(value, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert second.any()

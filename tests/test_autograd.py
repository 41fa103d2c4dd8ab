"""Gradients in every situation that autograd knows, held against the same situation of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pairs
import pytest
import torch
from pairs import PAIRINGS, Tensors, each_pairing, value_and_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.arguments.rows import head_side

HALF = torch.float16
DOUBLE = torch.float64
JSD = kd.JSD(0.3)

each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


def loss(tensors: Tensors, divergence: kd.Divergence = JSD, **options: Any) -> Tensor:
    return kd.distillation_loss(*pairs.sources(tensors), divergence, **options)


def reference(tensors: Tensors, divergence: kd.Divergence = JSD, **options: Any) -> Tensor:
    return kd.reference.distillation_loss(*pairs.sources(tensors), divergence, **options)


def check_against_reference(make_loss: Callable[[Callable[..., Tensor]], Tensor], leaves: list[Tensor]) -> None:
    """``make_loss(loss_function)`` and its gradients to the leaves, with our loss and with the reference."""
    results = []
    for function in (kd.distillation_loss, kd.reference.distillation_loss):
        value = make_loss(function)
        results.append((value.detach(), torch.autograd.grad(value.sum(), leaves)))
    torch.testing.assert_close(*results)


# --- no gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("option", ["plain", "none", "labels"])
@each_pairing
def test_no_gradient_where_none_is_wanted(pairing: str, option: str, mode: Callable[[], Any]) -> None:
    tensors = pairs.make(pairing)
    expected = loss(tensors, **pairs.OPTIONS[option]()).detach()
    with mode():
        value = loss(tensors, **pairs.OPTIONS[option]())
        statistics = kd.token_statistics(*pairs.sources(tensors))
    assert not value.requires_grad
    assert value.grad_fn is None
    assert all(not column.requires_grad for column in statistics if column is not None)
    assert all(tensor.grad is None for tensor in tensors.values())
    torch.testing.assert_close(value, expected)


@each_reduction
@each_pairing
def test_teacher_made_in_inference_mode(pairing: str, reduction: str) -> None:
    """Torch refuses to save such tensors for a backward that does not need to change them."""
    tensors = pairs.make(pairing, dtype=DOUBLE)
    student = {name: tensor for name, tensor in tensors.items() if name.startswith("student")}
    with torch.inference_mode():
        teacher = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("teacher")}
    options = {"reduction": reduction, "labels": pairs.some_labels(), "ce_weight": 0.5}
    check_against_reference(
        lambda function: function(*pairs.sources(student | teacher), JSD, **options), list(student.values())
    )
    fused = loss(student | teacher, **options)
    first = torch.autograd.grad(fused.sum(), list(student.values()), create_graph=True)
    assert all(gradient.requires_grad for gradient in first)


@pytest.mark.parametrize("leaf", sorted({(pairing, name) for pairing, names in PAIRINGS.items() for name in names}))
@each_reduction
def test_gradient_to_one_input_alone(leaf: tuple[str, str], reduction: str) -> None:
    pairing, wanted = leaf
    tensors = pairs.make(pairing)
    _, expected = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    _, gradients = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors)
    torch.testing.assert_close(gradients, {wanted: expected[wanted]})


# --- the backward, once and again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "fp16"])
@each_reduction
@each_pairing
def test_second_backward_gives_the_same_gradient(pairing: str, reduction: str, dtype: torch.dtype) -> None:
    tensors = pairs.make(pairing, dtype=dtype)
    total = 1.7 * loss(tensors, reduction=reduction).sum()
    total.backward(retain_graph=True)
    first = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad.mul_(-5)  # what an optimizer does with its gradients must not reach those of the graph
        tensor.grad = None
    total.backward(retain_graph=True)
    second = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    total.backward()
    accumulated = {name: tensor.grad for name, tensor in tensors.items()}
    for name, gradient in first.items():
        assert bool(gradient.any()), name
        assert torch.equal(gradient, second[name]), name
        assert torch.equal(2 * gradient, accumulated[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, 1e6])
@each_reduction
@each_pairing
def test_upstream_factor(pairing: str, reduction: str, factor: float) -> None:
    tensors = pairs.make(pairing, dtype=DOUBLE)
    ours = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors, factor=factor)
    truth = value_and_gradients(lambda given: reference(given, reduction=reduction), tensors, factor=factor)
    torch.testing.assert_close(ours, truth)


@each_pairing
def test_upstream_gradient_that_is_not_contiguous(pairing: str) -> None:
    tensors = pairs.make(pairing, dtype=DOUBLE)
    upstream = pairs.per_token(-1, 1, pairs.BATCH[::-1]).double().t()
    check_against_reference(
        lambda function: function(*pairs.sources(tensors), JSD, reduction="none") * upstream, list(tensors.values())
    )


@each_reduction
@each_pairing
def test_two_losses_share_their_inputs(pairing: str, reduction: str) -> None:
    tensors = pairs.make(pairing, dtype=DOUBLE)

    def both(function: Callable[..., Tensor]) -> Tensor:
        student, teacher = pairs.sources(tensors)
        first = function(student, teacher, JSD, reduction=reduction)
        return first + 0.3 * function(student, teacher, kd.ReverseKL(), temperature=2.0, reduction=reduction)

    check_against_reference(both, list(tensors.values()))


def self_distillation(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    return function(x, x, JSD, teacher_temperature=0.5, **options)


def student_from_teacher(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    return function(torch.sin(x) * x, x, JSD, **options)


def teacher_from_student(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    return function(x, torch.sin(x) * x, JSD, **options)


def tied_heads(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    hidden = pairs.per_token(-1, 1, (2, 5, pairs.VOCAB)).double()
    weight = x.reshape(-1, pairs.VOCAB)
    return function(kd.LMHead(hidden, weight), kd.LMHead(hidden.flip(0), weight), JSD, **options)


def weight_from_student(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    return function(x, x.detach().flip(0), JSD, weight=x.square().sum(-1), **options)


DEPENDENT = [self_distillation, student_from_teacher, teacher_from_student, tied_heads, weight_from_student]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make_loss", DEPENDENT)
@each_reduction
def test_inputs_that_depend_on_each_other(make_loss: Callable[..., Tensor], reduction: str, order: int) -> None:
    results = []
    for function in (kd.distillation_loss, kd.reference.distillation_loss):
        x = pairs.make("logits-logits", dtype=DOUBLE)["student.logits"]
        value = make_loss(function, x, reduction=reduction).square().sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * torch.cos(x.detach())).sum()
        results.append(gradient.detach())
    torch.testing.assert_close(*results)


@each_pairing
def test_accumulation_over_micro_batches(pairing: str) -> None:
    """With the normalizer of all the batches together their gradients add up to that of one big batch."""
    tensors = pairs.make(pairing, dtype=DOUBLE)
    labels, mask = pairs.some_labels(), pairs.per_token(0, 1) < 0.8
    total, expected = value_and_gradients(lambda given: loss(given, labels=labels, ce_weight=0.4, mask=mask), tensors)
    count = int((mask & (labels != -100)).sum())
    value = torch.zeros((), dtype=DOUBLE)
    for row in range(pairs.BATCH[0]):
        part = {name: tensor if is_parameter(name) else tensor[row] for name, tensor in tensors.items()}
        one = loss(part, labels=labels[row], ce_weight=0.4, mask=mask[row], normalizer=count)
        one.backward()
        value += one.detach()
    torch.testing.assert_close(value, total)
    torch.testing.assert_close({name: tensor.grad for name, tensor in tensors.items()}, expected)


def is_parameter(name: str) -> bool:
    return name.endswith(("weight", "bias"))


@pytest.mark.parametrize("option", ["plain", "sum", "none", "labels", "labels-none", "temperatures", "mask"])
@each_pairing
def test_gradient_to_the_weight_of_the_tokens(pairing: str, option: str) -> None:
    tensors = pairs.make(pairing, dtype=DOUBLE)
    weight = pairs.per_token(0.1, 2.0).double().requires_grad_()
    check_against_reference(
        lambda function: function(*pairs.sources(tensors), JSD, weight=weight, **pairs.OPTIONS[option]()),
        [weight, *tensors.values()],
    )


# --- second derivatives ----------------------------------------------------------------------------------------------------


def second_derivatives(function: Callable[..., Tensor], tensors: Tensors, **options: Any) -> tuple[Tensor, ...]:
    """The derivatives of a function of value and gradients, whose terms do not cancel."""
    value = function(tensors, **options)
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    first = torch.autograd.grad((weights * value.square()).sum(), list(tensors.values()), create_graph=True)
    probe = sum((torch.cos(gradient) * gradient).sum() for gradient in first)
    return torch.autograd.grad(probe, list(tensors.values()))


@pytest.mark.parametrize("option", ["plain", "none", "labels", "labels-none", "everything"])
@each_pairing
def test_second_derivatives(pairing: str, option: str) -> None:
    tensors = pairs.make(pairing, dtype=DOUBLE)
    ours, truth = (second_derivatives(function, tensors, **pairs.OPTIONS[option]()) for function in (loss, reference))
    assert all(bool(gradient.any()) for gradient in truth)
    torch.testing.assert_close(ours, truth)


@pytest.mark.slow
@pytest.mark.parametrize(
    "divergence",
    [kd.ForwardKL(), kd.ReverseKL(), kd.SkewForwardKL(), kd.AlphaDivergence(0.3), kd.Renyi(0.6), kd.Hellinger()],
    ids=lambda divergence: type(divergence).__name__,
)
@each_reduction
def test_gradgradcheck(divergence: kd.Divergence, reduction: str) -> None:
    """Against finite differences of our own first derivatives."""
    inputs = [
        logits[0, :2, :4].detach().requires_grad_() for logits in pairs.make("logits-logits", dtype=DOUBLE).values()
    ]
    assert torch.autograd.gradgradcheck(
        lambda student, teacher: kd.distillation_loss(student, teacher, divergence, reduction=reduction), inputs
    )


# --- inputs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("option", ["plain", "none", "everything", "memory_budget"])
@each_pairing
def test_inputs_are_never_modified(pairing: str, option: str, dtype: torch.dtype) -> None:
    tensors, options = pairs.make(pairing, dtype=dtype), pairs.OPTIONS[option]()
    inputs = [*tensors.values(), *(value for value in options.values() if isinstance(value, Tensor))]
    before = [tensor.detach().clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    total = loss(tensors, **options).sum()
    total.backward(retain_graph=True)
    total.backward()
    kd.token_statistics(*pairs.sources(tensors))
    for tensor, copy, version in zip(inputs, before, versions, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


# --- donated logits ------------------------------------------------------------------------------------------------------------


def donated_loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return kd.distillation_loss(kd.Logits(student, donate=True), teacher, JSD, **options)


def student_and_teacher(**options: Any) -> tuple[Tensor, Tensor]:
    tensors = pairs.make("logits-logits", **options)
    return tensors["student.logits"], tensors["teacher.logits"]


DONATION_OPTIONS = ["plain", "sum", "none", "labels", "weight", "mask", "vocab_size", "everything"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF, DOUBLE], ids=["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("option", DONATION_OPTIONS)
def test_gradient_of_donated_logits(option: str, dtype: torch.dtype) -> None:
    student, teacher = student_and_teacher(dtype=dtype)
    options = pairs.OPTIONS[option]()
    kept = kd.distillation_loss(student, teacher, JSD, **options)
    expected = torch.autograd.grad(-1.5 * kept.sum(), (student, teacher))
    value = donated_loss(student * 1, teacher, **options)
    torch.testing.assert_close(value, kept)
    torch.testing.assert_close(torch.autograd.grad(-1.5 * value.sum(), (student, teacher)), expected)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_donated_memory_holds_the_gradient_of_a_leaf(factor: float) -> None:
    student, teacher = student_and_teacher()
    expected = torch.autograd.grad(factor * kd.distillation_loss(student, teacher, JSD), student)[0]
    (factor * donated_loss(student, teacher)).backward()
    assert student.grad.data_ptr() == student.data_ptr()
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_donated_memory_holds_the_gradient_of_computed_logits(factor: float) -> None:
    student, teacher = student_and_teacher()
    logits = student * 1
    arrived: list[int] = []
    logits.register_hook(lambda gradient: arrived.append(gradient.data_ptr()))
    (factor * donated_loss(logits, teacher)).backward()
    assert arrived == [logits.data_ptr()]


def test_donated_logits_and_a_second_backward() -> None:
    student, teacher = student_and_teacher()
    value = donated_loss(student * 1, teacher)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("option", ["plain", "labels"])
def test_donated_logits_have_no_second_derivatives(option: str) -> None:
    student, teacher = student_and_teacher()
    value = donated_loss(student * 1, teacher, **pairs.OPTIONS[option]())
    with pytest.raises(RuntimeError, match="donate=False"):
        torch.autograd.grad(value, student, create_graph=True)


def test_use_of_donated_logits_is_found_out() -> None:
    student, teacher = student_and_teacher()
    logits = student.exp()  # whose derivative is its result, which is gone
    value = donated_loss(logits, teacher)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    logits = student * 1
    other = logits.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (donated_loss(logits, teacher) + other).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_donation_is_not_used_without_gradient(mode: Callable[[], Any]) -> None:
    student, teacher = student_and_teacher()
    before = student.detach().clone()
    with mode():
        donated_loss(student, teacher)
    assert torch.equal(student, before)


def test_donation_is_not_used_where_rows_share_memory() -> None:
    row, teacher = student_and_teacher(batch=(1,))
    teacher = teacher.detach() * torch.tensor([[1.0], [2.0], [-1.0]])
    expected = torch.autograd.grad(kd.distillation_loss(row.expand(3, -1), teacher, JSD), row)
    value = donated_loss(row.expand(3, -1), teacher)
    torch.testing.assert_close(torch.autograd.grad(value, row), expected)


def test_donation_is_a_permission_to_write_over_the_student_alone() -> None:
    student, teacher = student_and_teacher()
    before = teacher.detach().clone()
    expected = torch.autograd.grad(kd.distillation_loss(student, teacher, JSD), (student, teacher))
    value = kd.distillation_loss(student, kd.Logits(teacher, donate=True), JSD)
    torch.testing.assert_close(torch.autograd.grad(value, (student, teacher)), expected)
    assert torch.equal(teacher, before)


# --- mixed precision ---------------------------------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("pairing", ["head-logits", "logits-head", "head-head"])
def test_autocast(pairing: str, reduction: str) -> None:
    tensors = pairs.make(pairing)
    exact, exact_gradients = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors)
        truth, reference_gradients = value_and_gradients(lambda given: reference(given, reduction=reduction), tensors)
    assert value.dtype == torch.float32
    assert not torch.equal(value, exact), "autocast had no effect"
    torch.testing.assert_close(value, truth, rtol=1e-2, atol=1e-3)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        rounding = (reference_gradients[name] - exact_gradients[name]).norm()
        assert (gradient - exact_gradients[name]).norm() <= 1.5 * rounding + 1e-6, name


def test_autocast_of_a_gpu_is_for_its_heads_alone() -> None:
    """Without a GPU, on tensors that have none of the data but the device and the dtypes."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            for device, expected in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
                head = kd.LMHead(torch.empty(3, 8, device=device), torch.empty(16, 8, device=device))
                side, *_ = head_side(head, None, "student")
                assert side.tensor.dtype == side.weight.dtype == expected
                value = kd.distillation_loss(head, head, backend="reference")
                assert (value.device.type, value.dtype) == (device, torch.float32)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def heads(tensors: Tensors, compute_dtype: torch.dtype | None) -> Tensor:
    """The loss of two heads, the student's told what to compute in."""
    student, teacher = (
        kd.LMHead(*(tensors.get(f"{side}.{name}") for name in ("hidden", "weight", "bias")), compute_dtype=dtype)
        for side, dtype in (("student", compute_dtype), ("teacher", None))
    )
    return kd.distillation_loss(student, teacher)


def test_compute_dtype_of_a_head() -> None:
    tensors = pairs.make("head-head")
    exact, exact_gradients = value_and_gradients(lambda given: heads(given, None), tensors)
    value, gradients = value_and_gradients(lambda given: heads(given, torch.bfloat16), tensors)
    rounded = {
        name: tensor.detach().bfloat16().requires_grad_() if name.startswith("student") else tensor
        for name, tensor in tensors.items()
    }
    expected, expected_gradients = value_and_gradients(lambda given: heads(given, None), rounded)
    assert value.dtype == torch.float32
    assert not torch.equal(value, exact)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradients[name].float(), rtol=0, atol=0)
        assert (gradient - exact_gradients[name]).norm() <= 3e-2 * exact_gradients[name].norm() + 1e-6, name


def test_compute_dtype_goes_before_autocast_and_permits_mixed_dtypes() -> None:
    tensors = pairs.make("head-head")
    expected = heads(tensors, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        tensors["student.weight"] = tensors["student.weight"].detach().bfloat16()
        tensors["teacher.hidden"] = tensors["teacher.hidden"].detach()
        student = kd.LMHead(
            *(tensors.get(f"student.{name}") for name in ("hidden", "weight", "bias")), compute_dtype=torch.bfloat16
        )
        teacher = kd.LMHead(
            *(tensors.get(f"teacher.{name}") for name in ("hidden", "weight", "bias")), compute_dtype=torch.float32
        )
        found = kd.distillation_loss(student, teacher)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, "bfloat16"])
def test_compute_dtype_is_checked(dtype: object) -> None:
    with pytest.raises(ValueError, match="compute_dtype must be None or one of"):
        kd.LMHead(torch.zeros(2, 3), torch.zeros(4, 3), compute_dtype=dtype)


def test_autocast_leaves_logits_alone() -> None:
    tensors = pairs.make("logits-logits")
    expected = value_and_gradients(loss, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value_and_gradients(loss, tensors)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_autocast_permits_heads_of_mixed_dtypes() -> None:
    tensors = pairs.make("head-head")
    tensors["student.hidden"] = tensors["student.hidden"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradients(loss, tensors)
    assert bool(value.isfinite())
    assert {name: gradient.dtype for name, gradient in gradients.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("option", ["plain", "labels"])
@each_pairing
def test_scaled_half_precision_does_not_underflow(pairing: str, option: str) -> None:
    """The factor of a GradScaler counts only where it acts before rounding: the gradient of a token is far below 6e-8."""
    factor, normalizer = 2.0**16, 2.0**20
    tensors = pairs.make(pairing, dtype=HALF)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    options = pairs.OPTIONS[option]() | {"normalizer": normalizer}
    _, gradients = value_and_gradients(lambda given: loss(given, **options), tensors, factor=factor)
    _, truth = value_and_gradients(lambda given: reference(given, **options), exact, factor=factor)
    for name, gradient in gradients.items():
        assert gradient.dtype == HALF
        error = (gradient.double() - truth[name]).norm() / truth[name].norm()
        assert error < 1e-2, f"{name}: relative error {error:.2e}"


# --- other transformations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@each_reduction
@each_pairing
def test_checkpointing(pairing: str, reduction: str, use_reentrant: bool) -> None:
    tensors = pairs.make(pairing)
    names = list(tensors)

    def model(*given: Tensor) -> Tensor:
        return loss({name: torch.tanh(tensor) for name, tensor in zip(names, given, strict=True)}, reduction=reduction)

    expected = value_and_gradients(lambda given: model(*given.values()), tensors)
    value = checkpoint(model, *tensors.values(), use_reentrant=use_reentrant)
    value.sum().backward()
    torch.testing.assert_close((value, {name: tensor.grad for name, tensor in tensors.items()}), expected)


@each_reduction
@each_pairing
def test_func_grad(pairing: str, reduction: str) -> None:
    tensors = pairs.make(pairing)
    _, expected = value_and_gradients(lambda given: loss(given, reduction=reduction), tensors)
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    gradients = torch.func.grad(lambda given: loss(given, reduction=reduction).sum())(plain)
    torch.testing.assert_close(gradients, expected)


@each_reduction
@each_pairing
def test_vmap(pairing: str, reduction: str) -> None:
    tensors = pairs.make(pairing, grad=False)
    dims = {name: None if is_parameter(name) else 0 for name in tensors}
    mapped = torch.func.vmap(lambda given: loss(given, reduction=reduction), in_dims=(dims,))(tensors)
    rows = [
        loss(
            {name: tensor if is_parameter(name) else tensor[row] for name, tensor in tensors.items()},
            reduction=reduction,
        )
        for row in range(pairs.BATCH[0])
    ]
    torch.testing.assert_close(mapped, torch.stack(rows))


TRANSFORMATIONS: dict[str, Callable[..., Any]] = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.cos(x),))[1],
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).sum())(x),
    "vmap-of-grad": lambda function, x: torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(
        torch.stack((x, -x))
    ),
    "forward-mode": lambda function, x: forward_mode_derivative(function, x, torch.cos(x)),
}


def forward_mode_derivative(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value = function(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(value).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("option", ["plain", "labels", "none"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_function_transformations(name: str, option: str) -> None:
    student, teacher = (tensor.detach()[:, :3, :7] for tensor in student_and_teacher(dtype=DOUBLE))
    options = pairs.OPTIONS[option]()
    if "labels" in options:
        options["labels"] = options["labels"][:, :3] % 7

    def derivative(function: Callable[..., Tensor]) -> Tensor:
        result: Tensor = TRANSFORMATIONS[name](lambda x: function(x, teacher, JSD, **options), student)
        return result

    ours, truth = derivative(kd.distillation_loss), derivative(kd.reference.distillation_loss)
    assert bool(truth.any())
    torch.testing.assert_close(ours, truth)


def test_vmap_of_statistics() -> None:
    tensors = pairs.make("head-logits", grad=False)
    hidden, weight, teacher = tensors["student.hidden"], tensors["student.weight"], tensors["teacher.logits"]
    labels, mask = pairs.some_labels(), pairs.per_token(0, 1) < 0.8

    def one(hidden: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Any, ...]:
        return tuple(kd.token_statistics(kd.LMHead(hidden, weight), teacher, labels, mask=mask))

    mapped = torch.func.vmap(one)(hidden, teacher, labels, mask)
    torch.testing.assert_close(mapped, one(hidden, teacher, labels, mask))


@pytest.mark.skipif(not kd.backends()["cpu"].available, reason=kd.backends()["cpu"].reason)
def test_a_backend_asked_for_by_name_is_refused_in_transformations() -> None:
    student, teacher = (tensor.detach() for tensor in student_and_teacher())
    with pytest.raises(NotImplementedError, match=r"backend='cpu'.*torch\.func"):
        torch.func.grad(lambda x: kd.distillation_loss(x, teacher, backend="cpu"))(student)

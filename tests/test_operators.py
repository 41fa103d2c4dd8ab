"""The operators as torch sees them: registered consistently, and part of compiled graphs that equal eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pairs
import pytest
import torch
from pairs import Tensors, each_pairing
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kdkernels as kd

OPERATORS = {
    "angle",
    "bernoulli",
    "bernoulli_backward",
    "bernoulli_total",
    "divergence",
    "divergence_backward",
    "divergence_total",
    "head_mass",
    "leading_ids",
    "linear_divergence",
    "linear_divergence_backward",
    "linear_divergence_total",
    "pairwise_l1",
    "pairwise_l1_backward",
    "plackett_luce",
    "plackett_luce_backward",
    "relation",
    "relation_backward",
    "relation_total",
    "sample",
    "sorted_l1",
    "sorted_l1_backward",
    "sinkhorn",
    "sinkhorn_backward",
    "sparse_divergence",
    "sparse_divergence_backward",
    "sparse_divergence_total",
    "token_ranks",
    "token_set_log_probs",
    "token_set_log_probs_backward",
    "token_statistics",
    "topk",
}

Call = tuple[Any, tuple[Any, ...]]


class DispatchedCalls(TorchDispatchMode):
    """Records the calls of our operators that autograd makes, without a gradient of their own."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "kdkernels" and function._opname.endswith("_backward"):
            self.calls.append((function, tree_map_only(Tensor, Tensor.detach, args)))
        return function(*args, **(kwargs or {}))


class PublicCalls(TorchFunctionMode):
    """Records the calls of our operators that public functions make, with arguments that still require grad."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "kdkernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def recorded(function: Callable[[], Any]) -> list[Call]:
    calls: list[Call] = []
    with PublicCalls(calls), DispatchedCalls(calls):
        function()
    return calls


def loss(tensors: Tensors, divergence: kd.Divergence = kd.JSD(0.3), **options: Any) -> Tensor:  # noqa: B008
    return kd.distillation_loss(*pairs.sources(tensors), divergence, **options)


def every_call(pairing: str, option: str, leaves: str) -> list[Call]:
    """The operators behind a loss and its backward; ``leaves`` is part of the names of what requires grad."""
    tensors = pairs.make(pairing, grad=False)
    for name, tensor in tensors.items():
        tensor.requires_grad_(leaves in name)
    calls = recorded(lambda: loss(tensors, **pairs.OPTIONS[option]()).sum().backward())
    assert calls
    return calls


CHECKED = [
    ("logits-logits", "plain", ""),
    ("logits-logits", "everything", "student"),
    ("logits-logits", "none", "teacher"),
    ("logits-logits", "labels-none", ""),
    ("head-head", "plain", ""),
    ("head-head", "everything", "weight"),
    ("head-logits", "labels-none", "student"),
    ("logits-head", "none", ""),
]
FAST = CHECKED[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "option", "leaves"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CHECKED],
    ids=["-".join(filter(None, case)) for case in CHECKED],
)
def test_opcheck_of_the_loss(pairing: str, option: str, leaves: str) -> None:
    for operator, arguments in every_call(pairing, option, leaves):
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["plain", "labels-without-ce", "teacher-temperatures"])
@pytest.mark.parametrize("pairing", ["logits-logits", "logits-head"])
def test_opcheck_of_token_statistics(pairing: str, option: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "labels" in option:  # without labels their columns are NaN, which that check holds for a difference
        checks.append("test_aot_dispatch_dynamic")
    for operator, arguments in statistics_calls(pairing, option):
        torch.library.opcheck(operator, arguments, test_utils=checks)


def sparse_loss(tensors: Tensors, kind: str, **options: Any) -> Tensor:
    """A student of either kind, a teacher of the kind named."""
    student, teacher = pairs.sources(tensors)
    log_p, ids = torch.as_tensor(teacher).detach().log_softmax(-1).topk(6)
    sparse: Any = kd.SampledLogits(ids, log_p.exp(), vocab_size=pairs.VOCAB)
    if kind != "sampled":
        sparse = kd.TopKLogits(
            ids, log_p, vocab_size=pairs.VOCAB, tail=kind, log_tail_mass=torch.log1p(-log_p.exp().sum(-1))
        )
    divergence = kd.ForwardKL() if kind == "sampled" else kd.JSD(0.3)
    return kd.distillation_loss(student, sparse, divergence, **options)


SPARSE = [
    ("logits-logits", "bucket", "plain"),
    ("head-logits", "uniform", "labels"),
    ("logits-logits", "sampled", "labels-none"),
    ("head-logits", "renormalize", "none"),
]


def sparse_calls(pairing: str, kind: str, option: str) -> list[Call]:
    tensors = pairs.make(pairing)
    return recorded(lambda: sparse_loss(tensors, kind, **pairs.OPTIONS[option]()).sum().backward())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "kind", "option"),
    [pytest.param(*case, marks=[] if case == SPARSE[0] else pytest.mark.slow) for case in SPARSE],
)
def test_opcheck_of_sparse_losses(pairing: str, kind: str, option: str) -> None:
    for operator, arguments in sparse_calls(pairing, kind, option):
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "kind", "option"),
    [pytest.param(*case, marks=[] if case == SPARSE[0] else pytest.mark.slow) for case in SPARSE],
)
def test_compiled_sparse_losses(pairing: str, kind: str, option: str) -> None:
    options = pairs.OPTIONS[option]()
    tensors = pairs.make(pairing)
    tensors["teacher.logits"].requires_grad_(False)
    check_compiled(lambda tensors: sparse_loss(tensors, kind, **options), tensors)


@pytest.mark.slow
def test_compiled_packed_losses() -> None:
    tensors = pairs.make("logits-logits")
    log_p, ids = tensors.pop("teacher.logits").detach().log_softmax(-1).topk(6)
    packed = kd.pack(kd.TopKLogits(ids, log_p, vocab_size=pairs.VOCAB))

    def packed_loss(tensors: Tensors, data: Tensor, counts: Tensor) -> Tensor:
        teacher = kd.PackedLogits(data, counts, vocab_size=pairs.VOCAB, codec="q6")
        return kd.distillation_loss(tensors["student.logits"], teacher, kd.JSD(0.3))

    check_compiled(packed_loss, tensors, packed.data, packed.counts)
    for operator, arguments in recorded(lambda: packed_loss(tensors, packed.data, packed.counts).backward()):
        torch.library.opcheck(operator, arguments)


def statistics_calls(pairing: str, option: str) -> list[Call]:
    tensors = pairs.make(pairing, grad=False)
    return recorded(lambda: kd.token_statistics(*pairs.sources(tensors), **pairs.OPTIONS[option]()))


def test_every_operator_is_reached_by_the_public_functions() -> None:
    calls = [call for case in CHECKED for call in every_call(*case)] + statistics_calls("head-logits", "plain")
    calls += [call for case in SPARSE for call in sparse_calls(*case)]
    half = torch.zeros(2, 5, dtype=torch.bfloat16, requires_grad=True)
    calls += recorded(lambda: kd.sorted_l1(half, torch.zeros(2, 4)).sum().backward())
    calls += recorded(lambda: (kd.topk_logits(torch.zeros(2, 5), 2), kd.sample_logits(torch.zeros(2, 5), 2)))
    rows = torch.zeros(2, 5, requires_grad=True)
    calls += recorded(lambda: kd.pairwise_l1(rows, rows).sum().backward())
    calls += recorded(lambda: kd.token_set_log_probs(rows, torch.tensor([1, 3])).sum().backward())
    calls += recorded(lambda: kd.plackett_luce(half, torch.zeros(2, 5), top_k=2).sum().backward())
    calls += recorded(lambda: kd.angle_loss(half.float(), torch.eye(2, 5)).backward())
    for reduction in ("sum", "none"):
        calls += recorded(
            lambda how=reduction: kd.relation_loss(rows, rows, rows, rows, reduction=how).sum().backward()
        )
    calls += recorded(lambda: kd.token_ranks(rows, torch.tensor([1, 3])))
    cost = torch.zeros(1, 2, 2, requires_grad=True)
    for reduction in ("sum", "none"):
        calls += recorded(lambda how=reduction: kd.bernoulli_loss(rows, rows.detach(), reduction=how).sum().backward())
    calls += recorded(lambda: kd.mass_threshold(rows, 0.5))
    calls += recorded(lambda: kd.sinkhorn(cost, epsilon=1.0).distance.sum().backward())
    assert {operator._opname for operator, _ in calls} == OPERATORS
    assert {name.partition("::")[2] for name in registered_operators()} == OPERATORS


def registered_operators() -> Iterator[str]:
    return (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels::"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_compiled(
    function: Callable[..., Tensor], tensors: Tensors, *arguments: Any, backend: str = "aot_eager"
) -> None:
    """``function(tensors, *arguments)`` and its gradients, compiled and in eager mode."""
    fast = compiled(function, backend)
    results = [
        pairs.value_and_gradients(lambda given, call=call: call(given, *arguments), tensors, factor=1.7)
        for call in (fast, function)
    ]
    assert graphs() == 1
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["logits-logits", "head-head"])
def test_compiled_loss(pairing: str) -> None:
    check_compiled(loss, pairs.make(pairing))


COMPILED = {
    "logits-logits": ["sum", "none", "labels", "labels-none", "mask", "temperatures", "normalizer", "everything"],
    "head-head": ["none", "labels", "memory_budget", "everything"],
    "head-logits": ["everything"],
    "logits-head": ["everything"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "option"), [(pairing, option) for pairing in COMPILED for option in COMPILED[pairing]]
)
def test_compiled_loss_with(pairing: str, option: str) -> None:
    options = pairs.OPTIONS[option]()
    check_compiled(lambda tensors, given: loss(tensors, kd.SkewForwardKL(0.2), **given), pairs.make(pairing), options)


@pytest.mark.slow
@pytest.mark.parametrize(("pairing", "option"), [("logits-logits", "everything"), ("head-head", "labels-none")])
def test_inductor(pairing: str, option: str) -> None:
    """With inductor, between other layers, as in a training step."""
    options = pairs.OPTIONS[option]()

    def step(tensors: Tensors) -> Tensor:
        scaled = {name: torch.tanh(tensor) * 2 for name, tensor in tensors.items()}
        return loss(scaled, **options) + sum(tensor.square().mean() for tensor in tensors.values())

    check_compiled(step, pairs.make(pairing), backend="inductor")


DIVERGENCES: dict[str, Callable[[], kd.Divergence]] = {
    "forward_kl": kd.ForwardKL,
    "jsd": lambda: kd.JSD(0.4),
    "alpha": lambda: kd.AlphaDivergence(0.3),
    "ab": lambda: kd.ABDivergence(0.4, 0.7),
    "hellinger": kd.Hellinger,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_made_inside(name: str) -> None:
    check_compiled(lambda tensors: loss(tensors, DIVERGENCES[name]()), pairs.make("logits-logits"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_made_outside(name: str) -> None:
    check_compiled(loss, pairs.make("logits-logits"), DIVERGENCES[name]())


@pytest.mark.slow
def test_sources_made_outside() -> None:
    student, teacher = pairs.sources(pairs.make("head-head"), softcap=5.0, logit_scale=0.5)
    expected = kd.distillation_loss(student, teacher)
    torch.testing.assert_close(compiled(kd.distillation_loss)(student, teacher), expected)
    logits = kd.Logits(torch.randn(4, pairs.VOCAB))
    torch.testing.assert_close(compiled(kd.distillation_loss)(logits, logits.tensor + 1), torch.tensor(0.0))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["plain", "labels-without-ce"])
@each_pairing
def test_compiled_statistics(pairing: str, option: str) -> None:
    tensors, options = pairs.make(pairing), pairs.OPTIONS[option]()

    def statistics(tensors: Tensors) -> kd.TokenStatistics:
        return kd.token_statistics(*pairs.sources(tensors), **options)

    torch.testing.assert_close(compiled(statistics)(tensors), statistics(tensors))
    assert graphs() == 1


@pytest.mark.slow
def test_compiled_without_gradient() -> None:
    tensors = pairs.make("head-head")
    with torch.no_grad():
        value = compiled(loss)(tensors)
        torch.testing.assert_close(value, loss(tensors))
    assert not value.requires_grad


@pytest.mark.slow
@each_pairing
def test_compiled_with_a_teacher_made_in_inference_mode(pairing: str) -> None:
    """Without a reduction the teacher must be saved, which torch's own compiled functions refuse."""
    tensors = pairs.make(pairing)
    with torch.inference_mode():
        tensors |= {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("teacher")}
    check_compiled(loss, tensors)


@pytest.mark.slow
def test_compiled_under_autocast() -> None:
    def autocast_loss(tensors: Tensors) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(tensors)

    check_compiled(autocast_loss, pairs.make("head-head"))


LABELS, WEIGHT = pairs.some_labels(), pairs.per_token(0.1, 2.0)

CHANGING: dict[str, Callable[[Tensors, float], Tensor]] = {
    "beta": lambda tensors, x: loss(tensors, kd.JSD(x)),
    "alpha": lambda tensors, x: loss(tensors, kd.AlphaDivergence(x)),
    "temperature": lambda tensors, x: loss(tensors, temperature=1 + x, temperature_squared=True),
    "temperature-none": lambda tensors, x: loss(tensors, temperature=1 + x, temperature_squared=True, reduction="none"),
    "teacher_temperature": lambda tensors, x: loss(tensors, teacher_temperature=1 + x),
    "ce_weight": lambda tensors, x: loss(tensors, labels=LABELS, ce_weight=x),
    "normalizer": lambda tensors, x: loss(tensors, normalizer=10 * x),
    "normalizer-weight": lambda tensors, x: loss(tensors, normalizer=10 * x, weight=WEIGHT),
}


CHANGING_CASES = [("logits-logits", name) for name in CHANGING] + [
    ("head-head", name) for name in ("beta", "temperature", "normalizer-weight")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "name"),
    [pytest.param(*case, marks=pytest.mark.slow if place else []) for place, case in enumerate(CHANGING_CASES)],
)
def test_changing_number_does_not_recompile(pairing: str, name: str) -> None:
    """The second value may make the number variable; after that the graph stays."""
    tensors, step = pairs.make(pairing), CHANGING[name]
    fast = compiled(step)
    for number in (0.3, 0.35, 0.4, 0.45, 0.5):
        results = [
            pairs.value_and_gradients(lambda given, call=call, number=number: call(given, number), tensors)
            for call in (fast, step)
        ]
        torch.testing.assert_close(*results)
    assert graphs() <= 2


@pytest.mark.slow
def test_changing_divergence_does_not_recompile() -> None:
    """Made outside, as a training loop that anneals beta does."""
    tensors, fast = pairs.make("logits-logits"), compiled(loss)
    for beta in (0.3, 0.35, 0.4, 0.45, 0.5):
        torch.testing.assert_close(fast(tensors, kd.JSD(beta)), loss(tensors, kd.JSD(beta)))
    assert graphs() <= 2


@pytest.mark.slow
def test_changing_number_of_tokens_does_not_recompile_with_an_integer_normalizer() -> None:
    tensors = pairs.make("logits-logits")

    def step(tensors: Tensors, count: int) -> Tensor:
        return loss(tensors, normalizer=count)

    fast = compiled(step)
    for count in (11, 12, 13, 14, 15):
        torch.testing.assert_close(fast(tensors, count), step(tensors, count))
    assert graphs() <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairing", "reduction"),
    [*((pairing, "mean") for pairing in pairs.PAIRINGS), ("logits-logits", "none"), ("head-head", "none")],
)
def test_changing_batch_does_not_recompile(pairing: str, reduction: str) -> None:
    fast = compiled(lambda tensors: loss(tensors, reduction=reduction))
    for size in (3, 5, 8, 13):
        tensors = pairs.make(pairing, batch=(size, 4), seed=size)
        results = [
            pairs.value_and_gradients(call, tensors)
            for call in (fast, lambda tensors: loss(tensors, reduction=reduction))
        ]
        torch.testing.assert_close(*results)
    assert graphs() <= 2

"""Teachers made of several sources as the kernels read them, and logits with a class bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accuracy
import pytest
import torch
from loss_cases import Model, copy, noise
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import chunked_head

TOKENS, VOCAB = 5, 37
DIVERGENCES = [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.3)]

per_token = torch.linspace(-0.4, 1.3, TOKENS, dtype=torch.float64)
bias = noise(VOCAB, seed=11)
ids = torch.tensor([[1, 36], [-1, 3], [0, 0], [5, -1], [-1, -1]])
values = noise(TOKENS, 2, seed=12)
choice = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [1, 0, 0]], dtype=torch.float64)


def logit_sum(sources: list[Tensor], coefficients: list[Any]) -> Tensor:
    total = torch.zeros_like(sources[0])
    for source, coefficient in zip(sources, coefficients, strict=True):
        factor = torch.as_tensor(coefficient, dtype=torch.float64).reshape(-1, 1)
        total = total + torch.where(factor == 0, torch.zeros_like(source), factor * source)
    return total


def probability_mean(sources: list[Tensor], weights: list[Any], temperature: float) -> Tensor:
    return torch.log(logit_sum([torch.softmax(source / temperature, -1) for source in sources], weights))


def finished(logits: Tensor) -> Tensor:
    """The bias, the bounds and the replacements of the case "everything"."""
    logits = (logits + bias).clamp(torch.tensor(-1.0).double(), per_token.abs().unsqueeze(-1) + 0.5)
    logits = logits.clone()
    for token in range(TOKENS):
        for entry in range(2):
            if ids[token, entry] >= 0:
                logits[token, ids[token, entry]] = values[token, entry]
    return logits


Made = Callable[[list[Tensor]], Tensor]

CASES: dict[str, tuple[dict[str, Any], Made]] = {
    "logits": (
        {"coefficients": [0.3, torch.tensor(-0.7, dtype=torch.float64), per_token]},
        lambda z: logit_sum(z, [0.3, -0.7, per_token]),
    ),
    "mean": ({}, lambda z: sum(z, torch.zeros(())) / 3),
    "probabilities": (
        {"space": "probabilities", "temperature": 1.5},
        lambda z: probability_mean(z, [1 / 3] * 3, 1.5),
    ),
    "choice": (
        {"space": "probabilities", "coefficients": list(choice.unbind(-1))},
        lambda z: probability_mean(z, list(choice.unbind(-1)), 1.0),
    ),
    "everything": (
        {
            "coefficients": [1, 0.5, -0.5],
            "class_bias": bias,
            "lower": -1.0,
            "upper": per_token.abs() + 0.5,
            "replaced_ids": ids,
            "replacements": values,
        },
        lambda z: finished(logit_sum(z, [1, 0.5, -0.5])),
    ),
}

each_case = pytest.mark.parametrize("case", CASES)


def plain(student: Tensor, teacher: Tensor, divergence: kd.Divergence, labels: Tensor) -> Tensor:
    """The loss of every token from whole logits."""
    log_p, log_q = torch.log_softmax(teacher / 1.3, -1), torch.log_softmax(student / 0.8, -1)
    p, q = log_p.exp(), log_q.exp()
    if isinstance(divergence, kd.ForwardKL):
        value = (p * (log_p - log_q)).sum(-1)
    elif isinstance(divergence, kd.ReverseKL):
        value = (q * (log_q - log_p)).sum(-1)
    else:
        m = 0.3 * p + 0.7 * q
        value = (0.3 * p * (log_p - m.log()) + 0.7 * q * (log_q - m.log())).sum(-1)
    return value + 0.25 * torch.nn.functional.cross_entropy(student, labels, reduction="none")


def sources(kind: str, dtype: torch.dtype) -> tuple[list[Any], list[Tensor]]:
    """Three sources, the last one logits, and their logits in float64."""
    models = [Model.make(kind, (TOKENS,), VOCAB, seed) for seed in (3, 20)]
    models.append(Model.make("logits", (TOKENS,), VOCAB, 40))
    rounded = [model.to(dtype) for model in models]
    truth = [model.to(torch.float64) for model in rounded]
    return [model.source() for model in rounded], [model.logits().detach() for model in truth]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["logits", "head"])
@each_case
def test_losses_and_statistics_are_those_of_the_mixed_logits(case: str, kind: str, dtype: torch.dtype) -> None:
    options, made = CASES[case]
    given, true = sources(kind, dtype)
    mixed = made(true)
    labels = torch.arange(TOKENS) * 7
    student = Model.make(kind, (TOKENS,), VOCAB, 60).to(dtype)
    for divergence in DIVERGENCES:
        results = []
        for backend in ("reference", None):
            mine = student.to(dtype)
            loss = kd.distillation_loss(
                mine.source(), kd.LogitMixture(given, **options), divergence, temperature=0.8, teacher_temperature=1.3,
                labels=labels, ce_weight=0.25, reduction="none", memory_budget=None if kind == "logits" else 1,
                **({"backend": backend} if backend else {}),
            )  # fmt: skip
            loss.sum().backward()
            results.append((loss.detach(), [leaf.grad for leaf in mine.leaves]))
        exact = student.to(torch.float64)
        expected = plain(exact.logits(), mixed, divergence, labels)
        expected.sum().backward()
        (reference, reference_gradients), (ours, gradients) = results
        accuracy.check("loss", ours, reference, expected.detach(), slack=5e-6 if dtype == torch.float32 else 1e-11)
        for mine, other, leaf in zip(gradients, reference_gradients, exact.leaves, strict=True):
            assert other is not None
            assert leaf.grad is not None
            accuracy.check("gradient", mine, other, leaf.grad, slack=5e-6 if dtype == torch.float32 else 1e-11)
    statistics = kd.token_statistics(student.source(), kd.LogitMixture(given, **options), labels)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    log_p = torch.log_softmax(mixed, -1)
    wanted = {
        "max_teacher": mixed.amax(-1),
        "lse_teacher": mixed.logsumexp(-1),
        "entropy_teacher": -(log_p.exp() * log_p).sum(-1),
        "label_log_prob_teacher": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(statistics, name).double(), value, **tolerance)
    assert statistics.argmax_teacher is not None
    assert torch.equal(statistics.argmax_teacher, mixed.argmax(-1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_vocabulary_stays_masked(backend: str) -> None:
    first, second = 2 * noise(2, TOKENS, VOCAB, seed=1)
    first[:, 3] = second[:, 3] = -torch.inf
    first[:, 9] = -torch.inf
    student = copy(noise(TOKENS, VOCAB, seed=2))

    def teacher_gradient(mixture: kd.LogitMixture, hidden: list[int]) -> None:
        """``q - p`` says what p is."""
        loss = kd.distillation_loss(student, mixture, reduction="sum", backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
        p = torch.softmax(student.detach(), -1) - gradient
        assert bool(gradient.isfinite().all())
        assert float(p[:, hidden].abs().max()) < 1e-14
        assert float(p.sum(-1).sub(1).abs().max()) < 1e-12
        shown = [column for column in range(VOCAB) if column not in hidden]
        assert float(p[:, shown].min()) > 0

    teacher_gradient(kd.LogitMixture([first, second], [1e-4, 1 - 1e-4], lower=-3.0), [3, 9])
    teacher_gradient(kd.LogitMixture([second, first, first], [1.0, 0.5, -0.5]), [3, 9])
    teacher_gradient(kd.LogitMixture([first, second], space="probabilities"), [3])
    kept = kd.LogitMixture([first, second], replaced_ids=torch.full((TOKENS,), 9), replacements=torch.zeros(TOKENS))
    teacher_gradient(kept, [3])


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_source_with_coefficient_0_is_not_read(space: str, backend: str) -> None:
    """Nor anything where a token does not count."""
    good, bad = noise(TOKENS, VOCAB, seed=1), torch.full((TOKENS, VOCAB), torch.nan, dtype=torch.float64)
    good[4], mask = torch.nan, torch.tensor([True] * 4 + [False])
    pick = torch.tensor([0.0, 1, 0, 1, torch.nan], dtype=torch.float64)
    a, b = torch.where(pick.unsqueeze(-1) == 0, good, bad), torch.where(pick.unsqueeze(-1) == 1, good, bad)
    student, other = copy(noise(TOKENS, VOCAB, seed=2)), copy(noise(TOKENS, VOCAB, seed=2))
    pick[4] = 0
    mixture = kd.LogitMixture([a, b], [1 - pick, pick], space=space)
    loss = kd.distillation_loss(student, mixture, mask=mask, backend=backend)
    expected = kd.reference.distillation_loss(other[:4], good[:4])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, other.grad)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_class_bias_of_both_sides(backend: str) -> None:
    """With a gradient to the logits of either."""
    student, teacher = copy(noise(TOKENS, VOCAB, seed=1)), copy(noise(TOKENS, VOCAB, seed=2))
    labels = torch.arange(TOKENS)
    loss = kd.distillation_loss(
        kd.Logits(student, class_bias=bias), kd.Logits(teacher, class_bias=-2 * bias), kd.JSD(0.3), temperature=0.8,
        teacher_temperature=1.3, labels=labels, ce_weight=0.25, reduction="sum", backend=backend,
    )  # fmt: skip
    found = torch.autograd.grad(loss, [student, teacher])
    expected = plain(student + bias, teacher - 2 * bias, kd.JSD(0.3), labels).sum()
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(found, torch.autograd.grad(expected, [student, teacher]), strict=True):
        torch.testing.assert_close(mine, right)


def test_taid_of_heads_makes_the_logits_of_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's chunk serves the mixture too, whichever place it has there, also where tokens are left out."""
    made: list[int] = []
    logits = chunked_head.Head.logits

    def counted(self: chunked_head.Head, chunk: slice) -> Tensor:
        made.append(chunk.stop - chunk.start)
        return logits(self, chunk)

    monkeypatch.setattr(chunked_head.Head, "logits", counted)
    student, teacher = (Model.make("head", (TOKENS,), VOCAB, seed) for seed in (1, 5))
    for mask in (None, torch.tensor([True, False, True, True, True])):
        tokens = TOKENS if mask is None else 4
        for order in (1, -1):
            made.clear()
            mine, right = student.to(torch.float64), student.to(torch.float64)
            source = mine.source()
            mixture = kd.LogitMixture([source, teacher.source()][::order], [0.3, 0.7][::order])
            loss = kd.distillation_loss(source, mixture, mask=mask)
            loss.backward()
            assert sum(made) == 2 * tokens
            mixed = 0.3 * right.logits().detach() + 0.7 * teacher.logits()
            kd.reference.distillation_loss(right.logits(), mixed, mask=mask).backward()
            for leaf, other in zip(mine.leaves, right.leaves, strict=True):
                torch.testing.assert_close(leaf.grad, other.grad)


def test_taid_of_donated_logits() -> None:
    student, teacher = 2 * noise(2, TOKENS, VOCAB, seed=1).float()
    mine, right = copy(student, torch.float32), copy(student, torch.float32)
    tempered = mine * 1.0
    source = kd.Logits(tempered, donate=True)
    kd.distillation_loss(source, kd.LogitMixture([source, teacher], [0.3, 0.7]), kd.ReverseKL()).backward()
    kd.distillation_loss(right, 0.3 * student + 0.7 * teacher, kd.ReverseKL()).backward()
    torch.testing.assert_close(mine.grad, right.grad)


@pytest.mark.parametrize("kind", ["logits", "head"])
def test_second_derivatives(kind: str) -> None:
    student, teacher = Model.make(kind, (TOKENS,), VOCAB, 1).to(torch.float64), noise(TOKENS, VOCAB, seed=5)

    def slope(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, student.leaves, create_graph=True)
        return sum((gradient.square().sum() for gradient in gradients), torch.zeros(()))

    ours = slope(kd.distillation_loss(student.source(), kd.LogitMixture([teacher, -teacher], space="probabilities")))
    mixed = torch.log(0.5 * torch.softmax(teacher, -1) + 0.5 * torch.softmax(-teacher, -1))
    log_q = torch.log_softmax(student.logits(), -1)
    expected = slope((torch.softmax(mixed, -1) * (torch.log_softmax(mixed, -1) - log_q)).sum(-1).mean())
    for mine, right in zip(
        torch.autograd.grad(ours, student.leaves), torch.autograd.grad(expected, student.leaves), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_nothing_gets_a_gradient_but_the_student() -> None:
    student, teacher = copy(noise(TOKENS, VOCAB, seed=1)), copy(noise(TOKENS, VOCAB, seed=2))
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kd.distillation_loss(student, kd.LogitMixture([student, teacher], [1 - c, c])).backward()
    assert teacher.grad is None
    assert c.grad is None
    other = copy(student)
    kd.distillation_loss(other, 0.7 * student.detach() + 0.3 * teacher.detach()).backward()
    torch.testing.assert_close(student.grad, other.grad)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_compiled_and_checked_by_torch(kind: str) -> None:
    """Coefficients that change do not compile anew, be they numbers or tensors."""
    student, teacher = Model.make(kind, (TOKENS,), VOCAB, 1).to(torch.float32), noise(2, TOKENS, VOCAB, seed=5).float()
    calls = []

    def loss(share: float, c: Tensor) -> Tensor:
        mixture = kd.LogitMixture([student.source(), *teacher], [share, c, 0.25], space="probabilities")
        return kd.distillation_loss(student.source(), mixture, reduction="none").sum()

    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for share, c in ((0.1, torch.tensor(0.5)), (0.7, torch.tensor(0.2)), (0.9, torch.tensor(0.3))):
        expected, found = loss(share, c), compiled(share, c)
        torch.testing.assert_close(found, expected)
        for mine, right in zip(
            torch.autograd.grad(found, student.leaves), torch.autograd.grad(expected, student.leaves), strict=True
        ):
            torch.testing.assert_close(mine, right)
        calls.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert calls[1] == calls[2]
    assert calls[0] <= 1


@pytest.mark.slow
def test_operators_are_consistent() -> None:
    from kdkernels import arguments
    from kdkernels.ops.divergence import divergence_op, divergence_total_op
    from kdkernels.ops.schema import as_numbers, pack_spec
    from kdkernels.ops.token_statistics import token_statistics_op

    student, *teachers = (copy(2 * noise(TOKENS, VOCAB, seed=seed), torch.float32) for seed in range(3))
    mixture = kd.LogitMixture(
        teachers, [0.3, 0.7], class_bias=bias.float(), lower=-2.0, replaced_ids=ids, replacements=values.float()
    )
    problem, _ = arguments.prepare_loss(
        student, mixture, kd.ForwardKL(), temperature=1.0, teacher_temperature=None, weight=None, mask=None,
        labels=torch.arange(TOKENS), ignore_index=-100, ce_weight=0.5, reduction="mean", normalizer=None,
        temperature_squared=False, vocab_size=None,
    )  # fmt: skip
    assert problem.teacher is not None
    packed = pack_spec(problem.spec)
    pair = problem.student.tensor, problem.teacher.tensor
    torch.library.opcheck(divergence_op, (*pair, "cpu", *packed))
    torch.library.opcheck(divergence_total_op, (*pair, as_numbers([0.5, 0.0]), None, None, True, False, "cpu", *packed))
    nothing = (None, None, 1.0)
    torch.library.opcheck(
        token_statistics_op, (pair[0].detach(), *nothing, pair[1].detach(), *nothing, None, "cpu", *packed)
    )


def test_bfloat16_empty_batches_and_strides() -> None:
    wide = noise(TOKENS, 3 * VOCAB, seed=1)
    student, teacher = wide[:, :VOCAB].bfloat16().requires_grad_(), wide[:, VOCAB:]
    sources = [teacher[:, :VOCAB].bfloat16(), teacher[:, VOCAB:].float()]
    mixture = kd.LogitMixture(sources, [0.5, 0.5])
    loss = kd.distillation_loss(student, mixture)
    mixed = 0.5 * sources[0].double() + 0.5 * sources[1].double()
    expected = kd.reference.distillation_loss(student.detach().double(), mixed)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    padded = kd.LogitMixture([wide[:, : VOCAB + 3], wide[:, VOCAB : 2 * VOCAB]], class_bias=bias.new_zeros(VOCAB + 5))
    cut = kd.distillation_loss(wide[:, VOCAB : 2 * VOCAB + 1], padded, vocab_size=VOCAB)
    right = kd.reference.distillation_loss(
        wide[:, VOCAB : 2 * VOCAB], (wide[:, :VOCAB] + wide[:, VOCAB : 2 * VOCAB]) / 2
    )
    torch.testing.assert_close(cut, right)
    nothing = wide[:0, :VOCAB]
    for space in ("logits", "probabilities"):
        assert float(kd.distillation_loss(nothing, kd.LogitMixture([nothing, nothing], space=space))) == 0


logits = torch.zeros(TOKENS, VOCAB)

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: kd.LogitMixture(logits), "sources must be a list"),  # type: ignore[arg-type]
    (lambda: kd.LogitMixture([]), "1 to 4 sources, got 0"),
    (lambda: kd.LogitMixture([logits] * 5), "1 to 4 sources, got 5"),
    (lambda: kd.LogitMixture([kd.Logits(logits, class_bias=logits[0])]), "give class_bias to the mixture"),
    (lambda: kd.LogitMixture([logits], [1.0, 2.0]), "one per source, 1, got 2"),
    (lambda: kd.LogitMixture([logits], space="odds"), "space must be one of"),
    (lambda: kd.LogitMixture([logits], temperature=2.0), "temperature is for space='probabilities'"),
    (lambda: kd.LogitMixture([logits], class_bias=logits), r"class_bias must have the shape \[V\]"),
    (lambda: kd.LogitMixture([logits], replaced_ids=ids), "come together"),
    (lambda: kd.distillation_loss(kd.LogitMixture([logits]), logits), "student is a LogitMixture"),  # type: ignore[arg-type]
    (lambda: kd.topk_logits(kd.LogitMixture([logits]), 3), "only be the teacher"),  # type: ignore[arg-type]
    (lambda: kd.sorted_l1(logits, kd.Logits(logits, class_bias=bias)), "class_bias is supported only"),
    (lambda: loss([logits, logits[:3]]), r"sources\[1\] must have the tokens"),
    (lambda: loss([logits, logits[:, :3]]), r"sources\[1\] must have the tokens"),
    (lambda: loss([logits, logits.double()]), r"sources\[1\] is float64"),
    (lambda: loss([logits], class_bias=bias[:4]), "class_bias must have 37 entries, got 4"),
    (lambda: loss([logits], [math.nan]), r"coefficients\[0\] must be a finite"),
    (lambda: loss([logits], [torch.tensor(math.nan)]), "coefficients must be finite"),
    (lambda: loss([logits], [torch.zeros(3)]), r"coefficients\[0\] must have one entry per token"),
    (lambda: loss([logits], [-1.0], space="probabilities"), "must not be negative"),
    (lambda: loss([logits], lower=1.0, upper=0.0), "lower must not exceed upper"),
    (lambda: loss([logits], replaced_ids=ids + 30, replacements=values), r"ids in \[0, 37\) or -1, got 66"),
    (lambda: loss([logits], replaced_ids=ids[:3], replacements=values[:3]), "replaced_ids must have the shape"),
]  # fmt: skip


def loss(sources: list[Any], coefficients: Any = None, **options: Any) -> Tensor:
    return kd.distillation_loss(logits, kd.LogitMixture(sources, coefficients, **options))


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusals(call: Callable[[], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call()

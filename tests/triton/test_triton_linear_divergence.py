"""LM heads whose logits are never written: the Triton kernels in the interpreter against the reference, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot_heads
import interpreted_heads
import pytest
import torch
from accuracy import check
from aot import TARGETS
from aot_heads import Case
from interpreted_heads import Answers, Side
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import chunked_head, rows
from kdkernels.backends.gradient_tiles import TileChooser, TileNotes
from kdkernels.divergences import Divergence, Kind
from kdkernels.sources import LMHead

Worker = Callable[..., Any]

VOCAB = 37
SLACK = {torch.float32: None, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""The half types: where what is rounded differs, an error is no multiple of plain PyTorch's."""

DIVERGENCES: list[Divergence] = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.Jeffreys(0.3),
    kd.JSD(0.3),
    kd.SkewForwardKL(0.2),
    kd.SkewReverseKL(0.2),
    kd.TVD(),
    kd.AlphaDivergence(0.4),
    kd.Renyi(0.6),
    kd.ABDivergence(0.3, 0.6),
    kd.SoftCrossEntropy(),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head(rows: int, hidden: int, vocab: int = VOCAB, *, seed: int, bias: bool = False, **options: Any) -> Side:
    weight = 2 * hidden**-0.5 * noise(vocab, hidden, seed=seed + 1)
    tensors = noise(rows, hidden, seed=seed), weight
    return Side((*tensors, noise(vocab, seed=seed + 2)) if bias else tensors, options)


def compare(
    interpreter: Worker,
    student: Side,
    teacher: Side,
    divergence: Divergence,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Answers:
    """Fails unless value and gradients follow the rule of ``accuracy``."""
    student, teacher = student.to(dtype), teacher.to(dtype)
    found: Answers = interpreter(interpreted_heads.answers, student, teacher, divergence, options)
    plain = interpreted_heads.answers(student, teacher, divergence, options, "reference")
    doubled = student.to(torch.float64), teacher.to(torch.float64)
    truth = interpreted_heads.answers(*doubled, divergence, options, "reference")
    slack = SLACK[dtype]
    flat = [each.value.reshape(1, -1) for each in (found, plain, truth)]
    check("value", *flat, slack=slack)
    assert found.gradients.keys() == truth.gradients.keys()
    for name, right in truth.gradients.items():
        assert found.gradients[name].dtype == dtype
        assert bool(right.any())
        check(
            f"gradient to the {name}",
            *(each.gradients[name].reshape(1, -1) for each in (found, plain, truth)),
            slack=slack,
        )
    return found


def everything(rows: int) -> dict[str, Any]:
    labels = torch.arange(rows) * 5 % VOCAB
    labels[1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2] = False
    temperatures = torch.linspace(0.6, 2, rows)
    return {
        "labels": labels,
        "mask": mask,
        "ce_weight": 0.7,
        "temperature": temperatures,
        "teacher_temperature": temperatures.flip(0),
        "weight": torch.linspace(0.3, 2, rows),
    }


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda each: type(each).__name__)
def test_every_divergence(interpreter: Worker, divergence: Divergence) -> None:
    compare(interpreter, head(5, 24, seed=0), head(5, 8, seed=4), divergence, temperature=1.5, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [kd.ForwardKL(), kd.SkewReverseKL(0.2)], ids=lambda each: type(each).__name__)
def test_every_option(interpreter: Worker, divergence: Divergence) -> None:
    student = head(20, 24, seed=0, bias=True, softcap=3.0, logit_scale=0.7)
    teacher = head(20, 16, seed=4, bias=True, logit_scale=1.4)
    compare(interpreter, student, teacher, divergence, **everything(20))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(interpreter: Worker, dtype: torch.dtype) -> None:
    compare(interpreter, head(20, 24, seed=0, bias=True), head(20, 8, seed=4), kd.JSD(), dtype, reduction="sum")


@pytest.mark.slow
def test_parameters_per_token(interpreter: Worker) -> None:
    sides = head(5, 8, seed=0), head(5, 8, seed=4, softcap=2.0)
    compare(interpreter, *sides, kd.JSD(torch.linspace(0.1, 0.9, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_one_side_of_logits(interpreter: Worker, which: str) -> None:
    logits, linear = Side((2 * noise(20, VOCAB, seed=9),)), head(20, 8, seed=0)
    sides = (logits, linear) if which == "student" else (linear, logits)
    options = everything(20)
    compare(interpreter, *sides, kd.Jeffreys(0.4), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student_wants", "teacher_wants"),
    [((True, False), (False, False)), ((False, True, False), (False, False)), ((False, False, True), (True, False))],
    ids=["hidden", "weight", "bias and the teacher's hidden"],
)
def test_only_wanted_gradients(
    interpreter: Worker, student_wants: tuple[bool, ...], teacher_wants: tuple[bool, ...]
) -> None:
    student = head(5, 8, seed=0, bias=len(student_wants) == 3)._replace(wanted=student_wants)
    teacher = head(5, 24, seed=4)._replace(wanted=teacher_wants)
    found = compare(interpreter, student, teacher, kd.ReverseKL())
    assert len(found.gradients) == sum(student_wants) + sum(teacher_wants)


@pytest.mark.slow
def test_what_does_not_count_and_what_is_masked(interpreter: Worker) -> None:
    """NaN where a token does not count, entries of the vocabulary at -inf, logits of thousands."""
    student, teacher = head(5, 8, seed=0, bias=True), head(5, 8, seed=4, bias=True)
    for side in (student, teacher):
        side.tensors[0][0] *= 3000
        side.tensors[2][3::5] = -torch.inf
    clean = student, teacher
    mask = torch.tensor([True, True, False, True, True])
    dirty = [
        side._replace(tensors=(side.tensors[0].masked_fill(~mask.unsqueeze(-1), torch.nan), *side.tensors[1:]))
        for side in clean
    ]
    options = {"mask": mask, "reduction": "none"}
    found = interpreter(interpreted_heads.answers, *dirty, kd.JSD(), options)
    truth = interpreted_heads.answers(*(side.to(torch.float64) for side in clean), kd.JSD(), options, "reference")
    torch.testing.assert_close(found.value.double(), truth.value.double(), rtol=1e-4, atol=1e-6)
    assert found.value[2] == 0
    for name, right in truth.gradients.items():
        assert float((found.gradients[name].double() - right).norm()) <= 1e-4 * float(right.norm()), name
    assert not bool(found.gradients["student's bias"][3::5].any())


@pytest.mark.parametrize("rows", [0, 3], ids=["no tokens", "none that counts"])
@pytest.mark.slow
def test_nothing_to_do(interpreter: Worker, rows: int) -> None:
    sides = head(rows, 8, seed=0, bias=True), head(rows, 8, seed=4)
    options = {"mask": torch.zeros(rows, dtype=torch.bool)}
    found = interpreter(interpreted_heads.answers, *sides, kd.ForwardKL(), options)
    assert found.value == 0
    assert len(found.gradients) == 5
    assert all(not bool(gradient.any()) for gradient in found.gradients.values())


def recovery(rows: int = 20, vocab: int = 70) -> tuple[Side, Side]:
    """A student whose dW shows the gradient of its logits: its hidden states are an identity matrix."""
    falling = torch.linspace(0, -14, vocab)
    student = Side((torch.eye(rows), (0.3 * noise(vocab, rows, seed=1) + falling.unsqueeze(-1)), torch.zeros(vocab)))
    teacher = Side((falling + noise(rows, vocab, seed=2),), wanted=(False,))
    return student, teacher


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_tolerance_holds_for_every_row(interpreter: Worker, tolerance: float) -> None:
    """And the sum of each row stays, dH and the bias get the same gradient as dW, and the report says what happened."""
    student, teacher = recovery()
    options: dict[str, Any] = {"reduction": "sum", "temperature": 0.7}
    exact, found = (
        interpreter(interpreted_heads.answers, student, teacher, kd.ForwardKL(), {**options, "gradient_tolerance": eps})
        for eps in (0.0, tolerance)
    )
    one, other = (each.gradients["student's weight"].t().double() for each in (exact, found))
    relative = (one - other).norm(dim=-1) / one.norm(dim=-1)
    assert 0 < float(relative.max()) <= tolerance
    torch.testing.assert_close(found.relative_error, relative, rtol=1e-3, atol=1e-5)
    assert 0.1 < float(found.density.mean()) < 0.9
    torch.testing.assert_close(other.sum(-1), one.sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.gradients["student's bias"].double(), other.sum(0), rtol=1e-4, atol=1e-6)
    to_hidden = other @ student.tensors[1].double()
    torch.testing.assert_close(found.gradients["student's hidden"].double(), to_hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.value, exact.value)


@pytest.mark.slow
def test_an_order_of_the_vocabulary_changes_which_tiles_are_left_out_and_no_more(interpreter: Worker) -> None:
    """A shuffled vocabulary, put in order again, gives what the vocabulary in order gives, shuffled; labels, masks, both sides."""
    vocab = 70
    shuffle = torch.randperm(vocab, generator=torch.Generator().manual_seed(3))
    student, teacher = recovery(vocab=vocab)
    second = head(20, 8, vocab, seed=11, bias=True)
    second = second._replace(
        tensors=(second.tensors[0], 0.2 * second.tensors[1], teacher.tensors[0].mean(0)), wanted=(True, True, True)
    )
    labels = torch.arange(20) * 7 % vocab
    mask = torch.arange(20) != 4
    options: dict[str, Any] = {"mask": mask, "ce_weight": 0.3, "gradient_tolerance": 0.1, "reduction": "sum"}

    def shuffled(side: Side) -> Side:
        hidden, *others = side.tensors
        return side._replace(tensors=(hidden, *(tensor[shuffle] for tensor in others)))

    order = shuffle.argsort()
    one = interpreter(interpreted_heads.answers, student, second, kd.JSD(), {**options, "labels": labels})
    two = interpreter(
        interpreted_heads.answers,
        shuffled(student),
        shuffled(second),
        kd.JSD(),
        {**options, "labels": order[labels], "vocabulary_order": order},
    )
    assert 0.1 < float(one.density.mean()) < 0.95
    torch.testing.assert_close(two.density, one.density)
    torch.testing.assert_close(two.value, one.value)
    for name, gradient in one.gradients.items():
        expected = gradient if name.endswith("hidden") else gradient[shuffle]
        torch.testing.assert_close(two.gradients[name], expected, rtol=1e-4, atol=1e-6)
    alone = interpreter(
        interpreted_heads.answers, shuffled(student), shuffled(second), kd.JSD(), {**options, "labels": order[labels]}
    )
    assert float(alone.density.mean()) > float(two.density.mean()) + 0.05


@pytest.mark.parametrize("tolerance", [0.003, 0.1])
def test_the_promise_is_kept_and_used(tolerance: float) -> None:
    """Rows whose norm lies in their first strip, with tails of their own that sum to 0: no mean brings their error down."""
    rows_, width, strip, strips = 10, 8, 64, 30
    tail = 3 * tolerance * (strip * strips) ** -0.5 * torch.linspace(0.7, 1, rows_).unsqueeze(-1)
    gradient = tail * torch.tensor([1.0, -1.0]).repeat(strip * strips // 2)
    gradient[:, :width] += torch.tensor([1.0, -1.0]).repeat(width // 2) / width**0.5
    chooser = TileChooser(rows_, strip * strips, 4, width, tolerance)
    padded = torch.nn.functional.pad(gradient, (0, 0, 0, 2))
    used = torch.empty_like(padded)
    with kd.GradientReport() as report:
        for first in range(0, strip * strips, strip):
            part = padded[:, first : first + strip].unflatten(1, (-1, width))
            notes = TileNotes(part.square().sum(-1).t(), part.sum(-1).t(), torch.zeros(strip // width, 3).int())
            tiles = chooser.choose(notes)
            kept = tiles.kept.t().repeat_interleave(4, 0).unsqueeze(-1)
            used[:, first : first + strip] = torch.where(kept, part, tiles.means.view(-1, 1, 1)).flatten(1)
        chooser.report()
    error = ((used - padded).norm(dim=-1) / padded.norm(dim=-1))[:rows_]
    assert 0.9 * tolerance < float(error.max()) <= tolerance
    torch.testing.assert_close(report.relative_error, error.double(), rtol=1e-4, atol=1e-7)
    assert 0 < float(report.density.mean()) < 1


def test_rows_without_a_norm_are_kept_whole() -> None:
    squares = torch.ones(4, 8)
    squares[2, 5] = torch.nan
    masked = torch.zeros(4, 2, dtype=torch.int32)
    masked[1, 0] = 1
    tiles = TileChooser(8, 16, 4, 4, 0.9).choose(TileNotes(squares, torch.ones(4, 8), masked))
    assert tiles.kept.sum(0).tolist() == [1, 4]
    assert not bool(tiles.means.any())


def test_the_order_of_a_teacher() -> None:
    logits = noise(6, 9)
    logits[:, 4] += 5
    order = kd.vocabulary_order(logits)
    assert order.dtype == torch.int32
    assert torch.equal(order.long(), logits.softmax(-1).mean(0).argsort(descending=True))
    linear = LMHead(torch.eye(9), noise(9, 9, seed=1), softcap=2.0)
    expected = torch.tanh(noise(9, 9, seed=1).t() / 2).mul(2).softmax(-1).mean(0).argsort(descending=True)
    assert torch.equal(kd.vocabulary_order(linear, memory_budget=0).long(), expected)
    assert kd.vocabulary_order(logits, vocab_size=5).tolist()[0] == 4


@pytest.mark.slow
def test_exact_without_a_tolerance_and_with_stochastic_rounding(interpreter: Worker) -> None:
    student, teacher = recovery()
    found = [
        interpreter(interpreted_heads.answers, student, teacher, kd.ForwardKL(), options)
        for options in (
            {},
            {},
            {"gradient_tolerance": 0.2, "gradient_rounding": "stochastic"},
            {"gradient_tolerance": 1e-7},
        )
    ]
    for other in found[1:]:
        assert torch.equal(found[0].value, other.value)
        for name, gradient in found[0].gradients.items():
            assert bool(gradient.any())
            assert torch.equal(gradient, other.gradients[name]), name
    assert not found[2].density.numel()
    assert bool((found[3].density == 1).all())


@pytest.mark.slow
def test_the_tiling_that_is_used_on_a_gpu(interpreter: Worker) -> None:
    sides = head(70, 40, 150, seed=0, bias=True), head(70, 24, 150, seed=4)
    found = interpreter(interpreted_heads.answers, *sides, kd.JSD(), {}, "triton", None)
    truth = interpreted_heads.answers(*sides, kd.JSD(), {}, "reference")
    torch.testing.assert_close(found.value, truth.value, rtol=1e-5, atol=0)
    for name, right in truth.gradients.items():
        assert float((found.gradients[name] - right).norm()) <= 1e-5 * float(right.norm()), name


def plain_side(rows_: int, vocab: int, hidden: int = 4, dtype: torch.dtype = torch.bfloat16) -> rows.Side:
    return rows.Side(torch.empty(rows_, hidden, dtype=dtype), torch.empty(vocab, hidden, dtype=dtype))


def test_which_budgets_leave_no_logits() -> None:
    student, teacher = plain_side(2048, 100), plain_side(2048, 100, 8)
    row = 2 * 100 * 2
    spec = rows.RowSpec(Kind.JSD, 0.5, 0.0)
    enough = chunked_head.EFFICIENT_ROWS * row

    def chosen(budget: int | None, spec: rows.RowSpec = spec, backend: str = "triton") -> bool:
        return chunked_head.without_logits(student, teacher, spec, budget, backend)

    assert chosen(0)
    assert chosen(enough - 1)
    assert not chosen(enough)
    assert not chosen(None)
    assert not chosen(0, backend="cpu")
    assert not chosen(0, spec._replace(targets=torch.zeros(2048, dtype=torch.int64)))
    assert not chosen(0, spec._replace(teacher_composition=rows.Composition()))
    few = plain_side(3, 100), plain_side(3, 100)
    assert not chunked_head.without_logits(*few, spec, 3 * row, "triton")
    assert chunked_head.without_logits(*few, spec, 3 * row - 1, "triton")
    double = plain_side(3, 100, dtype=torch.float64)
    assert not chunked_head.without_logits(double, few[1], spec, 0, "triton")


def test_a_budget_of_nothing_elsewhere() -> None:
    """One token at a time on backends without such kernels."""
    sides = LMHead(noise(5, 8), noise(VOCAB, 8, seed=1)), LMHead(noise(5, 8, seed=2), noise(VOCAB, 8, seed=3))
    values = [kd.distillation_loss(*sides, backend="cpu", memory_budget=budget) for budget in (0, None)]
    torch.testing.assert_close(*values)


LOGIT_KERNELS = ("sweep", "terms", "gradient")
PRODUCT_KERNELS = ("hidden", "weight")


def compile_cases() -> list[Case]:
    """Each kernel on each target, each dtype, each option, and the divergences that need most."""
    jsd, ab, renyi = (int(kind) for kind in (Kind.JSD, Kind.AB, Kind.RENYI))
    cases = [Case("gradient", target, "bf16", ab, everything=True, tolerant=True) for target in TARGETS]
    cases += [Case("gradient", target, "bf16", jsd, everything=True, both=True, tolerant=True) for target in TARGETS]
    cases += [Case("sweep", target, "bf16", renyi, everything=True) for target in TARGETS]
    cases += [Case("terms", target, "bf16", ab, everything=True) for target in TARGETS]
    cases += [Case(kernel, target, "bf16", tolerant=True) for kernel in PRODUCT_KERNELS for target in TARGETS]
    cases += [Case(kernel, "sm_90", "fp16", jsd, everything=True) for kernel in LOGIT_KERNELS]
    cases += [Case(kernel, "sm_90", "fp32", jsd, everything=True) for kernel in LOGIT_KERNELS]
    cases += [Case("sweep", "sm_80", "fp32"), Case("sweep", "sm_100", "bf16", jsd)]
    cases += [Case("gradient", "sm_100", "fp32", ab, everything=True, both=True, tolerant=True)]
    cases += [Case(kernel, "sm_80", "fp32", jsd, everything=True, tf32=True) for kernel in LOGIT_KERNELS]
    cases += [Case(kernel, target, "fp32") for kernel in PRODUCT_KERNELS for target in ("sm_80", "sm_90")]
    # Without lists of tiles their loops are pipelined, and need the most shared memory.
    cases += [Case(kernel, "gfx942", "bf16") for kernel in PRODUCT_KERNELS]
    return [*cases, Case("merge", "sm_90", "bf16", jsd, everything=True), Case("value", "sm_90", "bf16", ab)]


@pytest.mark.slow
@pytest.mark.parametrize("case", compile_cases(), ids=str)
def test_compiles_without_spills(case: Case, compiler: Worker) -> None:
    found = compiler(aot_heads.compiled, case)
    assert found["spilled_bytes"] == 0, found
    assert found["shared"] <= aot_heads.SHARED_MEMORY[case.target], found
    if case.kernel not in ("merge", "value") and (case.dtype != "fp32" or case.tf32):
        assert found["tensor_cores"]


@pytest.mark.slow
def test_numbers_never_recompile(compiler: Worker) -> None:
    """Parameters, temperatures, softcaps, scales and the number of tokens."""
    calls = [(0.3, 0.6, 1.0, 1.0, 30.0, 5.0, 1.0, 1.0, 64), (1.0, 1e-3, 16.0, 0.5, 1.0, 64.0, 0.0625, 8.0, 4097)]
    one, other = (compiler(aot_heads.launched, numbers, "sm_90") for numbers in calls)
    assert one == other
    # One of each kernel, of `hidden` that which starts dH and that which adds to it.
    assert len(one) == len((*LOGIT_KERNELS, "merge", "value", *PRODUCT_KERNELS)) + 1


def test_every_divergence_is_tested() -> None:
    assert {divergence.form.kind for divergence in DIVERGENCES} == set(Kind)

"""``mass_threshold`` and ``head_tail_gap`` against a walk down the sorted probabilities in float64.

Which entry crosses the mass is not determined where the sums come within rounding of it: the random rows here keep away.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import check
from pairs import each_pairing, make, sources
from test_operators import compiled, graphs, recorded
from torch import Tensor
from truth import LOGIT_FLOOR, compute_dtype, each_dtype

import kdkernels as kd

BACKENDS = ("cpu", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    exact = logits.double().clamp(min=LOGIT_FLOOR)
    return ((exact - exact.amax(-1, keepdim=True)) / temperature).softmax(-1)


def walk(logits: Tensor, mass: float, temperature: float = 1.0, crossing: bool = False) -> float:
    """The lowest logit of the head of one row: from each distinct logit to the next lower."""
    exact, p = logits.double().clamp(min=LOGIT_FLOOR), probabilities(logits, temperature)
    lowest, held = math.nan, 0.0
    for place, value in enumerate(exact.unique().flip(0).tolist()):
        upto = float(p[exact >= value].sum())
        if place > 0 and upto > mass and mass < 1:
            return value if crossing and held < mass else lowest
        lowest, held = value, upto
    return lowest


def assert_thresholds(logits: Tensor, mass: float, backend: str, **options: Any) -> None:
    found = kd.mass_threshold(logits, mass, backend=backend, **options)
    assert found.dtype == compute_dtype(logits.dtype)
    expected = torch.tensor([walk(row, mass, **options) for row in logits], dtype=torch.float64)
    assert torch.equal(found.double(), expected), (found, expected)


@each_backend
@each_dtype
@pytest.mark.parametrize("mass", [0.0, 0.5, 0.93, 1.0])
def test_thresholds(backend: str, dtype: torch.dtype, mass: float) -> None:
    """Half types have many equal logits."""
    assert_thresholds(normal(3, 301).to(dtype), mass, backend)
    assert_thresholds(normal(2, 70, spread=30).to(dtype), mass, backend, temperature=7.0, crossing=True)


ROWS = {
    "constant": torch.zeros(40),
    "two values": torch.arange(40) % 2 * 1.0,
    "one above all": torch.cat([torch.tensor([90.0]), torch.linspace(-3, 3, 50)]),
    "masked": torch.where(torch.arange(60) % 3 > 0, -math.inf, torch.linspace(-1, 1, 60)),
    "all masked": torch.full((30,), -math.inf),
    "far apart": torch.linspace(-1e4, 1e4, 33),
    "single": torch.tensor([0.3]),
    "next floats": 1 + torch.arange(64) * 2.0**-23,
}


@each_backend
@pytest.mark.parametrize("row", ROWS)
def test_hard_rows(backend: str, row: str) -> None:
    for mass in (0.0, 0.3, 0.51, 0.99, 1.0):
        for crossing in (False, True):
            assert_thresholds(ROWS[row].unsqueeze(0), mass, backend, crossing=crossing)


@pytest.mark.parametrize("mass", [0.01, 0.5, pytest.param(0.999, marks=pytest.mark.slow)])
def test_long_rows(mass: float) -> None:
    """Many blocks, and more candidates than a block has; the sums themselves say whether the threshold is right."""
    for logits in (normal(1, 20_011).float(), normal(1, 20_011, spread=0.01).float(), normal(1, 9_001).bfloat16()):
        p, threshold = probabilities(logits), kd.mass_threshold(logits, mass, backend="cpu").double()
        head = logits.double() >= threshold
        below = logits.double().masked_fill(head, -math.inf).amax()
        assert bool((logits.double() == threshold).any())
        assert float(p[head].sum()) <= mass + 1e-6 or bool((logits.double()[head] == logits.double().amax()).all())
        assert float(p[logits.double() >= below].sum()) >= mass - 1e-6


@each_backend
def test_mass_and_temperature_per_token(backend: str) -> None:
    logits, mass = normal(2, 3, 90).float(), torch.tensor([[0.2, 0.5, 1.0], [0.7, 0.0, 0.9]])
    temperature = torch.tensor([[0.5, 1.0, 2.0], [1.0, 3.0, 0.7]])
    found = kd.mass_threshold(logits, mass, temperature=temperature, backend=backend)
    one_by_one = [
        kd.mass_threshold(*row[:2], temperature=row[2], backend=backend)
        for row in zip(logits.view(6, 90), mass.view(6).tolist(), temperature.view(6).tolist(), strict=True)
    ]
    assert torch.equal(found, torch.stack(one_by_one).view(2, 3))


@each_dtype
@pytest.mark.parametrize("mass", [0.4, 1.0])
def test_gaps(dtype: torch.dtype, mass: float) -> None:
    student, teacher = normal(4, 300).to(dtype), normal(4, 300, seed=1).to(dtype)

    def by_formula(precision: torch.dtype) -> list[Tensor]:
        q, p = ((side.to(precision) / 1.5).softmax(-1) for side in (student, teacher))
        exact = torch.stack([row.double() >= walk(row, mass, 1.5) for row in teacher])
        gap = (p - q).abs()
        return [(gap * exact).sum(-1), (gap * ~exact).sum(-1)]

    found = kd.head_tail_gap(student, teacher, mass, temperature=1.5)
    truth, plain = by_formula(torch.float64), by_formula(compute_dtype(dtype))
    for name, ours, rough, exact in zip(("head", "tail"), found, plain, truth, strict=True):
        check(name, ours, rough, exact, torch.ones_like(exact))


@each_pairing
def test_pairings_and_chunks(pairing: str) -> None:
    tensors = make(pairing, dtype=torch.float64, grad=False)
    student, teacher = sources(tensors, softcap=6.0, logit_scale=0.7) if "head" in pairing else sources(tensors)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    options: dict[str, Any] = {"temperature": 1.3, "teacher_temperature": 0.8, "mask": mask, "vocab_size": 33}
    expected = kd.reference.head_tail_gap(student, teacher, 0.6, **options)
    found = kd.head_tail_gap(student, teacher, 0.6, memory_budget=1, **options)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)
        assert bool((ours[~mask] == 0).all())


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_shows(backend: str, bad: float) -> None:
    logits = normal(2, 50).float()
    logits[1, 7] = bad
    assert kd.mass_threshold(logits, 0.5, backend=backend).isnan().tolist() == [False, True]
    for sides in ((logits, logits.flip(0)), (logits.nan_to_num(0, 0), logits)):
        gaps = kd.head_tail_gap(*sides, backend=backend)
        assert all(bool(gap[1].isnan()) for gap in gaps)


@each_backend
def test_no_rows_no_gradient_and_not_contiguous(backend: str) -> None:
    assert kd.mass_threshold(torch.zeros(0, 5), 0.5, backend=backend).shape == (0,)
    logits = normal(40, 3).float().t().requires_grad_()
    found = kd.mass_threshold(logits, 0.5, backend=backend)
    assert not found.requires_grad
    assert torch.equal(found, kd.mass_threshold(logits.detach().contiguous(), 0.5, backend=backend))


def test_threads_make_no_difference() -> None:
    student, teacher = normal(9, 8_003).float(), normal(9, 8_003, seed=1).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.stack(kd.head_tail_gap(student, teacher)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def calls(pairing: str) -> list[Any]:
    student, teacher = sources(make(pairing, grad=False))
    return recorded(lambda: (kd.head_tail_gap(student, teacher), kd.mass_threshold(teacher, torch.full((2, 5), 0.3))))


@pytest.mark.slow
def test_opcheck() -> None:
    found = calls("head-logits")
    assert [operator._opname for operator, _ in found] == ["head_mass"] * 2
    for operator, arguments in found:
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
def test_compiled_and_changing_numbers_do_not_recompile() -> None:
    torch._dynamo.reset()
    student, teacher = normal(5, 37).float(), normal(5, 37, seed=1).float()

    def both(mass: float) -> Tensor:
        return torch.stack([kd.mass_threshold(teacher, mass), *kd.head_tail_gap(student, teacher, mass)])

    call = compiled(both)
    before = graphs()
    for mass in (0.2, 0.4, 0.6, 0.8):
        assert torch.equal(call(mass), both(mass))
    assert graphs() - before <= 2


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((torch.zeros(2, 3), 1.1), {}, "mass must be in"),
        ((torch.zeros(2, 3), torch.tensor([0.5, -0.1])), {}, "mass must be in"),
        ((torch.zeros(2, 3), torch.ones(3)), {}, "mass must have one entry per token"),
        ((torch.zeros(2, 3), 0.5), {"temperature": 0.0}, "temperature"),
        ((torch.zeros(2, 3), 0.5), {"memory_budget": -1}, "memory_budget"),
    ],
)
def test_refused(arguments: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kd.mass_threshold(*arguments, **options)


def test_refused_pairs() -> None:
    with pytest.raises(ValueError, match="vocabularies of 3 and 4"):
        kd.head_tail_gap(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="crossing must be True or False"):
        kd.head_tail_gap(torch.zeros(2, 3), torch.zeros(2, 3), crossing=1)  # type: ignore[arg-type]

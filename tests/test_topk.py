"""``topk_logits`` and ``sample_logits`` against sorting and plain sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_operators import recorded
from torch import Tensor
from truth import LOGIT_FLOOR, Head, compute_dtype, each_dtype, random_logits

import kdkernels as kd
from kdkernels.backends import native

BACKENDS = ("cpu", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
INFINITY, NAN = math.inf, math.nan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Truth(NamedTuple):
    """``[..., k]``, ``[..., k]``, ``[...]``, in float64."""

    ids: Tensor
    log_probs: Tensor
    log_tail_mass: Tensor


def truth(logits: Tensor, k: int, temperature: float = 1.0, softcap: float | None = None) -> Truth:
    """By sorting, of rows without masked entries; the tail is the log-sum-exp of what it is made of."""
    exact = logits.double()
    ids = torch.sort(exact, dim=-1, descending=True, stable=True).indices[..., :k]
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
    log_p = torch.log_softmax((exact - exact.amax(-1, keepdim=True)) / temperature, -1)
    return Truth(ids, log_p.gather(-1, ids), torch.logsumexp(log_p.scatter(-1, ids, -INFINITY), -1))


ROUNDINGS = {torch.float32: 8, torch.float64: 200}
"""How many a sum of exponentials may err by. In float64 the truth itself is no better than that."""


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """To a few roundings of the number, and those of the normaliser, whose logarithm turns relative errors into absolute."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=4 * eps, atol=ROUNDINGS[ours.dtype] * eps, equal_nan=True)


def assert_is(found: kd.TopKLogits, exact: Truth) -> None:
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, exact.ids)
    assert found.log_tail_mass is not None
    assert_close(found.log_probs, exact.log_probs)
    assert_close(found.log_tail_mass, exact.log_tail_mass)


def check_topk(logits: Tensor, k: int, backend: str, temperature: float = 1.0) -> None:
    found = kd.topk_logits(logits, k, temperature=temperature, backend=backend)
    assert found.log_probs.dtype == compute_dtype(logits.dtype)
    assert (found.vocab_size, found.temperature, found.tail) == (logits.shape[-1], temperature, "bucket")
    assert_is(found, truth(logits, k, temperature))


SIZES = [(1, 1), (2, 1), (2, 2), (127, 5), (127, 127), (1025, 64), (4097, 64), (4097, 4097)]
LARGE = [(4097, 1), (4097, 4096), (151_936, 64), (151_936, 5000)]


@pytest.mark.parametrize(
    ("vocab", "k"), [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGE)], ids="{}".format
)
@each_dtype
@each_backend
def test_equals_sorting(backend: str, dtype: torch.dtype, vocab: int, k: int) -> None:
    """Half types have many equal logits, so the order of ties is tested with them."""
    check_topk(random_logits(vocab, dtype)[0], k, backend)


def ramp(vocab: int, steps: int) -> Tensor:
    """``vocab`` rising logits of as many different values as ``steps``."""
    return (torch.arange(vocab) * steps // vocab).double() * (8 / steps)


ORDERS: dict[str, Callable[[int], Tensor]] = {
    "ascending": lambda vocab: ramp(vocab, vocab),
    "descending": lambda vocab: ramp(vocab, vocab).flip(-1),
    "ascending in steps": lambda vocab: ramp(vocab, vocab // 100),
    "constant": lambda vocab: torch.full((vocab,), 3.0),
    "two values": lambda vocab: (torch.arange(vocab) % 150 == 7).double(),
    "zeros of both signs": lambda vocab: torch.where(torch.arange(vocab) % 3 == 0, -0.0, 0.0),
    "negative, all different": lambda vocab: -1 - ramp(vocab, vocab)[torch.randperm(vocab, generator=generator())],
    "10000 and -10000": lambda vocab: 1e4 * torch.randn(vocab, generator=generator()).sign(),
    "around 10000": lambda vocab: 1e4 + torch.randn(vocab, generator=generator()),
    "thousands apart": lambda vocab: 1e4 * torch.randn(vocab, generator=generator()),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 64, 700])
@each_backend
def test_orders(backend: str, k: int, order: str) -> None:
    """Rows in which a threshold is of no use, or in which much is equal to it."""
    logits = ORDERS[order](5000)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_topk(logits.to(dtype).unsqueeze(0), k, backend, temperature=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_ties(seed: int) -> None:
    """Small integers in every length and k: the places where blocks, candidates and ties meet."""
    source = generator(seed)
    for _ in range(25):
        vocab, k, values = (int(torch.randint(1, most, (), generator=source)) for most in (6000, 400, 40))
        logits = torch.randint(values, (2, vocab), generator=source).float()
        if seed % 2:
            logits = logits.sort(-1).values
        check_topk(logits, min(k, vocab), "cpu")


@pytest.mark.parametrize("distance", [12.0, 60.0, 100.0, 200.0, 2e4])
@each_dtype
@each_backend
def test_a_small_tail_keeps_its_digits(backend: str, dtype: torch.dtype, distance: float) -> None:
    """A tail of 1e-20 and less is nothing as a difference from 1; e^-200 even underflows."""
    logits = random_logits(3000)[0].clamp(-8, 8)
    logits[:, 100:140] += distance
    logits = logits.to(dtype)
    found, exact = kd.topk_logits(logits, 40, backend=backend), truth(logits, 40)
    assert bool((exact.log_tail_mass < 15 - 0.99 * distance).all())
    assert_is(found, exact)
    lost = torch.log1p(-found.log_probs.exp().sum(-1).clamp(max=1))
    assert distance < 40 or bool(((lost - exact.log_tail_mass).abs() > 1).all()), "the test would not see cancellation"


@each_backend
def test_softcap(backend: str) -> None:
    """Saturated logits are equal after the cap, and still in the order they had before."""
    hidden = torch.tensor([[1.0], [1e3], [-1e3]])
    weight = torch.randn(3000, 1, generator=generator())
    found = kd.topk_logits(kd.LMHead(hidden, weight, softcap=5.0), 50, temperature=0.6, backend=backend)
    assert_is(found, truth(hidden @ weight.t(), 50, 0.6, softcap=5.0))
    assert len(found.log_probs[1].unique()) == 1


@each_backend
def test_masked_entries_are_never_named(backend: str) -> None:
    """Not by -inf, not by the lowest finite number; where nothing else is, the ids are -1."""
    for lowest in (-INFINITY, torch.finfo(torch.float32).min, LOGIT_FLOOR):
        logits = random_logits(3000)[0][:4]
        logits[0, ::2] = lowest
        logits[1, 10:] = lowest
        logits[2, :] = lowest
        found = kd.topk_logits(logits, 20, backend=backend)
        assert_close(found.log_probs[0], truth(logits[:1, 1::2], 20).log_probs[0])
        assert torch.equal(found.ids[0], truth(logits[:1, 1::2], 20).ids[0] * 2 + 1)
        few = truth(logits[1:2, :10], 10)
        assert torch.equal(found.ids[1, :10], few.ids[0])
        assert_close(found.log_probs[1, :10], few.log_probs[0])
        assert found.log_tail_mass is not None
        assert float(found.log_tail_mass[1]) < -9e4
        for row, entries in ((1, 10), (2, 0)):
            assert bool((found.ids[row, entries:] == -1).all())
            assert bool((found.log_probs[row, entries:] == -INFINITY).all())
        assert abs(float(found.log_tail_mass[2])) < 1e-6
        assert_close(found.log_probs[3], truth(logits[3], 20).log_probs)


@pytest.mark.parametrize("bad", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 1500, 2999])
@each_backend
def test_a_token_without_a_distribution_shows(backend: str, place: int, bad: float) -> None:
    logits = random_logits(3000)[0]
    expected = truth(logits, 30)
    logits[1, place] = bad
    found = kd.topk_logits(logits, 30, top_p=0.99, backend=backend)
    assert found.log_tail_mass is not None
    assert bool((found.ids[1] == -1).all())
    assert bool(found.log_probs[1].isnan().all())
    assert bool(found.log_tail_mass[1].isnan())
    others = kd.topk_logits(logits, 30, backend=backend)
    assert torch.equal(others.ids[[0, 2, 3]], expected.ids[[0, 2, 3]])
    sampled = kd.sample_logits(logits, 5, generator=generator(), backend=backend)
    assert sampled.entropy is not None
    assert sampled.ids[1].tolist() == [-1] * 5
    assert bool(sampled.weights[1].isnan().all())
    assert bool(sampled.entropy[1].isnan())
    assert bool((sampled.ids[[0, 2]] >= 0).all())
    assert bool(sampled.entropy[[0, 2]].isfinite().all())


def prefix(log_p: Tensor, top_p: float) -> int:
    """The length of the shortest prefix of a row whose probability reaches ``top_p``."""
    mass = 0.0
    for length, log_prob in enumerate(log_p.tolist(), 1):
        mass += math.exp(log_prob)
        if mass >= top_p:
            return length
    return len(log_p)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.9999, 1.0])
@each_backend
def test_top_p(backend: str, top_p: float) -> None:
    logits = random_logits(500)[0]
    exact = truth(logits, 40)
    found = kd.topk_logits(logits, 40, top_p=top_p, backend=backend)
    assert found.log_tail_mass is not None
    lengths = [40 if top_p == 1 else prefix(row, top_p) for row in exact.log_probs]
    assert top_p not in (0.3, 0.9) or len(set(lengths)) > 2, "no raggedness is tested"
    for row, length in enumerate(lengths):
        assert torch.equal(found.ids[row, :length], exact.ids[row, :length])
        assert_close(found.log_probs[row, :length], exact.log_probs[row, :length])
        assert found.ids[row, length:].tolist() == [-1] * (40 - length)
        assert bool((found.log_probs[row, length:] == -INFINITY).all())
        assert_close(found.log_tail_mass[row], truth(logits[row], length).log_tail_mass)


@each_backend
def test_top_p_of_equal_probabilities(backend: str) -> None:
    """Half of the probability is reached by half of the ids, not by one more."""
    found = kd.topk_logits(torch.zeros(64), 60, top_p=0.5, backend=backend)
    assert found.ids.tolist() == [*range(32), *[-1] * 28]
    assert found.log_tail_mass is not None
    assert_close(found.log_tail_mass, torch.tensor(0.5, dtype=torch.float64).log())


@each_backend
def test_nothing_is_left_of_a_whole_vocabulary(backend: str) -> None:
    found = kd.topk_logits(random_logits(90)[0], 90, backend=backend)
    assert found.log_tail_mass is not None
    assert bool((found.log_tail_mass == -INFINITY).all())
    assert found.log_probs.double().exp().sum(-1).tolist() == pytest.approx([1] * 6, abs=1e-6)
    cut = kd.topk_logits(random_logits(90)[0], 90, top_p=0.5, backend=backend)
    assert cut.log_tail_mass is not None
    assert bool((cut.log_tail_mass > -5).all())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda logits: logits.t().contiguous().t(),
    "every other entry": lambda logits: logits.repeat_interleave(2, -1)[:, ::2],
    "every other row": lambda logits: logits.repeat_interleave(2, 0)[::2],
    "inside a wider matrix": lambda logits: torch.cat([logits + 9, logits, logits + 9], -1)[
        :, logits.shape[1] : -logits.shape[1]
    ],
}


@pytest.mark.parametrize("view", VIEWS)
@each_backend
def test_views(backend: str, view: str) -> None:
    logits = random_logits(131)[0]
    viewed = VIEWS[view](logits)
    assert torch.equal(viewed, logits)
    assert view == "every other row" or not viewed.is_contiguous()
    for temperature in (1.0, 2.5):
        assert_is(kd.topk_logits(viewed, 9, temperature=temperature, backend=backend), truth(logits, 9, temperature))
        options: dict[str, Any] = {"proposal_temperature": temperature, "backend": backend}
        one, other = (kd.sample_logits(each, 9, generator=generator(), **options) for each in (viewed, logits))
        assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3, 2), (0,), (2, 0, 3)], ids=str)
@each_backend
def test_batches(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 50, generator=generator())
    head = kd.LMHead(torch.randn(*shape, 4, generator=generator()), torch.randn(50, 4, generator=generator()))
    for source in (logits, kd.Logits(logits), head):
        found = kd.topk_logits(source, 7, top_p=0.9, backend=backend)
        assert found.ids.shape == found.log_probs.shape == (*shape, 7)
        assert found.log_tail_mass is not None
        assert found.log_tail_mass.shape == found.batch_shape == shape
        sampled = kd.sample_logits(source, 3, backend=backend)
        assert sampled.entropy is not None
        assert sampled.ids.shape == sampled.weights.shape == (*shape, 3)
        assert sampled.entropy.shape == sampled.batch_shape == shape
    if logits.numel():
        assert_is(kd.topk_logits(logits, 7, backend=backend), truth(logits, 7))


def some_head(dtype: torch.dtype = torch.float64, **options: Any) -> Head:
    source = generator()
    shapes = {"hidden": (2, 9, 12), "weight": (300, 12), "bias": (300,)}
    tensors = [torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes.values()]
    return Head(*tensors, **options)


HEADS: dict[str, Head] = {
    "float64": some_head(logit_scale=0.7),
    "softcap": some_head(logit_scale=3.0, softcap=4.0),
    "negative scale": some_head(logit_scale=-1.2),
    "bfloat16": some_head(torch.bfloat16),
}


@pytest.mark.parametrize("memory_budget", [1, 300 * 8 * 5, None], ids="budget_{}".format)
@pytest.mark.parametrize("name", HEADS)
@each_backend
def test_heads(backend: str, name: str, memory_budget: int | None) -> None:
    """The same as of their logits, however they are cut."""
    head = HEADS[name]
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)[..., :290]
    logits = logits if head.logit_scale is None else logits * head.logit_scale
    arguments: dict[str, Any] = {"vocab_size": 290, "memory_budget": memory_budget, "backend": backend}
    found = kd.topk_logits(head.source(), 20, temperature=0.8, **arguments)
    assert found.vocab_size == 290
    exact = truth(logits, 20, 0.8, head.softcap)
    if name != "bfloat16":  # where matrix products round differently, and close logits change their order
        assert torch.equal(found.ids, exact.ids)
    tolerance = 0.1 if name == "bfloat16" else 1e-12
    assert found.log_tail_mass is not None
    torch.testing.assert_close(found.log_probs.double(), exact.log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.log_tail_mass.double(), exact.log_tail_mass, rtol=tolerance, atol=tolerance)
    uniform = kd.sample_logits(head.source(), 20, generator=generator(), temperature=0.8, **arguments)
    capped = logits.double() if head.softcap is None else head.softcap * torch.tanh(logits.double() / head.softcap)
    other = kd.sample_logits(capped, 20, generator=generator(), temperature=0.8, backend="reference")
    if name != "bfloat16":
        assert torch.equal(uniform.ids, other.ids)
    assert uniform.entropy is not None
    assert other.entropy is not None
    torch.testing.assert_close(uniform.entropy.double(), other.entropy, rtol=tolerance, atol=tolerance)


@each_backend
def test_autocast_makes_the_logits_of_a_head(backend: str) -> None:
    head = some_head(torch.float32)
    half = Head(*(tensor.bfloat16() for tensor in head[:3]))  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd.topk_logits(head.source(), 5, backend=backend)
    expected = kd.topk_logits(half.source(), 5, backend=backend)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.log_probs, expected.log_probs)


@each_backend
def test_no_gradient(backend: str) -> None:
    logits = torch.randn(4, 30, generator=generator(), requires_grad=True)
    found, sampled = kd.topk_logits(logits, 3, backend=backend), kd.sample_logits(logits, 3, backend=backend)
    tensors = found.log_probs, found.log_tail_mass, sampled.weights, sampled.entropy
    assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)


# --- sampling ----------------------------------------------------------------------------------------------------------


def drawn(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(ids by the definition of the inverse distribution function, how far each number is from another id), in float64."""
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    distance = (uniforms.unsqueeze(-1) - cumulative.unsqueeze(-2)).abs().amin(-1)
    return torch.searchsorted(cumulative, uniforms, right=True), distance


@pytest.mark.parametrize("vocab", [1, 2, 127, 4097], ids="V{}".format)
@pytest.mark.parametrize("proposal", [1.0, 2.5])
@each_dtype
@each_backend
def test_draws_invert_the_distribution(backend: str, dtype: torch.dtype, proposal: float, vocab: int) -> None:
    check_draws(backend, dtype, proposal, vocab)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", [1.0, 2.5])
@each_dtype
def test_draws_of_a_large_vocabulary(dtype: torch.dtype, proposal: float) -> None:
    check_draws("cpu", dtype, proposal, 151_936)


def check_draws(backend: str, dtype: torch.dtype, proposal: float, vocab: int) -> None:
    logits = random_logits(vocab, dtype)[0]
    found = kd.sample_logits(
        logits, 20, generator=generator(), temperature=0.8, proposal_temperature=proposal, backend=backend
    )
    assert (found.vocab_size, found.temperature) == (vocab, 0.8)
    uniforms = torch.rand(len(logits), 20, generator=generator(), dtype=torch.float64)
    ids, distance = drawn(logits, uniforms, 0.8 * proposal)
    rounding = 200 * torch.finfo(found.weights.dtype).eps
    assert torch.equal(found.ids[distance > rounding], ids[distance > rounding])
    log_p, log_q = (torch.log_softmax(logits.double() / tau, -1) for tau in (0.8, 0.8 * proposal))
    if proposal == 1:
        assert torch.equal(found.weights, torch.full_like(found.weights, 1 / 20))
    torch.testing.assert_close(
        found.weights.double(), (log_p - log_q).exp().gather(-1, found.ids) / 20, rtol=rounding, atol=0.0
    )
    assert found.entropy is not None
    assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1))


@each_backend
def test_masked_entries_are_never_drawn(backend: str) -> None:
    logits = random_logits(3000)[0][:3]
    logits[0, 100:2900] = -INFINITY
    logits[1, 1:] = LOGIT_FLOOR
    logits[2] = -INFINITY
    for temperature in (1.0, 1e6):
        found = kd.sample_logits(logits, 500, generator=generator(), temperature=temperature, backend=backend)
        assert bool(((found.ids[0] < 100) | (found.ids[0] >= 2900)).all())
        assert bool((found.ids[0] >= 2900).any())
        assert bool((found.ids[1] == 0).all())
        assert bool((found.ids[2] == -1).all())
        assert found.entropy is not None
        assert found.weights[2].abs().max() == found.entropy[2] == 0
        assert found.weights[:2].sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)


@each_backend
def test_draws_of_the_ends_of_the_interval(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 and the number below 1 draw the first and the last id that can be drawn, whatever stands around them."""
    logits = torch.zeros(4, 2500, dtype=torch.float64)
    logits[1, :2000] = -500
    logits[2, 2000:] = -INFINITY
    logits[3] = torch.linspace(0, 300, 2500)
    uniforms = torch.tensor([0.0, 1 - 2.0**-53]).double().expand(4, 2)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniforms.contiguous())
    for dtype in (torch.float32, torch.float64):
        ids = kd.sample_logits(logits.to(dtype), 2, backend=backend).ids
        assert ids[0].tolist() == [0, 2499]
        assert ids[1, 1] == 2499
        assert ids[2].tolist() == [0, 1999]
        assert ids[3, 1] == 2499


@each_backend
def test_draws_are_reproducible(backend: str) -> None:
    """By the generator, or the default one; whatever the budget and the number of threads."""
    head = some_head()
    first = kd.sample_logits(head.source(), 6, generator=generator(1), backend=backend)
    for budget in (1, 10_000):
        again = kd.sample_logits(head.source(), 6, generator=generator(1), memory_budget=budget, backend=backend)
        assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, kd.sample_logits(head.source(), 6, generator=generator(2), backend=backend).ids)
    used = generator(1)
    kd.sample_logits(head.source(), 6, generator=used, backend=backend)
    assert not torch.equal(first.ids, kd.sample_logits(head.source(), 6, generator=used, backend=backend).ids)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first.ids, kd.sample_logits(head.source(), 6, backend=backend).ids)


def test_backends_draw_alike() -> None:
    logits = random_logits(2000, torch.float64)[0]
    ours, reference = (kd.sample_logits(logits, 200, generator=generator(), backend=backend) for backend in BACKENDS)
    assert torch.equal(ours.ids, reference.ids)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    logits = torch.randn(40, 5000, generator=generator())
    expected = kd.topk_logits(logits, 10), kd.sample_logits(logits, 10, generator=generator())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = kd.topk_logits(logits, 10), kd.sample_logits(logits, 10, generator=generator())
    finally:
        torch.set_num_threads(before)
    for ours, one in zip(found, expected, strict=True):
        assert torch.equal(ours.ids, one.ids)
    assert torch.equal(found[0].log_probs, expected[0].log_probs)
    assert torch.equal(found[1].weights, expected[1].weights)


TOKENS = 4000
Estimator = Callable[[Tensor], kd.SampledLogits]


def deviation(ids: Tensor, weights: Tensor, teacher: Tensor, student: Tensor) -> float:
    """By how many standard errors the mean gradient of the forward KL, over many draws, misses the dense one at worst.

    ``sum_j w_j log q(id_j)`` has the gradient ``w at the ids - q sum(w)`` to the student's logits. Improbable entries are
    summed in groups, of which enough are drawn for their means to be normally distributed.
    """
    p, q = (torch.softmax(logits.double(), -1) for logits in (teacher, student))
    rank = p.argsort(descending=True).argsort()
    group = torch.where(rank < 20, rank, 20 + (rank - 20) // 86)
    count = int(group.max()) + 1

    def summed(entries: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).scatter_add(0, group, entries)

    named = torch.zeros(len(ids), count, dtype=torch.float64).scatter_add(-1, group[ids], weights.double())
    gradients = summed(q) * weights.double().sum(-1, keepdim=True) - named
    error = gradients.mean(0) - summed(q - p)
    # From below, for estimators that do not vary at all.
    spread = gradients.std(0).clamp(min=1e-5) / math.sqrt(len(ids))
    return float((error.abs() / spread).max())


def teacher_and_student() -> tuple[Tensor, Tensor]:
    """Zipf's law in random places, over three blocks of the kernel; another student."""
    vocab = 2600
    places = torch.randperm(vocab, generator=generator())
    teacher = -1.1 * torch.log(torch.arange(1, vocab + 1))[places]
    return teacher, teacher + torch.randn(vocab, generator=generator(1))


@pytest.mark.parametrize("proposal", [1.0, 1.6, 0.8])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_sampled_gradients_are_unbiased(backend: str, proposal: float) -> None:
    """Of 50 groups one misses by more than 4.5 standard errors in 3000 seeds; the seed is fixed."""
    teacher, student = teacher_and_student()
    found = kd.sample_logits(
        teacher.expand(TOKENS, -1), 12, generator=generator(5), proposal_temperature=proposal, backend=backend
    )
    assert deviation(found.ids, found.weights, teacher, student) < 4.5


@pytest.mark.slow
def test_biased_estimators_would_be_seen() -> None:
    """The bound of the test above: what is known to be biased exceeds it by far."""
    teacher, student = teacher_and_student()
    rows = teacher.expand(TOKENS, -1)
    sampled = kd.sample_logits(rows, 12, generator=generator(5), proposal_temperature=1.6)
    plain = torch.full_like(sampled.weights, 1 / 12)
    assert deviation(sampled.ids, plain, teacher, student) > 10, "without importance weights"
    normalised = sampled.weights / sampled.weights.sum(-1, keepdim=True)
    assert deviation(sampled.ids, normalised, teacher, student) > 10, "weights that sum to 1"
    exact = kd.sample_logits(rows, 12, generator=generator(5))
    assert deviation((exact.ids + 1) % 2600, exact.weights, teacher, student) > 10, "off by one"
    coarse = kd.sample_logits(rows, 12, generator=generator(5), temperature=1.1)
    assert deviation(coarse.ids, coarse.weights, teacher, student) > 10, "another temperature"
    top = kd.topk_logits(rows, 50)
    assert deviation(top.ids, top.log_probs.exp(), teacher, student) > 10, "top-k without its tail"
    renormalised = torch.softmax(top.log_probs, -1)
    assert deviation(top.ids, renormalised, teacher, student) > 10, "top-k renormalised"


# --- arguments ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before a kernel runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel was called")

    if native.module is not None:
        monkeypatch.setattr(native.module, "topk", refuse)
        monkeypatch.setattr(native.module, "sample", refuse)


LOGITS = torch.zeros(2, 3, 7)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"source": None}, TypeError, "source must be a tensor of logits, kd.Logits or kd.LMHead, got NoneType"),
    ({"source": LOGITS.long()}, TypeError, r"source: logits must have one of the dtypes.*torch.int64"),
    ({"source": torch.tensor(1.0)}, ValueError, r"source: logits must have the shape \[..., V\], got a 0-d tensor"),
    ({"source": torch.zeros(2, 0)}, ValueError, r"source: the vocabulary is empty, shape \(2, 0\)"),
    (
        {"source": torch.zeros(1, 1).expand(1, 2**24 + 1)},
        ValueError,
        "source: the vocabulary must have at most 16777216 entries, got 16777217",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number, got 0.0"),
    ({"temperature": torch.ones(2, 3)}, TypeError, "temperature must be a positive finite number, got tensor"),
    ({"vocab_size": 8}, ValueError, "vocab_size must be between 1 and the source's vocabulary of 7, got 8"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be None or a number of bytes, 0 or more, got -1"),
    ({"backend": "gpu"}, ValueError, "backend must be None or one of reference, cpu, triton, cuda, got 'gpu'"),
]
TOPK_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 8}, ValueError, "k must be at most the source's vocabulary of 7, got 8"),
    ({"k": 7, "vocab_size": 6}, ValueError, "k must be at most the source's vocabulary of 6, got 7"),
    ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
    ({"top_p": 0.0}, ValueError, r"top_p must be None or in \(0, 1\], got 0.0"),
    ({"top_p": 1.01}, ValueError, r"top_p must be None or in \(0, 1\], got 1.01"),
    ({"top_p": NAN}, ValueError, "top_p must be a finite number, got nan"),
    ({"top_p": "all"}, TypeError, "top_p must be a finite number, got 'all'"),
]
SAMPLE_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n": 0}, ValueError, "n must be at least 1, got 0"),
    ({"n": True}, TypeError, "n must be an integer, got True"),
    ({"proposal_temperature": -1.0}, ValueError, "proposal_temperature must be a positive finite number, got -1.0"),
    ({"generator": 7}, TypeError, "generator must be None or a torch.Generator, got 7"),
]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("changed", "error", "text"), REFUSED + TOPK_REFUSED, ids=str)
def test_topk_refuses(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"source": LOGITS, "k": 2, **changed}
    with pytest.raises(error, match=text):
        kd.topk_logits(**arguments)
    if not {"memory_budget", "backend"} & changed.keys():
        with pytest.raises(error, match=text):
            kd.reference.topk_logits(**arguments)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("changed", "error", "text"), REFUSED + SAMPLE_REFUSED, ids=str)
def test_sampling_refuses(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"source": LOGITS, "n": 2, **changed}
    with pytest.raises(error, match=text):
        kd.sample_logits(**arguments)
    if not {"memory_budget", "backend"} & changed.keys():
        with pytest.raises(error, match=text):
            kd.reference.sample_logits(**arguments)


# --- operators ---------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[], Any]] = {
    "logits": lambda: torch.randn(2, 5, 37, generator=generator()),
    "head": lambda: some_head(torch.float32, softcap=20.0).source(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_opcheck(name: str) -> None:
    source = SOURCES[name]()
    calls = recorded(lambda: kd.topk_logits(source, 5, top_p=0.9))
    calls += recorded(lambda: kd.sample_logits(source, 5, proposal_temperature=2.0))
    assert [operator._opname for operator, _ in calls] == ["topk", "sample"]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_compiled(name: str) -> None:
    source = SOURCES[name]()

    def picked(source: Any, temperature: float, top_p: float) -> tuple[Tensor | None, ...]:
        found = kd.topk_logits(source, 5, temperature=temperature, top_p=top_p)
        return found.ids, found.log_probs, found.log_tail_mass

    def sampled(source: Any, temperature: float, proposal: float) -> tuple[Tensor | None, ...]:
        found = kd.sample_logits(source, 5, temperature=temperature, proposal_temperature=proposal)
        return found.ids, found.weights, found.entropy

    for function in (picked, sampled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for temperature, other in ((1.0, 0.9), (0.7, 0.8), (1.9, 0.7), (2.5, 0.6)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                ours = compiled(source, temperature, other)
                torch.manual_seed(0)
                torch.testing.assert_close(ours, function(source, temperature, other))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


def test_reference_in_a_transformation() -> None:
    logits = random_logits(40)[0]
    mapped = torch.func.vmap(lambda rows: kd.topk_logits(rows, 5).log_probs)(logits)
    torch.testing.assert_close(mapped, kd.topk_logits(logits, 5).log_probs)

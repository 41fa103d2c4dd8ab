"""``ALM``, its latent loss and ``GOLD`` against their formulas, chunk by chunk in loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import TOLERANCES, Model, compare, copy, each_backend, each_kind, each_precision, noise
from torch import Tensor

from kdkernels import alignment, losses
from kdkernels.losses.cross_tokenizer import MEASURES, TokenScores, log1mexp

TEXTS = ["Hello wörld 🙂 again!", "ab cd"]
STUDENT_OFFSETS = [
    [None, (0, 5), (5, 9), (9, 11), (11, 13), (13, 16), (16, 20)],
    [(0, 1), (1, 2), (2, 5)],
]
TEACHER_OFFSETS = [
    [None, (0, 2), (2, 5), (5, 11), (12, 13), (14, 20)],
    [None, (0, 2), (3, 5)],
]
V_STUDENT, V_TEACHER = 13, 17
STUDENT_SPACE = torch.tensor([0, 3, 4])
TEACHER_SPACE = torch.arange(V_TEACHER) % 3 == 0

CHUNKS = alignment.collate(
    [alignment.align(*each) for each in zip(TEXTS, STUDENT_OFFSETS, TEACHER_OFFSETS, strict=True)], student_length=8
)
STUDENT_IDS = (torch.arange(16) * 5 % V_STUDENT).reshape(2, 8)
TEACHER_IDS = (torch.arange(12) * 7 % V_TEACHER).reshape(2, 6)


def models(kind: str) -> tuple[Model, Model]:
    return Model.make(kind, (2, 8), V_STUDENT, 21), Model.make(kind, (2, 6), V_TEACHER, 31)


def tokens_of(ids: Tensor, chunk: int) -> list[int]:
    return (ids == chunk).nonzero().squeeze(1).tolist()


def test_the_chunks_of_these_tests() -> None:
    """Chunks of one and of several tokens on either side, a gap, and a first token that nothing predicts."""
    assert CHUNKS.student.tolist() == [[-1, 0, 1, 1, 2, 3, 3, -1], [0, 0, 1, -1, -1, -1, -1, -1]]
    assert CHUNKS.teacher.tolist() == [[-1, 0, 0, 1, 2, 3], [-1, 0, 1, -1, -1, -1]]


def plain_measure(name: str, log_p: Tensor, log_q: Tensor, tau: float, eps: float, alpha: float) -> Tensor:
    """With probabilities, as the formulas are written."""
    if name == "abs":
        return (log_p - log_q).abs()
    if name in {"k2", "k3"}:
        r = (log_p - log_q) / tau
        return r * r / 2 if name == "k2" else r.exp() - 1 - r
    scale = 1.0 if name in {"temperature_limit", "renyi"} else tau
    a, b = log_p / scale - eps, log_q / scale - eps
    p, q = a.exp(), b.exp()
    if name == "binary_ce":
        return -(p * q.log() + (1 - p) * (1 - q).log())
    if name == "reverse_binary_kl":
        return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    if name == "abs_exp":
        return (p - q).abs()
    if name == "renyi":
        return (p**alpha * q ** (1 - alpha) + (1 - p) ** alpha * (1 - q) ** (1 - alpha)).log() / (alpha - 1)
    return (a - b) + a * (-b).log() - a * (-a).log()


def plain_alm(
    student: Tensor,
    teacher: Tensor,
    *,
    measure: str,
    merge: float | None,
    space: bool,
    num: str,
    den: str,
    **numbers: float,
) -> Tensor:
    top, bottom = torch.zeros((), dtype=torch.float64), 0.0

    def space_after(logits: Tensor, b: int, token: int, members: Tensor) -> Tensor:
        return logits[b, token].softmax(-1)[members].sum().log()

    def log_prob(logits: Tensor, ids: Tensor, b: int, tokens: list[int]) -> Tensor:
        return sum((logits[b, k - 1].log_softmax(-1)[ids[b, k]] for k in tokens), torch.zeros((), dtype=torch.float64))

    for b in range(2):
        groups: list[tuple[list[int], list[int]]] = []
        for chunk in range(int(CHUNKS.counts[b])):
            mine, theirs = tokens_of(CHUNKS.student[b], chunk), tokens_of(CHUNKS.teacher[b], chunk)
            if 0 in mine + theirs:
                continue
            joined = False
            if groups and merge is not None:
                joined = float(space_after(teacher, b, groups[-1][1][-1], TEACHER_SPACE).exp()) <= merge
            groups[-1:] = [(groups[-1][0] + mine, groups[-1][1] + theirs)] if joined else [*groups[-1:], (mine, theirs)]
        for mine, theirs in groups:
            log_q, log_p = log_prob(student, STUDENT_IDS, b, mine), log_prob(teacher, TEACHER_IDS, b, theirs)
            if space:
                log_q = log_q + space_after(student, b, mine[-1], STUDENT_SPACE)
                log_p = log_p + space_after(teacher, b, theirs[-1], TEACHER_SPACE)
            count = float(len(theirs))
            weights = {"chunk_count": 1.0, "token_count": count, "log1p_token_count": math.log1p(count)}
            top = top + weights[num] * plain_measure(measure, log_p, log_q, **numbers)
            bottom += weights[den]
    return top / bottom


OPTIONS: list[dict[str, Any]] = [
    {"measure": "binary_ce", "merge": None, "space": False, "num": "chunk_count", "den": "chunk_count"},
    {"measure": "binary_ce", "merge": 0.35, "space": True, "num": "token_count", "den": "token_count"},
    {"measure": "binary_ce", "merge": 0.35, "space": False, "num": "log1p_token_count", "den": "chunk_count"},
    *(
        {"measure": name, "merge": None, "space": True, "num": "chunk_count", "den": "chunk_count"}
        for name in MEASURES[1:]
    ),
]


def alm(options: dict[str, Any], backend: str | None, **numbers: float) -> losses.ALM:
    wants_space = options["space"] or options["merge"] is not None
    return losses.ALM(
        options["measure"],
        numerator=options["num"],
        denominator=options["den"],
        merge_threshold=options["merge"],
        student_space=STUDENT_SPACE if options["space"] else None,
        teacher_space=TEACHER_SPACE if wants_space else None,
        backend=backend,
        **numbers,
    )


@each_backend
@each_kind
@each_precision
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(str(each) for each in options.values()))
def test_alm(options: dict[str, Any], dtype: torch.dtype, kind: str, backend: str | None) -> None:
    numbers = {"temperature": 4.0, "epsilon": 1e-3, "renyi_alpha": 0.6}
    loss = alm(options, backend, **numbers)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        return plain_alm(student, teacher, **options, tau=4.0, eps=1e-3, alpha=0.6)

    def ours(student: Any, teacher: Any) -> Tensor:
        found: Tensor = loss(student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS)
        return found

    compare(ours, plain, *models(kind), dtype)


def test_the_thresholds_of_these_tests_merge_some_chunks() -> None:
    teacher = models("logits")[1].logits()
    mass = teacher.softmax(-1)[..., TEACHER_SPACE].sum(-1)
    ends = torch.tensor([mass[0, 2], mass[0, 3], mass[0, 4]])
    assert (ends > 0.35).any()
    assert (ends <= 0.35).any()


def test_alm_takes_stored_scores() -> None:
    student, teacher = models("logits")
    loss = alm(OPTIONS[1], None)
    expected = loss(student.source(), teacher.source(), STUDENT_IDS, TEACHER_IDS, CHUNKS)
    stored = loss.scores(teacher.source(), TEACHER_IDS, TEACHER_SPACE, CHUNKS.teacher)
    assert torch.equal(loss(student.source(), stored, STUDENT_IDS, None, CHUNKS), expected)
    assert stored.space is not None
    # Of tokens in no chunk, nothing is asked; nor of whitespace where no chunk ends.
    outside = CHUNKS.teacher < 0
    blank = TokenScores(stored.log_probs.masked_fill(outside, torch.nan), stored.space.masked_fill(outside, torch.nan))
    assert torch.equal(loss(student.source(), blank, STUDENT_IDS, None, CHUNKS), expected)
    with pytest.raises(ValueError, match="teacher: the scores lack space"):
        loss(student.source(), TokenScores(stored.log_probs), STUDENT_IDS, None, CHUNKS)


@each_backend
@pytest.mark.parametrize("name", ["ALM", "GOLD"])
def test_what_is_in_no_chunk_has_no_influence(name: str, backend: str | None) -> None:
    """Logits that predict no token of a chunk that counts, and ids that are in none."""
    student, teacher = (model.source().float() for model in models("logits"))
    student_ids, teacher_ids = STUDENT_IDS.clone(), TEACHER_IDS.clone()
    mask = torch.ones_like(student_ids, dtype=torch.bool)
    mask[0, 6] = False  # half of the last chunk
    loss = losses.ALM(backend=backend) if name == "ALM" else losses.GOLD("bayesian", backend=backend)
    expected = loss(student, teacher, student_ids, teacher_ids, CHUNKS, student_mask=mask)
    student[0, 4:], student[1, 2:], student[1, 0] = (torch.nan,) * 3
    teacher[0, 4:], teacher[1, 0], teacher[1, 2:] = (torch.nan,) * 3
    student_ids[0, 5:], student_ids[1, 3:], teacher_ids[1, 3:] = (10**6,) * 3
    student.requires_grad_()
    found = loss(student, teacher, student_ids, teacher_ids, CHUNKS, student_mask=mask)
    found.backward()
    assert torch.equal(found, expected)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    used = torch.zeros(2, 8, dtype=torch.bool)
    used[0, :4], used[1, 1] = True, True
    assert torch.equal(student.grad.any(-1), used)


@each_backend
def test_nothing_counts(backend: str | None) -> None:
    student, teacher = (model.source().float() for model in models("logits"))
    student.requires_grad_()
    none = torch.zeros_like(STUDENT_IDS, dtype=torch.bool)
    for loss in (losses.ALM(backend=backend), losses.GOLD(backend=backend)):
        found = loss(student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS, student_mask=none)
        assert float(found.detach()) == 0
        assert not torch.autograd.grad(found, student)[0].any()


def test_log1mexp() -> None:
    exponents = torch.tensor([-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -80.0, -1e4])
    exact = exponents.double()
    # Near 0 by the series, which has no cancellation.
    expected = torch.where(exact > -1e-2, (-exact * (1 + exact / 2 + exact**2 / 6)).log(), torch.log1p(-exact.exp()))
    given = copy(exponents, torch.float32)
    found = log1mexp(given)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found.sum().backward()
    right = 1 / torch.expm1(-exact)
    torch.testing.assert_close(given.grad, (-right).float(), rtol=1e-6, atol=0)


@each_precision
@pytest.mark.parametrize("channelwise", [True, False])
def test_latents(channelwise: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loss = losses.ALMLatents(4, 6, channelwise=channelwise).to(dtype)
    student, teacher = noise(2, 8, 4, seed=1), noise(2, 6, 6, seed=2)
    student[0, 0], teacher[1, 3:] = torch.nan, torch.nan
    assert loss.projector is not None
    mine = copy(student, dtype)
    found = loss(mine, teacher.to(dtype), CHUNKS)
    found.backward()
    right = copy(student)
    weight, bias = (copy(each) for each in (loss.projector.weight, loss.projector.bias))
    pairs = [
        (
            right[b, tokens_of(CHUNKS.student[b], c)[-1]] @ weight.T + bias,
            teacher[b, tokens_of(CHUNKS.teacher[b], c)[-1]],
        )
        for b in range(2)
        for c in range(int(CHUNKS.counts[b]))
    ]
    own, target = (torch.stack(each) for each in zip(*pairs, strict=True))
    size = target.square().mean(0) if channelwise else target.square().mean()
    expected = ((own - target).square() / (size + 1e-6)).mean()
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=0)
    for given, true in ((mine, right), (loss.projector.weight, weight), (loss.projector.bias, bias)):
        assert given.grad is not None
        assert true.grad is not None
        torch.testing.assert_close(
            given.grad.double(), true.grad, rtol=0, atol=TOLERANCES[dtype] * float(true.grad.abs().max())
        )
    assert set(loss.state_dict()) == {"projector.weight", "projector.bias"}


MATCHED = torch.tensor([[1, 2], [3, 3], [7, 0], [12, 16]])


def sorted_gap(q: Tensor, p: Tensor) -> Tensor:
    q, p = q.sort(descending=True).values, p.sort(descending=True).values
    width = max(len(q), len(p))
    return (torch.cat([q, q.new_zeros(width - len(q))]) - torch.cat([p, p.new_zeros(width - len(p))])).abs().sum()


def plain_gold(student: Tensor, teacher: Tensor, *, merge: str, shift: int, hybrid: bool, beta: float) -> Tensor:
    def merged(logits: Tensor, ids: Tensor, b: int, tokens: list[int], tau: float) -> Tensor:
        base = tokens[-1] if merge == "bayesian" else tokens[0]
        found = (logits[b, base - shift] / tau).softmax(-1)
        for token in tokens:
            if token != base:
                found = found * (logits[b, token - shift] / tau).softmax(-1)[ids[b, token]].clamp(min=1e-8)
        return found

    texts = []
    for b in range(2):
        values = []
        for chunk in range(int(CHUNKS.counts[b])):
            mine, theirs = tokens_of(CHUNKS.student[b], chunk), tokens_of(CHUNKS.teacher[b], chunk)
            if 0 in mine + theirs:
                continue
            q = merged(student, STUDENT_IDS, b, mine, 1.2)
            p = merged(teacher, TEACHER_IDS, b, theirs, 0.9)
            if not hybrid:
                values.append(sorted_gap(q, p))
                continue
            x, y = p[MATCHED[:, 1]].clamp(min=1e-8), q[MATCHED[:, 0]].clamp(min=1e-8)
            m = beta * x + (1 - beta) * y
            jsd = beta * (x * (x / m).log()).sum() + (1 - beta) * (y * (y / m).log()).sum()
            if beta in (0, 1):
                jsd = (x * (x / y).log()).sum() if beta == 0 else (y * (y / x).log()).sum()
            rest = [
                torch.stack([each for place, each in enumerate(values) if place not in named.tolist()])
                for values, named in ((q, MATCHED[:, 0]), (p, MATCHED[:, 1]))
            ]
            share = len(MATCHED) / V_TEACHER
            values.append(share * jsd + (1 - share) * sorted_gap(*rest))
        texts.append(torch.stack(values).mean())
    return torch.stack(texts).mean()


@each_backend
@each_kind
@each_precision
@pytest.mark.parametrize(("merge", "shifted"), [("observed", None), ("observed", True), ("bayesian", None)])
@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 1.0])
def test_gold(
    beta: float | None, merge: str, shifted: bool | None, dtype: torch.dtype, kind: str, backend: str | None
) -> None:
    hybrid = beta is not None
    loss = losses.GOLD(
        merge,
        shifted=shifted,
        temperature=1.2,
        teacher_temperature=0.9,
        matched=MATCHED if hybrid else None,
        beta=0.5 if beta is None else beta,
        memory_budget=2000,
        backend=backend,
    )
    shift = int(merge == "bayesian" if shifted is None else shifted)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        return plain_gold(student, teacher, merge=merge, shift=shift, hybrid=hybrid, beta=0.5 if beta is None else beta)

    def ours(student: Any, teacher: Any) -> Tensor:
        found: Tensor = loss(student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS)
        return found

    compare(ours, plain, *models(kind), dtype)


def test_gold_weights() -> None:
    student, teacher = (model.source() for model in models("logits"))
    arguments = (student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS)

    def loss(**options: Any) -> Tensor:
        found: Tensor = losses.GOLD("bayesian", matched=MATCHED, **options)(*arguments)
        return found

    parts = [loss(matched_weight=float(one), unmatched_weight=float(not one)) for one in (True, False)]
    share = len(MATCHED) / V_TEACHER
    torch.testing.assert_close(loss(), share * parts[0] + (1 - share) * parts[1])
    mask = torch.ones_like(STUDENT_IDS, dtype=torch.bool)
    mask[1, 3:] = False
    labels = STUDENT_IDS.masked_fill(~mask, -100)
    hard = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    both = losses.GOLD("bayesian", weight=2.0, ce_weight=0.5)(*arguments, student_mask=mask)
    soft = losses.GOLD("bayesian")(*arguments, student_mask=mask)
    torch.testing.assert_close(both, 2 * soft + 0.5 * hard)


def test_common_and_space_tokens() -> None:
    assert alignment.common_tokens({"a": 0, "b": 2, "c": 1}, {"b": 7, "a": 5, "d": 1}).tolist() == [[0, 5], [2, 7]]
    assert alignment.space_tokens([b" a", b"a", b"\n", b"", b"\tx"], also=[3]).tolist() == [0, 2, 3, 4]


def test_merged_chunks() -> None:
    kept = torch.tensor([[True, False, True, False], [False, False, False, False]])
    found = alignment.merge_chunks(CHUNKS, kept)
    assert found.student.tolist() == [[-1, 0, 1, 1, 1, 2, 2, -1], [0, 0, 0, -1, -1, -1, -1, -1]]
    assert found.teacher.tolist() == [[-1, 0, 0, 1, 1, 2], [-1, 0, 0, -1, -1, -1]]
    assert (found.counts.tolist(), found.size) == ([3, 1], 4)


def test_defaults_are_those_of_the_papers() -> None:
    loss, gold = losses.ALM(), losses.GOLD()
    assert (loss.measure, loss.temperature, loss.epsilon) == ("binary_ce", 100, 1e-6)
    assert (loss.numerator, loss.denominator) == ("chunk_count", "chunk_count")
    assert (gold.merge, gold.shifted, gold.beta, gold.floor) == ("observed", False, 0.5, 1e-8)
    assert losses.GOLD("bayesian").shifted
    assert not losses.ALM(teacher_space=TEACHER_SPACE).state_dict()


def test_bad_input() -> None:
    student, teacher = (model.source() for model in models("logits"))
    loss = losses.ALM()
    with pytest.raises(ValueError, match=r"measure must be one of binary_ce, .* got 'kl'"):
        losses.ALM("kl")
    with pytest.raises(ValueError, match="merge_threshold needs teacher_space"):
        losses.ALM(merge_threshold=0.1)
    with pytest.raises(ValueError, match="student_space needs teacher_space"):
        losses.ALM(student_space=STUDENT_SPACE)
    with pytest.raises(ValueError, match="renyi_alpha must be a positive number other than 1"):
        losses.ALM("renyi", renyi_alpha=1.0)
    with pytest.raises(ValueError, match="chunks: student must have the shape"):
        loss(student[:, :5], teacher, STUDENT_IDS[:, :5], TEACHER_IDS, CHUNKS)
    with pytest.raises(TypeError, match=r"chunks must be kd\.alignment\.Chunks, got list"):
        loss(student, teacher, STUDENT_IDS, TEACHER_IDS, [])
    with pytest.raises(ValueError, match="teacher_ids must have the shape of the teacher's tokens"):
        loss(student, teacher, STUDENT_IDS, STUDENT_IDS, CHUNKS)
    with pytest.raises(TypeError, match="teacher_ids must be a tensor of token ids, got None"):
        loss(student, teacher, STUDENT_IDS, None, CHUNKS)
    with pytest.raises(ValueError, match="student_mask must have the shape"):
        loss(student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS, student_mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="student_mask must have one of the dtypes"):
        loss(student, teacher, STUDENT_IDS, TEACHER_IDS, CHUNKS, student_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"labels must be token ids in \[0, 13\)"):
        loss(student, teacher, STUDENT_IDS + 50, TEACHER_IDS, CHUNKS)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 2"):
        losses.GOLD(beta=2.0)
    with pytest.raises(ValueError, match="must both be given, or neither"):
        losses.GOLD(matched_weight=1.0)
    with pytest.raises(ValueError, match=r"matched must have the shape \[K, 2\]"):
        losses.GOLD(matched=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="give both sizes to project"):
        losses.ALMLatents()(torch.zeros(2, 8, 3), torch.zeros(2, 6, 4), CHUNKS)

"""Weights, schedules and selection against sequences computed by hand and formulas written in loops."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from loss_cases import noise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import weighting as w

N, V = 5, 13
LABELS = torch.tensor([0, 3, 12, 5, 5])


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    return 2 * noise(N, V, seed=1), 2 * noise(N, V, seed=2)


@pytest.fixture(scope="module")
def statistics(logits: tuple[Tensor, Tensor]) -> kd.TokenStatistics:
    return kd.token_statistics(*logits, LABELS)


def entropy(row: Tensor) -> float:
    return -sum(p * math.log(p) for p in row.softmax(-1).tolist())


# --- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (w.Ramp(0.0, 0.8, 4), [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]),
        (w.Ramp(1.0, 0.0, 2, delay=2), [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        (w.Ramp(0.0, 1.0, 4, shape="cosine"), [0.0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1.0]),
        (w.Ramp(2.0, 4.0, 3, shape="sine"), [2.0, 3.0, 2.0 + math.sqrt(3), 4.0, 4.0]),
        (w.WarmupStableDecay(0.9, 10, warmup=3, decay=3), [0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.3, 0, 0]),
        (w.WarmupStableDecay(1.0, 4, warmup=0, decay=2, floor=0.5), [1.0, 1.0, 1.0, 0.75, 0.5]),
        (w.WarmupStableDecay(1.0, 3, warmup=0, decay=0), [1.0, 1.0, 1.0, 1.0]),
        (w.ExponentialDecay(2.0, 0.5, floor=1.0), [2.0, 1.5, 1.25, 1.125]),
        (w.LogarithmicDecay(1.0, 8), [1.0, math.log(2) / math.log(4), math.log(4 / 3) / math.log(4), 0.0, 0.0, 0.0]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, w.Schedule) else "",
)
def test_schedule(schedule: w.Schedule, values: list[float]) -> None:
    assert [schedule.at(step) for step in range(len(values))] == pytest.approx(values, abs=1e-12)
    assert schedule.value == pytest.approx(values[0])
    assert [schedule.step() for _ in values[1:3]] == pytest.approx(values[1:3])
    state = saved(schedule.state_dict())
    schedule.load_state_dict({"count": 0})
    assert schedule.value == pytest.approx(values[0])
    schedule.load_state_dict(state)
    assert schedule.value == pytest.approx(values[2])


def test_schedules_of_papers() -> None:
    epochs = 240
    alpha = w.Ramp(0.0, 0.8, epochs)
    assert [alpha.at(epoch + 1) for epoch in range(epochs)] == pytest.approx(
        [0.8 * (e + 1) / epochs for e in range(epochs)]
    )
    assert w.Ramp(0.0, 0.6, 20).at(30) == 0.6
    assert w.ExponentialDecay(2.0, 0.99998).at(50000) == pytest.approx(2 * 0.99998**50000)


# --- weights of tokens --------------------------------------------------------------------------------------------------


def test_entropy_weights(logits: tuple[Tensor, Tensor], statistics: kd.TokenStatistics) -> None:
    student, teacher = logits
    forward, reverse = w.entropy_gap_weights(statistics, emphasis=3.0)
    weights = w.entropy_weights(statistics, exponent=0.3, teacher_share=0.25)
    sides = set()
    for token in range(N):
        h_p, h_q = entropy(teacher[token]), entropy(student[token])
        assert (float(forward[token]), float(reverse[token])) == ((3.0, 1.0) if h_p > h_q else (1.0, 3.0))
        assert float(weights[token]) == pytest.approx((0.25 * h_p + 0.75 * h_q) ** 0.3)
        sides.add(h_p > h_q)
    assert sides == {True, False}, "one side only would not test the other"


def test_confidence(logits: tuple[Tensor, Tensor], statistics: kd.TokenStatistics) -> None:
    student, teacher = logits
    torch.testing.assert_close(w.teacher_confidence(statistics), teacher.softmax(-1).amax(-1))
    tempered = kd.token_statistics(student, teacher, temperature=2.5)
    torch.testing.assert_close(w.teacher_confidence(tempered, temperature=2.5), (teacher / 2.5).softmax(-1).amax(-1))
    masked = kd.token_statistics(student, teacher, mask=torch.arange(N) < 2)
    assert bool(w.teacher_confidence(masked).isfinite().all())
    rows = torch.arange(N)
    torch.testing.assert_close(
        w.more_confident(statistics), teacher.softmax(-1)[rows, LABELS] > student.softmax(-1)[rows, LABELS]
    )
    assert len(w.more_confident(statistics).unique()) == 2
    unlabelled = kd.token_statistics(student, teacher)
    torch.testing.assert_close(
        w.more_confident(unlabelled), teacher.softmax(-1).amax(-1) > student.softmax(-1).amax(-1)
    )


def test_skew_of_hard_tokens() -> None:
    difficulty = torch.tensor([0.1, 2.0, 0.3, 0.9, torch.inf])
    assert w.skew_of_hard_tokens(difficulty, skew=0.4).tolist() == pytest.approx([0, 0.4, 0, 0.4, 0.4])
    assert w.skew_of_hard_tokens(difficulty, skew=0.4, threshold=1.0).tolist() == pytest.approx([0, 0.4, 0, 0, 0.4])


def test_near_hit_quality() -> None:
    scores = torch.zeros(3, 40)
    order = [[30, 7, 12, 3], [1, 2, 3, 4], [19, 38, 15, 0]]
    for row, places in enumerate(order):
        for rank, place in enumerate(places):
            scores[row, place] = 9.0 - rank
    # The window of 10 is [5, 14], of 30 [25, 34], of 20 [15, 24].
    found = w.near_hit_quality(scores, torch.tensor([10, 30, 20]), k=4, reduction="none")
    assert found.tolist() == pytest.approx([1 / 2, 0.0, 1.0])
    assert float(w.near_hit_quality(scores, torch.tensor([10, 30, 20]), k=4)) == pytest.approx(0.5)
    assert w.near_hit_quality(scores, torch.tensor([8, 7, 25]), k=4, reduction="none").tolist() == pytest.approx(
        [1 / 2, 1 / 2, 0.0]  # 12 = 8 + 4 is a hit, 2 = 7 - 5 too, 19 = 25 - 6 is none
    )


def test_disagreement_weights() -> None:
    found = w.disagreement_weights(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), scale=2.0)
    assert found.tolist() == pytest.approx([0.0, 1 - math.exp(-0.5), 1 - math.exp(-2)])


# --- denoising ----------------------------------------------------------------------------------------------------------


def test_loss_mixture_is_found() -> None:
    clean = 1.0 + 0.2 * torch.randn(600, generator=generator(), dtype=torch.float64)
    noisy = 5.0 + 0.7 * torch.randn(200, generator=generator(1), dtype=torch.float64)
    found = w.fit_loss_mixture(torch.cat([noisy, clean]))
    assert found.means.tolist() == pytest.approx([1.0, 5.0], abs=0.15)
    assert found.deviations.tolist() == pytest.approx([0.2, 0.7], abs=0.1)
    assert found.shares.tolist() == pytest.approx([0.75, 0.25], abs=0.01)
    constant = w.fit_loss_mixture(torch.ones(9))
    assert all(bool(tensor.isfinite().all()) for tensor in constant)


def test_denoising_weights() -> None:
    mixture = w.LossMixture(*torch.tensor([[0.75, 0.25], [1.0, 5.0], [0.2, 0.7]], dtype=torch.float64))
    losses = torch.tensor([0.5, 1.0, 3.0, 6.0], dtype=torch.float64)
    right = []
    for loss in losses.tolist():
        clean, noisy = (
            share * math.exp(-((loss - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))
            for share, mean, deviation in ((0.75, 1.0, 9 * 0.2), (0.25, 5.0, 0.7))
        )
        right.append((clean + math.exp(-loss) * noisy) / (clean + noisy))
    assert w.denoising_weights(losses, mixture).tolist() == pytest.approx(right)


# --- selection ----------------------------------------------------------------------------------------------------------


def test_difference_scores_and_best() -> None:
    theirs, small = -noise(3, 4, seed=1).abs(), -noise(3, 4, seed=2).abs()
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False, False, False, False]])
    right = [sum((theirs - small)[0, [0, 1, 3]].tolist()) / 3, float((theirs - small)[1, 0]), 0.0]
    scores = w.difference_scores(theirs, small, mask)
    assert scores.tolist() == pytest.approx(right)
    order = sorted(range(3), key=lambda row: -right[row])
    assert w.best(scores, count=2).tolist() == order[:2]
    assert w.best(scores, fraction=0.5).tolist() == order[:2]
    assert w.best(scores, fraction=0.01).tolist() == order[:1]


def test_robust_sampling() -> None:
    gains = torch.tensor([0.2, 1.0, 0.5, 0.9], dtype=torch.float64)
    for wrong in (0.0, 1.0, 2.0, 3.0):
        order = sorted(range(4), key=lambda i: -float(gains[i]))
        value, kept = max(((k - wrong) / sum(1 / float(gains[i]) for i in order[:k]), order[:k]) for k in range(1, 5))
        right = [value_of / sum(1 / float(gains[i]) for i in kept) if i in kept else 0.0 for i, value_of in
                 ((i, 1 / float(gains[i])) for i in range(4))]  # fmt: skip
        found = w.robust_sampling(gains, wrong=wrong)
        assert found.tolist() == pytest.approx(right)
        # Whichever samples earn nothing, the others earn the value.
        earned = sorted((found * gains).tolist(), reverse=True)
        assert sum(earned[int(wrong) :]) == pytest.approx(value)
    torch.testing.assert_close(w.margins(torch.tensor([[0.5, 0.1, 0.4]])), torch.tensor([0.1]))


def test_farthest_first() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0], [4.5]])
    assert w.farthest_first(points, 4).tolist() == [0, 2, 4, 1]
    assert w.farthest_first(points, 2, chosen=torch.tensor([[9.0]])).tolist() == [0, 4]
    assert sorted(w.farthest_first(torch.zeros(3, 2), 3).tolist()) == [0, 1, 2]


# --- sampling -----------------------------------------------------------------------------------------------------------


def test_domain_sampler() -> None:
    sampler = w.DomainSampler(3, mixing=0.4, generator=generator())
    perplexities = [([8.0, 9.0, 20.0], [8.0, 6.0, 10.0]), ([7.0, 9.0, 12.0], [8.0, 6.0, 10.0])]
    ratios = [[s / t for s, t in zip(*pair, strict=True)] for pair in perplexities]
    start = [math.exp(ratio) for ratio in ratios[0]]
    start = [value / sum(start) for value in start]
    psi = [r * math.exp(ratio) for r, ratio in zip(start, ratios[1], strict=True)]
    after = [0.4 * value / sum(psi) + 0.6 / 3 for value in psi]
    student, teacher = ([torch.tensor(pair[side]) for pair in perplexities] for side in (0, 1))
    assert sampler.update(student[0], teacher[0]).tolist() == pytest.approx(start)
    resumed = w.DomainSampler(3, mixing=0.4)
    resumed.load_state_dict(saved(sampler.state_dict()))
    for each in (sampler, resumed):
        assert each.update(student[1], teacher[1]).tolist() == pytest.approx(after)
    drawn = torch.bincount(sampler.sample(4000), minlength=3) / 4000
    torch.testing.assert_close(drawn.double(), torch.tensor(after, dtype=torch.float64), rtol=0, atol=0.03)
    # Ratios whose exponentials are infinite
    assert bool(sampler.update(torch.full((3,), 1e6), torch.tensor([1.0, 1.0, 2.0])).isfinite().all())


def test_adaptive_student_share() -> None:
    share = w.AdaptiveStudentShare(100, epsilon=0.05, seed=1)
    losses = [2.0, 2.1, 2.12, 2.2, 1.0, 2.3]
    right = [0.0, 0.1, 0.1, 0.2, 0.2, 0.3]  # the loss compared with stays until phi grows
    assert [share.update(loss) for loss in losses] == pytest.approx(right)
    assert [share.fresh_share(step) for step in (0, 25, 100, 200)] == pytest.approx([0.3, 0.225, 0.0, 0.0])
    other = w.AdaptiveStudentShare(100, share=0.4, fresh="increasing")
    assert other.fresh_share(25) == pytest.approx(0.1)
    assert w.AdaptiveStudentShare(100, share=0.4, fresh="constant").fresh_share(99) == pytest.approx(0.2)
    full = w.AdaptiveStudentShare(10, share=1.0, epsilon=0.0)
    assert [full.update(loss) for loss in (1.0, 2.0)] == [1.0, 1.0]


def test_draws_of_the_student_share() -> None:
    buffer: w.ReplayBuffer[int] = w.ReplayBuffer(2)
    share = w.AdaptiveStudentShare(100, share=0.6)
    first = [share.draw(50, buffer) for _ in range(500)]
    assert set(first) == {"data", "fresh"}, "until the buffer is full there is nothing to replay"
    assert first.count("fresh") == pytest.approx(300, abs=40)
    buffer.add(1)
    buffer.add(2)
    state = saved(share.state_dict())
    then = [share.draw(50, buffer) for _ in range(2000)]
    assert then.count("data") == pytest.approx(800, abs=80)
    assert then.count("fresh") == pytest.approx(600, abs=80)
    share.load_state_dict(state)
    assert [share.draw(50, buffer) for _ in range(2000)] == then


def test_replay_buffer() -> None:
    buffer: w.ReplayBuffer[dict[str, Tensor]] = w.ReplayBuffer(3, seed=5)
    with pytest.raises(IndexError, match="holds no batch"):
        buffer.draw()
    for step in range(5):
        buffer.add({"ids": torch.tensor([step])})
    assert len(buffer) == 3
    assert sorted(int(batch["ids"]) for batch in buffer.batches) == [2, 3, 4]
    other: w.ReplayBuffer[dict[str, Tensor]] = w.ReplayBuffer(3)
    other.load_state_dict(saved(buffer.state_dict()))
    draws = [[int(each.draw()["ids"]) for _ in range(30)] for each in (buffer, other)]
    assert draws[0] == draws[1]
    assert set(draws[0]) == {2, 3, 4}
    for each in (buffer, other):
        each.add({"ids": torch.tensor([9])})
        assert sorted(int(batch["ids"]) for batch in each.batches) == [3, 4, 9]


# --- teachers -----------------------------------------------------------------------------------------------------------


def test_routes() -> None:
    gates = torch.tensor([[0.1, 3.0], [2.0, 1.0], [1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert w.route(gates).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert w.route(gates, k=2).tolist() == [[0.0, 0.5], [0.5, 0.5], [0.5, 0.0]]
    numbers = gates.tolist()
    means = [
        sum(math.exp(numbers[m][n]) / sum(math.exp(numbers[j][n]) for j in range(3)) for n in range(2)) / 2
        for m in range(3)
    ]
    balance = w.load_balance(gates)
    assert float(balance.detach()) == pytest.approx(sum(math.log(1 / 3 / mean) / 3 for mean in means) / 3)
    mean = sum(means) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in means) / 2) / mean
    assert float(w.load_balance(gates, form="variation").detach()) == pytest.approx(spread)
    balance.backward()
    assert gates.grad is not None
    assert float(gates.grad.abs().sum()) > 0
    assert float(w.load_balance(torch.zeros(4, 6))) == pytest.approx(0.0)
    assert w.most_confident(torch.tensor([[-1.0, -2.0], [-0.5, -2.0]])).tolist() == [1, 0]


def test_mentoring() -> None:
    mentors = torch.tensor([[0.9, 0.2, 0.6], [0.5, 0.8, 0.9]], dtype=torch.float64)
    student = torch.tensor([0.4, 0.3, 0.7], dtype=torch.float64)
    correct = torch.tensor([[True, False, True], [True, True, True]])
    plan = w.mentoring(
        mentors.log(),
        student.log(),
        correct,
        performance=torch.tensor([3.0, 1.0]),
        temperature=2.0,
        gap_scale=0.5,
    )
    right = [[0.75, 0.0, 0.0], [0.25, 1.0, 1.0]]
    torch.testing.assert_close(plan.weights, torch.tensor(right, dtype=torch.float64))
    temperatures = [
        [2 * (1 + 0.5 * max(0.0, float(m - s))) for m, s in zip(row, student, strict=True)] for row in mentors
    ]
    torch.testing.assert_close(plan.temperatures, torch.tensor(temperatures, dtype=torch.float64))
    nobody = w.mentoring(mentors.log(), student.log(), torch.zeros_like(correct))
    assert nobody.weights.abs().sum() == 0


def test_weights_of_sources_and_peers() -> None:
    assert w.shares(torch.tensor([1.0, 3.0]), power=2.0).tolist() == pytest.approx([0.1, 0.9])
    assert w.shares(torch.tensor([0.0, 3.0])).tolist() == pytest.approx([0.0, 1.0])
    found = w.peer_weights(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    right = [[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]]
    torch.testing.assert_close(found, torch.tensor(right))


def test_permuted_others(logits: tuple[Tensor, Tensor]) -> None:
    teacher = logits[1]
    found = w.permuted_others(teacher, generator=generator())
    assert torch.equal(found.argmax(-1), teacher.argmax(-1))
    assert torch.equal(found.sort(-1).values, teacher.sort(-1).values)
    assert not torch.equal(found, teacher)
    many = w.permuted_others(torch.tensor([0.0, 9.0, 1.0, 2.0]).expand(6000, 4), generator=generator(1))
    shares = (many[:, 0].unsqueeze(-1) == torch.tensor([0.0, 1.0, 2.0])).double().mean(0)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.03)


# --- averages -----------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(inputs * self.weight)


@pytest.mark.parametrize("correction", ["unbiased", "published", None])
def test_moving_averages(correction: str | None) -> None:
    student = Student()
    rates = [0.1, 0.02]
    averages = w.MovingAverages(student, rates, correction=correction)
    average = {rate: [1.0, -2.0] for rate in rates}
    if correction == "published":
        average = {rate: [value * rate / (1 - rate) for value in [1.0, -2.0]] for rate in rates}
    for step in range(1, 25):
        values = [math.sin(step), math.cos(step)]
        student.weight.data.copy_(torch.tensor(values))
        student.seen.fill_(step)  # type: ignore[operator]
        averages.update(student)
        if step == 10:
            again = w.MovingAverages(Student(), rates, correction=correction)
            again.load_state_dict(saved(averages.state_dict()))
            averages = again
        for rate in rates:
            if correction == "published":
                kept, added = 1 - rate, rate / (1 - rate ** max(1, (step - 1) // 10))
            else:
                added = rate if correction is None else rate / (1 - (1 - rate) ** step)
                kept = 1 - added
            average[rate] = [kept * old + added * new for old, new in zip(average[rate], values, strict=True)]
    for rate, model in zip(rates, averages.models, strict=True):
        assert model.weight.tolist() == pytest.approx(average[rate])  # type: ignore[union-attr, operator]
        assert int(model.seen) == 24  # type: ignore[arg-type]
    inputs = torch.ones(2, dtype=torch.float64)
    averages.train()
    for rate, found in zip(rates, averages(inputs), strict=True):
        assert found.tolist() == pytest.approx(average[rate]), "dropout must stay off"
        assert not found.requires_grad


def test_unbiased_average_is_the_weighted_mean() -> None:
    student = Student()
    averages = w.MovingAverages(student, [0.3])
    values = [5.0, -1.0, 2.0]
    for value in values:
        student.weight.data.fill_(value)
        averages.update(student)
    weights = [0.7**age for age in (2, 1, 0)]
    right = sum(a * b for a, b in zip(weights, values, strict=True)) / sum(weights)
    assert averages.models[0].weight.tolist() == pytest.approx([right, right])  # type: ignore[union-attr, operator]


def test_averages_of_chosen_parameters() -> None:
    student = Student()
    averages = w.MovingAverages(student, [0.5], correction=None)
    student.weight.data.fill_(3.0)
    averages.update(student, {"weight": torch.tensor([True, False])})
    assert averages.models[0].weight.tolist() == [2.0, -2.0]  # type: ignore[union-attr, operator]


# --- trilateral geometry ------------------------------------------------------------------------------------------------


def test_trilateral_weights(logits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    module = w.TrilateralWeights(V, hidden=(4,)).double()
    s, p = (side.softmax(-1) for side in logits)
    means = w.class_means(p, LABELS)
    found = module(s, p, LABELS, means)
    first, second = module.network[0], module.network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    for n in range(N):
        same = [m for m in range(N) if LABELS[m] == LABELS[n]]
        mean = sum(p[m] for m in same) / len(same)
        g = torch.zeros(V, dtype=torch.float64)
        g[LABELS[n]] = 1
        inputs = torch.cat([s[n], p[n], g, mean, (mean - s[n]) ** 2, (g - s[n]) ** 2, (p[n] - s[n]) ** 2, (p[n] - g) ** 2,
                            (mean - g) ** 2])  # fmt: skip
        hidden = (first.weight @ inputs + first.bias).clamp(min=0)
        assert float(found[n].detach()) == pytest.approx(
            1 / (1 + math.exp(-float((second.weight[0] @ hidden + second.bias[0]).detach())))
        )
    other = w.TrilateralWeights(V, hidden=(4,)).double()
    other.load_state_dict(saved(module.state_dict()))
    torch.testing.assert_close(other(s, p, LABELS, means), found)


def test_trilateral_weights_learn_through_a_step_of_the_student(logits: tuple[Tensor, Tensor]) -> None:
    """The bilevel step: the gradient of a validation loss to the network, through a step with the weighted loss."""
    torch.manual_seed(0)
    start, teacher = logits
    s, p = start.softmax(-1), teacher.softmax(-1)
    module = w.TrilateralWeights(V, hidden=(4,)).double()
    parameters = list(module.parameters())

    def validation(plain: bool) -> Tensor:
        student = start.clone().requires_grad_()
        a = module(s, p, LABELS, w.class_means(p, LABELS))
        log_q = student.log_softmax(-1)
        if plain:
            log_p = (teacher / 2).log_softmax(-1)
            soft = 4 * (log_p.exp() * (log_p - (student / 2).log_softmax(-1))).sum(-1)
            hard = -log_q[torch.arange(N), LABELS]
        else:
            soft = kd.distillation_loss(student, teacher, temperature=2.0, temperature_squared=True, reduction="none")
            hard = -kd.token_log_probs(student, LABELS)
        (step,) = torch.autograd.grad((a * soft + (1 - a) * hard).mean(), student, create_graph=True)
        moved = student - 0.5 * step
        return -moved.log_softmax(-1)[torch.arange(N), LABELS.flip(0)].mean()

    found, right = (torch.autograd.grad(validation(plain), parameters) for plain in (False, True))
    for one, other in zip(found, right, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.abs().max()))


# --- devices ------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, and results whose size depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(each) for each in self.WAITING), f"{name} waits for the device"
        booleans = [
            index
            for index in (args[1] if name.startswith("index.") else [])
            if index is not None and index.dtype == torch.bool
        ]
        assert not booleans, "a boolean index waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(statistics: kd.TokenStatistics, logits: tuple[Tensor, Tensor]) -> None:
    scores, gates = logits[0][:, 0].abs() + 0.1, logits[0][:3]
    probabilities = logits[0].softmax(-1)
    module = w.TrilateralWeights(V, hidden=(4,)).double()
    sampler, student = w.DomainSampler(3), Student()
    averages = w.MovingAverages(student, [0.1])
    mixture = w.fit_loss_mixture(scores)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        float(scores.sum())
    with NoWaiting():
        w.entropy_gap_weights(statistics)
        w.entropy_weights(statistics)
        w.teacher_confidence(statistics)
        w.more_confident(statistics)
        w.skew_of_hard_tokens(scores)
        w.near_hit_quality(logits[0], LABELS)
        w.disagreement_weights(scores)
        w.fit_loss_mixture(scores, iterations=2)
        w.denoising_weights(scores, mixture)
        w.difference_scores(*logits)
        w.best(scores, fraction=0.5)
        w.margins(probabilities)
        w.robust_sampling(scores, wrong=1)
        w.farthest_first(probabilities, 2)
        w.route(gates, k=2)
        w.load_balance(gates)
        w.mentoring(gates, gates[0], gates > 0, performance=scores[:3])
        w.most_confident(gates)
        w.shares(scores)
        w.peer_weights(gates[:, :3])
        w.permuted_others(logits[0])
        module(probabilities, probabilities, LABELS, w.class_means(probabilities, LABELS))
        sampler.update(scores[:3], scores[:3] + 1)
        averages.update(student, {"weight": torch.ones(2, dtype=torch.bool)})


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(statistics: kd.TokenStatistics, logits: tuple[Tensor, Tensor]) -> None:
    alone = kd.token_statistics(logits[0])
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "statistics must hold entropy_teacher: give kd.token_statistics a teacher",
         lambda: w.entropy_gap_weights(alone)),
        (TypeError, "statistics must be what kd.token_statistics returns, got Tensor", lambda: w.entropy_weights(LABELS)),
        (ValueError, "exponent must be at least 0, got -1", lambda: w.entropy_weights(statistics, exponent=-1)),
        (ValueError, "skew must be at least 0 and less than 1, got 1", lambda: w.skew_of_hard_tokens(logits[0], skew=1)),
        (ValueError, "steps must be at least 1, got 0", lambda: w.Ramp(0, 1, 0)),
        (ValueError, "shape must be one of linear, cosine, sine", lambda: w.Ramp(0, 1, 5, shape="square")),
        (ValueError, "warmup and decay must be at most the 5 steps", lambda: w.WarmupStableDecay(1, 5, warmup=3, decay=3)),
        (ValueError, "factor must be greater than 0 and at most 1", lambda: w.ExponentialDecay(1, 1.5)),
        (ValueError, "one of count and fraction must be given", lambda: w.best(torch.ones(3))),
        (ValueError, "count must be at most the 3 scores, got 4", lambda: w.best(torch.ones(3), count=4)),
        (ValueError, "mixing must be between 0 and 1", lambda: w.DomainSampler(3, mixing=2.0)),
        (ValueError, r"teacher_perplexities must have the shape \(3,\), got \(2,\)",
         lambda: w.DomainSampler(3).update(torch.ones(3), torch.ones(2))),
        (ValueError, "probabilities must be of 3 domains, got 2",
         lambda: w.DomainSampler(3).load_state_dict(w.DomainSampler(2).state_dict())),
        (ValueError, "k must be at most the 2 teachers, got 3", lambda: w.route(torch.zeros(2, 4), k=3)),
        (ValueError, "form must be one of kl, variation", lambda: w.load_balance(torch.zeros(2, 4), form="js")),
        (ValueError, r"divergences must have the shape \[M, M\]", lambda: w.peer_weights(torch.zeros(2, 3))),
        (ValueError, "rates must be above 0 and at most 1, got 0", lambda: w.MovingAverages(Student(), [0.0])),
        (ValueError, "correction must be", lambda: w.MovingAverages(Student(), correction="adam")),
        (ValueError, r"student must have the shape \[N, 4\]",
         lambda: w.TrilateralWeights(4)(*[torch.zeros(2, 5)] * 2, LABELS[:2], torch.zeros(4, 4))),
        (ValueError, r"losses must have the shape \[N\] with N of at least 2", lambda: w.fit_loss_mixture(torch.ones(1))),
        (ValueError, "wrong must be at least 0 and below the 3 samples",
         lambda: w.robust_sampling(torch.ones(3), wrong=3)),
        (ValueError, "count must be at most the 3 points", lambda: w.farthest_first(torch.ones(3, 2), 4)),
    ]  # fmt: skip
    for error, text, call in cases:
        with pytest.raises(error, match=text):
            call()

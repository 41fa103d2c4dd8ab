"""``token_log_probs`` and ``token_set_log_probs`` against plain PyTorch, by the accuracy rule (see ``accuracy``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor
from truth import each_dtype, leaf, random_logits

import kdkernels as kd

VOCAB = 131
SET = torch.arange(VOCAB) % 3 == 1

Formula = Callable[[Tensor], Tensor]


def some_labels(rows: int) -> Tensor:
    return torch.arange(rows) * 37 % VOCAB


def of_label(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, some_labels(len(logits)).unsqueeze(-1)).squeeze(-1)


def of_set(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, SET].logsumexp(-1)


def label_log_probs(source: Any, rows: int, **options: Any) -> Tensor:
    return kd.token_log_probs(source, some_labels(rows), **options)


def set_log_probs(source: Any, rows: int, **options: Any) -> Tensor:
    return kd.token_set_log_probs(source, SET, **options)


each_function = pytest.mark.parametrize(
    ("function", "formula"), [(label_log_probs, of_label), (set_log_probs, of_set)], ids=["label", "set"]
)
each_backend = pytest.mark.parametrize("backend", [None, "reference"])


@each_backend
@each_function
@each_dtype
def test_logits(function: Callable[..., Tensor], formula: Formula, dtype: torch.dtype, backend: str | None) -> None:
    logits = random_logits(VOCAB, dtype)[0]
    tau = 1.7
    upstream = torch.linspace(-1.5, 2.0, len(logits), dtype=torch.float64)
    results = []
    for compute in (torch.promote_types(dtype, torch.float32), torch.float64):
        raised = leaf(logits.to(compute))
        value = formula(raised / tau)
        value.backward(upstream.to(compute))
        results.append((value.detach(), raised.grad))
    given = leaf(logits)
    found = function(given, len(logits), temperature=tau, backend=backend)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    found.backward(upstream.to(found.dtype))
    check("value", found.detach(), results[0][0], results[1][0], results[1][0].abs() + 10)
    assert given.grad is not None
    assert given.grad.dtype == dtype
    # Terms of the size of the upstream gradient cancel in the label's own entry.
    check("gradient", given.grad, results[0][1], results[1][1], upstream.abs().unsqueeze(-1).expand(given.shape))


@each_function
@pytest.mark.parametrize("budget", [None, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads(function: Callable[..., Tensor], formula: Formula, budget: int | None, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 7), (VOCAB, 7), (VOCAB,)]
    tensors = [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    tensors[0][1, 2] = torch.nan
    temperature = torch.linspace(0.5, 2.0, 10, dtype=dtype).reshape(2, 5)
    upstream = torch.linspace(-1.0, 2.0, 10, dtype=dtype).reshape(2, 5)
    mine = [leaf(tensor) for tensor in tensors]
    head = kd.LMHead(*mine, softcap=4.0, logit_scale=0.8)
    labels = some_labels(10).reshape(2, 5)
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "memory_budget": budget}
    if function is set_log_probs:
        found = kd.token_set_log_probs(head, SET.nonzero().squeeze(1), **options)
    else:
        found = kd.token_log_probs(head, labels, **options)
    found.backward(upstream)
    plain = [leaf(tensor.double()) for tensor in tensors]
    hidden = plain[0].masked_fill(~mask.unsqueeze(-1), 0)
    logits = 4.0 * torch.tanh(0.8 * (hidden @ plain[1].T + plain[2]) / 4.0) / temperature.double().unsqueeze(-1)
    expected = formula(logits.reshape(10, VOCAB)).reshape(2, 5).masked_fill(~mask, 0)
    expected.backward(upstream.double())
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert float(found[1, 2].detach()) == 0
    for given, true in zip(mine, plain, strict=True):
        assert given.grad is not None
        assert true.grad is not None
        size = float(true.grad.abs().max())
        torch.testing.assert_close(given.grad.double(), true.grad, rtol=0, atol=tolerance * size)
        assert given is not mine[0] or not given.grad[1, 2].any()


@each_function
def test_what_does_not_count(function: Callable[..., Tensor], formula: Formula) -> None:
    logits = random_logits(VOCAB, torch.float32)[0]
    logits[1] = torch.nan
    mask = torch.arange(len(logits)) != 1
    given = leaf(logits)
    found = function(given, len(logits), mask=mask)
    found.sum().backward()
    assert given.grad is not None
    assert float(found[1].detach()) == 0
    assert not given.grad[1].any()
    torch.testing.assert_close(
        found[mask], formula(logits)[mask] if function is set_log_probs else of_label(logits)[mask]
    )
    assert given.grad[mask].abs().amax(-1).gt(0.01).all()


def test_ignored_labels() -> None:
    labels = torch.tensor([3, -100, 5], dtype=torch.int32)
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    found = kd.token_log_probs(logits, labels)
    torch.testing.assert_close(
        found, torch.stack([logits.log_softmax(-1)[0, 3], torch.zeros(()), logits.log_softmax(-1)[2, 5]])
    )
    assert torch.equal(kd.token_log_probs(logits[2:], labels[2:].long(), ignore_index=5), torch.zeros(1))


@pytest.mark.slow
@each_function
def test_gradcheck(function: Callable[..., Tensor], formula: Formula) -> None:
    logits = random_logits(VOCAB, torch.float64, rows=2)[0].requires_grad_()
    torch.autograd.gradcheck(lambda x: function(x, 2, backend="reference"), logits)
    torch.autograd.gradgradcheck(lambda x: function(x, 2, temperature=0.9), logits)
    compiled = torch.compile(lambda x: function(x, 2, temperature=0.9), fullgraph=True, backend="aot_eager")
    value = compiled(logits)
    torch.testing.assert_close(value, formula(logits / 0.9))
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(formula(logits / 0.9).sum(), logits)[0])


def test_operator() -> None:
    from kdkernels.arguments import prepare_token_set
    from kdkernels.ops.schema import pack_spec
    from kdkernels.ops.token_set import token_set_op

    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    token_set = torch.tensor([1, 4])
    found = prepare_token_set(kd.LMHead(hidden, weight), token_set, temperature=2.0, mask=None, vocab_size=None)
    arguments = (hidden, weight, None, 1.0, found.members, None, "cpu", *pack_spec(found.problem.spec))
    torch.library.opcheck(token_set_op, arguments)


def test_an_unlikely_set() -> None:
    """Far below what a probability in float32 can be."""
    logits = torch.zeros(2, 6)
    logits[:, 2:] = 300.0
    logits[1, 0] = -torch.inf
    given = leaf(logits)
    found = kd.token_set_log_probs(given, torch.tensor([0, 1]))
    expected = torch.tensor([2.0, 1.0]).log() - 300 - torch.tensor(4.0).log()
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close(given.grad, torch.tensor([[0.5, 0.5, *4 * [-0.25]], [0.0, 1.0, *4 * [-0.25]]]))
    everything = kd.token_set_log_probs(logits, torch.ones(6, dtype=torch.bool))
    assert everything.tolist() == [0, 0]
    assert kd.token_set_log_probs(torch.zeros(0, 6), torch.tensor([1])).shape == (0,)


def test_bad_input() -> None:
    logits = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"labels must be token ids in \[0, 6\) or ignore_index=-100; token 1 has 6"):
        kd.token_log_probs(logits, torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="labels must be a tensor"):
        kd.token_log_probs(logits, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source must be a tensor of logits"):
        kd.token_log_probs([1.0], torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be a positive"):
        kd.token_set_log_probs(logits, torch.tensor([0]), temperature=0.0)
    with pytest.raises(ValueError, match=r"token_set must hold token ids in \[0, 6\), got 7"):
        kd.token_set_log_probs(logits, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="token_set must hold at least one"):
        kd.token_set_log_probs(logits, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="token_set must have one entry per token of the vocabulary, 6, got"):
        kd.token_set_log_probs(logits, torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="token_set must have one of the dtypes"):
        kd.token_set_log_probs(logits, torch.tensor([0.5]))
    with pytest.raises(NotImplementedError, match="temperature requires grad"):
        kd.token_log_probs(logits, torch.tensor([0, 1]), temperature=torch.ones(2, requires_grad=True))

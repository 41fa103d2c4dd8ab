"""``token_log_probs`` and ``token_set_log_probs``."""

from __future__ import annotations

from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.functional.divergence import refuse_temperature_gradient
from kdkernels.ops import sparse_divergence as sparse_divergence_ops
from kdkernels.ops import token_set as token_set_ops
from kdkernels.reference.token_log_probs import label_log_probs, set_log_probs
from kdkernels.sources import Source

__all__ = ["token_log_probs", "token_set_log_probs"]


def token_log_probs(
    source: Source,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log-probability of one token id per token, ``log softmax(source / temperature)[label]``, differentiable.

    It is the forward KL divergence from a teacher who is certain of the label, and runs in its kernels. Nothing is shifted:
    ``labels[..., t]`` is what ``source[..., t]`` predicts.

    Args:
        source: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time, once for the values and once more for the gradient. At most 2^24 entries of vocabulary.
        labels: token ids ``[...]`` of an integer type; a label equal to ``ignore_index`` drops the token.
        temperature: positive number, or tensor ``[...]`` with one per token.
        mask: bool ``[...]``, True where a token counts. What stands elsewhere has no influence, even NaN.
        vocab_size: use only the first so many entries of the vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available.

    Returns:
        ``[...]``, 0 where a token does not count; float32, or float64 if the source is.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    arguments.check_memory_budget(memory_budget)
    problem = arguments.prepare_token_log_probs(
        source, labels, temperature=temperature, mask=mask, ignore_index=ignore_index, vocab_size=vocab_size
    )
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "sparse_divergence")
    with autocast_disabled(device):
        if backend == "reference":
            return label_log_probs(problem).reshape(problem.batch_shape)
        refuse_temperature_gradient(problem)
        return -sparse_divergence_ops.rows(problem, memory_budget, backend)[0].reshape(problem.batch_shape)


def token_set_log_probs(
    source: Source,
    token_set: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log-probability that a token is one of a fixed set, ``log sum_{v in set} softmax(source / temperature)_v``.

    Differentiable. The tokens go by in chunks that fit the memory budget; of the vocabulary's size nothing is kept.

    Args:
        source, temperature, mask, vocab_size: as in ``token_log_probs``.
        token_set: bool ``[V]``, True for the members, or their ids ``[K]``.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference" computes on whole ``[N, V]`` tensors, "cpu" and "cuda" in PyTorch on some rows at a time, "triton" in
            a kernel; None takes the best available.

    Returns:
        ``[...]``, 0 where a token does not count; float32, or float64 if the source is.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``token_log_probs``.
    """
    arguments.check_memory_budget(memory_budget)
    found = arguments.prepare_token_set(source, token_set, temperature=temperature, mask=mask, vocab_size=vocab_size)
    problem = found.problem
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "token_set")
    with autocast_disabled(device):
        if backend == "reference":
            return set_log_probs(found).reshape(problem.batch_shape)
        refuse_temperature_gradient(problem)
        return token_set_ops.rows(found, memory_budget, backend).reshape(problem.batch_shape)

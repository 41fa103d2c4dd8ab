"""``topk_logits`` and ``sample_logits``."""

from __future__ import annotations

import torch

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.functional.choosing import backend_for
from kdkernels.ops import topk as topk_ops
from kdkernels.picking import sampled_logits, top_k_logits, uniform_numbers
from kdkernels.reference import topk as topk_reference
from kdkernels.sources import SampledLogits, Source, TopKLogits

__all__ = ["sample_logits", "topk_logits"]


def topk_logits(
    source: Source,
    k: int,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TopKLogits:
    """The ``k`` most probable ids of each token, with their log-probabilities over the full vocabulary. No gradient.

    The selection is exact, and so are the normaliser and the tail, whose mass is summed, not taken from 1: it keeps its
    digits however small it is. The logits are read once.

    Args:
        source: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, whose logits are made a chunk of tokens
            at a time; float32, bfloat16, float16 or float64. At most 2^24 entries of vocabulary.
        k: ids per token, from 1 to V.
        top_p: None, or keep only the shortest prefix whose probability reaches ``top_p``, in (0, 1], at least one id.
        temperature: positive number that divides the logits.
        vocab_size: use only the first so many entries of the vocabulary, for padded heads.
        memory_budget: bytes for the temporary logits of an LMHead; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best available.

    Returns:
        ``TopKLogits`` with ``ids`` int64 ``[..., k]`` in the order of falling logits, equal ones by rising id;
        ``log_probs`` ``[..., k]`` and ``log_tail_mass`` ``[...]`` float32, or float64 if the source is. Logits are compared
        before a softcap, which keeps their order but makes large ones equal. An id of -1 with a log-probability of -inf
        stands where there is no entry: past the cut by ``top_p``, whose mass the tail gets, and where fewer than k logits
        are above -1e5 (-inf is masked vocabulary, never named). ``log_tail_mass`` is -inf where every id is named, 0 where
        none is. In a token whose logits hold NaN or +inf (after the softcap), the ids are -1 and all else is NaN.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    arguments.check_memory_budget(memory_budget)
    picking = arguments.prepare_topk(source, k, top_p=top_p, temperature=temperature, vocab_size=vocab_size)
    device = picking.source.tensor.device.type
    backend = backend_for(backend, device, "topk")
    with torch.no_grad(), autocast_disabled(device):
        if backend == "reference":
            rows = topk_reference.topk_rows(picking)
        else:
            rows = topk_ops.topk(picking, memory_budget, backend)
        return top_k_logits(picking, rows, top_p)


def sample_logits(
    source: Source,
    n: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> SampledLogits:
    """``n`` ids per token drawn with replacement, weighted so that sums over them are unbiased. No gradient.

    With ``p = softmax(z / temperature)`` the ids are drawn from ``softmax(z / (temperature * proposal_temperature))``, and
    the weight of an id is ``p`` over ``n`` times the probability it is drawn with (Sparse Logit Sampling, arXiv
    2503.16870): the expectation of ``sum_j weights[j] g(ids[j])`` is ``sum_v p_v g(v)``.

    Args:
        source, temperature, vocab_size, memory_budget, backend: as in ``topk_logits``.
        n: draws per token, at least 1.
        generator: where the random numbers come from; None: torch's default generator. Equal generators give equal draws,
            whatever the memory budget, the number of threads and (but for rounding) the backend.
        proposal_temperature: positive number; 1 draws from the teacher itself, more draws improbable ids more often.

    Returns:
        ``SampledLogits`` with ``ids`` int64 ``[..., n]``, ``weights`` ``[..., n]``, which are 1 / n without a proposal
        temperature, and the ``entropy`` ``[...]`` of p in nats; float32, or float64 if the source is. Logits not above -1e5
        (-inf is masked vocabulary) are never drawn; a token that has no others gets ids -1, weights and entropy 0. In a
        token whose logits hold NaN or +inf (after the softcap), the ids are -1 and all else is NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``topk_logits``.
    """
    arguments.check_memory_budget(memory_budget)
    picking = arguments.prepare_sample(
        source,
        n,
        generator=generator,
        temperature=temperature,
        proposal_temperature=proposal_temperature,
        vocab_size=vocab_size,
    )
    device = picking.source.tensor.device.type
    backend = backend_for(backend, device, "topk")
    with torch.no_grad(), autocast_disabled(device):
        uniforms = uniform_numbers(picking, generator)
        if backend == "reference":
            rows = topk_reference.sample_rows(picking, uniforms)
        else:
            rows = topk_ops.sample(picking, uniforms, memory_budget, backend)
        return sampled_logits(picking, rows)

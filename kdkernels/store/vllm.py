"""What vLLM says of a prompt, as a truncated teacher. Needs no vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kdkernels.checks import check_integer, is_real
from kdkernels.sources import TopKLogits, check_sparse_vocab_size

__all__ = ["from_vllm"]


def from_vllm(
    prompt_logprobs: Iterable[Any],
    *,
    vocab_size: int,
    k: int | None = None,
    temperature: float = 1.0,
    tail: str = "bucket",
) -> TopKLogits | list[TopKLogits]:
    """``RequestOutput.prompt_logprobs`` as ``TopKLogits [tokens, K]``.

    vLLM files a distribution under the token that it predicts; a source has it where the model made it, one token earlier.
    So row t holds the entry t + 1 of ``prompt_logprobs``, and the last row, whose prediction vLLM does not return, has no
    entries: the rows go with the prompt's token ids, and label t is token t + 1. A list that does not begin with None, as
    that of a completion, makes a row of every entry: row t predicts token t of the completion.

    Args:
        prompt_logprobs: per token None (the first) or a mapping from token id to an object with ``.logprob``, a mapping
            with "logprob" (the JSON of vLLM's server, where ids are texts) or a number. vLLM adds the prompt's own token
            to the k most likely ones. Or a list with one such list per sequence.
        vocab_size: entries of the vocabulary.
        k: keep only the k most likely entries of each token; None: all that are there.
        temperature, tail: as in ``TopKLogits``. vLLM's default ("raw_logprobs") is a temperature of 1.

    Returns:
        ``TopKLogits``, or a list of them if sequences were listed. Entries in descending probability, ties by lower id.
    """
    size = check_sparse_vocab_size("from_vllm", vocab_size)
    if k is not None and check_integer("from_vllm: k", k) < 1:
        raise ValueError(f"from_vllm: k must be at least 1, got {k}")
    tokens = list(prompt_logprobs)
    if tokens and all(is_listed(entry) for entry in tokens):
        return [one_sequence(f"prompt_logprobs[{place}]", list(entry), size, k, temperature, tail)
                for place, entry in enumerate(tokens)]  # fmt: skip
    return one_sequence("prompt_logprobs", tokens, size, k, temperature, tail)


def is_listed(entry: object) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str | bytes | Mapping)


def one_sequence(
    name: str, tokens: list[Any], vocab_size: int, k: int | None, temperature: float, tail: str
) -> TopKLogits:
    rows: list[list[tuple[float, int]]] = []
    of_a_prompt = bool(tokens) and (tokens[0] is None or tokens[0] == {})  # vLLM's flat lists have {} for None
    for place, entry in enumerate(tokens):
        if of_a_prompt and place == 0:
            continue
        if entry is None or not isinstance(entry, Mapping):
            raise TypeError(f"from_vllm: {name}[{place}] must map token ids to log-probabilities, got {entry!r:.80}")
        found = [token_entry(f"{name}[{place}]", token, value, vocab_size) for token, value in entry.items()]
        rows.append(sorted(pair for pair in found if pair[0] < math.inf)[:k])
    if of_a_prompt:
        rows.append([])
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), -1)
    log_probs = torch.full((len(rows), width), -torch.inf)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor([token for _, token in row], dtype=torch.int64)
        log_probs[place, : len(row)] = torch.tensor([-surprise for surprise, _ in row])
    return TopKLogits(ids, log_probs, vocab_size=vocab_size, temperature=temperature, tail=tail)


def token_entry(name: str, token: object, value: Any, vocab_size: int) -> tuple[float, int]:
    """Minus the log-probability, and the id: their order is that of the entries."""
    if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 8:
        token = int(token)
    token_id = check_integer(f"from_vllm: {name}: token id", token)
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"from_vllm: {name}: token ids must lie in [0, {vocab_size}), got {token_id}")
    if isinstance(value, Mapping):
        value = value.get("logprob")
    elif not is_real(value):
        value = getattr(value, "logprob", None)
    if not is_real(value) or math.isnan(value) or value > 0:
        raise ValueError(
            f"from_vllm: {name}[{token_id}]: the log-probability must be a number of at most 0, got {value!r}"
        )
    return -float(value), token_id

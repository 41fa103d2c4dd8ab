"""What a store says of its teacher: the same in the manifest and in every shard."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from kdkernels.checks import check_choice, check_integer, check_real
from kdkernels.sources import CODECS, MAX_VOCAB_SIZE, TAILS, check_sparse_vocab_size
from kdkernels.store.strict_json import Fields

__all__ = ["CODEC_BITS", "LARGEST_COUNT", "Description", "tokenizer_fingerprint"]

CODEC_BITS = {"q4": 4, "q6": 6, "q8": 8, "bf16": 16}
"""Bits per stored value."""

LARGEST_COUNT = (1 << 16) - 1
"""Of the entries of one token."""

LONGEST_NAME = 4096


@dataclass(frozen=True)
class Description:
    """What the records of a store are.

    Args:
        vocab_size: entries of the vocabulary.
        codec: "q4", "q6", "q8" or "bf16".
        tail: what stands for the rest of the vocabulary, as in ``TopKLogits``.
        temperature: of the softmax that the log-probabilities come from.
        k, top_p: how the teacher was cut, where known.
        tokenizer: fingerprint of the tokenizer, see ``tokenizer_fingerprint``.
        teacher: which model it was.
        data: what it read.
    """

    vocab_size: int
    codec: str
    tail: str = "bucket"
    temperature: float = 1.0
    k: int | None = None
    top_p: float | None = None
    tokenizer: str | None = None
    teacher: str | None = None
    data: str | None = None

    @property
    def bits(self) -> int:
        return CODEC_BITS[self.codec]

    @property
    def widest(self) -> int:
        """The most entries a token can have."""
        return min(self.vocab_size if self.k is None else self.k, self.vocab_size, LARGEST_COUNT)

    def values(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """In one way only, so that texts can be compared."""
        return json.dumps(self.values(), sort_keys=True, ensure_ascii=True)

    def differences(self, other: Description) -> list[str]:
        """Names of the fields in which the two differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    @staticmethod
    def read(given: Fields) -> Description:
        """From JSON that is not trusted."""
        vocab_size = given.size("vocab_size", MAX_VOCAB_SIZE)
        if vocab_size < 1:
            raise given.error("vocab_size", "must be at least 1, not 0")
        codec = given.text("codec", LONGEST_NAME)
        if codec not in CODECS:
            raise given.error("codec", f"must be one of {', '.join(CODECS)}, not {codec!r}")
        tail = given.text("tail", LONGEST_NAME)
        if tail not in TAILS:
            raise given.error("tail", f"must be one of {', '.join(TAILS)}, not {tail!r}")
        temperature = given.number("temperature")
        if temperature <= 0:
            raise given.error("temperature", f"must be positive, not {temperature}")
        k = given.optional("k", lambda key: given.size(key, LARGEST_COUNT))
        if k == 0:
            raise given.error("k", "must be at least 1, not 0")
        top_p = given.optional("top_p", given.number)
        if top_p is not None and not 0 < top_p <= 1:
            raise given.error("top_p", f"must lie in (0, 1], not {top_p}")
        names = [
            given.optional(key, lambda key: given.text(key, LONGEST_NAME)) for key in ("tokenizer", "teacher", "data")
        ]
        return Description(vocab_size, codec, tail, temperature, k, top_p, *names)

    @staticmethod
    def check(
        *,
        vocab_size: object,
        codec: object,
        tail: object,
        temperature: object,
        k: object,
        top_p: object,
        tokenizer: object,
        teacher: object,
        data: object,
    ) -> Description:
        """From a caller's arguments."""
        size = check_sparse_vocab_size("store.write", vocab_size)
        entries = None if k is None else check_integer("store.write: k", k)
        if entries is not None and not 1 <= entries <= min(size, LARGEST_COUNT):
            raise ValueError(
                f"store.write: k must be between 1 and the smaller of vocab_size and {LARGEST_COUNT}, got {k}"
            )
        mass = None if top_p is None else check_real("store.write: top_p", top_p, positive=True)
        if mass is not None and mass > 1:
            raise ValueError(f"store.write: top_p must lie in (0, 1], got {top_p}")
        return Description(
            size,
            check_choice("store.write: codec", codec, CODECS),
            check_choice("store.write: tail", tail, TAILS),
            check_real("store.write: temperature", temperature, positive=True),
            entries,
            mass,
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            check_name("teacher", teacher),
            check_name("data", data),
        )


def check_name(argument: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= LONGEST_NAME):
        return value
    raise TypeError(f"store.write: {argument} must be a name of at most {LONGEST_NAME} characters, got {value!r}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What tells one tokenizer from another: a hash of its vocabulary and its special tokens.

    Args:
        tokenizer: a transformers tokenizer, anything else with ``get_vocab()``, or a fingerprint, which is returned as it is.
    """
    if isinstance(tokenizer, str):
        if not 1 <= len(tokenizer) <= LONGEST_NAME:
            raise ValueError(
                f"tokenizer: a fingerprint has 1 to {LONGEST_NAME} characters, got {len(tokenizer)} characters"
            )
        return tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer must be a fingerprint or a tokenizer with get_vocab(), got {type(tokenizer).__name__}"
        )
    vocabulary = sorted((int(index), str(token)) for token, index in tokenizer.get_vocab().items())
    special = getattr(tokenizer, "special_tokens_map", None) or {}
    content = json.dumps([vocabulary, {name: str(token) for name, token in special.items()}], sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

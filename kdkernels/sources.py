"""Sources: where a distribution over the vocabulary comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdkernels.autocast import autocast_dtype
from kdkernels.checks import check_choice, check_flag, check_floating, check_integer, check_integral, check_real

__all__ = [
    "CODECS",
    "MAX_REPLACED",
    "MAX_SOURCES",
    "MAX_VOCAB_SIZE",
    "SPACES",
    "TAILS",
    "DenseTeacher",
    "LMHead",
    "LogitMixture",
    "Logits",
    "PackedLogits",
    "SampledLogits",
    "Source",
    "SparseTeacher",
    "TopKLogits",
]

TAILS = ("bucket", "renormalize", "uniform", "drop")
"""What a truncated teacher says about the vocabulary it does not name."""

CODECS = ("q4", "q6", "q8", "bf16")
"""How log-probabilities are stored: bits per value, uniform in the distance from the row's largest, or a bfloat16."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""That a head may be told to compute in."""

SPACES = ("logits", "probabilities")
"""In which a mixture is formed."""

MAX_SOURCES = 4
"""Of a mixture."""

MAX_REPLACED = 2
"""Entries of a token that a mixture may replace."""

MAX_VOCAB_SIZE = 1 << 24
"""Of sparse teachers: a token id takes at most 24 bits."""


class Logits:
    """A tensor of logits ``[..., V]``. A bare tensor means the same.

    Args:
        tensor: logits, float32, bfloat16, float16 or float64; entries of -inf are masked vocabulary.
        donate: permits the gradient to be written over ``tensor``, which halves the peak memory of a loss with a scalar
            reduction. The logits are then gone: nothing else may use them, and second derivatives are refused. It is a
            permission; where the kernels cannot use it, nothing happens.
        class_bias: ``[V]``, added to the logits of every token as they are read, for class priors or a centre. It gets no
            gradient. ``distillation_loss`` of dense teachers and ``token_statistics`` take it.
    """

    __slots__ = ("class_bias", "donate", "tensor")

    def __init__(self, tensor: Tensor, *, donate: bool = False, class_bias: Tensor | None = None) -> None:
        check_floating("Logits: tensor", tensor)
        if tensor.dim() < 1:
            raise ValueError("Logits: tensor must have the shape [..., V], got a 0-d tensor")
        if class_bias is not None:
            check_class_bias("Logits", class_bias)
        self.tensor = tensor
        self.donate = check_flag("Logits: donate", donate)
        self.class_bias = class_bias


def check_class_bias(owner: str, bias: Tensor) -> None:
    check_floating(f"{owner}: class_bias", bias)
    if bias.dim() != 1:
        raise ValueError(f"{owner}: class_bias must have the shape [V], got {tuple(bias.shape)}")


class LMHead:
    """Logits that are never stored whole: ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    Args:
        hidden: hidden states ``[..., H]``.
        weight: weight of the language-model head ``[V, H]``, in the dtype of ``hidden`` (under autocast any).
        bias: ``[V]`` or None.
        softcap: ``c`` in ``c * tanh(logit / c)`` (Gemma 2 uses 30), or None.
        logit_scale: factor on the logits before the softcap (Cohere's ``logit_scale``, the inverse of Granite's
            ``logits_scaling``), or None.
        compute_dtype: float32, bfloat16 or float16, in which the matrix products run and the temporary logits are held,
            whatever the dtypes of the tensors; sums over the vocabulary and the loss are float32. None: autocast's where it
            is on, else that of the tensors.
    """

    __slots__ = ("bias", "compute_dtype", "hidden", "logit_scale", "softcap", "weight")

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in COMPUTE_DTYPES)
            raise ValueError(f"LMHead: compute_dtype must be None or one of {allowed}, got {compute_dtype!r}")
        check_floating("LMHead: hidden", hidden)
        check_floating("LMHead: weight", weight)
        if hidden.dim() < 1:
            raise ValueError("LMHead: hidden must have the shape [..., H], got a 0-d tensor")
        if weight.dim() != 2:
            raise ValueError(f"LMHead: weight must have the shape [V, H], got {tuple(weight.shape)}")
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LMHead: hidden has size {hidden.shape[-1]} and weight {tuple(weight.shape)} expects {weight.shape[1]}"
            )
        if bias is not None:
            check_floating("LMHead: bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"LMHead: bias must have the shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.device != hidden.device:
                raise ValueError(f"LMHead: {name} is on {tensor.device} and hidden on {hidden.device}")
            computed_in = compute_dtype or autocast_dtype(hidden.device.type)
            if tensor.dtype != hidden.dtype and computed_in is None:
                raise TypeError(
                    f"LMHead: {name} is {tensor.dtype} and hidden {hidden.dtype}; they may differ only under autocast or "
                    "with a compute_dtype"
                )
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.compute_dtype = compute_dtype
        self.softcap = None if softcap is None else check_real("LMHead: softcap", softcap, positive=True)
        self.logit_scale = None if logit_scale is None else check_real("LMHead: logit_scale", logit_scale)
        if self.logit_scale == 0:
            raise ValueError("LMHead: logit_scale must be a number other than 0, got 0")


Coefficient = float | Tensor


class LogitMixture:
    """A teacher made of several sources of logits as the kernels read them; the mixture itself is never stored.

    With the logits ``z_i`` of up to four sources and coefficients ``c_i``, a token's logits are ``sum_i c_i z_i``
    (space="logits", which up to a constant is also the weighted mean of log-probabilities) or those of
    ``sum_i c_i softmax(z_i / temperature)`` (space="probabilities"). To these ``class_bias`` is added, ``lower`` and ``upper``
    clip them, and the ids ``replaced_ids`` get the values ``replacements``.

    A mixture is only ever a teacher, of ``distillation_loss`` and ``token_statistics``, and is constant: no gradient flows to
    anything it is made of, whatever requires grad. Where a coefficient is exactly 0, that source is not read for that token, so
    that coefficients of 0 and 1 choose a teacher per token. Vocabulary that a source masks (-inf) is masked in a sum of logits
    if its coefficient is positive, and in a mixture of probabilities if all sources mask it; clipping does not bring it back.
    Coefficients, bounds and replacements may change from step to step and may live on the device: nothing is compiled anew
    and nothing synchronises.

    Args:
        sources: tensors of logits ``[..., V]``, ``kd.Logits`` or ``kd.LMHead``, of the same tokens and vocabulary. If one
            is float64, the loss must be computed in float64, that is the student or the first source be float64.
        coefficients: per source a number, a 0-d tensor, or a tensor ``[...]`` with one per token. In the space of
            probabilities none is negative; those are the weights of log-probabilities up to a common factor. None: the mean.
        space: "logits" or "probabilities". The latter takes one more sweep over each source, for its normaliser.
        temperature: number or ``[...]`` of the softmax of each source; only with space="probabilities". The temperature of
            the loss divides the mixture's logits like any others: give ``teacher_temperature=1`` to take it as it is.
        class_bias: ``[V]``.
        lower, upper: number, 0-d tensor or ``[...]``: the lowest and the highest logit.
        replaced_ids: int64 or int32 ``[...]`` or ``[..., R]``, R at most 2; -1: none.
        replacements: the same shape: logits, in the place of what the mixture has there.
    """

    __slots__ = (
        "class_bias",
        "coefficients",
        "lower",
        "replaced_ids",
        "replacements",
        "sources",
        "space",
        "temperature",
        "upper",
    )

    def __init__(
        self,
        sources: Sequence[Tensor | Logits | LMHead],
        coefficients: Sequence[Coefficient] | None = None,
        *,
        space: str = "logits",
        temperature: Coefficient = 1.0,
        class_bias: Tensor | None = None,
        lower: Coefficient | None = None,
        upper: Coefficient | None = None,
        replaced_ids: Tensor | None = None,
        replacements: Tensor | None = None,
    ) -> None:
        if isinstance(sources, Tensor) or not isinstance(sources, Sequence):
            raise TypeError(f"LogitMixture: sources must be a list of sources, got {type(sources).__name__}")
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise ValueError(f"LogitMixture: there may be 1 to {MAX_SOURCES} sources, got {len(sources)}")
        for place, source in enumerate(sources):
            if not isinstance(source, Tensor | Logits | LMHead):
                allowed = "a tensor of logits, kd.Logits or kd.LMHead"
                raise TypeError(f"LogitMixture: sources[{place}] must be {allowed}, got {type(source).__name__}")
            if isinstance(source, Logits) and source.class_bias is not None:
                raise ValueError(
                    f"LogitMixture: sources[{place}] has a class_bias of its own; give class_bias to the mixture"
                )
        if coefficients is not None and (
            isinstance(coefficients, Tensor)
            or not isinstance(coefficients, Sequence)
            or len(coefficients) != len(sources)
        ):
            given = len(coefficients) if isinstance(coefficients, Sequence) else type(coefficients).__name__
            raise ValueError(
                f"LogitMixture: coefficients must be a list with one per source, {len(sources)}, got {given}"
            )
        self.sources = tuple(sources)
        self.coefficients = None if coefficients is None else tuple(coefficients)
        self.space = check_choice("LogitMixture: space", space, SPACES)
        if self.space == "logits" and (isinstance(temperature, Tensor) or temperature != 1):
            raise ValueError(
                "LogitMixture: temperature is for space='probabilities'; in the space of logits use coefficients"
            )
        self.temperature = temperature
        if class_bias is not None:
            check_class_bias("LogitMixture", class_bias)
        self.class_bias = class_bias
        self.lower = lower
        self.upper = upper
        if (replaced_ids is None) != (replacements is None):
            raise ValueError("LogitMixture: replaced_ids and replacements come together or not at all")
        if replaced_ids is not None and replacements is not None:
            check_integral("LogitMixture: replaced_ids", replaced_ids)
            check_floating("LogitMixture: replacements", replacements)
            if replaced_ids.shape != replacements.shape:
                raise ValueError(
                    "LogitMixture: replaced_ids and replacements must have the same shape, "
                    f"got {tuple(replaced_ids.shape)} and {tuple(replacements.shape)}"
                )
        self.replaced_ids = replaced_ids
        self.replacements = replacements


def check_sparse_vocab_size(owner: str, vocab_size: object) -> int:
    size = check_integer(f"{owner}: vocab_size", vocab_size)
    if not 1 <= size <= MAX_VOCAB_SIZE:
        raise ValueError(f"{owner}: vocab_size must be between 1 and {MAX_VOCAB_SIZE}, got {size}")
    return size


def check_entries(owner: str, ids: object, values_name: str, values: Tensor) -> None:
    """Ids and the values that go with them: [..., K], on one device."""
    check_integral(f"{owner}: ids", ids)
    check_floating(f"{owner}: {values_name}", values)
    assert isinstance(ids, Tensor)
    if ids.dim() < 1:
        raise ValueError(f"{owner}: ids must have the shape [..., K], got a 0-d tensor")
    if ids.shape != values.shape:
        raise ValueError(
            f"{owner}: ids and {values_name} must have the same shape [..., K], "
            f"got {tuple(ids.shape)} and {tuple(values.shape)}"
        )
    if ids.device != values.device:
        raise ValueError(f"{owner}: ids are on {ids.device} and {values_name} on {values.device}")


def check_per_token(owner: str, name: str, value: Tensor, like: Tensor) -> None:
    """A floating-point number per token of ``like`` [..., K]."""
    check_floating(f"{owner}: {name}", value)
    if value.shape != like.shape[:-1]:
        raise ValueError(f"{owner}: {name} must have the shape {tuple(like.shape[:-1])}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{owner}: {name} is on {value.device} and ids on {like.device}")


class TopKLogits:
    """A truncated teacher: some token ids per token, with their log-probabilities over the full vocabulary.

    Args:
        ids: token ids ``[..., K]``, int64 or int32, in any order, each at most once per token; -1 where there is no entry.
        log_probs: ``[..., K]``, the logarithm of the probability over the FULL vocabulary. Never requires grad.
        vocab_size: entries of the vocabulary, at most 2^24.
        tail: what stands for the rest of the vocabulary, which has the probability ``r = 1 - sum exp(log_probs)``:
            "bucket": one outcome of probability r, on both sides;
            "renormalize": nothing, the teacher is divided by ``1 - r``; the student keeps its full vocabulary;
            "uniform": r spread evenly over the ids that are not named;
            "drop": only the terms of the named ids are summed, which is no divergence and may be negative.
        temperature: the temperature of the softmax that ``log_probs`` come from.
        log_tail_mass: ``[...]``, the logarithm of r, where it is known better than from the difference.
    """

    __slots__ = ("ids", "log_probs", "log_tail_mass", "tail", "temperature", "vocab_size")

    def __init__(
        self,
        ids: Tensor,
        log_probs: Tensor,
        *,
        vocab_size: int,
        tail: str = "bucket",
        temperature: float = 1.0,
        log_tail_mass: Tensor | None = None,
    ) -> None:
        check_entries("TopKLogits", ids, "log_probs", log_probs)
        if log_tail_mass is not None:
            check_per_token("TopKLogits", "log_tail_mass", log_tail_mass, ids)
        self.ids = ids
        self.log_probs = log_probs
        self.vocab_size = check_sparse_vocab_size("TopKLogits", vocab_size)
        self.tail = check_choice("TopKLogits: tail", tail, TAILS)
        self.temperature = check_real("TopKLogits: temperature", temperature, positive=True)
        self.log_tail_mass = log_tail_mass

    @property
    def batch_shape(self) -> torch.Size:
        """The shape ``[...]`` of the tokens."""
        return self.ids.shape[:-1]

    def changed(self, change: Callable[[Tensor], Tensor]) -> TopKLogits:
        """The same teacher with every tensor changed, to another device for instance."""
        return TopKLogits(
            change(self.ids),
            change(self.log_probs),
            vocab_size=self.vocab_size,
            tail=self.tail,
            temperature=self.temperature,
            log_tail_mass=None if self.log_tail_mass is None else change(self.log_tail_mass),
        )

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TopKLogits:
        """On another device."""
        return self.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopKLogits:
        """In page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self.changed(Tensor.pin_memory)


class SampledLogits:
    """A sampled teacher: token ids drawn with replacement, weighted so that sums over them are unbiased.

    ``sum_j weights[j] g(ids[j])`` has the expectation ``sum_v p_v g(v)`` (Sparse Logit Sampling, arXiv 2503.16870). So only
    what is linear in the teacher's probabilities can be computed from it: the forward KL.

    Args:
        ids: token ids ``[..., n]``, int64 or int32; the same id may occur repeatedly; -1 where there is no entry.
        weights: ``[..., n]``, non-negative.
        vocab_size: entries of the vocabulary, at most 2^24.
        entropy: ``[...]``, the teacher's entropy in nats, which turns the cross-entropy into the KL divergence; None: the
            loss is the cross-entropy, with the same gradient.
        temperature: the temperature of the teacher that was sampled (not of the proposal).
    """

    __slots__ = ("entropy", "ids", "temperature", "vocab_size", "weights")

    def __init__(
        self,
        ids: Tensor,
        weights: Tensor,
        *,
        vocab_size: int,
        entropy: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_entries("SampledLogits", ids, "weights", weights)
        if entropy is not None:
            check_per_token("SampledLogits", "entropy", entropy, ids)
        self.ids = ids
        self.weights = weights
        self.vocab_size = check_sparse_vocab_size("SampledLogits", vocab_size)
        self.entropy = entropy
        self.temperature = check_real("SampledLogits: temperature", temperature, positive=True)

    @property
    def batch_shape(self) -> torch.Size:
        """The shape ``[...]`` of the tokens."""
        return self.ids.shape[:-1]


class PackedLogits:
    """A truncated teacher as stored: one record of bytes per token, see ``csrc/math/records.h`` for the format.

    Args:
        data: the records of all tokens, one after another in the order of ``counts``, uint8 ``[bytes]``.
        counts: entries per token ``[...]``, int32; a token without entries has no record.
        vocab_size: entries of the vocabulary, at most 2^24.
        codec: "q4", "q6", "q8" or "bf16".
        tail, temperature: as in ``TopKLogits``.
    """

    __slots__ = ("codec", "counts", "data", "tail", "temperature", "vocab_size")

    def __init__(
        self,
        data: Tensor,
        counts: Tensor,
        *,
        vocab_size: int,
        codec: str,
        tail: str = "bucket",
        temperature: float = 1.0,
    ) -> None:
        for name, tensor, dtype in (("data", data, torch.uint8), ("counts", counts, torch.int32)):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.layout != torch.strided:
                given = f"a {tensor.layout} tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor)
                raise TypeError(f"PackedLogits: {name} must be a dense {dtype} tensor, got {given}")
        if data.dim() != 1:
            raise ValueError(f"PackedLogits: data must have the shape [bytes], got {tuple(data.shape)}")
        if data.device != counts.device:
            raise ValueError(f"PackedLogits: data is on {data.device} and counts on {counts.device}")
        self.data = data
        self.counts = counts
        self.vocab_size = check_sparse_vocab_size("PackedLogits", vocab_size)
        self.codec = check_choice("PackedLogits: codec", codec, CODECS)
        self.tail = check_choice("PackedLogits: tail", tail, TAILS)
        self.temperature = check_real("PackedLogits: temperature", temperature, positive=True)

    @property
    def batch_shape(self) -> torch.Size:
        """The shape ``[...]`` of the tokens."""
        return self.counts.shape

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedLogits:
        """The same teacher with every tensor changed, to another device for instance."""
        return PackedLogits(
            change(self.data),
            change(self.counts),
            vocab_size=self.vocab_size,
            codec=self.codec,
            tail=self.tail,
            temperature=self.temperature,
        )

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> PackedLogits:
        """On another device."""
        return self.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLogits:
        """In page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self.changed(Tensor.pin_memory)


Source = Tensor | Logits | LMHead
DenseTeacher = Source | LogitMixture
SparseTeacher = TopKLogits | SampledLogits | PackedLogits

"""Holds the answers of a backend against the truth, and against what plain PyTorch makes of the same inputs.

The error of an answer is the largest over its rows of ``|answer - truth| / |truth|`` (Euclidean norms along the last
dimension), so it is measured in the size of the gradient and a gradient of zeros is an error of 1. The rule: a backend's
error is at most that of the reference in the inputs' own dtype, plus the tolerance of that dtype (see ``Target``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.arguments.records import pack_rows, unpack_rows
from kdkernels.backends import NAMES, row_backend, serves
from kdkernels.divergences import Divergence
from kdkernels.ops.row_deviation import LEAST
from kdkernels.reference import records as record_reference
from kdkernels.reference import row_deviation as deviation_reference
from kdkernels.validation.cases import IGNORE_INDEX, TINY_BUDGET, TOP, Case, Inputs, head_cases, logit_cases
from kdkernels.validation.samples import AngleCase, RelationCase, angle_cases, relation_cases
from kdkernels.validation.transport import TransportCase, transport_cases

__all__ = ["DTYPES", "FAMILIES", "KERNELS", "Finding", "Plan", "Target", "make_plan", "servers", "unserved", "validate"]

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 1e-3,  # an eighth of a unit in the last place
    torch.float16: 1.25e-4,
}
DTYPES = tuple(TOLERANCES)

LENIENCE = {
    "linear_divergence": 4,
    "pairwise_l1 of heads": 4,
    "sinkhorn": 4,
    "relation_loss": 4,
    "angle_loss": 4,
}
"""Factors on the tolerance: for LM heads, relations and angles, because the order of their matrix products' sums, and what is
rounded between, is free; for transport, because rounding goes through many iterations."""

FAMILIES = {
    "divergence": "divergence",
    "linear_divergence": "linear_divergence",
    "sparse_divergence": "sparse_divergence",
    "mixture": "compositions",
    "token_statistics": "token_statistics",
    "topk_logits": "topk",
    "sample_logits": "topk",
    "records": "records",
    "token_log_probs": "sparse_divergence",
    "token_set_log_probs": "token_set",
    "pairwise_l1": "pairwise_l1",
    "pairwise_l1 of heads": "pairwise_l1",
    "sorted_l1": "sorted_l1",
    "plackett_luce": "ranking",
    "bernoulli_loss": "bernoulli",
    "head_mass": "head_mass",
    "row_deviation": "row_deviation",
    "relation_loss": "relation",
    "angle_loss": "angle",
    "sinkhorn": "sinkhorn",
}
"""The operations that are checked, in the order of the report, and the kernel family that a backend must serve for each."""

HEAD_OPERATIONS = ("linear_divergence", "pairwise_l1 of heads")

KERNELS = tuple(name for name in NAMES if name != "reference")
"""The backends that have kernels."""

SMALL_ROW = 0.1
"""Rows smaller than this part of the largest one are measured by that; a truth that vanishes altogether, by 1."""

VOCABULARIES = (1, 2, 127, 4097, 32_000)
FEWER_VOCABULARIES = (1, 127)
ODD_VOCABULARY, WIDE_VOCABULARY = 127, 1031
"""No multiples of anything that kernels work in."""

Answers = dict[str, Tensor]
OwnCase = TransportCase | RelationCase | AngleCase
"""Cases of functions that are not of logits; they know what to call."""


class Finding(NamedTuple):
    """The worst answer to a case."""

    case: str
    quantity: str
    error: float
    plain_error: float
    passed: bool
    trouble: str = ""
    """The exception, if one was raised."""


@dataclass(frozen=True)
class Target:
    """One line of the report: an operation of a backend in one dtype, over all its cases."""

    operation: str
    divergence: Divergence | None
    backend: str
    dtype: torch.dtype
    cases: tuple[Case | OwnCase, ...]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype] * LENIENCE.get(self.operation, 1)


Plan = list[Target]


def servers(device: str, wanted: str | None) -> tuple[list[str], dict[str, str]]:
    """The backends with kernels that serve this type of device, and for the others the reason why not."""
    able, unable = [], {}
    for name in KERNELS:
        if wanted in {None, name}:
            supported, reason = row_backend(name).supports(device)
            if supported:
                able.append(name)
            else:
                unable[name] = reason
    return able, unable


def unserved(names: Sequence[str], operations: Collection[str] = tuple(FAMILIES)) -> dict[str, str]:
    """Those of the operations that some of these backends have no kernels for, and the reasons."""
    refusals = {}
    for name in names:
        for operation in operations:
            served, reason = serves(name, FAMILIES[operation])
            if not served:
                refusals[f"{operation} by {name}"] = reason
    return refusals


def make_plan(
    names: Sequence[str],
    divergences: Sequence[Divergence],
    dtypes: Sequence[torch.dtype],
    quick: bool,
    operations: Collection[str] = tuple(FAMILIES),
) -> Plan:
    vocabularies = FEWER_VOCABULARIES if quick else VOCABULARIES
    logits = tuple(logit_cases(vocabularies, ODD_VOCABULARY, WIDE_VOCABULARY))
    heads = tuple(head_cases(vocabularies[:-1], ODD_VOCABULARY))
    pickable = tuple(case for case in logits if case.pickable)
    truncatable = tuple(case for case in logits if not case.decoupled)
    # Each awkwardness of labels is one of divergences; here a label is an id like others.
    unlabelled = tuple(case for case in logits if not case.labels)
    cases: dict[str, tuple[Case | OwnCase, ...]] = dict.fromkeys(FAMILIES, logits) | {
        "linear_divergence": heads,
        "sparse_divergence": truncatable,
        "topk_logits": pickable,
        "sample_logits": pickable,
        "records": pickable,
        "token_log_probs": unlabelled,
        "token_set_log_probs": unlabelled,
        "pairwise_l1": tuple(case for case in logits if case.pairable),
        "pairwise_l1 of heads": tuple(case for case in heads if case.pairable),
        "head_mass": unlabelled,
        "row_deviation": tuple(case for case in logits if case.deviating),
        "relation_loss": relation_cases(),
        "angle_loss": angle_cases(),
        "sinkhorn": transport_cases(),
    }
    # Elsewhere the first and the last: the row kernels are the same, or the same formulas.
    some = divergences[:: max(1, len(divergences) - 1)]
    of_divergences: dict[str, Sequence[Divergence | None]] = {
        "divergence": divergences,
        "linear_divergence": some,
        "sparse_divergence": some,
        "mixture": some,
    }
    plan: Plan = []
    for name in names:
        for operation, family in FAMILIES.items():
            if operation not in operations or not serves(name, family)[0]:
                continue
            # Where sigmoids saturate, their difference is nothing but rounding in the truth as well: float64 has no better
            # one.
            exact = [dtype for dtype in dtypes if operation != "bernoulli_loss" or dtype != torch.float64]
            plan += [
                Target(operation, divergence, name, dtype, cases[operation])
                for divergence in of_divergences.get(operation, [None])
                for dtype in exact
            ]
    return plan


def validate(target: Target, device: str) -> Iterator[Finding]:
    """One finding per case."""
    for case in target.cases:
        if not isinstance(case, Case):
            yield validate_own(case, target, device)
            continue
        if case.teacher_dtype == target.dtype:
            continue
        make = case.heads if target.operation in HEAD_OPERATIONS else case.logits
        if target.operation == "sparse_divergence":
            make = case.truncated
        elif target.operation == "mixture":
            make = case.mixed
        inputs = make(target.dtype, device)
        arguments: dict[str, Any] = {"backend": target.backend}
        if case.many_chunks:
            arguments["memory_budget"] = TINY_BUDGET
        elif case.no_logits:
            arguments["memory_budget"] = 0
        with one_thread():
            truth = answers(kd.reference, as_double(inputs), target, {})
            plain = answers(kd.reference, inputs, target, {})
        try:
            ours = answers(kd, inputs._replace(leaves=inputs.polluted), target, arguments)
        except Exception as error:  # noqa: BLE001 - whatever a kernel does wrong is a finding
            yield Finding(case.name, "", torch.inf, 0.0, False, f"{type(error).__name__}: {error}")
        else:
            with one_thread():
                yield worst(case, ours, plain, truth, target.tolerance)


def validate_own(case: OwnCase, target: Target, device: str) -> Finding:
    with one_thread():
        truth = case.answers(kd.reference, target.dtype, device, {}, double=True)
        plain = case.answers(kd.reference, target.dtype, device, {})
    try:
        ours = case.answers(kd, target.dtype, device, {"backend": target.backend})
    except Exception as error:  # noqa: BLE001 - whatever a kernel does wrong is a finding
        return Finding(case.name, "", torch.inf, 0.0, False, f"{type(error).__name__}: {error}")
    return worst(case, ours, plain, truth, target.tolerance)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On tensors as small as these, waiting for threads costs PyTorch more than their work brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_double(inputs: Inputs) -> Inputs:
    return inputs._replace(leaves={name: leaf.double() for name, leaf in inputs.leaves.items()})


def answers(library: Any, inputs: Inputs, target: Target, arguments: dict[str, Any]) -> Answers:
    """What kdkernels or its reference computes."""
    if target.divergence is not None:
        return loss_answers(library, inputs, inputs.adapted(target.divergence), arguments)
    return ANSWERS[target.operation](library, inputs, arguments)


def loss_answers(library: Any, inputs: Inputs, divergence: Divergence, arguments: dict[str, Any]) -> Answers:
    """The losses of the tokens and their sum, and the gradients of both: every way a loss is computed."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    function: Callable[..., Tensor] = library.distillation_loss

    def loss(reduction: str) -> Tensor:
        student, teacher = inputs.sources(leaves)
        return function(
            student, teacher, divergence, reduction=reduction, **inputs.options, **inputs.loss_options, **arguments
        )

    def gradients(value: Tensor, upstream: Tensor | None, name: str) -> Answers:
        parts = torch.autograd.grad(value, list(leaves.values()), upstream)
        return {f"gradient to {leaf}, {name}": part for leaf, part in zip(leaves, parts, strict=True)}

    total, rows = loss("sum"), loss("none")
    with torch.no_grad():
        alone = rows if library is kd.reference else loss("none")
    found = {
        "value per token, without gradient": alone.detach().flatten(),
        "value per token": rows.detach().flatten(),
        "sum": total.detach().reshape(1),
    }
    return found | gradients(total, None, "sum") | gradients(rows, inputs.upstream.to(rows.dtype), "per token")


def statistics_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """Every statistic of the tokens, with both sides and with the student alone."""
    student, teacher = inputs.sources(inputs.leaves)
    options = dict(inputs.options)
    labels = options.pop("labels", None)
    both = library.token_statistics(student, teacher, labels, **options, **arguments)._asdict()
    alone = library.token_statistics(student, None, labels, **options, **arguments)._asdict()
    found = {name: values for name, values in both.items() if values is not None}
    found |= {f"{name}, without teacher": values for name, values in alone.items() if values is not None}
    return {name: values.flatten() for name, values in found.items()}


def topk_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The ids, what is said of them, and the tail; what is -inf, because nothing is there, as 0."""
    logits = inputs.leaves["student"]
    options = {name: inputs.options[name] for name in ("temperature", "vocab_size") if name in inputs.options}
    k = min(TOP, options.get("vocab_size", logits.shape[-1]))
    found = library.topk_logits(logits, k, **options, **arguments)
    answers = {"ids": found.ids, "log_probs": found.log_probs, "log_tail_mass": found.log_tail_mass}
    return {name: values.masked_fill(values.isneginf(), 0).flatten() for name, values in answers.items()}


def sample_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """Draws with equal random numbers, from a flatter distribution than the source."""
    logits = inputs.leaves["student"]
    options = {name: inputs.options[name] for name in ("temperature", "vocab_size") if name in inputs.options}
    generator = torch.Generator(logits.device).manual_seed(logits.shape[-1])
    found = library.sample_logits(logits, TOP, generator=generator, proposal_temperature=1.5, **options, **arguments)
    return {"ids": found.ids.flatten(), "weights": found.weights.flatten(), "entropy": found.entropy.flatten()}


def record_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """What a truncated teacher is after packing and unpacking, in every codec; ids that are none count as such."""
    # The records are data, the same in every dtype.
    logits = inputs.leaves["student"].float()
    vocab = inputs.options.get("vocab_size", logits.shape[-1])
    stored = kd.reference.topk_logits(logits, min(TOP, vocab), vocab_size=vocab)
    found = {}
    for codec in ("q4", "q6", "q8", "bf16"):
        if library is kd.reference:
            entries = kd.reference.unpack(kd.reference.pack(stored, codec))
        else:
            room = row_backend(arguments["backend"])
            pack = getattr(room, "pack_records", record_reference.pack_records)
            entries = unpack_rows(pack_rows(stored, codec, pack), room.unpack_records)
        found[f"ids, {codec}"] = entries.ids.flatten()
        for name in ("log_probs", "log_tail_mass"):
            values = getattr(entries, name)
            found[f"{name}, {codec}"] = values.masked_fill(values.isneginf(), 0).flatten()
    return found


def label_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The log-probabilities of some id per token, one of them ignored, and the gradients to the source."""
    tokens = inputs.upstream
    labels = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape) * 3
    # An id that is masked in every token would have no log-probability: those that are come after a multiple of 3.
    labels = labels % vocab_of(inputs) // 3 * 3
    labels.view(-1)[-1] = IGNORE_INDEX
    return log_prob_answers(library.token_log_probs, inputs, labels, arguments)


def token_set_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The log-probabilities of every third id together, and the gradients to the source."""
    members = torch.arange(0, vocab_of(inputs), 3, device=inputs.upstream.device)
    return log_prob_answers(library.token_set_log_probs, inputs, members, arguments)


def vocab_of(inputs: Inputs) -> int:
    size: int = inputs.options.get("vocab_size", inputs.leaves["student"].shape[-1])
    return size


def log_prob_answers(
    function: Callable[..., Tensor], inputs: Inputs, ids: Tensor, arguments: dict[str, Any]
) -> Answers:
    leaf = inputs.leaves["student"].detach().clone().requires_grad_()
    options = {name: inputs.options[name] for name in ("temperature", "mask", "vocab_size") if name in inputs.options}
    values = function(leaf, ids, **options, **arguments)
    (gradient,) = torch.autograd.grad(values, leaf, inputs.upstream.to(values.dtype))
    return {"value per token": values.detach().flatten(), "gradient to student": gradient}


def head_mass_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """Where the teacher's head ends, and how far the student is off on it and elsewhere."""
    student, teacher = inputs.leaves["student"], inputs.leaves["teacher"]
    vocab = {name: inputs.options[name] for name in ("vocab_size",) if name in inputs.options}
    others = {
        name: inputs.options[name] for name in ("temperature", "teacher_temperature", "mask") if name in inputs.options
    }
    found = {}
    for name, crossing in (("", False), (", crossing", True)):
        if "mask" not in inputs.options:
            threshold = library.mass_threshold(teacher, 0.6, crossing=crossing, **vocab, **arguments)
            found[f"threshold{name}"] = threshold.flatten()
        head, tail = library.head_tail_gap(student, teacher, 0.6, crossing=crossing, **others, **vocab, **arguments)
        found |= {f"gap of the head{name}": head.flatten(), f"gap of the tail{name}": tail.flatten()}
    return found


def deviation_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """Mean and standard deviation of the tokens' logits, and what the deviation as a temperature makes of a gradient."""
    logits, gradient = (leaf.detach().flatten(0, -2) for leaf in inputs.leaves.values())
    room: Any = deviation_reference if library is kd.reference else row_backend(arguments["backend"])
    means, deviations = room.row_deviation(logits, LEAST)
    gradient = gradient.clone()
    room.row_deviation_backward(logits, means, deviations, gradient)
    return {"means": means, "deviations": deviations, "gradient": gradient}


def pair_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The distances of all pairs of a batch's tokens, and the gradients of their sum under weights of both signs."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    distance: Tensor = library.pairwise_l1(*inputs.sources(leaves), **inputs.options, **arguments)
    weights = inputs.upstream.to(distance.dtype)
    upstream = weights.unsqueeze(-1) - 0.4 * weights.unsqueeze(-2)
    parts = torch.autograd.grad(distance, list(leaves.values()), upstream)
    found = {f"gradient to {leaf}": part for leaf, part in zip(leaves, parts, strict=True)}
    return {"distance": distance.detach()} | found


def sorted_l1_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The values per token, and the gradients to both sides."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    options = {
        name: inputs.options[name] for name in ("temperature", "teacher_temperature", "mask") if name in inputs.options
    }
    values = library.sorted_l1(*inputs.sources(leaves), **options, **arguments)
    parts = torch.autograd.grad(values, list(leaves.values()), inputs.upstream.to(values.dtype))
    gradients = {f"gradient to {leaf}": part for leaf, part in zip(leaves, parts, strict=True)}
    return {"value per token": values.detach().flatten()} | gradients


def bernoulli_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The values per token in every form, and the gradients to the student."""
    leaves = {
        name: leaf.detach().clone().requires_grad_(name.startswith("student")) for name, leaf in inputs.leaves.items()
    }
    student, teacher = inputs.sources(leaves)
    mine = [name for name, leaf in leaves.items() if leaf.requires_grad]
    options = {
        name: inputs.options[name]
        for name in ("temperature", "teacher_temperature", "mask", "vocab_size")
        if name in inputs.options
    }
    found = {}
    for form in ("cross_entropy", "kl", "half"):
        values = library.bernoulli_loss(student, teacher, form=form, reduction="none", **options, **arguments)
        parts = torch.autograd.grad(values, [leaves[leaf] for leaf in mine], inputs.upstream.to(values.dtype))
        found[f"value per token, {form}"] = values.detach().flatten()
        found |= {f"gradient to {leaf}, {form}": part for leaf, part in zip(mine, parts, strict=True)}
    return found


def ranking_answers(library: Any, inputs: Inputs, arguments: dict[str, Any]) -> Answers:
    """The values per token of the whole order and of its head, and the gradients to the student."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    student, teacher = inputs.sources(leaves)
    mine = [name for name in leaves if name.startswith("student")]
    options = {
        name: inputs.options[name]
        for name in ("mask", "labels", "ignore_index", "vocab_size")
        if name in inputs.options
    }
    k = min(TOP, options.get("vocab_size", leaves["student"].shape[-1]))
    found = {}
    for name, top_k in (("", None), (" of the first ranks", k)):
        values = library.plackett_luce(
            student, teacher, top_k=top_k, temperature=1.3, reduction="none", **options, **arguments
        )
        parts = torch.autograd.grad(values, [leaves[leaf] for leaf in mine], inputs.upstream.to(values.dtype))
        found[f"value per token{name}"] = values.detach().flatten()
        found |= {f"gradient to {leaf}{name}": part for leaf, part in zip(mine, parts, strict=True)}
    if "mask" not in inputs.options:
        logits = leaves["student"].detach()
        ids = torch.arange(k, device=logits.device).expand(*logits.shape[:-1], k)
        found["ranks"] = library.token_ranks(
            logits,
            ids,
            **{name: options[name] for name in ("vocab_size",) if name in options},
            **arguments,
        ).flatten()
    return found


ANSWERS: dict[str, Callable[[Any, Inputs, dict[str, Any]], Answers]] = {
    "token_statistics": statistics_answers,
    "topk_logits": topk_answers,
    "sample_logits": sample_answers,
    "records": record_answers,
    "token_log_probs": label_answers,
    "token_set_log_probs": token_set_answers,
    "pairwise_l1": pair_answers,
    "pairwise_l1 of heads": pair_answers,
    "sorted_l1": sorted_l1_answers,
    "plackett_luce": ranking_answers,
    "bernoulli_loss": bernoulli_answers,
    "head_mass": head_mass_answers,
    "row_deviation": deviation_answers,
}


def error_of(answer: Tensor, truth: Tensor, term_size: float) -> float:
    """The relative error, see above; infinite for an answer that is not finite or has another shape."""
    if answer.shape != truth.shape or not bool(answer.isfinite().all()):
        return torch.inf
    rows = (-1, truth.shape[-1]) if truth.dim() > 1 else (1, -1)
    truth, difference = truth.double().reshape(rows), (answer.double() - truth.double()).reshape(rows)
    size = truth.norm(dim=-1)
    least = max(term_size, SMALL_ROW * float(size.max()))
    return float((difference.norm(dim=-1) / size.clamp(min=least if least > SMALL_ROW**6 else 1.0)).max())


def worst(case: Case | OwnCase, ours: Answers, plain: Answers, truth: Answers, tolerance: float) -> Finding:
    """The answer that comes closest to failing, or fails most."""
    findings = []
    for name, expected in truth.items():
        error = error_of(ours[name], expected, case.term_size)
        plain_error = error_of(plain[name], expected, case.term_size)
        if expected.dtype == torch.int64:  # token ids are right or wrong
            error = plain_error = 0.0 if torch.equal(ours[name], expected) else torch.inf
            passed = error == 0
        else:
            passed = error <= plain_error + tolerance
        findings.append(Finding(case.name, name, error, plain_error, passed))
    return max(findings, key=lambda finding: (not finding.passed, finding.error - finding.plain_error))

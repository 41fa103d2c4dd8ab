"""Sparse teachers, checked and brought into rows: what ``rows`` does for logits and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.sparse_rows import Policy, Records, SparseRows
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import Decoupled, Divergence, Kind
from kdkernels.records import BITS
from kdkernels.sources import PackedLogits, SampledLogits, SparseTeacher, TopKLogits

__all__ = ["check_divergence", "check_values", "policy_of", "relative_temperature", "sparse_rows"]

SLACK = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By how much log-probabilities, and the sums of probabilities, may exceed 0 and 1."""
HALF_SLACK = 3e-2


def policy_of(teacher: SparseTeacher) -> Policy:
    return Policy.SAMPLED if isinstance(teacher, SampledLogits) else Policy[teacher.tail.upper()]


def check_divergence(divergence: Divergence, policy: Policy) -> None:
    """Refuses divergences that the policy leaves undefined or infinite."""
    if isinstance(divergence, Decoupled):
        raise ValueError(  # noqa: TRY004 - with another teacher it is right
            f"divergence must not be Decoupled for a sparse teacher, whose rows need not say what the label has; "
            f"got {divergence!r}"
        )
    (kind, a, _), parameters = divergence.form, divergence.parameters
    if policy == Policy.SAMPLED and kind not in (Kind.FORWARD_KL, Kind.SOFT_CROSS_ENTROPY):
        raise ValueError(
            f"divergence must be ForwardKL() or SoftCrossEntropy() for SampledLogits, got {divergence!r}: samples are "
            f"unbiased only for what is linear in the teacher's probabilities"
        )
    infinite = kind == Kind.REVERSE_KL or (kind == Kind.JEFFREYS and a != 1) or (kind == Kind.ALPHA and a < 0)
    if kind == Kind.SKEW_REVERSE_KL and parameters is not None:
        infinite = values_are_checked(parameters) and bool((parameters == 0).any())
    if policy == Policy.RENORMALIZE and infinite:
        raise ValueError(
            f"divergence {divergence!r} is infinite with tail='renormalize', where the teacher has probability 0 and the "
            f"student has not; use tail='bucket'"
        )


def sparse_rows(teacher: SparseTeacher, shape: torch.Size, vocab: int, device: torch.device) -> SparseRows:
    """The rows of a teacher that goes with a student of this batch shape and vocabulary."""
    owner = type(teacher).__name__
    if teacher.batch_shape != shape:
        raise ValueError(
            f"student and teacher must have the same tokens: the student's batch has the shape {tuple(shape)}, "
            f"that of the {owner} {tuple(teacher.batch_shape)}"
        )
    if teacher.vocab_size != vocab:
        raise ValueError(
            f"student and teacher have vocabularies of {vocab} and {teacher.vocab_size} entries. If the student's has "
            f"padding, use vocab_size={teacher.vocab_size}; different tokenizers need a cross-tokenizer loss"
        )
    place = teacher.counts.device if isinstance(teacher, PackedLogits) else teacher.ids.device
    if place != device:
        raise ValueError(f"the student is on {device} and the {owner} on {place}")
    policy = int(policy_of(teacher))
    if isinstance(teacher, PackedLogits):
        packed = Records(teacher.data.contiguous(), teacher.counts.reshape(-1).contiguous(), BITS[teacher.codec])
        return SparseRows(policy, records=packed)
    if isinstance(teacher, TopKLogits):
        named = {"log_probs": teacher.log_probs, "log_tail_mass": teacher.log_tail_mass}
    else:
        named = {"weights": teacher.weights, "entropy": teacher.entropy}
    for name, tensor in named.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{owner}: {name} requires grad, but a stored teacher is data; detach it")
    values, constants = named.values()
    assert values is not None
    constants = None if constants is None else constants.reshape(-1).contiguous()
    return SparseRows(policy, as_rows(teacher.ids), as_rows(values), constants)


def as_rows(tensor: Tensor) -> Tensor:
    """``[N, K]``, the entries of a row adjacent."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def relative_temperature(
    teacher: SparseTeacher, number: float, rows: Tensor | None, *, of_student: bool
) -> tuple[float, Tensor | None]:
    """The teacher's temperature over the one its log-probabilities are stored at, as a number or per token."""
    stored = teacher.temperature
    if policy_of(teacher) in (Policy.RENORMALIZE, Policy.UNIFORM):
        return number / stored, None if rows is None else rows / stored
    if rows is not None or number != stored:
        owner = type(teacher).__name__
        what = owner if isinstance(teacher, SampledLogits) else f"{owner} with tail={teacher.tail!r}"
        wanted = "one per token" if rows is not None else f"{number:g}"
        source = "temperature, which the teacher shares," if of_student else "teacher_temperature"
        raise ValueError(
            f"{source} is {wanted}, but a {what} stays at the temperature it was stored at, {stored:g}: nothing is known "
            f"of the rest of the vocabulary. Pick with topk_logits(temperature=...), or pass teacher_temperature={stored:g}"
            + ("" if isinstance(teacher, SampledLogits) else "; tail='renormalize' and 'uniform' can be re-tempered")
        )
    return 1.0, None


def check_values(teacher: SparseRows, vocab: int, active: Tensor | None) -> None:
    """Ids, log-probabilities and weights of the tokens that count; on a GPU the ids alone, without waiting for it.

    Records are checked where they are decoded.
    """
    ids, values = teacher.ids, teacher.values
    if ids is None or values is None:
        return
    outside = (ids < -1) | (ids >= vocab)
    if not values_are_checked(ids):
        if ids.device.type != "cpu":
            counted = outside if active is None else outside & active.unsqueeze(-1)
            torch._assert_async(~counted.any(), f"ids must be in [-1, {vocab})")
        return

    def refuse(bad: Tensor, problem: str, shown: Tensor) -> None:
        """``bad`` and ``shown``: ``[N]``, or ``[N, K]`` of which the first is shown."""
        per_row = bad if bad.dim() == 1 else bad.any(-1)
        if active is not None:
            per_row = per_row & active
        if bool(per_row.any()):
            row = int(per_row.nonzero()[0, 0])
            given = shown[row] if bad.dim() == 1 else shown[row][bad[row]][0]
            raise ValueError(f"{owner}: {problem}; token {row} has {given.item():g}")

    sampled = teacher.policy == Policy.SAMPLED
    owner = "SampledLogits" if sampled else "TopKLogits"
    refuse(outside, f"ids must be in [0, {vocab}), or -1 where there is no entry", ids)
    named = ids >= 0
    if sampled:
        refuse(named & ~((values >= 0) & values.isfinite()), "weights must be finite and not negative", values)
        if teacher.constants is not None:
            refuse(~teacher.constants.isfinite(), "entropy must be finite", teacher.constants)
        return
    slack = SLACK.get(values.dtype, HALF_SLACK)
    refuse(named & ~(values <= slack), "log_probs must be at most 0", values)
    total = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~named, -torch.inf).exp().sum(-1)
    refuse(total > 1 + slack, "probabilities must add up to at most 1", total)
    if teacher.constants is not None:
        constants = teacher.constants
        refuse(~(constants <= SLACK.get(constants.dtype, HALF_SLACK)), "log_tail_mass must be at most 0", constants)
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    refuse(repeated, "an id must not occur twice in a token", ordered[:, 1:])

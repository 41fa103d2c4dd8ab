"""What a row backend is asked to do: the vocabulary of ``backends.cpu`` and ``backends.triton``.

A row backend is a module with these functions on 2-d logits ``student`` and ``teacher`` ``[N, V]``, whose last dimension
is contiguous; the rows may be any distance apart. Float32, bfloat16, float16 and float64, mixed at will; the compute type
is float64 if either side is, else float32.

``divergence_forward(student, teacher, spec) -> (divergence [N], cross_entropy [N] or [0], statistics)``
    The value per row. ``statistics`` is what the same backend's backward wants to be told; it may be empty.
``divergence_backward(student, teacher, statistics, spec, grad_divergence, grad_cross_entropy, grad_student, grad_teacher)``
    Writes the gradients into ``grad_student`` and ``grad_teacher`` (None: not wanted). Each may be the storage of its
    own logits.
``divergence_fused(student, teacher, spec, grad_divergence, grad_cross_entropy, grad_student, grad_teacher)``
    Both at once, for a caller who knows the upstream gradient beforehand; returns ``(divergence, cross_entropy)``.
``divergence_total(student, teacher, spec, scales, grad_student, grad_teacher) -> 0-d tensor``
    Optional, where one call per loss is worth having: the scaled sum of the values, with its gradients.
``sparse_divergence_fused(student, teacher, spec, grad_divergence, grad_cross_entropy, grad_student)``
    The same for a teacher of ``SparseRows`` (see ``sparse_rows``); without ``grad_student`` the values alone.
``sorted_l1(student, teacher, spec, error_bound, grad_values, grad_student, grad_teacher) -> (values [N], omitted [N])``
    The L1 distance of the probabilities ``q`` and ``p`` of each row, both sorted in falling order; here the vocabularies may
    differ in size, and the shorter row is filled up with zeros. If ``error_bound`` is positive, a backend may leave entries
    unsorted: each value is then at most ``omitted``, itself at most ``error_bound``, below that of the full sort; rounding is
    not counted. ``omitted`` is 0 where everything was sorted. The gradients of ``sum(grad_values * values)`` (None: factors of
    1) are written into ``grad_student`` and ``grad_teacher`` (None: not wanted), each of which may be the storage of its own
    logits: with the sign ``sigma_v`` of ``q_(r) - p_(r)`` at the rank r of entry v, ranks by falling logit and equal ones by
    rising id, that of the student is ``q_v (sigma_v - sum_u q_u sigma_u) / temperature``, and the teacher's likewise with
    the opposite signs. Where q_(r) and p_(r) are equal the sign is 0: rows with the same logits have value and gradient 0.
``plackett_luce(student, teacher or None, order or None, weights or None, spec, grad_values, grad_student) -> values [N]``
    The negative log-likelihood of an order of each row's entries, and its gradient as above. The order is that of the ids
    int64 ``[N, K]``, -1 past the last one, all other entries coming behind; or the teacher's: the label if ``spec`` has
    labels, then by falling logit, equal ones by rising id. The weight of each rank is given, ``[N, K]`` of the compute type
    with adjacent columns and rows any distance apart, or the probability under the teacher at its temperature. What the
    teacher masks has no weight, except for a label whose weight is given. ``reference.ranking`` is the definition.
``token_ranks(logits, ids) -> int64 [N, m]``
    How many logits of the row exceed that of each id ``[N, m]``; -1 for the id -1, V if its logit is NaN.
``token_set(logits, members, spec, grad_values, gradient) -> values [N]``
    The log-probabilities that tokens are of the set ``members``, bool ``[V]``, which has one at least, under the student's
    temperature and softcap. The gradient of ``sum(grad_values * values)`` is written into ``gradient`` (None: not wanted), which
    may be the storage of ``logits``.
``token_statistics(student, teacher or None, spec) -> (values [N, 10], argmax [N, 2])``
    The columns are named in ``STATISTICS``.
``topk(logits, k, tempering) -> (ids int64 [N, k], log_probs [N, k], log_tail_mass [N])``
    The ``k`` largest logits of each row, equal ones by their ids, and the log-probabilities over all of the row. Ids of -1
    with ``-inf`` where fewer than k lie above the floor; with NaN in a row that has no distribution.
``sample(logits, uniforms, tempering) -> (ids int64 [N, n], weights [N, n], entropy [N])``
    What the numbers ``uniforms`` (float64 ``[N, n]``, in [0, 1)) draw with replacement by inverting the distribution
    function of the proposal, with the weights ``p / (n * proposal)``, and the entropy of ``p``. Ids of -1 and zeros where a
    row is masked altogether; with NaN in a row that has no distribution.

``pairwise_normalisers(logits, tempering, dtype) -> [N, 2]``
    Of each row the largest logit, after softcap and floor, and the sum of ``exp((logit - largest) / temperature)``, in the
    compute type of the pair that the rows belong to. Those of several parts of a row combine by rescaling.
``pairwise_l1_forward(student, teacher, spec, normalisers, with_signs) -> (distance [B, n, m], signed_mass [B, n, m] or [0])``
    For B problems, whose rows lie one after another in ``student [B n, V]`` and ``teacher [B m, V]``, and normalisers of
    the student's and of the teacher's rows: with the probabilities x and y, ``distance = sum_v |x_v - y_v|`` and, if asked
    for, ``signed_mass = sum_v x_v sign(x_v - y_v)``. V may be a part of the vocabulary: the sums add up.
``pairwise_l1_backward(student, teacher, spec, normalisers, grad, centres, grad_student, grad_teacher)``
    Writes ``x_v (sum_j grad_ij sign(x_v - y_v) - centre_i) / temperature``, the gradient to the student's logits of row i,
    and ``y_v (sum_i grad_ij sign(y_v - x_v) - centre_j) / temperature``; what a softcap and the floor make of it besides.
    ``grad`` ``[B, n, m]``, ``centres`` ``[B n]`` and ``[B m]``, each contiguous and of the compute type. None: not
    wanted. Each may be the storage of its own logits.

``row_deviation(logits, least) -> (means [N], deviations [N])``
    Mean and standard deviation of each row, by ``1 / (V - 1)`` (one entry: by 1), of the compute type; a deviation below
    ``least`` is taken for that.
``row_deviation_backward(logits, means, deviations, gradient)``
    Takes ``<g, s - mean> (s - mean) / ((V - 1) deviation ** 2)`` off the gradient g ``[N, V]`` of a loss whose temperature is
    the deviation, in place: what is missing where g is that of the loss with its temperature as a number.

``angle(student, teacher, corners) -> (losses [B], gradient [B, B], sums [B, B])``
    Not of rows but of points: see ``backends.angles``.

``linear_divergence(student, teacher, spec, grad_divergence, grad_cross_entropy, needs) -> (values, cross_entropy, gradients x 2)``
    Optional, for sides that ``linear_divergence_applies(student, teacher, spec)`` to, at least one of them a head: what
    ``chunked_head.divergence_with_gradients`` returns, without logits in memory. ``grad_divergence=None``: values alone.

``relation(relations, tensors, scales, gradients, divergence, cross_entropy)``
    Optional, for ``relations`` that ``relation_applies`` to: see ``backends.cpu.relation``.

Rows that are not active have value and gradient zero, whatever their logits hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NOTHING",
    "STATISTICS",
    "Composition",
    "PairSpec",
    "RowSpec",
    "Scales",
    "Side",
    "Tempering",
    "compute_dtype",
    "row_temperature",
]


NOTHING = -1e30
"""The logarithm of the probability of what is not there. Finite, for 0 * inf is no 0."""


class Composition(NamedTuple):
    """How the logits of a side are made from those of several sources as they are read.

    With z_0 the side's own logits and z_1.. those of ``others``, each after its softcap and with coefficients c, entry v is
    ``sum_i c_i z_i[v]``, or ``log sum_i exp(c_i z_i[v] + o_i)`` where ``offsets`` are given; then ``class_bias[v]`` is added,
    ``bounds`` clip it, and where v is one of the row's ``columns`` its value replaces it. A source whose coefficient (0; of
    offsets, -inf) leaves it out is not read. An entry that lies on the floor in a source of positive coefficient (of offsets:
    in all sources that are read) stays there, whatever is added or clips it; a value may replace it. No gradient flows through
    this but to z_0 where there is a ``class_bias`` alone.
    Tensors that are None do nothing; those of numbers are of the compute type, on the device, contiguous.
    """

    others: tuple[Side, ...] = ()
    coefficients: Tensor | None = None
    """[N, 1 + len(others)]; None: ones."""
    offsets: Tensor | None = None
    """[N, 1 + len(others)]."""
    class_bias: Tensor | None = None
    """[V]."""
    bounds: Tensor | None = None
    """[N, 2]: the lowest and the highest value."""
    columns: Tensor | None = None
    """int64 [N, R], R at most 2; -1: none."""
    values: Tensor | None = None
    """[N, R]."""

    def take(self, index: slice | Tensor) -> Composition:
        """That of some of the rows."""
        return Composition(
            tuple(other._replace(tensor=other.tensor[index]) for other in self.others),
            *(tensor if tensor is None or tensor is self.class_bias else tensor[index] for tensor in self[1:]),
        )


class RowSpec(NamedTuple):
    """Everything about the rows but their logits.

    The temperature of row i is ``*_temperatures[i]`` (of the compute type) where that tensor is given, else the number.
    A softcap of 0 means none. ``labels`` are given only where the hard-label term is wanted. ``gradient_tolerance`` and
    ``gradient_seed`` (int64, 0-d, on the CPU; given for stochastic rounding) say what a head's logit gradient may leave
    out, see ``gradient_entries``; ``first_row`` is the number of the first row among all rows, which that draws on.

    ``vocabulary_order`` (int32 ``[V]``) says which entries of the vocabulary lie side by side where tiles of the gradient are
    left out, see ``gradient_tiles``; None: as they are numbered.

    ``parameters`` ``[N]`` stand in the place of ``a``. Where ``targets`` (int64 ``[N]``, -1: none) are given, that column is
    left out of both softmaxes, N(p) and N(q); the value is ``rest_weight D(N(p), N(q)) + target_weight B`` with B the
    divergence ``KL`` of the two outcomes (target or not) of p from those of q, and both weights ``[N]`` or a number. The
    compositions say how a side's logits are made. There are no targets in a vocabulary of one entry.
    """

    kind: int
    a: float
    b: float
    student_temperature: float = 1.0
    student_temperatures: Tensor | None = None
    teacher_temperature: float = 1.0
    teacher_temperatures: Tensor | None = None
    student_softcap: float = 0.0
    teacher_softcap: float = 0.0
    labels: Tensor | None = None
    active: Tensor | None = None
    gradient_tolerance: float = 0.0
    gradient_seed: Tensor | None = None
    first_row: int = 0
    parameters: Tensor | None = None
    targets: Tensor | None = None
    target_weight: float = 1.0
    target_weights: Tensor | None = None
    rest_weight: float = 1.0
    rest_weights: Tensor | None = None
    student_composition: Composition | None = None
    teacher_composition: Composition | None = None
    vocabulary_order: Tensor | None = None

    def take(self, index: slice | Tensor) -> RowSpec:
        """The specification of some of the rows."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return self._replace(
            student_temperatures=pick(self.student_temperatures),
            teacher_temperatures=pick(self.teacher_temperatures),
            labels=pick(self.labels),
            active=pick(self.active),
            parameters=pick(self.parameters),
            targets=pick(self.targets),
            target_weights=pick(self.target_weights),
            rest_weights=pick(self.rest_weights),
            student_composition=None if self.student_composition is None else self.student_composition.take(index),
            teacher_composition=None if self.teacher_composition is None else self.teacher_composition.take(index),
            first_row=self.first_row + (index.start if isinstance(index, slice) else 0),
        )


class Tempering(NamedTuple):
    """How the logits of a single source become probabilities; a softcap of 0 means none."""

    temperature: float
    softcap: float = 0.0
    proposal_temperature: float = 1.0
    """Of the distribution that is drawn from, where that is done."""


class PairSpec(NamedTuple):
    """Everything about pairs of rows but their logits: how many there are, and how both sides become probabilities."""

    problems: int
    student_rows: int
    """Per problem."""
    teacher_rows: int
    student: Tempering
    teacher: Tempering

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a number per pair."""
        return self.problems, self.student_rows, self.teacher_rows


class Side(NamedTuple):
    """A source as rows: logits ``[N, V]``, or hidden states ``[N, H]`` with a weight ``[V, H]``."""

    tensor: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    donate: bool = False

    @property
    def requires_grad(self) -> bool:
        return (
            self.tensor.requires_grad
            or (self.weight is not None and self.weight.requires_grad)
            or (self.bias is not None and self.bias.requires_grad)
        )


class Scales(NamedTuple):
    """What a scalar result gives to the value of each row, which is also its gradient before the values are known.

    The scale of row i is the tensor's (``[N]``, of the compute type) where that is given, else the number.
    """

    divergence_factor: float
    divergence: Tensor | None
    cross_entropy_factor: float
    cross_entropy: Tensor | None

    def per_row(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both as tensors ``[rows]``."""
        divergence, cross_entropy = (
            like.new_ones(rows) * factor if tensor is None else tensor
            for factor, tensor in ((self[0], self[1]), (self[2], self[3]))
        )
        return divergence, cross_entropy


STATISTICS = (
    "lse_student",
    "lse_teacher",
    "forward_kl",
    "reverse_kl",
    "entropy_student",
    "entropy_teacher",
    "max_student",
    "max_teacher",
    "label_log_prob_student",
    "label_log_prob_teacher",
)


def compute_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """Float64 if either side is, else float32."""
    double = student.dtype == torch.float64 or (teacher is not None and teacher.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def row_temperature(number: float, per_row: Tensor | None) -> float | Tensor:
    """The temperature of a side in a form that broadcasts against ``[N, V]``."""
    return number if per_row is None else per_row.unsqueeze(-1)

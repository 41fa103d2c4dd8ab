"""Losses by optimal transport, between tokens or between the entries of two vocabularies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus
from torch.nn.utils.parametrizations import spectral_norm

from kdkernels.checks import check_choice, check_dense, check_flag, check_floating, check_integer, check_real
from kdkernels.functional import pairwise_cosine, pairwise_l1, pairwise_sqeuclidean, sinkhorn, sorted_l1
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import (
    IGNORED,
    batch_of,
    check_ids,
    cross_entropy,
    detached,
    mean_over,
    take_tokens,
    tensor_of,
    with_tensor,
)
from kdkernels.sources import Source

__all__ = ["ULD", "CoT2Align", "SinKD", "WCoRD"]


@register("sinkd")
class SinKD(nn.Module):
    """The Sinkhorn distance between the distributions of a batch of samples.

    ``W_ij = |softmax(s_i / T) - softmax(t_j / T)|_1``, ``K = exp(-W / epsilon)``; ``iterations`` times the rows of K and then
    its columns are divided by their sums, which makes P; the loss is ``weight sum_ij P_ij W_ij``. The gradient goes through
    all iterations. The papers add it to a cross-entropy and a KL divergence with weights of their own for each task.

    Source: Cui et al. 2024 (COLING; arXiv 2402.17110) and its journal version. Confidence: from the authors' code.

    Args:
        weight: 1e-3 in the code for encoders with a head; 8e-4 for T0 and GPT-Neo, 2e-3 in an older version.
        temperature: T of both sides; the code ignores its argument and always takes 2.
        epsilon: of the entropy.
        iterations: how many times rows and columns are normalised.
        mass: "batch": marginals of 1 per sample, as published: the loss grows with the number of samples. "unit": the same
            divided by it.
        backend: of the kernels, see ``kd.sinkhorn``.
    """

    def __init__(
        self,
        weight: float = 1e-3,
        *,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        mass: str = "batch",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.iterations = check_integer("iterations", iterations)
        self.mass = check_choice("mass", mass, ("batch", "unit"))
        self.backend = backend

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[b, V]`` or ``kd.LMHead`` with hidden states ``[b, H]``, one row per sample (or per
                token); with a leading dimension, ``[B, b, ...]``, the mean of the losses of B batches.
            mask: bool ``[b]`` or ``[B, b]``, True where a row counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        lengths = None
        if mask is not None:
            check_dense("mask", mask, (torch.bool,))
            lengths = mask.sum(-1)
            # Rows that count come first: then a problem is known by how many there are.
            places = counted_first(mask)
            student, teacher = (
                blanked(name, source, mask, places) for name, source in (("student", student), ("teacher", teacher))
            )
        cost = pairwise_l1(student, detached(teacher), temperature=self.temperature, backend=self.backend)
        found = sinkhorn(
            cost,
            epsilon=self.epsilon,
            max_iterations=self.iterations,
            row_lengths=lengths,
            column_lengths=lengths,
            marginals="unit" if self.mass == "batch" else "probability",
            gradient="unrolled",
            backend=self.backend,
        )
        return self.weight * found.distance.mean()


def counted_first(mask: Tensor) -> Tensor:
    """int64 like the mask: the places of the rows that count, in order, then -1."""
    order = torch.sort(mask.int(), dim=-1, descending=True, stable=True).indices
    counted = torch.arange(mask.shape[-1], device=mask.device) < mask.sum(-1, keepdim=True)
    return order.masked_fill(~counted, -1)


def blanked(name: str, source: Source, mask: Tensor, places: Tensor) -> Source:
    """The rows at ``places``, blank behind the last of those that count."""
    tensor = tensor_of(name, source)
    if tensor.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask must have the shape {tuple(tensor.shape[:-1])} of the {name}'s rows, got {tuple(mask.shape)}"
        )
    batched = with_tensor(source, tensor.reshape(-1, *tensor.shape[-2:]))
    taken = take_tokens(batched, places.reshape(-1, places.shape[-1]))
    rows = tensor_of(name, taken).reshape(tensor.shape)
    return with_tensor(taken, rows.masked_fill((places < 0).unsqueeze(-1), 0))


@register("uld")
class ULD(nn.Module):
    """Universal logit distillation: the Wasserstein distance between distributions over different vocabularies.

    ``ce_weight CE + weight (1/B) sum_b (1/n_b) sum_{t <= n_b} sum_r |q_(r) - p_(r)|`` with the probabilities of each token
    sorted in descending order and the shorter vocabulary padded with zeros after that. Answers are compared from their
    first token on, position by position: ``n_b`` is the length of the shorter one.

    Source: Boizard et al. 2025 (TMLR; arXiv 2402.12030). Confidence: from the authors' code.

    Args:
        weight: of the distance.
        ce_weight: of the student's cross-entropy, the mean over the labels of the batch.
        temperature, teacher_temperature: of the probabilities; the teacher's defaults to the student's.
        skip_student_eos, skip_teacher_eos: leave out the last token of the student's or teacher's answers, an end-of-text
            token that the other may not have.
        reduction: "sequence", the mean over the tokens of each answer and then over the batch, or "token", one mean over
            the tokens of the batch, as in the code base of ALM.
        error_bound: how much the distance of a token may be off, see ``kd.sorted_l1``.
        backend: of the kernels.
    """

    def __init__(
        self,
        weight: float = 1.5,
        ce_weight: float = 1.0,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
        reduction: str = "sequence",
        error_bound: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.ce_weight = check_real("ce_weight", ce_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.teacher_temperature = (
            self.temperature
            if teacher_temperature is None
            else check_real("teacher_temperature", teacher_temperature, positive=True)
        )
        self.skip_student_eos = check_flag("skip_student_eos", skip_student_eos)
        self.skip_teacher_eos = check_flag("skip_teacher_eos", skip_teacher_eos)
        self.reduction = check_choice("reduction", reduction, ("sequence", "token"))
        self.error_bound = check_real("error_bound", error_bound)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, student_labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """The loss of a batch, a 0-d tensor; the gradient flows to the student.

        Args:
            student: logits ``[B, T, V]`` or ``kd.LMHead`` with hidden states ``[B, T, H]``; what stands at a token predicts
                the next one, as models give it. Nothing is to be shifted.
            teacher: the same of the teacher ``[B, S, ...]`` with its own vocabulary.
            student_labels, teacher_labels: token ids ``[B, T]`` and ``[B, S]``, -100 in front of the answer and behind it.
                The distributions compared are those that predict the answer; without a -100 in front of it, those at its
                tokens, from the first on.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        check_ids("student_labels", student_labels, batch_of("student", student), "student")
        check_ids("teacher_labels", teacher_labels, batch_of("teacher", teacher), "teacher")
        if student_labels.shape[0] != teacher_labels.shape[0]:
            raise ValueError(
                f"student_labels and teacher_labels must have as many sequences, "
                f"got {student_labels.shape[0]} and {teacher_labels.shape[0]}"
            )
        starts, lengths = answers(student_labels, self.skip_student_eos)
        teacher_starts, teacher_lengths = answers(teacher_labels, self.skip_teacher_eos)
        width = min(student_labels.shape[1], teacher_labels.shape[1])
        steps = torch.arange(width, device=student_labels.device)
        counted = steps < torch.minimum(lengths, teacher_lengths).unsqueeze(-1)

        def answer(source: Source, first: Tensor) -> Source:
            return take_tokens(source, (first.unsqueeze(-1) + steps).masked_fill(~counted, 0))

        values = sorted_l1(
            answer(student, starts),
            answer(detached(teacher), teacher_starts),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=counted,
            error_bound=self.error_bound,
            backend=self.backend,
        )
        assert isinstance(values, Tensor)
        if self.reduction == "token":
            distance = mean_over(values, counted)
        else:
            distance = mean_over(values, counted, 1).mean()
        loss = self.weight * distance
        return loss if self.ce_weight == 0 else loss + self.ce_weight * cross_entropy(student, student_labels)


@register("cot2align")
class CoT2Align(nn.Module):
    """Optimal transport between the token states of two models whose sequences have different lengths.

    At each of several layers (the papers: embeddings and last hidden layer) ``C_ij = 1 - cos(h_S,i, W h_T,j)`` between the
    student's tokens and the projected ones of the teacher, uniform marginals, and ``L_OT = <P, C>`` with the entropic plan
    ``P``; mean over the batch, sum over the layers. The gradient goes through all iterations. Composition:
    ``(1 - alpha) CE + alpha (KD + L_OT + L_CRC)``, where KD is a cross-vocabulary loss such as ``ULD`` and L_CRC aligns
    chain-of-thought responses with plain ones: the same transport between other states (``transport``).

    Source: CoT2Align (arXiv 2502.16806). Confidence: constants of the transport from third-party code, the composition from
    memory: general form, the paper's constants were not available.

    Args:
        student_sizes, teacher_sizes: widths of the states at each layer. Where they differ, the teacher's are projected by
            a linear layer without bias.
        alpha: weight of the distillation terms in ``combine``.
        epsilon: of the entropy.
        max_iterations: at most so many; fewer where the marginals are exact to ``tolerance`` before. The code read stops at
            1e-9, which float32 does not reach; 0 takes them all.
        cost: "cosine", or "euclidean", the distance of the states.
        backend: of the kernels, see ``kd.sinkhorn``.
    """

    def __init__(
        self,
        student_sizes: Sequence[int],
        teacher_sizes: Sequence[int],
        *,
        alpha: float = 0.5,
        epsilon: float = 0.1,
        max_iterations: int = 100,
        tolerance: float = 0.0,
        cost: str = "cosine",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if len(student_sizes) != len(teacher_sizes):
            raise ValueError(
                f"student_sizes and teacher_sizes must have as many layers, got {len(student_sizes)} and {len(teacher_sizes)}"
            )
        self.alpha = check_real("alpha", alpha)
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.tolerance = check_real("tolerance", tolerance)
        self.cost = check_choice("cost", cost, ("cosine", "euclidean"))
        self.backend = backend
        self.projectors = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Linear(theirs, mine, bias=False)
            for mine, theirs in zip(student_sizes, teacher_sizes, strict=True)
        )

    def forward(
        self,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """L_OT, a 0-d tensor; the gradient flows to the student and the projectors.

        Args:
            student_states, teacher_states: for each layer ``[B, n, d_S]`` and ``[B, m, d_T]``.
            student_mask, teacher_mask: bool ``[B, n]`` and ``[B, m]``, True where a token counts; None: everywhere. What
                stands elsewhere has no influence, even NaN.
        """
        count = len(self.projectors)
        for name, states in (("student_states", student_states), ("teacher_states", teacher_states)):
            if len(states) != count:
                raise ValueError(f"{name} must be the states of {count} layers, got {len(states)}")
        losses = [
            self.transport(mine, projector(blank(theirs, teacher_mask)), student_mask, teacher_mask)
            for mine, theirs, projector in zip(student_states, teacher_states, self.projectors, strict=True)
        ]
        return torch.stack(losses).sum()

    def transport(
        self, one: Tensor, other: Tensor, one_mask: Tensor | None = None, other_mask: Tensor | None = None
    ) -> Tensor:
        """The mean over the batch of ``<P, C>`` between states ``[B, n, d]`` and ``[B, m, d]``, a 0-d tensor."""
        sides = []
        for name, states, mask in (("student_states", one, one_mask), ("teacher_states", other, other_mask)):
            check_floating(name, states)
            shape = batch_of(name, states)
            if mask is None:
                sides.append((states, torch.full(shape[:1], shape[1], dtype=torch.int64, device=states.device)))
                continue
            check_dense(f"the mask of {name}", mask, (torch.bool,))
            places = counted_first(mask)
            taken = blanked(name, states, mask, places)
            assert isinstance(taken, Tensor)
            sides.append((taken, mask.sum(-1)))
        (rows, row_lengths), (columns, column_lengths) = sides
        if self.cost == "cosine":
            cost = pairwise_cosine(rows, columns)
        else:
            cost = pairwise_sqeuclidean(rows, columns).clamp(min=1e-12).sqrt()
        found = sinkhorn(
            cost,
            epsilon=self.epsilon,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            row_lengths=row_lengths,
            column_lengths=column_lengths,
            gradient="unrolled",
            backend=self.backend,
        )
        return found.distance.mean()

    def combine(
        self, cross_entropy: Tensor, kd: Tensor | float, transport: Tensor, crc: Tensor | float = 0.0
    ) -> Tensor:
        """``(1 - alpha) CE + alpha (KD + L_OT + L_CRC)``."""
        return (1 - self.alpha) * cross_entropy + self.alpha * (kd + transport + crc)


def blank(states: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where nothing counts: 0 * NaN is no 0 in a projection. The teacher gets no gradient."""
    return states.detach() if mask is None else states.detach().masked_fill(~mask.unsqueeze(-1), 0)


@register("wcord")
class WCoRD(nn.Module):
    """Wasserstein contrastive representation distillation: both forms of the Wasserstein distance between features.

    Global contrastive part (dual form), with a critic ``g`` on projected features: ``h = e^g / (e^g + N / M)``,
    ``L_G = -mean_pos log h - N mean_neg log(1 - h)`` with N negatives per sample and M samples in the data set;
    ``g(x, y) = <e_S(x), e_T(y)> / temperature`` of spectrally normalised linear projections to the unit sphere, so that it
    is Lipschitz. Local part (primal form): ``C_ij = 1 - cos(f_S,i, f_T,j)`` within the batch, uniform marginals, and
    ``L_L = <P, C>`` of the entropic plan. The result is ``global_weight L_G + local_weight L_L``.

    The negatives of a sample are the teacher's features of the other samples of the batch and what is given besides, in
    place of a memory of 16384 that is filled over the steps.

    Source: Chen et al. 2021 (CVPR; arXiv 2012.08674), the contrastive half in the form of CRD (Tian et al. 2020).
    Confidence: from memory: general form, the paper's constants were not available.

    Args:
        student_size, teacher_size: widths of the features.
        dataset_size: M.
        feature_size: of the projections.
        temperature: of the critic.
        global_weight, local_weight: of the two parts.
        epsilon, iterations: of the entropic transport.
        backend: of the kernels, see ``kd.sinkhorn``.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        *,
        dataset_size: int,
        feature_size: int = 128,
        temperature: float = 0.07,
        global_weight: float = 0.8,
        local_weight: float = 0.05,
        epsilon: float = 0.1,
        iterations: int = 30,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset_size = check_integer("dataset_size", dataset_size)
        if self.dataset_size < 1:
            raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
        self.temperature = check_real("temperature", temperature, positive=True)
        self.global_weight = check_real("global_weight", global_weight)
        self.local_weight = check_real("local_weight", local_weight)
        self.epsilon = check_real("epsilon", epsilon, positive=True)
        self.iterations = check_integer("iterations", iterations)
        self.backend = backend
        self.student_projection = spectral_norm(nn.Linear(student_size, feature_size))
        self.teacher_projection = spectral_norm(nn.Linear(teacher_size, feature_size))

    def forward(self, student: Tensor, teacher: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and the projections.

        Args:
            student, teacher: features of the same samples, ``[B, d_S]`` and ``[B, d_T]``.
            negatives: the teacher's features ``[K, d_T]`` of other samples, or ``[B, K, d_T]`` for each sample.
        """
        for name, features in (("student", student), ("teacher", teacher)):
            check_floating(name, features)
            if features.dim() != 2:
                raise ValueError(f"{name} must have the shape [B, d], got {tuple(features.shape)}")
        if len(student) != len(teacher):
            raise ValueError(f"student and teacher must have as many samples, got {len(student)} and {len(teacher)}")
        own = normalize(self.student_projection(student), dim=-1)
        target = normalize(self.teacher_projection(teacher.detach()), dim=-1)
        others = None
        if negatives is not None:
            check_floating("negatives", negatives)
            if negatives.shape[-1] != teacher.shape[-1] or negatives.dim() not in (2, 3):
                raise ValueError(
                    f"negatives must have the shape [K, {teacher.shape[-1]}] or [B, K, {teacher.shape[-1]}], "
                    f"got {tuple(negatives.shape)}"
                )
            others = normalize(self.teacher_projection(negatives.detach()), dim=-1)
        return self.global_weight * self.contrast(own, target, others) + self.local_weight * self.transport(own, target)

    def contrast(self, own: Tensor, target: Tensor, others: Tensor | None) -> Tensor:
        """L_G of projected features."""
        scores = own @ target.T / self.temperature
        positive, batch = scores.diagonal(), len(scores)
        apart = ~torch.eye(batch, dtype=torch.bool, device=scores.device)
        count = batch - 1
        if others is not None:
            extra = (own.unsqueeze(-2) @ others.transpose(-1, -2)).squeeze(-2) / self.temperature
            scores = torch.cat([scores, extra], 1)
            apart = torch.cat([apart, torch.ones_like(extra, dtype=torch.bool)], 1)
            count += extra.shape[1]
        if count == 0:
            raise ValueError("student must have more than one sample, or negatives must be given: there are none")
        # log h = -softplus(log(N / M) - g), log(1 - h) = -softplus(g - log(N / M))
        shift = math.log(count / self.dataset_size)
        repelled = softplus(scores - shift).masked_fill(~apart, 0).sum()
        return (softplus(shift - positive).sum() + repelled) / batch

    def transport(self, own: Tensor, target: Tensor) -> Tensor:
        """L_L of projected features."""
        found = sinkhorn(
            pairwise_cosine(own, target),
            epsilon=self.epsilon,
            max_iterations=self.iterations,
            gradient="unrolled",
            backend=self.backend,
        )
        return found.distance


def answers(labels: Tensor, skip_last: bool) -> tuple[Tensor, Tensor]:
    """Where each answer is first predicted, and how many tokens it has: int64 ``[B]`` both."""
    given = labels != IGNORED
    leading = (given.cumsum(-1) == 0).sum(-1)
    lengths = given.sum(-1) - int(skip_last)
    return (leading - 1).clamp(min=0), lengths.clamp(min=0)

"""Losses of relations: between the tokens of a sequence, the samples of a batch, the channels of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize, smooth_l1_loss

from kdkernels.checks import check_choice, check_floating, check_integer, check_real
from kdkernels.functional import angle_loss, pairwise_sqeuclidean, relation_loss
from kdkernels.losses.registry import register

__all__ = ["RKD", "TRG", "AutoDistil", "DisWOT", "MiniLM", "resplit_heads"]

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values ``[B, heads, n, d]``."""


def resplit_heads(states: Tensor, heads: int) -> Tensor:
    """States ``[B, heads', n, d']`` or ``[B, n, d]`` as ``heads`` relation heads ``[B, heads, n, d / heads]``."""
    check_floating("states", states)
    if states.dim() == 4:
        states = states.transpose(1, 2).flatten(2)
    if states.dim() != 3 or states.shape[-1] % check_integer("heads", heads):
        raise ValueError(
            f"states must be [B, heads', n, d'] or [B, n, d] and split into {heads} heads, got {list(states.shape)}"
        )
    return states.reshape(*states.shape[:-1], heads, -1).transpose(1, 2)


@register("minilm_relation")
class MiniLM(nn.Module):
    """Attention and value relations of one layer, the last of each model.

    ``L_AT + L_VR``, ``L_AT = 1/(A n) sum_a sum_t KL(R^T_{a,t} || R^S_{a,t})`` with ``R = softmax(Q K^T / sqrt(d_k))``, and
    ``L_VR`` the same with ``softmax(V V^T / sqrt(d_k))``; the mean over the batch. The number of heads must be the same; d_k
    may differ. The relations are streamed: memory is linear in n.

    Source: Wang et al. 2020 (NeurIPS; arXiv 2002.10957). Confidence: from another implementation (the
    authors published none); one version read averages the two terms, another takes the softmax of attention probabilities a
    second time, which is not copied.

    Args:
        attention_weight, value_weight: of the two terms.
        backend: of the kernels, see ``kd.relation_loss``.
    """

    def __init__(self, attention_weight: float = 1.0, value_weight: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        self.attention_weight = check_real("attention_weight", attention_weight)
        self.value_weight = check_real("value_weight", value_weight)
        self.backend = backend

    def forward(self, student: Heads, teacher: Heads, *, lengths: Tensor | None = None, causal: bool = False) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: queries, keys and values ``[B, A, n, d]``, each model with a d of its own.
            lengths: int ``[B]``: tokens from there on do not count.
            causal: the relations of a model whose tokens attend to the left alone.
        """
        (q, k, v), (tq, tk, tv) = student, (part.detach() for part in teacher)
        lengths = None if lengths is None else lengths.unsqueeze(-1)
        attention = relation_loss(q, k, tq, tk, lengths=lengths, causal=causal, backend=self.backend)
        values = relation_loss(v, v, tv, tv, lengths=lengths, causal=causal, backend=self.backend)
        return self.attention_weight * attention + self.value_weight * values


@register("autodistil_relation")
class AutoDistil(nn.Module):
    """Q-Q, K-K and V-V relations with as many relation heads on both sides (also the loss of MiniLMv2).

    ``sum_r beta_r / (A_r n) sum_a sum_t KL(R^T_r || R^S_r)``, r in {Q, K, V}, ``R_r = softmax(r r^T / sqrt(d_r))`` after the
    heads were joined and split again into A_r; the mean over the batch.

    Source: Xu et al. 2022 (NeurIPS; arXiv 2201.12507), after MiniLMv2 (arXiv 2012.15828). Confidence: general form; equal
    weights.

    Args:
        heads: A_r, 48 to 64 in the paper's models; must divide the width of every state.
        weights: of queries, keys and values.
        backend: of the kernels, see ``kd.relation_loss``.
    """

    def __init__(
        self, heads: int = 48, weights: tuple[float, float, float] = (1.0, 1.0, 1.0), *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.heads = check_integer("heads", heads)
        self.weights = tuple(check_real("weights", weight) for weight in weights)
        self.backend = backend

    def forward(self, student: Heads, teacher: Heads, *, lengths: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: queries, keys and values ``[B, heads, n, d]`` or ``[B, n, width]``.
            lengths: int ``[B]``: tokens from there on do not count.
        """
        lengths = None if lengths is None else lengths.unsqueeze(-1)
        terms = []
        for weight, mine, other in zip(self.weights, student, teacher, strict=True):
            s, t = resplit_heads(mine, self.heads), resplit_heads(other.detach(), self.heads)
            terms.append(weight * relation_loss(s, s, t, t, lengths=lengths, backend=self.backend))
        return torch.stack(terms).sum()


@register("rkd")
class RKD(nn.Module):
    """Distances between pairs and angles in triples of samples.

    ``distance_weight SmoothL1(psi_S, psi_T) + angle_weight SmoothL1(angle_S, angle_T)`` with ``psi_ij = |e_i - e_j| / mu``,
    mu the mean of the positive distances of a side, over all pairs ``[B, B]`` and triples; see ``kd.angle_loss``. Samples
    that coincide have the distance 0 without a gradient (the code: 1e12 times the upstream one).

    Source: Park et al. 2019 (CVPR; arXiv 1904.05068). Confidence: from the authors' code.

    Args:
        distance_weight, angle_weight: 25 and 50.
        backend: of the kernels, see ``kd.angle_loss``.
    """

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.distance_weight = check_real("distance_weight", distance_weight)
        self.angle_weight = check_real("angle_weight", angle_weight)
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings ``[B, d]`` and ``[B, d']``, a 0-d tensor; the gradient flows to the student."""
        teacher = teacher.detach()
        angles = angle_loss(student, teacher, backend=self.backend)
        if self.distance_weight == 0:
            return self.angle_weight * angles
        distances = smooth_l1_loss(relative_distances(student), relative_distances(teacher)).to(angles.dtype)
        return self.distance_weight * distances + self.angle_weight * angles


def relative_distances(points: Tensor) -> Tensor:
    """``[B, B]`` in float64, divided by the mean of the positive ones."""
    points = points.double()
    squares = pairwise_sqeuclidean(points, points).fill_diagonal_(0)
    apart = squares > 0
    distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=torch.finfo(torch.float64).tiny)


@register("diswot_gram")
class DisWOT(nn.Module):
    """Normalised Gram matrices: of the samples of a batch (SP) and of the channels of each sample (ICKD).

    SP: ``sum (G_T - G_S)^2 / B^2``, ``G = rownorm(F F^T)`` with F ``[B, C h w]``. ICKD: ``sum (E_T - E_S)^2 / (B C)``,
    ``E = rownorm(f f^T)`` with f ``[B, C, h w]``; rownorm divides rows by their L2 norm. DisWOT scores untrained students by
    ``-(SP + ICKD)`` and uses both as losses.

    Source: Dong et al. 2023 (CVPR; arXiv 2303.15678), after SP (arXiv 1907.09682) and ICKD (arXiv 2202.03680). Confidence:
    from the authors' code.

    Args:
        sample_weight: of SP.
        channel_weight: of ICKD, which needs as many channels on both sides.
    """

    def __init__(self, sample_weight: float = 1.0, channel_weight: float = 1.0) -> None:
        super().__init__()
        self.sample_weight = check_real("sample_weight", sample_weight)
        self.channel_weight = check_real("channel_weight", channel_weight)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps ``[B, C, ...]``, a 0-d tensor; the gradient flows to the student."""
        teacher = teacher.detach()
        for name, maps in (("student", student), ("teacher", teacher)):
            check_floating(name, maps)
            if maps.dim() < 2 or maps.shape[0] != student.shape[0]:
                raise ValueError(
                    f"{name} must have the shape [B, C, ...] with B = {student.shape[0]}, got {list(maps.shape)}"
                )
        loss = student.new_zeros(())
        count = max(1, student.shape[0])
        if self.sample_weight:
            samples = [gram_rows(maps.flatten(1)) for maps in (student, teacher)]
            loss = loss + self.sample_weight * (samples[1] - samples[0]).square().sum() / count**2
        if self.channel_weight:
            if student.shape[1] != teacher.shape[1]:
                shapes = f"{list(student.shape)} and {list(teacher.shape)}"
                raise ValueError(f"student and teacher must have as many channels, got {shapes}")
            channels = [gram_rows(maps.reshape(*maps.shape[:2], -1)) for maps in (student, teacher)]
            loss = loss + self.channel_weight * (channels[1] - channels[0]).square().sum() / (count * student.shape[1])
        return loss


def gram_rows(rows: Tensor) -> Tensor:
    """The Gram matrix of the rows ``[..., n, d]``, its own rows of norm 1."""
    return normalize(rows @ rows.mT, dim=-1)


@register("trg")
class TRG(nn.Module):
    """Token-level relationship graph: relations of all tokens, their contrast, relations within an image.

    ``local_weight KL(R^T || R^S)`` with the rows ``R = softmax(score / temperature)`` between all tokens of the batch;
    ``global_weight`` InfoNCE of token i of the student, projected, against those of the teacher; ``inner_weight`` times the
    mean squared difference of ``softmax(F F^T / sqrt(d))`` within an image. The KL of the output is left to the caller.

    Source: Zhang et al. 2023 (arXiv 2306.12442). Confidence: from summaries: components sure, weights, temperatures and the
    scores not; three readings of the local term are scores here (the graph's neighbours: ``pair_mask``).

    Args:
        student_size, teacher_size: widths of the tokens.
        local_weight, global_weight, inner_weight: of the terms.
        score: of the local relation: "cosine" or "sqeuclidean".
        temperature: that of the local relation.
        contrast_temperature: that of the contrast; the paper lowers it while training.
        backend: of the kernels, see ``kd.relation_loss``.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        *,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        inner_weight: float = 1.0,
        score: str = "cosine",
        temperature: float = 0.1,
        contrast_temperature: float = 0.1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.local_weight = check_real("local_weight", local_weight)
        self.global_weight = check_real("global_weight", global_weight)
        self.inner_weight = check_real("inner_weight", inner_weight)
        self.score = check_choice("score", score, ("cosine", "sqeuclidean"))
        self.temperature = check_real("temperature", temperature, positive=True)
        self.contrast_temperature = check_real("contrast_temperature", contrast_temperature, positive=True)
        self.backend = backend
        self.projector = nn.Linear(student_size, teacher_size, bias=False)

    def forward(self, student: Tensor, teacher: Tensor, *, pair_mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and the projector.

        Args:
            student, teacher: tokens ``[B, n, d]`` and ``[B, n, d']``, sampled alike.
            pair_mask: bool ``[B n, B n]``, True where a pair is an edge of the graph.
        """
        teacher = teacher.detach()
        s, t = student.flatten(0, -2), teacher.flatten(0, -2)
        scale = 1 / self.temperature
        local = relation_loss(
            s,
            s,
            t,
            t,
            score=self.score,
            student_scale=scale,
            teacher_scale=scale,
            pair_mask=pair_mask,
            backend=self.backend,
        )
        contrast = relation_loss(
            self.projector(s),
            t,
            score="cosine",
            student_scale=1 / self.contrast_temperature,
            labels=torch.arange(s.shape[0], device=s.device),
            backend=self.backend,
        )
        inner = mse_loss(similarities(student), similarities(teacher))
        return self.local_weight * local + self.global_weight * contrast + self.inner_weight * inner


def similarities(tokens: Tensor) -> Tensor:
    """``softmax(F F^T / sqrt(d))`` of tokens ``[B, n, d]``."""
    return torch.softmax(tokens @ tokens.mT * tokens.shape[-1] ** -0.5, -1)

"""Losses between hidden states: which layers meet, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, l1_loss, logsigmoid, normalize

from kdkernels.checks import check_choice, check_floating, check_integer, check_integral, check_real
from kdkernels.functional import pairwise_sqeuclidean
from kdkernels.losses.registry import register

__all__ = ["ACM", "DMAE", "MLKD", "ND", "DMCodec", "LayerMatching", "Sylber", "layer_pairs"]

MAPS = ("forward", "reverse", "all-to-one", "random", "none")


def layer_pairs(
    student_layers: int,
    teacher_layers: int,
    how: str = "forward",
    *,
    every: int | None = None,
    generator: torch.Generator | None = None,
) -> list[tuple[int, int]]:
    """Which layer of the teacher each layer of the student follows: pairs (student, teacher), counted from 0.

    Args:
        student_layers, teacher_layers: how many there are.
        how: "forward", evenly spaced up to the last; "reverse", the same from the last down; "all-to-one", the last for all;
            "random", drawn without replacement where there are enough, in any order; "none".
        every: with "forward": the k-th, 2k-th, ... layer, instead of even spacing.
        generator: for "random"; None: torch's own.
    """
    n, m = check_integer("student_layers", student_layers), check_integer("teacher_layers", teacher_layers)
    if n < 1 or m < 1:
        raise ValueError(f"student_layers and teacher_layers must be at least 1, got {n} and {m}")
    check_choice("how", how, MAPS)
    if how == "none":
        return []
    if every is not None:
        if how != "forward":
            raise ValueError(f"every goes with how='forward', got how={how!r}")
        if check_integer("every", every) < 1 or n * every > m:
            raise ValueError(f"every must be from 1 to {m // n} for {n} of {m} layers, got {every}")
        return [(layer, (layer + 1) * every - 1) for layer in range(n)]
    if how == "all-to-one":
        return [(layer, m - 1) for layer in range(n)]
    if how == "random":
        order = torch.randperm(m, generator=generator).tolist()
        return [(layer, order[layer % m]) for layer in range(n)]
    found = [max(1, (layer + 1) * m // n) - 1 for layer in range(n)]
    return list(enumerate(found if how == "forward" else reversed(found)))


def counted_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values ``[..., tokens]`` where the mask, of a shape that broadcasts to theirs, is True; 0 if nowhere."""
    if mask is None:
        return values.mean()
    counted = mask.expand_as(values)
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


@register("layer_matching")
class LayerMatching(nn.Module):
    """Projected mean squared error of pairs of layers.

    ``(1/n) sum_l MSE(W_l h_S^l, h_T^{m(l)})`` over a map m, see ``layer_pairs``; all pairs in one batched product. The paper's
    finding is that the map hardly matters.

    Source: arXiv 2502.04499. Confidence: general form; its weight beside the prediction loss is about 1.

    Args:
        student_size, teacher_size: widths of the states.
        pairs: of layers, such as ``layer_pairs(4, 12)``.
        projection: "each", a matrix for every pair; "shared", one; "none", where the widths agree.
    """

    def __init__(
        self, student_size: int, teacher_size: int, pairs: Sequence[tuple[int, int]], *, projection: str = "each"
    ) -> None:
        super().__init__()
        self.pairs = [(int(mine), int(other)) for mine, other in pairs]
        check_choice("projection", projection, ("each", "shared", "none"))
        if projection == "none":
            if student_size != teacher_size:
                raise ValueError(f"projection='none' needs one width, got {student_size} and {teacher_size}")
            self.register_parameter("weight", None)
            return
        count = max(1, len(self.pairs)) if projection == "each" else 1
        self.weight = nn.Parameter(torch.empty(count, student_size, teacher_size))
        with torch.no_grad():
            for matrix in self.weight:
                nn.init.kaiming_uniform_(matrix.T, a=5**0.5)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student and the projections.

        Args:
            student, teacher: the states of the layers, each ``[..., d]``.
            mask: bool ``[...]``, True where a token counts.
        """
        if not self.pairs:
            return sum((layer.sum() * 0 for layer in student[:1]), torch.zeros(()))
        mine = torch.stack([student[place] for place, _ in self.pairs])
        other = torch.stack([teacher[place] for _, place in self.pairs]).detach()
        if self.weight is not None:
            shape = *mine.shape[:-1], self.weight.shape[-1]
            mine = (mine.flatten(1, -2) @ self.weight).view(shape)
        return counted_mean((mine - other).square().mean(-1), mask)


@register("mlkd_ood")
class MLKD(nn.Module):
    """Each layer of the student follows the nearest of the teacher's, token by token.

    ``sum_l sum_{r <= K} w_{l,r} d_(r)(l)``, the mean over tokens, with ``d(l, j) = MSE(h_S^l, W h_T^j)`` of a token and d_(r)
    the r-th smallest over j; W shared and w learned. All distances of a token come from one product. The paper adds the
    token mean of KL(p || q).

    Source: Wu et al. 2023 (ACL). Confidence: from the authors' code, 7 layers times K = 2 weights; those are unconstrained
    and may turn negative.

    Args:
        student_size, teacher_size: widths of the states.
        layers: how many layers of the student are given (3 to 9 of 12 in the paper).
        nearest: K.
    """

    def __init__(self, student_size: int, teacher_size: int, layers: int = 7, nearest: int = 2) -> None:
        super().__init__()
        self.nearest = check_integer("nearest", nearest)
        self.projector = nn.Linear(teacher_size, student_size, bias=False)
        self.weight = nn.Parameter(torch.ones(layers, self.nearest))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student, ``projector`` and ``weight``.

        Args:
            student: states ``[..., d]`` of as many layers as the weights are for.
            teacher: states ``[..., d']`` of the layers to choose from, at least K.
            mask: bool ``[...]``, True where a token counts.
        """
        if len(student) != self.weight.shape[0] or len(teacher) < self.nearest:
            raise ValueError(
                f"student must be {self.weight.shape[0]} layers and teacher at least {self.nearest}, "
                f"got {len(student)} and {len(teacher)}"
            )
        mine = torch.stack(tuple(student), -2)
        other = self.projector(torch.stack(tuple(teacher), -2).detach())
        distances = pairwise_sqeuclidean(mine, other) / mine.shape[-1]
        nearest = distances.topk(self.nearest, dim=-1, largest=False).values
        return counted_mean((nearest * self.weight).sum((-2, -1)), mask)


@register("nd_loss")
class ND(nn.Module):
    """Norm and direction: features as long as the teacher's or longer, towards their class's mean.

    ``mean_n [1 - <f_S, c_y> / (|c_y| max(|f_S|, |f_T|))]`` with the class means c of the teacher's features. The norm of f_S
    has a gradient only where it exceeds that of f_T.

    Source: KD++ / ReviewKD++ (arXiv 2305.17007). Confidence: from the authors' code. There the weight is 0.5 to 4.0 by pair
    of models, and the loss goes beside a cross-entropy and KD with temperature 4, warmed up over 20 epochs.

    Args:
        class_means: ``[C, d]``, from the teacher over the training data; kept as a buffer.
        weight: of the loss.
    """

    class_means: Tensor

    def __init__(self, class_means: Tensor, weight: float = 1.0) -> None:
        super().__init__()
        check_floating("class_means", class_means)
        self.weight = check_real("weight", weight)
        self.register_buffer("class_means", class_means.detach().clone())

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student: features ``[B, d]`` in the space of the class means.
            teacher: features ``[B, d']``, of which only the norms count.
            labels: classes ``[B]``.
        """
        check_integral("labels", labels)
        means = normalize(self.class_means, dim=-1)[labels]
        longest = torch.maximum(student.norm(dim=-1), teacher.detach().norm(dim=-1))
        return self.weight * (1 - (student * means).sum(-1) / longest.clamp(min=1e-12)).mean()


@register("dmae")
class DMAE(nn.Module):
    """Normalised, projected features of visible patches, in the L1 norm.

    ``weight L1(norm(F_T), norm(W F_S))``, features divided by their L2 norm per token, the mean over all elements; both
    models see the same patches. The paper adds the pixel error of a masked autoencoder.

    Source: Bai et al. 2023 (CVPR; arXiv 2208.12256). Confidence: from the authors' code. Student block 8, teacher block 17.

    Args:
        student_size, teacher_size: widths, 768 and 1024 there.
        weight: of the loss.
    """

    def __init__(self, student_size: int = 768, teacher_size: int = 1024, weight: float = 1.0) -> None:
        super().__init__()
        self.projector = nn.Linear(student_size, teacher_size)
        self.weight = check_real("weight", weight)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features ``[..., d]`` and ``[..., d']``; the gradient flows to the student and the projector."""
        return self.weight * l1_loss(normalize(self.projector(student), dim=-1), normalize(teacher.detach(), dim=-1))


@register("acm_modules")
class ACM(nn.Module):
    """Every prefix of a module's learners approximates the module.

    ``mean_k MSE(h_k(x), module(x))`` over the prefixes k = 1..N, each the output of the first k learners; the mean over
    modules. ``gates`` gives the labels of the gates.

    Source: Adaptive Computation Modules (AAAI 2025; arXiv 2312.10193). Confidence: from the authors' code.

    Args:
        ratio: 1.2, see ``gates``.
    """

    def __init__(self, ratio: float = 1.2) -> None:
        super().__init__()
        self.ratio = check_real("ratio", ratio, positive=True)

    def forward(self, prefixes: Tensor | Sequence[Tensor], modules: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss, a 0-d tensor, of outputs ``[..., N, d]`` of the prefixes and ``[..., d]`` of a module, or of several."""
        if isinstance(prefixes, Tensor):
            prefixes = [prefixes]
        if isinstance(modules, Tensor):
            modules = [modules]
        errors = [self.errors(mine, other).mean() for mine, other in zip(prefixes, modules, strict=True)]
        return torch.stack(errors).mean()

    @staticmethod
    def errors(prefixes: Tensor, module: Tensor) -> Tensor:
        """The mean squared error of each prefix ``[..., N]``."""
        return (prefixes - module.detach().unsqueeze(-2)).square().mean(-1)

    @torch.no_grad()
    def gates(self, prefixes: Tensor, module: Tensor) -> Tensor:
        """How many learners suffice, less one, int64 ``[...]``: the smallest k with ``error_k / error_{k+1} < ratio``."""
        errors = self.errors(prefixes, module)
        enough = errors[..., :-1] < self.ratio * errors[..., 1:]
        last = torch.ones_like(enough[..., :1]) if enough.shape[-1] else torch.ones_like(errors, dtype=torch.bool)
        return torch.cat([enough, last], -1).int().argmax(-1)


@register("dm_codec")
class DMCodec(nn.Module):
    """Cosines along time of each feature, or along the features of each frame.

    "feature": ``weight mean_d -log sigma(cos over time (F[:, :n, d], G[:, :n, d]))`` with n the shorter length; "time":
    ``L1(F, G) + cosine_weight mean_t -log sigma(cos over features)``. Of several teachers (language, speech) the mean.

    Source: Ahasan et al. 2024 (arXiv 2410.15017). Confidence: from the authors' code, whose "time" option calls a function
    that does not exist.

    Args:
        axis: "feature" or "time".
        weight: 120 in the code.
        cosine_weight: of the second term of "time".
    """

    def __init__(self, axis: str = "feature", *, weight: float = 120.0, cosine_weight: float = 1.0) -> None:
        super().__init__()
        self.axis = check_choice("axis", axis, ("feature", "time"))
        self.weight = check_real("weight", weight)
        self.cosine_weight = check_real("cosine_weight", cosine_weight)

    def forward(self, student: Tensor, *teachers: Tensor) -> Tensor:
        """The loss of frames ``[B, T, d]`` and of each teacher ``[B, T', d]``; the gradient flows to the student."""
        if not teachers:
            raise TypeError("teachers: at least one is needed")
        return self.weight * torch.stack([self.distance(student, teacher.detach()) for teacher in teachers]).mean()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        frames = min(student.shape[1], teacher.shape[1])
        student, teacher = student[:, :frames], teacher[:, :frames]
        if self.axis == "feature":
            return -logsigmoid(cosine_similarity(student, teacher, dim=1)).mean()
        cosines = -logsigmoid(cosine_similarity(student, teacher, dim=2)).mean()
        return l1_loss(student, teacher) + self.cosine_weight * cosines


@register("sylber_segment")
class Sylber(nn.Module):
    """Frames follow the mean of the teacher's frames in their segment.

    ``mean_t |h_S(t) - mean_{k in seg(t)} h_T(k)|^2``; outside of all segments the target is 0. The teacher is a moving
    average of the student (0.9999) and makes the segments.

    Source: Cho et al. 2025 (ICLR; arXiv 2410.07168). Confidence: from summaries: the decay used in training was not
    available.
    """

    def forward(self, student: Tensor, teacher: Tensor, segments: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: frames ``[B, T, d]``.
            segments: number of each frame's segment ``[B, T]`` within its sequence, from 0 to T - 1; -1: none.
            mask: bool ``[B, T]``, True where a frame counts.
        """
        check_integral("segments", segments)
        return counted_mean((student - segment_means(teacher.detach(), segments)).square().sum(-1), mask)


def segment_means(states: Tensor, segments: Tensor) -> Tensor:
    """For each frame of ``[B, T, d]`` the mean of its segment, 0 where it has none."""
    inside = (segments >= 0).unsqueeze(-1)
    index = segments.clamp(min=0).long().unsqueeze(-1)
    sums = torch.zeros_like(states).scatter_add(1, index.expand_as(states), states.masked_fill(~inside, 0))
    counts = torch.zeros_like(states[..., :1]).scatter_add(1, index, inside.to(states.dtype))
    return (sums / counts.clamp(min=1)).gather(1, index.expand_as(states)).masked_fill(~inside, 0)

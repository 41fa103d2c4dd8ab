"""Losses of attention: of transformers, of classes over a map, of explanations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, mse_loss, normalize

from kdkernels.checks import check_flag, check_floating, check_integer, check_real
from kdkernels.functional import distillation_loss, relation_loss
from kdkernels.losses.hidden_states import counted_mean
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import detached
from kdkernels.sources import Source

__all__ = ["CATKD", "E2KD", "BiStil", "QATAttention", "grad_cam"]


@register("kd_qat_attention")
class QATAttention(nn.Module):
    """Attention maps and outputs of every layer.

    ``map_weight sum_l mean_{b,h} (1/len_b) sum_{q <= len_b} KL(a_T || a_S) + output_weight sum_l MSE(attention output)``, a
    the softmax of queries and keys. The maps are streamed: memory is linear in n. The code clamps probabilities at 1e-8,
    which is not needed here. The paper adds a soft cross-entropy of the logits and the MSE of hidden states.

    Source: Kim et al. 2022 (EMNLP; arXiv 2211.11014). Confidence: from the authors' code.

    Args:
        map_weight, output_weight: 1, tuned by task.
        backend: of the kernels, see ``kd.relation_loss``.
    """

    def __init__(self, map_weight: float = 1.0, output_weight: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__()
        self.map_weight = check_real("map_weight", map_weight)
        self.output_weight = check_real("output_weight", output_weight)
        self.backend = backend

    def forward(
        self,
        student: Sequence[tuple[Tensor, Tensor]],
        teacher: Sequence[tuple[Tensor, Tensor]],
        student_outputs: Sequence[Tensor] = (),
        teacher_outputs: Sequence[Tensor] = (),
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: for each layer queries and keys ``[B, h, n, d]``.
            student_outputs, teacher_outputs: outputs ``[B, n, width]`` of the attention sub-layers; the mean over all
                elements, padding too, as in the code.
            lengths: int ``[B]``: tokens from there on do not count.
        """
        terms = []
        for (q, k), (tq, tk) in zip(student, teacher, strict=True):
            sizes = q.new_full(q.shape[:1], q.shape[-2]) if lengths is None else lengths.clamp(min=1)
            weight = (1 / (sizes.double() * max(1, q.shape[0] * q.shape[1]))).view(-1, 1, 1).expand(q.shape[:-1])
            inside = None if lengths is None else lengths.unsqueeze(-1)
            terms.append(
                self.map_weight
                * relation_loss(
                    q, k, tq.detach(), tk.detach(), lengths=inside, weight=weight, reduction="sum", backend=self.backend
                )
            )
        for mine, other in zip(student_outputs, teacher_outputs, strict=True):
            terms.append(self.output_weight * mse_loss(mine, other.detach()))
        return torch.stack(terms).sum()


@register("bistil")
class BiStil(nn.Module):
    """Attention probabilities and hidden states of layers that meet.

    ``attention_weight mean_l MSE(a_S, a_T) + hidden_weight mean_l MSE(h_S, h_T)``; of the attention only entries where the
    teacher's probability is not 0 count. The layers to hand over are every k-th of the teacher's, see ``layer_pairs``. The
    second stage adds a soft cross-entropy at temperature 2, without its square.

    Source: Ansell et al. 2023 (Findings of ACL; arXiv 2306.01709). Confidence: from the authors' code.
    """

    def __init__(self, attention_weight: float = 1.0, hidden_weight: float = 1.0) -> None:
        super().__init__()
        self.attention_weight = check_real("attention_weight", attention_weight)
        self.hidden_weight = check_real("hidden_weight", hidden_weight)

    def forward(
        self,
        student_attention: Sequence[Tensor],
        teacher_attention: Sequence[Tensor],
        student_hidden: Sequence[Tensor],
        teacher_hidden: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student_attention, teacher_attention: probabilities ``[B, h, n, n]`` of each layer.
            student_hidden, teacher_hidden: states ``[B, n, d]`` of each layer.
            mask: bool ``[B, n]``, True where a token's states count.
        """
        attention = [
            counted_mean((mine - other.detach()).square(), other != 0)
            for mine, other in zip(student_attention, teacher_attention, strict=True)
        ]
        hidden = [
            counted_mean((mine - other.detach()).square().mean(-1), mask)
            for mine, other in zip(student_hidden, teacher_hidden, strict=True)
        ]
        return self.attention_weight * torch.stack(attention).mean() + self.hidden_weight * torch.stack(hidden).mean()


@register("cat_kd")
class CATKD(nn.Module):
    """Class attention transfer: pooled class activation maps.

    ``beta MSE(phi(CAM_S), phi(CAM_T))``: phi pools the maps to r x r and, if asked for, divides each by its L2 norm. The
    loss goes beside a cross-entropy ("CAT" alone has none).

    Source: Guo et al. 2023 (CVPR). Confidence: from the authors' code, where beta is chosen per pair of models: 0.5 to 600.

    Args:
        beta: of the loss.
        size: r, 2 for one architecture, 4 across them and on ImageNet.
        normalized: True there only across architectures without a cross-entropy.
        binarized: the teacher's pooled map is replaced by 1 above its mean and 0 elsewhere.
        top: only the classes that the teacher scores highest, by the mean of their maps; None: all.
    """

    def __init__(
        self,
        beta: float = 1.0,
        size: int = 2,
        *,
        normalized: bool = False,
        binarized: bool = False,
        top: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = check_real("beta", beta)
        self.size = check_integer("size", size)
        self.normalized = check_flag("normalized", normalized)
        self.binarized = check_flag("binarized", binarized)
        self.top = None if top is None else check_integer("top", top)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps ``[B, C, h, w]``: the classifier as a convolution, before pooling. A 0-d tensor."""
        for name, maps in (("student", student), ("teacher", teacher)):
            check_floating(name, maps)
            if maps.dim() != 4 or maps.shape[:2] != student.shape[:2]:
                raise ValueError(
                    f"{name} must have the shape [B, C, h, w] with the classes of both, got {list(maps.shape)}"
                )
        teacher = teacher.detach()
        mine, other = (adaptive_avg_pool2d(maps, self.size).flatten(2) for maps in (student, teacher))
        if self.top is not None:
            classes = other.mean(-1).topk(self.top, dim=-1).indices.unsqueeze(-1)
            mine, other = (maps.gather(1, classes.expand(-1, -1, maps.shape[-1])) for maps in (mine, other))
        if self.binarized:
            other = (other > other.mean(-1, keepdim=True)).to(other.dtype)
        if self.normalized:
            mine, other = normalize(mine, dim=-1), normalize(other, dim=-1)
        return self.beta * mse_loss(mine, other)


def grad_cam(features: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM ``[B, h, w]``: ``ReLU(sum_c mean(d logit / d feature_c) feature_c)``, differentiable.

    Args:
        features: ``[B, C, h, w]``, from which the logits were computed.
        logits: ``[B, K]``.
        classes: of each sample, the one explained ``[B]``.
    """
    chosen = logits.gather(-1, classes.unsqueeze(-1)).sum()
    (gradient,) = torch.autograd.grad(chosen, features, create_graph=True)
    return (gradient.mean((-2, -1), keepdim=True) * features).sum(1).relu()


@register("e2kd")
class E2KD(nn.Module):
    """The same explanations beside the same outputs.

    ``logit_weight T^2 KL(p || q) + explanation_weight mean(1 - cos(E_S, E_T))``, E a map of Grad-CAM (``grad_cam``) or of
    B-cos networks for the teacher's or the true class. E_S depends on a gradient: its own gradient is a second derivative,
    which everything here supports.

    Source: Parchami-Araghi et al. 2024 (ECCV; arXiv 2402.03119). Confidence: from the authors' code; the coefficients of its
    configurations from memory.

    Args:
        logit_weight: c_logit.
        explanation_weight: 1, 5 or 10.
        temperature: T, 1 to 5.
        backend: of the kernels.
    """

    def __init__(
        self,
        logit_weight: float = 1.0,
        explanation_weight: float = 1.0,
        temperature: float = 1.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.logit_weight = check_real("logit_weight", logit_weight)
        self.explanation_weight = check_real("explanation_weight", explanation_weight)
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def forward(self, student: Source, teacher: Source, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[B, K]`` or ``kd.LMHead``.
            student_map, teacher_map: explanations ``[B, ...]``.
        """
        kd = distillation_loss(
            student, detached(teacher), temperature=self.temperature, temperature_squared=True, backend=self.backend
        )
        cosines = cosine_similarity(student_map.flatten(1), teacher_map.detach().flatten(1), dim=-1)
        return self.logit_weight * kd + self.explanation_weight * (1 - cosines).mean()

"""Weights, schedules and selection around a loss: small objects that take statistics or losses and can be saved.

``schedules`` are numbers per step; ``token_weights`` weights and coefficients from ``kd.token_statistics``; ``teachers`` the
choice among several; ``selection`` and ``sampling`` what to train on next; ``averages``, ``geometry`` and ``denoising`` have
a state that is learnt or fitted. What has a state has ``state_dict`` and ``load_state_dict``. Which paper uses what is in
``kd.losses.describe(key)``.
"""

from kdkernels.weighting.averages import MovingAverages
from kdkernels.weighting.denoising import LossMixture, denoising_weights, fit_loss_mixture
from kdkernels.weighting.geometry import TrilateralWeights, class_means
from kdkernels.weighting.interpolation import TAIDSchedule
from kdkernels.weighting.sampling import AdaptiveStudentShare, DomainSampler, ReplayBuffer
from kdkernels.weighting.schedules import ExponentialDecay, LogarithmicDecay, Ramp, Schedule, WarmupStableDecay
from kdkernels.weighting.selection import best, difference_scores, farthest_first, margins, robust_sampling
from kdkernels.weighting.teachers import (
    Mentoring,
    load_balance,
    mentoring,
    most_confident,
    peer_weights,
    permuted_others,
    route,
    shares,
)
from kdkernels.weighting.token_weights import (
    disagreement_weights,
    entropy_gap_weights,
    entropy_weights,
    more_confident,
    near_hit_quality,
    skew_of_hard_tokens,
    teacher_confidence,
)

__all__ = [
    "AdaptiveStudentShare",
    "DomainSampler",
    "ExponentialDecay",
    "LogarithmicDecay",
    "LossMixture",
    "Mentoring",
    "MovingAverages",
    "Ramp",
    "ReplayBuffer",
    "Schedule",
    "TAIDSchedule",
    "TrilateralWeights",
    "WarmupStableDecay",
    "best",
    "class_means",
    "denoising_weights",
    "difference_scores",
    "disagreement_weights",
    "entropy_gap_weights",
    "entropy_weights",
    "farthest_first",
    "fit_loss_mixture",
    "load_balance",
    "margins",
    "mentoring",
    "more_confident",
    "most_confident",
    "near_hit_quality",
    "peer_weights",
    "permuted_others",
    "robust_sampling",
    "route",
    "shares",
    "skew_of_hard_tokens",
    "teacher_confidence",
]

"""The loss layer for knowledge distillation in PyTorch: ``import kdkernels as kd``."""

from importlib.metadata import PackageNotFoundError, version

from kdkernels import alignment, catalogue, losses, on_policy, reference, store, weighting
from kdkernels.backends import BackendStatus, backends
from kdkernels.backends.gradient_entries import GradientReport
from kdkernels.debugging import debug
from kdkernels.divergences import (
    JSD,
    TVD,
    ABDivergence,
    AlphaDivergence,
    Decoupled,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
)
from kdkernels.functional import (
    angle_loss,
    bernoulli_loss,
    distillation_loss,
    head_tail_gap,
    mass_threshold,
    pack,
    pairwise_cosine,
    pairwise_l1,
    pairwise_sqeuclidean,
    plackett_luce,
    relation_loss,
    sample_logits,
    sinkhorn,
    sorted_l1,
    token_log_probs,
    token_ranks,
    token_set_log_probs,
    token_statistics,
    topk_logits,
    unpack,
    vocabulary_order,
)
from kdkernels.sources import LMHead, LogitMixture, Logits, PackedLogits, SampledLogits, TopKLogits
from kdkernels.statistics import TokenStatistics
from kdkernels.targets import SparseTargets
from kdkernels.transport import SinkhornResult

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "JSD",
    "TVD",
    "ABDivergence",
    "AlphaDivergence",
    "BackendStatus",
    "Decoupled",
    "Divergence",
    "ForwardKL",
    "GradientReport",
    "Hellinger",
    "Jeffreys",
    "LMHead",
    "LogitMixture",
    "Logits",
    "PackedLogits",
    "Renyi",
    "ReverseKL",
    "SampledLogits",
    "SinkhornResult",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SparseTargets",
    "TokenStatistics",
    "TopKLogits",
    "alignment",
    "angle_loss",
    "backends",
    "bernoulli_loss",
    "catalogue",
    "debug",
    "distillation_loss",
    "head_tail_gap",
    "losses",
    "mass_threshold",
    "on_policy",
    "pack",
    "pairwise_cosine",
    "pairwise_l1",
    "pairwise_sqeuclidean",
    "plackett_luce",
    "reference",
    "relation_loss",
    "sample_logits",
    "sinkhorn",
    "sorted_l1",
    "store",
    "token_log_probs",
    "token_ranks",
    "token_set_log_probs",
    "token_statistics",
    "topk_logits",
    "unpack",
    "vocabulary_order",
    "weighting",
]

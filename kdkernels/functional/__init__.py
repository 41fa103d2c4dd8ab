"""The public functions, one module per kernel family."""

from kdkernels.functional.angle import angle_loss
from kdkernels.functional.bernoulli import bernoulli_loss
from kdkernels.functional.divergence import distillation_loss
from kdkernels.functional.head_mass import head_tail_gap, mass_threshold
from kdkernels.functional.pairwise_hidden import pairwise_cosine, pairwise_sqeuclidean
from kdkernels.functional.pairwise_l1 import pairwise_l1
from kdkernels.functional.ranking import plackett_luce, token_ranks
from kdkernels.functional.records import pack, unpack
from kdkernels.functional.relation import relation_loss
from kdkernels.functional.sinkhorn import sinkhorn
from kdkernels.functional.sorted_l1 import sorted_l1
from kdkernels.functional.token_log_probs import token_log_probs, token_set_log_probs
from kdkernels.functional.token_statistics import token_statistics
from kdkernels.functional.topk import sample_logits, topk_logits
from kdkernels.functional.vocabulary_order import vocabulary_order

__all__ = [
    "angle_loss",
    "bernoulli_loss",
    "distillation_loss",
    "head_tail_gap",
    "mass_threshold",
    "pack",
    "pairwise_cosine",
    "pairwise_l1",
    "pairwise_sqeuclidean",
    "plackett_luce",
    "relation_loss",
    "sample_logits",
    "sinkhorn",
    "sorted_l1",
    "token_log_probs",
    "token_ranks",
    "token_set_log_probs",
    "token_statistics",
    "topk_logits",
    "unpack",
    "vocabulary_order",
]

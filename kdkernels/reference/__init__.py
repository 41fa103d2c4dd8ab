"""Pure PyTorch versions of the public functions, under the same names and arguments. They say what is right."""

from kdkernels.reference.angle import angle_loss
from kdkernels.reference.bernoulli import bernoulli_loss
from kdkernels.reference.divergence import distillation_loss
from kdkernels.reference.head_mass import head_tail_gap, mass_threshold
from kdkernels.reference.pairwise_hidden import pairwise_cosine, pairwise_sqeuclidean
from kdkernels.reference.pairwise_l1 import pairwise_l1
from kdkernels.reference.ranking import plackett_luce, token_ranks
from kdkernels.reference.records import pack, unpack
from kdkernels.reference.relation import relation_loss
from kdkernels.reference.sinkhorn import sinkhorn
from kdkernels.reference.sorted_l1 import sorted_l1
from kdkernels.reference.token_log_probs import token_log_probs, token_set_log_probs
from kdkernels.reference.token_statistics import token_statistics
from kdkernels.reference.topk import sample_logits, topk_logits

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
]

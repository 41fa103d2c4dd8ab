"""Public arguments, checked and brought into the shape that operators work on: rows ``[N, ...]``.

Every refusal happens here, before a kernel runs, and names the argument, what was given and what is allowed.
"""

from kdkernels.arguments.angle import check_points
from kdkernels.arguments.bernoulli import prepare_bernoulli
from kdkernels.arguments.compositions import with_normalisers
from kdkernels.arguments.divergence import Total, prepare_loss, prepare_statistics, with_tolerance
from kdkernels.arguments.head_mass import HeadProblem, prepare_head_tail_gap, prepare_mass_threshold
from kdkernels.arguments.pairwise_hidden import hidden_pairs
from kdkernels.arguments.pairwise_l1 import Pairs, prepare_pairs
from kdkernels.arguments.ranking import Counting, Ranking, prepare_plackett_luce, prepare_token_ranks
from kdkernels.arguments.records import pack_rows, unpack_rows
from kdkernels.arguments.relation import Relation, prepare_relation
from kdkernels.arguments.rows import Problem, check_memory_budget
from kdkernels.arguments.sinkhorn import Transport, prepare_sinkhorn
from kdkernels.arguments.sorted_l1 import prepare_sorted_l1
from kdkernels.arguments.token_log_probs import SetProblem, prepare_token_log_probs, prepare_token_set
from kdkernels.arguments.topk import Picking, prepare_sample, prepare_topk

__all__ = [
    "Counting",
    "HeadProblem",
    "Pairs",
    "Picking",
    "Problem",
    "Ranking",
    "Relation",
    "SetProblem",
    "Total",
    "Transport",
    "check_memory_budget",
    "check_points",
    "hidden_pairs",
    "pack_rows",
    "prepare_bernoulli",
    "prepare_head_tail_gap",
    "prepare_loss",
    "prepare_mass_threshold",
    "prepare_pairs",
    "prepare_plackett_luce",
    "prepare_relation",
    "prepare_sample",
    "prepare_sinkhorn",
    "prepare_sorted_l1",
    "prepare_statistics",
    "prepare_token_log_probs",
    "prepare_token_ranks",
    "prepare_token_set",
    "prepare_topk",
    "unpack_rows",
    "with_normalisers",
    "with_tolerance",
]

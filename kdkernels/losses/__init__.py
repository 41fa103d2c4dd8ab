"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists them, ``get("sinkd")`` is ``SinKD``.
"""

from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.divergences import (
    BDKD,
    CTCD,
    DACKL,
    FFG2M,
    GKD,
    LELP,
    LSSD,
    MEALV2,
    PESFKD,
    SLASD,
    TAID,
    DeltaKD,
    ExpertAugmentation,
    GroundTruthSelfDistillation,
    PromptKD,
    SelfEvolutionKD,
)
from kdkernels.losses.decoupled import ATKD, DKD, NKD, OFAKD, TTM, USKD, WTTM
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.registry import get, names

__all__ = [
    "ALM",
    "BDKD",
    "CTCD",
    "DACKL",
    "FFG2M",
    "GKD",
    "GOLD",
    "LELP",
    "LSSD",
    "MEALV2",
    "PESFKD",
    "SLASD",
    "TAID",
    "ULD",
    "ALMLatents",
    "CoT2Align",
    "DeltaKD",
    "ExpertAugmentation",
    "GroundTruthSelfDistillation",
    "PromptKD",
    "SelfEvolutionKD",
    "ATKD",
    "DKD",
    "GOLD",
    "NKD",
    "OFAKD",
    "TTM",
    "ULD",
    "USKD",
    "WTTM",
    "ALMLatents",
    "CoT2Align",
    "SinKD",
    "WCoRD",
    "get",
    "names",
]

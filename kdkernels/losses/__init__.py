"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists the keys of the whole catalogue, ``get("sinkd")``
is ``SinKD``, and ``describe(key)`` has the lines that use a key, also of what is no class of its own.
"""

from kdkernels.losses.attention import CATKD, E2KD, BiStil, QATAttention, grad_cam
from kdkernels.losses.building_blocks import AKL, CTKD, DIST, LogitStd, MixKDStd
from kdkernels.losses.contrastive import Leader, LinguGKD, MIAlpha
from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.decoupled import ATKD, DKD, NKD, OFAKD, TTM, USKD, WTTM
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
from kdkernels.losses.hidden_states import ACM, DMAE, MLKD, ND, DMCodec, LayerMatching, Sylber, layer_pairs
from kdkernels.losses.on_policy import MiniLLM, SpeculativeKD, TeacherDPO
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.ranking import CPRD, PLD, CADETListwise, DiSCoRetrieval, MarginMSE, TransEncoder
from kdkernels.losses.recipes import MedusaHeads
from kdkernels.losses.registry import describe, get, names
from kdkernels.losses.relations import RKD, TRG, AutoDistil, DisWOT, MiniLM, resplit_heads
from kdkernels.losses.sigmoid import CED, DHKD, MultiAspectKD
from kdkernels.losses.truncated import FIRST, LexicalPrior, PretrainingDistillation, TopKUniform, TransitionDistillation

__all__ = [
    "ACM",
    "AKL",
    "ALM",
    "ATKD",
    "BDKD",
    "CATKD",
    "CED",
    "CPRD",
    "CTCD",
    "CTKD",
    "DACKL",
    "DHKD",
    "DIST",
    "DKD",
    "DMAE",
    "E2KD",
    "FFG2M",
    "FIRST",
    "GKD",
    "GOLD",
    "LELP",
    "LSSD",
    "MEALV2",
    "MLKD",
    "ND",
    "NKD",
    "OFAKD",
    "PESFKD",
    "PLD",
    "RKD",
    "SLASD",
    "TAID",
    "TRG",
    "TTM",
    "ULD",
    "USKD",
    "WTTM",
    "ALMLatents",
    "AutoDistil",
    "BiStil",
    "CADETListwise",
    "CoT2Align",
    "DMCodec",
    "DeltaKD",
    "DiSCoRetrieval",
    "DisWOT",
    "ExpertAugmentation",
    "GroundTruthSelfDistillation",
    "LayerMatching",
    "Leader",
    "LexicalPrior",
    "LinguGKD",
    "LogitStd",
    "MIAlpha",
    "MarginMSE",
    "MedusaHeads",
    "MiniLLM",
    "MiniLM",
    "MixKDStd",
    "MultiAspectKD",
    "PretrainingDistillation",
    "PromptKD",
    "QATAttention",
    "SelfEvolutionKD",
    "SinKD",
    "SpeculativeKD",
    "Sylber",
    "TeacherDPO",
    "TopKUniform",
    "TransEncoder",
    "TransitionDistillation",
    "WCoRD",
    "describe",
    "get",
    "grad_cam",
    "layer_pairs",
    "names",
    "resplit_heads",
]

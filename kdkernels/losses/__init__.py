"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists them, ``get("sinkd")`` is ``SinKD``.
"""

from kdkernels.losses.attention import CATKD, E2KD, BiStil, QATAttention, grad_cam
from kdkernels.losses.contrastive import Leader, LinguGKD, MIAlpha
from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.hidden_states import ACM, DMAE, MLKD, ND, DMCodec, LayerMatching, Sylber, layer_pairs
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.registry import get, names
from kdkernels.losses.relations import RKD, TRG, AutoDistil, DisWOT, MiniLM, resplit_heads

__all__ = [
    "ACM",
    "ALM",
    "CATKD",
    "DMAE",
    "E2KD",
    "GOLD",
    "MLKD",
    "ND",
    "RKD",
    "TRG",
    "ULD",
    "ALMLatents",
    "AutoDistil",
    "BiStil",
    "CoT2Align",
    "DMCodec",
    "DisWOT",
    "LayerMatching",
    "Leader",
    "LinguGKD",
    "MIAlpha",
    "MiniLM",
    "QATAttention",
    "SinKD",
    "Sylber",
    "WCoRD",
    "get",
    "grad_cam",
    "layer_pairs",
    "names",
    "resplit_heads",
]

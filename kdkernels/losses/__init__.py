"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists them, ``get("sinkd")`` is ``SinKD``.
"""

from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.on_policy import MiniLLM, SpeculativeKD, TeacherDPO
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.ranking import CPRD, PLD, CADETListwise, DiSCoRetrieval, MarginMSE, TransEncoder
from kdkernels.losses.registry import get, names

__all__ = [
    "ALM",
    "CPRD",
    "GOLD",
    "PLD",
    "ULD",
    "ALMLatents",
    "CADETListwise",
    "CoT2Align",
    "DiSCoRetrieval",
    "MarginMSE",
    "MiniLLM",
    "SinKD",
    "SpeculativeKD",
    "TeacherDPO",
    "TransEncoder",
    "WCoRD",
    "get",
    "names",
]

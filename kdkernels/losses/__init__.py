"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists them, ``get("sinkd")`` is ``SinKD``.
"""

from kdkernels.losses.building_blocks import AKL, CTKD, DIST, LogitStd, MixKDStd
from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.registry import get, names
from kdkernels.losses.sigmoid import CED, DHKD, MultiAspectKD

__all__ = [
    "AKL",
    "ALM",
    "CED",
    "CTKD",
    "DHKD",
    "DIST",
    "GOLD",
    "ULD",
    "ALMLatents",
    "CoT2Align",
    "LogitStd",
    "MixKDStd",
    "MultiAspectKD",
    "SinKD",
    "WCoRD",
    "get",
    "names",
]

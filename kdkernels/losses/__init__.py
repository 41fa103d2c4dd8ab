"""Losses named after papers, one module per chapter of the literature.

Each is a ``torch.nn.Module`` that chooses sources, costs and weights for the public functions; what it computes, where the
formula is from and how sure that is stands in its docstring. ``names()`` lists the keys of the whole catalogue, ``get("sinkd")``
is ``SinKD``, and ``describe(key)`` has the lines that use a key, also of what is no class of its own.
"""

from kdkernels.losses.cross_tokenizer import ALM, GOLD, ALMLatents
from kdkernels.losses.optimal_transport import ULD, CoT2Align, SinKD, WCoRD
from kdkernels.losses.recipes import MedusaHeads
from kdkernels.losses.registry import describe, get, names
from kdkernels.losses.truncated import FIRST, LexicalPrior, PretrainingDistillation, TopKUniform, TransitionDistillation

__all__ = [
    "ALM",
    "FIRST",
    "GOLD",
    "ULD",
    "ALMLatents",
    "CoT2Align",
    "LexicalPrior",
    "MedusaHeads",
    "PretrainingDistillation",
    "SinKD",
    "TopKUniform",
    "TransitionDistillation",
    "WCoRD",
    "describe",
    "get",
    "names",
]

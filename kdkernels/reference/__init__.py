"""Pure PyTorch versions of the public functions, under the same names and arguments. They say what is right."""

from kdkernels.reference.divergence import distillation_loss
from kdkernels.reference.records import pack, unpack
from kdkernels.reference.token_statistics import token_statistics

__all__ = ["distillation_loss", "pack", "token_statistics", "unpack"]

"""Pure PyTorch versions of the public functions, under the same names and arguments. They say what is right."""

from kdkernels.reference.divergence import distillation_loss
from kdkernels.reference.records import pack, unpack
from kdkernels.reference.sorted_l1 import sorted_l1
from kdkernels.reference.token_statistics import token_statistics
from kdkernels.reference.topk import sample_logits, topk_logits

__all__ = ["distillation_loss", "pack", "sample_logits", "sorted_l1", "token_statistics", "topk_logits", "unpack"]

"""The names that the catalogue's lines start from: small tensors with the shapes of the real ones."""

from __future__ import annotations

__all__ = ["PRELUDE"]

PRELUDE = """\
import torch
import kdkernels as kd

torch.manual_seed(0)
# Tokens as rows, or samples of a classifier: N = 8, V = 50
student = torch.randn(8, 50, requires_grad=True)
teacher = torch.randn(8, 50)
teachers = torch.randn(3, 8, 50)
labels = torch.randint(50, (8,))
# The same as hidden states and the weights of heads
student_head = kd.LMHead(torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True))
teacher_head = kd.LMHead(torch.randn(8, 24), torch.randn(50, 24))
# Sequences: two of six tokens; mask is True where a token of the answer counts
student_sequences = torch.randn(2, 6, 50, requires_grad=True)
teacher_sequences = torch.randn(2, 6, 50)
token_ids = torch.randint(50, (2, 6))
mask = torch.tensor([[False, True, True, True, True, True], [False, False, True, True, True, False]])
# Features of eight samples, hidden states of two sequences by layer, maps of four samples, attention of three heads
student_features = torch.randn(8, 16, requires_grad=True)
teacher_features = torch.randn(8, 24)
student_layers = [torch.randn(2, 6, 16, requires_grad=True) for _ in range(3)]
teacher_layers = [torch.randn(2, 6, 24) for _ in range(6)]
student_maps = torch.randn(4, 5, 6, 6, requires_grad=True)
teacher_maps = torch.randn(4, 5, 6, 6)
student_queries, student_keys, student_values = (torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3))
teacher_queries, teacher_keys, teacher_values = torch.randn(3, 2, 3, 6, 12).unbind()
# Scores of ten documents for each of four queries
student_scores = torch.randn(4, 10, requires_grad=True)
teacher_scores = torch.randn(4, 10)
# Two tokenizations of two texts: chunks that whole tokens of both cover
teacher_ids = torch.randint(50, (2, 6))
chunks = kd.alignment.Chunks(
    torch.tensor([[0, 0, 1, 2, 2, 3], [0, 1, 1, 2, 3, 3]]),
    torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 3]]),
    torch.tensor([4, 4]),
    4,
)
"""

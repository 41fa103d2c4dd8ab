"""``torch.library`` operators, one module per kernel family."""

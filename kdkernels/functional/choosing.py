"""Which backend serves a call of a public function."""

from __future__ import annotations

import torch

from kdkernels.backends import select as select_backend
from kdkernels.transforms import transformed

__all__ = ["backend_for"]


def backend_for(requested: str | None, device: str, family: str) -> str:
    """The backend requested or, without a request, the best; in function transformations only the reference works."""
    name: str = select_backend(requested, device, family)
    if name == "reference" or torch.compiler.is_compiling() or not transformed():
        return name
    if requested is not None:
        raise NotImplementedError(
            f"backend={requested!r} does not work in torch.func transformations and forward-mode differentiation; "
            "leave it at None, which takes the reference there"
        )
    return "reference"

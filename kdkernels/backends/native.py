"""Loads the native extension ``kdkernels._native``, or keeps the reason why that is not possible.

Importing this module never fails and never warns; ``kdkernels.backends`` tells the user.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

# First, because torch ships the OpenMP runtime: the extension then shares its thread pool instead of starting another.
import torch  # noqa: F401

__all__ = ["module", "reason"]

EXTENSION = "kdkernels._native"


def why_not_built() -> str:
    """What the installation noted (see setup.py) about an extension that is not there."""
    note = Path(__file__).resolve().parent.parent / "native_not_built.txt"
    cause = note.read_text(encoding="utf-8").strip() if note.is_file() else f"this installation has no {EXTENSION}"
    return f"the extension was not built: {cause}"


def load() -> tuple[ModuleType | None, str]:
    if os.environ.get("KDKERNELS_DISABLE_NATIVE") == "1":
        return None, "KDKERNELS_DISABLE_NATIVE=1 is set"
    if importlib.util.find_spec(EXTENSION) is None:
        return None, why_not_built()
    try:
        return importlib.import_module(EXTENSION), ""
    except ImportError as error:
        return None, f"{EXTENSION} could not be loaded: {error}"


module: ModuleType | None
reason: str
"""Why ``module`` is None; empty if it is there."""
module, reason = load()

"""Checks of single values that public arguments share. The text of an error names the owner, what was given and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "ID_DTYPES",
    "LOGIT_DTYPES",
    "check_choice",
    "check_count",
    "check_dense",
    "check_flag",
    "check_floating",
    "check_integer",
    "check_integral",
    "check_real",
    "check_share",
    "is_real",
]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)


def is_real(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a Python or NumPy number; a truth value is not."""
    return isinstance(value, float) or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def check_real(name: str, value: object, *, positive: bool = False) -> float:
    """``value`` as a float, which must be finite, and positive if asked for."""
    # Not math.isfinite: of numbers that stay variable in a compiled graph only comparisons may be asked.
    if is_real(value) and -math.inf < value < math.inf and (value > 0 or not positive):
        return float(value)
    error = ValueError if is_real(value) else TypeError
    raise error(f"{name} must be a {'positive ' * positive}finite number, got {value!r}")


def check_integer(name: str, value: object) -> int:
    """``value``, which must be a whole number of an integer type."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def check_count(name: str, value: object, least: int = 1) -> int:
    """``value``, which must be a whole number of at least ``least``."""
    count = check_integer(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_share(name: str, value: object) -> float:
    """``value`` as a float from 0 to 1."""
    share = check_real(name, value)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return share


def check_flag(name: str, value: object) -> bool:
    """``value``, which must be True or False."""
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value``, which must be one of the names."""
    if isinstance(value, str) and value in choices:
        return value
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{name} must be one of {', '.join(choices)}, got {value!r}"
    )


def check_floating(name: str, value: Any) -> None:
    """``value`` must be a dense floating-point tensor of a supported type."""
    check_dense(name, value, LOGIT_DTYPES)


def check_integral(name: str, value: Any) -> None:
    """``value`` must be a dense tensor of token ids."""
    check_dense(name, value, ID_DTYPES)


def check_dense(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    """``value`` must be a dense tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")

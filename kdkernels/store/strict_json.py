"""JSON from files that are not trusted: no duplicate keys, no surprises of type, every refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kdkernels.store.errors import StoreError

__all__ = ["Fields", "parse_object"]

LARGEST_SIZE = 1 << 53
T = TypeVar("T")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def parse_object(file: str, field: str, data: bytes | str) -> dict[str, Any]:
    """The JSON object in ``data``."""
    try:
        parsed = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # of bytes that are not UTF-8 too
        raise StoreError(file, f"{field} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise StoreError(file, f"{field} must be a JSON object, not {type(parsed).__name__}")
    return parsed


class Fields:
    """The fields of one JSON object. What is asked for is checked; what nobody asked for is refused by ``end``."""

    def __init__(self, file: str, where: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise StoreError(file, f"{where} must be a JSON object, not {type(values).__name__}")
        self.file = file
        self.where = where
        self.values = dict(values)

    def error(self, key: str, problem: str) -> StoreError:
        return StoreError(self.file, f"{self.where}{key} {problem}")

    def take(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(key, "is missing")
        return self.values.pop(key)

    def size(self, key: str, largest: int = LARGEST_SIZE) -> int:
        """A whole number of at least 0."""
        value = self.take(key)
        if type(value) is not int or not 0 <= value <= largest:
            raise self.error(key, f"must be a whole number between 0 and {largest}, not {shown(value)}")
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if type(value) not in (int, float) or not abs(value) <= 1e300 or not math.isfinite(value):
            raise self.error(key, f"must be a finite number, not {shown(value)}")
        return float(value)

    def text(self, key: str, longest: int) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > longest:
            raise self.error(key, f"must be a text of at most {longest} characters, not {shown(value)}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, not {shown(value)}")
        return value

    def optional(self, key: str, take: Callable[[str], T]) -> T | None:
        """null, or what ``take`` takes."""
        if key in self.values and self.values[key] is None:
            del self.values[key]
            return None
        return take(key)

    def end(self) -> None:
        if self.values:
            raise self.error(shown(next(iter(self.values))), "is not a field that this version knows")


def shown(value: object) -> str:
    """``value`` for an error's text, cut to a readable length."""
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

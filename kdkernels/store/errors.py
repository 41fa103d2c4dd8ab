"""What is wrong with a store, in words that name the file and the field."""

from __future__ import annotations

__all__ = ["StoreError"]


class StoreError(ValueError):
    """A file of a store is damaged, incomplete, or not what the store says it is. The text names the file and the field."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str]]:  # so that DataLoader workers can hand it on
        return StoreError, (self.file, self.problem)

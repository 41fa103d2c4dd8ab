"""What goes wrong for a reason that the user can mend."""

from __future__ import annotations

__all__ = ["CachingError"]


class CachingError(RuntimeError):
    """The text says what is wrong and what to do about it; a traceback would add nothing."""

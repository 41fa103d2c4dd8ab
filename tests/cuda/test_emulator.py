"""The block emulator itself: what a GPU leaves undefined is an error there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as there
import pytest

Emulated = Callable[..., Any]

FAULTS = {
    "race": "wrote it, and no barrier lies between",
    "overwritten": "reads it, and no barrier lies between",
    "out_of_bounds": "index 64 of 64",
    "unwritten": "read before it is written",
    "divergent_barrier": "a block barrier that not all threads reach",
    "two_barriers": "a block barrier that not all threads reach",
    "incomplete_shuffle": "a warp's exchange that not all lanes of its mask reach",
}


def test_a_kernel_without_fault_runs(emulated: Emulated) -> None:
    assert emulated(there.run_faulty, "sum") == ""


def test_every_fault_is_looked_for(emulated: Emulated) -> None:
    assert emulated(there.faulty_kernels) == ["sum", *FAULTS]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_placed(name: str, emulated: Emulated) -> None:
    text = emulated(there.run_faulty, name)
    assert FAULTS[name] in text
    assert text.startswith(f"{name}, line ")
    assert "block (" in text
    assert "thread " in text

"""The CSV files of the report: rows of numbers as dataclasses."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

__all__ = ["KernelRow", "LongestRow", "ModelRow", "RowTraffic", "TrafficRow", "read", "write"]


@dataclass(frozen=True)
class KernelRow:
    """What one compiled kernel takes of a GPU."""

    language: str
    """Triton or CUDA."""
    call: str
    """What was launched; of CUDA, the kernel's name with its template arguments."""
    kernel: str
    dtype: str
    target: str
    warps: int
    """Of a block; 0: chosen at launch."""
    registers: int
    spilled_bytes: int
    scalars_in_lanes: int
    """Scalar registers that are kept in lanes of a vector register (AMD)."""
    shared_bytes: int
    blocks: int
    """That a multiprocessor holds at once."""
    occupancy: float
    limited_by: str
    instructions: float
    """Per logit, as are the next two; 0: not a kernel of whole rows."""
    arithmetic: float
    special: float
    bytes_under_way: int
    """Of loads of a thread that are issued together."""


@dataclass(frozen=True)
class TrafficRow:
    """What one kernel moves and computes per unit of its call, as counted in the interpreter."""

    call: str
    kernel: str
    dtype: str
    unit: str
    loaded: float
    """Bytes."""
    stored: float
    arithmetic: float
    special: float
    divisions: float

    @property
    def bytes(self) -> float:
        return self.loaded + self.stored


@dataclass(frozen=True)
class RowTraffic:
    """What a call of the divergence in CUDA C++ moves of whole rows, per position of the logits, as the emulated device counted."""

    divergence: str
    call: str
    """forward, backward or fused; the gradient is the student's."""
    dtype: str
    kernels: str
    """That it launches."""
    loaded: float
    """Bytes."""
    stored: float

    @property
    def bytes(self) -> float:
        return self.loaded + self.stored


@dataclass(frozen=True)
class LongestRow:
    """The largest vocabulary whose rows a divergence in CUDA C++ keeps on the chip."""

    target: str
    dtype: str
    """Of both sides."""
    vocab: int


@dataclass(frozen=True)
class ModelRow:
    """Modelled time of all kernels of a call, forward and backward, in picoseconds per logit. No measurement."""

    device: str
    call: str
    dtype: str
    bytes: float
    memory: float
    """By bytes and bandwidth alone."""
    modelled: float
    over_memory: float
    """The one in the other."""
    bound: str
    """What bounds the slowest kernel."""


Row = TypeVar("Row")


def write(path: Path, rows: Sequence[Any]) -> None:
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()}
            )


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Rows of a dataclass as ``write`` wrote them; none if the file is not there."""
    if not path.exists():
        return []
    converters = {"int": int, "float": float, "str": str}
    types = {field.name: converters[str(field.type)] for field in fields(cast(Any, kind))}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]

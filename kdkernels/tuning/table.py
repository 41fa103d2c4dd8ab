"""The launch sizes found by ``kdkernels tune``, one JSON file per device in the user's cache folder.

A launch looks its sizes up in a dictionary that is read once per process. They change how fast a kernel is, never what it
computes, so nothing here is fatal: a file that cannot be used is named in a warning and left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdkernels.triton_kernels.tiling import ROW_KERNELS, LaunchSizes, candidate_sizes

__all__ = ["Entry", "Key", "TuneableDevice", "TuningFileError", "clear", "enabled", "file_of", "files", "folder"]
__all__ += ["load", "read", "store"]

FORMAT = 1
MOST_BYTES = 1 << 20
"""Of a file: far more than all keys take."""


class TuningFileError(ValueError):
    """A file of launch sizes that cannot be used; the text says why."""


class TuneableDevice(NamedTuple):
    """What a measurement holds for: another device, compiler or version of the kernels may prefer other sizes."""

    name: str
    architecture: str
    warp_size: int
    triton: str
    kdkernels: str


class Key(NamedTuple):
    """The launches that share their sizes."""

    kernel: str
    vocabulary: int
    """A power of two: all vocabularies up to it, and above the one before."""
    itemsize: int
    """Bytes of the widest element that is read or written."""
    aligned: bool

    @staticmethod
    def of(kernel: str, vocab_size: int, itemsize: int, aligned: bool) -> Key:
        return Key(kernel, 1 << max(0, vocab_size - 1).bit_length(), itemsize, aligned)


@dataclass(frozen=True)
class Entry:
    """The best sizes for a key, with the medians that say so, in seconds."""

    key: Key
    sizes: LaunchSizes
    seconds: float
    default_seconds: float


def enabled() -> bool:
    return os.environ.get("KDKERNELS_TUNING", "") != "0"


def folder() -> Path:
    """``KDKERNELS_TUNING_DIR``, or ``kdkernels/tuning`` in the user's cache folder (XDG Base Directory Specification).

    Raises:
        OSError: the user has no home.
    """
    chosen = os.environ.get("KDKERNELS_TUNING_DIR")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "kdkernels" / "tuning"
    except (KeyError, RuntimeError):  # a container's user who is in no list
        raise OSError("the user has no home folder; KDKERNELS_TUNING_DIR names another") from None


def file_of(device: TuneableDevice) -> Path:
    return folder() / (re.sub(r"[^A-Za-z0-9]+", "-", f"{device.name} {device.architecture}").strip("-") + ".json")


def files() -> list[Path]:
    return sorted(folder().glob("*.json"))


def load(device: TuneableDevice) -> dict[Key, LaunchSizes]:
    """What was stored for this very device; nothing, and a warning, if its file cannot be used."""
    if not enabled():
        return {}
    try:
        path = file_of(device)
    except OSError:
        return {}
    try:
        measured, entries = read(path)
    except FileNotFoundError:
        return {}
    except (TuningFileError, OSError) as error:
        problem = str(error)
    else:
        problem = difference(measured, device)
        if not problem:
            return {entry.key: entry.sizes for entry in entries}
    warnings.warn(
        f"the launch sizes in {path} are not used: {problem}; `kdkernels tune` measures anew, "
        "`kdkernels tune --clear` removes them",
        stacklevel=2,
    )
    return {}


def difference(measured: TuneableDevice, device: TuneableDevice) -> str:
    """Why measurements of one do not hold for the other; empty if they do."""
    return ", ".join(
        f"measured with {field} {theirs}, this is {ours}"
        for field, theirs, ours in zip(device._fields, measured, device, strict=True)
        if theirs != ours
    )


def read(path: Path) -> tuple[TuneableDevice, list[Entry]]:
    """The device that a file is about, and its entries.

    Raises:
        TuningFileError: it is damaged, of another format, or names what cannot be launched.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise TuningFileError(f"it is larger than {MOST_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TuningFileError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TuningFileError("it does not hold what it should: no JSON object")
    if content.get("format") != FORMAT:
        raise TuningFileError(f"it has the format {content.get('format')!r}, not {FORMAT}")
    try:
        device = TuneableDevice(**content["device"])
        entries = [entry_of(values, device.warp_size) for values in content["entries"]]
    except TuningFileError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TuningFileError(f"it does not hold what it should: {type(error).__name__}: {error}") from None
    return device, entries


def entry_of(values: Mapping[str, Any], warp_size: int) -> Entry:
    key = Key(**values["launches"])
    if key.kernel not in ROW_KERNELS:
        raise TuningFileError(f"there is no kernel {key.kernel!r}")
    if key != Key.of(key.kernel, key.vocabulary, key.itemsize, bool(key.aligned)) or key.itemsize not in {2, 4, 8}:
        raise TuningFileError(f"{key} names no launches")
    sizes = LaunchSizes(**values["sizes"])
    if sizes not in candidate_sizes(key.kernel, warp_size):
        raise TuningFileError(f"{sizes} are no sizes of {key.kernel}")
    return Entry(key, sizes, float(values["seconds"]), float(values["default_seconds"]))


def store(device: TuneableDevice, entries: Iterable[Entry]) -> Path:
    """Adds entries to the device's file, in the place of older ones for the same keys; those of other versions go.

    The file is replaced as a whole, so that readers see the old one or the new one; writers wait for each other.

    Raises:
        OSError: the file cannot be written.
    """
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        merged: dict[Key, Entry] = {}
        with contextlib.suppress(TuningFileError, FileNotFoundError):
            measured, before = read(path)
            if measured == device:
                merged = {entry.key: entry for entry in before}
        merged |= {entry.key: entry for entry in entries}
        content = {
            "format": FORMAT,
            "device": device._asdict(),
            "entries": [
                {
                    "launches": entry.key._asdict(),
                    "sizes": {"threads": entry.sizes.threads, "bytes_per_thread": entry.sizes.bytes_per_thread},
                    "seconds": entry.seconds,
                    "default_seconds": entry.default_seconds,
                }
                for entry in sorted(merged.values(), key=lambda entry: entry.key)
            ],
        }
        handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One writer at a time, where the file system has locks; without them the later one of two wins."""
    with (place / ".lock").open("ab") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def clear() -> list[Path]:
    """Removes the files of all devices; which ones those were.

    Raises:
        OSError: one cannot be removed.
    """
    found = files()
    for path in found:
        path.unlink(missing_ok=True)
    return found

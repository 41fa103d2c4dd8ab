"""``manifest.json``: what the store is, and which shards have joined it.

The manifest names every shard that a writer has closed; a shard it does not name yet is found by listing the folder. So no
writer waits for another, and none can lose the shards of another: two that join at once may each write a manifest without
the other's shards, but whoever looks again last adds what is missing, and until then the listing has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kdkernels.store.description import Description
from kdkernels.store.errors import StoreError
from kdkernels.store.files import Files
from kdkernels.store.strict_json import Fields, parse_object, shown

__all__ = ["FORMAT", "MANIFEST", "VERSION", "Manifest", "ShardEntry", "create", "join", "read", "remove", "shard_names"]

FORMAT = "kdkernels.store"
VERSION = 1
MANIFEST = "manifest.json"

SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}-[0-9]{6}\.safetensors", re.ASCII)
CHECKSUM = re.compile(r"[0-9a-f]{64}", re.ASCII)
LARGEST_MANIFEST = 1 << 25
"""Bytes: over 100,000 shards."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it. ``checksum`` covers every byte of the shard, through its index."""

    file: str
    bytes: int
    sequences: int
    tokens: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    description: Description
    shards: tuple[ShardEntry, ...] = ()

    def encode(self) -> bytes:
        """One way to write it, so that a changed byte is a changed meaning or no manifest at all."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **self.description.values(),
            "shards": [asdict(entry) for entry in sorted(self.shards, key=lambda entry: entry.file)],
        }
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        lines = [json.dumps(entry) for entry in content.pop("shards")]
        head = json.dumps(content, indent=1)
        shards = ",\n  ".join(lines)
        listed = f"[\n  {shards}\n ]" if lines else "[]"
        return f'{head[:-2]},\n "shards": {listed},\n "checksum": "{digest}"\n}}\n'.encode()


def shard_names(files: Files) -> list[str]:
    """The files in the folder that are shards by their names."""
    return sorted(name for name in files.names() if SHARD_NAME.fullmatch(name))


def read(files: Files) -> Manifest:
    """The manifest. FileNotFoundError if there is none."""
    where = files.where(MANIFEST)
    data = files.whole(MANIFEST, LARGEST_MANIFEST)
    fields = Fields(where, "", parse_object(where, "the manifest", data))
    check_format(fields)
    checksum = fields.text("checksum", 64)
    description = Description.read(fields)
    manifest = Manifest(description, tuple(_entries(where, fields.items("shards"))))
    fields.end()
    if manifest.encode() != data:
        raise StoreError(where, f"checksum {checksum} does not belong to this content: the file was changed or damaged")
    return manifest


def check_format(fields: Fields) -> None:
    """That a file is of this format, in a version that this code knows."""
    if fields.text("format", 64) != FORMAT:
        raise fields.error("format", f"must be {FORMAT!r}")
    version = fields.size("version")
    if version != VERSION:
        raise fields.error("version", f"is {version}, and this release of kdkernels reads version {VERSION}")


def _entries(where: str, listed: Iterable[object]) -> Iterable[ShardEntry]:
    names = set()
    for place, values in enumerate(listed):
        fields = Fields(where, f"shards[{place}].", values)
        entry = ShardEntry(
            fields.text("file", 64),
            fields.size("bytes"),
            fields.size("sequences"),
            fields.size("tokens"),
            fields.text("checksum", 64),
        )
        fields.end()
        if not SHARD_NAME.fullmatch(entry.file):
            raise fields.error("file", f"must be a shard's name in this folder, not {shown(entry.file)}")
        if not CHECKSUM.fullmatch(entry.checksum):
            raise fields.error("checksum", f"must have 64 hexadecimal digits, not {shown(entry.checksum)}")
        if entry.file in names:
            raise fields.error("file", f"names {entry.file} a second time")
        names.add(entry.file)
        yield entry


def create(files: Files, description: Description) -> Manifest:
    """The manifest of a new store, or that of whoever was faster."""
    manifest = Manifest(description)
    if files.write(MANIFEST, manifest.encode(), replace=False):
        return manifest
    return read(files)


def replace(files: Files, manifest: Manifest) -> None:
    data = manifest.encode()
    if len(data) > LARGEST_MANIFEST:
        raise ValueError(
            f"{files.where(MANIFEST)}: {len(manifest.shards)} shards are too many: use a larger shard_bytes"
        )
    files.write(MANIFEST, data, replace=True)


def join(files: Files, entry_of: Callable[[str], ShardEntry]) -> Manifest:
    """Adds every shard in the folder to the manifest, until a look at both finds none missing.

    Args:
        entry_of: the entry of a shard that the manifest does not list.
    """
    known: dict[str, ShardEntry] = {}
    while True:
        manifest = read(files)
        listed = {entry.file for entry in manifest.shards}
        missing = [name for name in shard_names(files) if name not in listed]
        if not missing:
            return manifest
        for name in missing:
            known[name] = known.get(name) or entry_of(name)
        replace(files, Manifest(manifest.description, (*manifest.shards, *(known[name] for name in missing))))


def remove(files: Files, file: str) -> None:
    """Takes a shard out of the store, whether or not it is sound or there at all."""
    if not SHARD_NAME.fullmatch(file):
        raise ValueError(f"file must be a shard's name as errors and the manifest give it, got {file!r}")
    manifest = read(files)
    kept = tuple(entry for entry in manifest.shards if entry.file != file)
    try:
        files.remove(file)
    except FileNotFoundError:
        if len(kept) == len(manifest.shards):
            raise
    if len(kept) < len(manifest.shards):
        replace(files, Manifest(manifest.description, kept))

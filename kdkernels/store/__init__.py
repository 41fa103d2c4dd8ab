"""Teacher logits on disk: ``kd.store.write``, ``kd.store.open``.

A store is a folder with ``manifest.json`` and safetensors shards; ``manifest.py`` and ``shards.py`` describe the format.
Whatever moment a writer is killed at, the complete shards are a store that opens, and any writer can go on with it.
"""

from __future__ import annotations

import os
from typing import Any

from kdkernels.store import manifest as _manifest
from kdkernels.store.collate import collate
from kdkernels.store.description import Description, tokenizer_fingerprint
from kdkernels.store.errors import StoreError
from kdkernels.store.files import files_at as _files_at
from kdkernels.store.inspection import Summary, Verification, summary, verify
from kdkernels.store.reader import StoreDataset
from kdkernels.store.reader import open_store as open
from kdkernels.store.tables import from_table
from kdkernels.store.vllm import from_vllm
from kdkernels.store.writer import Writer, write

__all__ = [
    "Description",
    "StoreDataset",
    "StoreError",
    "Summary",
    "Verification",
    "Writer",
    "collate",
    "from_table",
    "from_vllm",
    "open",
    "remove_shard",
    "summary",
    "tokenizer_fingerprint",
    "verify",
    "write",
]


def remove_shard(path: str | os.PathLike[str], file: str, *, storage_options: dict[str, Any] | None = None) -> None:
    """Deletes a damaged, missing or superfluous shard, so that a writer can store its sequences anew.

    Args:
        path: the store.
        file: the shard's name, as an error gives it: ``shard-....safetensors``.
    """
    _manifest.remove(_files_at(path, storage_options), os.path.basename(file))

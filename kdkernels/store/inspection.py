"""What is in a store, and whether it is sound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdkernels.sources import TopKLogits
from kdkernels.store import manifest
from kdkernels.store.description import Description
from kdkernels.store.errors import StoreError
from kdkernels.store.files import files_at
from kdkernels.store.reader import StoreDataset, listed_shards, load_manifest, load_shard, open_store

__all__ = ["Summary", "Verification", "summary", "verify"]

BATCH_TOKENS, BATCH_ENTRIES = 1 << 13, 1 << 24
"""Read and decoded at once."""

Progress = Callable[[str, int, int], None]


@dataclass
class Verification:
    """What ``verify`` found. ``problems`` name file and field, and are empty for a sound store."""

    shards: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Verification:
    """Reads everything: checksums of all bytes, ranges of all numbers, every record decoded.

    Args:
        progress: called with a shard's name, how many shards are done and how many there are.

    Raises:
        FileNotFoundError: there is no store.
        StoreError: the manifest is damaged, so that nothing else can be told.
    """
    files = files_at(path, storage_options)
    found = load_manifest(files)
    listed = listed_shards(files, found)
    result = Verification()
    sound = []
    for done, (file, entry) in enumerate(listed.items(), 1):
        try:
            shard = load_shard(files, file, found.description, entry)
            sound.append(shard)
            alone = StoreDataset(files, found.description, [shard], packed=False)
            result.problems += problems_of(alone)
            result.sequences += len(alone)
            result.tokens += alone.num_tokens
            result.bytes += shard.bytes
        except (StoreError, OSError) as error:
            result.problems.append(str(error))
        result.shards += 1
        if progress is not None:
            progress(file, done, len(listed))
    try:
        StoreDataset(files, found.description, sound, packed=False)
    except StoreError as error:  # a sequence in two shards
        result.problems.append(str(error))
    return result


def problems_of(ds: StoreDataset) -> Iterator[str]:
    """What is wrong with the sequences of one shard: many are read at once, and one by one where something is."""
    ends = ds.token_ends
    first = 0
    while first < len(ds):
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, start + BATCH_TOKENS)))
        if problem_of(ds, first, last) is not None:
            problems = (problem_of(ds, place, place + 1) for place in range(first, last))
            yield from (problem for problem in problems if problem is not None)
        first = last


def problem_of(ds: StoreDataset, first: int, last: int) -> str | None:
    """What is wrong with some sequences, in words that hold if it is one."""
    name = f"{ds.shards[0].where}: sequence {int(ds.sequence_ids[first])}: records"
    tokens = max(1, min(BATCH_TOKENS, BATCH_ENTRIES // max(1, ds.k)))
    try:
        for number, chunk in enumerate(ds.chunks(first, last, tokens)):
            wrong = no_distribution(chunk)
            if wrong is not None:
                return f"{name}: token {number * tokens + wrong} is no distribution"
    except StoreError as error:
        return str(error)
    except ValueError as error:
        return f"{name} are malformed: {error}"
    return None


def no_distribution(topk: TopKLogits) -> int | None:
    """The first row whose probabilities do not make one. Ids and counts were checked when they were read."""
    assert topk.log_tail_mass is not None
    mass = topk.log_probs.exp().sum(-1) + topk.log_tail_mass.exp()
    # Not the opposite comparisons: those let NaN pass.
    sound = ((mass - 1).abs() <= 1e-2) & (topk.log_probs <= 0).all(-1) & (topk.log_tail_mass <= 0)
    return None if bool(sound.all()) else int((~sound).nonzero()[0, 0])


@dataclass(frozen=True)
class Summary:
    """What ``summary`` found. Histograms are counts per bin, with one edge more than bins."""

    description: Description
    shards: int
    joined: int
    """Shards that the manifest lists."""
    sequences: int
    tokens: int
    bytes: int
    """Of all files."""
    record_bytes: int
    count_bytes: int
    input_id_bytes: int
    sampled_tokens: int
    """Tokens that what follows was computed from."""
    mean_entries: float
    mean_kept_mass: float
    mean_kept_entropy: float
    """In nats: of the kept entries, -sum p log p."""
    kept_mass_histogram: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
    kept_entropy_histogram: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


def summary(
    path: str | os.PathLike[str],
    *,
    sample_tokens: int = 1 << 18,
    bins: int = 40,
    storage_options: dict[str, Any] | None = None,
) -> Summary:
    """What a store holds, and how much of the teacher: sizes are exact, statistics come from evenly spaced sequences.

    Args:
        sample_tokens: about how many tokens to decode.
        bins: of the histograms.
    """
    files = files_at(path, storage_options)
    found = load_manifest(files)
    ds = open_store(path, storage_options=storage_options)
    shards = ds.shards
    masses, entropies, entries = [], [], 0
    for topk in sampled(ds, sample_tokens):
        p = topk.log_probs.double().exp()
        masses.append(p.sum(-1))
        entropies.append(-(p * topk.log_probs.double().clamp(min=-1e4)).sum(-1))
        entries += int((topk.ids >= 0).sum())
    mass = torch.cat(masses).numpy() if masses else np.empty(0)
    entropy = torch.cat(entropies).numpy() if entropies else np.empty(0)
    return Summary(
        ds.description,
        len(shards),
        len(found.shards),
        len(ds),
        ds.num_tokens,
        files.size(manifest.MANIFEST) + sum(shard.bytes for shard in shards),
        sum(shard.records.stop - shard.records.start for shard in shards),
        sum(shard.counts.stop - shard.counts.start for shard in shards if shard.counts is not None),
        sum(shard.input_ids.stop - shard.input_ids.start for shard in shards if shard.input_ids is not None),
        mass.size,
        entries / max(1, mass.size),
        float(mass.mean()) if mass.size else 0.0,
        float(entropy.mean()) if entropy.size else 0.0,
        np.histogram(mass, bins, (0.0, 1.0)),
        np.histogram(entropy, bins, (0.0, max(1.0, float(entropy.max(initial=0.0))))),
    )


def sampled(ds: StoreDataset, tokens: int) -> Iterator[Any]:
    """Evenly spaced sequences with about so many tokens."""
    if len(ds):
        wanted = max(1, min(len(ds), round(len(ds) * tokens / max(1, ds.num_tokens))))
        for place in np.unique(np.linspace(0, len(ds) - 1, wanted).astype(int)).tolist():
            yield ds[place]["topk"]

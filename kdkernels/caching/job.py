"""Runs a teacher over token sequences into a store, and goes on where an earlier run stopped.

Work is cut into batches of consecutive sequences, the same in every run: a batch that is resumed, or that another process
takes, goes through the teacher in the very shape it would have had. So the store does not depend on who wrote what when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import kdkernels as kd
from kdkernels.caching.errors import CachingError
from kdkernels.caching.teacher import Teacher
from kdkernels.caching.text import TokenSequences
from kdkernels.records import BITS, record_sizes
from kdkernels.store import Description, tokenizer_fingerprint

__all__ = ["CacheSettings", "Share", "State", "cache", "device_of_share"]

OPTIONS = {
    "vocab_size": "--vocab-size",
    "codec": "--codec",
    "tail": "tail",
    "temperature": "--temperature",
    "k": "--k",
    "top_p": "--top-p",
    "tokenizer": "the tokenizer of --teacher",
    "teacher": "--teacher (or --dtype)",
    "data": "--data (or how it is cut: --sequence-length, --separator, --pattern, --limit)",
}
"""Where each field of a store's description comes from."""


@dataclass(frozen=True)
class CacheSettings:
    """How the teacher is cut and stored.

    Args:
        k, top_p, temperature: as in ``kd.topk_logits``.
        codec: as in ``kd.store.write``.
        vocab_size: leading rows of the head that are meant; None: all.
        batch_tokens: how many tokens the teacher reads at once, at least one sequence.
        save_every: seconds after which a shard is completed: as much work is lost if the process is killed.
    """

    k: int = 64
    top_p: float | None = None
    temperature: float = 1.0
    codec: str = "q6"
    vocab_size: int | None = None
    batch_tokens: int = 4096
    save_every: float = 60.0


@dataclass(frozen=True)
class Share:
    """Which part of the batches is this process's: every ``processes``-th, from number ``process`` on."""

    process: int = 0
    processes: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun tells its processes."""
        texts = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        try:
            process, processes = map(int, texts)
        except ValueError:
            process, processes = -1, 0
        if not 0 <= process < processes:
            raise CachingError(
                f"RANK={texts[0]} and WORLD_SIZE={texts[1]} in the environment are not a process's number and how many "
                f"there are"
            )
        return cls(process, processes)

    def name(self) -> str:
        """To begin a line with; empty if there is only one process."""
        return "" if self.processes == 1 else f"process {self.process + 1} of {self.processes}: "


@dataclass
class State:
    """How far this process is with its share. ``sequences`` includes those that were stored before it began."""

    sequences: int = 0
    total: int = 0
    found: int = 0
    """Sequences that were stored before."""
    tokens: int = 0
    record_bytes: int = 0
    """Of ``tokens``, which this process has run the teacher over."""
    saved: int = 0
    """Times that a shard was completed."""


def describe(teacher: Teacher, text: TokenSequences, settings: CacheSettings) -> Description:
    size = settings.vocab_size or teacher.vocab_size
    if size > teacher.vocab_size:
        raise CachingError(f"--vocab-size {size}: the teacher's head has {teacher.vocab_size} rows")
    if settings.k > size:
        raise CachingError(f"--k {settings.k}: the vocabulary has {size} entries")
    longest = teacher.longest_sequence
    if longest is not None and text.sequence_length > longest:
        raise CachingError(f"--sequence-length {text.sequence_length}: the teacher reads at most {longest} tokens")
    return Description(
        vocab_size=size,
        codec=settings.codec,
        temperature=settings.temperature,
        k=settings.k,
        top_p=settings.top_p,
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        teacher=teacher.describe(),
        data=text.fingerprint,
    )


def check_same(out: str | os.PathLike[str], asked: Description) -> None:
    """Refuses to go on with a store of something else."""
    try:
        found = kd.store.open(out).description
    except FileNotFoundError:
        return
    lines = [
        f"  {OPTIONS[name]}: {getattr(found, name)} in the store, {getattr(asked, name)} now"
        for name in found.differences(asked)
    ]
    if lines:
        raise CachingError(
            f"--out {out}: there is a store already, of other data or settings:\n" + "\n".join(lines) + "\n"
            "Use the same ones to go on with it, or another folder."
        )


def cache(
    teacher: Teacher,
    text: TokenSequences,
    out: str | os.PathLike[str],
    settings: CacheSettings,
    share: Share | None = None,
    state: State | None = None,
    report: Callable[[State], None] = lambda state: None,
) -> State:
    """Stores what is missing of this process's share; sequence ``i`` of the text has the id ``i``.

    Whatever ends it, an exception or Ctrl-C too, the sequences it got to are stored.

    Args:
        state: kept up to date, for whoever wants to know even if this ends in an exception; a new one by default.
        report: called with the state before the first batch and after each.

    Raises:
        CachingError: a setting does not fit the teacher, or the store in ``out`` is another one.
        StoreError, OSError: the store is damaged, or cannot be written.
    """
    share = share or Share()
    description = describe(teacher, text, settings)
    check_same(out, description)
    batches = text.batches(max(1, settings.batch_tokens // text.sequence_length))[share.process :: share.processes]
    state = state or State()
    state.total = sum(map(len, batches))
    saved = time.monotonic()
    with kd.store.write(
        out,
        vocab_size=description.vocab_size,
        codec=description.codec,
        tokenizer=description.tokenizer,
        teacher=description.teacher,
        data=description.data,
        k=description.k,
        top_p=description.top_p,
        temperature=description.temperature,
        tail=description.tail,
    ) as writer:
        state.found = state.sequences = sum(sequence in writer for batch in batches for sequence in batch)
        report(state)
        for batch in batches:
            missing = [sequence for sequence in batch if sequence not in writer]
            if not missing:
                continue
            ids = text.rows(batch)
            topk = kd.topk_logits(
                teacher.head(ids),
                settings.k,
                top_p=settings.top_p,
                temperature=settings.temperature,
                vocab_size=description.vocab_size,
            )
            wanted = [sequence - batch.start for sequence in missing]
            kept = topk.changed(lambda tensor, wanted=wanted: tensor[wanted].cpu())  # type: ignore[misc]
            writer.append(kept, missing, ids[wanted])
            state.sequences += len(missing)
            state.tokens += len(missing) * ids.shape[1]
            counts = (kept.ids >= 0).sum(-1).flatten()
            state.record_bytes += int(record_sizes(counts, description.vocab_size, BITS[description.codec]).sum())
            if time.monotonic() - saved >= settings.save_every:
                writer.flush()
                saved = time.monotonic()
                state.saved += 1
            report(state)
    return state


def device_of_share(device: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: by default a GPU if there is one, its own of several under torchrun."""
    if device is not None:
        return device
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(environment.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

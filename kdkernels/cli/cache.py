"""``kdkernels cache``: a teacher over text, its most probable tokens into a store."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TaskID, TextColumn, TimeRemainingColumn

from kdkernels.caching.errors import CachingError
from kdkernels.caching.job import CacheSettings, Share, State, cache, device_of_share
from kdkernels.caching.teacher import Teacher, load_teacher
from kdkernels.caching.text import SUFFIXES, TokenSequences, find_files, read_tokens, total_bytes
from kdkernels.cli.choices import Codec, Dtype, check_device
from kdkernels.cli.terminal import console, fail, progress

__all__ = ["run_cache"]

INTERRUPTED = 130
SECONDS_BETWEEN_LINES = 60.0


def run_cache(
    teacher: Annotated[
        Path,
        typer.Option(help="A transformers model on this disk: a folder, which may hold a GGUF file, or a GGUF file."),
    ],
    data: Annotated[
        Path, typer.Option(help=f"A text file, or a folder searched for {', '.join(SUFFIXES)} (a document per line).")
    ],
    out: Annotated[str, typer.Option(help="Folder of the store, or a URL that fsspec knows.")],
    k: Annotated[int, typer.Option(min=1, help="Entries kept per token.")] = 64,
    top_p: Annotated[
        float | None, typer.Option(help="Keep fewer, once their probability reaches this.", show_default="keep k")
    ] = None,
    codec: Annotated[Codec, typer.Option(help="How log-probabilities are stored.")] = Codec.Q6,
    temperature: Annotated[float, typer.Option(help="Of the teacher's softmax.")] = 1.0,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence; the last one is shorter.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens the teacher reads at once.")] = 4096,
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many tokens at most.", show_default="all")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Which files of the folder, '*.py' for instance.", show_default="by their suffix")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Token that ends every document.", show_default="the tokenizer's end of sequence")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many rows of a padded head.", show_default="all")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Which GGUF file of the folder, if it has several.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (also for ROCm).", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the teacher.", show_default="float32 on the CPU, else that of its weights")
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between shards, which is what a killed process loses.")
    ] = 60.0,
) -> None:
    """Run a teacher over text and store the most probable tokens of its distributions.

    Documents are tokenised, ended by a separator, put one after another and cut into sequences. Run the same command again
    after an interruption, whatever it was: sequences that are stored are not computed again. Under torchrun every process
    takes its share and writes its own shards: `torchrun --nproc-per-node 8 --no-python kdkernels cache ...`.
    """
    with signals_interrupt():
        try:
            place = check_device(device_of_share(device))
            Share.of_environment()
            if top_p is not None and not 0 < top_p <= 1:
                fail(f"--top-p {top_p}: must lie in (0, 1]")
            if not (math.isfinite(temperature) and temperature > 0):
                fail(f"--temperature {temperature}: must be a positive number")
            settings = CacheSettings(
                k=k,
                top_p=top_p,
                temperature=temperature,
                codec=codec.value,
                vocab_size=vocab_size,
                batch_tokens=batch_tokens,
                save_every=save_every,
            )
            files = find_files(data, pattern)
            with console(error=True).status("Loading the teacher"):
                model = load_teacher(
                    teacher, gguf_file=gguf_file, device=place, dtype=None if dtype is None else dtype.torch
                )
            cache_files(model, files, out, settings, sequence_length=sequence_length, separator=separator, limit=limit)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except CachingError as error:
            fail(str(error))
        except (ValueError, OSError) as error:  # a damaged store, a full disk
            fail(f"--out {out}: {error}", 1)


def cache_files(
    teacher: Teacher,
    files: list[Path],
    out: str,
    settings: CacheSettings,
    *,
    sequence_length: int,
    separator: str | None = None,
    limit: int | None = None,
) -> None:
    """The command from where the teacher is loaded, with its progress bars and messages.

    Args:
        teacher, out, settings: as in ``caching.job.cache``.
        files: from ``caching.text.find_files``.
        sequence_length, separator, limit: the options of these names.

    Raises:
        CachingError, StoreError, OSError: as ``caching.job.cache``.
        KeyboardInterrupt: once what was reached is stored.
    """
    share, state = Share.of_environment(), State()
    try:
        text = tokenised(files, teacher.tokenizer, sequence_length, separator, limit)
        with Watch(share) as watch:
            cache(teacher, text, out, settings, share, state, watch.show)
    except KeyboardInterrupt:
        reached = (
            f"{state.sequences:,} of {state.total:,} sequences are stored in {out}"
            if state.total
            else "nothing is lost"
        )
        typer.echo(f"Interrupted: {reached}. The same command goes on from there.", err=True)
        raise
    tell_finished(out, state, share)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """A request to end, as job schedulers send it, does what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tokenised(
    files: list[Path], tokenizer: Any, sequence_length: int, separator: str | None, limit: int | None
) -> TokenSequences:
    with progress(counted=False) as bar:
        task = bar.add_task("tokenising", total=total_bytes(files))
        return read_tokens(
            files,
            tokenizer,
            sequence_length=sequence_length,
            separator=separator_id(tokenizer, separator),
            limit=limit,
            advance=lambda size: bar.advance(task, size),
        )


def separator_id(tokenizer: Any, separator: str | None) -> int:
    if separator is None:
        if tokenizer.eos_token_id is None:
            raise CachingError("the tokenizer has no end-of-sequence token: name a --separator")
        return int(tokenizer.eos_token_id)
    found = tokenizer.get_vocab().get(separator)
    if found is None:
        raise CachingError(f"--separator {separator}: the tokenizer has no such token")
    return int(found)


class Watch:
    """Shows how far this process is: a bar on a terminal, for the first of several processes; else a line now and then."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._start = time.monotonic()
        self._told = self._start
        self._bar = progress(
            counted=True,
            columns=[
                TextColumn("{task.fields[speed]:,.0f} tokens/s"),
                TextColumn("{task.fields[size]:.1f} bytes/token"),
                TextColumn("left"),
                TimeRemainingColumn(),
            ],
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Watch:
        if self._share.process == 0:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, state: State) -> None:
        speed = state.tokens / max(1e-9, time.monotonic() - self._start)
        size = state.record_bytes / max(1, state.tokens)
        if self._task is None:
            self._start = time.monotonic()
            name = "sequences" if self._share.processes == 1 else f"sequences, process 1 of {self._share.processes}"
            self._task = self._bar.add_task(name, total=state.total, completed=state.sequences, speed=speed, size=size)
        self._bar.update(self._task, completed=state.sequences, speed=speed, size=size)
        if not sys.stderr.isatty() and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            typer.echo(
                f"{self._share.name()}{state.sequences:,} of {state.total:,} sequences, {speed:,.0f} tokens/s, "
                f"{size:.1f} bytes/token",
                err=True,
            )


def tell_finished(out: str, state: State, share: Share) -> None:
    output = console()
    name = share.name()
    if state.sequences == state.found:
        output.print(f"{name}nothing to do: all {state.total:,} sequences are stored", soft_wrap=True, markup=False)
    else:
        again = f" ({state.found:,} were there before)" if state.found else ""
        output.print(
            f"{name}stored {state.sequences - state.found:,} of {state.total:,} sequences{again}: {state.tokens:,} tokens, "
            f"{state.record_bytes / state.tokens:.1f} bytes of records per token",
            soft_wrap=True,
            markup=False,
        )
    if share.process == 0:
        output.print(f"look at it: kdkernels inspect {shlex.quote(out)}", soft_wrap=True, markup=False)

"""Processes in which Triton interprets its kernels, or compiles them: it decides when it is imported."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def _set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


def start(count: int, **environment: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_set_environment, initargs=(environment,))

"""Processes in which Triton's kernels are made for the interpreter, or for the compiler: that is decided at triton's import."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def _set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


def start(count: int, **environment: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_set_environment, initargs=(environment,))

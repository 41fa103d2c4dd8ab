"""Fixtures that run kernels in Triton's interpreter, and compile them without a GPU.

This folder must not become a package: `tests/triton` would then hide the real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import aot
import pytest
from gpu_report import processes


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """`interpreter(function, *arguments)` calls a module-level function where Triton's interpreter is switched on."""
    with processes.start(1, TRITON_INTERPRET="1") as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`compiler(function, *arguments)` calls a module-level function where Triton compiles for GPUs.

    The cases of all selected tests are compiled side by side, ahead of the tests that ask for them.
    """
    distributed = hasattr(request.config, "workerinput")  # pytest-xdist: each process runs only some of the items
    cache = tmp_path_factory.mktemp("triton")
    count = 1 if distributed else min(4, os.cpu_count() or 1)
    futures: dict[tuple[Any, ...], Future[Any]] = {}
    with processes.start(count, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            ahead = futures.get((function, arguments[0]))
            return (ahead or pool.submit(function, *arguments)).result()

        for item in () if distributed else request.session.items:
            case = (
                item.callspec.params.get("case")
                if isinstance(item, pytest.Function) and hasattr(item, "callspec")
                else None
            )
            if isinstance(case, aot.Case):
                futures[aot.compile_case, case] = pool.submit(aot.compile_case, case)
        yield call
        pool.shutdown(cancel_futures=True)

"""The fixture that runs CUDA kernels on the host: block by block, under the sanitizers, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from gpu_report import emulation


class Emulator:
    """`emulator(function, *arguments)` calls a module-level function where the CUDA kernels are emulated."""

    def __init__(self, module: Path, log: Path) -> None:
        self.module = module
        self.log = log
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.pool is None:
            self.pool = emulation.start(self.module, self.log)
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.pool = None
            reports = "\n".join(file.read_text(errors="replace") for file in self.log.parent.glob(f"{self.log.name}*"))
            pytest.fail(f"the process died; the sanitizers report:\n{reports[:8000]}", pytrace=False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    module = emulation.emulated_module()
    if module is None:
        pytest.skip("the emulated CUDA kernels are not built: make emulator")
    emulator = Emulator(module, tmp_path_factory.mktemp("emulated") / "sanitizers")
    yield emulator
    if emulator.pool is not None:
        emulator.pool.shutdown(cancel_futures=True)

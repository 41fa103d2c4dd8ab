"""The fixture that runs CUDA kernels on the host: block by block, under the sanitizers, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

MODULES = Path(__file__).resolve().parents[2] / "build" / "emulated"


def preloads() -> str:
    """The sanitizers' runtime, which must be there before Python is, and the C++ library that it looks into."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(found)


class Emulator:
    """`emulator(function, *arguments)` calls a module-level function where the CUDA kernels are emulated."""

    def __init__(self, module: Path, log: Path) -> None:
        self.log = log
        self.environment = {
            "KDKERNELS_CUDA_EMULATED": str(module),
            "LD_PRELOAD": preloads(),
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
            "OMP_NUM_THREADS": "1",
        }
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.pool is None:
            self.pool = self.start()
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.pool = None
            reports = "\n".join(file.read_text(errors="replace") for file in self.log.parent.glob(f"{self.log.name}*"))
            pytest.fail(f"the process died; the sanitizers report:\n{reports[:8000]}", pytrace=False)

    def start(self) -> ProcessPoolExecutor:
        """The loader and the sanitizers read the environment before Python starts, so it is this process's meanwhile."""
        import multiprocessing

        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            pool.submit(os.getpid).result()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        return pool


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    modules = list(MODULES.glob("_cuda_emulated*.so"))
    if not modules:
        pytest.skip("the emulated CUDA kernels are not built: make emulator")
    emulator = Emulator(modules[0], tmp_path_factory.mktemp("emulated") / "sanitizers")
    yield emulator
    if emulator.pool is not None:
        emulator.pool.shutdown(cancel_futures=True)

"""A process in which the CUDA kernels run on the host: block by block, under the sanitizers. `make emulator` builds them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

__all__ = ["emulated_module", "start"]

MODULES = Path(__file__).resolve().parents[2] / "build" / "emulated"


def emulated_module() -> Path | None:
    """What `make emulator` built, if it did."""
    return next(iter(MODULES.glob("_cuda_emulated*.so")), None)


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


def start(module: Path, log: Path) -> ProcessPoolExecutor:
    """The sanitizers write to files whose names begin with that of `log`.

    The loader and the sanitizers read the environment before Python starts, so it is this process's meanwhile.
    """
    environment = {
        "KDKERNELS_CUDA_EMULATED": str(module),
        "LD_PRELOAD": preloads(),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
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

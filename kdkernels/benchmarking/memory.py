"""Peak memory of one call, measured in a fresh process: how far it rises above where it stood just before.

On the CPU that is the peak of the resident size, on a GPU that of PyTorch's allocator. Gradients that are returned count.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kdkernels.benchmarking.contenders import CONTENDERS
from kdkernels.benchmarking.workloads import Workload

__all__ = ["ask", "peak_extra_bytes", "peak_of_call", "tell"]

# Large blocks go back to the system when they are freed, so that the resident size says what is in use.
ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
ANSWER = "peak extra bytes:"


def peak_extra_bytes(workload: Workload, contender: str) -> int:
    """The peak of a contender's call above the state before it, in bytes.

    Raises:
        RuntimeError: the measuring process failed; the text ends with what it said last.
    """
    request = pickle.dumps((workload, contender, torch.get_num_threads()))
    return ask([sys.executable, "-m", "kdkernels.benchmarking.memory"], request)


def ask(command: Sequence[str], request: bytes = b"") -> int:
    """What a process that ends with ``tell`` says.

    Raises:
        RuntimeError: it failed; the text ends with what it said last.
    """
    answer = subprocess.run(
        command,
        input=request,
        capture_output=True,
        env={**os.environ, **ALLOCATOR_SETTINGS},
        check=False,
    )
    for line in answer.stdout.decode(errors="replace").splitlines():
        if line.startswith(ANSWER):
            return int(line.removeprefix(ANSWER))
    last_words = answer.stderr.decode(errors="replace").strip().splitlines()[-1:] or [
        f"exit status {answer.returncode}"
    ]
    raise RuntimeError(f"the process that measures memory failed: {last_words[0]}")


def resident_bytes(field: str) -> int:
    """``VmRSS``, the resident size, or ``VmHWM``, its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(workload: Workload, contender: str) -> int:
    prepare, compiles = CONTENDERS[contender].prepare, CONTENDERS[contender].compiles
    # A tiny call loads what is loaded once: libraries, thread pools, kernels.
    tiny = dataclasses.replace(workload, tokens=2, vocab=128, hidden=16, teacher_hidden=16)
    prepare(tiny, tiny.inputs())()
    call = prepare(workload, workload.inputs())
    if compiles:  # for these very shapes, which is not part of the cost
        call()
    return peak_of_call(call, workload.device)


def peak_of_call(call: Callable[[], object], device: str = "cpu") -> int:
    """The peak above the state before the call, in this process, which should have done nothing else."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # What the allocator keeps of the preparations goes back, and Linux forgets their peak. Where the first is not known
        # (another C library) or the second not allowed, the answer is a bound: from below or from above.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident_bytes("VmRSS")
        kept = call()
        peak = resident_bytes("VmHWM")
    del kept
    return max(0, peak - before)


def answer_request() -> None:
    workload, contender, threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(threads)
    tell(measure(workload, contender))


def tell(peak: int) -> None:
    """Answers the process that asked."""
    print(ANSWER, peak, flush=True)


if __name__ == "__main__":
    answer_request()

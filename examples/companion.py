"""A process of its own that answers one line of JSON with another: what it needs of memory is its alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Large blocks go back to the system when they are freed, so that the resident size says what is in use.
ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


class Companion:
    """Runs a script whose every line of input is a question and of output an answer; a context manager, which ends it."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed where the process ends
        self.process = subprocess.Popen(
            [sys.executable, str(script.resolve())],
            env={**os.environ, **ALLOCATOR_SETTINGS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that asks
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, question: object) -> object:
        """RuntimeError, with what the process said last, if it failed."""
        try:
            self.process.stdin.write(json.dumps(question, default=str) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words follow
        reply = self.process.stdout.readline()
        if not reply:
            self.errors.seek(0)
            raise RuntimeError(f"{self.script.name} failed in a process of its own:\n{self.errors.read()[-4000:]}")
        return json.loads(reply)

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def answer(value: object) -> None:
    """In the script."""
    print(json.dumps(value), flush=True)

"""A student that trains in a process of its own: from a store, with no teacher in memory, or from the teacher itself.

Run as a script (see ``companion.py``). The first line says what to do; after it, "step" is answered with the loss and the
seconds of a training step, "evaluate" with the quality on held-out text. Both forms train the same student on the same
batches in the same order; they differ in where the teacher's distributions come from.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported; another process has its turns

import torch
from companion import answer
from distillation_job import shuffled_batches
from evaluation import HeldOut, Quality
from step_cost import synchronize
from torch import Tensor
from training_step import LossSettings, fused_loss, make_optimizer, make_schedule, student_step, training_step

import kdkernels as kd

FORMS = ("offline", "online")
STUDENT, TEACHER, HELD_OUT = "student", "teacher", "held_out.safetensors"


@dataclass(frozen=True)
class TrainerSettings:
    """``folder`` holds the student to begin with, the teacher, and the held-out text; ``store`` the teacher's logits."""

    form: str
    folder: str
    store: str
    loss: Mapping[str, object]
    steps: int
    sequences: int
    learning_rate: float
    device: str
    seed: int
    threads: int


def load_model(folder: Path, device: torch.device) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)


class Trainer:
    def __init__(self, settings: TrainerSettings) -> None:
        self.device = torch.device(settings.device)
        self.folder = Path(settings.folder)
        self.loss = LossSettings(**settings.loss)
        self.store = kd.store.open(settings.store, packed=True)
        self.student = load_model(self.folder / STUDENT, self.device).train()
        self.optimizer = make_optimizer(self.student, settings.learning_rate)
        self.schedule = make_schedule(self.optimizer, settings.steps)
        self.batches = shuffled_batches(torch.arange(len(self.store)), settings.sequences, settings.seed)
        self.train_on = {"offline": self.from_store, "online": self.from_teacher}[settings.form]
        if settings.form == "online":
            self.teacher = load_model(self.folder / TEACHER, self.device).eval().requires_grad_(False)
            self.teacher_loss = fused_loss(self.loss)

    def from_store(self, batch: Mapping[str, object]) -> Tensor:
        """The records are decoded inside the loss."""
        packed = batch["packed"].to(self.device)
        divergence, temperature = self.loss.describe(), self.loss.temperature

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return kd.distillation_loss(
                kd.LMHead(hidden, weight),
                packed,
                divergence,
                temperature=temperature,
                temperature_squared=True,
                backend=self.loss.backend,
            )

        return student_step(self.student, self.optimizer, batch["input_ids"].to(self.device), loss)

    def from_teacher(self, batch: Mapping[str, object]) -> Tensor:
        token_ids = batch["input_ids"].to(self.device)
        return training_step(self.teacher, self.student, self.optimizer, token_ids, self.teacher_loss)

    def step(self) -> dict[str, float | None]:
        synchronize(self.device)
        start = time.perf_counter()
        batch = kd.store.collate(self.store.__getitems__(next(self.batches).tolist()))
        loss = self.train_on(batch).item()
        self.schedule.step()
        synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {"loss": loss, "seconds": time.perf_counter() - start, "device_peak_bytes": peak}

    def evaluate(self) -> dict[str, float]:
        """What it takes of the teacher is read for the occasion, and not kept."""
        return asdict(self.measure_held_out())

    def measure_held_out(self) -> Quality:
        from safetensors.torch import load_file

        held_out = load_file(self.folder / HELD_OUT, str(self.device))
        return HeldOut(**held_out).measure(self.student)


def serve() -> None:
    settings = TrainerSettings(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    trainer = Trainer(settings)
    commands: Mapping[str, Callable[[], object]] = {"step": trainer.step, "evaluate": trainer.evaluate}
    answer("ready")
    for line in sys.stdin:
        answer(commands[json.loads(line)]())


if __name__ == "__main__":
    serve()

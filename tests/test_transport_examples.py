"""The examples of transport and of two tokenizers, on a tiny teacher; Mistral's tokenizer is the real one."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
for package in ("transformers", "gguf", "accelerate", "psutil", "matplotlib", "sentencepiece"):
    pytest.importorskip(package, reason=f"the examples need {package}")
if importlib.util.find_spec("mistral_common") is None:
    pytest.skip("mistral-common, whose tokenizer the examples read, is not installed", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import cross_tokenizer  # noqa: E402
import mistral_vocabulary  # noqa: E402
import smollm2  # noqa: E402
import transport_gallery  # noqa: E402
import typer  # noqa: E402
from two_tokenizations import IGNORED, Tokenizers, collate, cut_passages, predicted  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

VOCABULARY = 512
TEXT = "def naïve(x):\n    return x ** 2  # 漢字 🙂\n\n\tpass it on\n" * 3


class WordTokenizer:
    """Words and runs of spaces, with their offsets."""

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, list[Any]]:
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        words = list(re.finditer(r"\S+|\s+", text))
        ids = [1 + sum(word.group().encode()) % (VOCABULARY - 1) for word in words]
        return {"input_ids": ids, "offset_mapping": [word.span() for word in words]}


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=cross_tokenizer.TEACHER_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mistral() -> mistral_vocabulary.MistralTokenizer:
    return mistral_vocabulary.MistralTokenizer()


def test_pieces_spell_the_text(mistral: mistral_vocabulary.MistralTokenizer) -> None:
    tokens = mistral.encode(TEXT)
    raw = TEXT.encode()
    assert tokens.spans[0][0] == 0
    assert tokens.spans[-1][1] == len(raw)
    assert all(one[1] == other[0] for one, other in zip(tokens.spans, tokens.spans[1:], strict=False))
    for token, (start, end) in list(zip(tokens.ids, tokens.spans, strict=True))[1:]:
        assert raw[start:end] == mistral.piece_bytes(token)


def test_batches_hold_every_byte_once(mistral: mistral_vocabulary.MistralTokenizer) -> None:
    assert "".join(cut_passages([TEXT], 40)) == TEXT
    tokenizers = Tokenizers(WordTokenizer(), mistral)
    batch = collate([tokenizers.passage(text) for text in cut_passages([TEXT], 40)])
    assert batch.bytes == len(TEXT.encode())
    for side in ("student", "teacher"):
        ids, labels = getattr(batch, f"{side}_ids"), getattr(batch, f"{side}_labels")
        counted = labels != IGNORED
        assert torch.equal(ids[counted], labels[counted])
        assert not counted[:, 0].any()
        assert torch.equal(predicted(labels)[:, :-1], labels[:, 1:])
        covered = getattr(batch.chunks, side) >= 0
        assert not (covered & ~counted).any()
        assert not (counted & ~covered)[:, 2:].any()  # the piece before the text may stand for none of it
        assert side == "student" or torch.equal(covered, counted)
    assert int(batch.chunks.counts.min()) > 1


@pytest.mark.slow
def test_embeddings_start_as_means(teacher: torch.nn.Module, mistral: mistral_vocabulary.MistralTokenizer) -> None:
    spell = [[1, 2, 2] if token == 5 else [] if token == 7 else [token % VOCABULARY] for token in range(len(mistral))]
    student = mistral_vocabulary.revocabulate(teacher, mistral, spell)
    old, new = (model.get_input_embeddings().weight for model in (teacher, student))
    torch.testing.assert_close(new[5], old[[1, 2, 2]].mean(0))
    torch.testing.assert_close(new[7], old.mean(0))
    torch.testing.assert_close(new[1000], old[1000 % VOCABULARY])
    assert student.lm_head.weight.data_ptr() == new.data_ptr()
    assert old.shape[0] == VOCABULARY


def run(command: Any, *arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.slow
def test_students_learn_across_tokenizers(
    monkeypatch: pytest.MonkeyPatch, teacher: torch.nn.Module, tmp_path: Path
) -> None:
    monkeypatch.setattr(smollm2, "load_teacher", lambda device: (teacher, WordTokenizer()))
    documents = {f"document {i}": TEXT * (i + 1) for i in range(4)}
    monkeypatch.setattr(smollm2, "split_documents", lambda: smollm2.Documents(documents, {"other": TEXT}))
    status, output = run(cross_tokenizer.main, "--steps", 6, "--passages", 2, "--student-layers", 2, "--out", tmp_path)
    assert status == 0, output
    written = json.loads((tmp_path / "cross_tokenizer.json").read_text())
    assert [each["loss"] for each in written["runs"]] == ["alm", "uld", "ce"]
    assert written["held_out_bytes"] == len(TEXT.encode())
    for each in written["runs"]:
        assert [steps for steps, _ in each["held_out"]] == [0, 1, 2, 4, 5, 6]
        assert each["held_out"][0] == written["runs"][0]["held_out"][0]  # all start alike
        assert 0 < each["held_out"][-1][1] < each["held_out"][0][1]
        assert all(math.isfinite(loss) for loss in each["losses"])
    finals = {each["held_out"][-1][1] for each in written["runs"]}
    assert len(finals) == 3  # each learns something else
    assert (tmp_path / "cross_tokenizer.png").stat().st_size > 10_000


def test_unknown_losses_are_refused(tmp_path: Path) -> None:
    status, output = run(cross_tokenizer.main, "--losses", "alm,kl", "--out", tmp_path)
    assert status == 2
    assert "alm, uld, ce" in output


@pytest.mark.slow
def test_gallery(tmp_path: Path) -> None:
    status, output = run(transport_gallery.main, "--no-tokens", "--out", tmp_path)
    assert status == 0, output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["convergence.png", "epsilon.png", "reach.png"]
    assert all(file.stat().st_size > 10_000 for file in tmp_path.iterdir())

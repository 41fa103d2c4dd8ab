"""``kdkernels cache``, ``inspect`` and ``verify`` on a tiny transformers teacher: what is stored, resumed and refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import save_teacher
from typer.testing import CliRunner, Result

pytest.importorskip("transformers", reason="teachers are read with transformers")

import kdkernels as kd
from kdkernels.caching import job, text
from kdkernels.caching.errors import CachingError
from kdkernels.caching.recomputation import compare
from kdkernels.caching.teacher import Teacher, find_weights, load_teacher
from kdkernels.cli import app
from kdkernels.cli import cache as cache_command

DOCUMENTS = {
    "a.txt": "The quick brown fox jumps over the lazy dog.\n" * 20,
    "b/c.md": "# Heading\n\nAnd it goes on, and on: " + " ".join(map(str, range(200))),
    "b/d.jsonl": "".join(json.dumps({"text": f"Line {i} of many lines.", "n": i}) + "\n" for i in range(30)),
    "ignored.bin": "not read",
    ".hidden/e.txt": "not read either",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``teacher/``, ``other_teacher/`` (the same but for its weights) and ``data/``."""
    root = tmp_path_factory.mktemp("cache")
    for name, content in DOCUMENTS.items():
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_text(content)
    for seed, name in enumerate(("teacher", "other_teacher")):
        save_teacher(root / name, DOCUMENTS.values(), seed=seed)
    return root


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder / "teacher")


@pytest.fixture
def run(folder: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``kdkernels cache`` in this process. The teacher, unless it is another, is loaded already."""

    def load(path: Path, gguf_file: str | None, dtype: torch.dtype | None, device: str) -> Teacher:
        if path == folder / "teacher" and gguf_file is dtype is None:
            return teacher
        return load_teacher(path, gguf_file=gguf_file, dtype=dtype, device=device)

    monkeypatch.setattr(cache_command, "load_teacher", load)
    return lambda out, **options: invoke("cache", *arguments(folder, out, **options))


def arguments(folder: Path, out: Path, **options: object) -> list[str]:
    values = {
        "teacher": folder / "teacher",
        "data": folder / "data",
        "out": out,
        "k": 8,
        "sequence_length": 16,
        "batch_tokens": 64,
        "device": "cpu",
    } | options
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def invoke(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    """``kdkernels`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from kdkernels.cli import app; app()", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, output + errors
    return output + errors


def contents(store: Path) -> dict[int, tuple[list[int], bytes, list[int]]]:
    """Everything a store says of each sequence."""
    ds = kd.store.open(store)
    found = {}
    for place in range(len(ds)):
        packed, item = ds.packed(place), ds[place]
        found[item["sequence_id"]] = (item["input_ids"].tolist(), packed.data.numpy().tobytes(), packed.counts.tolist())
    return found


# --- what is stored -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_store_holds_what_the_teacher_says(run: Any, folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    result = run(tmp_path / "store", codec="q8", temperature=1.5)
    assert result.exit_code == 0, result.output
    ds = kd.store.open(tmp_path / "store", tokenizer=teacher.tokenizer)
    documents = [DOCUMENTS["a.txt"], DOCUMENTS["b/c.md"], *(f"Line {i} of many lines." for i in range(30))]
    stream = [
        i for document in documents for i in [*teacher.tokenizer(document)["input_ids"], teacher.tokenizer.eos_token_id]
    ]
    assert torch.cat([ds[place]["input_ids"] for place in range(len(ds))]).tolist() == stream
    assert ds.sequence_ids.tolist() == list(range(-(-len(stream) // 16)))
    for place in (0, 7, len(ds) - 1):
        with torch.no_grad():
            logits = teacher.model(ds[place]["input_ids"][None]).logits[0]
        log_p = (logits / 1.5).log_softmax(-1)
        stored = ds[place]["topk"]
        top = log_p.topk(8).indices.sort(-1).values
        assert torch.equal(stored.ids, top)
        torch.testing.assert_close(stored.log_probs, log_p.gather(-1, top), rtol=0, atol=2e-2)
        torch.testing.assert_close(
            stored.log_tail_mass.exp(), 1 - log_p.gather(-1, top).exp().sum(-1), rtol=0, atol=1e-3
        )
    description = ds.description
    assert (description.k, description.top_p, description.temperature, description.codec) == (8, None, 1.5, "q8")
    assert description.teacher == f"teacher, float32, {teacher.fingerprint()}"
    assert f"{len(stream):,} tokens in sequences of 16, sha256:" in str(description.data)


@pytest.mark.slow
def test_top_p_vocabulary_and_limit(run: Any, tmp_path: Path) -> None:
    result = run(tmp_path / "store", top_p=0.3, vocab_size=300, limit=40, separator="e")
    assert result.exit_code == 0, result.output
    ds = kd.store.open(tmp_path / "store", vocab_size=300)
    assert ds.num_tokens == 40
    assert [len(ds[place]["input_ids"]) for place in range(3)] == [16, 16, 8]
    topk = ds.tokens(0, 40)
    counts = (topk.ids >= 0).sum(-1)
    assert counts.min() < counts.max() <= 8
    mass = topk.log_probs.exp().sum(-1)
    assert bool(((mass > 0.29) | (counts == 8)).all())
    assert ds.description.top_p == 0.3


def test_a_padded_head_and_a_softcap_are_the_models_own(folder: Path, teacher: Teacher) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    assert teacher.vocab_size == 320
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    capped = Teacher(Gemma2ForCausalLM(config).eval(), None, "gemma")
    ids = torch.arange(6)[None]
    expected = capped.model(ids).logits.detach().log_softmax(-1)
    found = kd.topk_logits(capped.head(ids), 50)
    torch.testing.assert_close(found.log_probs, expected.gather(-1, found.ids), rtol=0, atol=1e-5)
    config.final_logit_softcapping = None  # what an unknown model looks like: nothing says what its head does
    with pytest.raises(CachingError, match="not those of a plain head"):
        uncapped_in_name(capped)


def uncapped_in_name(capped: Teacher) -> Teacher:
    right = capped.model.forward

    def scaled(*inputs: Any, **options: Any) -> Any:
        output = right(*inputs, **options)
        output.logits = output.logits * 1.1
        return output

    capped.model.forward = scaled
    return Teacher(capped.model, None, "gemma")


def test_long_files_are_read_in_pieces(folder: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    files = text.find_files(folder / "data")
    assert [str(file.relative_to(folder / "data")) for file in files] == ["a.txt", "b/c.md", "b/d.jsonl"]
    options = {"sequence_length": 16, "separator": 0}
    whole = text.read_tokens(files, teacher.tokenizer, **options)
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    assert len(list(text.read_pieces(files[0]))) > 5
    assert "".join(piece.text for piece in text.read_pieces(files[0])) == DOCUMENTS["a.txt"]
    read: list[int] = []
    pieces = text.read_tokens(files, teacher.tokenizer, advance=read.append, **options)
    assert sum(read) <= text.total_bytes(files)
    # Pieces end with a line, where this tokenizer never joins characters.
    assert np.array_equal(pieces.tokens, whole.tokens)
    assert pieces.fingerprint == whole.fingerprint
    assert np.count_nonzero(whole.tokens == 0) == 32  # one per document


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\n{"content": "not"}\n', 'line 2 is not a JSON object with a string "text"'),
        ("a.txt", b"", "no text in there"),
        ("a.bin", b"something", "no file in this folder has a name like .txt"),
    ],
)
def test_unreadable_text_is_named(run: Any, tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    result = run(tmp_path / "store", data=tmp_path / "data")
    assert result.exit_code == 2
    assert complaint in result.output
    assert not (tmp_path / "store").exists()


# --- resuming, and many processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_goes_on(
    run: Any, folder: Path, tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "whole").exit_code == 0
    calls = []
    head = teacher.head

    def interrupted_head(ids: torch.Tensor) -> kd.LMHead:
        calls.append(ids)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return head(ids)

    monkeypatch.setattr(teacher, "head", interrupted_head)
    result = run(tmp_path / "store")
    assert result.exit_code == 130
    assert re.search(r"Interrupted: 12 of \d+ sequences are stored", result.output)
    assert len(kd.store.open(tmp_path / "store")) == 12
    calls[:] = [None] * 10
    result = run(tmp_path / "store")
    assert result.exit_code == 0
    assert "12 were there before" in result.output
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    batches = math.ceil((len(contents(tmp_path / "whole")) - 1) / 4) + 1  # the last sequence is shorter, and alone
    assert len(calls) - 10 == batches - 3
    calls[:] = [None] * 10
    assert "nothing to do" in run(tmp_path / "store").output
    assert len(calls) == 10


def test_a_request_to_end_is_an_interruption(
    run: Any, tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "head", lambda ids: signal.raise_signal(signal.SIGTERM))
    result = run(tmp_path / "store")
    assert result.exit_code == 130
    assert "Interrupted: 0 of" in result.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_store(folder: Path, stored: Path, tmp_path: Path) -> None:
    words = ("cache", *arguments(folder, tmp_path / "store", save_every=0))
    process = command(*words)
    while process.poll() is None and len(list((tmp_path / "store").glob("shard-*"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(contents(tmp_path / "store")) < len(contents(stored))
    assert kd.store.verify(tmp_path / "store").ok
    assert "were there before" in finish(command(*words))
    assert contents(tmp_path / "store") == contents(stored)
    assert kd.store.verify(tmp_path / "store").ok


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(folder: Path, stored: Path, tmp_path: Path) -> None:
    words = ("cache", *arguments(folder, tmp_path / "store"))
    processes = [command(*words, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    outputs = [finish(process) for process in processes]
    for rank, output in enumerate(outputs):
        assert f"process {rank + 1} of 2: stored" in output
    assert contents(tmp_path / "store") == contents(stored)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 2
    assert kd.store.verify(tmp_path / "store").ok


@pytest.mark.parametrize("share", [("2", "2"), ("x", "2"), ("0", "0"), ("-1", "2")])
def test_a_wrong_rank_is_refused(share: tuple[str, str]) -> None:
    with pytest.raises(CachingError, match="RANK"):
        job.Share.of_environment({"RANK": share[0], "WORLD_SIZE": share[1]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 7}, "--k: 8 in the store, 7 now"),
        ({"top_p": 0.9}, "--top-p: None in the store, 0.9 now"),
        ({"codec": "q4"}, "--codec: q6 in the store, q4 now"),
        ({"temperature": 2}, "--temperature: 1.0 in the store, 2.0 now"),
        ({"sequence_length": 8}, "--data"),
        ({"separator": "e"}, "--data"),
        ({"limit": 40}, "--data"),
        ({"vocab_size": 310}, "--vocab-size"),
        ({"teacher": "other_teacher"}, "--teacher"),
        ({"dtype": "float64"}, "--dtype"),
    ],
)
def test_other_settings_are_refused(folder: Path, stored: Path, change: dict[str, Any], named: str, run: Any) -> None:
    if "teacher" in change:
        change = {"teacher": folder / change["teacher"]}
    result = run(stored, **change)
    assert result.exit_code == 2
    assert "there is a store already" in result.output
    assert named in result.output


def test_changed_data_are_refused(run: Any, folder: Path, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENTS["a.txt"].replace("dog", "cat", 1))
    result = run(stored, data=tmp_path / "a.txt")
    assert result.exit_code == 2
    assert "--data" in result.output


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"teacher": "nowhere"}, "no such folder (models are not downloaded)"),
        ({"teacher": "data"}, "neither a config.json nor a .gguf file"),
        ({"data": "nowhere"}, "--data"),
        ({"k": 400}, "--k 400: the vocabulary has 320 entries"),
        ({"vocab_size": 400}, "--vocab-size 400: the teacher's head has 320 rows"),
        ({"sequence_length": 512}, "the teacher reads at most 256 tokens"),
        ({"separator": "no such token"}, "--separator"),
        ({"top_p": 1.5}, "--top-p"),
        ({"temperature": 0}, "--temperature"),
        ({"gguf_file": "x.gguf"}, "--gguf-file"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_wrong_options_are_refused(
    folder: Path, tmp_path: Path, run: Any, change: dict[str, Any], complaint: str
) -> None:
    for name in ("teacher", "data"):
        if name in change:
            change = {name: folder / change[name]}
    result = run(tmp_path / "store", **change)
    assert result.exit_code == 2
    assert complaint in result.output
    assert not (tmp_path / "store").exists()


def test_gguf_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(CachingError, match=r"neither a config\.json nor a \.gguf file"):
        find_weights(tmp_path, None)
    (tmp_path / "a.gguf").touch()
    assert find_weights(tmp_path, None) == "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CachingError, match=r"choose with --gguf-file: a\.gguf, b\.gguf"):
        find_weights(tmp_path, None)
    assert find_weights(tmp_path, "b.gguf") == "b.gguf"
    (tmp_path / "config.json").touch()
    assert find_weights(tmp_path, None) is None


def test_without_transformers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("cache", *arguments(folder, tmp_path / "store"))
    assert result.exit_code == 2
    assert 'pip install "kdkernels[cache]"' in result.output


# --- looking at it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(folder: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as ``run`` makes it, with as many threads as ``command`` has."""
    out = tmp_path_factory.mktemp("stored") / "store"
    settings, threads = job.CacheSettings(k=8, batch_tokens=64), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cache_command.cache_files(teacher, text.find_files(folder / "data"), str(out), settings, sequence_length=16)
    finally:
        torch.set_num_threads(threads)
    return out


@pytest.mark.slow
def test_inspect(stored: Path, teacher: Teacher, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke("inspect", str(stored), "--picture", str(tmp_path / "picture.png"))
    assert result.exit_code == 0, result.output
    for part in (
        "bytes per token",
        "mass kept",
        teacher.fingerprint(),
        "8 entries per token",
        "tokens in sequences of 16",
    ):
        assert part in result.output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(invoke("inspect", str(stored), "--json").output)
    ds = kd.store.open(stored)
    files = sum(path.stat().st_size for path in stored.iterdir())
    assert found["bytes_per_token"] == pytest.approx(files / ds.num_tokens)
    assert found["mean_kept_mass"] == pytest.approx(float(ds.tokens(0, ds.num_tokens).log_probs.exp().sum(-1).mean()))
    assert found["description"]["k"] == 8


def test_inspect_without_matplotlib(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke("inspect", str(stored), "--picture", str(tmp_path / "picture.png"))
    assert result.exit_code == 1
    assert "figures need matplotlib" in result.output


def test_verify_a_sound_store(stored: Path, folder: Path) -> None:
    result = invoke("verify", str(stored), "--teacher", str(folder / "teacher"), "--sample", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "is sound: 1 shard with" in result.output
    assert "another teacher" not in result.output
    mean = float(re.search(r"mean KL of 3 sequences: (\S+) nats", result.output).group(1))  # type: ignore[union-attr]
    assert 1e-9 < mean < 1e-3


def test_verify_finds_another_teacher(stored: Path, folder: Path) -> None:
    words = ("verify", str(stored), "--teacher", str(folder / "other_teacher"), "--sample", "2", "--device", "cpu")
    result = invoke(*words)
    assert result.exit_code == 1
    assert "the store names another teacher" in result.output
    assert result.output.count("FAIL sequence") == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_verify_names_damaged_files(stored: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "store"
    copy.mkdir()
    for path in stored.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    file = next(copy.glob("shard-*")) if damage != "manifest" else copy / "manifest.json"
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    result = invoke("verify", str(copy))
    assert result.exit_code == 1
    assert file.name in result.output
    assert "is sound" not in result.output


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_there_is_no_store(name: str, tmp_path: Path) -> None:
    result = invoke(name, str(tmp_path))
    assert result.exit_code == 1
    assert "so this is no store" in result.output


def test_the_deviation_is_that_of_a_dense_computation() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 30, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
    teacher = kd.topk_logits(p, 6)
    ids = teacher.ids.clone()
    ids[:, 0] = (ids[:, 0] + 1) % 30  # one or more ids that are not the teacher's
    ids[0] = teacher.ids[0]
    ids = ids.sort(-1).values
    ids[1:] = torch.stack([torch.randperm(30)[:6].sort().values for _ in range(4)])
    log_q = q.gather(-1, ids)
    tail = torch.log1p(-log_q.exp().sum(-1))
    stored = kd.TopKLogits(ids, log_q, vocab_size=30, log_tail_mass=tail)
    kl, same = compare(teacher, stored)
    expected, hits = [], 0
    for row in range(5):
        both = sorted(set(ids[row].tolist()) & set(teacher.ids[row].tolist()))
        hits += len(both)
        rest = [v for v in range(30) if v not in both]
        sides = [torch.cat([side[row, both], side[row, rest].logsumexp(0, keepdim=True)]) for side in (p, q)]
        expected.append(float((sides[0].exp() * (sides[0] - sides[1])).sum()))
    torch.testing.assert_close(kl, torch.tensor(expected, dtype=torch.float64))
    assert same == pytest.approx(hits / 30)

"""Nothing in a store's files is trusted: damage is found, and a hostile file is refused by name."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
from stores import VOCAB, forge, forget_shards, shard_files, teacher

import kdkernels as kd
from kdkernels.store import manifest
from kdkernels.store.files import files_at


@functools.cache
def small_files() -> dict[str, bytes]:
    """The files of a store with three sequences in two shards, one of which has counts."""
    with tempfile.TemporaryDirectory() as path:
        with kd.store.write(path, vocab_size=VOCAB, codec="q4", teacher="t") as w:
            w.append(teacher(2, 3, 4, ragged=True), [4, 9], stores.input_ids(2, 3))
            w.flush()
            w.append(teacher(1, 3, 4, seed=1), [6], stores.input_ids(1, 3))
        return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def small_store(path: Path) -> Path:
    """A copy of that store."""
    path.mkdir(exist_ok=True)
    for name, content in small_files().items():
        (path / name).write_bytes(content)
    return path


def read_all(path: Path) -> None:
    """Everything a reader can get at."""
    ds = kd.store.open(path)
    for place in range(len(ds)):
        ds[place]
        ds.packed(place)
    ds.tokens(0, ds.num_tokens)


def refused(path: Path, file: str | Path, message: str) -> None:
    """Reading the store is an error that names the file and matches ``message``, and ``verify`` says the same."""
    with pytest.raises(kd.store.StoreError, match=message) as caught:
        read_all(path)
    assert Path(file).name in str(caught.value)
    try:
        problems = kd.store.verify(path).problems
    except kd.store.StoreError as error:
        problems = [str(error)]
    assert any(Path(file).name in problem for problem in problems)


@pytest.mark.slow
@pytest.mark.parametrize("joined", [True, False])
def test_every_changed_byte_is_found(tmp_path: Path, joined: bool) -> None:
    path = small_store(tmp_path / "store")
    if not joined:  # the shards must speak for themselves
        forget_shards(path)
    files = shard_files(path) if not joined else [path / "manifest.json", *shard_files(path)]
    assert len(files) == 2 + joined
    for file in files:
        whole = file.read_bytes()
        # What a shard says of itself, the manifest only says again.
        for place in range(0, len(whole), 5 if joined and file in shard_files(path) else 1):
            # Every byte in one way, and of every sixteenth each single bit.
            for flip in (0xFF,) if place % 16 else (1, 2, 4, 8, 16, 32, 64, 128):
                damaged = bytearray(whole)
                damaged[place] ^= flip
                file.write_bytes(damaged)
                with pytest.raises(kd.store.StoreError) as caught:
                    read_all(path)
                assert file.name in str(caught.value), (place, flip)
        file.write_bytes(whole)
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", whole + b"\0"):
            file.write_bytes(damaged)
            refused(path, file, ".")
        file.write_bytes(whole)
    read_all(path)


def test_verify_finds_and_removal_mends(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    before = stores.contents(path)
    first, second = shard_files(path)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1  # the records come last
    first.write_bytes(data)
    ds = kd.store.open(path)  # the index is sound
    seen = []
    report = kd.store.verify(path, progress=lambda *values: seen.append(values))
    assert seen == [(first.name, 1, 2), (second.name, 2, 2)]
    assert not report.ok
    assert len(report.problems) == 1
    assert report.shards == 2
    with pytest.raises(kd.store.StoreError, match=f"{first.name}: sequence .: its checksum") as caught:
        list(ds)
    assert str(caught.value) == report.problems[0]
    kd.store.remove_shard(path, caught.value.file)
    with kd.store.write(path, vocab_size=VOCAB, codec="q4") as w:
        missing = sorted(before.keys() - w.done)
        topk = {4: (0, 0), 9: (0, 1), 6: (1, 0)}
        for sequence_id in missing:
            seed, row = topk[sequence_id]
            batch = teacher(1 if seed else 2, 3, 4, seed=seed, ragged=not seed)
            w.append([stores.one(batch, row)], [sequence_id], stores.input_ids(1 if seed else 2, 3)[row : row + 1])
    assert stores.contents(path) == before
    assert kd.store.verify(path).ok


def test_a_missing_shard(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    file = shard_files(path)[0]
    file.unlink()
    refused(path, file, "the shard is missing")
    kd.store.remove_shard(path, file.name)
    read_all(path)
    with pytest.raises(FileNotFoundError):
        kd.store.remove_shard(path, file.name)
    with pytest.raises(ValueError, match="must be a shard's name"):
        kd.store.remove_shard(path, "manifest.json")


def test_a_shard_that_is_no_file(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    file = shard_files(path)[0]
    file.unlink()
    os.mkfifo(file)  # to open it would be to wait for ever
    refused(path, file, "not a regular file")


def test_a_shard_under_a_second_name(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    copy = path / f"shard-{'f' * 16}-000000.safetensors"
    shutil.copy(shard_files(path)[0], copy)
    refused(path, copy, r"index.sequence_ids: sequence \d is in shard-.* too")
    kd.store.remove_shard(path, copy.name)
    read_all(path)


def test_a_shard_replaced_by_a_sound_one(tmp_path: Path) -> None:
    path = small_store(tmp_path / "a")
    with kd.store.write(tmp_path / "b", vocab_size=VOCAB, codec="q4", teacher="t") as w:
        w.append(teacher(1, 2, 3), [77])
    file = shard_files(path)[0]
    shutil.copy(shard_files(tmp_path / "b")[0], file)
    refused(path, file, "manifest.json lists")


# --- a manifest by someone who means harm ----------------------------------------------------------------------------------


def forge_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A changed manifest with the checksum that belongs to it."""
    import hashlib

    content = json.loads((path / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    lines = ",\n  ".join(json.dumps(entry) for entry in content.pop("shards"))
    head = json.dumps(content, indent=1)[:-2]
    (path / "manifest.json").write_text(f'{head},\n "shards": [\n  {lines}\n ],\n "checksum": "{digest}"\n}}\n')


def test_the_forger_of_manifests_writes_what_the_writer_writes(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    before = (path / "manifest.json").read_bytes()
    forge_manifest(path, lambda content: None)
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other", "format must be"),
        ("version", 2, "version is 2, and this release"),
        ("version", "1", "version must be a whole number"),
        ("vocab_size", 0, "vocab_size must be at least 1"),
        ("vocab_size", 1 << 25, "vocab_size must be a whole number between 0 and 16777216"),
        ("vocab_size", -1, "vocab_size must be a whole number"),
        ("vocab_size", 10.0, "vocab_size must be a whole number"),
        ("vocab_size", True, "vocab_size must be a whole number"),
        ("vocab_size", VOCAB + 1, "__metadata__.store is not this store's: vocab_size differ"),
        ("codec", "q5", "codec must be one of"),
        ("codec", ["q4"], "codec must be a text"),
        ("codec", "q8", "__metadata__.store is not this store's: codec"),
        ("tail", "none", "tail must be one of"),
        ("temperature", -1.0, "temperature must be positive"),
        ("temperature", "1.0", "temperature must be a finite number"),
        ("k", 1 << 16, "k must be a whole number between"),
        ("k", 0, "k must be at least 1"),
        ("top_p", 7, "top_p must lie"),
        ("teacher", "x" * 5000, "teacher must be a text of at most 4096"),
        ("shards", {}, "shards must be a list"),
        ("shards", [[]], r"shards\[0\]. must be a JSON object"),
        ("unknown", 1, "'unknown' is not a field"),
        ("shards.bytes", 1 << 60, r"shards\[0\].bytes must be a whole number"),
        ("shards.bytes", 77, "bytes is .*, and manifest.json lists 77"),
        ("shards.tokens", 77, "tokens is 6, and manifest.json lists 77|tokens is 3, and manifest.json lists 77"),
        ("shards.sequences", 77, "sequences is ., and manifest.json lists 77"),
        ("shards.sequences", -1, r"shards\[0\].sequences must be a whole number"),
        ("shards.checksum", "0" * 64, "checksum is .*, and manifest.json lists 000"),
        ("shards.checksum", "Z" * 64, "checksum must have 64 hexadecimal digits"),
        ("shards.file", "../secret.safetensors", "file must be a shard's name"),
        ("shards.file", "/etc/passwd", "file must be a shard's name"),
        ("shards.file", "manifest.json", "file must be a shard's name"),
        ("shards.file", "shard-0000000000000000-000000.safetensors\n", "file must be a shard's name"),
        ("shards.file", "shard-0000000000000000-00000٣.safetensors", "file must be a shard's name"),
        ("shards.file", "shard-0000000000000000-000000.safetensors", "the shard is missing"),
        ("shards.file", 3, "file must be a text"),
        ("shards.more", 3, r"shards\[0\].'more' is not a field"),
        ("shards.bytes", None, r"shards\[0\].bytes must be a whole number"),
    ],
)
def test_hostile_manifests(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = small_store(tmp_path)

    def change(content: dict[str, Any]) -> None:
        if key.startswith("shards."):
            content["shards"][0][key.removeprefix("shards.")] = value
        else:
            content[key] = value

    if key == "shards" and not isinstance(value, list):
        text = (path / "manifest.json").read_text()
        start, stop = text.index("["), text.rindex("]") + 1
        (path / "manifest.json").write_text(text[:start] + "{}" + text[stop:])
    else:
        forge_manifest(path, change)
    with pytest.raises(kd.store.StoreError, match=message) as caught:
        read_all(path)
    assert ("manifest.json" if "metadata" not in message and "shard is missing" not in message else "shard-") in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000_000, "not valid JSON"),
        ('{"a":' * 200_000, "not valid JSON"),
        ("9" * 100_000, "not valid JSON"),
        ("[]", "must be a JSON object, not list"),
        ('{"format": "kdkernels.store", "format": "kdkernels.store"}', "the same key twice"),
        ('{"format": NaN}', "NaN is not allowed"),
        ("\udcff", "not valid JSON"),
        ("{}", "format is missing"),
        ("", "not valid JSON"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = small_store(tmp_path)
    (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(path, "manifest.json", message)
    with pytest.raises(kd.store.StoreError, match=message):
        kd.store.write(path, vocab_size=VOCAB, codec="q4")


def test_a_manifest_too_large_is_not_read(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    os.truncate(path / "manifest.json", 1 << 40)
    refused(path, "manifest.json", "more than the 33554432")


def test_a_shard_listed_twice(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    forge_manifest(path, lambda content: content["shards"].append(content["shards"][0]))
    refused(path, "manifest.json", "a second time")


# --- a shard by someone who means harm --------------------------------------------------------------------------------------

Tensors = dict[str, Any]


def assign(name: str, place: int, value: int) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        tensors[name][place] = value

    return change


def replaced(name: str, value: Callable[[Tensors], Any]) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        tensors[name] = value(tensors)

    return change


def described(name: str, value: str | None) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value

    return change


def without(name: str) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, metadata: tensors.pop(name)


FORGERIES: dict[str, tuple[Callable[[Tensors, dict[str, str]], None], str]] = {
    "ids descend": (replaced("index.sequence_ids", lambda t: t["index.sequence_ids"][::-1].copy()), "sequence_ids must ascend"),
    "an id twice": (assign("index.sequence_ids", 1, 4), "sequence_ids must ascend"),
    "ids at the ends of the range": (
        replaced("index.sequence_ids", lambda t: np.array([(1 << 63) - 1, -(1 << 63)])), "sequence_ids must ascend"),
    "tokens go back": (assign("index.token_ends", 0, 7), "token_ends must not"),
    "negative tokens": (assign("index.token_ends", 0, -1), "token_ends must not"),
    "more tokens than there are": (assign("index.token_ends", 1, 1 << 62), "counts.shape must be"),
    "fewer tokens than there are": (assign("index.token_ends", 1, 5), "counts.shape must be"),
    "negative records": (assign("index.record_ends", 0, -5), "record_ends must not"),
    "records beyond the end": (assign("index.record_ends", 1, 1 << 62), "record_ends end at 4611686018427387904"),
    "records short": (assign("index.record_ends", 0, 1), "counts ask for .* bytes of records, not 1"),
    "counts too large": (assign("counts", 0, 200), "counts name 200 entries, and k is 4"),
    "counts other": (replaced("counts", lambda t: t["counts"] * 0 + 4), "counts ask for"),
    "no counts": (without("counts"), "counts are missing, and index.record_ends"),
    "counts too few": (replaced("counts", lambda t: t["counts"][:3].copy()), "counts.shape must be"),
    "wide counts": (replaced("counts", lambda t: t["counts"].astype(np.int16)), "counts.dtype must be U8 or U16, not I16"),
    "no records": (without("records"), "records is missing"),
    "a matrix of records": (replaced("records", lambda t: t["records"][None]), "records.shape must be one number"),
    "input ids beyond the vocabulary": (assign("input_ids", 2, VOCAB), "input_ids lie outside the vocabulary of 997"),
    "negative input ids": (assign("input_ids", 2, -1), "input_ids lie outside the vocabulary"),
    "input ids missing": (replaced("input_ids", lambda t: t["input_ids"][:2].copy()), "input_ids.shape must be"),
    "records of ones": (replaced("records", lambda t: t["records"] * 0 + 255), "records are malformed"),
    "records of zeros": (replaced("records", lambda t: t["records"] * 0), "records are malformed"),
    "a tensor too many": (replaced("rest", lambda t: np.zeros(3, np.uint8)), "'rest' is not a field"),
    "no sequences": (lambda t, m: [t.update({n: t[n][:0]}) for n in list(t) if n.startswith("index")] and None, "at least one"),
    "checksums missing": (replaced("index.checksums", lambda t: t["index.checksums"][:1].copy()), "index.checksums.shape must be"),
    "a longer seal": (replaced("seal", lambda t: np.zeros(5, np.int64)), r"seal.shape must be \[4\]"),
    "no seal": (without("seal"), "seal is missing"),
    "another format": (described("format", "other"), "__metadata__.format must be"),
    "another version": (described("version", "2"), "__metadata__.version is 2"),
    "no version": (described("version", None), "__metadata__.version is missing"),
    "a version in words": (described("version", "one"), "__metadata__.version must be a whole number"),
    "k beyond the vocabulary": (described("k", str(VOCAB + 1)), "__metadata__.k must be a whole number between 0 and 997"),
    "an endless k": (described("k", "9" * 5000), "__metadata__.k must be a text of at most 16"),
    "another store": (described("store", '{"vocab_size": 3}'), "__metadata__.store.codec is missing"),
    "a deep store": (described("store", "[" * 30_000), "__metadata__.store is not valid JSON"),
    "metadata too many": (described("more", "1"), "__metadata__.'more' is not a field"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_shards(tmp_path: Path, name: str) -> None:
    path = small_store(tmp_path)
    forget_shards(path)
    shard = next(file for file in shard_files(path) if b'"counts"' in file.read_bytes())
    change, message = FORGERIES[name]
    hurts_checksums = any(
        word in message for word in ("token_ends", "record_ends", "shape", "dtype", "missing", "at least")
    )
    if name == "no seal":
        data = shard.read_bytes()
        shard.write_bytes(data.replace(b'"seal"', b'"sael"', 1))
    else:
        forge(shard, change, checksums=not hurts_checksums)
    refused(path, shard, message)


def test_the_forger_of_shards_writes_what_the_writer_writes(tmp_path: Path) -> None:
    path = small_store(tmp_path)
    for shard in shard_files(path):
        before = shard.read_bytes()
        forge(shard, lambda tensors, metadata: None)
        assert len(shard.read_bytes()) == len(before)  # the metadata may come in another order
    forget_shards(path)
    read_all(path)


def test_tokens_without_bytes_are_not_believed(tmp_path: Path) -> None:
    """Without counts and entries, any number of tokens would fit into no bytes."""
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        w.append([stores.one(teacher(1, 3, 4), 0).changed(lambda tensor: tensor[:, :0])], [1])
    forget_shards(tmp_path)
    shard = shard_files(tmp_path)[0]

    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        del tensors["counts"]
        tensors["index.token_ends"][:] = 1 << 50

    forge(shard, change, checksums=False)
    refused(tmp_path, shard, "counts are missing, and k is 0")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["q6", "bf16"])
def test_records_of_any_bytes(tmp_path: Path, codec: str) -> None:
    """With every checksum right, records of changed bytes are refused or are still distributions over the vocabulary."""
    with kd.store.write(tmp_path, vocab_size=VOCAB, codec=codec) as w:
        w.append(teacher(2, 6, 4, ragged=True), [4, 9])
    forget_shards(tmp_path)
    shard = shard_files(tmp_path)[0]
    whole = shard.read_bytes()
    chance = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}

    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        for _ in range(chance.integers(1, 4)):
            tensors["records"][chance.integers(tensors["records"].size)] = chance.integers(256)

    for _ in range(300):
        shard.write_bytes(whole)
        forge(shard, change)
        try:
            items = list(kd.store.open(tmp_path))
        except kd.store.StoreError as error:
            assert f"{shard.name}: sequence " in str(error)  # noqa: PT017
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        for item in items:
            topk = item["topk"]
            assert bool(((topk.ids >= -1) & (topk.ids < VOCAB)).all())
            mass = topk.log_probs.double().exp().sum(-1) + topk.log_tail_mass.double().exp()
            assert bool(((mass - 1).abs() < 1e-3).all())
    assert min(outcomes.values()) > 20


def header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header alone."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("tensor", "key", "value", "message"),
    [
        ("records", "dtype", "U32", "records.dtype must be U8"),
        ("records", "dtype", 3, "records.dtype must be a text"),
        ("records", "shape", [1 << 60], "records.shape must be one number of at most"),
        ("records", "shape", [-1], "records.shape must be one number of at most"),
        ("records", "shape", [True], "records.shape must be one number of at most"),
        ("records", "shape", [1.5], "records.shape must be one number of at most"),
        ("records", "shape", [], "records.shape must be one number of at most"),
        ("records", "shape", "7", "records.shape must be a list"),
        ("records", "data_offsets", [0, 1 << 62], "records.data_offsets must be"),
        ("records", "data_offsets", [-8, 0], "records.data_offsets must be"),
        ("seal", "data_offsets", [8, 40], "seal.data_offsets must be"),
        ("seal", "more", 1, "seal.'more' is not a field"),
        ("index.checksums", "data_offsets", [8, 24], "index.checksums.data_offsets must be"),
    ],
)
def test_hostile_headers(tmp_path: Path, tensor: str, key: str, value: object, message: str) -> None:
    path = small_store(tmp_path)
    forget_shards(path)
    shard = shard_files(path)[0]
    header(shard, lambda content: content[tensor].update({key: value}))
    refused(path, shard, message)


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 16, (1 << 16) + 1, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_hostile_header_lengths(tmp_path: Path, length: int) -> None:
    path = small_store(tmp_path)
    shard = shard_files(path)[0]
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    refused(path, shard, "header")


@pytest.mark.slow
def test_a_rectangle_too_large_is_not_allocated(tmp_path: Path) -> None:
    """One token with many entries and a million with none would be unpacked to hundreds of gigabytes."""
    vocab = 1 << 17
    wide = kd.TopKLogits(torch_range(60_000), torch_range(60_000).float() * 0 - 12, vocab_size=vocab)
    with kd.store.write(tmp_path, vocab_size=vocab) as w:
        w.append([wide], [0])
        w.append([wide.changed(lambda tensor: tensor[:, :0].expand(1_000_000, 0))], [1])
    ds = kd.store.open(tmp_path)
    assert ds[0]["topk"].ids.shape == (1, 60_000)
    assert ds.packed(1).counts.shape == (1_000_000,)
    with pytest.raises(ValueError, match="too many to unpack at once"):
        ds[1]
    report = kd.store.verify(tmp_path)  # piece by piece
    assert report.ok
    assert report.tokens == 1_000_001


def torch_range(n: int) -> Any:
    import torch

    return torch.arange(n).unsqueeze(0)


def test_manifest_of_another_kind_of_text(tmp_path: Path) -> None:
    """The same content in other words is a changed file."""
    path = small_store(tmp_path)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content))
    refused(path, "manifest.json", "checksum .* does not belong")
    assert manifest.MANIFEST in files_at(path).names()

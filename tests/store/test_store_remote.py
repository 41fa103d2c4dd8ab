"""Stores on file systems that fsspec knows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import stores
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from stores import VOCAB, assert_same, decoded, one, teacher

import kdkernels as kd
from kdkernels.store.files import RemoteFiles


@pytest.fixture
def url() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    yield "memory://kdkernels/teacher"
    memory.rm("/kdkernels", recursive=True)


def written(url: str) -> kd.TopKLogits:
    topk = teacher(6, 5, 4, ragged=True)
    for part in (slice(0, 3), slice(3, 6)):
        with kd.store.write(url, vocab_size=VOCAB, shard_bytes=100) as w:
            for row in range(6)[part]:
                w.append([one(topk, row)], [row], stores.input_ids(6, 5)[row : row + 1])
    return topk


def test_round_trip_in_memory(url: str) -> None:
    topk = written(url)
    ds = kd.store.open(url)
    assert len(ds.shards) > 2
    for row in range(6):
        assert_same(ds[row]["topk"], decoded(one(topk, row)))
        assert ds[row]["input_ids"].tolist() == stores.input_ids(6, 5)[row].tolist()
    assert [item["sequence_id"] for item in ds.__getitems__([4, 1])] == [4, 1]
    assert ds.tokens(3, 22).ids.shape == (19, 4)
    report = kd.store.verify(url)
    assert report.ok
    assert report.tokens == 30
    assert kd.store.summary(url).sequences == 6
    assert not [name for name in fsspec.filesystem("memory").ls("/kdkernels/teacher", detail=False) if ".tmp" in name]


def test_only_what_is_needed_is_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written(url)
    ds = kd.store.open(url)
    calls: list[tuple[Any, ...]] = []
    memory = type(fsspec.filesystem("memory"))
    plain = memory.cat_ranges

    def watched(self: Any, paths: list[str], starts: list[int], ends: list[int], **kwargs: Any) -> Any:
        calls.append((len(paths), sum(ends) - sum(starts)))
        return plain(self, paths, starts, ends, **kwargs)

    monkeypatch.setattr(memory, "cat_ranges", watched)
    packed = ds.packed(2)
    # Records, counts and input ids in one call, and not a byte more.
    assert calls == [(3, packed.data.numel() + 5 + 20)]
    calls.clear()
    ds.__getitems__([0, 3, 5])
    assert len(calls) == 1


def test_damage_in_memory_is_found(url: str) -> None:
    written(url)
    memory = fsspec.filesystem("memory")
    for path in memory.ls("/kdkernels/teacher", detail=False):
        whole = memory.cat_file(path)
        for damaged in (
            whole[:-1],
            whole + b"\0",
            bytes([whole[0] ^ 1]) + whole[1:],
            whole[:-1] + bytes([whole[-1] ^ 1]),
        ):
            memory.pipe_file(path, damaged)
            with pytest.raises(kd.store.StoreError, match=path.rsplit("/", 1)[-1]):
                list(kd.store.open(url))
        memory.pipe_file(path, whole)
    ds = kd.store.open(url)
    shard = next(shard for shard in ds.shards if 5 in shard.sequence_ids)
    memory.pipe_file(f"/kdkernels/teacher/{shard.file}", memory.cat_file(f"/kdkernels/teacher/{shard.file}")[:-1])
    with pytest.raises(kd.store.StoreError, match=r"ends at byte \d+, within the bytes"):
        ds[5]
    memory.rm_file(f"/kdkernels/teacher/{shard.file}")
    with pytest.raises(kd.store.StoreError, match="the shard is missing"):
        kd.store.open(url)
    kd.store.remove_shard(url, shard.file)
    assert len(kd.store.open(url)) < 6
    with pytest.raises(FileNotFoundError, match="no store"):
        kd.store.open("memory://kdkernels/elsewhere")


def test_a_full_store_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written(url)
    before = stores.contents(url)
    memory = type(fsspec.filesystem("memory"))
    plain = memory.pipe_file

    def full(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    w = kd.store.write(url, vocab_size=VOCAB)
    w.append(teacher(1, 5, 4, seed=1), [9], stores.input_ids(1, 5))
    monkeypatch.setattr(memory, "pipe_file", full)
    with pytest.raises(
        OSError, match=r"No space left on device: 1 sequences could not be stored.*memory://.*safetensors"
    ):
        w.close()
    assert stores.contents(url) == before
    monkeypatch.setattr(memory, "pipe_file", plain)
    w.close()
    assert len(kd.store.open(url)) == 7


class Plain(DirFileSystem):
    """Local files as a file system that writes in place, like sftp: a file is seen while it grows."""

    protocol = "plain"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(path=kwargs.pop("root"), fs=LocalFileSystem(), **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("plain://")


def test_file_systems_that_write_in_place(tmp_path: Path) -> None:
    fsspec.register_implementation("plain", Plain, clobber=True)
    options = {"root": str(tmp_path)}
    topk = teacher(2, 3, 4)
    seen = []
    with kd.store.write("plain://store", vocab_size=VOCAB, storage_options=options) as w:
        move = Plain.mv
        try:
            Plain.mv = lambda self, source, target, **kwargs: (  # type: ignore[method-assign]
                seen.append((source, target)),
                move(self, source, target, **kwargs),
            )[1]
            w.append(topk, [0, 1])
            w.flush()
        finally:
            Plain.mv = move  # type: ignore[method-assign]
    assert seen
    assert all(source.startswith(target) and source.endswith(".tmp") for source, target in seen)
    ds = kd.store.open("plain://store", storage_options=options)
    assert_same(ds[1]["topk"], decoded(one(topk, 1)))
    assert len(os.listdir(tmp_path / "store")) == 2
    # The same files, found as a folder.
    assert stores.contents(tmp_path / "store") == stores.contents(f"file://{tmp_path}/store")


def test_connections_do_not_survive_a_fork(url: str) -> None:
    written(url)
    ds = kd.store.open(url)
    expected = ds.packed(2).data.tolist()
    files = ds._files
    assert isinstance(files, RemoteFiles)
    parents = files.fs
    child = os.fork()
    if child == 0:
        same = files.fs is parents
        os._exit(int(same or ds.packed(2).data.tolist() != expected))
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert files.fs is parents


@pytest.mark.parametrize("path", [3, b"x", None])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path must be a str or"):
        kd.store.open(path)

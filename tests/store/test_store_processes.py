"""Many writers and readers at once, and writers that die."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from stores import VOCAB, assert_same, decoded, one, shard_files, teacher
from torch.utils.data import DataLoader

import kdkernels as kd
from kdkernels.store import files, manifest

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def forked(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked child, whose number is returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - a child of fork must not return into the tests
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def finished(child: int, seconds: float = 60) -> int:
    """Waits for a child: its exit status, or minus the signal that ended it. One that hangs is killed, and an error."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"process {child} hangs")


def sequence(number: int) -> kd.TopKLogits:
    return one(teacher(1, 3 + number % 4, 5, seed=number, ragged=number % 3 == 0), 0)


def write_sequences(path: Path, numbers: range | list[int], *, shard_bytes: int = 600) -> None:
    """Appends the sequences that are not stored yet."""
    with kd.store.write(path, vocab_size=VOCAB, shard_bytes=shard_bytes) as w:
        for number in numbers:
            if number not in w:
                topk = sequence(number)
                w.append([topk], [number], [stores.input_ids(1, topk.ids.shape[0], seed=number)[0]])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    path = tmp_path_factory.mktemp("uninterrupted")
    write_sequences(path, range(60))
    return stores.contents(path)


@pytest.mark.slow
def test_three_writers_and_two_readers_at_once(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    path = tmp_path / "store"
    with kd.store.write(path, vocab_size=VOCAB):
        pass

    def read() -> None:
        """Until everything is there: what can be read is always a part of it, and it grows."""
        before: set[int] = set()
        while len(before) < len(uninterrupted):
            found = stores.contents(path)
            assert all(uninterrupted[number] == content for number, content in found.items())
            assert found.keys() >= before
            before = set(found)

    readers = [forked(read) for _ in range(2)]
    writers = [forked(lambda rank=rank: write_sequences(path, range(rank, 60, 3))) for rank in range(3)]
    assert [finished(child) for child in writers + readers] == [0] * 5
    assert stores.contents(path) == uninterrupted
    assert kd.store.open(path).sequence_ids.tolist() == list(range(60))
    listed = {entry.file for entry in manifest.read(files.files_at(path)).shards}
    assert listed == {file.name for file in shard_files(path)}
    assert len({name.split("-")[1] for name in listed}) == 3
    assert kd.store.verify(path).ok


@pytest.mark.slow
def test_writers_that_begin_together_agree(tmp_path: Path) -> None:
    """One creates the store; whoever describes it differently is refused, not mixed in."""
    for attempt in range(5):
        path = tmp_path / str(attempt)

        def write(rank: int, path: Path = path) -> None:
            vocab = 50 + rank % 2
            try:
                with kd.store.write(path, vocab_size=vocab) as w:
                    w.append(teacher(1, 2, 3, vocab=vocab), [rank])
            except ValueError as error:
                assert "vocab_size is" in str(error)  # noqa: PT017

        children = [forked(lambda rank=rank: write(rank)) for rank in range(4)]
        assert [finished(child) for child in children] == [0] * 4
        ds = kd.store.open(path)
        assert ds.sequence_ids.tolist() == ([0, 2] if ds.vocab_size == 50 else [1, 3])
        assert kd.store.verify(path).ok


def test_closing_at_the_same_moment_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower closer writes a manifest from before the faster one's shard; it must look again."""
    path = tmp_path / "store"
    slow, fast = (kd.store.write(path, vocab_size=VOCAB) for _ in range(2))
    slow.append(teacher(1, 2, 3), [0])
    slow.flush()
    fast.append(teacher(1, 2, 3, seed=1), [1])
    replace, held = manifest.replace, []

    def held_back(store: files.Files, content: manifest.Manifest) -> None:
        if not held:
            held.append(content)
            fast.close()
            assert len(manifest.read(store).shards) == 2
        replace(store, content)

    monkeypatch.setattr(manifest, "replace", held_back)
    slow.close()
    assert len(held[0].shards) == 1
    assert len(manifest.read(files.files_at(path)).shards) == 2
    # Had the slow one died before it looked again, the folder would still have had the shard.
    replace(files.files_at(path), held[0])
    assert len(kd.store.open(path)) == 2


def test_the_same_sequence_from_two_writers(tmp_path: Path) -> None:
    first, second = (kd.store.write(tmp_path, vocab_size=VOCAB) for _ in range(2))
    first.append(teacher(2, 2, 3), [0, 1])
    second.append(teacher(2, 2, 3, seed=1), [1, 2])
    first.close()
    with pytest.raises(ValueError, match=r"1 sequences were stored by another writer too, .*: sequence_ids 1$"):
        second.close()
    second.close()
    ds = kd.store.open(tmp_path)
    assert ds.sequence_ids.tolist() == [0, 1, 2]
    assert_same(ds[1]["topk"], decoded(one(teacher(2, 2, 3), 1)))
    assert_same(ds[2]["topk"], decoded(one(teacher(2, 2, 3, seed=1), 1)))
    third = kd.store.write(tmp_path, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"2 is in the store already, in shard-.*\.safetensors"):
        third.append(teacher(1, 2, 3), [2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(tmp_path: Path, uninterrupted: dict[int, Any], seed: int) -> None:
    """Two writers, killed again and again, lose nothing that was stored, and end with what an undisturbed one writes."""
    chance = random.Random(seed)
    path = tmp_path / "store"
    stored: set[int] = set()
    kills = 0
    parts = [list(range(0, 60, 2)), list(range(1, 60, 2))]
    deadline = time.monotonic() + 60
    while len(stored) < 60 and time.monotonic() < deadline:
        children = [forked(lambda part=part: write_sequences(path, part)) for part in parts]
        for child in children:
            # Longer and longer, so that it ends on a slow machine too.
            time.sleep(chance.uniform(0, 0.002 + 0.0003 * kills))
            os.kill(child, signal.SIGKILL)
            kills += finished(child) == -signal.SIGKILL
        if not (path / "manifest.json").exists():
            continue
        found = stores.contents(path)
        assert all(uninterrupted[number] == content for number, content in found.items())
        assert found.keys() >= stored
        stored = set(found)
    assert kills >= 5
    for part in parts:
        write_sequences(path, part)
    assert stores.contents(path) == uninterrupted
    assert kd.store.verify(path).ok
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]


@pytest.mark.slow
def test_killed_after_every_step(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    """The writer dies at each of its system calls that change the folder, one after another."""
    reached = 0
    for step in range(200):
        path = tmp_path / str(step)

        def write(step: int = step, path: Path = path) -> None:
            left = [step]

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                concerned = any(str(path) in str(argument) for argument in arguments)
                if concerned and event in {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.listdir"}:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            write_sequences(path, range(12))

        status = finished(forked(write))
        if (path / "manifest.json").exists():
            found = stores.contents(path)
            assert all(uninterrupted[number] == content for number, content in found.items())
        write_sequences(path, range(12))
        assert stores.contents(path) == {number: uninterrupted[number] for number in range(12)}
        listed = {entry.file for entry in manifest.read(files.files_at(path)).shards}
        assert sorted(os.listdir(path)) == sorted(["manifest.json", *listed])
        if status == 0:
            break
        reached += 1
    assert status == 0
    assert reached > 20


def test_what_has_a_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is synced before its file is named, and the name before anyone builds on it."""
    path = tmp_path / "a" / "b"
    events: list[str] = []

    def sync(handle: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(f"sync {target.relative_to(tmp_path).as_posix().split('.')[0]}")
        if target.suffix == ".tmp":
            assert target.stat().st_size > 100
            assert not target.with_name(target.name.rsplit(".", 3)[0]).exists() or "manifest" in target.name

    rename, link = Path.replace, os.link
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(f"name {to.stem}"), rename(self, to))[1])
    monkeypatch.setattr(os, "link", lambda old, to: (events.append(f"name {to.stem}"), link(old, to))[1])
    with kd.store.write(path, vocab_size=VOCAB) as w:
        w.append(teacher(1, 2, 3), [0])
    shard = shard_files(path)[0].stem
    assert events == [
        "sync a",
        "sync ",
        *("sync a/b/manifest", "name manifest", "sync a/b"),
        *(f"sync a/b/{shard}", f"name {shard}", "sync a/b"),
        *("sync a/b/manifest", "name manifest", "sync a/b"),
    ]


def test_the_temporary_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    place = files.LocalFiles(str(tmp_path))
    with place._temporary("shard") as handle:
        kd.store.write(tmp_path, vocab_size=VOCAB)
        assert Path(handle.name).exists()
    assert not os.listdir(tmp_path)
    left = tmp_path / f"shard.0123.{os.uname().nodename}.tmp"
    left.touch()
    foreign = tmp_path / "shard.0123.elsewhere.tmp"
    foreign.touch()
    kd.store.write(tmp_path, vocab_size=VOCAB)
    assert os.listdir(tmp_path) == [foreign.name]


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file of this process may grow over ``largest`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(tmp_path: Path, uninterrupted: dict[int, Any]) -> None:
    write_sequences(tmp_path, range(10))
    before = stores.contents(tmp_path)
    names = sorted(os.listdir(tmp_path))
    w = kd.store.write(tmp_path, vocab_size=VOCAB)
    for number in range(10, 30):
        w.append([sequence(number)], [number], [stores.input_ids(1, 3 + number % 4, seed=number)[0]])
    with full_disk(2500):
        with pytest.raises(OSError, match="20 sequences could not be stored; the store keeps the 10 it has") as caught:
            w.flush()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename.endswith(".safetensors")
        assert sorted(os.listdir(tmp_path)) == names
        assert stores.contents(tmp_path) == before
        with pytest.raises(OSError, match="could not be stored"):
            w.close()
    assert stores.contents(tmp_path) == before
    w.close()  # there is room again
    assert stores.contents(tmp_path) == {number: uninterrupted[number] for number in range(30)}


def test_no_room_for_the_manifest(tmp_path: Path) -> None:
    w = kd.store.write(tmp_path, vocab_size=VOCAB)
    w.append(teacher(1, 2, 3), [0])
    w.flush()
    before = (tmp_path / "manifest.json").read_bytes()
    with full_disk(100), pytest.raises(OSError, match="large"):
        w.close()
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(kd.store.open(tmp_path)) == 1
    w.close()
    assert (tmp_path / "manifest.json").read_bytes() != before


def test_interrupted_after_the_shard_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer does not know that its shard is there, and must neither lose it nor store it twice."""
    w = kd.store.write(tmp_path, vocab_size=VOCAB)
    w.append(teacher(2, 2, 3), [0, 1])
    sync = files.LocalFiles._sync

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.LocalFiles, "_sync", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        w.flush()
    monkeypatch.setattr(files.LocalFiles, "_sync", staticmethod(sync))
    assert len(shard_files(tmp_path)) == 1
    w.append(teacher(1, 2, 3), [2])
    w.close()
    assert kd.store.open(tmp_path).sequence_ids.tolist() == [0, 1, 2]
    assert len(shard_files(tmp_path)) == 2


def test_a_writer_stays_in_its_process(tmp_path: Path) -> None:
    w, topk = kd.store.write(tmp_path, vocab_size=VOCAB), teacher(1, 2, 3)
    w.append(topk, [0])

    def use() -> None:
        for call in (lambda: w.append(topk, [1]), w.flush, w.close):
            with pytest.raises(RuntimeError, match="open one in each process"):
                call()

    assert finished(forked(use)) == 0
    w.close()


# --- readers in other processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough that torch and the codec would use several threads."""
    path = tmp_path_factory.mktemp("stored")
    with kd.store.write(path, vocab_size=VOCAB, shard_bytes=100_000) as w:
        for number in range(6):
            tokens = 600 + 100 * number
            w.append(teacher(1, tokens, 64, seed=number), [number], stores.input_ids(1, tokens, seed=number))
    return path


def check_batches(stored: Path, loader: DataLoader[Any]) -> None:
    ds = kd.store.open(stored)
    seen = []
    for batch in loader:
        for row, number in enumerate(batch["sequence_id"].tolist()):
            seen.append(number)
            item, length = ds[number], int(batch["mask"][row].sum())
            assert length == 600 + 100 * number
            assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
            assert_same(one(batch["topk"], row).changed(lambda tensor, length=length: tensor[:length]), item["topk"])
            assert bool((batch["topk"].ids[row, length:] == -1).all())
    assert seen == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(stored: Path, method: str) -> None:
    ds = kd.store.open(stored)
    ds[0]  # the parent has used its threads, and has files open
    torch.ones(1 << 20).sum()
    loader = DataLoader(
        ds, batch_size=4, num_workers=2, collate_fn=kd.store.collate, multiprocessing_context=method, timeout=60
    )
    check_batches(stored, loader)


def test_batches_in_this_process(stored: Path) -> None:
    check_batches(stored, DataLoader(kd.store.open(stored), batch_size=4, collate_fn=kd.store.collate))


def test_forked_without_a_data_loader(stored: Path) -> None:
    """libgomp would wait for ever in the child for threads that it does not have."""
    ds = kd.store.open(stored)
    expected = [ds[place]["topk"] for place in range(len(ds))]
    (torch.rand(1 << 21) + 1).sum()

    def read() -> None:
        for place, topk in enumerate(expected):
            assert_same(ds[place]["topk"], topk)
        assert torch.get_num_threads() == 1
        with kd.store.write(stored.parent / "another", vocab_size=VOCAB) as w:
            w.append([expected[0]], [0])

    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        assert finished(forked(read)) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_pickled_dataset(stored: Path) -> None:
    ds = kd.store.open(stored)
    ds[0]
    again = pickle.loads(pickle.dumps(ds))
    assert len(again) == 6
    assert_same(again[3]["topk"], ds[3]["topk"])
    with pytest.raises(kd.store.StoreError) as caught:
        raise pickle.loads(pickle.dumps(kd.store.StoreError("file", "problem")))
    assert (str(caught.value), caught.value.file) == ("file: problem", "file")


def test_reading_in_threads(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN_FILES", 1)  # so that files are closed while others read
    ds = kd.store.open(stored)
    expected = [ds.packed(place).data for place in range(6)]
    wrong = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            place = chance.randrange(6)
            if not torch.equal(ds.packed(place).data, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

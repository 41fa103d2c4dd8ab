"""Launch sizes that were measured: how they are kept, found and chosen. The kernels themselves: ``tests/triton``."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from kdkernels.triton_kernels.tiling import ROW_KERNELS, LaunchSizes, candidate_sizes, choose_tiling, default_sizes
from typer.testing import CliRunner

from kdkernels.backends.triton import launching
from kdkernels.cli import app
from kdkernels.tuning import measurement, table
from kdkernels.tuning.table import Entry, Key, TuneableDevice

pytest.importorskip("triton")

DEVICE = TuneableDevice("NVIDIA H100 80GB HBM3", "sm_90", 32, "3.8.0", "0.1.0")
SMALL, LARGE = LaunchSizes(64, 16), LaunchSizes(256, 32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDKERNELS_TUNING", "1")
    monkeypatch.setenv("KDKERNELS_TUNING_DIR", str(tmp_path))
    return tmp_path


def entry(kernel: str = "bernoulli", vocab: int = 32_000, sizes: LaunchSizes = SMALL) -> Entry:
    return Entry(Key.of(kernel, vocab, 2, True), sizes, 1e-3, 2e-3)


def loaded() -> Mapping[Key, LaunchSizes]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return table.load(DEVICE)


# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_the_default_is_a_candidate(kernel: str, warp_size: int) -> None:
    candidates = candidate_sizes(kernel, warp_size)
    assert len(set(candidates)) == len(candidates) > 1
    for vocab in (1, 1000, 4096, 32_000, 151_936):
        for itemsize in (2, 4, 8):
            for architecture in ("", "sm_86", "sm_90", "gfx942"):
                assert default_sizes(kernel, vocab, itemsize, warp_size, architecture) in candidates
    for sizes in candidates:
        assert sizes.threads % warp_size == 0
        for itemsize in (2, 4, 8) if kernel != "topk" else ():
            for aligned in (False, True):
                cut = choose_tiling(32_000, itemsize, aligned, warp_size, sizes=sizes)
                assert cut.unroll * cut.width * itemsize == sizes.bytes_per_thread
                assert cut.num_warps * warp_size == cut.lanes == sizes.threads


def test_programs_grow_with_the_bytes_of_a_row() -> None:
    assert [default_sizes("bernoulli", vocab, 2).threads for vocab in (1000, 8192, 16_384, 151_936)] == [
        64,
        128,
        256,
        256,
    ]
    assert [default_sizes("bernoulli", vocab, 4).threads for vocab in (1000, 4096, 8192)] == [64, 128, 256]
    # So few programs fit on a multiprocessor of sm_86 that small ones would leave a third of its threads idle.
    assert default_sizes("bernoulli", 1000, 2, 32, "sm_86").threads == 128
    assert default_sizes("bernoulli", 1000, 2, 32, "sm_89").threads == 64


# --- the table ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "power"), [(1, 1), (2, 2), (3, 4), (32_000, 32_768), (65_536, 65_536), (65_537, 131_072)]
)
def test_vocabularies_share_sizes_up_to_a_power_of_two(vocab: int, power: int) -> None:
    assert Key.of("topk", vocab, 4, False).vocabulary == power


def test_what_is_stored_is_found_again(folder: Path) -> None:
    assert loaded() == {}
    path = table.store(DEVICE, [entry(), entry("topk", 40_000, LaunchSizes(256, 16))])
    assert path == folder / "NVIDIA-H100-80GB-HBM3-sm-90.json"
    table.store(DEVICE, [entry(sizes=LARGE)])
    assert loaded() == {
        Key("bernoulli", 32_768, 2, True): LARGE,
        Key("topk", 65_536, 2, True): LaunchSizes(256, 16),
    }
    other = DEVICE._replace(name="NVIDIA A100", architecture="sm_80")
    assert table.load(other) == {}
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    assert [name.name for name in folder.iterdir() if name.name != ".lock"] == [path.name], "nothing temporary is left"


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KDKERNELS_TUNING_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.folder() == tmp_path / "kdkernels" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert table.folder() == Path("/home/somebody/.cache/kdkernels/tuning")


def test_a_user_without_a_home_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("KDKERNELS_TUNING_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert loaded() == {}
    for option in ("--show", "--clear"):
        result = CliRunner().invoke(app, ["tune", option])
        assert result.exit_code == 1
        assert "KDKERNELS_TUNING_DIR names another" in result.output


def test_tuning_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table.store(DEVICE, [entry()])
    monkeypatch.setenv("KDKERNELS_TUNING", "0")
    assert loaded() == {}


def change(**fields: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | fields)


def change_entry(**fields: object) -> Callable[[str], str]:
    def changed(text: str) -> str:
        content = json.loads(text)
        content["entries"][0] |= fields
        return json.dumps(content)

    return changed


LAUNCHES = {"kernel": "bernoulli", "vocabulary": 32_768, "itemsize": 2, "aligned": True}

DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "it is not JSON"),
    "cut short": (lambda text: text[:-20], "it is not JSON"),
    "deep": (lambda text: "[" * 100_000, "it is not JSON"),
    "a list": (lambda text: "[]", "does not hold what it should"),
    "large": (lambda text: text + " " * (1 << 20), "larger than"),
    "another format": (change(format=2), "format 2, not 1"),
    "older kernels": (change(device=DEVICE._replace(kdkernels="0.0.9")._asdict()), "kdkernels 0.0.9, this is 0.1.0"),
    "another triton": (change(device=DEVICE._replace(triton="3.0.0")._asdict()), "triton 3.0.0, this is 3.8.0"),
    "another device": (change(device=DEVICE._replace(name="AMD")._asdict()), "name AMD, this is NVIDIA H100"),
    "no device": (change(device=None), "does not hold what it should"),
    "entries of nothing": (change(entries=[1]), "does not hold what it should"),
    "no such kernel": (change_entry(launches=LAUNCHES | {"kernel": "rm"}), "no kernel 'rm'"),
    "no such vocabulary": (change_entry(launches=LAUNCHES | {"vocabulary": 1000}), "names no launches"),
    "a vocabulary of words": (change_entry(launches=LAUNCHES | {"vocabulary": "many"}), "does not hold what it should"),
    "no such sizes": (change_entry(sizes={"threads": 7, "bytes_per_thread": 32}), "no sizes of bernoulli"),
    "no time": (change_entry(seconds="soon"), "does not hold what it should"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_cannot_be_used_is_named_in_a_warning(damage: str) -> None:
    alter, reason = DAMAGED[damage]
    path = table.store(DEVICE, [entry()])
    path.write_text(alter(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.warns(UserWarning, match=reason) as caught:
        assert table.load(DEVICE) == {}
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    table.store(DEVICE, [entry("topk", 10, LaunchSizes(256, 16))])
    assert list(loaded()) == [Key("topk", 16, 2, True)], "tuning anew replaces it"


def test_a_file_that_cannot_be_read_is_named_in_a_warning() -> None:
    table.file_of(DEVICE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="are not used"):
        assert table.load(DEVICE) == {}


def write_many(place: str, kernel: str) -> None:
    os.environ["KDKERNELS_TUNING_DIR"] = place
    for power in range(4, 14):
        table.store(DEVICE, [entry(kernel, 1 << power)])


@pytest.mark.slow
def test_writers_do_not_lose_each_others_entries(folder: Path) -> None:
    kernels = ("bernoulli", "head_mass")
    context = multiprocessing.get_context("fork")  # they need nothing but Python
    writers = [context.Process(target=write_many, args=(str(folder), kernel)) for kernel in kernels]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        loaded()  # a reader never sees half a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert set(loaded()) == {Key(kernel, 1 << power, 2, True) for kernel in kernels for power in range(4, 14)}


def test_a_failed_writer_leaves_the_file_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.store(DEVICE, [entry()])

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        table.store(DEVICE, [entry(sizes=LARGE)])
    assert list(loaded().values()) == [SMALL]
    assert not list(folder.glob("*.tmp"))


# --- measuring ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose every launch takes 1 ms per 64 threads, refuses 128 threads, and is wrong with 16 bytes and 256."""
    monkeypatch.setattr(measurement, "device_of", lambda tensor: launching.Device("fake", "sm_90", 32))

    def work(student: torch.Tensor, teacher: torch.Tensor) -> measurement.Work:
        def run() -> measurement.Answer:
            sizes = launching.TRIALS["bernoulli"]
            if sizes.threads == 128:
                raise RuntimeError("out of resource: shared memory\nmore")
            off = 1.01 if sizes == LaunchSizes(256, 16) else 1.0
            return (student.float() * off, torch.arange(3))

        return run

    monkeypatch.setitem(measurement.WORK, "bernoulli", work)


def clock_by(seconds: Callable[[LaunchSizes], float]) -> measurement.Clock:
    def clock(calls: Mapping[LaunchSizes, Callable[[], object]]) -> measurement.Samples:
        for call in calls.values():
            call()
        return {sizes: [seconds(sizes)] * 3 for sizes in calls}

    return clock


JOB = measurement.Job("bernoulli", 32_000, torch.bfloat16, 3, "cpu")


@pytest.mark.usefixtures("fake_device")
def test_the_fastest_that_computes_the_same_wins() -> None:
    outcome = measurement.tune(
        JOB, 0.0, clock=clock_by(lambda sizes: sizes.threads * 1e-3 + sizes.bytes_per_thread * 1e-6)
    )
    assert outcome.default == LARGE
    assert outcome.best == SMALL
    assert outcome.entry == Entry(Key("bernoulli", 32_768, 2, True), SMALL, 0.064016, 0.256032)
    refused = "RuntimeError: out of resource: shared memory"
    assert [outcome.skipped.pop(LaunchSizes(128, size)) for size in (16, 32)] == [refused] * 2
    assert outcome.skipped == {LaunchSizes(256, 16): "it computes something else: relative error 1.0e-02"}
    assert set(outcome.seconds) == {LARGE, SMALL, LaunchSizes(64, 32)}
    assert not launching.TRIALS


@pytest.mark.usefixtures("fake_device")
def test_noise_does_not_replace_the_default() -> None:
    outcome = measurement.tune(JOB, 0.0, clock=clock_by(lambda sizes: 1.0 if sizes == LARGE else 0.99))
    assert outcome.best == LARGE


def test_a_kernel_that_does_not_run_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(student: torch.Tensor, teacher: torch.Tensor) -> measurement.Work:
        raise_it = RuntimeError("nothing works")

        def run() -> measurement.Answer:
            raise raise_it

        return run

    monkeypatch.setitem(measurement.WORK, "bernoulli", work)
    outcome = measurement.tune(JOB, 0.0, clock=clock_by(lambda sizes: 1.0))
    assert outcome.problem == "RuntimeError: nothing works"
    assert outcome.entry is None


def test_a_candidate_that_writes_nothing_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "device_of", lambda tensor: launching.Device("fake", "sm_90", 32))

    def work(student: torch.Tensor, teacher: torch.Tensor) -> measurement.Work:
        gradient, ids = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)

        def run() -> measurement.Answer:
            if launching.TRIALS["bernoulli"].threads == 256:
                gradient.fill_(1)
                ids.fill_(2)
            return gradient, ids

        return run

    monkeypatch.setitem(measurement.WORK, "bernoulli", work)
    outcome = measurement.tune(JOB, 0.0, clock=clock_by(lambda sizes: float(sizes.threads)))
    assert {sizes.threads for sizes in outcome.seconds} == {256}
    assert set(outcome.skipped.values()) == {"it computes something else: relative error inf"}


def test_answers_are_compared_row_by_row() -> None:
    answer = torch.randn(300, 5)
    answer[7, 2], answer[8, 3] = -torch.inf, torch.nan
    assert measurement.disagreement((answer, torch.arange(3)), (answer.clone(), torch.arange(3))) == ""
    assert measurement.disagreement((torch.zeros_like(answer),), (answer,)) != ""
    assert measurement.disagreement((-answer,), (answer,)) != ""
    assert measurement.disagreement((torch.arange(3),), (torch.arange(3).flip(0),)) == "it computes other ids"
    for row in (7, 8, 299):
        wrong = answer.clone()
        wrong[row] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        assert "something else" in measurement.disagreement((wrong,), (answer,))


def test_rows_are_as_many_as_memory_holds() -> None:
    assert measurement.rows_that_fit(128_256, torch.bfloat16, 4096, 80 << 30) == 4096
    fewer = measurement.rows_that_fit(128_256, torch.bfloat16, 4096, 4 << 30)
    assert 4 * fewer * 128_256 * 2 <= 2 << 30 < 4 * (fewer + 1) * 128_256 * 2
    assert measurement.rows_that_fit(128_256, torch.float32, 4096, 0) == 1


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_there_is_nothing_to_tune_without_a_gpu() -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert "--device cuda: PyTorch" in result.output
    assert "finds no CUDA or ROCm device here" in result.output
    result = CliRunner().invoke(app, ["tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert "nothing to tune on cpu: " in result.output


def test_what_is_kept_is_shown_and_removed(folder: Path) -> None:
    assert "nothing is kept" in CliRunner().invoke(app, ["tune", "--show"]).output
    path = table.store(DEVICE, [entry()])
    (folder / "broken.json").write_text("{", encoding="utf-8")
    shown = CliRunner().invoke(app, ["tune", "--show"]).output
    assert "NVIDIA H100" in shown
    assert "0.50×" in shown
    assert "broken.json: not used, it is not JSON" in shown.replace("\n", " ")
    found = json.loads(CliRunner().invoke(app, ["tune", "--show", "--json"]).output)
    assert found[str(path)]["entries"][0]["threads"] == 64
    result = CliRunner().invoke(app, ["tune", "--clear"])
    assert result.exit_code == 0
    assert str(path) in result.output
    assert not table.files()
    assert "nothing is kept" in CliRunner().invoke(app, ["tune", "--clear"]).output

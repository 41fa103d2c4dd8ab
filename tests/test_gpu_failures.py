"""What is said where a GPU, its driver or Triton refuses, without a GPU: the devices here are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kdkernels.triton_kernels.tiling import LaunchSizes
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels.backends import devices
from kdkernels.backends.triton import launching
from kdkernels.cli import app

errors = pytest.importorskip("triton.runtime.errors")

TOO_MUCH = errors.OutOfResources(300_000, 232_448, "shared memory")
ON_GPU: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
"""As much of a tensor as a launch looks at."""


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Nothing that is said of made-up devices is remembered."""
    functions = (devices.gpu, launching.why_not, launching.tuned_table)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Two NVIDIA GPUs, whose properties a test may change."""
    found = [
        SimpleNamespace(name="Tesla V100", major=7, minor=0, gcnArchName=""),
        SimpleNamespace(name="NVIDIA A10", major=8, minor=6, gcnArchName=""),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (found[index].major, found[index].minor))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def fail_with(error: BaseException, tensor: Any = ON_GPU) -> None:
    with launching.on_device_of(tensor, "divergence"):
        raise error


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TOO_MUCH, "OutOfResources: out of resource: shared memory, Required: 300000"),
        (errors.PTXASError("no kernel image"), "PTXASError: PTXAS error: no kernel image"),
        (
            RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
            "unsupported",
        ),
    ],
    ids=["resources", "assembler", "driver"],
)
def test_a_failed_launch_names_op_device_and_way_out(error: Exception, words: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_with(error)
    text = str(caught.value)
    assert text.startswith("divergence on cuda:1 (NVIDIA A10, sm_86): ")
    assert words in text
    assert "backend='reference' computes it in plain PyTorch" in text
    assert "KDKERNELS_TUNING" not in text
    assert caught.value.__cause__ is error


@pytest.mark.usefixtures("gpus")
def test_tuned_sizes_that_do_not_fit_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    key = launching.table.Key.of("divergence_forward", 1000, 4, True)
    monkeypatch.setattr(launching.table, "load", lambda device: {key: LaunchSizes(64, 16)})
    with pytest.raises(
        RuntimeError, match=r"KDKERNELS_TUNING=0 leaves out the launch sizes of .*NVIDIA-A10-sm-86\.json"
    ):
        fail_with(TOO_MUCH)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("a record"), KeyboardInterrupt()]
)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        fail_with(error)
    assert caught.value is error


def test_old_architectures_are_refused_with_a_reason(
    gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "load_kernels", not_interpreted)
    available, reason = launching.status()
    assert available
    assert reason == "CUDA: NVIDIA A10"
    old: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"divergence on cuda:0: Tesla V100 has compute capability 7\.0.*need 7\.5"):
        fail_with(AssertionError("launched"), old)
    del gpus[1]
    assert launching.status() == (False, "Tesla V100 has compute capability 7.0, and the kernels need 7.5 or later")
    assert launching.supports("cuda")[0] is False


def not_interpreted() -> Any:
    return SimpleNamespace(language=SimpleNamespace(sum=1), jit_function=int, interpreted=False)


@pytest.mark.usefixtures("gpus")
def test_tensors_elsewhere_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "load_kernels", not_interpreted)
    supported, reason = launching.supports("cpu")
    assert not supported
    assert "takes cuda tensors, and these are on cpu; move them there with .to('cuda'), or leave out backend=" in reason
    assert launching.supports("cuda") == (True, "")


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher.* meta.* cpu|student.* cpu.* meta"):
        kd.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torchs_own_words_say_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is built for neither" in devices.why_no_gpu()
    old_driver = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver."

    def init() -> None:
        raise RuntimeError(old_driver)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    expected = (
        "finds no CUDA or ROCm device here: The NVIDIA driver on your system is too old (found version 11040). Please"
    )
    assert expected in devices.why_no_gpu()
    assert expected in launching.status()[1]
    for command in ("check", "bench", "tune", "validate-gpu"):
        result = CliRunner().invoke(app, [command, "--device", "cuda"])
        assert result.exit_code == 2
        assert expected in result.output


@pytest.mark.usefixtures("gpus")
def test_a_device_too_many_is_refused() -> None:
    result = CliRunner().invoke(app, ["tune", "--device", "cuda:2"])
    assert result.exit_code == 2
    assert "--device cuda:2: there are only 2 CUDA or ROCm devices here" in result.output


@pytest.mark.parametrize(
    ("architecture", "named", "warp_size"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942", 64),
        ("gfx90a", "gfx90a", 64),
        ("gfx1100", "gfx1100", 32),
        ("gfx1201", "gfx1201", 32),
    ],
)
def test_waves_of_amd(
    gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch, architecture: str, named: str, warp_size: int
) -> None:
    gpus[0].gcnArchName = architecture
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert devices.gpu(0) == devices.Device("Tesla V100", named, warp_size)
    assert launching.why_not(0) == ""


@pytest.mark.usefixtures("gpus")
def test_architectures_of_nvidia() -> None:
    assert [devices.gpu(index).architecture for index in (0, 1)] == ["sm_70", "sm_86"]

"""What the CUDA C++ backend says where it cannot run. The devices and the extension here are made up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import able, choose, devices, row_backend, select, status
from kdkernels.backends.cuda import launching

CACHED = (launching.load, launching.status, launching.capable, devices.gpu, status, able, choose)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that is said of made-up devices is remembered."""
    monkeypatch.delenv("KDKERNELS_CUDA_EMULATED", raising=False)
    for function in CACHED:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


class Extension:
    """As much of the extension as is asked before a kernel runs."""

    error = ""
    driver = 13_010

    def device_error(self) -> str:
        return self.error

    def versions(self) -> tuple[int, int]:
        return self.driver, 13_000


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    found = Extension()
    monkeypatch.setattr(launching, "load", lambda: (found, ""))
    return found


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """A GPU that is too old and one that is not."""
    found = [
        SimpleNamespace(name="Tesla V100", major=7, minor=0),
        SimpleNamespace(name="NVIDIA H100", major=9, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (found[index].major, found[index].minor))
    return found


def refusal() -> str:
    with pytest.raises(RuntimeError, match=r"^backend='cuda' is not available: ") as caught:
        kd.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="cuda")
    return str(caught.value)


def test_an_extension_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    assert "the CUDA kernels were not built: " in refusal()


def test_an_emulated_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_CUDA_EMULATED", "/there/is/none.so")
    assert "/there/is/none.so could not be loaded" in refusal()


@pytest.mark.parametrize(
    ("driver", "words"), [(0, "no driver is installed"), (12_040, "the driver supports CUDA 12.4")]
)
def test_a_driver_that_is_missing_or_too_old(driver: int, words: str, extension: Extension) -> None:
    extension.error, extension.driver = "CUDA driver version is insufficient for CUDA runtime version", driver
    text = refusal()
    assert extension.error in text
    assert words in text
    assert "built with CUDA 13.0" in text


def test_a_pytorch_for_other_devices(monkeypatch: pytest.MonkeyPatch, extension: Extension) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in refusal()


@pytest.mark.usefixtures("extension")
def test_only_devices_that_are_too_old(gpus: list[SimpleNamespace]) -> None:
    del gpus[1]
    text = refusal()
    assert "cuda:0 (Tesla V100) has compute capability 7.0, and the CUDA kernels need 8.0 or later" in text
    assert "triton" in text


@pytest.mark.usefixtures("extension", "gpus")
def test_one_device_that_will_do() -> None:
    found = kd.backends()["cuda"]
    assert found.available
    assert "NVIDIA H100" in found.reason
    assert "V100" not in found.reason
    on_first: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"cuda:0 \(Tesla V100\).*use backend='triton' or 'reference'"):
        launching.place(on_first)


@pytest.mark.usefixtures("extension", "gpus")
def test_tensors_on_another_device() -> None:
    with pytest.raises(
        ValueError, match=r"backend='cuda' cannot be used here: the cuda backend takes cuda tensors.*cpu"
    ):
        kd.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="cuda")


@pytest.mark.usefixtures("extension", "gpus")
def test_triton_comes_first_and_cuda_next(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = row_backend("triton")
    monkeypatch.setattr(triton, "supports", lambda device: (True, ""))
    assert select(None, "cuda", "topk") == "triton"
    choose.cache_clear()
    able.cache_clear()
    monkeypatch.setattr(triton, "supports", lambda device: (False, "it is not installed"))
    assert select(None, "cuda", "topk") == "cuda"

"""What every family needs to call the CUDA kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from kdkernels.backends.compiled.library import Library
from kdkernels.backends.devices import gpu, why_no_gpu

__all__ = ["LIBRARY", "status", "supports"]

EXTENSION = "kdkernels._cuda"
EMULATED = "_cuda_emulated"
LEAST_CAPABILITY = (8, 0)


def emulated_path() -> str:
    return os.environ.get("KDKERNELS_CUDA_EMULATED", "")


def why_not_built() -> str:
    """What the installation noted (see setup.py) about an extension that is not there."""
    note = Path(__file__).resolve().parents[2] / "cuda_not_built.txt"
    cause = note.read_text(encoding="utf-8").strip() if note.is_file() else f"this installation has no {EXTENSION}"
    return f"the CUDA kernels were not built: {cause}"


def load_emulated(path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(EMULATED, path)
    spec = importlib.util.spec_from_loader(EMULATED, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, or the reason why it is not there. Never raises."""
    path = emulated_path()
    try:
        if path:
            return load_emulated(path), ""
        if importlib.util.find_spec(EXTENSION) is None:
            return None, why_not_built()
        return importlib.import_module(EXTENSION), ""
    except ImportError as error:
        return None, f"{path or EXTENSION} could not be loaded: {error}"


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def why_no_device(extension: ModuleType) -> str:
    """Why no device can be used, or nothing if one can."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm (the triton backend serves it)"
    error = extension.device_error()
    if error:
        driver, runtime = extension.versions()
        installed = f"the driver supports CUDA {dotted(driver)}" if driver else "no driver is installed"
        return f"{error} ({installed}; the kernels were built with CUDA {dotted(runtime)})"
    return "" if torch.cuda.is_available() else why_no_gpu()


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the backend can be used, and on which devices or the reason why not."""
    extension, reason = load()
    if extension is None:
        return False, reason
    if emulated_path():
        return True, "emulated on the host, on CPU tensors (KDKERNELS_CUDA_EMULATED)"
    reason = why_no_device(extension)
    if reason:
        return False, reason
    devices = range(torch.cuda.device_count())
    served = [gpu(index).name for index in devices if capable(index)]
    if not served:
        return False, too_old(0)
    return True, f"{', '.join(sorted(set(served)))}; built with CUDA {dotted(extension.versions()[1])}"


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    wanted = "cpu" if emulated_path() else "cuda"
    how = "emulated on the host, " if emulated_path() else ""
    return device == wanted, f"{how}the cuda backend takes {wanted} tensors, and these are on {device}"


@functools.cache
def capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= LEAST_CAPABILITY


def too_old(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"cuda:{index} ({gpu(index).name}) has compute capability {major}.{minor}, and the CUDA kernels "
        f"need {least} or later; use backend='triton' or 'reference'"
    )


def module() -> ModuleType:
    extension, reason = load()
    if extension is None:
        raise RuntimeError(f"the cuda backend is not available: {reason}")
    return extension


def place(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor and torch's current stream on it."""
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.device.index
    if not capable(index):
        raise RuntimeError(too_old(index))
    return index, torch.cuda.current_stream(index).cuda_stream


LIBRARY = Library(module, place)

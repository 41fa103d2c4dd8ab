"""Builds the native extensions with CMake and maps ``triton_kernels/`` to the package ``kdkernels.triton_kernels``.

Everything else about the project stands in ``pyproject.toml``. Environment:

``KDKERNELS_CPU``
    ``1``: build the native CPU kernels or fail; ``0``: leave them out; unset: build them where that is possible, and
    otherwise install without them, with a warning. An error of the compiler is always an error.
``KDKERNELS_CUDA``
    the same for the CUDA kernels, which need nvcc (``CUDACXX``, ``CUDA_HOME`` or the path); no warning where there is none.
    ``CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=90-real`` builds for one architecture instead of all.
``CMAKE_ARGS``
    further arguments for CMake, for instance ``-DKD_SANITIZE=ON``.
``CXX``
    the C++ compiler.
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def cxx_compiler() -> str | None:
    """The C++ compiler: $CXX if set, else g++ before clang++, because libgomp is the OpenMP runtime torch ships."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)


def cuda_compiler() -> str | None:
    """nvcc: $CUDACXX if set, else that of $CUDA_HOME or $CUDA_PATH, else the one on the path."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    candidates = [*(str(Path(home, "bin", "nvcc")) for home in homes if home), "nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def obstacle() -> str | None:
    """What keeps this machine from building an extension, or None."""
    if not sys.platform.startswith("linux"):
        return f"the native kernels are built on Linux only, and this is {sys.platform}"
    if cxx_compiler() is None:
        return f"no C++ compiler was found (looked for {os.environ.get('CXX') or 'g++, c++, clang++'})"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"Python's C headers are missing ({include}/Python.h; many systems package them as python3-dev)"
    return None


def cuda_obstacle() -> str | None:
    if cuda_compiler() is None:
        return f"nvcc was not found (looked for {os.environ.get('CUDACXX') or 'CUDA_HOME, CUDA_PATH and the path'})"
    return obstacle()


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An extension module, and what decides whether it is built."""

    name: str
    variable: str
    note: str
    """The file beside it that says why an installation has none; the backend reads it."""
    cmake_options: tuple[str, ...]
    obstacle: Callable[[], str | None]
    warns: bool

    def not_built(self) -> str | None:
        """Why the extension is not built, or None if it is."""
        request = os.environ.get(self.variable, "")
        if request == "0":
            return f"{self.variable}=0 was set during installation"
        if request == "1":
            return None
        if request:
            raise SystemExit(f"{self.variable} must be 0, 1 or unset, not {request!r}")
        return self.obstacle()

    @property
    def file_pattern(self) -> str:
        return f"{self.name.rpartition('.')[2]}.*.so"


CPU = Kernels("kdkernels._native", "KDKERNELS_CPU", "native_not_built.txt", ("-DKD_CUDA=OFF",), obstacle, warns=True)
CUDA = Kernels(
    "kdkernels._cuda",
    "KDKERNELS_CUDA",
    "cuda_not_built.txt",
    ("-DKD_CPU=OFF", "-DKD_CUDA=ON"),
    cuda_obstacle,
    warns=False,
)
NOT_BUILT = {kernels: kernels.not_built() for kernels in (CPU, CUDA)}


def tool(name: str, module: str, folder: str) -> str:
    """The path of a program from its Python package, else from PATH: an environment need not be activated."""
    try:
        path = Path(getattr(importlib.import_module(module), folder), name)
    except (ImportError, AttributeError):
        path = Path()
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(f"building the native kernels needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Compiles the extension with CMake and Ninja instead of distutils' compiler driver."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # setuptools clears `inplace` while it builds; here it also chooses where the objects are kept.
        self.keeps_objects = bool(self.inplace)

    def build_extension(self, ext: Extension) -> None:
        (kernels,) = (one for one in NOT_BUILT if one.name == ext.name)
        problem = kernels.obstacle()
        if problem is not None:
            raise SystemExit(f"{kernels.variable}=1 demands {kernels.name}, but {problem}")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self.build_directory(kernels)
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake", "cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *kernels.cmake_options,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = {**os.environ, "CXX": str(cxx_compiler())}
        if kernels is CUDA:
            environment["CUDACXX"] = str(cuda_compiler())
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), *jobs], check=True, env=environment)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target.parent)], check=True)

    def build_directory(self, kernels: Kernels) -> Path:
        """Where the objects are: a folder per extension and set of CMake arguments, kept if this builds in place."""
        arguments = os.environ.get("CMAKE_ARGS", "")
        variant = "-cuda" if kernels is CUDA else ""
        variant += "-" + hashlib.sha256(arguments.encode()).hexdigest()[:8] if arguments else ""
        if self.keeps_objects:
            return ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{variant}"
        return Path(self.build_temp).resolve() / f"cmake{variant}"

    def copy_extensions_to_source(self) -> None:
        """Replaces the extension in the source tree in one step, if it changed: a process that uses it is not hurt."""
        for ext in self.extensions:
            file = self.get_ext_filename(ext.name)
            built, placed = Path(self.build_lib, file), ROOT / file
            if not placed.is_file() or not filecmp.cmp(built, placed, shallow=False):
                new = placed.with_name(placed.name + ".new")
                shutil.copyfile(built, new)
                new.replace(placed)


class BuildPython(build_py):
    """Leaves word in the package of why it lacks an extension, and no extension of an earlier build in its place."""

    def run(self) -> None:
        super().run()
        package = ROOT / "kdkernels" if self.editable_mode else Path(self.build_lib, "kdkernels")
        for kernels, reason in NOT_BUILT.items():
            note = package / kernels.note
            if reason is None:
                note.unlink(missing_ok=True)
                continue
            for stale in package.glob(kernels.file_pattern):
                stale.unlink()
            note.write_text(reason + "\n", encoding="utf-8")
            if kernels.warns:
                warnings.warn(f"kdkernels is installed without its native CPU kernels: {reason}", stacklevel=1)


setup(
    packages=[
        *find_packages(include=["kdkernels", "kdkernels.*"]),
        *(f"kdkernels.{name}" for name in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    # The folder's own name must not be installed: another public package is called triton_kernels.
    package_dir={"kdkernels": "kdkernels", "kdkernels.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(kernels.name, sources=[]) for kernels, reason in NOT_BUILT.items() if reason is None],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)

"""Builds the native extension with CMake and maps ``triton_kernels/`` to the package ``kdkernels.triton_kernels``.

Everything else about the project stands in ``pyproject.toml``. Environment:

``KDKERNELS_CPU``
    ``1``: build the native extension or fail; ``0``: install pure Python; unset: build it where that is possible, and
    otherwise install pure Python with a warning. An error of the compiler is always an error.
``CMAKE_ARGS``
    further arguments for CMake, for instance ``-DKD_SANITIZE=ON``.
``CXX``
    the C++ compiler.
"""

from __future__ import annotations

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
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXTENSION = "kdkernels._native"
# Read by kdkernels/backends/native.py: why this installation has no extension.
REASON_FILE = "native_not_built.txt"


def cxx_compiler() -> str | None:
    """The C++ compiler: $CXX if set, else g++ before clang++, because libgomp is the OpenMP runtime torch ships."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)


def obstacle() -> str | None:
    """What keeps this machine from building the extension, or None."""
    if not sys.platform.startswith("linux"):
        return f"the native CPU backend is built on Linux only, and this is {sys.platform}"
    if cxx_compiler() is None:
        return f"no C++ compiler was found (looked for {os.environ.get('CXX') or 'g++, c++, clang++'})"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"Python's C headers are missing ({include}/Python.h; many systems package them as python3-dev)"
    return None


def reason_against_native() -> str | None:
    """Why the extension is not built, or None if it is."""
    request = os.environ.get("KDKERNELS_CPU", "")
    if request == "0":
        return "KDKERNELS_CPU=0 was set during installation"
    if request == "1":
        return None
    if request:
        raise SystemExit(f"KDKERNELS_CPU must be 0, 1 or unset, not {request!r}")
    return obstacle()


NOT_BUILT = reason_against_native()


def tool(name: str, module: str, folder: str) -> str:
    """The path of a program from its Python package, else from PATH: an environment need not be activated."""
    try:
        path = Path(getattr(importlib.import_module(module), folder), name)
    except (ImportError, AttributeError):
        path = Path()
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(f"building {EXTENSION} needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Compiles the extension with CMake and Ninja instead of distutils' compiler driver."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # setuptools clears `inplace` while it builds; here it also chooses where the objects are kept.
        self.keeps_objects = bool(self.inplace)

    def build_extension(self, ext: Extension) -> None:
        problem = obstacle()
        if problem is not None:
            raise SystemExit(f"KDKERNELS_CPU=1 demands the native extension, but {problem}")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self.build_directory()
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake", "cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = {**os.environ, "CXX": str(cxx_compiler())}
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), *jobs], check=True, env=environment)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target.parent)], check=True)

    def build_directory(self) -> Path:
        """Where the objects are: one folder per set of CMake arguments, kept for the next build if this is in place."""
        arguments = os.environ.get("CMAKE_ARGS", "")
        variant = "-" + hashlib.sha256(arguments.encode()).hexdigest()[:8] if arguments else ""
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
    """Leaves word in the package of why it has no extension, and no extension of an earlier build in its place."""

    def run(self) -> None:
        super().run()
        package = ROOT / "kdkernels" if self.editable_mode else Path(self.build_lib, "kdkernels")
        note = package / REASON_FILE
        if NOT_BUILT is None:
            note.unlink(missing_ok=True)
            return
        for stale in package.glob("_native.*.so"):
            stale.unlink()
        note.write_text(NOT_BUILT + "\n", encoding="utf-8")
        warnings.warn(f"kdkernels is installed without its native CPU kernels: {NOT_BUILT}", stacklevel=1)


setup(
    packages=[
        *find_packages(include=["kdkernels", "kdkernels.*"]),
        *(f"kdkernels.{name}" for name in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    # The folder's own name must not be installed: another public package is called triton_kernels.
    package_dir={"kdkernels": "kdkernels", "kdkernels.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(EXTENSION, sources=[])] if NOT_BUILT is None else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)

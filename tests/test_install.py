"""What a user installs: an sdist, a wheel made from it with and without the native extension, an editable checkout.

Every environment here holds exactly what it should: links to the distributions that the build system requires, or to
those that the package says it needs, each with what it depends on in turn. So a build that needed torch, or a package
that needed something it does not ask for, would fail, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from kdkernels.backends import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

needs_native = pytest.mark.skipif(native.module is None, reason=native.reason)

# Runs in an environment under test: computes one loss and says what it ran on.
PROBE = """
import importlib.util, json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import kdkernels as kd
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 131, generator=generator).requires_grad_()
    teacher = torch.randn(6, 131, generator=generator)
    loss = kd.distillation_loss(student, teacher, kd.JSD(0.3), temperature=2.0)
    loss.backward()
    cpu = kd.backends()["cpu"]
print(json.dumps({
    "file": kd.__file__,
    "torch": torch.__file__,
    "loss": loss.item(),
    "gradient": student.grad.norm().item(),
    "cpu": [cpu.available, cpu.reason],
    "warnings": [str(w.message) for w in caught],
    "triton_kernels": [importlib.util.find_spec(n) is not None for n in ("kdkernels.triton_kernels", "triton_kernels")],
    "openmp": sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}),
}))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip, to which distributions of the running interpreter are linked."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @classmethod
    def create(cls, root: Path, requirements: Iterable[str]) -> Environment:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
        environment = cls(root)
        packages = Path(environment.run("-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
        for distribution in closure(requirements):
            names = [file.as_posix() for file in distribution.files or ()]
            inside = {name.partition("/")[0] for name in names} - {"..", "__pycache__"}
            links = {packages / name: name for name in inside}
            links |= {root / "bin" / Path(name).name: name for name in names if name.startswith("../../../bin/")}
            for link, name in links.items():
                if not link.exists():
                    link.symlink_to(Path(str(distribution.locate_file(name))).resolve())
        return environment

    def run(self, *arguments: str | Path, **variables: str) -> str:
        """Runs the interpreter, away from the checkout, and returns what it prints."""
        hidden = (
            "PYTHONPATH",
            "KDKERNELS_CPU",
            "KDKERNELS_CUDA",
            "KDKERNELS_DISABLE_NATIVE",
            "KDKERNELS_CPU_ISA",
            "TRITON_INTERPRET",
        )
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        finished = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=self.root,
            env={**clean, "NO_COLOR": "1", "COLUMNS": "200", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def install(self, *arguments: str | Path, **variables: str) -> None:
        """pip install from local files only, dependencies being those that are linked."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-index", "--quiet"]
        subprocess.run([*command, *map(str, arguments)], check=True, cwd=self.root, env={**os.environ, **variables})

    def probe(self) -> dict[str, Any]:
        return json.loads(self.run("-c", PROBE).splitlines()[-1])


def closure(requirements: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """The installed distributions that meet these requirements, and those they depend on, and so on."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), f"{requirement} is not installed"
        if distribution.name not in found:
            found[distribution.name] = distribution
            waiting += map(Requirement, distribution.requires or ())
    return list(found.values())


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without anything that was ever built in it."""
    ignored = (".*", "build", "dist", "out", "*.egg-info", "*.so", "*_not_built.txt", "__pycache__")
    kept = (".clang-format", ".pre-commit-config.yaml", ".ci")
    target = tmp_path_factory.mktemp("source") / "kdkernels"

    def ignore(folder: str, names: list[str]) -> set[str]:
        return set(shutil.ignore_patterns(*ignored)(folder, names)) - set(kept)

    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What the project says it needs to be built, and a frontend."""
    requirements = [*PROJECT["build-system"]["requires"], "build"]
    environment = Environment.create(tmp_path_factory.mktemp("builder") / "env", requirements)
    environment.run("-c", "import importlib.util; assert importlib.util.find_spec('torch') is None")
    return environment


def user_environment(root: Path) -> Environment:
    """What the installed project says it needs to run."""
    return Environment.create(root, PROJECT["project"]["dependencies"])


@pytest.fixture(scope="module")
def sdist(builder: Environment, source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    builder.run("-m", "build", "--no-isolation", "--sdist", "--outdir", out, source_tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder


@pytest.fixture(scope="module")
def pure_wheel(builder: Environment, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pure")
    builder.run(
        "-m", "build", "--no-isolation", "--wheel", "--outdir", out, unpacked, KDKERNELS_CPU="0", KDKERNELS_CUDA="0"
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def native_wheel(builder: Environment, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native")
    # Not optimised, which takes a quarter of the time: what is tested is the way from the sdist to a loss.
    options = {"KDKERNELS_CPU": "1", "KDKERNELS_CUDA": "0", "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
    builder.run("-m", "build", "--no-isolation", "--wheel", "--outdir", out, unpacked, **options)
    (wheel,) = out.glob("*.whl")
    return wheel


def expected_loss() -> tuple[float, float]:
    """The loss and the gradient norm that PROBE must find, from the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 131, generator=generator).double().requires_grad_()
    teacher = torch.randn(6, 131, generator=generator).double()
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    divergence = 0.3 * log_p.exp() * (log_p - log_m) + 0.7 * log_q.exp() * (log_q - log_m)
    loss = divergence.sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.item(), gradient.norm().item()


def assert_installed_and_right(report: dict[str, Any], home: Path) -> None:
    assert Path(report["file"]).is_relative_to(home), "not the kdkernels that was installed"
    loss, gradient = expected_loss()
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["gradient"] == pytest.approx(gradient, rel=1e-5)
    assert report["triton_kernels"] == [True, False], "installed as kdkernels.triton_kernels and not as triton_kernels"


@pytest.mark.slow
def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "requirements-dev.txt",
    }
    for folder, patterns in {
        "kdkernels": ("*.py", "*.pyi", "py.typed"),
        "triton_kernels": ("*.py",),
        "csrc": ("*.h", "*.cpp", "*.cu", "*.cuh"),
        "tests": ("*.py",),
        "examples": ("*.py",),
        "benchmarks": ("*.py",),
    }.items():
        for pattern in patterns:
            wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
    assert wanted <= names, wanted - names
    assert not {name for name in names if name.endswith((".so", ".pyc", "_not_built.txt"))}


@pytest.mark.slow
@needs_native
def test_native_wheel_from_the_sdist_runs_in_an_empty_environment(native_wheel: Path, tmp_path: Path) -> None:
    environment = user_environment(tmp_path / "env")
    environment.install(native_wheel)
    report = environment.probe()
    assert_installed_and_right(report, environment.root)
    assert report["cpu"][0]
    assert report["warnings"] == []
    assert len(report["openmp"]) == 1, "two OpenMP runtimes, so two thread pools, in one process"
    assert "cpu" in environment.run(environment.root / "bin" / "kdkernels", "info")


@pytest.mark.slow
def test_pure_wheel_warns_once_and_computes_the_same(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    environment = user_environment(tmp_path / "env")
    environment.install(pure_wheel)
    report = environment.probe()
    assert_installed_and_right(report, environment.root)
    available, reason = report["cpu"]
    assert not available
    assert "KDKERNELS_CPU=0" in reason
    (warning,) = report["warnings"]
    assert "KDKERNELS_CPU=0" in warning
    assert "KDKERNELS_CPU=0" in environment.run(environment.root / "bin" / "kdkernels", "info")


@pytest.mark.slow
def test_editable_install_finds_the_mapped_folder(source_tree: Path, tmp_path: Path) -> None:
    requirements = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    environment = Environment.create(tmp_path / "env", requirements)
    checkout = shutil.copytree(source_tree, tmp_path / "checkout")
    environment.install("--no-build-isolation", "--editable", checkout, KDKERNELS_CPU="0", KDKERNELS_CUDA="0")
    report = environment.probe()
    assert_installed_and_right(report, checkout)


@pytest.mark.slow
def test_native_build_that_is_demanded_but_impossible_fails(builder: Environment, source_tree: Path) -> None:
    build = ("-m", "build", "--no-isolation", "--wheel", source_tree)
    with pytest.raises(AssertionError, match=r"no C\+\+ compiler was found"):
        builder.run(*build, KDKERNELS_CPU="1", CXX="there-is-no-such-compiler")


@pytest.mark.slow
def test_cuda_build_that_is_demanded_but_impossible_fails(builder: Environment, source_tree: Path) -> None:
    build = ("-m", "build", "--no-isolation", "--wheel", source_tree)
    with pytest.raises(AssertionError, match="nvcc was not found"):
        builder.run(*build, KDKERNELS_CPU="0", KDKERNELS_CUDA="1", CUDACXX="there-is-no-such-compiler")


@pytest.mark.slow
@needs_native
def test_extension_shares_the_openmp_runtime_of_torch() -> None:
    """torch's CPU wheels carry libgomp.so.1; the extension must use that copy and not load the system's beside it."""
    script = (
        "import torch, kdkernels._native\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}), sep='\\n')"
    )
    finished = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    assert len(finished.stdout.split()) == 1, finished.stdout


@pytest.mark.slow
def test_a_disabled_extension_says_so() -> None:
    script = "from kdkernels.backends import native; print(native.module, native.reason)"
    environment = {**os.environ, "KDKERNELS_DISABLE_NATIVE": "1", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment
    )
    assert finished.stdout.strip() == "None KDKERNELS_DISABLE_NATIVE=1 is set"

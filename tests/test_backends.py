"""Which backend serves what, and what happens where one is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch

import kdkernels as kd
from kdkernels.backends import native

needs_native = pytest.mark.skipif(native.module is None, reason=native.reason)

REPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import kdkernels as kd
    quiet_import = [str(w.message) for w in caught if "kdkernels" in str(w.message)]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, 37, generator=generator)
    hidden, weight = torch.randn(3, 4, 5, generator=generator), torch.randn(37, 5, generator=generator)
    results = []
    for source in (student, kd.LMHead(hidden, weight)):
        leaf = (source if source is student else hidden).requires_grad_()
        for reduction in ("mean", "none"):
            loss = kd.distillation_loss(source, student.detach() * 2, kd.JSD(0.3), temperature=2.0, reduction=reduction)
            results += [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]
        results += kd.token_statistics(source, student.detach() * 2)[:4]
print(json.dumps({
    "import": quiet_import,
    "warnings": [str(w.message) for w in caught if "kdkernels" in str(w.message)],
    "results": [result.tolist() for result in results],
    "backends": {name: list(status) for name, status in kd.backends().items()},
    "triton": "triton" in sys.modules,
}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter; an empty variable is unset."""
    inherited = {name: value for name, value in os.environ.items() if name not in environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=inherited | {name: value for name, value in environment.items() if value},
        cwd=Path(kd.__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def report(code: str, **environment: str) -> Any:
    process = run(code, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def ordinary() -> dict[str, Any]:
    return report(REPORT, KDKERNELS_DISABLE_NATIVE="", TRITON_INTERPRET="")


def test_backends_says_what_is_available() -> None:
    found = kd.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    for name, status in found.items():
        assert isinstance(status, kd.BackendStatus)
        assert status.name == name
        assert status.reason, "available or not, there is something to say"
    assert found["reference"].available
    assert "any device" in found["reference"].reason


@needs_native
def test_the_cpu_backend_names_its_instruction_set() -> None:
    status = kd.backends()["cpu"]
    assert status.available
    assert any(isa in status.reason for isa in ("baseline", "avx2", "avx512"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_triton_backend_says_why_it_is_not_available(ordinary: dict[str, Any]) -> None:
    _, available, reason = ordinary["backends"]["triton"]
    assert not available
    assert "TRITON_INTERPRET=1" in reason or "could not be imported" in reason


@pytest.mark.slow
@needs_native
def test_an_ordinary_process_gets_no_warning(ordinary: dict[str, Any]) -> None:
    assert ordinary["warnings"] == []


@pytest.mark.slow
def test_the_import_is_light() -> None:
    """What takes long to import is imported where it is used; torch's compiler takes longer than torch itself."""
    code = """
    import json, sys
    import torch
    before = set(sys.modules)
    import kdkernels
    heavy = {"triton", "torch._dynamo", "rich", "typer", "matplotlib"}
    print(json.dumps(sorted(heavy & set(sys.modules) - before)))
    """
    assert report(code) == []


@pytest.mark.slow
def test_fallback_without_the_extension(ordinary: dict[str, Any]) -> None:
    fallback = report(REPORT, KDKERNELS_DISABLE_NATIVE="1")
    _, available, reason = fallback["backends"]["cpu"]
    assert not available
    assert "KDKERNELS_DISABLE_NATIVE=1" in reason
    assert fallback["import"] == []
    assert len(fallback["warnings"]) == 1, "one warning, however many calls"
    assert "plain PyTorch" in fallback["warnings"][0]
    assert "KDKERNELS_DISABLE_NATIVE=1" in fallback["warnings"][0]
    for ours, reference in zip(ordinary["results"], fallback["results"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(reference), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    process = run(
        """
        import torch, kdkernels as kd
        kd.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="cpu")
        """,
        KDKERNELS_DISABLE_NATIVE="1",
    )
    assert process.returncode != 0
    assert "RuntimeError: backend='cpu' is not available: KDKERNELS_DISABLE_NATIVE=1 is set" in process.stderr


@pytest.mark.slow
def test_without_triton(ordinary: dict[str, Any]) -> None:
    blocked = """
    import sys

    class NoTriton:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NoTriton())
    """
    without = report(textwrap.dedent(blocked) + REPORT, TRITON_INTERPRET="", KDKERNELS_DISABLE_NATIVE="")
    assert without["results"] == ordinary["results"]
    assert without["warnings"] == ordinary["warnings"]
    assert not without["triton"]
    _, available, reason = without["backends"]["triton"]
    assert not available
    assert "No module named 'triton'" in reason


@pytest.mark.slow
def test_an_unknown_instruction_set_is_a_reason_not_a_crash() -> None:
    found = report(REPORT, KDKERNELS_CPU_ISA="mmx", KDKERNELS_DISABLE_NATIVE="")
    _, available, reason = found["backends"]["cpu"]
    assert not available
    assert "KDKERNELS_CPU_ISA=mmx" in reason
    assert len(found["warnings"]) == 1
    assert "mmx" in found["warnings"][0]


@pytest.mark.skipif(kd.backends()["triton"].available, reason="triton runs here")
def test_triton_on_cpu_tensors_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available.*(TRITON_INTERPRET=1|import)"):
        kd.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")


@pytest.mark.parametrize("option", ["plain", "everything"])
@pairs.each_pairing
def test_the_reference_can_be_asked_for(pairing: str, option: str) -> None:
    student, teacher = pairs.sources(pairs.make(pairing, grad=False))
    options = pairs.OPTIONS[option]()
    by_name = kd.distillation_loss(student, teacher, backend="reference", memory_budget=1, **options)
    assert torch.equal(by_name, kd.reference.distillation_loss(student, teacher, **options))


def test_statistics_of_the_reference_can_be_asked_for() -> None:
    student, teacher = pairs.sources(pairs.make("head-logits", grad=False))
    by_name = kd.token_statistics(student, teacher, backend="reference")
    torch.testing.assert_close(tuple(by_name), tuple(kd.reference.token_statistics(student, teacher)), rtol=0, atol=0)


@pytest.mark.slow
@needs_native
def test_triton_interpreter_can_be_asked_for() -> None:
    """The interpreter is slow: on CPU tensors it serves those who name it, and nobody else."""
    pytest.importorskip("triton")
    code = """
    import json, sys
    sys.path.insert(0, "tests")
    import pairs, torch
    import kdkernels as kd
    from kdkernels.backends import select
    results = {}
    for backend in ("triton", "cpu"):
        results[backend] = []
        for pairing in ("logits-logits", "head-head"):
            for option in ("plain", "everything"):
                tensors = pairs.make(pairing)
                value, gradients = pairs.value_and_gradients(
                    lambda given: kd.distillation_loss(
                        *pairs.sources(given), kd.JSD(0.3), backend=backend, **pairs.OPTIONS[option]()
                    ),
                    tensors,
                )
                results[backend] += [value.tolist(), *(gradient.tolist() for gradient in gradients.values())]
    try:
        kd.distillation_loss(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta"), backend="triton")
    except ValueError as error:
        refusal = str(error)
    print(json.dumps({"results": results, "refusal": refusal, "default": select(None, "cpu")}))
    """
    found = report(code, TRITON_INTERPRET="1", KDKERNELS_DISABLE_NATIVE="")
    for ours, native_result in zip(found["results"]["triton"], found["results"]["cpu"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(native_result), rtol=1e-4, atol=1e-6)
    assert found["default"] == "cpu"
    assert "triton" in found["refusal"]
    assert "meta" in found["refusal"]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_set_num_threads_is_followed(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the extension is told; the result does not depend on it."""
    told: list[int] = []
    extension = native.module
    assert extension is not None

    class Told:
        def __getattr__(self, name: str) -> Any:
            kernel = getattr(extension, name)

            def call(*arguments: Any) -> Any:
                told.append(arguments[0])
                return kernel(*arguments)

            return call

    student, teacher = torch.randn(2, 64, 1000, generator=pairs.generator()).unbind()
    expected = kd.distillation_loss(student, teacher, reduction="none")
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "module", Told())
    try:
        torch.set_num_threads(threads)
        values = kd.distillation_loss(student, teacher, reduction="none")
    finally:
        torch.set_num_threads(before)
    assert told == [threads]
    assert torch.equal(values, expected)


@needs_native
def test_threads_may_call_at_once() -> None:
    """From several Python threads, as data-parallel evaluation does."""
    inputs = [torch.randn(2, 50, 3000, generator=pairs.generator(seed)).unbind() for seed in range(4)]
    expected = [kd.distillation_loss(*pair) for pair in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(place: int) -> None:
        for _ in range(20):
            results[place].append(kd.distillation_loss(*inputs[place]))

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for values, value in zip(results, expected, strict=True):
        assert len(values) == 20
        assert all(torch.equal(each, value) for each in values)

"""Every instruction set the extension is compiled for, each in a process that is told to use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from truth import DTYPES, EVERY_DIVERGENCE, OTHER_PARAMETERS, random_logits

from kdkernels.backends import native
from kdkernels.records import BITS

VARIABLE = "KDKERNELS_CPU_ISA"
BUILT: list[str] = native.module.isas() if native.module is not None else []
pytestmark = pytest.mark.skipif(not BUILT, reason=f"the native extension is not there: {native.reason}")


def run(instruction_set: str, program: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).resolve().parent)
    paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, VARIABLE: instruction_set, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def verify(instruction_set: str) -> None:
    """What the process does: the accuracy rule over kinds, dtypes and awkward sizes."""
    import test_divergence_accuracy as dense
    import test_hard_inputs as hard
    import test_pairwise_l1 as pairwise
    import test_ranking as ranking
    import test_records as records
    import test_sorted_l1 as sorted_l1
    import test_token_statistics as statistics
    import test_topk as topk

    assert native.module is not None
    assert native.module.isa() == instruction_set
    for dtype in DTYPES.values():
        for case in EVERY_DIVERGENCE + OTHER_PARAMETERS:
            for vocab in (31, 1100):
                dense.check_case(case, *random_logits(vocab, dtype), sides=("both", "student"))
        labels = torch.tensor([0, 1, 30, 1099, 1024, 500])
        statistics.check_logits(*random_logits(1100, dtype), labels, "cpu", temperature=1.3)
        topk.check_draws("cpu", dtype, 1.5, 1100)
        for batch, n, m, vocab in pairwise.SIZES:
            pairwise.test_equals_cdist("cpu", dtype, batch, n, m, vocab)
        pairwise.test_identical_rows("cpu", dtype)
        ranking.test_softmax_weights(dtype, None, 4, ranking.LABELS)
        ranking.test_token_ranks(dtype, None)
        pairwise.test_a_vocabulary_of_one(dtype)
        for sizes in ((127, 300), (4097, 4097)):
            for close in (False, True):
                sorted_l1.test_equals_sorting(dtype, sizes, close)
    for dtype in (torch.float32, torch.float64):
        ranking.test_many_ranks(dtype)
    for name, _ in ranking.hard_rows():
        ranking.test_hard_students(torch.float32, None, name)
    for order in topk.ORDERS:
        topk.test_orders("cpu", 64, order)
    topk.test_softcap("cpu")
    pairwise.test_masked_vocabulary("cpu")
    pairwise.test_probabilities_that_underflow()
    for case in EVERY_DIVERGENCE:
        dense.test_far_from_zero(case, 1.0)
        dense.test_temperature_per_token_and_hard_labels(case, torch.float32)
        hard.test_finite_and_right(case, torch.float32)
        hard.test_nan_in_a_counted_row_shows(case, 0)
    for name in sorted_l1.PAIRS:
        sorted_l1.test_the_bound_holds(name, 1e-3)
    for vocab, width in records.SIZES:
        for bits in BITS.values():
            records.check_against_reference(vocab, width, bits)
    print("verified", instruction_set)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", BUILT)
def test_the_same_rule_for_each(instruction_set: str) -> None:
    found = run(instruction_set, f"import test_instruction_sets; test_instruction_sets.verify({instruction_set!r})")
    if "this processor lacks it" in found.stderr:
        pytest.skip(f"this processor lacks {instruction_set}")
    assert found.stdout == f"verified {instruction_set}\n", found.stderr[-2000:]


def test_the_portable_one_is_always_there() -> None:
    assert "baseline" in BUILT


@pytest.mark.slow
def test_a_wrong_name_is_refused() -> None:
    """Asked for by name the backend says what is wrong; unasked it falls back to the reference with a warning."""
    program = """
import torch, kdkernels as kd
logits = torch.randn(2, 5)
print(kd.backends()["cpu"].available)
kd.distillation_loss(logits, logits)
kd.distillation_loss(logits, logits, backend="cpu")
"""
    found = run("avx1024", program)
    assert found.stdout == "False\n"
    assert found.returncode == 1
    warning, error = found.stderr.split("Traceback")
    for text in (warning, error):
        assert "KDKERNELS_CPU_ISA=avx1024" in text
        assert ", ".join(BUILT) in text
    assert "falls back to plain PyTorch" in warning

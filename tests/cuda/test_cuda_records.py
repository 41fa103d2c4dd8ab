"""Records packed and unpacked in CUDA C++, run on the host: the bytes of the CPU, and refusals of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as there
import pytest
import torch
from test_records import ragged_rows, random_rows
from torch import Tensor

from kdkernels.backends import able, cpu, triton
from kdkernels.backends import cuda as backend
from kdkernels.functional import records as functional
from kdkernels.records import BITS, record_sizes
from kdkernels.reference import records as reference

pytestmark = pytest.mark.slow

Emulated = Callable[..., Any]
each_codec = pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
SIZES = [(1, 1), (2, 2), (127, 9), (127, 127)]
LARGE = [(4097, 300), (151_936, 64), (1 << 24, 50)]


def check_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Ids to the bit; sums of exponentials, which all log-probabilities hold, may be added up in another order."""
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-7, atol=0)
    assert torch.equal(found[2], wanted[2])


def check(emulated: Emulated, rows: tuple[Tensor, Tensor, Tensor], vocab: int, bits: int) -> None:
    ids, log_probs, log_tail_mass = rows
    packed = emulated(backend.pack_records, ids, log_probs, log_tail_mass, vocab, bits)
    for room in (cpu, reference):
        expected = room.pack_records(ids, log_probs, log_tail_mass, vocab, bits)
        assert torch.equal(packed[0], expected[0])
        assert torch.equal(packed[1], expected[1])
    arguments = (*packed, vocab, bits, ids.shape[1] + 3)
    found = emulated(backend.unpack_records, *arguments)
    check_same(found, cpu.unpack_records(*arguments))
    check_same(found, reference.unpack_records(*arguments))


@each_codec
@pytest.mark.parametrize(("vocab", "width"), [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGE)])
def test_the_bytes_are_those_of_the_cpu(vocab: int, width: int, bits: int, emulated: Emulated) -> None:
    """Flat and steep rows, in no order."""
    check(emulated, random_rows(5, width, vocab), vocab, bits)


@each_codec
def test_ragged_rows(bits: int, emulated: Emulated) -> None:
    check(emulated, ragged_rows(6, 20, 1000), 1000, bits)


def test_a_tail_that_was_not_given(emulated: Emulated) -> None:
    ids, log_probs, _ = random_rows(3, 9, 127)
    packed = emulated(backend.pack_records, ids, log_probs, None, 127, 6)
    assert torch.equal(packed[0], reference.pack_records(ids, log_probs, None, 127, 6)[0])


def test_no_rows(emulated: Emulated) -> None:
    nothing = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0)
    data, counts = emulated(backend.pack_records, *nothing, 9, 6)
    assert data.shape == counts.shape == (0,)
    found = emulated(backend.unpack_records, data, counts, 9, 6, 4)
    assert [tuple(part.shape) for part in found] == [(0, 4), (0, 4), (0,)]


@pytest.mark.slow
@each_codec
def test_hostile_records(bits: int, emulated: Emulated) -> None:
    """Refused where the reference refuses, else decoded to the same; several records at a time, one of them wrong."""
    torch.manual_seed(bits)
    refused = taken = 0
    for vocab, count in [(3, 2), (60, 60), (1000, 9)]:
        data, counts = reference.pack_records(*random_rows(3, count, vocab), vocab, bits)
        size = int(record_sizes(counts, vocab, bits)[0])
        for attempt in range(9):
            mutant = data.clone()
            if attempt % 3:
                mutant[size + int(torch.randint(size, ()))] ^= 1 << int(torch.randint(8, ()))
            else:
                mutant[size : 2 * size] = torch.randint(256, (size,)).to(torch.uint8)
            arguments = (mutant, counts, vocab, bits, count)
            found = emulated(there.refused_or, backend.unpack_records, *arguments)
            wanted = there.refused_or(reference.unpack_records, *arguments)
            if isinstance(wanted, str):
                assert found == wanted
                assert "token 1 is malformed" in found
                refused += 1
            else:
                check_same(found, wanted)
                taken += 1
    assert refused > 3
    assert taken > 3


WRONG_ROWS: dict[str, tuple[list[int], list[float]]] = {
    "outside the vocabulary": ([3, 9, 1], [-1.0, -2.0, -3.0]),
    "negative": ([3, -2, 1], [-1.0, -2.0, -3.0]),
    "twice": ([3, 1, 3], [-1.0, -2.0, -3.0]),
    "NaN": ([3, 1, 2], [-1.0, float("nan"), -3.0]),
    "above 0": ([3, 1, 2], [-1.0, 0.06, -3.0]),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_rows_that_are_no_distribution(wrong: str, emulated: Emulated) -> None:
    ids, log_probs = (
        torch.tensor([good, bad]) for good, bad in zip(([2, 0, 5], [-1.0] * 3), WRONG_ROWS[wrong], strict=True)
    )
    arguments = (ids, log_probs, torch.full((2,), -3.0), 9, 6)
    found = emulated(there.refused_or, backend.pack_records, *arguments)
    assert isinstance(found, str)
    assert found == there.refused_or(reference.pack_records, *arguments)


def test_each_function_comes_from_the_best_backend_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton unpacks records and cannot pack them."""
    monkeypatch.setattr(functional, "select_backend", lambda *_: "triton")
    monkeypatch.setattr(functional, "able", lambda *_: (("triton", "cuda"), ""))
    assert functional.records_room(torch.zeros(1), "unpack_records") is triton
    assert functional.records_room(torch.zeros(1), "pack_records") is backend
    monkeypatch.setattr(functional, "able", lambda *_: (("triton",), ""))
    assert functional.records_room(torch.zeros(1), "pack_records") is reference


def test_the_backends_of_a_family_come_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    able.cache_clear()
    monkeypatch.setattr(triton, "supports", lambda _: (False, "no driver"))
    monkeypatch.setattr(backend, "supports", lambda _: (True, ""))
    try:
        assert able("cuda", "records") == (("cuda",), "no driver")
        assert able("cuda", "no such family") == ((), "no driver")
    finally:
        able.cache_clear()

"""The kernel that decodes records: in Triton's interpreter against the reference, and compiled for every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import interpreted
import pytest
import torch
from torch import Tensor

from kdkernels.records import BITS, record_sizes
from kdkernels.reference.records import pack_records, unpack_records

pytestmark = pytest.mark.slow

Runner = Callable[..., Any]
each_codec = pytest.mark.parametrize("bits", BITS.values(), ids=BITS)


def random_rows(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K] with some missing and all of row 1, log-probabilities, log tail mass)."""
    draws = torch.randint(vocab, (rows, 3 * width)) if vocab > 5000 else torch.rand(rows, vocab).argsort(-1)
    ids = torch.stack([row.unique()[torch.randperm(width)] if vocab > 5000 else row[:width] for row in draws])
    log_probs = torch.log_softmax(torch.randn(rows, width) * torch.logspace(-2, 0.6, rows)[:, None], -1)
    head = torch.sigmoid(torch.randn(rows) * 3) if width < vocab else torch.ones(rows)
    if width > 2:
        ids[2, : width // 2] = -1
    ids[1] = -1
    return ids, log_probs + head.log()[:, None], torch.log1p(-head)


def check_same(found: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]) -> None:
    """Ids to the bit, log-probabilities as float32 arithmetic on distances of up to 32 nats allows."""
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-6, atol=1e-7)


@each_codec
@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (2, 1), (130, 130), (4097, 300), (151_936, 64), (1 << 24, 20)])
def test_decoding(vocab: int, width: int, bits: int, interpreter: Runner) -> None:
    torch.manual_seed(width)
    packed = pack_records(*random_rows(4, width, vocab), vocab, bits)
    arguments = (*packed, vocab, bits, width + 3)
    check_same(interpreter(interpreted.unpack_records, *arguments), unpack_records(*arguments))


@each_codec
def test_hostile_records(bits: int, interpreter: Runner) -> None:
    """Refused where the reference refuses, else decoded to the same."""
    torch.manual_seed(bits)
    refused = taken = 0
    for vocab, count in [(3, 2), (60, 60), (1000, 9)]:
        data, counts = pack_records(*(each[:1] for each in random_rows(3, count, vocab)), vocab, bits)
        for attempt in range(12):
            mutant = data.clone()
            if attempt % 3:
                mutant[torch.randint(len(data), ())] ^= 1 << int(torch.randint(8, ()))
            else:
                mutant = torch.randint(256, (int(record_sizes(counts, vocab, bits).sum()),)).to(torch.uint8)
            arguments = (mutant, counts, vocab, bits, count)
            found = interpreter(interpreted.unpack_records, *arguments)
            wanted = interpreter(interpreted.unpack_by_definition, *arguments)
            if isinstance(wanted, str):
                assert found == wanted
                refused += 1
            else:
                check_same(found, wanted)
                taken += 1
    assert refused > 3
    assert taken > 3


def test_every_set_of_two_ids_of_four(interpreter: Runner) -> None:
    """The last byte holds two low bits, three high bits and padding: all it can say, and some padding that is not zero."""
    counts = torch.tensor([2], dtype=torch.int32)
    taken = 0
    for last in range(40):
        data = torch.tensor([255, 127, 16, 0, 0, 255, last], dtype=torch.uint8)
        found, wanted = (
            interpreter(function, data, counts, 4, 8, 2)
            for function in (interpreted.unpack_records, interpreted.unpack_by_definition)
        )
        if isinstance(wanted, str):
            assert found == wanted
        else:
            check_same(found, wanted)
            taken += 1
    assert taken == 6


@each_codec
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_without_spills(target: str, bits: int, compiler: Runner) -> None:
    assert compiler(aot.compile_records, target, bits)["spilled_bytes"] == 0

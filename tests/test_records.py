"""Records of truncated teachers: what is packed comes back, everywhere the same, and malformed bytes are refused."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import cpu, native
from kdkernels.records import BITS, record_sizes
from kdkernels.reference import records as reference

ROOMS = [reference, *([cpu] if native.module is not None else [])]
each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__.split(".")[1])
each_codec = pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
both_rooms = pytest.mark.skipif(native.module is None, reason=f"the native extension is not there: {native.reason}")
SIZES = [(1, 1), (2, 2), (127, 9), (127, 127), (4097, 300), (151_936, 64), (1 << 24, 50)]

Rows = tuple[Tensor, Tensor, Tensor]


@functools.cache
def random_rows(rows: int, width: int, vocab: int, seed: int = 0) -> Rows:
    """(ids [N, K] in no order, log-probabilities over the vocabulary, log tail mass [N]); flat rows and steep ones."""
    generator = torch.Generator().manual_seed(seed)
    if vocab <= 5000:
        ids = torch.rand(rows, vocab, generator=generator).topk(width, -1).indices
    else:  # of twice as many draws so many are different
        draws = torch.randint(vocab, (rows, 2 * width), generator=generator)
        ids = torch.stack([row.unique()[:width] for row in draws])
        ids = ids[:, torch.randperm(width, generator=generator)]
    logits = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 0.6, rows)[:, None]
    head = torch.sigmoid(torch.randn(rows, generator=generator) * 3) if width < vocab else torch.ones(rows)
    log_probs = torch.log_softmax(logits.double(), -1) + head.double().log()[:, None]
    return ids, log_probs.float(), torch.log1p(-head.double()).float()


def ragged_rows(rows: int, width: int, vocab: int) -> Rows:
    """The same with some entries missing, in either way, and a row that has none."""
    ids, log_probs, log_tail_mass = (each.clone() for each in random_rows(rows, width, vocab))
    ids[1::3, : width // 2] = -1
    log_probs[2::3, width // 3 :] = -torch.inf
    ids[4] = -1
    return ids, log_probs, log_tail_mass


def ascending(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.sort(-1)
    return order.values, log_probs.gather(-1, order.indices)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def mean_divergence(ids: Tensor, log_p: Tensor, log_tail_mass: Tensor, bits: int, vocab: int) -> float:
    """KL(given || decoded) over entries and tail, in nats, mean over the rows; everything in float64."""
    packed = ROOMS[-1].pack_records(ids, log_p, log_tail_mass, vocab, bits)
    _, log_q, tail_q = ROOMS[-1].unpack_records(*packed, vocab, bits, ids.shape[1])
    _, log_p = ascending(ids, log_p)
    outcomes_p = torch.cat([log_p, log_tail_mass[:, None]], 1)
    outcomes_q = torch.cat([log_q, tail_q[:, None]], 1).double()
    return float((outcomes_p.exp() * (outcomes_p - outcomes_q)).sum(1).mean())


@each_room
@each_codec
@pytest.mark.parametrize(("vocab", "width"), SIZES)
def test_ids_come_back_and_the_mass_is_kept(vocab: int, width: int, bits: int, room: Any) -> None:
    ids, log_probs, log_tail_mass = random_rows(20, width, vocab)
    data, counts = room.pack_records(ids, log_probs, log_tail_mass, vocab, bits)
    assert len(data) == int(record_sizes(counts, vocab, bits).sum())
    found_ids, found, found_tail = room.unpack_records(data, counts, vocab, bits, width)
    wanted_ids, wanted = ascending(ids, log_probs)
    assert torch.equal(found_ids, wanted_ids)
    reach = log_probs.amax(-1, keepdim=True) - log_probs.amin(-1, keepdim=True)
    # A distance is off by half a step at most, and so is the mean that normalisation takes away; R and h are rounded too.
    coarsest = reach / 128 if bits == 16 else 28 / 16 * (reach + 1 / 128) / (2**bits - 1)
    assert ((found - wanted).abs() <= coarsest + 6e-4).all()
    mass, tail = found.double().exp().sum(-1), found_tail.double().exp()
    torch.testing.assert_close(mass + tail, torch.ones_like(mass), rtol=0, atol=1e-6)
    torch.testing.assert_close(found_tail, log_tail_mass, rtol=0, atol=6e-4)


def check_against_reference(vocab: int, width: int, bits: int) -> None:
    for ids, log_probs, log_tail_mass in (random_rows(20, width, vocab), ragged_rows(20, width, vocab)):
        for tail in (log_tail_mass, None):
            packed = cpu.pack_records(ids, log_probs, tail, vocab, bits)
            assert same(packed, reference.pack_records(ids, log_probs, tail, vocab, bits))
            found = cpu.unpack_records(*packed, vocab, bits, width)
            assert same(found, reference.unpack_records(*packed, vocab, bits, width))


@both_rooms
@each_codec
@pytest.mark.parametrize(("vocab", "width"), SIZES)
def test_both_rooms_agree_to_the_bit(vocab: int, width: int, bits: int) -> None:
    check_against_reference(vocab, width, bits)


@each_room
@each_codec
def test_ragged_rows(bits: int, room: Any) -> None:
    ids, log_probs, log_tail_mass = ragged_rows(30, 20, 1000)
    present = (ids >= 0) & (log_probs > -torch.inf)
    data, counts = room.pack_records(ids, log_probs, log_tail_mass, 1000, bits)
    assert counts.tolist() == present.sum(1).tolist()
    found_ids, found, found_tail = room.unpack_records(data, counts, 1000, bits, 23)
    for row in range(30):
        count = int(counts[row])
        assert found_ids[row, :count].tolist() == sorted(ids[row][present[row]].tolist())
        assert (found_ids[row, count:] == -1).all()
        assert (found[row, count:] == -torch.inf).all()
        assert found[row, :count].isfinite().all()
    assert counts[4] == 0
    assert found_tail[4] == 0


@each_room
def test_the_order_of_the_entries_is_nothing(room: Any) -> None:
    ids, log_probs, log_tail_mass = random_rows(20, 64, 151_936)
    sorted_ids, sorted_log_probs = ascending(ids, log_probs)
    packed = room.pack_records(ids, log_probs, log_tail_mass, 151_936, 6)
    assert same(packed, room.pack_records(sorted_ids, sorted_log_probs, log_tail_mass, 151_936, 6))


def test_sizes() -> None:
    """The documented formula; and what the project promises at V = 131,072 with six bits, two bytes of count included."""
    for vocab in (1, 2, 3, 127, 4096, 131_072, (1 << 24) - 1, 1 << 24):
        counts = sorted({count for count in (0, 1, 2, 50, 127, 128, 4096, vocab // 2, vocab) if count <= vocab})
        for bits in BITS.values():
            wanted = []
            for count in counts:
                low = (vocab // count).bit_length() - 1 if count else 0
                fields = count * (bits + 1 + low) + ((vocab - 1) >> low)
                wanted.append((2 if bits == 16 else 4) + -(-fields // 8) if count else 0)
            assert record_sizes(torch.tensor(counts), vocab, bits).tolist() == wanted
    assert (record_sizes(torch.tensor([50, 128]), 131_072, 6) + 2 <= torch.tensor([127, 295])).all()


@functools.cache
def zipf_like_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    logits = -1.1 * torch.arange(1, 20_001).double().log() + torch.randn(300, 20_000, generator=generator).double()
    log_probs, ids = torch.log_softmax(logits, -1).topk(50, -1)
    return ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))


@pytest.mark.parametrize(("bits", "most"), [(4, 1.1e-3), (6, 6.2e-5), (8, 3.8e-6), (16, 4e-6)])
def test_divergence_of_zipf_like_rows(bits: int, most: float) -> None:
    """Evenly spaced codes of 4, 6 and 8 bits would be at 1.4e-3, 7.8e-5 and 4.9e-6."""
    assert 0 < mean_divergence(*zipf_like_rows(), bits, 20_000) < most


@each_room
@each_codec
def test_extreme_rows(bits: int, room: Any) -> None:
    """One outcome with all the mass; equal ones; far ones, which codes of 4 to 8 bits hold at 32 nats; tiny heads."""
    rows = [[0.0, -1e4, -80.0, -1e-3], [-2.0] * 4, [-60.0, -60.5, -61.0, -93.0], [-1e-6, -14.0, -15.0, -1e30]]
    log_probs = torch.tensor(rows)
    ids = torch.tensor([[5, 3, 0, 9]]).expand(4, 4)
    log_tail_mass = torch.tensor([-torch.inf, -0.75, 0.0, -100.0])
    packed = room.pack_records(ids, log_probs, log_tail_mass, 10, bits)
    found_ids, found, found_tail = room.unpack_records(*packed, 10, bits, 4)
    assert torch.equal(found_ids[0], torch.tensor([0, 3, 5, 9]))
    assert found.isfinite().all()
    assert found_tail[0] == -torch.inf
    torch.testing.assert_close(found[1].exp().sum() + found_tail[1].exp(), torch.tensor(1.0))
    torch.testing.assert_close(found[1], found[1, :1].expand(4), rtol=0, atol=0)
    assert found[2].max() < -31
    assert -33 < found_tail[3] < -31
    far = found[3].max() - found[3].min()
    torch.testing.assert_close(far, torch.tensor(1e30 if bits == 16 else 4095 / 128), rtol=0.005, atol=0)


@each_room
def test_a_whole_vocabulary_has_no_tail(room: Any) -> None:
    log_probs = torch.log_softmax(torch.randn(3, 7), -1)
    packed = room.pack_records(torch.arange(7).expand(3, 7), log_probs, torch.full((3,), -20.0), 7, 8)
    assert (room.unpack_records(*packed, 7, 8, 7)[2] == -torch.inf).all()


def test_public_functions_keep_shape_policy_and_temperature() -> None:
    ids, log_probs, log_tail_mass = ragged_rows(12, 20, 1000)
    shape = (2, 3, 2)
    topk = kd.TopKLogits(
        ids.view(*shape, 20).int(),
        log_probs.view(*shape, 20).double(),
        vocab_size=1000,
        tail="uniform",
        temperature=2.0,
        log_tail_mass=log_tail_mass.view(shape),
    )
    packed = kd.pack(topk)
    assert packed.codec == "q6"
    assert packed.batch_shape == shape
    found = kd.unpack(packed)
    for each in (packed, found):
        assert (each.vocab_size, each.tail, each.temperature) == (1000, "uniform", 2.0)
    assert found.ids.shape == (*shape, 20)
    assert found.log_tail_mass is not None
    assert found.log_tail_mass.shape == shape
    assert torch.equal(packed.data, kd.reference.pack(topk).data)
    assert torch.equal(found.log_probs, kd.reference.unpack(packed).log_probs)
    again = kd.pack(found)
    assert torch.equal(kd.unpack(again).ids, found.ids)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (4,)])
def test_empty_and_single_batches(shape: tuple[int, ...]) -> None:
    ids = torch.arange(shape[-1]).expand(shape)
    topk = kd.TopKLogits(ids, torch.full(shape, -3.0), vocab_size=10)
    for module in (kd, kd.reference):
        found = module.unpack(module.pack(topk))
        assert found.batch_shape == shape[:-1]
        assert torch.equal(found.ids, ids if ids.numel() else ids[..., :0])


@each_room
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((1, 2, 1000, None), "topk: ids must be -1 or in the vocabulary [0, 1000); token 1 has 1000"),
        ((3, 0, -2, None), "topk: ids must be -1 or in the vocabulary [0, 1000); token 3 has -2"),
        ((2, 5, 77, None), "topk: ids must be different from one another; token 2 has 77"),
        ((2, 5, None, 1.5), "topk: log_probs must be logarithms of probabilities, at most 0; token 2 has 1.5"),
        ((0, 0, None, float("nan")), "topk: log_probs must be logarithms of probabilities, at most 0; token 0 has nan"),
    ],
)
def test_rows_that_are_no_distribution(change: tuple[int, int, Any, Any], message: str, room: Any) -> None:
    ids, log_probs, log_tail_mass = (each.clone() for each in random_rows(4, 9, 1000))
    row, place, new_id, new_value = change
    if new_id == 77:
        ids[row, 1] = 77
    if new_id is not None:
        ids[row, place] = new_id
    if new_value is not None:
        log_probs[row, place] = new_value
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        room.pack_records(ids, log_probs, log_tail_mass, 1000, 6)


def test_arguments_are_named() -> None:
    ids, log_probs, _ = random_rows(4, 9, 1000)
    topk = kd.TopKLogits(ids, log_probs, vocab_size=1000)
    with pytest.raises(TypeError, match=r"topk must be kd\.TopKLogits, got Tensor"):
        kd.pack(log_probs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codec must be one of q4, q6, q8, bf16, got 'q5'"):
        kd.pack(topk, "q5")
    with pytest.raises(TypeError, match=r"packed must be kd\.PackedLogits, got TopKLogits"):
        kd.unpack(topk)  # type: ignore[arg-type]
    late = kd.TopKLogits(ids, log_probs, vocab_size=1000, log_tail_mass=torch.tensor([-1.0, -1, torch.nan, -1]))
    with pytest.raises(ValueError, match=r"topk: log_tail_mass must be .*; token 2 has nan"):
        kd.pack(late)


@each_room
@pytest.mark.parametrize(
    ("counts", "extra", "message"),
    [
        ([9, -1, 9], 0, "counts must be between 0 and 9 .*, token 1 has -1"),
        ([9, 9, 1001], 0, "counts must be between 0 and 9 .*, token 2 has 1001"),
        ([9, 2**31 - 1, 9], 0, "counts must be between 0 and 9 .*, token 1 has 2147483647"),
        ([9, 9, 8], 0, "data has 63 bytes, and records of these counts have 61"),
        ([9, 9, 9], 1, "data has 64 bytes, and records of these counts have 63"),
    ],
)
def test_counts_that_do_not_fit(counts: list[int], extra: int, message: str, room: Any) -> None:
    data, _ = room.pack_records(*random_rows(3, 9, 1000), 1000, 6)
    data = torch.cat([data, torch.zeros(extra, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=f"^packed: {message}$"):
        room.unpack_records(data, torch.tensor(counts, dtype=torch.int32), 1000, 6, 9)


def test_a_hostile_count_asks_for_no_memory() -> None:
    packed = kd.PackedLogits(
        torch.zeros(5, dtype=torch.uint8), torch.tensor([1 << 24], dtype=torch.int32), vocab_size=1 << 24, codec="q6"
    )
    for module in (kd, kd.reference):
        with pytest.raises(ValueError, match=r"packed: counts .* token 0 has 16777216"):
            module.unpack(packed)


def outcome(room: Any, data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, ...] | str:
    try:
        found: tuple[Tensor, ...] = room.unpack_records(data, counts, vocab, bits, width)
    except ValueError as error:
        return str(error)
    return found


def check_hostile(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> bool:
    """Whether the bytes are taken, by all rooms with the same result, which is then a truncated distribution."""
    first, *others = (outcome(room, data, counts, vocab, bits, width) for room in ROOMS)
    for other in others:
        assert other == first if isinstance(first, str) or isinstance(other, str) else same(first, other)
    if isinstance(first, str):
        assert re.fullmatch(r"packed: data: the record of token \d+ is malformed", first)
        return False
    ids, log_probs, log_tail_mass = first
    assert (ids < vocab).all()
    assert (ids.diff(dim=1) > 0).all()
    assert (log_probs.double().exp().sum(1) + log_tail_mass.double().exp() < 1 + 1e-5).all()
    return True


@each_codec
@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (3, 2), (60, 60), (1000, 9), (151_936, 64)])
def test_mutated_records(vocab: int, count: int, bits: int) -> None:
    """One record in a buffer of its size, so that the sanitisers see a byte too many."""
    generator = torch.Generator().manual_seed(count)
    data, counts = ROOMS[-1].pack_records(*(each[:1] for each in random_rows(1, count, vocab)), vocab, bits)
    taken = 0
    for _ in range(25):
        mutant = data.clone()
        places = torch.randint(len(data), (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)
        mutant[places] ^= (1 << torch.randint(8, places.shape, generator=generator)).to(torch.uint8)
        taken += check_hostile(mutant, counts, vocab, bits, count)
    assert count == 1 or 0 < taken < 25


@each_codec
@pytest.mark.parametrize("vocab", [1, 2, 100, 70_000, 1 << 24])
def test_random_bytes(vocab: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(12):
        count = int(torch.randint(1, min(vocab, 80) + 1, (), generator=generator))
        counts = torch.tensor([count], dtype=torch.int32)
        size = int(record_sizes(counts, vocab, bits).sum())
        data = torch.randint(256, (size,), generator=generator).to(torch.uint8)
        check_hostile(data, counts, vocab, bits, count)
        check_hostile(data.fill_(int(data[0]) & 1 and 255), counts, vocab, bits, count)


@each_room
def test_what_makes_a_record_malformed(room: Any) -> None:
    """Two of four ids: 4 bytes of header, 2 * 8 bits of codes, 2 low bits, 3 high bits, 3 bits of padding."""
    good = torch.tensor([255, 127, 16, 0, 0, 255, 0b000_101_00])
    counts = torch.tensor([2], dtype=torch.int32)

    def unpack(last: int | None = None, **changes: int) -> Any:
        data = good.clone()
        for name, value in changes.items():
            data[int(name[1:])] = value
        data[6] = int(data[6]) if last is None else last
        return outcome(room, data.to(torch.uint8), counts, 4, 8, 2)

    assert unpack()[0].tolist() == [[0, 2]]
    assert unpack(last=0b000_101_11)[0].tolist() == [[1, 3]]
    assert unpack(last=0b000_011_10)[0].tolist() == [[0, 1]]
    refused = "packed: data: the record of token 0 is malformed"
    assert unpack(last=0b000_011_01) == refused  # ids 1, 0
    assert unpack(last=0b000_011_00) == refused  # ids 0, 0
    assert unpack(last=0b000_100_00) == refused  # one id
    assert unpack(last=0b000_111_00) == refused  # three
    assert unpack(last=0b001_001_00) == refused  # an id beyond the vocabulary
    assert unpack(last=0b010_101_00) == refused  # padding
    assert unpack(b4=1) == refused  # no largest entry
    assert unpack(b0=0, b1=0)[2].item() == pytest.approx(0, abs=1e-12)  # a head of exp(-32)

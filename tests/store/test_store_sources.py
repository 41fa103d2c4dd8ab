"""Where records come from and go to: vLLM, tables, batches; what a store says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import torch
from stores import VOCAB, assert_same, decoded, one, teacher

import kdkernels as kd

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

# --- vLLM -------------------------------------------------------------------------------------------------------------------


@dataclass
class Logprob:
    """As in vLLM."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PROMPT = [
    None,
    {5: Logprob(-0.5, 1, "a"), 3: Logprob(-1.5, 2, "b")},
    {7: Logprob(-0.25, 1), 1: Logprob(-3.0, 2), 9: Logprob(-7.5, 812, "the prompt's own")},
]


def test_prompt_logprobs_of_vllm() -> None:
    topk = kd.store.from_vllm(PROMPT, vocab_size=10)
    assert isinstance(topk, kd.TopKLogits)
    # A row has what the model said after its token: the entry of the next one.
    assert topk.ids.tolist() == [[5, 3, -1], [7, 1, 9], [-1, -1, -1]]
    assert topk.log_probs.tolist() == [[-0.5, -1.5, -math.inf], [-0.25, -3.0, -7.5], [-math.inf] * 3]
    assert (topk.vocab_size, topk.tail, topk.temperature) == (10, "bucket", 1.0)
    two = kd.store.from_vllm(PROMPT, vocab_size=10, k=2, tail="uniform", temperature=2.0)
    assert isinstance(two, kd.TopKLogits)
    assert two.ids.tolist() == [[5, 3], [7, 1], [-1, -1]]
    assert (two.tail, two.temperature) == ("uniform", 2.0)


def test_forms_of_prompt_logprobs() -> None:
    expected = kd.store.from_vllm(PROMPT, vocab_size=10)
    assert isinstance(expected, kd.TopKLogits)
    numbers = [None, *({token: value.logprob for token, value in entry.items()} for entry in PROMPT[1:] if entry)]
    served = [None, *({str(token): vars(value) for token, value in entry.items()} for entry in PROMPT[1:] if entry)]
    for form in (numbers, served, tuple(PROMPT), iter(PROMPT)):
        found = kd.store.from_vllm(form, vocab_size=10)
        assert isinstance(found, kd.TopKLogits)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.log_probs, expected.log_probs)
    several = kd.store.from_vllm([PROMPT, PROMPT[:2], [None]], vocab_size=10)
    assert isinstance(several, list)
    assert [topk.ids.shape for topk in several] == [(3, 3), (2, 2), (1, 0)]
    assert torch.equal(several[0].ids, expected.ids)
    flat = kd.store.from_vllm([{}, *PROMPT[1:]], vocab_size=10)
    completion = kd.store.from_vllm(PROMPT[1:], vocab_size=10)
    assert isinstance(flat, kd.TopKLogits)
    assert isinstance(completion, kd.TopKLogits)
    assert torch.equal(flat.ids, expected.ids)
    assert torch.equal(completion.ids, expected.ids[:-1])
    # Equal probabilities go by id; impossible tokens are left out.
    ties = kd.store.from_vllm([None, {8: -1.0, 2: -1.0, 4: -math.inf, 6: -0.9}], vocab_size=10)
    assert isinstance(ties, kd.TopKLogits)
    assert ties.ids[0].tolist() == [6, 2, 8]
    nothing = kd.store.from_vllm([], vocab_size=10)
    assert isinstance(nothing, kd.TopKLogits)
    assert nothing.ids.shape == (0, 0)


def test_prompt_logprobs_go_into_a_store(tmp_path: Path) -> None:
    several = kd.store.from_vllm([PROMPT, PROMPT[:2]], vocab_size=10)
    with kd.store.write(tmp_path, vocab_size=10) as w:
        w.append(several, [0, 1], [torch.tensor([2, 5, 9]), torch.tensor([2, 5])])
    ds = kd.store.open(tmp_path)
    assert ds[0]["topk"].ids.tolist() == [[3, 5, -1], [1, 7, 9], [-1, -1, -1]]
    assert ds[1]["topk"].ids.tolist() == [[3, 5, -1], [-1, -1, -1]]
    assert ds[0]["topk"].log_probs[0, :2].exp().sum() == pytest.approx(math.exp(-0.5) + math.exp(-1.5), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None, None], r"prompt_logprobs\[1\] must map token ids"),
        ([None, {10: -1.0}], r"prompt_logprobs\[1\]: token ids must lie in \[0, 10\), got 10"),
        ([None, {-1: -1.0}], "got -1"),
        ([None, {"x": -1.0}], "token id must be an integer, got 'x'"),
        ([None, {1: "x"}], r"prompt_logprobs\[1\]\[1\]: the log-probability must be a number of at most 0, got None"),
        ([None, {1: 0.5}], "got 0.5"),
        ([None, {1: math.nan}], "got nan"),
        ([None, {1: {"rank": 3}}], "got None"),
        ([PROMPT, [None, {10: -1.0}]], r"prompt_logprobs\[1\]\[1\]: token ids"),
        ([3], r"prompt_logprobs\[0\] must map"),
    ],
)
def test_what_vllm_cannot_have_said(given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kd.store.from_vllm(given, vocab_size=10)
    with pytest.raises(ValueError, match="k must be at least 1"):
        kd.store.from_vllm(PROMPT, vocab_size=10, k=0)


# --- tables -----------------------------------------------------------------------------------------------------------------


def lists(topk: kd.TopKLogits, row: int) -> tuple[list[list[int]], list[list[float]]]:
    """A sequence as Python's lists, without what is not there."""
    ids, values = [], []
    for token_ids, token_values in zip(topk.ids[row].tolist(), topk.log_probs[row].tolist(), strict=True):
        ids.append([token for token in token_ids if token >= 0])
        values.append([value for token, value in zip(token_ids, token_values, strict=True) if token >= 0])
    return ids, values


def nested(topk: kd.TopKLogits) -> dict[str, Any]:
    """A row per sequence."""
    rows = [lists(topk, row) for row in range(topk.ids.shape[0])]
    return {
        "key": [10 * row for row in range(len(rows))],
        "ids": [ids for ids, _ in rows],
        "log_probs": [values for _, values in rows],
        "input_ids": stores.input_ids(*topk.batch_shape).tolist(),
    }


def flat(topk: kd.TopKLogits) -> dict[str, Any]:
    """A row per token."""
    rows = nested(topk)
    per_token = {name: [token for row in rows[name] for token in row] for name in ("ids", "log_probs", "input_ids")}
    return per_token | {"key": [key for key in rows["key"] for _ in range(topk.ids.shape[1])]}


def kinds(tmp_path: Path, table: Any) -> Iterator[Any]:
    """The same table in every form that is accepted."""
    yield table
    yield table.to_batches(max_chunksize=7)
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=5)
    yield tmp_path / "table.parquet"
    with pa.OSFile(str(tmp_path / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    yield str(tmp_path / "table.arrow")
    with pa.OSFile(str(tmp_path / "table.stream"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    yield tmp_path / "table.stream"


@pytest.mark.parametrize("layout", [nested, flat])
def test_tables(tmp_path: Path, layout: Any) -> None:
    topk = teacher(4, 6, 5, ragged=True)
    for table in kinds(tmp_path, pa.table(layout(topk))):
        items = list(kd.store.from_table(table, vocab_size=VOCAB, sequence_ids="key", input_ids="input_ids"))
        assert [item["sequence_id"] for item in items] == [0, 10, 20, 30]
        for row, item in enumerate(items):
            width = item["topk"].ids.shape[1]
            assert torch.equal(item["topk"].ids, topk.ids[row, :, :width])
            assert torch.equal(item["topk"].log_probs, topk.log_probs[row, :, :width])
            assert torch.equal(item["input_ids"], stores.input_ids(4, 6)[row])


def test_tables_go_into_a_store(tmp_path: Path) -> None:
    topk = teacher(3, 4, 5)
    names = {"ids": "tokens", "log_probs": "values"}
    table = pa.table(nested(topk)).rename_columns(["key", "tokens", "values", "input_ids"])
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        for item in kd.store.from_table(table, vocab_size=VOCAB, **names):
            assert item["input_ids"] is None
            w.append([item["topk"]], [item["sequence_id"]])
    ds = kd.store.open(tmp_path)
    assert ds.sequence_ids.tolist() == [0, 1, 2]
    for row in range(3):
        assert_same(ds[row]["topk"], decoded(one(topk, row)))


def test_types_of_columns() -> None:
    """Fixed-size and large lists, narrow numbers, nulls for tokens without entries, numpy's arrays."""
    ids, values = [[3, 1], None, [4, -1]], [[-1.0, -2.0], None, [-1.0, -math.inf]]
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2)):
        given = [row if row is None or pa.types.is_int32(kind.value_type) else [abs(i) for i in row] for row in ids]
        table = pa.table(
            {"ids": pa.array(given, kind), "log_probs": pa.array(values, pa.list_(pa.float32())), "s": [1, 1, 2]}
        )
        first, second = kd.store.from_table(table, vocab_size=10, sequence_ids="s")
        assert first["topk"].ids.tolist() == [[3, 1], [-1, -1]]
        assert second["topk"].ids.tolist() == [[4, -1]]
        assert first["topk"].log_probs.tolist() == [[-1.0, -2.0], [-math.inf] * 2]
    assert not list(kd.store.from_table(table.slice(0, 0), vocab_size=10, sequence_ids="s"))


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"ids": [[[1]]]}, {}, "there is no column 'log_probs', only ids"),
        ({"ids": [1], "log_probs": [1.0]}, {}, "must hold lists, got int64"),
        ({"ids": [[1]], "log_probs": [[-1.0]]}, {}, "one token per row, so name a column sequence_ids"),
        (
            {"ids": [[[1]]], "log_probs": [[[-1.0, -2.0]]]},
            {},
            "sequence 0: 'ids' and 'log_probs' must have lists of the same",
        ),
        ({"ids": [[[1.0]]], "log_probs": [[[-1.0]]]}, {}, "column 'ids' must hold whole numbers, got float64"),
        ({"ids": [[[1, None]]], "log_probs": [[[-1.0, -2.0]]]}, {}, "column 'ids' has nulls within its lists"),
        ({"ids": [None], "log_probs": [[[-1.0]]], "x": [1]}, {}, "must hold lists|one list per token"),
        ({"ids": [[[1]]], "log_probs": [[-1.0]]}, {}, "column 'log_probs' must have one list per token"),
        (
            {"ids": [[[1]]], "log_probs": [[[-1.0]]], "s": ["a"]},
            {"sequence_ids": "s"},
            "'s' must hold whole numbers, got 'a'",
        ),
    ],
)
def test_tables_that_make_no_sense(columns: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        list(kd.store.from_table(pa.table(columns), vocab_size=10, **arguments))


# --- batches ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ragged_store(tmp_path: Path) -> Path:
    with kd.store.write(tmp_path, vocab_size=VOCAB, codec="q8", temperature=2.0, tail="renormalize") as w:
        for number, tokens in enumerate([3, 0, 5]):
            topk = teacher(1, tokens, 4, seed=number, ragged=True, temperature=2.0, tail="renormalize")
            w.append(topk, [number], stores.input_ids(1, tokens, seed=number))
    return tmp_path


def test_collate_pads(ragged_store: Path) -> None:
    ds = kd.store.open(ragged_store)
    items = [ds[place] for place in (2, 0, 1)]
    batch = kd.store.collate(items, pad_token_id=VOCAB - 1)
    topk, mask = batch["topk"], batch["mask"]
    assert batch["sequence_id"].tolist() == [2, 0, 1]
    assert topk.ids.shape == (3, 5, 4)
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2, [False] * 5]
    assert (topk.vocab_size, topk.temperature, topk.tail) == (VOCAB, 2.0, "renormalize")
    for row, item in enumerate(items):
        assert_same(one(topk, row).changed(lambda tensor, row=row: tensor[mask[row]]), item["topk"])
        assert torch.equal(batch["input_ids"][row, mask[row]], item["input_ids"])
    assert bool((topk.ids[~mask] == -1).all())
    assert bool((topk.log_probs[~mask] == -torch.inf).all())
    assert bool((topk.log_tail_mass[~mask] == 0).all())
    assert bool((batch["input_ids"][~mask] == VOCAB - 1).all())


def test_collate_of_packed_items(ragged_store: Path) -> None:
    ds = kd.store.open(ragged_store, packed=True)
    batch = kd.store.collate([ds[place] for place in (2, 0, 1)])
    packed = batch["packed"]
    assert "topk" not in batch
    assert packed.counts.shape == (3, 5)
    # Padding has no records, so the bytes are those of the sequences.
    assert torch.equal(packed.data, torch.cat([ds.packed(place).data for place in (2, 0, 1)]))
    assert (packed.codec, packed.temperature, packed.tail) == ("q8", 2.0, "renormalize")
    unpacked, topk = (
        kd.unpack(packed),
        kd.store.collate([kd.store.open(ragged_store)[place] for place in (2, 0, 1)])["topk"],
    )
    assert torch.equal(unpacked.ids, topk.ids[..., : unpacked.ids.shape[-1]])


def test_collate_refuses_mixtures(ragged_store: Path) -> None:
    item = kd.store.open(ragged_store)[0]
    other = item | {"topk": teacher(1, 3, 4).changed(lambda tensor: tensor[0])}
    with pytest.raises(ValueError, match="items must have the same tail, got"):
        kd.store.collate([item, other])
    with pytest.raises(ValueError, match="must not be empty"):
        kd.store.collate([])
    assert kd.store.collate([item, item | {"input_ids": None}])["input_ids"] is None


def test_batches_move_between_devices(ragged_store: Path) -> None:
    batch = kd.store.collate([kd.store.open(ragged_store)[0]])
    packed = kd.store.open(ragged_store).packed(0)
    for source in (batch["topk"], packed):
        moved = source.to("meta")
        assert type(moved) is type(source)
        for name in source.__slots__:
            value, other = getattr(source, name), getattr(moved, name)
            if isinstance(value, torch.Tensor):
                assert (other.device.type, other.shape, other.dtype) == ("meta", value.shape, value.dtype)
            else:
                assert other == value
        assert callable(source.pin_memory)


# --- what a store says of itself --------------------------------------------------------------------------------------------


def test_summary(tmp_path: Path) -> None:
    topk = teacher(4, 50, 8, ragged=True)
    with kd.store.write(tmp_path, vocab_size=VOCAB, codec="bf16", teacher="model") as w:
        w.append(topk, range(4), stores.input_ids(4, 50))
    found = kd.store.summary(tmp_path, bins=10)
    assert (found.shards, found.joined, found.sequences, found.tokens) == (1, 1, 4, 200)
    assert (found.sampled_tokens, found.description.teacher) == (200, "model")
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert found.bytes_per_token == found.bytes / 200
    assert (found.count_bytes, found.input_id_bytes) == (200, 800)
    assert found.record_bytes == sum(kd.store.open(tmp_path).packed(place).data.numel() for place in range(4))
    p = topk.log_probs.double().exp().sum(-1)
    assert found.mean_kept_mass == pytest.approx(float(p.mean()), abs=2e-3)
    entropy = -(topk.log_probs.double().exp() * topk.log_probs.double().clamp(min=-1e4)).sum(-1)
    assert found.mean_kept_entropy == pytest.approx(float(entropy.mean()), rel=1e-2)
    assert found.mean_entries == int((topk.ids >= 0).sum()) / 200
    counts, edges = found.kept_mass_histogram
    assert counts.tolist() == pytest.approx(np.histogram(p.flatten(), 10, (0, 1))[0].tolist(), abs=3)
    assert (counts.sum(), len(edges)) == (200, 11)
    assert found.kept_entropy_histogram[0].sum() == 200
    part = kd.store.summary(tmp_path, sample_tokens=100)
    assert part.sampled_tokens == 100
    assert part.tokens == 200

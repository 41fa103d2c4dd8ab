"""What goes into a store comes out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import stores
import torch
from stores import VOCAB, assert_same, decoded, one, teacher

import kdkernels as kd
from kdkernels.store import records


@pytest.mark.parametrize("codec", ["q4", "q6", "q8", "bf16"])
@pytest.mark.parametrize("ragged", [False, True])
def test_round_trip(tmp_path: Path, codec: str, ragged: bool) -> None:
    topk, tokens = teacher(3, 11, 8, ragged=ragged), stores.input_ids(3, 11)
    with kd.store.write(tmp_path / "new" / "store", vocab_size=VOCAB, codec=codec) as w:
        w.append(topk, sequence_ids=[7, 3, 5], input_ids=tokens)
    ds = kd.store.open(tmp_path / "new" / "store", vocab_size=VOCAB)
    assert isinstance(ds, torch.utils.data.Dataset)
    assert (len(ds), ds.vocab_size, ds.num_tokens, ds.k) == (3, VOCAB, 33, 8)
    assert ds.sequence_ids.tolist() == [3, 5, 7]
    for place, source in enumerate([1, 2, 0]):
        item = ds[place]
        assert item["sequence_id"] == [3, 5, 7][place]
        assert torch.equal(item["input_ids"], tokens[source])
        assert_same(item["topk"], decoded(one(topk, source), codec))
        # Against the input itself: all ids, and values as near as the coarsest codec promises.
        order = one(topk, source).ids.masked_fill(one(topk, source).ids < 0, VOCAB).argsort(-1)
        assert torch.equal(item["topk"].ids, one(topk, source).ids.gather(-1, order))
        given = one(topk, source).log_probs.gather(-1, order)
        present = item["topk"].ids >= 0
        assert (item["topk"].log_probs - given)[present].abs().max() < 0.5
        assert bool(present.any())
    assert_same(ds[-1]["topk"], ds[2]["topk"])
    with pytest.raises(IndexError, match="3 sequences, and 3"):
        ds[3]
    assert len(list(ds)) == 3
    assert kd.store.verify(tmp_path / "new" / "store").ok


def test_any_range_of_tokens(tmp_path: Path) -> None:
    lengths = [0, 3, 1, 0, 5, 2, 0]
    sources = [one(teacher(1, n, 6, seed=n, ragged=True), 0) for n in lengths]
    with kd.store.write(tmp_path, vocab_size=VOCAB, shard_bytes=100) as w:
        for place in (4, 1, 0, 6, 2, 5, 3):
            w.append([sources[place]], [place])
    assert len(stores.shard_files(tmp_path)) > 1
    ds = kd.store.open(tmp_path)
    assert ds.num_tokens == sum(lengths)
    whole = [ds[place]["topk"] for place in range(len(lengths))]
    assert [part.ids.shape[0] for part in whole] == lengths
    for start in range(ds.num_tokens + 1):
        for stop in range(start, ds.num_tokens + 1):
            found = ds.tokens(start, stop)
            for name in ("ids", "log_probs", "log_tail_mass"):
                expected = torch.cat([getattr(part, name) for part in whole])[start:stop]
                assert torch.equal(getattr(found, name), expected)
    for start, stop in ((-1, 2), (3, 2), (0, ds.num_tokens + 1)):
        with pytest.raises(IndexError, match="start and stop"):
            ds.tokens(start, stop)


def test_packed_is_what_is_stored(tmp_path: Path) -> None:
    topk = teacher(2, 6, 5, ragged=True, tail="uniform", temperature=2.0)
    with kd.store.write(tmp_path / "a", vocab_size=VOCAB, codec="q8") as w:
        w.append(topk, [0, 1])
    ds = kd.store.open(tmp_path / "a")
    packed = ds.packed(1)
    data, counts = records.pack(topk.ids[1], topk.log_probs[1], None, VOCAB, 8)
    assert torch.equal(packed.data, data)
    assert torch.equal(packed.counts, counts)
    assert (packed.codec, packed.tail, packed.temperature, packed.vocab_size) == ("q8", "uniform", 2.0, VOCAB)
    # Packed records go into another store as they are.
    with kd.store.write(tmp_path / "b", vocab_size=VOCAB, codec="q8", tail="uniform", temperature=2.0) as w:
        w.append([ds.packed(0), ds.packed(1)], [0, 1])
    assert stores.contents(tmp_path / "b") == stores.contents(tmp_path / "a")
    again = kd.store.open(tmp_path / "b", packed=True)[1]
    assert "topk" not in again
    assert torch.equal(again["packed"].data, data)


def test_counts_are_stored_only_where_they_differ(tmp_path: Path) -> None:
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        w.append(teacher(2, 4, 3), [0, 1])
        w.flush()
        w.append(teacher(2, 4, 3, ragged=True), [2, 3])
    tensors = [safetensors.numpy.load_file(file) for file in stores.shard_files(tmp_path)]
    assert "counts" not in tensors[0]
    assert tensors[1]["counts"].dtype == np.uint8
    assert tensors[0]["records"].size == 8 * int(records.record_sizes(torch.tensor([3]), VOCAB, 6))


def test_many_entries_per_token(tmp_path: Path) -> None:
    topk = teacher(1, 2, 500, ragged=True)
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        w.append(topk, [0])
    assert safetensors.numpy.load_file(stores.shard_files(tmp_path)[0])["counts"].dtype == np.uint16
    assert_same(kd.store.open(tmp_path)[0]["topk"], decoded(one(topk, 0)))


def test_stores_with_nothing_in_them(tmp_path: Path) -> None:
    with kd.store.write(tmp_path / "a", vocab_size=VOCAB) as w:
        w.append([], [])
    ds = kd.store.open(tmp_path / "a")
    assert (len(ds), ds.num_tokens, ds.k) == (0, 0, 0)
    assert ds.tokens(0, 0).ids.shape == (0, 0)
    assert kd.store.verify(tmp_path / "a").ok
    # A sequence without tokens, tokens without entries, a source without columns.
    with kd.store.write(tmp_path / "b", vocab_size=VOCAB) as w:
        w.append([one(teacher(1, 0, 4), 0)], [0], [torch.empty(0, dtype=torch.int64)])
        w.append([one(teacher(1, 3, 4), 0).changed(lambda tensor: tensor[:, :0])], [1], [torch.arange(3)])
    ds = kd.store.open(tmp_path / "b")
    assert [ds[place]["topk"].ids.shape for place in range(2)] == [(0, 4), (3, 4)]
    assert bool((ds[1]["topk"].ids == -1).all())
    assert kd.store.summary(tmp_path / "b").tokens == 3


def test_probability_zero_is_no_entry(tmp_path: Path) -> None:
    ids, log_probs = torch.tensor([[[4, 7, -1]]]), torch.tensor([[[-0.5, -torch.inf, 99.0]]])
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        w.append(kd.TopKLogits(ids, log_probs, vocab_size=VOCAB), [0])
    assert kd.store.open(tmp_path)[0]["topk"].ids.tolist() == [[4, -1, -1]]


def test_going_on_with_a_store(tmp_path: Path) -> None:
    topk = teacher(4, 5, 3)
    with kd.store.write(tmp_path, vocab_size=VOCAB, k=3, top_p=0.9, teacher="a", tokenizer="t") as w:
        assert w.done == frozenset()
        w.append(topk.changed(lambda tensor: tensor[:2]), [0, 1])
        assert w.done == frozenset()
        assert w.contains(1)
        w.flush()
        assert w.done == {0, 1}
    with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
        assert w.done == {0, 1}
        assert 1 in w
        assert 2 not in w
        w.append(topk.changed(lambda tensor: tensor[2:]), [2, 3])
    ds = kd.store.open(tmp_path)
    assert len(ds) == 4
    description = ds.description
    assert (description.k, description.top_p, description.teacher, description.tokenizer) == (3, 0.9, "a", "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": VOCAB + 1}, "vocab_size is 998.*has 997"),
        ({"codec": "q8"}, "codec is 'q8'.*has 'q6'"),
        ({"temperature": 3.0}, "temperature is 3.0.*has 2.0"),
        ({"tail": "drop"}, "tail is 'drop'.*has 'bucket'"),
        ({"tokenizer": "other"}, "tokenizer is 'other'.*has 't'"),
        ({"teacher": "other"}, "teacher is 'other'.*has None"),
        ({"k": 9}, "k is 9.*has None"),
    ],
)
def test_a_store_is_one_thing(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with kd.store.write(tmp_path, vocab_size=VOCAB, tokenizer="t") as w:
        w.append(teacher(1, 2, 3, temperature=2.0), [0])
    with pytest.raises(ValueError, match=message):
        kd.store.write(tmp_path, **({"vocab_size": VOCAB} | change))


def test_what_cannot_be_appended(tmp_path: Path) -> None:
    good = teacher(2, 3, 4)
    w = kd.store.write(tmp_path, vocab_size=VOCAB, k=4)
    w.append(good, [0, 1])
    before = w._pending.copy()

    def refused(message: str, topk: object = good, ids: object = (2, 3), **kwargs: object) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            w.append(topk, ids, **kwargs)  # type: ignore[arg-type]
        assert w._pending == before

    refused("sequence_ids: 1 is in the store already, in this writer", ids=[1, 2])
    refused("sequence_ids has 2 twice", ids=[2, 2])
    refused("one id for each of the 2 sequences, got 1", ids=[2])
    refused(r"sequence_ids\[0\] must be an integer", ids=["a", "b"])
    refused("64 bits", ids=[1 << 63, 0])
    refused("must be kd.TopKLogits", topk=torch.zeros(2, 3, 4))
    refused("pass a list of one source", topk=one(good, 0), ids=[2])
    refused(r"topk\[0\] must have the shape \[tokens, K\]", topk=[good])
    refused("vocab_size=996, and the store vocab_size=997", topk=teacher(2, 3, 4, vocab=996))
    refused("temperature=2.0, and the store", topk=teacher(2, 3, 4, temperature=2.0))
    refused("tail='drop', and the store", topk=teacher(2, 3, 4, tail="drop"))
    refused("5 entries, and this store takes at most 4", topk=teacher(2, 3, 5))
    for place, value, message in (
        ((1, 2, 3), VOCAB, "997"),
        ((1, 2, 3), -2, "-2"),
        ((1, 2, 0), int(good.ids[1, 2, 1]), ""),
    ):
        ids = good.ids.clone()
        ids[place] = value
        refused(f"ids.*token 5 has {message}", topk=kd.TopKLogits(ids, good.log_probs, vocab_size=VOCAB))
    for value, message in ((torch.nan, "token 4 has nan"), (0.5, "token 4.*sum"), (-0.01, "token 4.*sum")):
        log_probs = good.log_probs.clone()
        log_probs[1, 1, 1] = value
        refused(message, topk=kd.TopKLogits(good.ids, log_probs, vocab_size=VOCAB))
    tail = torch.full((2, 3), torch.nan)
    refused("log_tail_mass", topk=kd.TopKLogits(good.ids, good.log_probs, vocab_size=VOCAB, log_tail_mass=tail))
    refused("input_ids must not be given, as in the calls before", input_ids=stores.input_ids(2, 3))
    refused("one row for each of the 2", input_ids=stores.input_ids(1, 3))
    refused(r"shape \[3\], got \[4\]", input_ids=stores.input_ids(2, 4))
    refused("integers, got torch.float32", input_ids=torch.zeros(2, 3))
    refused(r"in \[0, 997\), got 997 for token 0", input_ids=stores.input_ids(2, 3) * 0 + VOCAB)
    data = torch.zeros(3, dtype=torch.uint8)
    packed = kd.PackedLogits(data, torch.ones(1, 1, dtype=torch.int32), vocab_size=VOCAB, codec="q6")
    refused("bytes of records, and data has 3", topk=packed, ids=[2])
    refused("codec='q8', and the store codec='q6'", ids=[2], topk=kd.PackedLogits(
        data, packed.counts, vocab_size=VOCAB, codec="q8"))  # fmt: skip
    data = torch.full((int(records.record_sizes(packed.counts, VOCAB, 6)),), 255, dtype=torch.uint8)
    refused("malformed", topk=kd.PackedLogits(data, packed.counts, vocab_size=VOCAB, codec="q6"), ids=[2])
    w.close()
    assert len(kd.store.open(tmp_path)) == 2
    with pytest.raises(ValueError, match="closed"):
        w.append(good, [2, 3])
    w.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be between 1"),
        ({"codec": "q5"}, "codec must be one of q4, q6, q8, bf16, got 'q5'"),
        ({"k": VOCAB + 1}, "k must be between 1"),
        ({"top_p": 1.5}, "top_p must lie"),
        ({"temperature": 0.0}, "temperature must be a positive"),
        ({"tail": "none"}, "tail must be one of"),
        ({"teacher": 3}, "teacher must be a name"),
        ({"tokenizer": 3}, "tokenizer must be a fingerprint"),
        ({"tokenizer": ""}, "1 to 4096 characters"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
    ],
)
def test_arguments_of_write(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kd.store.write(tmp_path, **({"vocab_size": VOCAB} | change))
    assert not list(tmp_path.iterdir())


class Tokenizer:
    """What a fingerprint needs of a tokenizer."""

    def __init__(self, words: str, eos: str) -> None:
        self.words = words.split()
        self.special_tokens_map = {"eos_token": eos}

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}


def test_the_wrong_vocabulary_or_tokenizer(tmp_path: Path) -> None:
    with kd.store.write(tmp_path / "a", vocab_size=VOCAB, tokenizer=Tokenizer("a b c", "c")) as w:
        w.append(teacher(1, 2, 3), [0])
    with pytest.raises(ValueError, match=r"vocab_size is 996, and .*manifest.json has vocab_size 997"):
        kd.store.open(tmp_path / "a", vocab_size=996)
    kd.store.open(tmp_path / "a", tokenizer=Tokenizer("a b c", "c"))
    kd.store.open(tmp_path / "a", tokenizer=kd.store.tokenizer_fingerprint(Tokenizer("a b c", "c")))
    for other in (Tokenizer("a c b", "c"), Tokenizer("a b c", "b"), Tokenizer("a b c d", "c"), "sha256:0"):
        with pytest.raises(ValueError, match=r"tokenizer has the fingerprint sha256:.*ignore_tokenizer=True"):
            kd.store.open(tmp_path / "a", tokenizer=other)
        assert len(kd.store.open(tmp_path / "a", tokenizer=other, ignore_tokenizer=True)) == 1
    with kd.store.write(tmp_path / "b", vocab_size=VOCAB) as w:
        w.append(teacher(1, 2, 3), [0])
    with pytest.raises(ValueError, match="has tokenizer None"):
        kd.store.open(tmp_path / "b", tokenizer="t")
    with pytest.raises(FileNotFoundError, match="no store"):
        kd.store.open(tmp_path / "c")


@pytest.mark.slow
def test_fingerprint_of_a_transformers_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def tokenizer(words: str, **special: str) -> object:
        model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words.split())}, unk_token="a")
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)

    fingerprint = kd.store.tokenizer_fingerprint
    same = fingerprint(tokenizer("a b c", eos_token="c"))
    assert same == fingerprint(tokenizer("a b c", eos_token="c"))
    assert same.startswith("sha256:")
    others = (tokenizer("a c b", eos_token="c"), tokenizer("a b c", eos_token="b"), tokenizer("a b c d", eos_token="c"))
    assert len({same, *map(fingerprint, others)}) == 4


def test_what_was_appended_before_an_error_is_stored(tmp_path: Path) -> None:
    def interrupted() -> None:
        with kd.store.write(tmp_path, vocab_size=VOCAB) as w:
            w.append(teacher(1, 2, 3), [0])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert len(kd.store.open(tmp_path)) == 1


@pytest.mark.slow
def test_importing_kdkernels_does_not_load_what_only_stores_need() -> None:
    code = (
        "import sys, kdkernels; print([name for name in ('fsspec', 'safetensors', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extension wrote is read without it, and the other way round."""
    topk = teacher(2, 3, 4, ragged=True)
    for native_writes in (True, False):
        path = tmp_path / str(native_writes)
        for native in (native_writes, not native_writes):
            with monkeypatch.context() as patch:
                if not native:
                    patch.setattr(records.cpu, "status", lambda: (False, "not here"))
                if native == native_writes:
                    with kd.store.write(path, vocab_size=VOCAB) as w:
                        w.append(topk, [0, 1])
                found = [item["topk"] for item in kd.store.open(path)]
            for row in range(2):
                assert torch.equal(found[row].ids, decoded(one(topk, row)).ids)
                torch.testing.assert_close(found[row].log_probs, decoded(one(topk, row)).log_probs)
    assert stores.contents(tmp_path / "True") == stores.contents(tmp_path / "False")

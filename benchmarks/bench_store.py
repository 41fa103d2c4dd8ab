"""Teacher logits on disk: random access to stored sequences, and writing them; k = 64 of 131,072."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from reporting import SideBySide, Target
from safetensors.torch import save_file

import kdkernels as kd

VOCAB, K, TOKENS, SEQUENCES, BATCH = 131_072, 64, 2048, 64, 8
TITLE = f"{TOKENS} tokens, k={K}, V={VOCAB}"


def teacher(k: int = K) -> kd.TopKLogits:
    """Zipf-like probabilities, as a language model's, of ids spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.3 * torch.randn(BATCH, TOKENS, k, generator=generator) - 1.3 * torch.arange(1, k + 1).log()
    log_probs = logits.log_softmax(-1) + torch.tensor(0.92).log()
    # Distinct, because each is from a part of the vocabulary of its own.
    part = torch.rand(BATCH, TOKENS, k, generator=generator).argsort(-1)
    ids = part * (VOCAB // k) + torch.randint(0, VOCAB // k, part.shape, generator=generator)
    return kd.TopKLogits(ids, log_probs, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def topk() -> kd.TopKLogits:
    return teacher()


def write(path: Path, topk: kd.TopKLogits, codec: str = "q6") -> None:
    with kd.store.write(path, vocab_size=VOCAB, codec=codec) as w:
        for start in range(0, SEQUENCES, BATCH):
            w.append(topk, range(start, start + BATCH))


def write_plain(path: Path, topk: kd.TopKLogits) -> None:
    """What one would do without a store: int32 ids and half-precision values, six bytes an entry, in one file."""
    repeats = SEQUENCES // BATCH
    save_file(
        {"ids": topk.ids.int().repeat(repeats, 1, 1), "log_probs": topk.log_probs.half().repeat(repeats, 1, 1)}, path
    )


def test_random_access(side_by_side: SideBySide, tmp_path: Path, topk: kd.TopKLogits) -> None:
    write(tmp_path / "store", topk)
    write_plain(tmp_path / "plain", topk)
    ds = kd.store.open(tmp_path / "store")
    plain = safetensors.safe_open(tmp_path / "plain", "pt")
    chance = random.Random(0)
    places = itertools.cycle([chance.randrange(SEQUENCES) for _ in range(997)])

    def read_plain() -> kd.TopKLogits:
        place = next(places)
        ids, log_probs = plain.get_slice("ids")[place], plain.get_slice("log_probs")[place]
        return kd.TopKLogits(ids.long(), log_probs.float(), vocab_size=VOCAB)

    calls = {
        "ds[i]": lambda: ds[next(places)],
        "ds.packed(i)": lambda: ds.packed(next(places)),
        "int32 + fp16, unverified": read_plain,
    }
    columns = {"tokens": TOKENS, "k": K, "vocab": VOCAB}
    side_by_side.measure(f"random access, {TITLE}", calls, rounds=51, repeats=4, columns=columns)
    side_by_side.time("random access to a sequence of 2,048 tokens at k=64", "ds[i]", 3000)


def test_one_thread(side_by_side: SideBySide, tmp_path: Path, topk: kd.TopKLogits) -> None:
    """As in a worker of a DataLoader."""
    write(tmp_path / "store", topk)
    ds = kd.store.open(tmp_path / "store")
    places = itertools.cycle(np.random.default_rng(0).permutation(SEQUENCES).tolist())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {"ds[i]": lambda: ds[next(places)], "ds.packed(i)": lambda: ds.packed(next(places))}
        columns = {"tokens": TOKENS, "k": K, "vocab": VOCAB}
        side_by_side.measure(f"random access in one thread, {TITLE}", calls, rounds=51, repeats=4, columns=columns)
        side_by_side.time("random access to a sequence in one thread", "ds[i]", 3000)
    finally:
        torch.set_num_threads(threads)


def test_writing(side_by_side: SideBySide, tmp_path: Path, topk: kd.TopKLogits) -> None:
    """All the way to the disk; the plain file is not synced."""
    number = itertools.count()
    calls = {
        "store, q6": lambda: write(tmp_path / f"store{next(number)}", topk),
        "store, bf16": lambda: write(tmp_path / f"store{next(number)}", topk, "bf16"),
        "int32 + fp16": lambda: write_plain(tmp_path / f"plain{next(number)}", topk),
    }
    tokens = SEQUENCES * TOKENS
    columns = {"tokens": tokens, "k": K, "vocab": VOCAB}
    side_by_side.measure(f"writing {tokens} tokens, k={K}, V={VOCAB}", calls, rounds=5, columns=columns)
    if side_by_side.samples:
        seconds = float(np.median(side_by_side.samples["store, q6"]))
        side_by_side.targets.append(
            Target(
                "writing a store, everything included",
                tokens * K / seconds / 1e6,
                10,
                at_least=True,
                unit=" M entries/s",
            )
        )
    for k, bound in ((50, 127), (128, 295)):
        write(tmp_path / f"k{k}", teacher(k))
        bytes_per_token = kd.store.summary(tmp_path / f"k{k}", sample_tokens=TOKENS).bytes_per_token
        what = f"bytes per token of a store, all headers included, k={k}, q6"
        side_by_side.targets.append(Target(what, bytes_per_token, bound, unit=" B"))

"""Teachers to store, and what should come back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import torch

import kdkernels as kd
from kdkernels.store import records
from kdkernels.store.description import CODEC_BITS

VOCAB = 997


def teacher(
    sequences: int, tokens: int, k: int, *, seed: int = 0, vocab: int = VOCAB, ragged: bool = False, **kwargs: Any
) -> kd.TopKLogits:
    """The top k of random logits ``[sequences, tokens, K]``; ragged: cut at any place, sometimes to nothing."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(sequences, tokens, vocab, generator=generator)
    top = logits.log_softmax(-1).topk(k)
    ids, log_probs = top.indices, top.values
    if ragged:
        count = torch.randint(0, k + 1, (sequences, tokens, 1), generator=generator)
        absent = torch.arange(k) >= count
        ids, log_probs = ids.masked_fill(absent, -1), log_probs.masked_fill(absent, -torch.inf)
    return kd.TopKLogits(ids, log_probs, vocab_size=vocab, **kwargs)


def input_ids(sequences: int, tokens: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def one(topk: kd.TopKLogits, sequence: int) -> kd.TopKLogits:
    """One sequence of a batch."""
    return topk.changed(lambda tensor: tensor[sequence])


def decoded(topk: kd.TopKLogits, codec: str = "q6") -> kd.TopKLogits:
    """What the codec makes of a sequence ``[tokens, K]``, without any store."""
    bits = CODEC_BITS[codec]
    data, counts = records.pack(topk.ids, topk.log_probs, topk.log_tail_mass, topk.vocab_size, bits)
    ids, log_probs, tail = records.unpack(data, counts, topk.vocab_size, bits, topk.ids.shape[-1])
    return kd.TopKLogits(ids, log_probs, vocab_size=topk.vocab_size, log_tail_mass=tail)


def assert_same(found: kd.TopKLogits, expected: kd.TopKLogits) -> None:
    """Bit for bit."""
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert found.log_tail_mass is not None
    assert expected.log_tail_mass is not None
    assert torch.equal(found.log_tail_mass, expected.log_tail_mass)


def contents(path: str | Path) -> dict[int, tuple[bytes, list[int], list[int] | None]]:
    """Everything that is stored, by sequence: the bytes of its records, its counts, its input ids."""
    ds = kd.store.open(path)
    found = {}
    for place in range(len(ds)):
        packed, item = ds.packed(place), ds[place]
        tokens = None if item["input_ids"] is None else item["input_ids"].tolist()
        found[item["sequence_id"]] = (packed.data.numpy().tobytes(), packed.counts.tolist(), tokens)
    return found


def shard_files(path: str | Path) -> list[Path]:
    return sorted(Path(path).glob("shard-*.safetensors"))


def seal(data: bytearray) -> bytearray:
    """The file of a shard with the seal that belongs to its header and index."""
    import json

    length = int.from_bytes(data[:8], "little")
    start, stop = (8 + length + offset for offset in json.loads(data[8 : 8 + length])["seal"]["data_offsets"])
    data[start:stop] = hashlib.sha256(data[:start]).digest().ljust(stop - start, b"\0")
    return data


def forge(shard: Path, change: Callable[[dict[str, Any], dict[str, str]], None], *, checksums: bool = True) -> None:
    """Rewrites a shard as someone would who knows the format: with other tensors or metadata, and every checksum right."""
    with safetensors.safe_open(shard, "np") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load_file(shard).items()}
    change(tensors, metadata)
    if checksums:
        renew_checksums(tensors)
    shard.write_bytes(seal(bytearray(safetensors.numpy.save(tensors, metadata))))


def renew_checksums(tensors: dict[str, Any]) -> None:
    import numpy as np

    token, record = 0, 0
    ends = zip(tensors["index.token_ends"].tolist(), tensors["index.record_ends"].tolist(), strict=True)
    for row, (token_end, record_end) in enumerate(ends):
        digest = hashlib.sha256(tensors["records"][record:record_end].tobytes())
        for name in ("counts", "input_ids"):
            digest.update(tensors.get(name, np.empty(0, np.uint8))[token:token_end].tobytes())
        tensors["index.checksums"][row] = int.from_bytes(digest.digest()[:8], "little", signed=True)
        token, record = token_end, record_end


def forget_shards(path: Path) -> None:
    """Takes all shards out of the manifest, so that it vouches for none of them."""
    from kdkernels.store import manifest
    from kdkernels.store.files import files_at

    files = files_at(path)
    manifest.replace(files, manifest.Manifest(manifest.read(files).description))

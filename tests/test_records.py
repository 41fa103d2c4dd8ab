"""Records of truncated teachers: what is packed comes back, and malformed bytes are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdkernels.backends import native
from kdkernels.records import BITS, record_sizes

if native.module is None:
    pytest.skip(f"the native extension is not there: {native.reason}", allow_module_level=True)

from kdkernels.backends import cpu

each_codec = pytest.mark.parametrize("bits", BITS.values(), ids=BITS)


def random_rows(rows: int, width: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K] in no order, log-probabilities over the vocabulary, log tail mass [N]); steep and flat rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, vocab, generator=generator) if vocab <= 5000 else None
    if weights is not None:
        ids = weights.topk(width, -1).indices
    else:  # by rejection: few repetitions to begin with
        ids = torch.stack(
            [torch.randint(vocab, (2 * width + 9,), generator=generator).unique()[:width] for _ in range(rows)]
        )
        ids = ids[:, torch.randperm(width, generator=generator)]
    logits = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 0.6, rows)[:, None]
    head = torch.sigmoid(torch.randn(rows, generator=generator) * 3) if width < vocab else torch.ones(rows)
    log_probs = torch.log_softmax(logits.double(), -1) + head.double().log()[:, None]
    return ids, log_probs.float(), torch.log1p(-head.double()).float()


@each_codec
@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (2, 2), (127, 9), (4097, 300), (151_936, 64), (1 << 24, 50)])
def test_ids_come_back_and_the_mass_is_kept(vocab: int, width: int, bits: int) -> None:
    ids, log_probs, log_tail_mass = random_rows(20, width, vocab)
    data, counts = cpu.pack_records(ids, log_probs, log_tail_mass, vocab, bits)
    assert len(data) == int(record_sizes(counts, vocab, bits).sum())
    found_ids, found, found_tail = cpu.unpack_records(data, counts, vocab, bits, width)
    order = ids.sort(-1)
    assert torch.equal(found_ids, order.values)
    reach = log_probs.amax(-1, keepdim=True) - log_probs.amin(-1, keepdim=True)
    # A distance is off by half a step at most, and so is the mean that normalisation takes away; R and h are rounded too.
    coarsest = reach / 128 if bits == 16 else 28 / 16 * (reach + 1 / 128) / (2**bits - 1)
    assert ((found - log_probs.gather(1, order.indices)).abs() <= coarsest + 6e-4).all()
    mass, tail = found.double().exp().sum(-1), found_tail.double().exp()
    torch.testing.assert_close(mass + tail, torch.ones_like(mass), rtol=0, atol=1e-6)
    torch.testing.assert_close(found_tail, log_tail_mass, rtol=0, atol=6e-4)

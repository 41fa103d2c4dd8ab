"""The family topk in Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.rows import STATISTICS, RowSpec, Tempering, compute_dtype
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch, tuned_sizes, warp_size
from kdkernels.backends.triton.token_statistics import token_statistics
from kdkernels.triton_kernels.tiling import PICKING_KERNEL, PICKING_TILE, PICKING_WARPS, default_sizes

__all__ = ["sample", "topk"]

KEYS = {torch.float32: (0, 4), torch.bfloat16: (16, 2), torch.float16: (8, 3), torch.float64: (0, 8)}
"""Of integers in the order of the logits: the trailing bits that say nothing, and the digits of 8 bits that are left."""


def _picking_arguments(logits: Tensor, temperature: float, softcap: float) -> dict[str, Any]:
    """The arguments that the kernels of the family topk share."""
    launch = prepare_launch(logits)
    return {
        "source": logits,
        "stride": launch.stride(logits),
        "vocab_size": logits.shape[1],
        "temperature": temperature,
        "softcap": softcap,
        "HAS_CAP": softcap != 0,
        "COMPUTE": launch.compute,
        "WIDTH": launch.width,
    }


def _topk_sizes(logits: Tensor, width: int) -> dict[str, int]:
    """Tile and warps of the kernel that finds the largest."""
    warp, vocab_size, itemsize = warp_size(logits), logits.shape[1], logits.element_size()
    sizes = tuned_sizes(logits, PICKING_KERNEL, vocab_size, itemsize, aligned=width > 1)
    sizes = sizes or default_sizes(PICKING_KERNEL, vocab_size, itemsize, warp)
    return {"TILE": sizes.threads * sizes.bytes_per_thread // 4, "num_warps": sizes.threads // warp}


def topk(logits: Tensor, k: int, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, k], log_probs [N, k], log_tail_mass [N]). The kernel finds the ids; their order is made here."""
    rows = logits.shape[0]
    found = torch.full((rows, k), -math.inf, dtype=compute_dtype(logits, None), device=logits.device)
    ids = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    rest = found.new_empty(rows, 2)
    shift, passes = KEYS[logits.dtype]
    if rows:
        arguments = _picking_arguments(logits, tempering.temperature, tempering.softcap)
        with on_device_of(logits, "topk"):
            load_kernels().topk.topk_kernel[(rows,)](
                k=k,
                logits_out=found,
                ids_out=ids,
                rest_out=rest,
                SHIFT=shift,
                PASSES=passes,
                **_topk_sizes(logits, arguments["WIDTH"]),
                **arguments,
            )
    found += 0.0  # -0 sorts as 0
    found, order = torch.sort(found, dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if tempering.softcap:
        found = (tempering.softcap * torch.tanh(found / tempering.softcap)).masked_fill(ids < 0, -math.inf)
    maximum, total = rest.unbind(-1)
    top = torch.maximum(found[:, 0], maximum)
    relative = torch.cat([found, maximum.unsqueeze(-1)], -1).sub_(top.unsqueeze(-1)).div_(tempering.temperature)
    relative[:, -1] += total.log()
    log_p = relative - torch.logsumexp(relative, -1, keepdim=True)
    valid = ~log_p.isnan().any(-1)
    log_p = log_p.where(valid.unsqueeze(-1), math.nan)
    return ids.where(valid.unsqueeze(-1), -1), log_p[:, :-1].contiguous(), log_p[:, -1].contiguous()


def sample(logits: Tensor, uniforms: Tensor, tempering: Tempering) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, n], weights [N, n], entropy [N]): first the block of each draw is found, then the id in it."""
    rows, draws = uniforms.shape
    dtype = compute_dtype(logits, None)
    spec = RowSpec(0, 0.0, 0.0, student_temperature=tempering.temperature, student_softcap=tempering.softcap)
    statistics, _ = token_statistics(logits, None, spec)
    maxima = statistics[:, STATISTICS.index("max_student")].contiguous()
    entropy = statistics[:, STATISTICS.index("entropy_student")]
    cumulative = _block_sums(logits, maxima, tempering.proposal_temperature, tempering.softcap).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    empty, valid = total.squeeze(-1) == 0, total.squeeze(-1) > 0  # neither where it is NaN
    targets = uniforms * total
    blocks = torch.searchsorted(cumulative, targets, right=True)
    # The last block that anything can be drawn from; by rounding a target may lie past it.
    blocks = torch.minimum(blocks, torch.searchsorted(cumulative, total).clamp(max=cumulative.shape[1] - 1))
    upto = cumulative.gather(-1, blocks)
    before = torch.cat([torch.zeros_like(total), cumulative], -1).gather(-1, blocks)
    ids = torch.empty(rows, draws, dtype=torch.int64, device=logits.device)
    drawn = torch.empty(rows, draws, dtype=dtype, device=logits.device)
    if rows:
        with on_device_of(logits, "topk"):
            load_kernels().topk.draw_kernel[(rows, draws)](
                blocks=blocks,
                fractions=(targets - before) / (upto - before),
                ids=ids,
                logits_out=drawn,
                BLOCK=PICKING_TILE,
                num_warps=PICKING_WARPS,
                **_picking_arguments(logits, tempering.proposal_temperature, tempering.softcap),
            )
    weights = torch.full_like(drawn, 1 / draws)
    if tempering.proposal_temperature != tempering.temperature:
        plain = _block_sums(logits, maxima, tempering.temperature, tempering.softcap).sum(-1, keepdim=True)
        factor = 1 / tempering.temperature - 1 / tempering.proposal_temperature
        log_ratio = (drawn.double() - maxima.unsqueeze(-1)) * factor + (total / plain).log()
        weights = (log_ratio.exp() / draws).to(dtype)
    nothing = torch.where(empty, 0.0, math.nan).to(dtype)
    return (
        ids.where(valid.unsqueeze(-1), -1),
        weights.where(valid.unsqueeze(-1), nothing.unsqueeze(-1)),
        entropy.where(valid, nothing),
    )


def _block_sums(logits: Tensor, maxima: Tensor, temperature: float, softcap: float) -> Tensor:
    """Of the exponentials in each block of a row, relative to its maximum, float64 [N, blocks]."""
    rows, vocab_size = logits.shape
    blocks = -(-vocab_size // PICKING_TILE)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    if rows:
        with on_device_of(logits, "topk"):
            load_kernels().topk.block_sums_kernel[(rows, blocks)](
                maxima=maxima,
                sums=sums,
                BLOCK=PICKING_TILE,
                num_warps=PICKING_WARPS,
                **_picking_arguments(logits, temperature, softcap),
            )
    return sums

"""How a row of logits is cut into tiles: sizes and warps for a launch, from the vocabulary size and the dtypes."""

from dataclasses import dataclass

VECTOR_BYTES = 16  # the widest load of one thread: 128 bits
UNROLLED_BYTES = 32  # of each operand that a lane reads per tile; twice as much spills registers in some divergences


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program walks its row in tiles of `unroll * lanes * width` logits.

    width: adjacent logits that a lane loads at once. lanes: threads of a program. unroll: loads of a lane per tile.
    """

    width: int
    lanes: int
    unroll: int
    num_warps: int


def choose_tiling(vocab_size: int, largest_itemsize: int, aligned: bool, warp_size: int = 32) -> Tiling:
    """The tiling for rows of `vocab_size` logits.

    largest_itemsize: bytes of the widest operand element, 2, 4 or 8.
    aligned: every row of every operand starts on a 16-byte boundary, so that vector loads are possible.
    warp_size: 32 (NVIDIA), 64 (AMD CDNA).
    """
    width = VECTOR_BYTES // largest_itemsize if aligned else 1
    unroll = UNROLLED_BYTES // largest_itemsize // width
    if vocab_size <= 2048:
        threads = 64
    elif vocab_size <= 16384:
        threads = 128
    else:
        threads = 256
    return Tiling(width=width, lanes=threads, unroll=unroll, num_warps=threads // warp_size)

"""How rows of logits and matrices of costs are cut into tiles: sizes and warps for a launch, from sizes and dtypes."""

import functools
from dataclasses import dataclass

VECTOR_BYTES = 16  # the widest load of one thread: 128 bits
UNROLLED_BYTES = 32  # of each operand that a lane reads per tile; twice as much spills registers in some divergences
FEWEST_TILES = 4  # of a row: a program's start, its last sums and its masked end are paid for once per row


@dataclass(frozen=True, slots=True)
class LaunchSizes:
    """What may differ between launches of a kernel that walks rows, without any change of what it computes."""

    threads: int
    """Of the program that walks a row."""
    bytes_per_thread: int
    """Of each operand, that a thread reads per tile."""


TUNED_THREADS = (64, 128, 256)  # with 512 some compositions and divergences spill registers
TUNED_BYTES = (VECTOR_BYTES, UNROLLED_BYTES)

PICKING_KERNEL = "topk"
"""The one whose tile is not counted in bytes of its operands but of float32, whatever they are."""

PICKING_TILE = 1024
"""Logits that a program of the family topk has in hand at once."""

PICKING_WARPS = 8
"""Of such a program; with half as many some of its registers spill."""

TUNED_PICKING = ((PICKING_TILE // 2, 4), (PICKING_TILE, PICKING_WARPS), (PICKING_TILE, 16))

ROW_KERNELS = (
    "divergence_forward",
    "divergence_backward",
    "token_statistics",
    "sparse_divergence_forward",
    "sparse_divergence_backward",
    "bernoulli",
    "head_mass",
    "row_deviation",
    "row_deviation_backward",
    "token_set",
    PICKING_KERNEL,
)
"""The kernels with launch sizes to choose."""

RESIDENT = {"sm_75": (1024, 16), "sm_86": (1536, 16), "sm_87": (1536, 16)}
"""Threads and programs that a multiprocessor runs at once (CUDA C++ Programming Guide, technical specifications), where the
programs are too few for small ones to fill it."""


def default_sizes(
    kernel: str, vocab_size: int, largest_itemsize: int, warp_size: int = 32, architecture: str = ""
) -> LaunchSizes:
    """The launch sizes of a kernel that nobody has tuned. Arguments as of `choose_tiling`."""
    if kernel == PICKING_KERNEL:
        threads = PICKING_WARPS * warp_size
        return LaunchSizes(threads, PICKING_TILE * 4 // threads)
    return row_sizes(vocab_size, largest_itemsize, architecture)


def row_sizes(vocab_size: int, largest_itemsize: int, architecture: str) -> LaunchSizes:
    for threads in (256, 128):
        if vocab_size * largest_itemsize >= FEWEST_TILES * threads * UNROLLED_BYTES:
            return LaunchSizes(threads, UNROLLED_BYTES)
    resident_threads, resident_programs = RESIDENT.get(architecture, (0, 0))
    return LaunchSizes(64 if 64 * resident_programs >= resident_threads else 128, UNROLLED_BYTES)


def candidate_sizes(kernel: str, warp_size: int) -> list[LaunchSizes]:
    """The launch sizes that tuning tries, and the only ones it may choose. None spills registers, see the tests."""
    if kernel == PICKING_KERNEL:
        return [LaunchSizes(warps * warp_size, tile * 4 // (warps * warp_size)) for tile, warps in TUNED_PICKING]
    return [LaunchSizes(threads, size) for threads in TUNED_THREADS for size in TUNED_BYTES]


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program walks its row in tiles of `unroll * lanes * width` logits.

    width: adjacent logits that a lane loads at once. lanes: threads of a program. unroll: loads of a lane per tile.
    """

    width: int
    lanes: int
    unroll: int
    num_warps: int


@functools.lru_cache(maxsize=1024)  # asked at every launch
def choose_tiling(
    vocab_size: int,
    largest_itemsize: int,
    aligned: bool,
    warp_size: int = 32,
    *,
    architecture: str = "",
    sizes: LaunchSizes | None = None,
) -> Tiling:
    """The tiling for rows of `vocab_size` logits.

    largest_itemsize: bytes of the widest operand element, 2, 4 or 8.
    aligned: every row of every operand starts on a 16-byte boundary, so that vector loads are possible.
    warp_size: 32 (NVIDIA), 64 (AMD CDNA).
    architecture: such as "sm_90" or "gfx942"; empty for none in particular.
    sizes: the launch sizes, if they are not to be the default ones.
    """
    sizes = sizes or row_sizes(vocab_size, largest_itemsize, architecture)
    width = VECTOR_BYTES // largest_itemsize if aligned else 1
    unroll = sizes.bytes_per_thread // largest_itemsize // width
    return Tiling(width=width, lanes=sizes.threads, unroll=unroll, num_warps=sizes.threads // warp_size)


ON_CHIP = {4: 128 * 128, 8: 32 * 64}
"""Pairs of a problem that one program can hold in its registers, by the bytes of the compute type."""

MATRIX_ON_CHIP = {4: 64 * 128, 8: 32 * 32}
"""The same where vectors of a solver lie beside them."""

LONGEST_SIDE = 256
"""Of a problem in registers: of longer vectors each thread would have to hold too much."""

STREAMED_TILE = (32, 64)
"""Rows and columns of a problem that does not fit."""

PAIRS_PER_WARP = 1024
FEW_PAIRS_PER_WARP = 512  # where there is more in the registers than one matrix
MOST_WARPS = {32: 8, 64: 16}
COLUMN_LANES = 8

MOST_REGISTERS = {("sinkhorn", 32): 168, ("sinkhorn_streamed", 16): 80, ("sinkhorn_implicit", 16): 144}
"""Of a thread, by the kernel and the pairs that a thread holds, in float32.

NVIDIA's compiler, left alone, may spill a few registers to fit one more program on a multiprocessor. With a limit to keep to it
does not, and takes fewer than that.
"""


@dataclass(frozen=True, slots=True)
class CostTiling:
    """A tile of `row_steps * row_lanes` rows and `column_steps * column_lanes` columns of a problem."""

    row_steps: int
    column_steps: int
    row_lanes: int
    column_lanes: int
    num_warps: int

    @property
    def rows(self) -> int:
        return self.row_steps * self.row_lanes

    @property
    def columns(self) -> int:
        return self.column_steps * self.column_lanes

    def most_registers(self, kernel: str, warp_size: int) -> int | None:
        """The limit of ``MOST_REGISTERS``; None: none is needed."""
        return MOST_REGISTERS.get((kernel, self.rows * self.columns // (self.num_warps * warp_size)))


def choose_cost_tiling(
    rows: int, columns: int, warp_size: int = 32, pairs_per_warp: int = PAIRS_PER_WARP
) -> CostTiling:
    """The tiling of at least so many rows and columns, in one piece.

    Warps are spread over both sides of it, so that no thread holds much of a vector along either.
    """
    lanes = warp_size // COLUMN_LANES
    rows = max(lanes, _power_of_two(rows))
    columns = max(COLUMN_LANES, _power_of_two(columns))
    num_warps = min(max(1, rows * columns // pairs_per_warp), MOST_WARPS[warp_size])
    row_warps = min(1 << num_warps.bit_length() // 2, rows // lanes)
    row_lanes = lanes * row_warps
    return CostTiling(rows // row_lanes, columns // COLUMN_LANES, row_lanes, COLUMN_LANES, num_warps)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True, slots=True)
class LinearTiling:
    """How the logits of LM heads are made and multiplied on the chip, see ``linear_divergence``.

    rows, columns: of a tile of logits. hidden: entries of the hidden size per step of the logits' product; product: those of
    dH or dW that a program owns. split: columns of a program in the forward; strip: columns whose gradient exists at a time;
    both are multiples of ``columns``.
    """

    rows: int
    columns: int
    hidden: int
    product: int
    num_warps: int
    num_stages: int
    split: int = 4096
    strip: int = 2048
    exact: bool = False
    """Whether NVIDIA's cores multiply float32 as it is, without tensor cores."""

    def launch(self, kernel: str) -> tuple[int, int | None]:
        """Warps of a program of ``linear_divergence_<kernel>``; the most registers of a thread, None: not limited."""
        return EXACT_LAUNCH.get(kernel, (self.num_warps, None)) if self.exact else (self.num_warps, None)


EXACT_LAUNCH = {"sweep": (8, 128), "gradient": (8, 128)}
"""Warps and registers where float32 is multiplied as it is: two programs to a multiprocessor.

With half the warps, a thread has twice the logits, and NVIDIA's compiler spills some at any number of registers; without a limit
it does to fit a third program. The kernel ``terms`` needs neither, and with the limit it would spill.
"""

LINEAR_STAGES = {32: 3, 64: 2}
"""Steps of a product whose operands are in shared memory at once, by the size of a warp: AMD's CDNA 3 has 64 KiB of it."""

FEWEST_ROWS = 16
"""Of a tile: tensor cores take no fewer."""


def choose_linear_tiling(
    rows: int, itemsize: int, both: bool = False, tf32: bool = False, warp_size: int = 32
) -> LinearTiling:
    """The tiling for so many rows of hidden states, whose wider elements have ``itemsize`` bytes, 2 or 4.

    both: whether both sides get a gradient, of which a thread then holds twice as much. tf32: whether float32 may be multiplied so.
    """
    few = max(FEWEST_ROWS, _power_of_two(rows))
    stages = LINEAR_STAGES[warp_size]
    if itemsize == 4:  # without tensor cores, unless TF32 is allowed; with three stages sm_80 spills kilobytes
        exact, columns = not tf32 and warp_size == 32, 32 if both and not tf32 else 64
        warps, stages = (8, stages) if tf32 else (4, 2)
        return LinearTiling(min(32, few), columns, 32, 64, num_warps=warps, num_stages=stages, exact=exact)
    return LinearTiling(min(64, few), 64 if both else 128, 64, 128, num_warps=8, num_stages=stages)

"""Which kernel, tile and grid: chosen from the shape by a count of registers, never by trying. Needs no Triton.

What was counted on (compiled ahead of time; ``tools/kernel_resources.py`` holds every choice against real targets):

* One pass needs M x C of state in registers: twice forward (queries, running sums), three times backward (queries,
  dz, dq). Beside them stand the tile and, per query, the partial sums of its products before they are exchanged.
* All warps lie along the channels, each thread with up to 16 bytes of neighbours: as many warps as a row gives work.
* Where no tile of a single token fits, or the row is too long, two passes read the tokens twice.
* Tokens of a sample are split over programs while the device has no more than two for each of its processors; what
  that costs in bytes is in ``traffic``.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = {32: 3, 64: 2}  # tiles in flight by lanes of a warp; each waits in shared memory, on AMD in registers
TILE_BYTES = 64 * 1024  # of shared memory, all stages: at least one program of any target, three of a data-centre GPU's
REGISTERS = {"forward": 236, "backward": 209.8}  # of 255 a thread, by the counts below
REGISTERS_16_WARPS = {"forward": 128, "backward": 120}  # 65,536 over 512 threads leave 128; counts run high there
SQUEEZED = (120, 132)  # forward, 8 warps: ptxas may spill to come down to 128, for a second program on a processor
REGISTERS_64_LANES, BLOCK_N_64_LANES = 160, 4  # AMD's compiler keeps more partial sums alive
# Of a thread, for a tile of several tokens: beyond it ptxas trades a spill for occupancy. Backward, one query or more.
TILE_REGISTERS = {"forward": (64, 64), "backward": (48, 32)}
EXTRAS = 24  # for a bias, a mask or weights: their values and addresses
UNEVEN = 1.05  # rows of no multiple of 16 channels cost registers for addresses
SPLIT_TOKENS = 32  # the least that is worth a program
TWO_PASS = {"block_c": 256, "project_n": 32, "project_c": 64, "project_first": 16, "warps": 4}


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    Attributes:
        passes: how often the tokens are read, 1 or 2.
        block_n: tokens in a tile.
        row_head, row_tail: channels of a row in two powers of two, the second possibly 0; for two passes the chunk of
            channels and 0.
        warps: of a program.
        stages: tiles in flight.
        tokens_per_split: how many tokens of a sample a program walks over.
        splits: programs per sample.
    """

    passes: int
    block_n: int
    row_head: int
    row_tail: int
    warps: int
    stages: int
    tokens_per_split: int
    splits: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below value >= 1."""
    return 1 << (value - 1).bit_length()


def make_plan(
    direction: str,
    batch: int,
    num_tokens: int,
    width: int,
    num_queries: int,
    itemsize: int,
    *,
    extras: bool = False,
    lanes: int = 32,
    processors: int = 128,
) -> Plan:
    """The plan for B = batch, N = num_tokens, C = width, M = num_queries and tokens of itemsize bytes.

    Args:
        direction: "forward" or "backward".
        extras: whether there is a bias, a mask, or weights to be returned or differentiated.
        lanes: threads of a warp: 32, or 64 on AMD's data-centre GPUs.
        processors: multiprocessors of the device.
    """
    tile = _one_pass_tile(direction, width, num_queries, itemsize, extras, lanes)
    if tile is None:
        passes, warps, row_tail = 2, TWO_PASS["warps"], 0
        row_head = min(TWO_PASS["block_c"], max(lanes * warps, power_of_two(width)))
        block_n = max(1, 32 // power_of_two(num_queries))
        programs = batch * -(-width // row_head)
    else:
        passes, programs = 1, batch
        warps, block_n, row_head, row_tail = tile
    splits = max(1, min(2 * processors // max(1, programs), num_tokens // SPLIT_TOKENS))
    per_split = -(-num_tokens // splits)
    per_split = -(-per_split // block_n) * block_n
    return Plan(passes, block_n, row_head, row_tail, warps, STAGES[lanes], per_split, -(-num_tokens // per_split))


def _one_pass_tile(
    direction: str, width: int, num_queries: int, itemsize: int, extras: bool, lanes: int
) -> tuple[int, int, int, int] | None:
    """(warps, block_n, row_head, row_tail) of the first choice that fits and keeps four tokens.

    Else of the choice with the most tokens; None where nothing fits.
    """
    best = None
    for warps in _warps(width, itemsize, lanes):
        # On 64 lanes the compiler gives the two parts different layouts and moves tiles between them: no second part.
        whole = max(lanes * warps, power_of_two(width))
        row_head, row_tail = _row(width, lanes * warps) if lanes == 32 else (whole, 0)
        for block_n in (16, 8, 4, 2, 1):
            if STAGES[lanes] * block_n * (row_head + row_tail) * itemsize <= TILE_BYTES and _fits(
                direction, block_n, width, (row_head + row_tail) // (lanes * warps), num_queries, extras, warps, lanes
            ):
                if best is None or block_n > best[1]:
                    best = (warps, block_n, row_head, row_tail)
                break
        if best is not None and best[1] >= 4:
            break
    return best


def _warps(width: int, itemsize: int, lanes: int) -> list[int]:
    """Warps to try: first so many that each thread reads 16 bytes of the row, then two, four and eight times those."""
    full = max(lanes, 1 << (width.bit_length() - 1))
    first = min(8, max(1, full * itemsize // (16 * lanes)))
    most = min(512, max(lanes, power_of_two(width))) // lanes
    return [warps for warps in (first, 2 * first, 4 * first, 8 * first) if warps <= most]


def _row(width: int, threads: int) -> tuple[int, int]:
    """(row_head, row_tail) that cover the width, both powers of two with a channel for every thread.

    row_tail is 0 where a second part would save nothing.
    """
    whole = max(threads, power_of_two(width))
    row_head = whole // 2
    if row_head < threads or width <= row_head:
        return whole, 0
    row_tail = max(threads, power_of_two(width - row_head))
    return (row_head, row_tail) if row_tail < row_head else (whole, 0)


def _fits(
    direction: str, block_n: int, width: int, channels: int, num_queries: int, extras: bool, warps: int, lanes: int
) -> bool:
    """Whether a thread with so many channels of a row has the registers; the coefficients were fitted to ptxas."""
    padded = power_of_two(num_queries)
    if block_n > 1 and block_n * channels > TILE_REGISTERS[direction][padded > 1]:
        return False
    if direction == "forward":
        needed = 2.1 * padded * channels + block_n * channels + 2 * block_n * padded + 32
    else:
        needed = 3.9 * padded * channels + 2 * block_n * channels + 3 * block_n * padded + 20
    needed = needed * (1 if width % 16 == 0 else UNEVEN) + EXTRAS * extras
    if lanes == 64:
        return needed <= REGISTERS_64_LANES and block_n <= BLOCK_N_64_LANES
    if direction == "forward" and warps == 8 and SQUEEZED[0] < needed < SQUEEZED[1]:
        return False
    limit = REGISTERS_16_WARPS if warps >= 16 else REGISTERS
    return needed <= limit[direction]

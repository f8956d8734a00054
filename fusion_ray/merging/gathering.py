"""What SCE selects of a tensor, gathered in one pass over it. Called by sce.py.

While a block's variances are in the cache, every position whose rank may be among the selected ones is noted with its base and its task vectors: those above a
bound that the ranks seen so far set, with a margin. The exact threshold is found among them afterwards. Where a later block shows that a bound was too high,
or where there is no room for what is noted, nothing is gathered and the caller goes over the tensor again and again instead, with the same result.

The record of a chunk, of its s positions: their ranks (s,), their places in the chunk (s,), their base (s,) and their task vectors (M, s), one after the other
in one array of 32-bit numbers. Once the threshold is known the record is closed up to the selected positions and loses its ranks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging import vectors
from fusion_ray.merging.blocks import CHUNK, Block, Blocks, Doubles, Floats, Inputs, Scratch, exact_sum
from fusion_ray.merging.kernels import LANES, chunks_of, gather, gather_delta, square_at
from fusion_ray.merging.selection import (
    HALF,
    NOTHING,
    Places,
    Ranks,
    Selection,
    add_lower_histogram,
    add_upper_histogram,
    find_bin,
    places_of,
    rank_variance,
)
from fusion_ray.merging.vectors import NOTED

Records = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
_MARGIN = 1.1  # candidates for each position that the ranks seen so far would select
_ROOM = 1.3  # records for each position that will be selected


@dataclass(frozen=True)
class Gathered:
    """The selected positions of a tensor; `squares` are the sums of the squares of each target's task vector there."""

    records: Records
    offsets: Counts  # (chunks + 1,) where the record of each chunk begins
    counts: Counts  # (chunks,) its selected positions
    squares: tuple[float, ...]

    def of(self, block: Block) -> tuple[Counts, Counts]:
        """The offsets and the counts of a block's chunks."""
        first = block.start // CHUNK
        chunks = slice(first, first + chunks_of(block.size))
        return self.offsets[chunks], self.counts[chunks]


def gather_selected(blocks: Blocks, select_topk: float) -> Gathered | None:
    """The first int(select_topk * number) of the positions whose variance is not zero; None where one pass does not do. Uses `blocks.kept`."""
    numbers = blocks.targets + 3  # of a position
    room = numbers * (int(_ROOM * select_topk * blocks.size) + CHUNK)
    if room * np.dtype(np.uint32).itemsize > blocks.spare:
        return None
    records = blocks.kept.take(1, room)[0]
    offsets = np.zeros(chunks_of(blocks.size) + 1, np.int64)
    upper, zeros = np.zeros((1, HALF), np.int64), np.zeros(1, np.int64)
    scratch = Scratch(np.uint32)
    highest = 0
    for block in blocks:
        ranks = scratch.take(1, block.size)
        rank_variance(block, ranks)
        add_upper_histogram(ranks, upper, zeros)
        seen = block.start + block.size
        bin = int(_lowest_bin(upper[0], int(_MARGIN * select_topk * (seen - int(zeros[0]))) + 1))
        highest = max(highest, bin)
        first = block.start // CHUNK
        of_block = offsets[first : first + chunks_of(block.size) + 1]
        if not _note(block.inputs, ranks[0], np.uint32(max(bin << 16, 1)), records, of_block):
            return None
    wanted = int(select_topk * (blocks.size - int(zeros[0])))
    selection = NOTHING
    if wanted > 0:
        bin, above = find_bin(upper[0], wanted)
        if bin < highest:
            return None
        lower = np.zeros(HALF, np.int64)
        _lower_histogram(records, offsets, numbers, bin, lower)
        low, above_low = find_bin(lower, wanted - above)
        selection = Selection(bin << 16 | low, wanted - above - above_low)
    counts, sums = np.empty(offsets.size - 1, np.int64), np.empty((blocks.targets, offsets.size - 1))
    remaining = np.array([selection.ties], np.int64)
    _close_up(records, offsets, np.uint32(selection.threshold), remaining, counts, sums)
    return Gathered(records, offsets, counts, tuple(exact_sum([row]) for row in sums))


@njit(cache=True, nogil=True)
def selected_of(records: Records, offset: int, count: int, targets: int) -> tuple[Records, Floats, Floats]:
    """Of a record that was closed up the (s,) places, the (s,) base and the (M, s) task vectors."""
    record = records[offset : offset + (targets + 2) * count]
    floats = record.view(np.float32)
    return record[:count], floats[count : 2 * count], floats[2 * count :].reshape(targets, count)


@njit(cache=True, nogil=True)
def _lowest_bin(histogram: npt.NDArray[np.int64], count: int) -> int:
    """As `find_bin`, once a block and therefore without a sum of all bins; 0 where there are fewer entries."""
    left = count
    for bin in range(histogram.size - 1, 0, -1):
        left -= histogram[bin]
        if left <= 0:
            return bin
    return 0


@njit(cache=True, nogil=True)
def _note(inputs: Inputs, ranks: Ranks, least: np.uint32, records: Records, offsets: Counts) -> bool:
    """The records of a block, of the positions whose rank is `least` or more; False where they have no room."""
    M = inputs.addresses.size - 1
    places, rows = np.empty(CHUNK, np.int64), np.empty((M + 3, NOTED), np.uint32)
    for chunk in range(offsets.size - 1):
        start = chunk * CHUNK
        of_chunk = ranks[start : start + CHUNK]
        if inputs.bfloat16 and of_chunk.size == CHUNK and 2 <= M <= 4:
            addresses, first, into = inputs.addresses.ctypes.data, of_chunk.ctypes.data, rows.ctypes.data
            if M == 2:
                count = vectors.note_of_2(addresses, start, first, np.int64(least), into)
            elif M == 3:
                count = vectors.note_of_3(addresses, start, first, np.int64(least), into)
            else:
                count = vectors.note_of_4(addresses, start, first, np.int64(least), into)
        else:
            count = _note_chunk(inputs, start, of_chunk, least, places, rows)
        at = offsets[chunk]
        offsets[chunk + 1] = at + (M + 3) * count
        if offsets[chunk + 1] > records.size:
            return False
        for row in range(M + 3):
            noted, made = records[at + row * count : at + (row + 1) * count], rows[row]
            for s in range(noted.size):
                noted[s] = made[s]
    return True


@njit(cache=True, nogil=True)
def _note_chunk(inputs: Inputs, start: int, ranks: Ranks, least: np.uint32, places: Places, rows: Records) -> int:
    """One chunk, to the (M + 3, NOTED) rows; how many positions."""
    count = 0
    for i in range(ranks.size):
        places[count] = i
        count += ranks[i] >= least
    for s in range(count):
        rows[0, s] = ranks[places[s]]
        rows[1, s] = np.uint32(places[s])
    floats = rows.view(np.float32)
    base = floats[2, :count]
    gather(inputs, 0, start, places, base)
    for j in range(rows.shape[0] - 3):
        gather_delta(inputs, j, start, places, base, floats[3 + j, :count])
    return count


@njit(cache=True, nogil=True)
def _lower_histogram(
    records: Records, offsets: Counts, numbers: int, bin: int, histogram: npt.NDArray[np.int64]
) -> None:
    """As `add_lower_histogram`, of the ranks in the records."""
    for chunk in range(offsets.size - 1):
        count = (offsets[chunk + 1] - offsets[chunk]) // numbers
        add_lower_histogram(records[offsets[chunk] : offsets[chunk] + count], np.uint32(bin), histogram)


@njit(cache=True, nogil=True)
def _close_up(
    records: Records, offsets: Counts, least: np.uint32, remaining: Counts, counts: Counts, sums: Doubles
) -> None:
    """Leave the selected positions in the records, in place: a number never moves up. Their `counts`, and the chunk sums of the squares of each task vector, as
    `kernels.dot` adds them up over all elements of a chunk: those that are not selected add nothing."""
    M = sums.shape[0]
    chosen, lanes, floats = np.empty(CHUNK, np.int64), np.empty(LANES, np.float64), records.view(np.float32)
    for chunk in range(counts.size):
        at = offsets[chunk]
        noted = (offsets[chunk + 1] - at) // (M + 3)
        count = places_of(records[at : at + noted], least, remaining, chosen)
        counts[chunk] = count
        for row in range(M + 2):
            source = records[at + (row + 1) * noted : at + (row + 2) * noted]
            into = records[at + row * count : at + (row + 1) * count]
            for s in range(count):
                into[s] = source[chosen[s]]
        places = records[at : at + count]
        for j in range(M):
            sums[j, chunk] = square_at(floats[at + (2 + j) * count : at + (3 + j) * count], places, lanes)

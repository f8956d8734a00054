"""The nearest string of a vocabulary by edit distance, for a whole vocabulary of strings in seconds (the map `min_edit`).
Called by `maps.py` and `fusechat_maps.py`.

Myers' bit-parallel distance (64 symbols a word) for the candidates that pass two lower bounds: the difference of lengths (candidates are
visited nearest length first) and of the symbols they are made of, in a word of 64 bits.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit
from rapidfuzz.distance import Levenshtein

WORD = 64
NOTHING = -1
ONE = np.uint64(1)


def nearest(
    texts: Sequence[str] | Sequence[bytes], candidates: Sequence[str] | Sequence[bytes]
) -> npt.NDArray[np.int64]:
    """(N,) for every text the index of the candidate with the least Levenshtein distance, of equally near ones the first; -1 for an empty text
    and where all candidates are empty: an empty string stands for no token."""
    symbols, sizes = _symbols([*texts, *candidates])
    _, dense = np.unique(symbols, return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    count = len(texts)
    order = np.argsort(sizes[count:], kind="stable")
    first_of_length = np.searchsorted(sizes[count:][order], np.arange(int(sizes[count:].max(initial=0)) + 2))
    found = _nearest(dense, starts, count, order, first_of_length, int(dense.max(initial=0)) + 1)
    for place in np.flatnonzero(sizes[:count] > WORD):  # no vocabulary has more than a few so long
        distances = [Levenshtein.distance(texts[place], other) if other else np.inf for other in candidates]
        found[place] = int(np.argmin(distances)) if np.isfinite(distances).any() else NOTHING
    return found


def _symbols(strings: Sequence[str | bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """All characters (or bytes) one after another, and how many each string has."""
    sizes = np.fromiter((len(text) for text in strings), np.int64, len(strings))
    if strings and isinstance(strings[0], bytes):
        return np.frombuffer(b"".join(strings), np.uint8).astype(np.uint32), sizes  # type: ignore[arg-type]  # all are bytes
    joined = "".join(strings).encode("utf-32-le", "surrogatepass")  # type: ignore[arg-type]  # all are str
    return np.frombuffer(joined, np.uint32), sizes


@njit(cache=True)
def _nearest(symbols, starts, count, order, first_of_length, alphabet):  # type: ignore[no-untyped-def]  # compiled, see nearest
    found = np.full(count, NOTHING, np.int64)
    longest = first_of_length.size - 2
    sets = np.empty(order.size, np.uint64)
    for at in range(order.size):
        sets[at] = _set_of(symbols, starts[count + order[at]], starts[count + order[at] + 1])
    places = np.zeros(alphabet, np.uint64)  # bit i: the text's i-th symbol is this one
    for number in range(count):
        begin, end = starts[number], starts[number + 1]
        length = end - begin
        if length == 0 or length > WORD:
            continue
        for index in range(begin, end):
            places[symbols[index]] |= ONE << np.uint64(index - begin)
        mine = _set_of(symbols, begin, end)
        best, best_at = longest + length, np.int64(NOTHING)
        for off in range(max(length, longest) + 1):
            if off > best:
                break
            for sign in range(2 if off else 1):
                other = length - off if sign == 0 else length + off
                if other < 1 or other > longest:
                    continue
                for at in range(first_of_length[other], first_of_length[other + 1]):
                    candidate = order[at]
                    bound = max(off, _bits(mine & ~sets[at]), _bits(sets[at] & ~mine))
                    if bound > best or (bound == best and best_at != NOTHING and candidate > best_at):
                        continue
                    distance = _distance(
                        places, length, symbols, starts[count + candidate], starts[count + candidate + 1]
                    )
                    if distance < best or (distance == best and (candidate < best_at or best_at == NOTHING)):
                        best, best_at = distance, candidate
        found[number] = best_at
        for index in range(begin, end):
            places[symbols[index]] = np.uint64(0)
    return found


@njit(cache=True)
def _set_of(symbols, begin, end):  # type: ignore[no-untyped-def]  # compiled, see nearest
    """32 classes of symbols with two bits each: the class occurs, it occurs again."""
    bits = np.uint64(0)
    for index in range(begin, end):
        bit = ONE << np.uint64(2 * (symbols[index] & 31))
        bits |= bit << np.uint64(1 if bits & bit else 0)
    return bits


@njit(cache=True)
def _bits(word):  # type: ignore[no-untyped-def]  # compiled, see nearest
    word = word - ((word >> ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True)
def _distance(places, length, symbols, begin, end):  # type: ignore[no-untyped-def]  # compiled, see nearest
    """Myers 1999 in Hyyrö's form: `up` and `down` hold where the column's vertical differences are +1 and -1."""
    last = ONE << np.uint64(length - 1)
    up, down = ~np.uint64(0), np.uint64(0)
    distance = length
    for index in range(begin, end):
        same = places[symbols[index]] | down
        diagonal = (((same & up) + up) ^ up) | same
        right, back = down | ~(diagonal | up), diagonal & up
        if right & last:
            distance += 1
        elif back & last:
            distance -= 1
        right = right << ONE | ONE
        up, down = back << ONE | ~(diagonal | right), right & diagonal
    return distance

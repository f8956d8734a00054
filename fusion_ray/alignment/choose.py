"""Which of pivot and source teaches: MinCE (paper.md 1.2), by sequence or by token, in bits per byte or nats per token. Called by `workers/aligner.py`.

Cross-entropies are sums; the mean is over what both sides have: a token behind the other side's cut is left out, so that a row which one
tokenizer cuts early is judged on the same text.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.alignment.positions import Bools, Positions

Choice = Literal["min_ce", "avg_ce", "source", "pivot"]
LN2 = float(np.log(2.0))


@dataclass(frozen=True)
class CrossEntropy:
    """(rows,) sums over one side's positions that the other side covers too."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]

    @property
    def per_token(self) -> npt.NDArray[np.float64]:
        """Nats per token; infinite where there is no token (no evidence loses against any)."""
        return _ratio(self.nats, self.tokens)

    @property
    def per_byte(self) -> npt.NDArray[np.float64]:
        """Bits per byte; infinite where there is no byte."""
        return _ratio(self.nats / LN2, self.bytes)


def cross_entropy(mine: Positions, other: Positions, rows: int) -> CrossEntropy:
    """Of the true labels under the model of `mine`. A token counts where it ends no later than the other side's last token of that message,
    an end of turn where the other side has it too."""
    shared = _covered(mine.message_key, mine.start, mine.end, other.message_key, other.start, other.end)
    row = mine.row[shared]
    return CrossEntropy(
        np.bincount(row, -mine.label_logprob[shared].astype(np.float64), rows).astype(np.float64),
        np.bincount(row, minlength=rows).astype(np.int64),
        np.bincount(row, (mine.end - mine.start)[shared], rows).astype(np.int64),
    )


def source_wins_rows(
    pivot: CrossEntropy, source: CrossEntropy, *, choose: Choice = "min_ce", unit: Literal["byte", "token"] = "byte"
) -> Bools:
    """(rows,) True where the source's mean is lower; ties go to the pivot. Of `avg_ce` too: it is who tells the text better, though both teach."""
    if choose not in ("min_ce", "avg_ce"):
        return np.full(pivot.nats.shape, choose == "source")
    if unit == "byte":
        return np.asarray(source.per_byte < pivot.per_byte)
    return np.asarray(source.per_token < pivot.per_token)


def source_wins_tokens(
    pivot: Positions,
    source: Positions,
    source_index: npt.NDArray[np.int32],
    known: Bools,
    *,
    choose: Choice = "min_ce",
    unit: Literal["byte", "token"] = "byte",
) -> Bools:
    """(N,) True where the matched source token's cross-entropy is below the pivot token's; never where the source has no distribution.

    With `byte` each is divided by the bytes of its own token (an end of turn counts as one byte on both sides).
    """
    if choose not in ("min_ce", "avg_ce"):
        return known & (choose == "source")
    ce_pivot, ce_source = token_cross_entropies(pivot, source, source_index, known, unit=unit)
    return np.asarray(ce_source < ce_pivot)


def token_cross_entropies(
    pivot: Positions,
    source: Positions,
    source_index: npt.NDArray[np.int32],
    known: Bools,
    *,
    unit: Literal["byte", "token"] = "byte",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(N,) of the pivot's token and of the matched source token, in nats (with `byte`: over the bytes of its own token, an end of turn counts as one); infinite
    for the source where it has no distribution."""
    ce_pivot = -pivot.label_logprob.astype(np.float64)
    ce_source = np.full(pivot.count, np.inf)
    at = np.flatnonzero(known)
    matched = source_index[at]
    ce_source[at] = -source.label_logprob[matched].astype(np.float64)
    if unit == "byte":
        ce_pivot /= np.maximum(1, pivot.end - pivot.start)
        ce_source[at] /= np.maximum(1, source.end[matched] - source.start[matched])
    return ce_pivot, ce_source


@njit(cache=True)
def _covered(  # type: ignore[no-untyped-def]  # compiled, see cross_entropy
    key, start, end, other_key, other_start, other_end
):
    """(N,) by one walk over both sides, which are sorted by message and byte."""
    covered = np.zeros(key.size, np.bool_)
    j = 0  # behind the other side's last position of the same message
    for i in range(key.size):
        while j < other_key.size and other_key[j] <= key[i]:
            j += 1
        if j == 0 or other_key[j - 1] != key[i]:
            continue
        last = other_end[j - 1]
        if start[i] == end[i]:
            covered[i] = other_start[j - 1] == last and last == end[i]
        else:
            covered[i] = end[i] <= last
    return covered


def _ratio(total: npt.NDArray[np.float64], count: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    result = np.full(total.shape, np.inf)
    np.divide(total, count, out=result, where=count > 0)
    return result

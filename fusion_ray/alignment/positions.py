"""The predicting positions of one model over many rows, as flat arrays, and what may be wrong with them. Called by `methods.py` and `workers/aligner.py`.

Positions are sorted by row, message and byte. Letters: N positions, K top-k.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
MESSAGES_PER_ROW = 1 << 16  # message numbers are int16 in the records
ROUNDING = 1e-2  # a float16 log-probability of an almost sure token may round above zero by less


@dataclass(frozen=True)
class Positions:
    """All arrays are (N,), `topk_*` (N, K). Rows are numbered alike on both sides of an alignment."""

    row: npt.NDArray[np.int64]
    message: npt.NDArray[np.int64]  # within the row
    start: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    label_logprob: npt.NDArray[np.float32]
    topk_ids: npt.NDArray[np.int32]
    topk_logprobs: npt.NDArray[np.float32]

    @property
    def count(self) -> int:
        return int(self.row.size)

    @cached_property
    def message_key(self) -> npt.NDArray[np.int64]:
        """(N,) one number a message over all rows, ascending."""
        return self.row * MESSAGES_PER_ROW + self.message

    @cached_property
    def turn_ends(self) -> Bools:
        """(N,) True where the label is the end of a turn."""
        return self.start == self.end

    @property
    def opens_message(self) -> Bools:
        key = self.message_key
        return np.concatenate([np.ones(min(1, key.size), np.bool_), key[1:] != key[:-1]])

    @property
    def closes_content(self) -> Bools:
        """(N,) True at the last token of a message's content."""
        key = self.message_key
        ends = np.ones(key.size, np.bool_)
        ends[:-1] = (key[1:] != key[:-1]) | self.turn_ends[1:]
        return ends & ~self.turn_ends

    def of_rows(self, keep: Bools) -> "Positions":
        """The positions of the rows with `keep[row]`, the rows numbered anew."""
        number = np.cumsum(keep) - 1
        chosen = keep[self.row]
        return Positions(
            number[self.row[chosen]].astype(np.int64),
            self.message[chosen],
            self.start[chosen],
            self.end[chosen],
            self.label[chosen],
            self.label_logprob[chosen],
            self.topk_ids[chosen],
            self.topk_logprobs[chosen],
        )


def faults(positions: Positions, size: int) -> list[tuple[str, Bools]]:
    """What no sound teacher row holds, as (reason, (N,) mask), the gravest first. `size` is the number of the vocabulary's ids."""
    key, start, end = positions.message_key, positions.start, positions.end
    follows = np.zeros(key.size, np.bool_)
    follows[1:] = key[1:] == key[:-1]
    broken = (end < start) | (start < 0)
    # Gaps are sound: blanks that a template strips or an added token swallows are bytes of no token.
    broken[1:] |= follows[1:] & (start[1:] < end[:-1])
    broken[1:] |= key[1:] < key[:-1]
    ids, topk = positions.topk_ids, positions.topk_logprobs
    # The extremes say of nearly every shard that all is well, without (N, K) masks. A NaN makes the maximum NaN, which is not below anything.
    if topk.size and topk.max() <= ROUNDING and ids.min() >= 0 and ids.max() < size:
        ids, topk = ids[:, :0], topk[:, :0]
    return [
        (
            f"an id outside the vocabulary of {size}",
            _outside(positions.label, size) | _outside(ids, size).any(axis=-1),
        ),
        ("a log-probability that is NaN", np.isnan(topk).any(axis=-1) | np.isnan(positions.label_logprob)),
        ("a positive log-probability", (topk > ROUNDING).any(axis=-1) | (positions.label_logprob > ROUNDING)),
        ("a label of probability zero", np.isneginf(positions.label_logprob)),
        ("token spans out of order", broken),
    ]


def _outside(ids: npt.NDArray[np.int32], size: int) -> Bools:
    return (ids < 0) | (ids >= size)

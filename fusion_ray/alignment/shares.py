"""A source token as several pivot tokens, each with its share: what the pivot wrote where the source wrote that token. The map `shares`.

Where the pivot has the longer tokens, a source token begins many of them, and one pivot id is a wrong target for all but one: " th" is " the", " they" or
" that". Which of them is meant depends on what follows, which a teacher tells for its own text alone (`project.py`, chain); for its other candidates the
corpus tells how often each was meant. Called by `workers/aligner.py`; `project.py` reads it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.vocabulary import Vocabulary

MOST = 16  # pivot ids that one source id is shared among
PRIOR = 1.0  # how often the id of the fallback map counts as met, beside the corpus


class Shares(NamedTuple):
    """Of source id s the pivot ids `ids[offsets[s]:offsets[s + 1]]` with `weights` that add up to 1; none where the fallback map holds alone."""

    offsets: npt.NDArray[np.int64]  # (V of the source + 1,)
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]

    @classmethod
    def none(cls, source: Vocabulary) -> "Shares":
        return cls(np.zeros(source.size + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float64))

    @property
    def most(self) -> int:
        """The largest number of pivot ids of one source id."""
        return int(np.diff(self.offsets).max(initial=0))


def pair_shares(source: Vocabulary, pivot: Vocabulary, counts: PairCounts, mapped: npt.NDArray[np.int32]) -> Shares:
    """Shares by `counts`, `mapped` (V of the source,) being the fallback map, which counts as met PRIOR times more.

    Only pairs where one token begins with the other are counted: at the edge of a message a token may also cover bytes of the template. Equal
    vocabularies need no shares.
    """
    if source.same_as(pivot):
        return Shares.none(source)
    mine, theirs, often = counts.source_ids, counts.pivot_ids, counts.counts.astype(np.float64)
    keep = ~source.is_special[mine] & ~pivot.is_special[theirs]
    keep[keep] = [
        _begins(source.pieces[s], pivot.pieces[p])
        for s, p in zip(mine[keep].tolist(), theirs[keep].tolist(), strict=True)
    ]
    mine, theirs, often = mine[keep], theirs[keep], often[keep]
    seen = np.unique(mine)
    seen = seen[mapped[seen] >= 0]
    mine, theirs = np.concatenate([mine, seen]), np.concatenate([theirs, mapped[seen].astype(np.int64)])
    often = np.concatenate([often, np.full(seen.size, PRIOR)])
    pairs, place = np.unique(np.stack([mine, theirs]), axis=1, return_inverse=True)
    sums = np.bincount(place.reshape(-1), often, pairs.shape[1])
    order = np.lexsort((pairs[1], -sums, pairs[0]))
    source_id, pivot_id, sums = pairs[0][order], pairs[1][order], sums[order]
    first = np.searchsorted(source_id, source_id)  # where each source id's pairs begin
    kept = np.arange(source_id.size) - first < MOST
    source_id, pivot_id, sums = source_id[kept], pivot_id[kept], sums[kept]
    total = np.bincount(source_id, sums, source.size)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(source_id, minlength=source.size))]).astype(np.int64)
    return Shares(offsets, pivot_id.astype(np.int32), sums / total[source_id])


def _begins(first: bytes, second: bytes) -> bool:
    return bool(first) and bool(second) and (first.startswith(second) or second.startswith(first))

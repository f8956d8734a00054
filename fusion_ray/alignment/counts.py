"""How often each source id meets each pivot id: sparse sums that shards add up, 16 bytes a pair seen. Called by `fusechat.py`, the `statistics` maps
and `workers/aligner.py`.

The published code keeps a dense float64 matrix of both vocabularies (paper.md Q10: 36 GiB for 32,002 x 151,646).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SHIFT = 32  # key = source id << SHIFT | pivot id: sorted by source id, then by pivot id


@dataclass(frozen=True)
class PairCounts:
    """Sorted distinct keys and how often each was met."""

    keys: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def none(cls) -> "PairCounts":
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def of_pairs(
        cls,
        source_ids: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        pivot_ids: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64] | None = None,
    ) -> "PairCounts":
        """The n-th source id met the n-th pivot id `counts[n]` times, once by default; a pair may come several times."""
        keys = source_ids.astype(np.int64) << SHIFT | pivot_ids.astype(np.int64)
        distinct, place = np.unique(keys, return_inverse=True)
        sums = np.zeros(distinct.size, np.int64)
        np.add.at(sums, place, 1 if counts is None else counts)
        return cls(distinct, sums)

    @property
    def source_ids(self) -> npt.NDArray[np.int64]:
        return self.keys >> SHIFT

    @property
    def pivot_ids(self) -> npt.NDArray[np.int64]:
        return self.keys & ((1 << SHIFT) - 1)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.counts.nbytes

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts.of_pairs(
            np.concatenate([self.source_ids, other.source_ids]),
            np.concatenate([self.pivot_ids, other.pivot_ids]),
            np.concatenate([self.counts, other.counts]),
        )

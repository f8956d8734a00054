"""What an alignment covered and what it lost: sums that shards add up, and the shares that the report shows.

Called by `workers/aligner.py` and `stages/align.py`.

All shares have stated denominators: `coverage` is of all pivot positions, `mass_kept` and `top1_agreement` of projected ones, `one_hot` of the positions
that the source won (the label alone teaches there), `source_won` of rows, `positions_won` (those that MinCE gave to the source) and
`positions_from_source` (those of them that it has something to say at) of all pivot positions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.methods import Aligned, Side
from fusion_ray.alignment.vocabulary import Vocabulary

KINDS = ("strict", "comparable", "inside", "none")
PAIRS_A_SHARD = 64
PAIRS_SHOWN = 20
BLOCK = 4096  # positions
LISTS = ("kinds", "pairs")


@dataclass(frozen=True)
class Coverage:
    """Sums over rows. `pairs`: [source id, pivot id or -1, mass moved, positions], the heaviest whose bytes differ."""

    rows: int = 0
    rows_won: int = 0
    kinds: list[int] = field(default_factory=lambda: [0] * len(KINDS))
    projected: int = 0
    mass: float = 0.0
    top1_same: int = 0
    from_source: int = 0
    without_target: int = 0
    pairs: list[list[float]] = field(default_factory=list)

    def __add__(self, other: "Coverage") -> "Coverage":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name not in LISTS}
        kinds = [mine + theirs for mine, theirs in zip(self.kinds, other.kinds, strict=True)]
        return Coverage(**sums, kinds=kinds, pairs=_add_pairs(self.pairs, other.pairs))

    def to_dict(self) -> dict[str, int | float | list[int] | list[list[float]]]:
        return asdict(self)

    def summary(self, pivot: Vocabulary, source: Vocabulary) -> dict[str, object]:
        """The shares; 0 where a denominator is."""
        positions = sum(self.kinds)
        of_source = self.from_source + self.without_target
        return {
            "rows": self.rows,
            "positions": positions,
            "coverage": {name: _share(count, positions) for name, count in zip(KINDS, self.kinds, strict=True)},
            "mass_kept": _share(self.mass, self.projected),
            "top1_agreement": _share(self.top1_same, self.projected),
            "source_won": _share(self.rows_won, self.rows),
            "positions_won": _share(of_source, positions),
            "positions_from_source": _share(self.from_source, positions),
            "one_hot": _share(self.without_target, of_source),
            "worst_pairs": [
                {
                    "source": _text(source, int(source_id)),
                    "pivot": _text(pivot, int(pivot_id)) if pivot_id >= 0 else None,
                    "mass": mass,
                    "positions": int(count),
                }
                for source_id, pivot_id, mass, count in sorted(self.pairs, key=lambda pair: (-pair[2], pair[0]))[
                    :PAIRS_SHOWN
                ]
            ],
        }


def measure(aligned: Aligned, pivot: Side, source: Side, mapped: npt.NDArray[np.int32], rows: int) -> Coverage:
    """The sums of one shard's rows."""
    projection = aligned.projection
    known = projection.known & ~projection.one_hot
    theirs = aligned.from_source | ~aligned.has_target
    best = pivot.positions.topk_ids[:, 0]
    return Coverage(
        rows=rows,
        rows_won=int(aligned.source_won.sum()),
        kinds=np.bincount(aligned.kind, minlength=len(KINDS)).tolist(),
        projected=int(known.sum()),
        mass=_mass(projection.topk_logprobs, known),
        top1_same=int((projection.topk_ids[known, 0] == best[known]).sum()),
        from_source=int((aligned.from_source & ~projection.one_hot).sum()),
        without_target=int((theirs & (~aligned.has_target | projection.one_hot)).sum()),
        pairs=_worst_pairs(projection.moved, projection.seen, mapped, pivot.vocabulary, source.vocabulary),
    )


def _worst_pairs(
    moved: npt.NDArray[np.float64],
    seen: npt.NDArray[np.int64],
    mapped: npt.NDArray[np.int32],
    pivot: Vocabulary,
    source: Vocabulary,
) -> list[list[float]]:
    heavy = np.flatnonzero(moved > 0)
    wanted = 4 * PAIRS_A_SHARD
    while True:
        # Only the heaviest are sorted, with all that tie with the last of them, so that the order is that of a stable sort of the whole.
        floor = np.partition(moved[heavy], -wanted)[-wanted] if heavy.size > wanted else 0.0
        chosen = heavy[moved[heavy] >= floor]
        pairs = _changed_pairs(chosen[np.argsort(-moved[chosen], kind="stable")], moved, seen, mapped, pivot, source)
        if len(pairs) == PAIRS_A_SHARD or chosen.size == heavy.size:
            return pairs
        wanted *= 8


def _changed_pairs(
    order: npt.NDArray[np.int64],
    moved: npt.NDArray[np.float64],
    seen: npt.NDArray[np.int64],
    mapped: npt.NDArray[np.int32],
    pivot: Vocabulary,
    source: Vocabulary,
) -> list[list[float]]:
    pairs: list[list[float]] = []
    for number in order.tolist():
        target = int(mapped[number])
        same = target >= 0 and (source.is_special[number] or source.pieces[number] == pivot.pieces[target])
        if not same:
            pairs.append([number, target, round(float(moved[number]), 6), int(seen[number])])
        if len(pairs) == PAIRS_A_SHARD:
            break
    return pairs


def _mass(logprobs: npt.NDArray[np.float32], known: npt.NDArray[np.bool_]) -> float:
    """Sum of the probabilities (N, K) at the positions `known`, a block at a time: in doubles the whole would not stay in the caches."""
    blocks = range(0, known.size, BLOCK)
    mass = [np.exp(logprobs[at : at + BLOCK].astype(np.float64)).sum(axis=-1)[known[at : at + BLOCK]] for at in blocks]
    return float(np.concatenate([np.zeros(0), *mass]).sum())


def _add_pairs(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[list[float]]:
    sums: dict[tuple[float, float], list[float]] = {}
    for source_id, pivot_id, mass, count in (*first, *second):
        entry = sums.setdefault((source_id, pivot_id), [source_id, pivot_id, 0.0, 0])
        entry[2] += mass
        entry[3] += count
    return list(sums.values())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _text(vocabulary: Vocabulary, number: int) -> str:
    return vocabulary.pieces[number].decode("utf-8", "backslashreplace")

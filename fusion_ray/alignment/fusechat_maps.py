"""The papers' vocabulary maps over token strings: EM, MinED and MS (paper.md 1.3 (b)). Called by `workers/aligner.py` for the method `fusechat`."""

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.edit_distance import pair_distances
from fusion_ray.alignment.nearest import nearest
from fusion_ray.alignment.token_strings import UNKNOWN, TokenStrings, same_pieces

CONTAINED = 0.1  # what the published code multiplies a distance with where one string contains the other


def row_map(
    name: str, source: TokenStrings, pivot: TokenStrings, counts: PairCounts | None = None
) -> npt.NDArray[np.int32]:
    """What moves a row: an id whose piece (markers exchanged) is a pivot piece goes there, whatever the map; the map `name` has the others.

    `exact` drops them. Raises ValueError for `statistics` without counts and for another name.
    """
    if name == "exact":
        return same_pieces(source, pivot)
    if name == "min_edit":
        return min_edit_strings(source, pivot)
    if name != "statistics" or counts is None:
        raise ValueError(f"no map {name!r}: exact, min_edit, or statistics with the counts of a corpus")
    same = same_pieces(source, pivot)
    return np.where(same == UNKNOWN, statistics_strings(source, pivot, counts), same).astype(np.int32)


def min_edit_strings(source: TokenStrings, pivot: TokenStrings) -> npt.NDArray[np.int32]:
    """MinED as meant: source id -> the pivot id of the nearest piece by edit distance, of equally near ones the lowest; -1 for ids without a piece.

    The published `soft` mode cannot run (paper.md Q1-Q3). Its ties would fall to the first entry of `get_vocab()`, whose order tokenizers do not fix.
    """
    mapped = same_pieces(source, pivot)
    missing = np.flatnonzero(mapped == UNKNOWN)
    texts = [source.with_marker(source.pieces[number], pivot.marker) for number in missing.tolist()]
    mapped[missing] = nearest(texts, pivot.pieces)
    return mapped


def statistics_strings(source: TokenStrings, pivot: TokenStrings, counts: PairCounts) -> npt.NDArray[np.int32]:
    """MS as published: source id -> of the pivot ids that it was counted with the least distance x sigmoid(count), of equal ones the lowest.

    The sigmoid grows with the count and multiplies a distance that is minimised, so that frequent pairs are penalised, by up to a third (paper.md Q4).
    Begin and end of sequence map to the pivot's, ids never seen to the pivot's unknown token, else its end of sequence.
    """
    unseen = pivot.unk if pivot.unk != UNKNOWN else pivot.eos
    mapped = np.full(source.size, unseen, np.int32)
    source_ids, pivot_ids = counts.source_ids, counts.pivot_ids
    distance, contained = pair_distances(source, pivot, source_ids.tolist(), pivot_ids.tolist())
    weighted = np.where(contained, distance * CONTAINED, distance) / (1.0 + np.exp(-counts.counts.astype(np.float64)))
    order = np.lexsort((pivot_ids, weighted, source_ids))
    first = np.concatenate([np.ones(min(1, order.size), np.bool_), np.diff(source_ids[order]) > 0])
    mapped[source_ids[order[first]]] = pivot_ids[order[first]]
    for mine, theirs in ((source.bos, pivot.bos), (source.eos, pivot.eos)):
        if mine != UNKNOWN and theirs != UNKNOWN:
            mapped[mine] = theirs
    return mapped

"""Levenshtein distances between token strings, as the papers' code takes them. Called by `programme.py` and `fusechat_maps.py`.

Markers are removed first. Where nothing is left of either string, the source's with its marker replaced by the pivot's is compared with the pivot's as it is:
the two then differ by how they write a blank, not by having one.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist, cpdist

from fusion_ray.alignment.token_strings import TokenStrings


def cost_table(
    source: TokenStrings, pivot: TokenStrings, source_ids: Sequence[int], pivot_ids: Sequence[int]
) -> npt.NDArray[np.int32]:
    """(S, P) distances between the decoded strings of every source id and every pivot id given."""
    rows, columns = list(map(source.bare.__getitem__, source_ids)), list(map(pivot.bare.__getitem__, pivot_ids))
    table = _distances(rows, columns)
    if "" in rows or "" in columns:
        marked = list(map(source.marked(pivot.marker).__getitem__, source_ids))
        plain = list(map(pivot.decoded.__getitem__, pivot_ids))
        for place in (place for place, text in enumerate(rows) if not text):
            table[place] = _distances([marked[place]], plain)[0]
        for place in (place for place, text in enumerate(columns) if not text):
            table[:, place] = _distances([plain[place]], marked)[0]
    return table


def pair_distances(
    source: TokenStrings, pivot: TokenStrings, source_ids: Sequence[int], pivot_ids: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(N,) distance between the pieces of the n-th source id and the n-th pivot id, and whether one of the two strings contains the other."""
    first, second = [], []
    for number, other in zip(source_ids, pivot_ids, strict=True):
        mine, theirs = source.without_marker(source.pieces[number]), pivot.without_marker(pivot.pieces[other])
        if not mine or not theirs:
            mine, theirs = source.with_marker(source.pieces[number], pivot.marker), pivot.pieces[other]
        first.append(mine)
        second.append(theirs)
    contained = np.fromiter((a in b or b in a for a, b in zip(first, second, strict=True)), np.bool_, len(first))
    if not first:
        return np.zeros(0, np.int64), contained
    return cpdist(first, second, scorer=Levenshtein.distance, dtype=np.int32).astype(np.int64), contained


def _distances(rows: Sequence[str], columns: Sequence[str]) -> npt.NDArray[np.int32]:
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), np.int32)
    return np.asarray(cdist(rows, columns, scorer=Levenshtein.distance, dtype=np.int32))

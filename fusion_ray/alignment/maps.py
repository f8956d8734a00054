"""Vocabulary maps: what every source id becomes in the pivot's vocabulary (design.md section 6; paper.md 1.3 (b)). Called by `methods.py`.

A map is an int32 array over source ids with a pivot id or -1 (the mass stays in the tail). MAPS and COUNTED_MAPS are the choice of the config's
`align.map`; the latter take what was counted over a corpus as a further argument. The papers' own maps over token strings are in `fusechat_maps.py`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.nearest import nearest
from fusion_ray.alignment.trie import Trie, child
from fusion_ray.alignment.vocabulary import Vocabulary

UNMAPPED = -1


def exact_map(source: Vocabulary, pivot: Vocabulary) -> npt.NDArray[np.int32]:
    """Source id -> the pivot id of the same bytes, else -1 (the papers' EM, on bytes instead of decoded strings)."""
    return _by_bytes(source, pivot, whole=True)


def prefix_map(source: Vocabulary, pivot: Vocabulary) -> npt.NDArray[np.int32]:
    """Source id -> the longest pivot token that its bytes start with (byte-prefix marginalisation, arXiv 2607.22334).

    Conserves all mass where the pivot has every single byte; a source token whose first byte the pivot lacks goes to -1.
    """
    return _by_bytes(source, pivot, whole=False)


def canonical_map(source: Vocabulary, pivot: Vocabulary) -> npt.NDArray[np.int32]:
    """Source id -> the token that the pivot's own tokenizer begins these bytes with; where it cannot say, the longest prefix.

    The longest prefix of a piece is often not how the tokenizer would write it (" eat" as " ", "ea", "t", never " e", "at"): `prefix` then gives almost
    all mass to an id that the pivot is never shown. Conserves mass where `prefix` does. Raises ValueError where `pivot` has no `first_token`.
    """
    mapped = prefix_map(source, pivot)
    if source.same_as(pivot):
        return mapped
    if pivot.first_token is None:
        raise ValueError(
            "map `canonical` needs the pivot's tokenizer: give its vocabulary a `first_token`, or take `prefix`"
        )
    for number, piece in enumerate(source.pieces):
        if not piece or source.is_special[number]:
            continue
        token = pivot.first_token(piece)
        if 0 <= token < pivot.size and pivot.pieces[token] and piece.startswith(pivot.pieces[token]):
            mapped[number] = token
    return mapped


def min_edit_map(source: Vocabulary, pivot: Vocabulary) -> npt.NDArray[np.int32]:
    """Source id -> the pivot id of the same bytes, else of the nearest by edit distance on bytes, of equally near ones the lowest (the papers' MinED)."""
    mapped = exact_map(source, pivot)
    if source.same_as(pivot):
        return mapped
    missing = np.flatnonzero((mapped == UNMAPPED) & ~source.is_special)
    candidates = [b"" if number in pivot.special else piece for number, piece in enumerate(pivot.pieces)]
    mapped[missing] = nearest([source.pieces[number] for number in missing.tolist()], candidates)
    return mapped


def statistics_map(source: Vocabulary, pivot: Vocabulary, counts: PairCounts) -> npt.NDArray[np.int32]:
    """Source id -> the pivot id of the same bytes, else the one that it met most often, of equally frequent ones the nearest by edit distance, then
    the lowest (the papers' MS as it was meant: there the frequent pairs lose, paper.md Q4). Ids never seen go to -1.
    """
    mapped = exact_map(source, pivot)
    if source.same_as(pivot):
        return mapped
    mine, theirs = counts.source_ids, counts.pivot_ids
    open_pairs = np.flatnonzero((mapped[mine] == UNMAPPED) & ~source.is_special[mine] & ~pivot.is_special[theirs])
    mine, theirs, often = mine[open_pairs], theirs[open_pairs], counts.counts[open_pairs]
    pieces = [source.pieces[number] for number in mine.tolist()], [pivot.pieces[number] for number in theirs.tolist()]
    distance = cpdist(*pieces, scorer=Levenshtein.distance, dtype=np.int32) if open_pairs.size else often
    order = np.lexsort((theirs, distance, -often, mine))
    best = order[np.flatnonzero(np.diff(mine[order], prepend=-1))]
    mapped[mine[best]] = theirs[best]
    return mapped


MAPS: Mapping[str, Callable[[Vocabulary, Vocabulary], npt.NDArray[np.int32]]] = {
    "exact": exact_map,
    "prefix": prefix_map,
    "canonical": canonical_map,
    "min_edit": min_edit_map,
}
COUNTED_MAPS: Mapping[str, Callable[[Vocabulary, Vocabulary, PairCounts], npt.NDArray[np.int32]]] = {
    "statistics": statistics_map,
}


def _by_bytes(source: Vocabulary, pivot: Vocabulary, *, whole: bool) -> npt.NDArray[np.int32]:
    if source.same_as(pivot):
        mapped = np.arange(source.size, dtype=np.int32)
        mapped[pivot.size :] = UNMAPPED
        return mapped
    mapped = map_pieces(source.blob, source.offsets, pivot.trie, whole)
    return with_roles(mapped, source, pivot)


def with_roles(mapped: npt.NDArray[np.int32], source: Vocabulary, pivot: Vocabulary) -> npt.NDArray[np.int32]:
    """`mapped` with the source's special ids sent to the pivot's id of the same role, those without a role to -1.

    A role carried by an ordinary token (a template that ends a turn with a newline) is left to its bytes here; at the end of a turn itself
    `project.py` sends label to label.
    """
    mapped = mapped.copy()
    mapped[sorted(source.special)] = UNMAPPED
    for role, number in source.roles.items():
        if number in source.special and role in pivot.roles:
            mapped[number] = pivot.roles[role]
    return mapped


@njit(cache=True)
def map_pieces(
    blob: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], trie: Trie, whole: bool
) -> npt.NDArray[np.int32]:
    """For every piece the id of the longest prefix in `trie`, or with `whole` of the piece itself; -1 where there is none."""
    mapped = np.full(offsets.size - 1, -1, np.int32)
    for number in range(offsets.size - 1):
        node = np.int64(0)
        for index in range(offsets[number], offsets[number + 1]):
            node = child(trie.keys, trie.nodes, node, blob[index])
            if node == -1:
                break
            if not whole and trie.token[node] != -1:
                mapped[number] = trie.token[node]
        if whole and node > 0:
            mapped[number] = trie.token[node]
    return mapped

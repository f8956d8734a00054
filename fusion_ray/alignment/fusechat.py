"""The papers' position rules: which source row teaches each pivot position, and that row moved into the pivot's vocabulary (paper.md 1.3).

Called by `methods.py` and `workers/aligner.py`. Row i of a sequence is the distribution of the model that has read token i. Rules of the published
code, by vocabulary map: `exact` (EM, hard), `min_edit` (MinED, soft, as FuseLLM means it: the published mode cannot run), `statistics` (MS, default).

They are kept as they were published, faults and all: suffixes are compared where offsets were meant (Q7), the last part's row stands for the product
of the parts' rows, duplicates of a pivot id are dropped. `spans` is the method without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.alignment.programme import Matches, join_matches, match_tokens
from fusion_ray.alignment.token_strings import TokenStrings

ONE_HOT = -1  # no source row: the pivot's next token with probability 1
EMPTY = -2  # an empty row, which the published collator replaces with the pivot's own
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """One side's rows as whole token sequences, and where its predicting positions are in them."""

    tokens: npt.NDArray[np.int32]  # all rows' ids, one after another
    offsets: npt.NDArray[np.int64]  # (R + 1,)
    read: npt.NDArray[np.int64]  # (N,) the token that each position has read last
    strings: TokenStrings


def match_rows(pivot: Sequences, source: Sequences) -> Matches:
    """The programme over every row: for each pivot token the source tokens, both numbered over all rows."""
    parts = []
    for row in range(pivot.offsets.size - 1):
        mine = pivot.tokens[pivot.offsets[row] : pivot.offsets[row + 1]]
        theirs = source.tokens[source.offsets[row] : source.offsets[row + 1]]
        parts.append(match_tokens(theirs, mine, source.strings, pivot.strings))
    return join_matches(parts, source.offsets[:-1])


def choose_positions(
    pivot: Sequences, source: Sequences, *, rules: str, mapped: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """(N,) for each of the pivot's positions the source's position whose row it takes, or ONE_HOT, also where the chosen token has no row, or EMPTY."""
    chosen = choose_rows(
        match_rows(pivot, source),
        pivot.tokens,
        source.tokens,
        pivot=pivot.strings,
        source=source.strings,
        rules=rules,
        mapped=mapped,
    )[pivot.read]
    position = np.full(source.tokens.size, ONE_HOT, np.int64)
    position[source.read] = np.arange(source.read.size)
    taken = chosen >= 0
    chosen[taken] = position[chosen[taken]]
    return chosen


def choose_rows(
    matches: Matches,
    pivot_ids: Ints,
    source_ids: Ints,
    *,
    pivot: TokenStrings,
    source: TokenStrings,
    rules: str,
    mapped: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """(P,) the source token whose row each pivot token (P,) takes, or ONE_HOT, or EMPTY.

    `rules` is the name of the map: `exact`, `min_edit` or `statistics`; `mapped` the map as `fusechat_maps.row_map` gives it.
    """
    chosen = np.full(pivot_ids.size, ONE_HOT, np.int64)
    lengths = np.diff(matches.offsets)
    single = np.flatnonzero(lengths == 1)
    token = matches.source[matches.offsets[single]]
    # few pairs of tokens make up most of a corpus: each is judged once
    pairs, place = np.unique(pivot_ids[single].astype(np.int64) * source.size + source_ids[token], return_inverse=True)
    judged = (divmod(pair, source.size) for pair in pairs.tolist())
    fits = [_single_fits(mine, other, pivot, source, rules, mapped) for mine, other in judged]
    chosen[single] = np.where(np.array(fits, np.bool_)[place], token, ONE_HOT) if fits else ONE_HOT
    if rules != "statistics":
        return chosen
    known: dict[tuple[int, ...], int] = {}
    for at in np.flatnonzero(lengths > 1).tolist():
        tokens = matches.source[matches.offsets[at] : matches.offsets[at + 1]]
        key = (int(pivot_ids[at]), *source_ids[tokens].tolist())
        if key not in known:
            known[key] = _part_of_several(pivot.decoded[key[0]], key[1:], pivot, source)
        part = known[key]
        chosen[at] = tokens[part] if part >= 0 else part
    return chosen


def move_rows(
    chosen: npt.NDArray[np.int64],
    topk_ids: npt.NDArray[np.int32],
    topk_logprobs: npt.NDArray[np.float32],
    *,
    mapped: npt.NDArray[np.int32],
    width: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The rows `chosen` (N,) of topk_* (rows, K) in pivot ids, in their order: (N, width) ids and log-probabilities, padded with 0 and -inf; and for each
    source id the mass that moved and at how many positions (V of the source,).

    Of several ids that meet on one pivot id the first stays, ids without a pivot id are dropped; a negative row stays empty.
    """
    ids = np.zeros((chosen.size, width), np.int32)
    logprobs = np.full((chosen.size, width), -np.inf, np.float32)
    moved, seen = np.zeros(mapped.size, np.float64), np.zeros(mapped.size, np.int64)
    _move_rows(chosen, topk_ids, topk_logprobs, mapped, ids, logprobs, moved, seen)
    return ids, logprobs, moved, seen


def met_pairs(
    matches: Matches, pivot_ids: Ints, source_ids: Ints
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Source and pivot ids to count: for each pivot token one pair with each distinct source id in its list."""
    place = np.repeat(np.arange(pivot_ids.size), np.diff(matches.offsets))
    size = int(source_ids.max(initial=0)) + 1
    met = np.unique(place * size + source_ids[matches.source])
    return met % size, pivot_ids[met // size].astype(np.int64)


def _single_fits(
    mine: int, other: int, pivot: TokenStrings, source: TokenStrings, rules: str, mapped: npt.NDArray[np.int32]
) -> bool:
    """One source token: EM wants equal strings, MinED those or ids that map to each other, MS a suffix."""
    text, theirs = pivot.decoded[mine], source.marked(pivot.marker)[other]
    if rules == "statistics":
        return text.endswith(theirs) or theirs.endswith(text)
    return text == theirs or (rules == "min_edit" and int(mapped[other]) == mine)


def _part_of_several(decoded: str, tokens: Sequence[int], pivot: TokenStrings, source: TokenStrings) -> int:
    """MS with several source tokens: the place of the one whose row is taken, or ONE_HOT, or EMPTY."""
    text = pivot.without_marker(decoded)
    parts = [source.bare[token] for token in tokens]
    if not (pivot.marker and decoded == pivot.marker):
        for place, part in enumerate(parts):
            if text.endswith(part) or part.endswith(text):
                return place
    rest, last = text, EMPTY
    for place, part in enumerate(parts):
        if rest.startswith(part):
            rest, last = rest[len(part) :], place
    if not rest:
        return last  # the parts joined are the pivot's string; without any there is no row to take
    joined = "".join(parts)
    return EMPTY if joined.endswith(text) or text.endswith(joined) else ONE_HOT


@njit(cache=True)
def _move_rows(chosen, topk_ids, topk_logprobs, mapped, ids, logprobs, moved, seen):  # type: ignore[no-untyped-def]  # compiled, see move_rows
    for number in range(chosen.size):
        row = chosen[number]
        if row < 0:
            continue
        used = 0
        for k in range(topk_ids.shape[1]):
            logprob = topk_logprobs[row, k]
            if logprob == -np.inf:
                continue  # padding: fewer than K ids are known
            token = topk_ids[row, k]
            target = mapped[token]
            moved[token] += np.exp(np.float64(min(np.float32(0.0), logprob)))
            seen[token] += 1
            if target < 0:
                continue
            taken = False
            for slot in range(used):
                taken |= ids[number, slot] == target
            if not taken and used < ids.shape[1]:
                ids[number, used] = target
                logprobs[number, used] = logprob
                used += 1

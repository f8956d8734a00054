"""The source's top-k at every matched position, carried over into the pivot's vocabulary (design.md section 6). Called by `methods.py`.

Probability is moved, never made: what cannot be carried stays in the tail, 1 - sum(exp(topk_logprobs)). Letters: N pivot positions, K top-k of the
source, Q of the result.

Positions where both models predict from the edge of a token use the vocabulary map as it is. The others walk bytes:
- A label that begins before its message ("Assistant:" + " Hello"): candidates must begin with the same bytes of the template (else tail), which
  are replaced by those that the pivot's label begins with, and the result is looked up in the pivot's vocabulary. Where both labels begin with the
  same such bytes, both models predict from before them, and the map is used as it is.
- `chain`: what the source wrote itself is told by the chain rule. Its label counts as the pivot's label where it reaches as far, whatever the map says.
  Where it ends earlier, its probability is told apart by the source's next positions: their candidates, behind the bytes told so far, are looked up in
  the pivot's vocabulary, until a label reaches the end of the pivot's token, which gets the product. No position behind the pivot's token is looked at.
  Without `chain` (the papers) the label goes where the map says: a pivot token that the source writes as several loses its mass to a shorter one.
- `condition`, a pivot position inside a source token: candidates must begin with the bytes that the pivot has consumed already, and the rest of
  each is looked up. The mass is divided by all the mass that may begin so: the candidates (one that is exactly the consumed bytes says nothing of
  what follows, so its share goes to the tail), the label where it is outside the top-k, and of the source's tail the share of the other ids of its
  vocabulary that begin so. Other ways to spell the consumed bytes (several shorter tokens) are neglected.
- At the end of a turn, and at a strict pair where either label reaches behind its message (".\\n"), label goes to label: the two mean the same there.
  Where only the source's label reaches behind, it counts as its bytes within the message.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.alignment.edges import Edges
from fusion_ray.alignment.positions import Bools, Positions
from fusion_ray.alignment.shares import Shares
from fusion_ray.alignment.spans import COMPARABLE, INSIDE, STRICT
from fusion_ray.alignment.trie import child
from fusion_ray.alignment.vocabulary import Vocabulary

Inside = Literal["skip", "label", "condition"]
Duplicates = Literal["sum", "first"]


@dataclass(frozen=True)
class Projection:
    """What the source says at the pivot's positions, in pivot ids: descending, padded with id 0 and -inf."""

    topk_ids: npt.NDArray[np.int32]  # (N, Q)
    topk_logprobs: npt.NDArray[np.float32]  # (N, Q)
    known: Bools  # (N,) there is a distribution
    one_hot: Bools  # (N,) it is the label alone (`inside: label`)
    moved: npt.NDArray[np.float64]  # (V of the source,) mass that the map carried away from each source id
    seen: npt.NDArray[np.int64]  # (V of the source,) positions at which it did

    @property
    def mass(self) -> npt.NDArray[np.float64]:
        """(N,) the source's probability that landed on pivot ids."""
        return np.asarray(np.exp(self.topk_logprobs.astype(np.float64)).sum(axis=-1))


def project(
    pivot: Positions,
    source: Positions,
    *,
    source_index: npt.NDArray[np.int32],
    kind: npt.NDArray[np.int8],
    edges_pivot: Edges,
    edges_source: Edges,
    vocabulary_pivot: Vocabulary,
    vocabulary_source: Vocabulary,
    mapped: npt.NDArray[np.int32],
    whole_tokens: bool,
    chain: bool = False,
    inside: Inside = "skip",
    duplicates: Duplicates = "sum",
    shares: Shares | None = None,
    top_k: int | None = None,
) -> Projection:
    """`mapped` is the vocabulary map, `shares` go before it where they know a source id.

    `whole_tokens`: byte look-ups want a pivot token of exactly the bytes (map `exact`), else the longest prefix.

    `duplicates`: several source ids that meet on one pivot id are added up, or (`first`, the published code) all but the likeliest go to the tail.
    """
    width = top_k or source.topk_ids.shape[1]
    wanted = (kind == STRICT) | (kind == COMPARABLE)
    if inside == "condition":
        wanted |= kind == INSIDE
    ids = np.zeros((pivot.count, width), np.int32)
    logprobs = np.full((pivot.count, width), -np.inf, np.float32)
    moved = np.zeros(vocabulary_source.size, np.float64)
    seen = np.zeros(vocabulary_source.size, np.int64)
    _project(
        np.flatnonzero(wanted),
        source_index,
        kind == STRICT,
        _Side(
            pivot.start,
            pivot.end,
            pivot.message_key,
            pivot.label,
            pivot.label_logprob,
            edges_pivot.lead,
            edges_pivot.trail,
        ),
        _Side(
            source.start,
            source.end,
            source.message_key,
            source.label,
            source.label_logprob,
            edges_source.lead,
            edges_source.trail,
        ),
        source.topk_ids,
        source.topk_logprobs,
        mapped,
        Shares.none(vocabulary_source) if shares is None else shares,
        0 if shares is None else shares.most,
        _Bytes(vocabulary_pivot.blob, vocabulary_pivot.offsets, vocabulary_pivot.is_special),
        _Bytes(vocabulary_source.blob, vocabulary_source.offsets, vocabulary_source.is_special),
        vocabulary_pivot.trie,
        vocabulary_source.trie,
        whole_tokens,
        chain,
        duplicates == "sum",
        ids,
        logprobs,
        moved,
        seen,
    )
    one_hot = np.zeros(pivot.count, np.bool_)
    if inside == "label":
        one_hot = kind == INSIDE
        ids[one_hot, 0] = pivot.label[one_hot]
        logprobs[one_hot, 0] = 0.0
    return Projection(ids, logprobs, np.isfinite(logprobs[:, 0]), one_hot, moved, seen)


class _Side(NamedTuple):
    start: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    message: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    label_logprob: npt.NDArray[np.float32]
    lead: npt.NDArray[np.int32]
    trail: npt.NDArray[np.int32]


class _Bytes(NamedTuple):
    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    special: Bools


# Helpers take arrays, not the NamedTuples: a call that passes a tuple counts a reference to each of its arrays, which costs more than the helper does.
@njit(cache=True)
def _same_bytes(first: npt.NDArray[np.uint8], start: int, end: int, second: npt.NDArray[np.uint8], begin: int, stop: int, length: int) -> bool:  # fmt: skip
    """Whether the pieces `first[start:end]` and `second[begin:stop]` begin with the same `length` bytes."""
    if end - start < length or stop - begin < length:
        return False
    for index in range(length):  # noqa: SIM110  # numba compiles the loop, not the generator
        if first[start + index] != second[begin + index]:
            return False
    return True


@njit(cache=True)
def _walk(  # type: ignore[no-untyped-def]  # compiled, see _project
    keys, nodes, token, blob, start, end, node, found
):
    """From `node` along `blob[start:end]`: the node where that ends, -1 where it leaves the trie, and the last id passed, `found` where none was."""
    for index in range(start, end):
        if node == -1:
            break
        node = child(keys, nodes, node, blob[index])
        if node != -1 and token[node] != -1:
            found = np.int64(token[node])
    return node, found


@njit(cache=True)
def _begin(keys, nodes, token, blob, offsets, label, length):  # type: ignore[no-untyped-def]  # compiled, see _project
    """`_walk` from the root along the first `length` bytes of the piece of `label`; a control token in the text has a span, but no bytes."""
    if offsets[label + 1] - offsets[label] < length:
        return np.int64(-1), np.int64(-1)
    return _walk(keys, nodes, token, blob, offsets[label], offsets[label] + length, np.int64(0), np.int64(-1))


@njit(cache=True)
def _end(token, whole, node, found):  # type: ignore[no-untyped-def]  # compiled, see _project
    """The id that a walk to `node` came upon last, or with `whole` the one that ends there; -1 where there is none."""
    if not whole:
        return found
    return np.int64(token[node]) if node > 0 else np.int64(-1)


@njit(cache=True)
def _put(
    ids: npt.NDArray[np.int64], mass: npt.NDArray[np.float64], used: int, target: int, value: float, add: bool
) -> int:
    """Give `value` to the id `target` among the `used` slots; how many are used then."""
    slot = 0
    while slot < used and ids[slot] != target:
        slot += 1
    if slot == used:
        ids[slot], mass[slot] = target, value
        return used + 1
    if add:
        mass[slot] += value
    return used


@njit(cache=True)
def _descending(ids: npt.NDArray[np.int64], mass: npt.NDArray[np.float64], used: int) -> None:
    """Insertion sort in place by mass, stable."""
    for slot in range(1, used):
        token, value = ids[slot], mass[slot]
        place = slot
        while place > 0 and mass[place - 1] < value:
            ids[place], mass[place] = ids[place - 1], mass[place - 1]
            place -= 1
        ids[place], mass[place] = token, value


@njit(cache=True)
def _most_pieces(wanted, source_index, end_p, start, end, message):  # type: ignore[no-untyped-def]  # compiled, see project
    """The largest number of source tokens that begin within one pivot token, the matched one included."""
    most = np.int64(1)
    for number in range(wanted.size):
        i = wanted[number]
        j = np.int64(source_index[i])
        count = np.int64(1)
        while _goes_on(end_p[i], start, end, message, j):
            j += 1
            count += 1
        most = max(most, count)
    return most


@njit(cache=True)
def _goes_on(until, start, end, message, j):  # type: ignore[no-untyped-def]  # compiled, see project
    """Whether a pivot token that ends at byte `until` goes on behind the source's token j, and the source's next token begins right there."""
    return (
        end[j] < until
        and start[j] < end[j]
        and j + 1 < start.size
        and message[j + 1] == message[j]
        and start[j + 1] == end[j]
        and end[j + 1] > start[j + 1]
    )


@njit(cache=True)
def _project(  # type: ignore[no-untyped-def]  # compiled, see project
    wanted, source_index, strict, pivot, source, topk_ids, topk_logprobs, mapped, shares, most_shares, words_p, words_s, trie_p, trie_s,
    whole, chain, add, out_ids, out_logprobs, moved, seen,
):  # fmt: skip
    K, Q = topk_ids.shape[1], out_ids.shape[1]
    start_s, end_s, message_s, blob_p, blob_s, at_p, at_s = (
        source.start, source.end, source.message, words_p.blob, words_s.blob, words_p.offsets, words_s.offsets,
    )  # fmt: skip
    keys, nodes, ends = trie_p.keys, trie_p.nodes, trie_p.token
    pieces = _most_pieces(wanted, source_index, pivot.end, start_s, end_s, message_s) if chain else 1
    room = (K + 1) * (pieces + most_shares)
    share_at, share_ids, share_weights = shares.offsets, shares.ids, shares.weights
    ids = np.empty(room, np.int64)
    mass = np.empty(room, np.float64)
    for number in range(wanted.size):
        i = wanted[number]
        j = np.int64(source_index[i])
        mine = np.int64(pivot.label[i])
        label_to_label = pivot.start[i] == pivot.end[i] or (strict[i] and (source.trail[j] > 0 or pivot.trail[i] > 0))
        consumed = np.int64(pivot.start[i] - source.start[j])  # bytes of the source's token that the pivot has read
        told = np.int64(0)  # bytes of the pivot's token that the source's tokens before j spell
        share = 1.0  # their probability
        used = 0
        while True:
            label = np.int64(source.label[j])
            skip = source.lead[j] + consumed
            lead = np.int64(pivot.lead[i]) + told
            goes_on = chain and _goes_on(pivot.end[i], start_s, end_s, message_s, j)
            known = label_to_label or (chain and source.end[j] >= pivot.end[i])  # the label is the pivot's own
            cut_off = chain and not known and not goes_on  # the source says no more of the pivot's token
            plain = told == 0 and (
                (skip == 0 and lead == 0)
                or (
                    consumed == 0
                    and lead == skip
                    and _same_bytes(blob_p, at_p[mine], at_p[mine + 1], blob_s, at_s[label], at_s[label + 1], skip)
                )
            )
            total = 0.0  # of the stored candidates
            fitting = 0.0  # of those that begin with the consumed bytes
            fitting_ids = 0
            root, found = _begin(keys, nodes, ends, blob_p, at_p, mine, lead)
            of_label = np.exp(min(0.0, np.float64(source.label_logprob[j])))
            label_seen = False
            for k in range(K + 1):
                if k < K:
                    token = np.int64(topk_ids[j, k])
                    mass_here = np.exp(min(0.0, np.float64(topk_logprobs[j, k])))
                    label_seen |= token == label and mass_here > 0.0
                elif (consumed > 0 or told > 0) and not label_seen:
                    token, mass_here = label, of_label
                else:
                    break
                if mass_here == 0.0:
                    continue
                total += mass_here
                cut = np.int64(source.trail[j]) if token == label else np.int64(0)
                if token == label and goes_on:
                    fitting += mass_here
                    fitting_ids += 1
                    continue  # its mass is told apart by the source's next position
                if token == label and (known or cut_off):
                    target = mine if known else np.int64(-1)
                    fitting += mass_here
                    fitting_ids += 1
                elif plain and cut == 0:
                    target = np.int64(mapped[token])
                    moved[token] += mass_here
                    seen[token] += 1
                    if share_at[token + 1] > share_at[token]:
                        for at in range(share_at[token], share_at[token + 1]):
                            value = share * mass_here * share_weights[at]
                            used = _put(ids, mass, used, np.int64(share_ids[at]), value, add)
                        continue
                elif words_s.special[token]:
                    if told > 0 and mapped[token] >= 0:  # the turn ends behind what was told
                        target = _end(ends, whole, root, found)
                    else:
                        target = np.int64(mapped[token]) if consumed == 0 and told == 0 else np.int64(-1)
                elif not _same_bytes(blob_s, at_s[token], at_s[token + 1], blob_s, at_s[label], at_s[label + 1], skip):
                    target = np.int64(-1)
                else:
                    fitting += mass_here
                    fitting_ids += 1
                    target = _end(
                        ends,
                        whole,
                        *_walk(keys, nodes, ends, blob_s, at_s[token] + skip, at_s[token + 1] - cut, root, found),
                    )
                if target >= 0:
                    used = _put(ids, mass, used, target, share * mass_here, add)
            if consumed > 0:
                node, _ = _begin(trie_s.keys, trie_s.nodes, trie_s.token, blob_s, at_s, label, skip)
                others = (int(trie_s.below[node]) if node != -1 else 0) - fitting_ids
                outside = max(1, trie_s.below[0] - K)
                scale = fitting + max(0.0, 1.0 - total) * max(0, others) / outside
                share = 1.0 / scale if scale > 0.0 else 0.0
                for slot in range(used):
                    mass[slot] *= share
            if not goes_on:
                break
            share *= of_label
            told += source.end[j] - source.start[j] - consumed
            consumed = np.int64(0)
            j += 1
        _descending(ids, mass, used)
        for slot in range(min(used, Q)):
            out_ids[i, slot] = ids[slot]
            out_logprobs[i, slot] = min(0.0, np.log(mass[slot]))

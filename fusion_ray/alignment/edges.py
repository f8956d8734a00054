"""Labels that reach over the edge of their message, and the proof that both sides tokenize the same text. Called by `methods.py` and `workers/aligner.py`.

The first token of a message may begin with bytes of the template (" Hello" after "Assistant:") or with SentencePiece's dummy space: its
`lead`. The last may end with some (".\\n"): its `trail`. Every other label has exactly the bytes of its span.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.alignment.positions import Bools, Positions
from fusion_ray.alignment.vocabulary import Vocabulary


@dataclass(frozen=True)
class Edges:
    """(N,) bytes of each label's piece that lie before and behind its span."""

    lead: npt.NDArray[np.int32]
    trail: npt.NDArray[np.int32]
    short: Bools  # the piece has fewer bytes than its span: it is not what the model read
    unsure: Bools  # bytes to spare that may lie on either side: split by a guess until `settle`


def find_edges(positions: Positions, vocabulary: Vocabulary) -> Edges:
    """From the lengths of pieces and spans alone. A token that is both first and last is taken to begin with the template's blanks."""
    extra = _bytes_to_spare(positions, vocabulary)
    first, last = positions.opens_message, positions.closes_content
    over = extra > 0
    # Within a message a spare byte is a dummy space, which tokenizers put behind added tokens too.
    lead = np.where(over & (first | ~last), extra, 0).astype(np.int32)
    trail = np.where(over & last & ~first, extra, 0).astype(np.int32)
    unsure = over & last
    for index in np.flatnonzero(unsure & first):
        piece = vocabulary.pieces[positions.label[index]]
        blanks = len(piece) - len(piece.lstrip())
        ends_blank = piece != piece.rstrip()
        lead[index] = 0 if ends_blank and not blanks else min(int(extra[index]), blanks or int(extra[index]))
        trail[index] = extra[index] - lead[index]
    return Edges(lead, trail, extra < 0, unsure)


def settle(
    mine: Positions,
    edges: Edges,
    vocabulary: Vocabulary,
    other: Positions,
    other_edges: Edges,
    other_vocabulary: Vocabulary,
) -> Edges:
    """`edges` with the unsure ones decided by the content that the other model's tokens spell, where that is sure itself."""
    lead, trail = edges.lead.copy(), edges.trail.copy()
    key, other_key = mine.message_key, other.message_key
    for index in np.flatnonzero(edges.unsure):
        low, high = np.searchsorted(other_key, [key[index], key[index] + 1])
        start, end = int(mine.start[index]), int(mine.end[index])
        first = low + int(np.searchsorted(other.end[low:high], start, side="right"))
        last = low + int(np.searchsorted(other.start[low:high], end))
        touching = range(first, last)  # the other side's tokens with a byte of this one's
        if not touching or other_edges.unsure[first:last].any():
            continue
        content = b"".join(_content_of(other, other_edges, other_vocabulary, at) for at in touching)
        wanted = content[max(0, start - int(other.start[touching[0]])) :][: end - start]
        piece = vocabulary.pieces[mine.label[index]]
        extra = int(lead[index] + trail[index])
        fits = [guess for guess in range(extra, -1, -1) if piece[guess : guess + len(wanted)] == wanted]
        if fits and int(lead[index]) not in fits:
            lead[index], trail[index] = fits[0], extra - fits[0]
    return Edges(lead, trail, edges.short, edges.unsure)


def texts_differ(
    pivot: Positions,
    edges_pivot: Edges,
    vocabulary_pivot: Vocabulary,
    source: Positions,
    edges_source: Edges,
    vocabulary_source: Vocabulary,
) -> Bools:
    """(N,) True at a pivot position whose bytes are not those that the source's tokens spell at the same place of the same message."""
    at_pivot, room_pivot = _content_place(pivot, edges_pivot, vocabulary_pivot)
    at_source, room_source = _content_place(source, edges_source, vocabulary_source)
    differ: Bools = _compare(
        pivot.message_key,
        pivot.start,
        pivot.end,
        at_pivot,
        room_pivot,
        vocabulary_pivot.blob,
        source.message_key,
        source.start,
        source.end,
        at_source,
        room_source,
        vocabulary_source.blob,
    )
    return differ


def _content_place(
    positions: Positions, edges: Edges, vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(N,) where each label's content begins in the blob, and how many bytes there are from there."""
    at = vocabulary.offsets[positions.label] + edges.lead
    return at, vocabulary.offsets[positions.label.astype(np.int64) + 1] - at


def _bytes_to_spare(positions: Positions, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """(N,) bytes of the label's piece beyond its span; 0 at ends of turns and for special labels, which have no bytes of their own."""
    length = np.diff(vocabulary.offsets)[positions.label]
    extra: npt.NDArray[np.int64] = length - (positions.end - positions.start)
    extra[positions.turn_ends | vocabulary.is_special[positions.label]] = 0
    return extra


def _content_of(positions: Positions, edges: Edges, vocabulary: Vocabulary, index: int) -> bytes:
    piece = vocabulary.pieces[positions.label[index]]
    lead = int(edges.lead[index])
    return piece[lead : lead + int(positions.end[index] - positions.start[index])]


@njit(cache=True)
def _compare(  # type: ignore[no-untyped-def]  # compiled, see texts_differ
    key_p, start_p, end_p, at_p, room_p, blob_p, key_s, start_s, end_s, at_s, room_s, blob_s
):
    differ = np.zeros(key_p.size, np.bool_)
    i = j = 0
    while i < key_p.size and j < key_s.size:
        if key_p[i] < key_s[j] or (key_p[i] == key_s[j] and end_p[i] <= start_s[j]):
            i += 1
            continue
        if key_s[j] < key_p[i] or end_s[j] <= start_p[i]:
            j += 1
            continue
        low, high = max(start_p[i], start_s[j]), min(end_p[i], end_s[j])
        # a special label has no bytes to compare
        if room_p[i] >= high - start_p[i] and room_s[j] >= high - start_s[j]:
            for byte in range(low, high):
                if blob_p[at_p[i] + byte - start_p[i]] != blob_s[at_s[j] + byte - start_s[j]]:
                    differ[i] = True
        if end_p[i] <= end_s[j]:
            i += 1
        else:
            j += 1
    return differ

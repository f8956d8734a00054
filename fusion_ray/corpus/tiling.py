"""The byte pieces of a tokenization laid over the bytes of its text. Called by spans.py.

Usually the pieces concatenate to the text and the spans are their running lengths. Otherwise they are walked one by one, minding what tokenizers add
(a dummy space before a segment) and swallow (white space beside an added token); a token whose piece is not in the text is marked as
unproven, and the walk goes on where the tokenizer says that it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_ray.corpus.pieces import SPACE_MARKER, Pieces

_SPACE = b" \t\r\n\x0b\x0c"


@dataclass(frozen=True)
class Tiling:
    """Token t covers bytes [start[t], end[t]) of the text; `proven[t]`: these are its piece's bytes. `swallowed`: bytes of no token."""

    start: np.ndarray  # (T,) int64
    end: np.ndarray  # (T,) int64
    proven: np.ndarray  # (T,) bool
    swallowed: tuple[tuple[int, int], ...]


def tile(text: str, ids: Sequence[int], pieces: Pieces, offsets: Sequence[tuple[int, int]]) -> Tiling:
    """The tiling of `text` by the tokens `ids`; `offsets` are the tokenizer's own character spans, used to go on after an unproven token."""
    shown = text.replace(SPACE_MARKER, " ") if pieces.space_marker and SPACE_MARKER in text else text
    data = shown.encode("utf-8")
    found = pieces.of(list(ids))
    if b"".join(found) == data:
        end = np.cumsum(np.fromiter((len(piece) for piece in found), np.int64, len(found)))
        start = np.concatenate([np.zeros(1, np.int64), end[:-1]]) if len(end) else end
        tiling = Tiling(start, end, np.ones(len(end), bool), ())
    else:
        tiling = _walk(shown, data, ids, found, pieces, offsets)
    return tiling if shown is text else _widen(tiling, text)


def _walk(
    text: str,
    data: bytes,
    ids: Sequence[int],
    found: Sequence[bytes],
    pieces: Pieces,
    offsets: Sequence[tuple[int, int]],
) -> Tiling:
    size = len(found)
    start, end, proven = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, bool)
    swallowed: list[tuple[int, int]] = []
    byte_of = None
    at = 0
    for number, (token, piece) in enumerate(zip(ids, found, strict=True)):
        if token in pieces.left:
            word = _after_space(data, at)
            if word > at and data.startswith(piece, word):
                swallowed.append((at, word))
                at = word
        length = len(piece)
        known = bool(piece) and data.startswith(piece, at)
        if not known and pieces.dummy_prefix and piece[:1] == b" " and data.startswith(piece[1:], at):
            known, length = True, len(piece) - 1
        if not known:
            if byte_of is None:
                byte_of = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
            length = max(0, int(byte_of[offsets[number][1]]) - at)
        start[number], end[number], proven[number] = at, at + length, known
        at += length
        if token in pieces.right:
            word = _after_space(data, at)
            if word > at:
                swallowed.append((at, word))
                at = word
    return Tiling(start, end, proven, tuple(swallowed))


def _after_space(data: bytes, at: int) -> int:
    while at < len(data) and data[at] in _SPACE:
        at += 1
    return at


def _widen(tiling: Tiling, text: str) -> Tiling:
    """From bytes of the text with spaces for its U+2581 to bytes of the text itself, where each is two bytes longer."""
    parts = text.split(SPACE_MARKER)
    marks = np.cumsum([len(part.encode()) + 1 for part in parts[:-1]]) - 1  # where each marker's space lies

    def moved(offset: np.ndarray) -> np.ndarray:
        return offset + 2 * np.searchsorted(marks, offset, side="left")

    swallowed = np.asarray(tiling.swallowed, np.int64).reshape(-1, 2)
    return Tiling(
        moved(tiling.start),
        moved(tiling.end),
        tiling.proven,
        tuple((int(a), int(b)) for a, b in zip(moved(swallowed[:, 0]), moved(swallowed[:, 1]), strict=True)),
    )

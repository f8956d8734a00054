"""What the papers' alignment compares: the strings of a tokenizer's tokens (paper.md 1.3). Called by `edit_distance.py`, `fusechat.py` and `fusechat_maps.py`.

Two kinds: *decoded*, what `decode([id])` gives for the one token, and *piece*, how the vocabulary writes it. Pieces write a blank as a *marker*
("Ġ" byte level, "▁" SentencePiece), which the published code looked up in a table of six tokenizer classes; `workers/align_setup.py` asks the tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

UNKNOWN = -1


@dataclass(frozen=True)
class TokenStrings:
    """Strings of every id; "" for ids beyond the tokenizer (padded embedding rows). `marker` is "" for a tokenizer that has none.

    `bos`, `eos` and `unk` are ids, -1 where the tokenizer has none.
    """

    decoded: Sequence[str]
    pieces: Sequence[str]
    marker: str = ""
    bos: int = UNKNOWN
    eos: int = UNKNOWN
    unk: int = UNKNOWN
    _marked: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def size(self) -> int:
        return len(self.pieces)

    @cached_property
    def bare(self) -> list[str]:
        """Decoded strings without the marker."""
        return [self.without_marker(text) for text in self.decoded]

    def marked(self, marker: str) -> list[str]:
        """Decoded strings with the marker replaced by another's; made once for each."""
        if marker not in self._marked:
            self._marked[marker] = [self.with_marker(text, marker) for text in self.decoded]
        return self._marked[marker]

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Piece to id, of equal pieces the first."""
        return {piece: self.size - 1 - place for place, piece in enumerate(reversed(self.pieces)) if piece}

    def without_marker(self, text: str) -> str:
        return text.replace(self.marker, "") if self.marker else text

    def with_marker(self, text: str, marker: str) -> str:
        """`text` with this tokenizer's marker replaced by another's."""
        return text.replace(self.marker, marker) if self.marker and self.marker != marker else text


def same_pieces(source: TokenStrings, pivot: TokenStrings) -> npt.NDArray[np.int32]:
    """(V of the source,) the pivot id of the same piece, the source's marker replaced by the pivot's; -1 where there is none."""
    wanted = (source.with_marker(piece, pivot.marker) for piece in source.pieces)
    return np.fromiter((pivot.ids.get(piece, UNKNOWN) for piece in wanted), np.int32, source.size)

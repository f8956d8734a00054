"""A vocabulary as bytes: what every id stands for, whatever the tokenizer's own notation. Called by the maps, the projection and the aligner.

Ids beyond the tokenizer (padded embedding rows) and ids it cannot spell hold b"". Special tokens are met by role, never by their string.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.trie import NO_NODE, NO_TOKEN, Trie, build_trie, child

END_OF_TURN = "end_of_turn"


@dataclass(frozen=True)
class Vocabulary:
    """`pieces[id]` are the bytes of every id, b"" where there are none; `special` ids have no bytes of their own whatever `pieces` says.

    `roles` names the ids that mean the same in every model (`end_of_turn`). `fallback` ids are single-byte tokens that a tokenizer uses only where
    no ordinary piece has the bytes (SentencePiece's byte fallback): a lookup by bytes prefers any other id.
    `first_token(bytes)` is the id that the tokenizer itself begins these bytes with, -1 where it cannot say; None where only bytes are known.
    Raises ValueError for an id outside the vocabulary.
    """

    pieces: Sequence[bytes]
    special: frozenset[int] = frozenset()
    roles: Mapping[str, int] = field(default_factory=dict)
    fallback: frozenset[int] = frozenset()
    first_token: Callable[[bytes], int] | None = None

    def __post_init__(self) -> None:
        for name, ids in (
            ("special", self.special),
            ("fallback", self.fallback),
            ("roles", frozenset(self.roles.values())),
        ):
            outside = [number for number in sorted(ids) if not 0 <= number < len(self.pieces)]
            if outside:
                raise ValueError(
                    f"{name} id {outside[0]} is outside a vocabulary of {len(self.pieces)} ids: give pieces for every id"
                )

    @property
    def size(self) -> int:
        return len(self.pieces)

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """(V,) True for special ids."""
        mask = np.zeros(self.size, np.bool_)
        mask[sorted(self.special)] = True
        return mask

    @cached_property
    def blob(self) -> npt.NDArray[np.uint8]:
        """All pieces one after another; id's bytes are `blob[offsets[id]:offsets[id + 1]]`, none for special ids."""
        return np.frombuffer(b"".join(self._spelled) or b"\0", np.uint8)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([len(piece) for piece in self._spelled], dtype=np.int64)]).astype(
            np.int64
        )

    @cached_property
    def trie(self) -> Trie:
        """Of equal pieces an ordinary id goes before a byte-fallback one, then the highest id: tokens added later win in every tokenizer."""
        spelled = [number for number, piece in enumerate(self._spelled) if piece]
        order = sorted(spelled, key=lambda number: (number not in self.fallback, number))
        return build_trie(self.blob, self.offsets, np.asarray(order, np.int32))

    @cached_property
    def _spelled(self) -> list[bytes]:
        return [b"" if number in self.special else piece for number, piece in enumerate(self.pieces)]

    def id_of(self, piece: bytes) -> int:
        """The id of exactly these bytes, or -1."""
        node = 0
        for byte in piece:
            node = int(child(self.trie.keys, self.trie.nodes, node, byte))
            if node == NO_NODE:
                return NO_TOKEN
        return int(self.trie.token[node])

    def longest_prefix(self, text: bytes) -> int:
        """The id of the longest piece that `text` starts with, or -1."""
        node, found = 0, NO_TOKEN
        for byte in text:
            node = int(child(self.trie.keys, self.trie.nodes, node, byte))
            if node == NO_NODE:
                break
            if self.trie.token[node] != NO_TOKEN:
                found = int(self.trie.token[node])
        return found

    def same_as(self, other: "Vocabulary") -> bool:
        """True where every id means the same in both, padding at the end apart."""
        shared = min(self.size, other.size)
        return (
            list(self.pieces[:shared]) == list(other.pieces[:shared])
            and not any(self.pieces[shared:])
            and not any(other.pieces[shared:])
            and self.special == other.special
            and dict(self.roles) == dict(other.roles)
        )

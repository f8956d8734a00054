"""The bytes that every token id of a Hugging Face tokenizer stands for. Called by spans.py, the align stage and the zoo's checks.

Two families are byte-exact: byte-level BPE (each character of a token string is one byte, GPT-2's table) and SentencePiece style (U+2581 is a
space, `<0xXX>` is one byte). Added tokens stand for their own text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

SPACE_MARKER = "▁"
ENCODER = ("normalizer", "pre_tokenizer")


@dataclass(frozen=True)
class Pieces:
    """`pieces[id]` is the bytes of token `id`, b"" for an id without a token; `special` are the control tokens.

    `left`, `right`: added tokens that swallow the white space of the text before or after them. `dummy_prefix`: the tokenizer puts a space that is
    not in the text before (some of) its segments. `space_marker`: U+2581 in a text is the same to the tokenizer as a space.
    """

    pieces: list[bytes]
    special: set[int]
    left: frozenset[int] = frozenset()
    right: frozenset[int] = frozenset()
    dummy_prefix: bool = False
    space_marker: bool = False

    def of(self, ids: list[int]) -> list[bytes]:
        """The bytes of each id; ids beyond the tokenizer (a padded vocabulary) give b""."""
        known = len(self.pieces)
        return [self.pieces[token] if 0 <= token < known else b"" for token in ids]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.fromiter((len(piece) for piece in self.pieces), np.int64, len(self.pieces))


def read_pieces(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> Pieces:
    """The pieces of a fast tokenizer, filled up with b"" to `vocab_size`.

    Raises ValueError naming the tokenizer and its first token that has no exact bytes.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {name} has no fast version (tokenizer.json), which byte spans need")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = {part["type"] for part in _parts(state)}
    added = {int(token["id"]): token for token in state["added_tokens"]}
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    byte_level = "ByteLevel" in kinds
    space_marker = not byte_level and ("Metaspace" in kinds or any(_replaces_marker(part) for part in _parts(state)))
    size = max(max(vocabulary.values(), default=-1) + 1, max(added, default=-1) + 1, vocab_size or 0)
    pieces = [b""] * size
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if number in added:
            continue
        piece = _byte_level(token) if byte_level else _sentencepiece(token) if space_marker else None
        if piece is None:
            raise ValueError(
                f"the tokenizer {name} is not byte-exact: its token {token!r} (id {number}) does not say which bytes it stands for; "
                "byte-level BPE and SentencePiece-style tokenizers do"
            )
        pieces[number] = piece
    for number, entry in added.items():
        pieces[number] = entry["content"].encode("utf-8")
    return Pieces(
        pieces,
        {number for number, entry in added.items() if entry["special"]},
        frozenset(number for number, entry in added.items() if entry["lstrip"]),
        frozenset(number for number, entry in added.items() if entry["rstrip"]),
        any(_adds_prefix(part) for part in _parts(state, ENCODER)),
        space_marker,
    )


def _parts(state: dict, keys: Sequence[str] = (*ENCODER, "decoder")) -> list[dict]:
    """These components of a tokenizer.json, sequences flattened."""
    found = []
    waiting = [state[key] for key in keys if state.get(key)]
    while waiting:
        part = waiting.pop(0)
        found.append(part)
        for key in ("normalizers", "pretokenizers", "decoders"):
            waiting.extend(part.get(key) or [])
    return found


def _replaces_marker(part: dict) -> bool:
    pattern = part.get("pattern") or {}
    return part["type"] == "Replace" and SPACE_MARKER in (pattern.get("String"), part.get("content"))


def _adds_prefix(part: dict) -> bool:
    """True where a component puts a space before a segment. Of the encoder: a ByteLevel decoder has the same key and does nothing with it."""
    if part["type"] == "Prepend":
        return True
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return part["type"] == "ByteLevel" and bool(part.get("add_prefix_space"))


def _byte_table() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


_BYTES = _byte_table()


def _byte_level(token: str) -> bytes | None:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return None


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE_MARKER, " ").encode("utf-8")

"""A conversation in one model's tokens, with the bytes of an assistant message that each token covers. Called by the engines and by align.

The rendered text is tokenized as it is; the byte pieces of the tokens are laid over its UTF-8 bytes. Inside every assistant message they must
tile the message without gap or overlap (the proof of design.md section 6); tokens that reach over its border are clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusion_ray.corpus.pieces import Pieces, read_pieces
from fusion_ray.corpus.template import ChatTemplate, Placed, UnlocatedError
from fusion_ray.corpus.tiling import Tiling, tile
from fusion_ray.records import Message


@dataclass(frozen=True)
class Located:
    """One conversation in T tokens with N predicting positions (records.teacher_schema); `bytes` are the assistant bytes under the positions."""

    ids: np.ndarray  # (T,) int32
    position: np.ndarray  # (N,) int32
    byte_start: np.ndarray  # (N,) int32
    byte_end: np.ndarray  # (N,) int32
    message: np.ndarray  # (N,) int16

    @property
    def bytes(self) -> int:
        return int((self.byte_end - self.byte_start).sum())

    @property
    def labels(self) -> np.ndarray:
        return self.ids[self.position + 1]

    def cut(self, max_length: int) -> "Located":
        """The first `max_length` tokens and the positions whose label is among them; the same object where nothing is cut."""
        if len(self.ids) <= max_length:
            return self
        kept = self.position + 1 < max_length
        return Located(
            self.ids[:max_length], self.position[kept], self.byte_start[kept], self.byte_end[kept], self.message[kept]
        )

    @property
    def turns(self) -> int:
        """Assistant turns that have a predicting position."""
        return len(np.unique(self.message))

    def cut_after_turn(self, max_length: int) -> "Located":
        """Up to the end of the last assistant turn that lies within `max_length` tokens with its end-of-turn label; no tokens where none does.

        The same object where nothing is cut.
        """
        if len(self.ids) <= max_length:
            return self
        outside = self.position + 1 >= max_length
        # What is kept ends before the first turn that is not whole.
        count = int(np.argmax(self.message == self.message[outside][0])) if outside.any() else len(self.position)
        end = int(self.position[count - 1]) + 2 if count else 0
        return Located(
            self.ids[:end], self.position[:count], self.byte_start[:count], self.byte_end[:count], self.message[:count]
        )

    @property
    def first_turn_end(self) -> int:
        """Tokens up to and with the last label of the first assistant turn; 0 where there is no turn."""
        return int(self.position[self.message == self.message[0]][-1]) + 2 if len(self.position) else 0


class Locator:
    """Locates conversations in one tokenizer's tokens, rendered by its own chat template or by that of `template`.

    Raises ValueError where the tokenizer has no chat template or no byte-exact pieces.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: PreTrainedTokenizerBase | None = None, name: str = ""
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name or tokenizer.name_or_path
        self.template = ChatTemplate(template or tokenizer, (template.name_or_path if template else "") or self.name)
        self.pieces: Pieces = read_pieces(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def locate(self, messages: Sequence[Message]) -> Located:
        """Raises UnlocatedError, with the reason, where the proof fails."""
        text, places = self.template.locate(messages)
        encoded = self._backend.encode(text, add_special_tokens=False)
        tiling = tile(text, encoded.ids, self.pieces, encoded.offsets)
        ascii_only = text.isascii()
        found = [
            _predicting(tiling, text, place, messages[place.message].content, ascii_only)
            for place in places
            if messages[place.message].role == "assistant"
        ]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.empty(0)] * 4
        return Located(
            np.asarray(encoded.ids, np.int32),
            columns[0].astype(np.int32),
            columns[1].astype(np.int32),
            columns[2].astype(np.int32),
            columns[3].astype(np.int16),
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that ask for the assistant's next turn."""
        text = self.template.render(messages, generation=True)
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids that ask the model for the assistant's next turn, by its own chat template. Raises as Locator does."""
    return Locator(tokenizer).prompt(messages)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template: PreTrainedTokenizerBase | None = None) -> int:
    """The token that follows an assistant's content in the chat template: the label at end-of-turn positions.

    Raises ValueError when the template puts nothing there, or not always the same token.
    """
    locator = Locator(tokenizer, template=template)
    ends: set[int | None] = set()
    for answer in ("Yes", "It is 7.", "one\ntwo"):
        row = locator.locate([Message("user", "Tell me"), Message("assistant", answer)] * 2)
        found = row.labels[row.byte_start == row.byte_end].tolist()
        ends.update(found if len(found) == 2 else [None])
    only = next(iter(ends))
    if len(ends) > 1 or only is None:
        names = (repr(locator.tokenizer.convert_ids_to_tokens(token)) for token in ends if token is not None)
        shown = [*sorted(names), *(["nothing of its own"] if None in ends else [])]
        raise ValueError(
            f"the chat template of {locator.name} must end every assistant turn with one and the same token; it ends them with {', '.join(shown)}"
        )
    return only


def _predicting(
    tiling: Tiling, text: str, place: Placed, content: str, ascii_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(position, byte_start, byte_end, message) of one assistant content. Raises UnlocatedError where its bytes are not tiled."""
    start = place.start if ascii_only else len(text[: place.start].encode())
    kept = text[place.start : place.end]
    size = len(kept) if ascii_only else len(kept.encode())
    end = start + size
    # Tokens are in order and do not overlap: those that end after `start` and start before `end`.
    first = int(np.searchsorted(tiling.end, start, side="right"))
    last = int(np.searchsorted(tiling.start, end, side="left"))
    tokens = np.arange(first, last)
    low, high = np.maximum(tiling.start[first:last], start), np.minimum(tiling.end[first:last], end)
    covers = high > low
    if not covers.all():
        tokens, low, high = tokens[covers], low[covers], high[covers]
    proven = tiling.proven[tokens]
    swallowed = sum(max(0, min(b, end) - max(a, start)) for a, b in tiling.swallowed)
    if not proven.all() or int(high.sum() - low.sum()) + swallowed != size:
        at = first if proven.all() else int(tokens[~proven][0])
        raise UnlocatedError(
            f"the tokens of assistant message {place.message} do not give back its bytes (first at token {at}): "
            "the tokenizer normalises this text or has no token for it"
        )
    before = len(content[: place.skipped].encode()) - start
    ending = int(np.searchsorted(tiling.start, end, side="left"))
    while ending < len(tiling.end) and tiling.end[ending] == tiling.start[ending]:
        ending += 1
    has_end = ending < len(tiling.start) and (ending == 0 or bool(tiling.end[:ending].max() <= end))
    found = np.empty((3, len(tokens) + has_end), np.int64)
    found[0, : len(tokens)] = tokens
    np.add(low, before, out=found[1, : len(tokens)])
    np.add(high, before, out=found[2, : len(tokens)])
    if has_end:
        found[:, -1] = ending, *[len(content.encode())] * 2
    if found.size and found[0, 0] == 0:  # nothing predicts the first token of the conversation
        found = found[:, 1:]
    return found[0] - 1, found[1], found[2], np.full(found.shape[1], place.message)

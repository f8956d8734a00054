"""One row in both tokenizations with its matches, and what the source's likeliest tokens became: the data behind the report's view and `--explain`.

Called by `workers/aligner.py` (makes it; `examples.json` of an align artefact holds such rows) and `report/` (shows it).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from fusion_ray.records import MatchKind

if TYPE_CHECKING:  # methods.py compiles kernels, which those that only show a row have no use for
    from fusion_ray.alignment.methods import Aligned, Side
    from fusion_ray.alignment.vocabulary import Vocabulary

CANDIDATES = 3
DIGITS = 3  # of a probability, and of bits


class Candidate(TypedDict):
    text: str
    probability: float


class ExplainedToken(TypedDict, total=False):
    """A predicted token: its text and its bytes within message `message`.

    Of the pivot: the match, in `becomes` the source's likeliest tokens there as ids of the pivot, empty where nothing could be carried over, and
    whether they are what is taught there. Of the source: in `says` its likeliest tokens there. Artefacts of earlier versions have the match alone.
    """

    text: str
    message: int
    byte_start: int
    byte_end: int
    kind: str
    source_index: int
    becomes: list[Candidate]
    from_source: bool
    says: list[Candidate]


class _Row(TypedDict):
    id: str
    source_won: bool
    pivot: list[ExplainedToken]
    source: list[ExplainedToken]


class ExplainedRow(_Row, total=False):
    """`*_bits`: bits per byte of the text that both sides have, None where there is none. Artefacts of earlier versions lack them."""

    pivot_bits: float | None
    source_bits: float | None


class Line(NamedTuple):
    """The tokens of both sides that begin at one byte; None where that side has none that does."""

    pivot: ExplainedToken | None
    source: ExplainedToken | None


def explained(aligned: "Aligned", pivot: "Side", source: "Side", row: int, name: str) -> ExplainedRow:
    """Row number `row` of an alignment, known as `name`. `source_index` counts within the row."""
    theirs = np.flatnonzero(source.positions.row == row)
    first = int(theirs[0]) if theirs.size else 0
    mine = np.flatnonzero(pivot.positions.row == row)
    pivot_tokens, source_tokens = _tokens(pivot, mine), _tokens(source, theirs)
    carried = aligned.projection
    for token, at in zip(pivot_tokens, mine, strict=True):
        index = int(aligned.source_index[at])
        token["kind"] = MatchKind(int(aligned.kind[at])).name.lower()
        token["source_index"] = index - first if index >= 0 else -1
        token["from_source"] = bool(aligned.from_source[at])
        token["becomes"] = _likeliest(pivot.vocabulary, carried.topk_ids[at], carried.topk_logprobs[at])
    for token, at in zip(source_tokens, theirs, strict=True):
        token["says"] = _likeliest(source.vocabulary, source.positions.topk_ids[at], source.positions.topk_logprobs[at])
    return {
        "id": name,
        "source_won": bool(aligned.source_won[row]),
        "pivot_bits": _finite(aligned.ce_pivot.per_byte[row]),
        "source_bits": _finite(aligned.ce_source.per_byte[row]),
        "pivot": pivot_tokens,
        "source": source_tokens,
    }


def side_by_side(row: ExplainedRow) -> list[Line]:
    """Every byte at which a token of either side begins, in the order of the text; the end of a turn stands alone behind its message."""
    lines: dict[tuple[int, int, bool], list[ExplainedToken | None]] = {}
    for side, tokens in enumerate((row["pivot"], row["source"])):
        for token in tokens:
            ends_turn = token["byte_start"] == token["byte_end"]
            lines.setdefault((token["message"], token["byte_start"], ends_turn), [None, None])[side] = token
    return [Line(*lines[place]) for place in sorted(lines)]


def source_kinds(row: ExplainedRow) -> list[str]:
    """For every source token how it meets the pivot: as the pivot's token that begins with it does, `inside` where it begins within one, else `none`."""
    kinds = []
    reach = (-1, 0)  # message and last byte of the pivot's latest token
    for line in side_by_side(row):
        if line.pivot is not None:
            reach = (line.pivot["message"], line.pivot["byte_end"])
        if line.source is not None:
            inside = reach[0] == line.source["message"] and line.source["byte_start"] < reach[1]
            kinds.append(line.pivot["kind"] if line.pivot is not None else "inside" if inside else "none")
    return kinds


def _tokens(side: "Side", numbers: npt.NDArray[np.int64]) -> list[ExplainedToken]:
    positions = side.positions
    return [
        {
            "text": _text(side.vocabulary, int(positions.label[at])),
            "message": int(positions.message[at]),
            "byte_start": int(positions.start[at]),
            "byte_end": int(positions.end[at]),
        }
        for at in numbers
    ]


def _likeliest(
    vocabulary: "Vocabulary", ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]
) -> list[Candidate]:
    order: Sequence[int] = np.argsort(-logprobs, kind="stable")[:CANDIDATES].tolist()
    return [
        {"text": _text(vocabulary, int(ids[k])), "probability": round(float(np.exp(logprobs[k])), DIGITS)}
        for k in order
        if np.isfinite(logprobs[k])
    ]


def _finite(value: float) -> float | None:
    return round(float(value), DIGITS) if np.isfinite(value) else None


def _text(vocabulary: "Vocabulary", number: int) -> str:
    return vocabulary.pieces[number].decode("utf-8", "backslashreplace")

"""One row in both tokenizations with their matches: the data that the report colours, and its lines for a terminal (`fusion-ray align --explain`)."""

from collections.abc import Iterator
from typing import TypedDict

from fusion_ray.alignment.coverage import KINDS
from fusion_ray.alignment.methods import Aligned, Side

MARKS = {"strict": "=", "comparable": "<", "inside": ".", "none": " "}


class ExplainedToken(TypedDict, total=False):
    """A predicted token: its text, its bytes within message `message`; for the pivot also the match."""

    text: str
    message: int
    byte_start: int
    byte_end: int
    kind: str
    source_index: int


class ExplainedRow(TypedDict):
    id: str
    source_won: bool
    pivot: list[ExplainedToken]
    source: list[ExplainedToken]


def explained(aligned: Aligned, pivot: Side, source: Side, row: int, name: str) -> ExplainedRow:
    """Row number `row` of an alignment, known as `name`. `source_index` counts within the row."""
    first = int((source.positions.row < row).sum())
    mine = _tokens(pivot, row)
    for number, token in mine:
        token["kind"] = KINDS[int(aligned.kind[number])]
        index = int(aligned.source_index[number])
        token["source_index"] = index - first if index >= 0 else -1
    return {
        "id": name,
        "source_won": bool(aligned.source_won[row]),
        "pivot": [token for _, token in mine],
        "source": [token for _, token in _tokens(source, row)],
    }


def explain(row: ExplainedRow) -> str:
    """Lines: the pivot's tokens on the left, the source token that each is matched with on the right."""
    return "\n".join(_lines(row))


def _lines(row: ExplainedRow) -> Iterator[str]:
    winner = "source" if row["source_won"] else "pivot"
    yield f"row {row['id']}: MinCE takes the {winner}; = strict, < comparable (same context, other length), . inside a source token"
    width = max((len(repr(token["text"])) for token in row["pivot"]), default=0)
    for token in row["pivot"]:
        place = f"{token['message']}:{token['byte_start']}-{token['byte_end']}"
        met = row["source"][token["source_index"]]["text"] if token["source_index"] >= 0 else None
        yield f"{place:>12}  {token['text']!r:<{width}}  {MARKS[token['kind']]}  {'' if met is None else repr(met)}"


def _tokens(side: Side, row: int) -> list[tuple[int, ExplainedToken]]:
    positions = side.positions
    return [
        (
            int(number),
            {
                "text": side.vocabulary.pieces[int(positions.label[number])].decode("utf-8", "backslashreplace"),
                "message": int(positions.message[number]),
                "byte_start": int(positions.start[number]),
                "byte_end": int(positions.end[number]),
            },
        )
        for number in (positions.row == row).nonzero()[0]
    ]

"""Off by one is impossible: a teacher whose distribution says where it stands, from Parquet to Parquet. Every pivot position must get the row of exactly
the source position that has read the same bytes."""

import io
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusion_ray.alignment.vocabulary import Vocabulary
from fusion_ray.config import AlignConfig
from fusion_ray.corpus.spans import Located
from fusion_ray.logprobs.codec import TeacherRow, encode, to_table
from fusion_ray.records import MatchKind
from fusion_ray.workers.aligner import Aligner
from tests.made_up import conversation
from tests.tokenizers import locator, vocabulary

SAME = "Water boils at one hundred degrees; it freezes at zero."
ROWS = {
    "first": [SAME, "", "Yes.", SAME],
    "second": [
        SAME
    ],  # the same text in another row and at another place: a row or a message too far would look right by its bytes
    "third": ["  def add(first, second):\n    return first + second\n", "naïve 漢字 👩‍🚀 e\u0301"],
    "fourth": ["Step 1: 12345 + 6789 = 19134. " * 4],
}
PAIRS = [
    ("gpt2", "gpt2"),
    ("mistral_v1", "mistral_v1"),
    ("pivot", "source_gemma"),
    ("source_gemma", "source_neox"),
    ("mistral_v3", "tekken"),
    ("tekken", "mistral_v1"),
]
# Where one template ends in a blank and the other does not, the bytes of a whole mark may be no token of the pivot: no `exact` there.
CASES = [*((*pair, "prefix") for pair in PAIRS), *((*pair, "exact") for pair in PAIRS[:4])]
STEP = 1 / 64  # of the logprob from one position to the next: exact in float16
NEVER = -30.0


@dataclass(frozen=True)
class Mark:
    """What a source position says: bytes that both vocabularies hold in one token, and a log-probability of its own."""

    piece: bytes
    logprob: float


def marks_of(pivot: Vocabulary, source: Vocabulary) -> list[bytes]:
    """Pieces with a blank before them, so that they fit behind a template that ends in one too."""
    shared = {piece for number, piece in enumerate(source.pieces) if piece[:1] == b" " and number not in source.special}
    return sorted(
        piece for piece in shared if len(piece) > 1 and pivot.id_of(piece) >= 0 and piece.strip() == piece[1:]
    )


def row_of(name: str, located: Located, ids: np.ndarray, logprobs: np.ndarray) -> TeacherRow:
    """Position i says ids[i] with logprobs[i] and nothing else; its label is beyond belief."""
    count = len(located.position)
    return TeacherRow(
        name,
        located.ids,
        located.position,
        located.byte_start,
        located.byte_end,
        located.message,
        ids.reshape(count, 1).astype(np.int32),
        logprobs.reshape(count, 1).astype(np.float16),
        np.full(count, NEVER, np.float32),
    )


def marked(name: str, row: str, number: int, pieces: list[bytes]) -> tuple[TeacherRow, list[Mark]]:
    located, words = locator(name).locate(conversation(ROWS[row])), vocabulary(name)
    marks: list[Mark] = []
    for at, label in enumerate(located.labels):
        piece = pieces[(number * 31 + at) % len(pieces)]
        if words.id_of(piece) == label:
            piece = pieces[(number * 31 + at + 7) % len(pieces)]
        marks.append(Mark(piece, -(1 + (number * 17 + at) % 250) * STEP))
    ids = np.array([words.id_of(mark.piece) for mark in marks])
    return row_of(row, located, ids, np.array([mark.logprob for mark in marks])), marks


def shard(rows: list[TeacherRow]) -> bytes:
    return encode(to_table(rows, top_k=1))


def misplaced(pivot: str, source: str, vocabulary_map: str, *, shift: int = 0) -> list[str]:
    """Every pivot position that got something else than the mark of the source position with its context; `shift` moves all marks by so many positions."""
    words = vocabulary(pivot)
    pieces = marks_of(words, vocabulary(source))
    assert len(pieces) > 40
    mine = []
    for name in ROWS:
        located = locator(pivot).locate(conversation(ROWS[name]))
        mine.append(row_of(name, located, np.zeros(len(located.position)), np.full(len(located.position), NEVER)))
    theirs = [marked(source, row, number, pieces) for number, row in enumerate(ROWS)]
    rows = [
        replace(row, topk_ids=np.roll(row.topk_ids, shift, 0), topk_logprobs=np.roll(row.topk_logprobs, shift, 0))
        for row, _ in theirs
    ]
    aligner = Aligner(words, vocabulary(source), AlignConfig(choose="source", map=vocabulary_map, inside="skip"))
    result = aligner.align(shard(mine), shard(rows[::-1]))  # rows meet by their ids, whatever their order
    assert not result.rejected
    written = {row["id"]: row for row in pq.read_table(io.BytesIO(result.encoded())).to_pylist()}
    wrong = []
    for own, (other, marks) in zip(mine, theirs, strict=True):
        # by message, bytes read and whether the turn ends there: nothing of the package decides what meets what
        said = {}
        for mark, message, start, end in zip(marks, other.message, other.byte_start, other.byte_end, strict=True):
            said[int(message), int(start), bool(start == end)] = mark
        got = written[own.id]
        for at, (message, start, end) in enumerate(zip(own.message, own.byte_start, own.byte_end, strict=True)):
            mark = said.get((int(message), int(start), bool(start == end)))
            place = f"{own.id} {message}:{start}-{end}"
            if mark is None:
                if got["has_target"][at] or got["kind"][at] in (MatchKind.STRICT, MatchKind.COMPARABLE):
                    wrong.append(f"{place}: no source position has read these bytes")
                continue
            if not got["has_target"][at] or abs(got["topk_logprobs"][at] - mark.logprob) > STEP / 4:
                wrong.append(f"{place}: {got['topk_logprobs'][at]} instead of {mark.logprob}")
            elif start > 0 and got["topk_ids"][at] != words.id_of(mark.piece):
                wrong.append(f"{place}: {words.pieces[got['topk_ids'][at]]!r} instead of {mark.piece!r}")
    return wrong


@pytest.mark.parametrize(("pivot", "source", "vocabulary_map"), CASES)
def test_every_position_gets_the_row_of_the_source_position_that_has_read_the_same_bytes(
    pivot: str, source: str, vocabulary_map: str
) -> None:
    assert misplaced(pivot, source, vocabulary_map) == []


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_that_is_off_by_one_is_found_out_at_most_positions(pivot: str, source: str, shift: int) -> None:
    positions = sum(len(locator(pivot).locate(conversation(contents)).position) for contents in ROWS.values())
    assert len(misplaced(pivot, source, "prefix", shift=shift)) > positions / 4

"""Data files as a stream of conversations and rejected rows: jsonl, json, parquet, on any fsspec URL, one row in memory at a time.

Called by ingest.py for the corpus and by the evaluate stage for held-out conversations.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.corpus.rows import RowError, parse_row
from fusion_ray.records import Conversation

CHUNK = 1 << 20


@dataclass(frozen=True)
class Rejected:
    """A row that is no conversation; `row` counts from 1 in its file (lines of a jsonl file, elements otherwise)."""

    id: str
    dataset: str
    row: int
    reason: str


def read_conversations(paths: Sequence[str], *, format: str = "auto") -> Iterator[Conversation | Rejected]:
    """Every row of every file, in order. Ids are unique in what is yielded as a Conversation.

    Raises ValueError naming corpus.path for a file that is missing, unreadable or of an unknown kind.
    """
    seen: set[bytes] = set()
    for path in paths:
        dataset = PurePosixPath(path).name
        for number, row in _rows(path):
            if isinstance(row, RowError):
                yield Rejected("", dataset, number, str(row))
                continue
            try:
                conversation = parse_row(row, format=format, dataset=dataset)
            except RowError as error:
                yield Rejected(_given_id(row), dataset, number, str(error))
                continue
            name = conversation.id.encode()
            if name in seen:
                yield Rejected(conversation.id, dataset, number, f"the id {conversation.id!r} was seen before")
                continue
            seen.add(name)
            yield conversation


def read_text(path: str, key: str) -> str:
    """The text of a local file or URL. Raises ValueError naming the config key where it cannot be read."""
    try:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: cannot read {path!r}: {error}") from error


def _given_id(row: object) -> str:
    given = row.get("id") if isinstance(row, dict) else None
    text = str(given) if isinstance(given, str | int) else ""
    return text.encode("utf-8", "replace").decode()


def _rows(path: str) -> Iterator[tuple[int, object]]:
    """(row number, decoded row or RowError) of one file."""
    name = PurePosixPath(path).name.lower()
    for ending in (".gz", ".zst", ".bz2", ".xz"):
        name = name.removesuffix(ending)
    try:
        if name.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                yield from _parquet_rows(file)
        elif name.endswith((".jsonl", ".ndjson")):
            with fsspec.open(path, "rb", compression="infer") as file:
                yield from _json_lines(file)
        elif name.endswith(".json"):
            with fsspec.open(path, "rt", compression="infer", encoding="utf-8", errors="surrogateescape") as file:
                yield from _json_values(file)
        else:
            raise ValueError(f"corpus.path {path!r}: expected a file ending in .jsonl, .ndjson, .json or .parquet")
    except FileNotFoundError as error:
        raise ValueError(f"corpus.path {path!r} does not exist: give the path of a conversation file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"corpus.path {path!r} cannot be read: {error.strerror or error}") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"corpus.path {path!r} is not a readable Parquet file: {error}") from error


def _json_lines(file: IO[bytes]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield number, RowError(f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield number, RowError(f"not JSON: {error.msg} at character {error.pos}")
        except RecursionError:
            yield number, RowError("not JSON that can be read: nested too deeply")


def _json_values(file: IO[str]) -> Iterator[tuple[int, object]]:
    """Elements of one JSON array, or JSON values one after the other, decoded as they arrive."""
    decoder = json.JSONDecoder()
    text, number, ended = "", 0, False
    while not ended and not text.strip():
        more = file.read(CHUNK)
        ended = not more
        text = (text + more).lstrip("\ufeff")
    in_array = text.lstrip().startswith("[")
    position = len(text) - len(text.lstrip()) + 1 if in_array else 0
    want = CHUNK
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if in_array and position < len(text) and text[position] == "]":
            return
        value: object = None
        problem: json.JSONDecodeError | None = None
        end = position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            problem = error
        except RecursionError:
            yield (
                number + 1,
                RowError("not JSON that can be read: nested too deeply; the rest of the file was not read"),
            )
            return
        # A value that ends where the buffer ends may go on in the next chunk (a number); a broken one may be a cut one.
        if not ended and (problem is not None or end == len(text)):
            more = file.read(want)
            ended = not more
            text, position, want = text[position:] + more, 0, want * 2
            continue
        if position >= len(text) and not in_array:
            return
        number += 1
        if problem is not None:
            yield number, RowError(f"not JSON: {problem.msg}; the rest of the file was not read")
            return
        yield number, value
        position, want = end, CHUNK


def _parquet_rows(file: IO[bytes]) -> Iterator[tuple[int, object]]:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield number, row

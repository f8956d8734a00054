"""Data files as a stream of conversations and rejected rows: jsonl, json, parquet, on any fsspec URL, one row in memory at a time.

A row of more than MAX_ROW_BYTES is rejected, so that a file without line ends does not come into memory whole; a JSON array that breaks off is an error, as
where its next row begins is not known.
Called by ingest.py for the corpus and by the evaluate stage for held-out conversations.
"""

import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.config import is_url
from fusion_ray.corpus.rows import RowError, keys_read, parse_row
from fusion_ray.corpus.seen import Seen, id_digest
from fusion_ray.records import Conversation

CHUNK = 1 << 20
MAX_ROW_BYTES = 16 << 20  # several times the text of a window of a million tokens
PARQUET_BYTES = 16 << 20  # rows of a Parquet file are decoded in batches of about so much
PARQUET_ROWS = 256
SHOWN_CHARACTERS = 500  # of an id or a reason: both may quote a row
TOO_LARGE = f"larger than the {MAX_ROW_BYTES >> 20} MiB that a row may have"
# Of a value that Python has none for: text that is not UTF-8, a date out of its range, a time zone or a type that is not known here.
_NO_VALUE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)


@dataclass(frozen=True)
class Rejected:
    """A row that is no conversation; `row` counts from 1 in its file (lines of a jsonl file, elements otherwise)."""

    id: str
    dataset: str
    row: int
    reason: str


class _BrokenOffError(ValueError):
    """A JSON file that cannot be read past its row `row`: where the next one begins is not known."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


def read_conversations(
    paths: Sequence[str], *, format: str = "auto", key: str = "corpus.path"
) -> Iterator[Conversation | Rejected]:
    """Every row of every file, in order. Ids are unique in what is yielded as a Conversation.

    Raises ValueError naming `key` for a file that is missing, unreadable or of an unknown kind.
    """
    seen = Seen()
    for path in paths:
        for number, row in read_rows(path, format=format, dataset=PurePosixPath(path).name, key=key):
            if isinstance(row, Conversation) and not seen.add(id_digest(row.id)):
                row = seen_before(row, number)
            yield row


def read_rows(
    path: str, *, format: str, dataset: str, key: str = "corpus.path"
) -> Iterator[tuple[int, Conversation | Rejected]]:
    """(row number, row) of one file, ids as they come. Raises ValueError naming `key` for a file that is missing, unreadable, broken or of an unknown kind."""
    for number, row in _rows(path, format, key):
        given = ""
        try:
            if isinstance(row, RowError):
                raise row
            given = _given_id(row)
            conversation = parse_row(row, format=format, dataset=dataset)
            if sum(len(message.content) for message in conversation.messages) > MAX_ROW_BYTES:
                raise RowError(f"the conversation is {TOO_LARGE}")
        except RowError as error:
            yield number, Rejected(given, dataset, number, _short(str(error)))
        else:
            yield number, conversation


def seen_before(row: Conversation, number: int) -> Rejected:
    """A row whose id another has."""
    return Rejected(_short(row.id), row.dataset, number, _short(f"the id {row.id!r} was seen before"))


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
    return _short(text).encode("utf-8", "replace").decode()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _rows(path: str, format: str, key: str) -> Iterator[tuple[int, object]]:
    """(row number, decoded row or RowError) of one file."""
    name = PurePosixPath(path).name.lower()
    packed = name.endswith(".zst")
    for ending in (".gz", ".zst", ".bz2", ".xz"):
        name = name.removesuffix(ending)
    try:
        if name.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                yield from _parquet_rows(file, keys_read(format))
        elif name.endswith((".jsonl", ".ndjson", ".json")):
            # Arrow reads zstd itself; fsspec would need one more package.
            with fsspec.open(path, "rb", compression=None if packed else "infer") as file:
                data: IO[bytes] = pa.CompressedInputStream(file, "zstd") if packed else file
                if name.endswith(".json"):
                    yield from _json_values(io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape"))
                else:
                    yield from _json_lines(data)
        else:
            raise ValueError(f"{key} {path!r}: expected a file ending in .jsonl, .ndjson, .json or .parquet")
    except FileNotFoundError as error:
        raise ValueError(f"{key} {path!r} does not exist: give the path of a conversation file") from error
    except _BrokenOffError as error:
        raise ValueError(
            f"{key} {path!r} cannot be read past row {error.row} ({error}): mend or fetch the file again; of JSON lines, one row a line, the broken row alone "
            "would be left out"
        ) from error
    except (pa.ArrowException, ArithmeticError) as error:
        raise ValueError(f"{key} {path!r} is not a readable Parquet file: {error}; write it again") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{key} {path!r} cannot be read: {error.strerror or error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = str(error) or type(error).__name__
        if isinstance(error, OSError) and (
            error.errno is not None or is_url(path)
        ):  # the disk or the network, not the file's content
            raise OSError(
                f"{key} {path!r} cannot be read to its end ({why}): run again once its storage answers"
            ) from error
        raise ValueError(f"{key} {path!r} is damaged or was copied in part ({error}): fetch it again") from error


def _json_lines(file: IO[bytes]) -> Iterator[tuple[int, object]]:
    for number, line in _lines(file):
        if line is None:
            yield number, RowError(f"the line is {TOO_LARGE}")
        elif line.strip():
            yield number, _json_line(line, number)


def _json_line(line: bytes, number: int) -> object:
    """The decoded line, or a RowError that says why it is none."""
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at character {error.pos}")
    except ValueError as error:  # a whole number of thousands of digits
        return RowError(f"not JSON that can be read: {error}")
    except RecursionError:
        return RowError("not JSON that can be read: nested too deeply")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line without its end, or None where it is too large). Not `for line in file`, which would hold a line of any length."""
    number, size, parts = 1, 0, list[bytes]()
    while block := file.read(CHUNK):
        *ended, rest = block.split(b"\n")
        for piece in ended:
            size += len(piece)
            parts.append(piece)
            yield number, b"".join(parts) if size <= MAX_ROW_BYTES else None
            number, size, parts = number + 1, 0, []
        size += len(rest)
        parts = [*parts, rest] if size <= MAX_ROW_BYTES else []
    if size:
        yield number, b"".join(parts) if size <= MAX_ROW_BYTES else None


def _json_values(file: IO[str]) -> Iterator[tuple[int, object]]:
    """Elements of one JSON array, or JSON values one after the other, decoded as they arrive. Raises _BrokenOffError where it cannot be read to its end."""
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
            if (text[position + 1 :] + file.read(CHUNK)).strip():
                raise _BrokenOffError(number, "text stands after the end of the array")
            return
        value: object = None
        problem: json.JSONDecodeError | None = None
        end = position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            problem = error
        except (RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise _BrokenOffError(number, f"not JSON that can be read: {why}") from error
        # A value that ends where the buffer ends may go on in the next chunk (a number); a broken one may be a cut one.
        if not ended and (problem is not None or end == len(text)):
            if len(text) - position > MAX_ROW_BYTES:
                raise _BrokenOffError(number, f"not JSON, or {TOO_LARGE}")
            more = file.read(want)
            ended = not more
            text, position, want = text[position:] + more, 0, want * 2
            continue
        if position >= len(text) and not in_array:
            return
        if problem is not None:
            raise _BrokenOffError(number, f"not JSON: {problem.msg}" if position < len(text) else "the file ends there")
        number += 1
        yield number, value
        position, want = end, CHUNK


def _parquet_rows(file: IO[bytes], keys: set[str]) -> Iterator[tuple[int, object]]:
    """Rows with the values of the columns `keys`; the other columns, which could hold what Python has no value for, are there with None."""
    parquet = pq.ParquetFile(file)
    names = list(dict.fromkeys(parquet.schema_arrow.names))
    wanted = [name for name in names if name in keys]
    groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    empty: dict[str, object] = dict.fromkeys(names)
    if not wanted:
        yield from ((number, empty) for number in range(1, parquet.metadata.num_rows + 1))
        return
    number = 0
    size = max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(1, largest)))
    for read in parquet.iter_batches(batch_size=size, columns=wanted):
        batch = read.select(wanted)  # the reader takes `id` for `id.x` too
        try:
            rows: list[object] = [empty | row for row in batch.to_pylist()]
        except _NO_VALUE:
            rows = [_parquet_row(batch.slice(place, 1), empty) for place in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _parquet_row(batch: pa.RecordBatch, empty: dict[str, object]) -> object:
    row = dict(empty)
    for name in batch.schema.names:
        try:
            row[name] = batch[name][0].as_py()
        except UnicodeDecodeError as error:
            return RowError(f"text that is not UTF-8, at byte {error.start}")
        except _NO_VALUE as error:
            return RowError(f"`{name}` cannot be read: {error}")
    return row

"""Every kind of malformed row and file: rejected with its reason and its place while the good rows around it are kept, in bounded time and memory."""

import bz2
import gzip
import json
import lzma
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_ray.corpus import readers
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.readers import MAX_ROW_BYTES, SHOWN_CHARACTERS, Rejected, read_conversations
from fusion_ray.corpus.shards import REJECTED, decode_conversations, decode_rejected
from fusion_ray.records import Conversation
from fusion_ray.store import Store

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}


def good(number: int) -> dict[str, object]:
    return {"id": number, "messages": [{"role": "user", "content": f"Question {number}"}, ANSWER]}


def chat(*messages: object) -> str:
    return json.dumps({"messages": messages})


BAD = {
    "not json": (b'{"messages": [', "not JSON: Expecting value at character 14"),
    "two values": (b"{} {}", "not JSON: Extra data"),
    "not text": (b"\xff\xfe\x00", "not UTF-8 at byte 0"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "a number of many digits": (b'{"id": ' + b"1" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
    "null": (b"null", "the row is a NoneType, expected an object"),
    "a list": (b"[1]", "the row is a list"),
    "no key": (b"{}", "no known format"),
    "null messages": (b'{"messages": null}', "no known format"),
    "messages not a list": (b'{"messages": {"role": "user"}}', "`messages` is a dict"),
    "a turn that is a number": (b'{"messages": [1]}', "messages[0] is a int"),
    "content not text": (chat({"role": "user", "content": 1.5}, ANSWER).encode(), "the content of messages[0] is a float"),
    "content missing": (chat(USER, {"role": "assistant"}).encode(), "the content of messages[1] is a NoneType"),
    "NaN": (b'{"messages": [{"role": "user", "content": NaN}]}', "is a float, expected text"),
    "an image": (chat({"role": "user", "content": [{"type": "image"}]}).encode(), "content part that is not text"),
    "role missing": (chat({"content": "x"}, ANSWER).encode(), "unknown role None"),
    "role unknown": (chat(USER, {"role": "tool", "content": "x"}).encode(), "unknown role 'tool'"),
    "id of a wrong type": (b'{"id": 1.5, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "text or a whole number"),
    "empty": (b'{"messages": []}', "no assistant turn"),
    "empty answer": (chat(USER, {"role": "assistant", "content": " \n"}).encode(), "message 1 is an empty assistant message"),
    "no assistant turn": (chat(SYSTEM, USER).encode(), "no assistant turn"),
    "system alone": (chat(SYSTEM).encode(), "no assistant turn"),
    "assistant first": (chat(ANSWER, USER).encode(), "roles out of order: message 0 is assistant, expected user"),
    "user twice": (chat(USER, USER, ANSWER).encode(), "roles out of order: message 1 is user, expected assistant"),
    "assistant twice": (chat(SYSTEM, USER, ANSWER, ANSWER).encode(), "message 3 is assistant, expected user"),
    "system in between": (chat(USER, SYSTEM, ANSWER).encode(), "message 1 is system, expected assistant"),
    "system twice": (chat(SYSTEM, SYSTEM, USER, ANSWER).encode(), "message 1 is system, expected user"),
    "surrogate in a text": (chat(USER, {"role": "assistant", "content": "a\udc80b"}).encode(), "holds a lone surrogate at character 1"),
    "surrogate in a role": (chat({"role": "\ud83d", "content": "x"}).encode(), "unknown role '\\ud83d'"),
    "surrogate in an id": (json.dumps(good(0) | {"id": "x\ud83d"}).encode(), "`id` holds a lone surrogate at character 1"),
    "surrogate in a key": (b'{"\\ud83d": 1}', "no known format"),
    "surrogate in alpaca": (b'{"instruction": "a", "input": "\\udfff", "output": "b"}', "input holds a lone surrogate"),
    "alpaca of wrong types": (b'{"instruction": ["a"], "output": "b"}', "instruction is a list, expected text"),
    "completion of a wrong type": (b'{"prompt": "a", "completion": 7}', "completion is a int, expected text"),
    "too large": (b'"' + b"x" * MAX_ROW_BYTES + b'"', "the line is larger than the 16 MiB that a row may have"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_line_is_kept_apart_with_its_reason(tmp_path: Path, kind: str) -> None:
    line, reason = BAD[kind]
    rows = [json.dumps(good(n)).encode() for n in range(3)]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([rows[0], line, *rows[1:]]) + b"\n")
    out = Store(str(tmp_path / "store")).artifact("corpus", 1, {}, {})
    settings = {"format": "auto", "rows_per_shard": 10, "max_rows": None, "max_rejected": 0.3}
    ingest(out, paths=[str(path)], report=lambda figures: None, **settings)  # type: ignore[arg-type]
    (bad,) = decode_rejected(out.read_bytes(REJECTED))
    assert (bad.dataset, bad.row) == ("data.jsonl", 2)
    assert reason in bad.reason
    assert [row.id for row in decode_conversations(out.read_bytes("shard-00000.parquet"))] == ["0", "1", "2"]


def everything(path: Path) -> list[Conversation | Rejected]:
    return list(read_conversations([str(path)]))


def test_a_json_array_with_bad_elements(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    parts = [json.dumps(good(0)).encode(), chat(ANSWER, USER).encode(), b'{"prompt": "\xff", "completion": "x"}', b"7"]
    path.write_bytes(b"[" + b",\n".join([*parts, json.dumps(good(1)).encode()]) + b"]")
    first, order, bytes_, number, last = everything(path)
    assert [row.id for row in (first, last)] == ["0", "1"]
    for row, words in ((order, "roles out of order"), (bytes_, "lone surrogate"), (number, "the row is a int")):
        assert isinstance(row, Rejected)
        assert words in row.reason


@pytest.mark.parametrize(("part", "words"), [(b'{"id": ' + b"1" * 5000 + b"}", "Exceeds"), (b"[" * 100_000, "deeply")])
def test_a_json_array_that_cannot_be_read_on(tmp_path: Path, part: bytes, words: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + json.dumps(good(0)).encode() + b"," + part + b"]")
    with pytest.raises(ValueError, match=rf"corpus.path '.*data.json' cannot be read past row 1 \(.*{words}"):
        everything(path)


def test_what_stands_behind_a_json_array_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good(0)]) + "\n" + json.dumps([good(1)]))
    with pytest.raises(ValueError, match=r"cannot be read past row 1 .*after the end of the array"):
        everything(path)


def test_a_broken_json_array_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "CHUNK", 1 << 10)
    asked: list[int] = []
    file = _Text("[" + json.dumps(good(0)) + ', {"messages": "' + "x" * (1 << 20), asked)
    with pytest.raises(ValueError, match="not JSON, or larger than"):
        list(readers._json_values(file))  # type: ignore[arg-type]
    assert sum(asked) < 1 << 18


def test_parquet_rows_of_wrong_types(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"prompt": [1, 2], "completion": ["a", None]}), path)
    assert [row.reason for row in everything(path) if isinstance(row, Rejected)] == [
        "prompt is a int, expected text",
        "no known format: the row has the keys ['completion', 'prompt'], expected one of: conversations; messages; instruction + output; prompt + completion",
    ]
    turns = [[{"role": "user", "content": "Hi"}, None], None, [{"role": "user", "content": "Hi"}, ANSWER]]
    pq.write_table(pa.table({"messages": turns}), path)
    first, second, third = everything(path)
    assert isinstance(first, Rejected)
    assert "messages[1] is a NoneType" in first.reason
    assert isinstance(second, Rejected)
    assert isinstance(third, Conversation)


NEVER = pa.array([2**62, 0, 0], pa.timestamp("us"))  # a date that Python has no value for


@pytest.mark.parametrize("format", ["auto", "prompt"])
def test_a_parquet_column_that_no_format_needs_is_not_read(tmp_path: Path, format: str) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"created": NEVER, "prompt": ["a", "b", "c"], "completion": ["x", "y", None]}), path)
    first, second, third = read_conversations([str(path)], format=format)
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert isinstance(third, Rejected)
    if format == "auto":
        assert "the row has the keys ['completion', 'created', 'prompt']" in third.reason


def test_a_parquet_column_of_another_format_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"messages": NEVER, "prompt": ["a"] * 3, "completion": ["x", "y", "z"]}), path)
    rows = list(read_conversations([str(path)], format="prompt"))
    assert [type(row) for row in rows] == [Conversation] * 3


def test_a_parquet_file_with_none_of_the_columns_tells_those_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"created": NEVER, "text": ["a", "b", "c"]}), path)
    found = everything(path)
    assert [row.row for row in found if isinstance(row, Rejected)] == [1, 2, 3]
    assert isinstance(found[0], Rejected)
    assert "the row has the keys ['created', 'text'], expected one of" in found[0].reason


def test_a_parquet_value_that_cannot_be_read_rejects_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"id": NEVER, "prompt": ["a"] * 3, "completion": ["x", "y", "z"]}), path)
    first, *_ = everything(path)
    assert isinstance(first, Rejected)
    assert first.row == 1
    assert first.reason.startswith("`id` cannot be read: ")


@pytest.mark.parametrize("error", [pa.ArrowNotImplementedError("no such type"), OverflowError("too large")])
def test_a_parquet_batch_that_cannot_be_decoded_names_key_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["x"]}), path)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", broken)
    with pytest.raises(ValueError, match=rf"^corpus.path '.*data.parquet' is not a readable Parquet file: {error}"):
        everything(path)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    data = pa.array([b"Hi", b"a\xffb", b"Ho"], pa.binary())
    text = pa.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    pq.write_table(pa.table({"prompt": text, "completion": ["a", "b", "c"]}), tmp_path / "data.parquet")
    first, bad, last = everything(tmp_path / "data.parquet")
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    assert isinstance(bad, Rejected)
    assert (bad.row, bad.reason) == (2, "text that is not UTF-8, at byte 1")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("length", [10_000_000, MAX_ROW_BYTES + 1])
def test_a_message_of_many_megabytes(tmp_path: Path, ending: str, length: int) -> None:
    """10 MB are a row like any other; past the bound it is rejected, and the next row is read. Either way in time that goes with its length."""
    rows = [good(0), {"messages": [USER, {"role": "assistant", "content": "x" * length}]}, good(1)]
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([{"messages": row["messages"]} for row in rows]), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    started = time.perf_counter()
    found = everything(path)
    assert time.perf_counter() - started < 5
    if length == 10_000_000:
        assert [isinstance(row, Conversation) for row in found] == [True] * 3
        return
    assert isinstance(found[0], Conversation)
    assert isinstance(found[1], Rejected)
    assert f"larger than the {MAX_ROW_BYTES >> 20} MiB" in found[1].reason
    assert isinstance(found[2], Conversation)


def test_reasons_do_not_quote_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    name = "r" * 1_000_000
    lines = [
        {"id": name, "messages": [{"role": name, "content": "x"}]},
        {name: 1},
        good(0) | {"id": name},
        good(0) | {"id": name},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    bad = [row for row in everything(path) if isinstance(row, Rejected)]
    assert len(bad) == 3
    assert all(len(row.reason) <= SHOWN_CHARACTERS and len(row.id) <= SHOWN_CHARACTERS for row in bad)


def test_lines_are_the_same_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\n".join(
        [json.dumps(good(0)).encode(), b"", b"{", json.dumps(good(1)).encode() + b"\r", json.dumps(good(2)).encode()]
    )
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    whole = everything(path)
    assert [row.row for row in whole if isinstance(row, Rejected)] == [3]
    for size in (1, 2, 5, 64, len(data)):
        monkeypatch.setattr(readers, "CHUNK", size)
        assert everything(path) == whole


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("ending", PACK)
def test_packed_files_and_damaged_ones(tmp_path: Path, ending: str, kind: str) -> None:
    rows = [json.dumps(good(n) | {"pad": f"{n * 7919}" * 50}) for n in range(3000)]
    data = PACK[ending](("\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]").encode())
    path = tmp_path / f"data.{kind}.{ending}"
    path.write_bytes(data)
    assert [row.id for row in everything(path)] == [str(n) for n in range(3000)]
    path.write_bytes(data[: len(data) // 2] if ending != "zst" else b"zst?" + data[4:])
    with pytest.raises(ValueError, match=f"corpus.path .*data.{kind}.{ending}' is damaged or was copied in part"):
        everything(path)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ValueError, match=r"corpus.path .*data.parquet' is (not a readable Parquet file|damaged)"):
        everything(path)


class _Text:
    """A text file that notes how much was asked of it."""

    def __init__(self, text: str, asked: list[int]) -> None:
        self._text, self._asked = text, asked

    def read(self, size: int) -> str:
        self._asked.append(size)
        part, self._text = self._text[:size], self._text[size:]
        return part

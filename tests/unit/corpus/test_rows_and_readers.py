"""Rows of every format become conversations; malformed ones are named with their reason; shards are streamed and the same on every run."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.readers import Rejected, read_conversations
from fusion_ray.corpus.rows import RowError, parse_row
from fusion_ray.corpus.shards import REJECTED, decode_conversations, decode_rejected
from fusion_ray.records import Conversation, Message, conversation_schema
from fusion_ray.store import Artifact, Store

SHAREGPT = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = (Message("user", "Hi"), Message("assistant", "Hello"))


def turns(*contents: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SHAREGPT, PAIR),
        (MESSAGES, PAIR),
        ({"prompt": "Hi", "completion": "Hello"}, PAIR),
        ({"instruction": "Hi", "output": "Hello"}, PAIR),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            (Message("user", "Add\n\n1 2"), Message("assistant", "3")),
        ),
        (
            {"messages": [{"role": "system", "content": "Be brief"}, *MESSAGES["messages"]]},
            (Message("system", "Be brief"), *PAIR),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, MESSAGES["messages"][1]]}, PAIR),
    ],
)
def test_formats_are_told_apart(row: dict[str, object], expected: tuple[Message, ...]) -> None:
    assert parse_row(row, format="auto", dataset="d").messages == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "the row is a list"),
        ({"text": "x"}, "no known format"),
        ({"messages": "Hi"}, "expected a list of messages"),
        ({"messages": ["Hi"]}, "expected an object"),
        ({"messages": [{"role": "user", "content": 3}]}, "is a int, expected text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        (turns("Hi"), "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        (turns("Hi", "  \n"), "message 1 is an empty assistant message"),
        (turns("Hi", "a\ud800b"), "lone surrogate at character 1"),
        ({"messages": MESSAGES["messages"][::-1]}, "roles out of order: message 0 is assistant, expected user"),
        ({"messages": [*MESSAGES["messages"], {"role": "system", "content": "x"}]}, "message 2 is system"),
        ({"id": [1], **MESSAGES}, "`id` is a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
    ],
)
def test_malformed_rows_say_why(row: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason.replace("(", r"\(")):
        parse_row(row, format="auto", dataset="d")


def test_ids_are_stable_and_depend_on_the_content() -> None:
    first, again = (parse_row(MESSAGES, format="auto", dataset=name).id for name in ("d", "e"))
    assert first == again
    assert len(first) == 32
    assert parse_row(turns("Hi", "Hello!"), format="auto", dataset="d").id != first
    assert parse_row(SHAREGPT, format="auto", dataset="d").id == "a"


def everything(path: Path) -> list[Conversation | Rejected]:
    return list(read_conversations([str(path)]))


def test_a_jsonl_file_names_its_bad_lines(tmp_path: Path) -> None:
    good = json.dumps(SHAREGPT).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n{broken\n\xff\xfe\n" + good + b'\n"text"\n{"id": "z"}\n')
    found = everything(path)
    assert isinstance(found[0], Conversation)
    bad = [row for row in found if isinstance(row, Rejected)]
    assert [(row.row, row.id) for row in bad] == [(3, ""), (4, ""), (5, "a"), (6, ""), (7, "z")]
    for row, words in zip(bad, ("not JSON", "not UTF-8", "seen before", "is a str", "no known format"), strict=True):
        assert words in row.reason


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_json_array_is_read_in_chunks(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_ray.corpus.readers.CHUNK", size)
    rows = [turns(f'Question {n} \\ " é', f"Answer {n}") for n in range(5)]
    path = tmp_path / "data.json"
    path.write_text(" " + json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.messages[1].content for row in everything(path)] == [f"Answer {n}" for n in range(5)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert [row.messages[1].content for row in everything(path)] == [f"Answer {n}" for n in range(5)]
    path.write_text(json.dumps(rows)[:-40], encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read past row 4"):
        everything(path)


def test_parquet_and_compressed_files(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([SHAREGPT, SHAREGPT | {"id": "b"}]), tmp_path / "data.parquet")
    assert [row.id for row in everything(tmp_path / "data.parquet")] == ["a", "b"]
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write(json.dumps(SHAREGPT))
    assert [row.id for row in everything(tmp_path / "data.jsonl.gz")] == ["a"]


@pytest.mark.parametrize(
    ("name", "words"), [("gone.jsonl", "does not exist"), ("data.csv", "expected a file ending in")]
)
def test_a_file_that_cannot_be_read_names_the_key(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=f"corpus.path .*{name}.*{words}"):
        everything(tmp_path / name)


def write(tmp_path: Path, good: int, bad: int) -> str:
    rows = [json.dumps(turns(f"Question {n}", f"Answer {n}")) for n in range(good)] + ["{"] * bad
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows))
    return str(path)


def run(
    tmp_path: Path, path: str, *, name: str = "a", max_rows: int | None = None, max_rejected: float = 0.2
) -> Artifact:
    out = Store(str(tmp_path / "store")).artifact("corpus", 1, {"name": name}, {})
    ingest(
        out,
        paths=[path],
        format="auto",
        rows_per_shard=4,
        max_rows=max_rows,
        max_rejected=max_rejected,
        report=lambda figures: None,
    )
    return out


def test_ingest_writes_shards_and_keeps_what_it_rejects(tmp_path: Path) -> None:
    path = write(tmp_path, good=10, bad=2)
    out = run(tmp_path, path)
    manifest = out.manifest()
    assert [(unit.name, unit.rows) for unit in manifest.units] == [
        (REJECTED, 2),
        ("shard-00000.parquet", 4),
        ("shard-00001.parquet", 4),
        ("shard-00002.parquet", 2),
    ]
    counts = {"read": 12, "kept": 10, "rejected": 2, "duplicates": 0}
    assert manifest.info == {
        **{"rows": 10, "rejected": 2, "duplicates": 0, "shards": 3},
        "sources": {"data.jsonl": counts},
    }
    rows = [row for n in range(3) for row in decode_conversations(out.read_bytes(f"shard-{n:05d}.parquet"))]
    assert [row.messages[1].content for row in rows] == [f"Answer {n}" for n in range(10)]
    assert pq.read_schema(pa.BufferReader(out.read_bytes("shard-00000.parquet"))).equals(conversation_schema())
    assert [(row.dataset, row.row) for row in decode_rejected(out.read_bytes(REJECTED))] == [
        ("data.jsonl", 11),
        ("data.jsonl", 12),
    ]
    again = run(tmp_path, path, name="b")
    assert [unit.sha256 for unit in again.manifest().units] == [unit.sha256 for unit in manifest.units]


def test_ingest_stops_at_max_rows(tmp_path: Path) -> None:
    assert run(tmp_path, write(tmp_path, good=10, bad=0), max_rows=5).manifest().info["rows"] == 5


def test_too_many_malformed_rows_fail_with_file_row_and_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 of 10 rows .*corpus.max_rejected = 0.2.*data.jsonl row 8: not JSON"):
        run(tmp_path, write(tmp_path, good=7, bad=3))
    assert not Store(str(tmp_path / "store")).artifact("corpus", 1, {"name": "a"}, {}).sealed


@pytest.mark.parametrize(("bad", "words"), [(0, "there are no rows"), (2, "all 2 rows were rejected")])
def test_an_empty_corpus_is_an_error(tmp_path: Path, bad: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"the corpus is empty.*{words}"):
        run(tmp_path, write(tmp_path, good=0, bad=bad), max_rejected=1.0)


def test_another_key_is_named_where_the_file_is_another_one_s(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluate\.heldout .*does not exist"):
        list(read_conversations([str(tmp_path / "none.jsonl")], key="evaluate.heldout"))

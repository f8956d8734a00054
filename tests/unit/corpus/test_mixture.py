"""Sources mixed by weight, copies left out, and what one corpus holds in memory at a time."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_ray.corpus import ingest as ingest_module
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.mixture import Source, interleave, shuffled
from fusion_ray.corpus.seen import Seen, id_digest
from fusion_ray.corpus.shards import GROUP, REJECTED, decode_conversations, decode_rejected, shard_name
from fusion_ray.records import Conversation
from fusion_ray.store import Artifact, Store


def mixed(lengths: list[int | None], weights: list[float], seed: int = 0) -> Iterator[int]:
    """The number of the source of each row; a length of None never ends."""
    sources = [
        iter([n] * length) if length is not None else iter(lambda n=n: n, None) for n, length in enumerate(lengths)
    ]
    return interleave(sources, weights=weights, generator=random.Random(seed))


@pytest.mark.parametrize("seed", range(5))
def test_every_stretch_has_the_weights_shares(seed: int) -> None:
    weights = [5.0, 3.0, 0.5]
    rows = list(islice(mixed([None] * 3, weights, seed), 850))
    for end in range(0, 851, 17):
        counts = Counter(rows[:end])
        for number, weight in enumerate(weights):
            assert abs(counts[number] - end * weight / sum(weights)) < 2
    assert rows == list(islice(mixed([None] * 3, weights, seed), 850))
    assert rows != list(islice(mixed([None] * 3, weights, seed + 1), 850))


def test_a_source_that_ends_leaves_its_share_to_the_others_in_proportion() -> None:
    rows = list(islice(mixed([3, None, None], [8, 2, 1]), 303))
    assert Counter(rows) == {0: 3, 1: 200, 2: 100}
    assert sorted(mixed([2, 0, 5], [1, 1, 1])) == [0, 0, 2, 2, 2, 2, 2]


def test_one_row_of_a_source_is_read_ahead_at_most() -> None:
    read: list[int] = []

    def source(number: int) -> Iterator[int]:
        for row in range(100):
            read.append(number)
            yield row

    rows = interleave([source(0), source(1)], weights=[1, 1], generator=random.Random(0))
    assert len(list(islice(rows, 20))) == 20
    assert len(read) == 20


def test_shuffled_rows_are_the_same_rows_within_the_buffer() -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for row in range(1000):
            read += 1
            yield row

    rows = shuffled(source(), size=50, generator=random.Random(3))
    first = next(rows)
    assert read == 51
    found = [first, *rows]
    assert sorted(found) == list(range(1000))
    assert found != sorted(found)
    assert all(row - place <= 50 for place, row in enumerate(found))  # nothing comes before it was read
    assert found == list(shuffled(iter(range(1000)), size=50, generator=random.Random(3)))
    assert sorted(shuffled(iter(range(3)), size=50, generator=random.Random(3))) == [0, 1, 2]


def row(question: str, answer: str = "Yes.", **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows))
    return str(path)


def run(tmp_path: Path, name: str = "out", **settings: object) -> Artifact:
    out = Store(str(tmp_path / "store")).artifact("corpus", 1, {"name": name}, {})
    given = {
        "format": "auto",
        "rows_per_shard": 7,
        "max_rows": None,
        "max_rejected": 0.2,
        "report": lambda figures: None,
    }
    ingest(out, **(given | settings))  # type: ignore[arg-type]
    return out


def rows_of(out: Artifact) -> list[Conversation]:
    names = [unit.name for unit in out.manifest().units if unit.name != REJECTED]
    return [one for name in names for one in decode_conversations(out.read_bytes(name))]


def sources(tmp_path: Path, **settings: dict[str, object]) -> list[Source]:
    """A source of 40 rows for each name, whose rows have the ids 0 to 39."""
    found = []
    for number, (name, more) in enumerate(settings.items()):
        path = write(tmp_path / f"{name}.jsonl", [row(f"{name} {n}", id=n) for n in range(40)])
        found.append(
            Source(
                **({"name": name, "paths": (path,), "format": "auto", "key": f"corpus.mixture.{number}.path"} | more)
            )
        )  # type: ignore[arg-type]
    return found


def test_a_mixture_has_its_weights_its_caps_and_its_counts(tmp_path: Path) -> None:
    mixture = sources(tmp_path, a={"weight": 3.0}, b={"weight": 1.0}, c={"weight": 1.0, "max_rows": 2})
    out = run(tmp_path, mixture=mixture, max_rows=30)
    rows = rows_of(out)
    assert Counter(one.dataset for one in rows) == {"a": 21, "b": 7, "c": 2}
    assert [one.id for one in rows if one.dataset == "b"] == [f"b/{n}" for n in range(7)]  # 0 to 6 of every source
    info = out.manifest().info
    assert (info["rows"], info["duplicates"], info["rejected"]) == (30, 0, 0)
    assert info["sources"] == {
        name: {"read": kept, "kept": kept, "rejected": 0, "duplicates": 0}
        for name, kept in (("a", 21), ("b", 7), ("c", 2))
    }
    again, other = (run(tmp_path, str(seed), mixture=mixture, max_rows=30, seed=seed) for seed in (0, 1))
    shards = [[unit.sha256 for unit in artifact.manifest().units] for artifact in (out, again, other)]
    assert shards[0] == shards[1]
    assert shards[0] != shards[2]


def test_a_source_of_several_files_and_of_another_format(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p {n}", "completion": "x", "messages": []} for n in range(3)]
    paths = (write(tmp_path / "one.jsonl", pairs[:2]), write(tmp_path / "two.jsonl", [*pairs[2:], "{"]))
    mixture = [*sources(tmp_path, a={"max_rows": 9}), Source("pairs", paths, "prompt", "corpus.mixture.1.path")]
    out = run(tmp_path, mixture=mixture)
    assert Counter(one.dataset for one in rows_of(out)) == {"a": 9, "pairs:one.jsonl": 2, "pairs:two.jsonl": 1}
    assert [(bad.dataset, bad.row) for bad in decode_rejected(out.read_bytes(REJECTED))] == [("pairs:two.jsonl", 2)]
    assert out.manifest().info["sources"]["pairs"] == {"read": 4, "kept": 3, "rejected": 1, "duplicates": 0}  # type: ignore[index, call-overload]


def test_a_source_without_a_conversation_is_named(tmp_path: Path) -> None:
    broken = Source("broken", (write(tmp_path / "broken.jsonl", ["{", "[]"]),), "auto", "corpus.mixture.1.path")
    with pytest.raises(
        ValueError,
        match=r"corpus.mixture.1.path \(broken\) gave no conversation; 2 of its 2 rows .*broken row 1: not JSON",
    ):
        run(tmp_path, mixture=[*sources(tmp_path, a={}), broken], max_rejected=1.0)
    gone = Source("gone", (str(tmp_path / "gone.jsonl"),), "auto", "corpus.mixture.0.path")
    with pytest.raises(ValueError, match=r"corpus.mixture.0.path .*gone.jsonl' does not exist"):
        run(tmp_path, mixture=[gone])


COPIES = [
    row("first", id="a"),
    row("first", id="b"),  # the same messages
    row("first", id="a"),  # the same in all
    row("first", answer="No.", id="a"),  # another conversation under an id that is taken
    row("first "),
    row("first "),  # a copy without an id
    row("second", id="c"),
]


@pytest.mark.parametrize(
    ("deduplicate", "ids", "duplicates", "rejected"),
    [(True, ["a", None, "c"], 3, 1), (False, ["a", "b", None, "c"], 1, 2)],
)
def test_copies_are_left_out_and_counted(
    tmp_path: Path, deduplicate: bool, ids: list[str | None], duplicates: int, rejected: int
) -> None:
    out = run(tmp_path, paths=[write(tmp_path / "data.jsonl", list(COPIES))], deduplicate=deduplicate, max_rejected=0.5)
    assert [one.id if len(one.id) == 1 else None for one in rows_of(out)] == ids
    info = out.manifest().info
    assert (info["rows"], info["duplicates"], info["rejected"]) == (len(ids), duplicates, rejected)
    assert all("was seen before" in bad.reason for bad in decode_rejected(out.read_bytes(REJECTED)))


def test_a_rejected_row_hides_no_good_one(tmp_path: Path) -> None:
    """Its id is taken, its messages are not: they are kept where they come again. And a copy's id is not taken by it."""
    rows = [row("x", id="a"), row("y", id="a"), row("y", id="b"), row("y", id="c"), row("z", id="c")]
    out = run(tmp_path, paths=[write(tmp_path / "data.jsonl", list(rows))], deduplicate=True)
    assert [(one.id, one.messages[0].content) for one in rows_of(out)] == [("a", "x"), ("b", "y"), ("c", "z")]
    assert (out.manifest().info["duplicates"], out.manifest().info["rejected"]) == (1, 1)


def test_copies_alone_never_fail_a_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [row("the same")] * 50)
    out = run(tmp_path, paths=[path], max_rejected=0.0)
    assert (out.manifest().info["rows"], out.manifest().info["duplicates"]) == (1, 49)


def test_copies_across_the_sources_of_a_mixture(tmp_path: Path) -> None:
    """Of two sources with the same 10 rows under other ids each row is kept once, whichever source had it first."""
    paths = [write(tmp_path / f"{name}.jsonl", [row(f"q {n}", id=f"{name}{n}") for n in range(10)]) for name in "ab"]
    mixture = [Source(name, (path,), "auto", "corpus.mixture.0.path") for name, path in zip("ab", paths, strict=True)]
    out = run(tmp_path, mixture=mixture, deduplicate=True)
    assert sorted(one.messages[0].content for one in rows_of(out)) == sorted(f"q {n}" for n in range(10))
    assert (out.manifest().info["duplicates"], out.manifest().info["rejected"]) == (10, 0)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_mixture_on_object_storage(tmp_path: Path, ending: str) -> None:
    rows = [row(f"q {n}", id=n) for n in range(5)]
    data = "\n".join(map(json.dumps, rows)).encode()
    url = f"memory://{tmp_path.name}/rows.{ending}"
    with fsspec.open(url, "wb", compression="infer") as file:
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write(data)
    out = run(tmp_path, mixture=[Source("far", (url,), "auto", "corpus.mixture.0.path")])
    assert [one.id for one in rows_of(out)] == [f"far/{n}" for n in range(5)]


def test_shuffle_rows_keeps_the_rows_and_the_cap(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [row(f"q {n}", id=n) for n in range(40)])
    ids = [one.id for one in rows_of(run(tmp_path, paths=[path], max_rows=30, shuffle_rows=10, seed=1))]
    assert sorted(map(int, ids)) == list(range(30))
    assert ids != sorted(ids, key=int)


def test_seen_digests() -> None:
    seen = Seen()
    assert [seen.add(id_digest(name)) for name in ("a", "b", "a", "")] == [True, True, False, True]
    assert [id_digest(name) in seen for name in ("b", "c")] == [True, False]
    assert id_digest("c") not in seen
    assert len(id_digest("a")) == 16


def test_seen_digests_go_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_ray.corpus.seen.CACHE", 64 << 10)
    seen = Seen()
    assert all(seen.add(id_digest(str(number))) for number in range(20_000))
    assert not any(seen.add(id_digest(str(number))) for number in range(0, 20_000, 7))


def test_a_full_temporary_folder_is_told_of() -> None:
    seen = Seen()
    seen._database.execute("PRAGMA max_page_count = 4")
    with pytest.raises(OSError, match=r"cannot note which rows of the corpus were seen: .* full.* set SQLITE_TMPDIR"):
        all(seen.add(id_digest(str(number))) for number in range(10_000))


def test_many_rejected_rows_are_written_in_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [row("good"), *["{"] * (2 * GROUP + 5)])
    out = run(tmp_path, paths=[path], max_rejected=1.0)
    rejected = decode_rejected(out.read_bytes(REJECTED))
    assert [bad.row for bad in rejected] == list(range(2, 2 * GROUP + 7))
    assert {bad.reason for bad in rejected} == {
        "not JSON: Expecting property name enclosed in double quotes at character 1"
    }
    out.verify()


def test_a_shard_of_long_rows_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "SHARD_CHARACTERS", 1000)
    path = write(tmp_path / "data.jsonl", [row(f"{n}" * 400) for n in range(5)])
    out = run(tmp_path, paths=[path])
    assert [unit.rows for unit in out.manifest().units if unit.name != REJECTED] == [3, 2]
    assert out.manifest().units[1].name == shard_name(0)

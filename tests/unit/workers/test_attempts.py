"""Markers of engine deaths: who is suspected, read alone and quarantined; a shard is committed once. The engine here is a stand-in that dies where told,
as a real one cannot be made to; tests/ray/test_teach.py kills real ones."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest

from fusion_ray.corpus.ingest import ingest
from fusion_ray.logprobs.codec import TeacherRow, decode, from_table, to_table
from fusion_ray.records import Conversation
from fusion_ray.store import Artifact, Store
from fusion_ray.workers.attempts import MAX_TRIES, Attempts, TeachError
from fusion_ray.workers.teach_shard import EngineBrokenError, teach_shard
from fusion_ray.workers.teacher import Counts, Taught

SHARD = "shard-00000.parquet"


class Died(BaseException):
    """The process is gone: nothing after it runs, so nothing may catch it."""


class Mortal:
    """Reads rows in batches of four and dies on `poison`, or breaks with an error while `broken`."""

    def __init__(self, poison: str = "", broken: bool = False) -> None:
        self.poison, self.broken = poison, broken
        self.batches: list[list[str]] = []

    def teach(
        self,
        conversations: Sequence[Conversation],
        *,
        alone: Collection[str] = (),
        quarantined: Collection[str] = (),
        starting: Callable[[list[str]], None] = lambda ids: None,
    ) -> Taught:
        if self.broken:
            raise RuntimeError("out of memory")
        names = [row.id for row in conversations if row.id not in quarantined]
        together = [name for name in names if name not in alone]
        batches = [together[n : n + 4] for n in range(0, len(together), 4)]
        for batch in [*batches, *([name] for name in names if name in alone)]:
            starting(batch)
            self.batches.append(batch)
            if self.poison in batch:
                raise Died
        empty = np.zeros(1, np.int32)
        rows = [
            TeacherRow(name, empty, empty, empty, empty, empty.astype(np.int16), empty.reshape(1, 1),
                       np.zeros((1, 1), np.float16), np.zeros(1, np.float32))
            for name in names
        ]  # fmt: skip
        return Taught(to_table(rows, top_k=1), Counts(rows=len(rows), quarantined=len(quarantined)), ())


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    lines = [f'{{"id": "r{n}", "prompt": "q", "completion": "a{n}"}}' for n in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    out = Store(str(tmp_path / "store")).artifact("corpus", 1, {}, {})
    settings = {"format": "auto", "rows_per_shard": 100, "max_rows": None, "max_rejected": 0.0}
    ingest(out, paths=[str(tmp_path / "data.jsonl")], report=lambda figures: None, **settings)  # type: ignore[arg-type]
    return out


@pytest.fixture(params=["file", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    url = str(tmp_path / "out") if request.param == "file" else f"memory://{tmp_path.name}/{request.node.name}"
    return Store(url).artifact("teach", 1, {}, {})


def test_a_row_that_kills_twice_alone_is_left_out(corpus: Artifact, out: Artifact) -> None:
    lives = [Mortal("r5") for _ in range(4)]
    for life in lives[:3]:
        with pytest.raises(Died):
            teach_shard(life, corpus, out, SHARD)
        assert out.unit(SHARD) is None
    unit = teach_shard(lives[3], corpus, out, SHARD)
    assert lives[0].batches[-1] == ["r4", "r5", "r6", "r7"]
    assert lives[1].batches[-1] == lives[2].batches[-1] == ["r5"]
    assert (unit.rows, unit.info["quarantined"]) == (9, 1)
    taught = [row.id for row in from_table(decode(out.read_bytes(SHARD)))]
    assert taught == [f"r{n}" for n in range(10) if n != 5]
    assert not out.exists("_attempts") or not out.names("_attempts")


def test_deaths_of_other_causes_quarantine_nothing(corpus: Artifact, out: Artifact) -> None:
    """A machine that is taken away at three different rows: all rows come back."""
    for name in ("r1", "r8", "r2"):
        with pytest.raises(Died):
            teach_shard(Mortal(name), corpus, out, SHARD)
    assert teach_shard(Mortal(), corpus, out, SHARD).rows == 10


def test_a_committed_shard_is_not_taught_again(corpus: Artifact, out: Artifact) -> None:
    first = teach_shard(Mortal(), corpus, out, SHARD)
    second = Mortal()
    assert teach_shard(second, corpus, out, SHARD) == first
    assert second.batches == []


def test_an_engine_that_always_breaks_ends_with_its_reason(corpus: Artifact, out: Artifact) -> None:
    for _ in range(MAX_TRIES):
        with pytest.raises(EngineBrokenError, match="out of memory"):
            teach_shard(Mortal(broken=True), corpus, out, SHARD)
    with pytest.raises(TeachError, match=r"shard-00000.parquet was taken up 25 times .*RuntimeError: out of memory"):
        teach_shard(Mortal(broken=True), corpus, out, SHARD)


def test_the_marker_says_what_is_in_hand(out: Artifact) -> None:
    attempts = Attempts(out, SHARD)
    attempts.starting(["a", "b"])
    assert out.read_json(f"_attempts/{SHARD}.json")["running"] == ["a", "b"]
    assert Attempts(out, SHARD).alone == {"a", "b"}

"""A shard whose teacher fails with what a user must mend: no row is blamed for it."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from fusion_ray.corpus.ingest import ingest
from fusion_ray.logprobs.codec import to_table
from fusion_ray.records import Conversation
from fusion_ray.store import Store
from fusion_ray.workers.judge import UnreachableError
from fusion_ray.workers.teach_shard import teach_shard
from fusion_ray.workers.teacher import Counts, Starting, Taught


class Away:
    """A teacher whose server is out of reach while `away`; remembers whom it was told to read alone or not at all."""

    def __init__(self) -> None:
        self.away = True
        self.blamed: list[str] = []

    def teach(
        self,
        conversations: Sequence[Conversation],
        *,
        alone: Collection[str] = (),
        quarantined: Collection[str] = (),
        starting: Starting = lambda ids: None,
    ) -> Taught:
        self.blamed += [*alone, *quarantined]
        starting([conversations[0].id])
        if self.away:
            raise UnreachableError("http://host/v1 gave no answer")
        return Taught(to_table([], top_k=2), Counts(rows=1), ())


def test_a_server_that_is_away_is_no_fault_of_the_row_in_hand(tmp_path: Path) -> None:
    row = '{"id": "one", "messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]}'
    (tmp_path / "data.jsonl").write_text(row)
    store = Store(str(tmp_path / "store"))
    corpus, out = store.artifact("corpus", 1, {}, {}), store.artifact("teach", 1, {}, {})
    settings = {"format": "auto", "rows_per_shard": 4, "max_rows": None, "max_rejected": 0.0}
    ingest(corpus, paths=[str(tmp_path / "data.jsonl")], report=lambda figures: None, **settings)  # type: ignore[arg-type]
    (shard,) = (unit.name for unit in corpus.manifest().units if unit.name.startswith("shard-"))
    teacher = Away()
    for _ in range(4):  # an engine's death counts twice before a row is quarantined
        with pytest.raises(UnreachableError):
            teach_shard(teacher, corpus, out, shard)
    teacher.away = False
    assert teach_shard(teacher, corpus, out, shard).info["rows"] == 1
    assert teacher.blamed == []

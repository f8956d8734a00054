"""Rows of aligned shards: what a batch holds, cutting, empty masks, and shards that do not fit this pivot."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_ray.records import aligned_schema, teacher_schema
from fusion_ray.workers.rows import Rows

_spec = importlib.util.spec_from_file_location("training", Path(__file__).parents[2] / "ray" / "training.py")
assert _spec is not None
assert _spec.loader is not None
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)
K = training.K


def opened(tmp_path: Path, shards: list[Path], **changes: object) -> Rows:
    how: dict[str, object] = {"cache": tmp_path / "cache", "vocabulary": 600, "max_length": 100, "targets": True}
    return Rows(shards, **(how | changes))  # type: ignore[arg-type]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=aligned_schema(K)), path)
    return path


def plain_row(**changes: object) -> dict[str, object]:
    row = training.aligned_row(np.random.default_rng(0), "r", 600)
    return (
        row
        | {"ids": list(range(10, 22)), "position": [3, 4, 10], "has_target": [True, False, True]}
        | {
            "from_source": [True, False, False],
            "kind": [0, 0, 0],
            "topk_ids": list(range(100, 100 + 3 * K)),
            "topk_logprobs": [-0.5 - 0.25 * i for i in range(3 * K)],
            **changes,
        }
    )


def test_a_batch_holds_labels_one_after_their_positions(tmp_path: Path) -> None:
    """The shift, by hand: position 3 has read ids 10..13 and predicts id 14."""
    short = plain_row(id="s", ids=[7, 8, 9], position=[1], has_target=[True], from_source=[False], kind=[0])
    short |= {"topk_ids": [1, 2, 3, 4], "topk_logprobs": [-1.0] * K}
    batch = opened(tmp_path, [write(tmp_path / "a.parquet", [short, plain_row()])]).collate([[1], [0]])
    assert batch.ids.tolist() == [list(range(10, 22)), [7, 8, 9] + [0] * 9]
    assert batch.position.tolist() == [3, 4, 10, 12 + 1]
    assert batch.head_ids[:, 0].tolist() == [14, 15, 21, 9]
    assert batch.head_ids[1, 1:].tolist() == [104, 105, 106, 107]
    assert batch.topk_logprobs is not None
    assert batch.topk_logprobs[3].tolist() == [-1.0] * K
    assert batch.has_target is not None
    assert batch.has_target.tolist() == [True, False, True, True]
    assert batch.from_source is not None
    assert batch.from_source.tolist() == [True, False, False, False]


def test_rows_are_cut_and_empty_ones_counted(tmp_path: Path) -> None:
    rows = [
        plain_row(id="whole"),
        plain_row(id="none", position=[], has_target=[], from_source=[], kind=[], topk_ids=[], topk_logprobs=[]),
    ]
    path = write(tmp_path / "a.parquet", rows)
    cut = opened(tmp_path, [path], max_length=6)
    assert (len(cut), cut.cut, cut.empty) == (1, 2, 1)
    assert (cut.lengths.tolist(), cut.positions.tolist()) == ([6], [2])
    batch = cut.collate([[0]])
    assert batch.head_ids[:, 0].tolist() == [14, 15]
    assert opened(tmp_path, [path], max_length=4).empty == 2  # id 14 itself is cut off


def test_many_shards_are_one_sequence_of_rows(tmp_path: Path) -> None:
    shards = training.write_shards(tmp_path / "rows", rows=20, shards=3)
    rows = opened(tmp_path, shards)
    table = pa.concat_tables([pq.read_table(path) for path in shards]).to_pylist()
    usable = [row for row in table if row["position"]]
    assert (len(rows), rows.empty) == (19, 1)
    for number, row in enumerate(usable):
        assert rows.id(number) == row["id"]
        batch = rows.collate([[number]])
        assert batch.ids[0].tolist() == row["ids"]
        assert batch.head_ids[:, 1:].ravel().tolist() == row["topk_ids"]
        assert rows.positions[number] == len(row["position"])


def test_teacher_rows_give_ids_and_positions_alone(tmp_path: Path) -> None:
    row = {
        "id": "t",
        "ids": [5, 6, 7, 8],
        "position": [1, 2],
        "byte_start": [0, 1],
        "byte_end": [1, 2],
        "message": [1, 1],
    }
    row |= {"topk_ids": [1] * 4, "topk_logprobs": [-1.0] * 4, "label_logprob": [-1.0, -1.0]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist([row], schema=teacher_schema(2)), path)
    batch = opened(tmp_path, [path], targets=False).collate([[0]])
    assert batch.head_ids.tolist() == [[7], [8]]
    assert batch.topk_logprobs is None
    with pytest.raises(ValueError, match=r"no column 'has_target'.*distill.fusion"):
        opened(tmp_path, [path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [10, 600, *range(12, 22)]}, r"row 'r' has ids outside the pivot's embedding of 600 rows \(id 600\)"),
        ({"topk_ids": [-1, *range(11)]}, r"row 'r' has target ids outside .*\(id -1\)"),
        ({"position": [3, 4, 11]}, "row 'r' predicts from position 11, but it has 12 tokens"),
        ({"topk_ids": list(range(8)), "topk_logprobs": [-1.0] * 8}, "row 'r' has 3 positions, but 8 target ids"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    good = plain_row(id="good")
    path = write(tmp_path / "a.parquet", [good, plain_row(**changes)])
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, [path])


def test_a_shard_of_another_pivot_is_refused_though_its_ids_would_do(tmp_path: Path) -> None:
    schema = aligned_schema(K, pivot="aaaa1111")
    pq.write_table(pa.Table.from_pylist([plain_row()], schema=schema), tmp_path / "a.parquet")
    assert len(opened(tmp_path, [tmp_path / "a.parquet"], pivot="aaaa1111")) == 1
    with pytest.raises(
        ValueError, match=r"a.parquet was made for the pivot with the fingerprint aaaa1111, .* the pivot bbbb2222"
    ):
        opened(tmp_path, [tmp_path / "a.parquet"], pivot="bbbb2222")


def test_too_many_rows_without_a_position_are_an_error(tmp_path: Path) -> None:
    empty = {"position": [], "has_target": [], "from_source": [], "kind": [], "topk_ids": [], "topk_logprobs": []}
    path = write(
        tmp_path / "a.parquet", [plain_row(id=f"r{number}", **(empty if number else {})) for number in range(20)]
    )
    rows = opened(tmp_path, [path])
    assert (len(rows), rows.empty) == (1, 19)
    rows.check_empty(0.95)
    with pytest.raises(ValueError, match=r"19 of 20 rows have no position .* 0.01 allows: 'r1', 'r2', .*'r8' and more"):
        rows.check_empty(0.01)

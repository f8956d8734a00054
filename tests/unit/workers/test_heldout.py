"""Held-out rows: which they are whatever holds them, their bytes, the bits per byte against a plain forward, and what the run keeps of them."""

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from fusion_ray.records import aligned_schema, teacher_schema
from fusion_ray.workers.heldout import Heldout, hold_out, is_heldout
from fusion_ray.workers.rows import Rows
from fusion_ray.workers.student import Student, load_student


def _helper(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training = _helper("training", Path(__file__).parents[2] / "ray" / "training.py")
tiny = _helper("tiny", Path(__file__).parents[2] / "tiny.py")

CPU = torch.device("cpu")
IDS = [f"row-{number}" for number in range(2000)]


def opened(cache: Path, shards: list[Path], **changes: object) -> Rows:
    how: dict[str, object] = {"vocabulary": 600, "max_length": 100, "targets": True, "with_bytes": True}
    return Rows(shards, cache=cache, **(how | changes))  # type: ignore[arg-type]


def names(rows: Rows) -> list[str]:
    return [rows.id(number) for number in range(len(rows))]


def teacher_row(aligned: dict[str, object], widths: list[int] | None = None) -> dict[str, object]:
    """The row of the same conversation as the pivot's teacher has it, `widths` bytes a position (3, as aligned rows of the tests have)."""
    positions = aligned["position"]
    assert isinstance(positions, list)
    ends = np.cumsum(widths if widths is not None else [3] * len(positions)).tolist()
    row = {name: aligned[name] for name in ("id", "ids", "position")}
    return row | {
        "byte_start": [0, *ends[:-1]] if ends else [],
        "byte_end": ends,
        "message": [1] * len(positions),
        "topk_ids": [1] * (2 * len(positions)),
        "topk_logprobs": [-1.0] * (2 * len(positions)),
        "label_logprob": [-1.0] * len(positions),
    }


def write_teacher(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=teacher_schema(2)), path)
    return path


def write_aligned(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=aligned_schema(training.K)), path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return list(training.write_shards(tmp_path / "rows", rows=40))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.49])
def test_the_share_is_met_by_rows_that_only_id_and_seed_choose(share: float) -> None:
    chosen = [name for name in IDS if is_heldout(name, share=share, seed=7)]
    assert abs(len(chosen) - share * 2000) < 4 * math.sqrt(2000 * share * (1 - share))
    assert {name for name in reversed(IDS) if is_heldout(name, share=share, seed=7)} == set(chosen)
    other = {name for name in IDS if is_heldout(name, share=share, seed=8)}
    assert abs(len(other & set(chosen)) - share**2 * 2000) < 4 * math.sqrt(2000) * share + 4  # as two draws would
    more = {name for name in IDS if is_heldout(name, share=share + 0.01, seed=7)}
    assert set(chosen) < more  # a larger share keeps the rows that a smaller one holds out


def test_the_choice_by_hand() -> None:
    """sha256 of the seed and the id, as a part of all hashes: it must be the same in every version."""
    assert [name for name in IDS[:20] if is_heldout(name, share=0.2, seed=7)] == ["row-0", "row-18"]


def test_aligned_and_teacher_shards_hold_out_the_same_conversations(tmp_path: Path, shards: list[Path]) -> None:
    table = [row for path in shards for row in pq.read_table(path).to_pylist()]
    table = [table[number] for number in np.random.default_rng(1).permutation(len(table))]
    taught = [write_teacher(tmp_path / "teacher.parquet", [teacher_row(row) for row in table])]
    aligned = hold_out(opened(tmp_path / "a", shards), share=0.2, seed=3)
    teacher = hold_out(opened(tmp_path / "t", taught, targets=False), share=0.2, seed=3)
    usable = [row["id"] for row in table if row["position"]]
    for mine, theirs in zip(aligned, teacher, strict=True):
        assert set(names(mine)) == set(names(theirs))
        assert mine.bytes.sum() == theirs.bytes.sum()
    assert set(names(aligned[1])) == {name for name in usable if is_heldout(name, share=0.2, seed=3)}
    assert len(aligned[0]) + len(aligned[1]) == len(usable)


def test_the_rows_to_train_on_are_those_of_shards_without_the_others(tmp_path: Path, shards: list[Path]) -> None:
    rows, heldout = hold_out(opened(tmp_path / "a", shards), share=0.2, seed=3)
    kept = [row for path in shards for row in pq.read_table(path).to_pylist() if row["id"] not in set(names(heldout))]
    lacking = opened(tmp_path / "b", [write_aligned(tmp_path / "kept.parquet", kept)])
    assert names(rows) == names(lacking)
    assert rows.lengths.tolist() == lacking.lengths.tolist()
    assert rows.positions.tolist() == lacking.positions.tolist()
    for row in range(len(rows)):
        mine, theirs = rows.collate([[row]]), lacking.collate([[row]])
        for name in ("ids", "position", "head_ids", "topk_logprobs", "has_target", "from_source"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))


def test_bytes_of_whole_and_of_cut_rows(tmp_path: Path) -> None:
    """Teacher rows tell each position's bytes, aligned rows their sum: there a cut row has its share of positions of it."""
    row = training.aligned_row(np.random.default_rng(0), "r", 600)
    row |= {"ids": list(range(10, 22)), "position": [3, 4, 5, 10], "kind": [0] * 4, "bytes": 11}
    row |= {"has_target": [True] * 4, "from_source": [True] * 4}
    row |= {"topk_ids": [1] * (4 * training.K), "topk_logprobs": [-1.0] * (4 * training.K)}
    empty = row | {"id": "empty", "position": [], "kind": [], "has_target": [], "from_source": [], "bytes": 0}
    empty |= {"topk_ids": [], "topk_logprobs": []}
    aligned = [write_aligned(tmp_path / "a.parquet", [empty, row])]
    taught = [write_teacher(tmp_path / "t.parquet", [teacher_row(empty, []), teacher_row(row, [5, 1, 5, 0])])]
    for length, positions, exact, shared in (
        (100, 4, 11, 11),
        (7, 3, 11, 11 * 3 / 4),
        (6, 2, 6, 11 / 2),
        (5, 1, 5, 11 / 4),
    ):
        one = opened(tmp_path / f"a{length}", aligned, max_length=length)
        other = opened(tmp_path / f"t{length}", taught, max_length=length, targets=False)
        assert (one.positions.tolist(), other.positions.tolist()) == ([positions], [positions])
        assert (one.bytes.tolist(), other.bytes.tolist()) == ([shared], [exact])
    plain = opened(tmp_path / "plain", aligned, targets=False)  # the control may be trained on aligned rows too
    assert plain.bytes.tolist() == [11]
    assert not len(opened(tmp_path / "without", aligned, with_bytes=False).bytes)


def test_rows_without_bytes_are_refused(tmp_path: Path, shards: list[Path]) -> None:
    path = tmp_path / "old.parquet"
    pq.write_table(pq.read_table(shards[0]).drop_columns(["bytes"]), path)
    assert len(opened(tmp_path / "cache", [path], with_bytes=False))
    with pytest.raises(ValueError, match=r"old\.parquet has no column 'bytes'.*distill\.heldout_share"):
        opened(tmp_path / "cache", [path])


@pytest.mark.parametrize(("count", "share", "held"), [(8, 0.0001, 0), (1, 0.4999, 1)])
def test_a_share_that_leaves_nothing_is_refused_with_the_counts(
    tmp_path: Path, count: int, share: float, held: int
) -> None:
    rng = np.random.default_rng(0)
    wanted = [name for name in IDS if is_heldout(name, share=share, seed=1) == bool(held)][:count]
    path = write_aligned(tmp_path / "a.parquet", [training.aligned_row(rng, name, 600) for name in wanted])
    with pytest.raises(ValueError, match=rf"distill\.heldout_share {share} holds out {held} of {count} rows"):
        hold_out(opened(tmp_path / "cache", [path]), share=share, seed=1)


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.make_tiny_model(tmp_path_factory.mktemp("pivot"), "llama"))


@pytest.fixture(scope="module")
def student(pivot: Path) -> Student:
    objective: dict[str, str | float] = {"lm_weight": 0.1}
    return load_student(
        str(pivot), trust_remote_code=False, head_chunk=16, gradient_checkpointing=False, objective=objective
    )


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(before)


@pytest.mark.parametrize("packing", [False, True])
def test_bits_per_byte_against_a_plain_forward(
    tmp_path: Path, shards: list[Path], pivot: Path, student: Student, packing: bool
) -> None:
    rows = opened(tmp_path / "cache", shards, max_length=48)
    _, held = hold_out(rows, share=0.3, seed=1)
    model = AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.float32)
    table = {row["id"]: row for path in shards for row in pq.read_table(path).to_pylist()}
    bits = size = 0.0
    with torch.no_grad():
        for name in names(held):
            ids = table[name]["ids"][:48]
            left = [at for at in table[name]["position"] if at + 1 < 48]
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            bits -= sum(float(logprobs[at, ids[at + 1]]) for at in left) / math.log(2)
            size += 3 * len(left)
    heldout = Heldout(held, micro_batch_size=2, line_length=48 if packing else None)
    student.train()
    state = torch.get_rng_state()
    found = heldout.measure(student, CPU, step=0, totals={})
    assert found == {"heldout_bits_per_byte": pytest.approx(bits / size, rel=1e-6)}
    assert found == heldout.measure(student, CPU, step=1, totals={})
    assert torch.equal(state, torch.get_rng_state())
    assert student.training
    assert student.model.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_last_and_the_best_are_kept(
    tmp_path: Path, shards: list[Path], student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, held = hold_out(opened(tmp_path / "cache", shards), share=0.3, seed=1)
    heldout = Heldout(held, micro_batch_size=4, line_length=None)
    totals: dict[str, dict[str, float]] = {}
    for step, nats in enumerate([3.0, 1.0, 1.0, 2.0]):
        monkeypatch.setattr(heldout, "nats", lambda *_, nats=nats: (nats, []))
        heldout.measure(student, CPU, step=step, totals=totals)
    unit = 1 / math.log(2) / held.bytes.sum()
    assert heldout.facts(totals) == {
        "rows": len(held),
        "bytes": held.bytes.sum(),
        "last_bits_per_byte": pytest.approx(2 * unit),
        "last_step": 3,
        "best_bits_per_byte": pytest.approx(unit),
        "best_step": 1,
    }
    monkeypatch.setattr(heldout, "nats", lambda *_: (math.nan, [held.id(0)]))
    with pytest.raises(
        ValueError,
        match=r"held-out rows is not finite after step 4; rows of the micro-batches concerned: 'row-.*distill\.learning_rate",
    ):
        heldout.measure(student, CPU, step=4, totals=totals)


def test_when_it_is_due() -> None:
    assert [step for step in range(9) if Heldout.due(step, 8, every=3)] == [0, 3, 6, 8]
    assert [step for step in range(9) if Heldout.due(step, 8, every=50)] == [0, 8]

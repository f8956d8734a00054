"""`fusion-ray export` and `fusion-ray import`: what goes out comes back, with our own facts beside DistillKit's files and without them."""

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fusion_ray import exchange
from fusion_ray.cli import main
from fusion_ray.corpus.shards import encode_conversations, shard_name
from fusion_ray.exchange import CONFIGURATION, FACTS, label_logprobs
from fusion_ray.logprobs.codec import TeacherRow, decode, from_table
from fusion_ray.records import Conversation, Message
from tests import artefacts
from tests.artefacts import TOP_K, Made, make


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def written(made: Made, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made.settings))
    return str(path)


def rows_of(made: Made) -> list[TeacherRow]:
    shards = [unit.name for unit in made.teach.manifest().units if unit.name.startswith("shard-")]
    return [row for name in shards for row in from_table(decode(made.teach.read_bytes(name)))]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_export_comes_back_whole(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path, dtype: str) -> None:
    out, config = tmp_path / "out", written(made, tmp_path)
    assert say(capsys, "export", made.teach.url, str(out), "--dtype", dtype)[0] == 0
    assert pq.read_table(out / "shard-00000.parquet").column_names[:3] == [
        "input_ids",
        "compressed_logprobs",
        "bytepacked_indices",
    ]
    written_config = yaml.safe_load((out / CONFIGURATION).read_text())
    assert (written_config["k"], written_config["exact_k"], written_config["exact_dtype"]) == (TOP_K, TOP_K, dtype)
    before = rows_of(made)
    made.teach.remove()
    code, said, err = say(capsys, "import", str(out), config, "--teacher", "pivot")
    assert (code, err) == (0, "")
    assert "2 rows" in said
    assert "0 labels outside" in said
    for row, other in zip(before, rows_of(made), strict=True):
        for name in TeacherRow.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name), err_msg=name)
    made.teach.verify()
    assert "finished already" in say(capsys, "import", str(out), config, "--teacher", "pivot")[1]


def test_files_of_distillkit_itself_are_located_in_the_corpus(
    capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", written(made, tmp_path)
    assert say(capsys, "export", made.teach.url, str(out))[0] == 0
    shutil.rmtree(out / FACTS)
    before = rows_of(made)
    made.teach.remove()
    code, said, err = say(capsys, "import", str(out), config, "--teacher", "pivot")
    assert (code, err) == (0, "")
    outside = sum(len(row.position) // 2 for row in before)
    assert f"{outside} labels outside the top 4" in said
    for row, other in zip(before, rows_of(made), strict=True):
        for name in ("id", "ids", "position", "byte_start", "byte_end", "message", "topk_ids", "topk_logprobs"):
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name), err_msg=name)
        np.testing.assert_array_equal(row.label_logprob[::2], other.label_logprob[::2])
    assert made.teach.manifest().info["labels_bounded"] == outside


def test_a_label_outside_has_the_largest_value_that_it_can_have() -> None:
    ids = np.array([[1, 2], [1, 2], [1, 2]])
    logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.1], [0.7, 0.25]], np.float32))
    found, outside = label_logprobs(ids, logprobs, np.array([2, 3, 4]))
    # in the top-k; no likelier than the second; no likelier than what is left
    assert np.exp(found).tolist() == pytest.approx([0.25, 0.1, 0.05], rel=1e-5)
    assert outside == 2


def test_lines_hold_every_column(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert say(capsys, "export", made.teach.url, str(out), "--format", "jsonl")[0] == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line, row in zip(lines, made.rows, strict=True):
        assert set(line) == set(TeacherRow.__dataclass_fields__)
        assert line["topk_ids"] == row.topk_ids.tolist()
        np.testing.assert_array_equal(np.array(line["topk_logprobs"], np.float16), row.topk_logprobs)


def test_what_an_export_refuses(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = say(capsys, "export", made.corpus.url, str(out))
    assert (code, "of the stage corpus: those of teach and align" in err) == (2, True)
    out.mkdir()
    code, _, err = say(capsys, "export", made.teach.url, str(out))
    assert (code, "is there already" in err) == (2, True)
    (Path(made.storage) / "runs" / "t" / "config.yaml").unlink()
    code, _, err = say(capsys, "export", made.teach.url, str(tmp_path / "new"))
    assert (code, "give its folder with --model" in err) == (2, True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")]


def test_what_an_import_refuses(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    out, config = tmp_path / "out", written(made, tmp_path)
    assert say(capsys, "export", made.teach.url, str(out))[0] == 0
    made.teach.remove()
    for arguments, words in (
        (["--teacher", "nobody"], "the config has the models pivot, a"),
        (["teach.top_k=5", "--teacher", "pivot"], "set teach.top_k=4"),
        (["--teacher", "a"], "was exported from another model than this config gives to a"),
    ):
        code, _, err = say(capsys, "import", str(out), config, *arguments)
        assert (code, words in err) == (2, True), err
    code, _, err = say(capsys, "import", str(tmp_path), config, "--teacher", "pivot")
    assert (code, f"has no {CONFIGURATION}" in err) == (2, True)
    shutil.rmtree(out / FACTS)
    code, _, err = say(capsys, "import", str(out), config, "--teacher", "a")
    assert code == 1
    assert "2 of 2 conversations of the corpus have no row" in err
    (out / "shard-00000.parquet").write_bytes(b"no parquet")
    code, _, err = say(capsys, "import", str(out), config, "--teacher", "pivot")
    assert (code, "shard-00000.parquet: " in err) == (1, True)
    shutil.rmtree(out)
    made.corpus.remove()
    assert not made.teach.sealed


PER_SHARD = 3


def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[Made, Path]:
    """A corpus of so many rows in shards of PER_SHARD, and an export of its teacher as one file."""
    folder = tmp_path / str(count)
    folder.mkdir()
    rows = [Conversation(f"r{n}", (Message("user", "Who?"), Message("assistant", f"name {n}"))) for n in range(count)]
    monkeypatch.setattr(artefacts, "CONVERSATIONS", rows)
    made = make(folder)
    exchange.export_rows(made.teach.url, folder / "out", form="distillkit", dtype="float16", model=None)
    made.corpus.remove()
    shards = [rows[at : at + PER_SHARD] for at in range(0, count, PER_SHARD)]
    made.corpus.seal(
        [
            made.corpus.commit_bytes(shard_name(n), encode_conversations(shard), rows=len(shard))
            for n, shard in enumerate(shards)
        ]
    )
    made.teach.remove()
    return made, folder / "out"


class Held:
    """Decoded rows that are alive, and the most that were at a time; written rows count while their table is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        read, row = exchange.read_table, exchange.TeacherRow

        def counted(table: pa.Table, config: Mapping[str, object]) -> Iterator[tuple[np.ndarray, ...]]:
            for entry in read(table, config):
                self._add(entry[2])
                yield entry

        def made(*arguments: object) -> TeacherRow:
            found = row(*arguments)
            self._add(found)
            return found

        def restored(table: pa.Table) -> Iterator[TeacherRow]:
            for found in from_table(table):
                self._add(found)
                yield found

        monkeypatch.setattr(exchange, "read_table", counted)
        monkeypatch.setattr(exchange, "TeacherRow", made)
        monkeypatch.setattr(exchange, "from_table", restored)

    def _add(self, thing: object) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(thing, self._gone)

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("whole", [True, False])
def test_an_import_holds_no_more_rows_of_a_larger_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    most = []
    for count in (9, 36):
        made, out = many(tmp_path, monkeypatch, count)
        if not whole:
            shutil.rmtree(out / FACTS)
        with monkeypatch.context() as patched:
            held = Held(patched)
            exchange.import_rows(out, made.config, "pivot")
        most.append(held.most)
        for row, other in zip(made.rows, rows_of(made), strict=True):
            for name in ("id", "ids", "position", "topk_ids", "topk_logprobs"):
                np.testing.assert_array_equal(getattr(row, name), getattr(other, name), err_msg=name)
    assert most[0] == most[1]
    # the shard that is made, the one before it, and what the next row is decoded from
    assert most[1] <= 2 * PER_SHARD + 2


@pytest.mark.parametrize("whole", [True, False])
def test_rows_in_another_order_and_other_groups_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Not in the corpus's order, over two files, in row groups of 4 that are read 2 rows at a time."""
    monkeypatch.setattr(exchange, "BATCH_ROWS", 2)
    made, out = many(tmp_path, monkeypatch, 20)
    order = np.random.default_rng(0).permutation(20)
    for folder in (out, out / FACTS):
        table = pq.read_table(folder / "shard-00000.parquet").take(order)
        pq.write_table(table.slice(0, 11), folder / "shard-00000.parquet", row_group_size=4)
        pq.write_table(table.slice(11), folder / "shard-00001.parquet", row_group_size=4 if folder == out else 100)
    if not whole:
        shutil.rmtree(out / FACTS)
    exchange.import_rows(out, made.config, "pivot")
    for row, other in zip(made.rows, rows_of(made), strict=True):
        for name in ("id", "ids", "position", "topk_ids", "topk_logprobs"):
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name), err_msg=name)


def test_an_import_that_fails_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teach stage would go on from it."""
    made, out = many(tmp_path, monkeypatch, 9)
    for folder in (out, out / FACTS):
        table = pq.read_table(folder / "shard-00000.parquet")
        pq.write_table(table.slice(0, 5), folder / "shard-00000.parquet")
    with pytest.raises(ValueError, match=r"4 of 9 conversations of the corpus have no row in .*the first is 'r5'"):
        exchange.import_rows(out, made.config, "pivot")
    assert made.teach.unit(shard_name(0)) is None


def test_a_broken_row_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = many(tmp_path, monkeypatch, 6)
    file = out / "shard-00000.parquet"
    table = pq.read_table(file)
    broken = table["compressed_logprobs"].to_pylist()
    broken[4] = broken[4][:-2]
    at = table.column_names.index("compressed_logprobs")
    kind = table.schema.field(at).type
    pq.write_table(table.set_column(at, "compressed_logprobs", pa.array(broken, kind)), file)
    with pytest.raises(ValueError, match=f"{file}: row 4 has [0-9]+ tokens"):
        exchange.import_rows(out, made.config, "pivot")

"""`fusion-ray export` and `fusion-ray import`: what goes out comes back, with our own facts beside DistillKit's files and without them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from fusion_ray.cli import main
from fusion_ray.exchange import CONFIGURATION, FACTS, label_logprobs
from fusion_ray.logprobs.codec import TeacherRow, decode, from_table
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
    return list(from_table(decode(made.teach.read_bytes("shard-00000.parquet"))))


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

"""`fusion-ray inspect`: facts, rows, tokens as text or as ids, and what is refused; on artefacts made here with a tokenizer of the zoo."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_ray.cli import main
from fusion_ray.logprobs.codec import encode
from fusion_ray.records import aligned_schema
from fusion_ray.store import Artifact, Store
from tests.artefacts import CONVERSATIONS, PIVOT, Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("inspect"))


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def test_a_teacher_row_as_json(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    code = main(["inspect", made.teach.url, "--row", "r1", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert shown["ids_because"] == ""
    facts = shown["artefact"]
    assert (facts["stage"], facts["state"], facts["settings"]["top_k"]) == ("teach", "finished", 4)
    assert [unit["rows"] for unit in facts["units"] if unit["name"].startswith("shard")] == [2]
    assert (shown["row"]["id"], shown["row"]["positions"]) == ("r1", len(made.rows[1].position))
    answer = "".join(token["token"] for token in shown["tokens"] if token["predicted"])
    assert answer.startswith(CONVERSATIONS[1].messages[1].content.replace(" ", "·"))
    row, first = made.rows[1], shown["positions"][0]
    assert first["position"] == row.position[0]
    assert first["label_id"] == row.ids[row.position[0] + 1]
    assert first["label_probability"] == pytest.approx(np.exp(row.label_logprob[0]), rel=1e-6)
    assert [entry["id"] for entry in first["top"]] == row.topk_ids[0].tolist()
    assert first["tail_mass"] == pytest.approx(1 - sum(entry["probability"] for entry in first["top"]), abs=1e-6)


def test_the_table_shows_the_first_row_and_as_many_positions_as_asked_for(
    capsys: pytest.CaptureFixture[str], made: Made
) -> None:
    code, out, _ = say(capsys, made.teach.url, "--positions", "2")
    assert code == 0
    for words in (
        "stage teach",
        "finished",
        "id r0",
        f"2 of {len(made.rows[0].position)} positions",
        "tail",
        "predicted tokens in [ ]",
    ):
        assert words in out


def test_tokens_are_ids_where_the_model_is_not_here(
    capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path
) -> None:
    other = Store(str(tmp_path)).artifact("teach", 1, {}, {"model": "0" * 64})
    other.seal([other.commit_bytes("shard-00000.parquet", encode(made.table), rows=2)])
    code, out, _ = say(capsys, other.url)
    assert code == 0
    assert "tokens are shown as ids" in out
    assert "no run that names a model" in out
    code, _, err = say(capsys, other.url, "--model", str(PIVOT))
    assert (code, "is not the model of" in err) == (2, True)
    assert say(capsys, made.teach.url, "--model", str(PIVOT))[0] == 0


def test_an_alignment_says_which_side_won(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    row = made.rows[0]
    count = len(row.position)
    logprobs = row.topk_logprobs.copy()
    logprobs[0, 1:] = -np.inf
    columns: dict[str, object] = {
        "id": ["r0"],
        "ids": [row.ids],
        "position": [row.position],
        "kind": [[1] * count],
        "has_target": [[True] * (count - 1) + [False]],
        "from_source": [[True] + [False] * (count - 1)],
        "topk_ids": [row.topk_ids.reshape(-1)],
        "topk_logprobs": [logprobs.reshape(-1)],
        "bytes": [5],
        "source_won": [True],
        **{f"{side}_ce_{unit}": [0.5] for side in ("source", "pivot") for unit in ("token", "byte")},
    }
    artifact = Store(made.storage).artifact("align", 2, {}, {"pivot": made.teach.key, "source": made.teach.key})
    table = pa.table(columns, schema=aligned_schema(4))
    artifact.seal([artifact.commit_bytes("shard-00000.parquet", encode(table), rows=1)])
    assert main(["inspect", artifact.url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["side"] for entry in shown["positions"]] == ["source", *["pivot"] * (count - 2), "label"]
    assert len(shown["positions"][0]["top"]) == 1
    assert shown["positions"][0]["kind"] == "comparable"
    assert shown["row"]["bytes"] == 5
    code, out, _ = say(capsys, artifact.url)
    assert (code, "comparable" in out, "source_won true" in out) == (0, True, True)


def test_a_conversation_and_an_artefact_without_rows(
    capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path
) -> None:
    code, out, _ = say(capsys, made.corpus.url, "--row", "r1")
    assert code == 0
    for message in CONVERSATIONS[1].messages:
        assert f"{message.role}: {message.content}" in out
    merge = Store(str(tmp_path)).artifact("merge", 2, {"method": "sce"}, {})
    merge.seal([merge.commit_bytes("config.json", b"{}")], {"shards": 1})
    code, out, _ = say(capsys, merge.url)
    assert (code, "method: sce" in out, "shards: 1" in out) == (0, True, True)
    code, _, err = say(capsys, merge.url, "--row", "r0")
    assert (code, "the stage merge has no rows" in err) == (2, True)


def test_an_unfinished_artefact_says_so(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    teach = Artifact(f"{tmp_path}/artifacts/teach/{'a' * 32}", "teach", "a" * 32)
    teach.commit_bytes("shard-00000.parquet", encode(made.table), rows=2)
    code, out, _ = say(capsys, teach.url)
    assert code == 0
    assert "unfinished" in out
    assert "only the manifest says which model it is of" in out
    assert "id r0" in out


def test_what_is_refused(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    code, _, err = say(capsys, str(tmp_path / "absent"))
    assert (code, "there is nothing at" in err) == (2, True)
    (tmp_path / "notes.txt").write_text("x")
    code, _, err = say(capsys, str(tmp_path))
    assert (code, "is no artefact" in err, "notes.txt" in err) == (2, True, True)
    code, _, err = say(capsys, made.teach.url, "--row", "r9")
    assert (code, "there is no row 'r9' among the 2 rows" in err, "the nearest are r" in err) == (2, True, True)
    (tmp_path / "manifest.json").write_text('{"stage": "teach"}')
    code, _, err = say(capsys, str(tmp_path))
    assert (code, "is not a manifest of this project" in err) == (1, True)


def test_a_damaged_shard_is_named(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    teach = Store(str(tmp_path)).artifact("teach", 1, {}, {"model": "0" * 64})
    teach.seal([teach.commit_bytes("shard-00000.parquet", encode(made.table)[:-100], rows=2)])
    code, _, err = say(capsys, teach.url)
    assert code == 1
    assert "shard-00000.parquet is damaged" in err
    assert "run the teach stage again" in err


def test_nothing_heavy_is_imported(made: Made) -> None:
    code = f"import sys\nfrom fusion_ray.cli import main\nmain(['inspect', {made.teach.url!r}])\nassert not {{'torch', 'ray', 'vllm'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

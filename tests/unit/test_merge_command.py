"""`fusion-ray merge` as a user meets it: what the folder holds, the same command again, another merge in its place, killed midway, statistics kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fusion_ray import merge_command
from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.merge_yaml import load_recipe
from fusion_ray.models import fingerprint_model
from fusion_ray.store import file_sha256
from fusion_ray.workers import merge_units
from fusion_ray.workers.model_card import front_matter
from tests.folders import moved, random_tensors, write_model
from tests.merges import (
    alone,
    command,
    hashes,
    is_whole,
    merge,
    snapshot,
    tensors_in,
    varm_of,
    write_merge,
    write_models,
)

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
SMALL = ("--no-check", "--max-shard-size", "20KB", "--max-bytes-in-flight", "4MB")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    return alone(tmp_path, monkeypatch)


# the folder


def test_the_folder_is_a_whole_model(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    beside = {
        "generation_config.json": '{"max_length": 12}',
        "tokenizer_config.json": '{"eos_token": "</s>"}',
        "special_tokens_map.json": "{}",
        "modeling_own.py": "",
        "README.md": "---\nlicense: mit\n---\n",
        "training_args.bin": "",
        "notes.txt": "",
    }
    for name, text in beside.items():
        (tmp_path / "base" / name).write_text(text)
    path = varm_of(tmp_path, "maths", "poems", dtype="float32")
    out = tmp_path / "out"
    code, said, err = command(capsys, path, out, *SMALL)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: 0 MB in 4 file(s), ")
    assert {name for name in hashes(out) if not name.startswith("model-")} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "merge_report.json",
        "mergekit_config.yml",
        "model.safetensors.index.json",
        "modeling_own.py",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert is_whole(out)
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": "float32"}
    assert {tensor.dtype for tensor in tensors_in(out).values()} == {torch.float32}
    assert load_recipe(out / "mergekit_config.yml") == load_recipe(path)


def test_the_card_and_the_report_name_no_path_and_the_manifest_tells_the_truth(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "maths")
    tokenizer = write_model(tmp_path / "elsewhere" / "words", random_tensors(0))
    path = varm_of(tmp_path, "maths", tokenizer_source=str(tokenizer))
    merge(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card) == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "fusion_ray"],
    }
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["base_model"] == "base"
    assert [entry["model"] for entry in settings["models"]] == ["maths"]
    assert settings["tokenizer"] == {"source": "words"}
    for name in ("README.md", "merge_report.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    listed = {unit["name"]: (unit["sha256"], unit["bytes"]) for unit in manifest["units"]}
    files = [path for path in (tmp_path / "out").iterdir() if path.name not in ("manifest.json", "reused.json")]
    assert listed == {file.name: (file_sha256(file), file.stat().st_size) for file in files}


def test_roles_and_hub_ids_in_the_card(tmp_path: Path, monkeypatch: Patch) -> None:
    """Models of the hub are downloaded to a folder; the card says where they came from all the same."""
    write_models(tmp_path, "base", "maths")
    snapshots = {("lab/base", None): "base", ("lab/maths", "v2"): "maths"}

    def downloaded(path: str, revision: str | None = None) -> str:
        return path if path.startswith("/") else str(tmp_path / snapshots[path, revision])

    monkeypatch.setattr(merge_command, "local_folder", downloaded)
    monkeypatch.setattr(merge_command, "fingerprint_model", lambda path, revision: f"{path}@{revision}"[::-1])
    path = write_merge(tmp_path / "hub.yml", "varm", {"lab/maths@v2": {}}, base_model="lab/base")
    merge(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card)["base_model"] == ["lab/maths", "lab/base"]
    rows = [line for line in card.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| maths | merged | lab/maths | v2 | unknown | `2v@shtam/bal` |")
    assert rows[1].startswith("| base | base | lab/base |  | unknown | `enoN@esab/ba` |")
    assert str(tmp_path) not in card
    merge(write_merge(tmp_path / "mean.yml", "linear", {"base": {}, "maths": {}}), tmp_path / "mean")
    card = (tmp_path / "mean" / "README.md").read_text()
    assert card.count("| merged | a local folder |") == 2, "a mean has no base"


def test_a_folder_that_this_program_made_has_its_key_in_the_card(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "maths", "poems", "code")
    made = merge(varm_of(tmp_path, "maths", "poems"), tmp_path / "fused").manifest
    (tmp_path / "code" / "manifest.json").write_text('{"key": "another program\'s"}')
    merge(varm_of(tmp_path, "fused", "code"), tmp_path / "out")
    rows = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == [
        f"| fused | merged | a local folder |  | unknown | `{made.key[:12]}` |",
        "| code | merged | a local folder |  | unknown |  |",
        "| base | base | a local folder |  | unknown |  |",
    ]


def test_equal_merges_have_equal_cards_wherever_their_models_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_models(tmp_path / place, "base", "maths")
        merge(varm_of(tmp_path / place, "maths"), tmp_path / place / "out")
    cards = [(tmp_path / place / "out" / "README.md").read_text() for place in ("here", "there")]
    assert cards[0] == cards[1]
    assert hashes(tmp_path / "here" / "out", "*.safetensors") == hashes(tmp_path / "there" / "out", "*.safetensors")


# again


def test_the_second_call_does_nothing_and_says_so(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "maths")
    path, out = varm_of(tmp_path, "maths"), tmp_path / "out"
    _, first, _ = command(capsys, path, out, *SMALL)
    before = snapshot(out)
    monkeypatch.setattr(merge_command, "run_merge", None)
    code, second, err = command(capsys, path, out, *SMALL)
    assert (code, second, err) == (0, f"{first.splitlines()[0]} (was there already)\n", "")
    assert snapshot(out) == before


def test_another_merge_is_refused_and_overwrite_replaces_it(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    out = tmp_path / "out"
    assert command(capsys, varm_of(tmp_path, "maths"), out, *SMALL)[0] == 0
    before = snapshot(out)
    path = varm_of(tmp_path, "maths", "poems")
    code, said, err = command(capsys, path, out, *SMALL)
    assert (code, said) == (2, "")
    assert err == (
        f"error: {out} holds another merge (or its models or settings have changed since): give a new folder, or --overwrite it\n"
    )
    assert snapshot(out) == before
    assert command(capsys, path, out, "--no-check", "--overwrite")[0] == 0
    assert command(capsys, path, tmp_path / "fresh", "--no-check")[0] == 0
    assert is_whole(out)
    assert list(out.glob("*.safetensors")) == [out / "model.safetensors"], "shards of the merge before"
    assert hashes(out) == hashes(tmp_path / "fresh")


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"manifest.json": '{"name": "a web application", "icons": []}', "index.html": "mine"},
        {"manifest.json": "{not json"},
        {"merge.json": '{"ours": "theirs"}', "photos/one.jpg": "mine"},
        {"config.json": "{}", "model.safetensors": ""},
        {"manifest.json": '{"stage": "distill", "key": "k", "config": {}, "inputs": {}, "info": {}, "units": []}'},
    ],
    ids=lambda files: "-".join(files),
)
def test_other_people_s_files_are_left_alone(tmp_path: Path, capsys: Capture, files: dict[str, str]) -> None:
    write_models(tmp_path, "base", "maths")
    out = tmp_path / "out"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = snapshot(out)
    for overwrite in ([], ["--overwrite"]):
        code, _, err = command(capsys, varm_of(tmp_path, "maths"), out, *SMALL, *overwrite)
        assert code == 2
        assert err == f"error: {out} is not empty and holds no merge of this program: give a new folder, or empty it yourself\n"  # fmt: skip
        assert snapshot(out) == before


def test_files_added_to_a_merge_are_not_overwritten(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths")
    out = tmp_path / "out"
    merge(varm_of(tmp_path, "maths"), out)
    (out / "model.gguf").write_text("hours of work")
    before = snapshot(out)
    code, _, err = command(capsys, varm_of(tmp_path, "maths", dtype="float16"), out, *SMALL, "--overwrite")
    assert code == 2
    assert err == f"error: {out} holds files that no merge of this program made (model.gguf): move them elsewhere, or give a new folder\n"  # fmt: skip
    assert snapshot(out) == before


def test_a_file_is_no_folder(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths")
    (tmp_path / "out").write_text("mine")
    code, _, err = command(capsys, varm_of(tmp_path, "maths"), tmp_path / "out", *SMALL, "--overwrite")
    assert (code, err) == (2, f"error: {tmp_path / 'out'} is a file: give a folder\n")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_output_is_a_folder_of_this_machine(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "maths")
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, varm_of(tmp_path, "maths"), "s3://bucket/merged", *SMALL)
    assert code == 2
    assert err == "error: s3:/bucket/merged: the merged model is written to a folder of this machine: give one, and copy it from there\n"  # fmt: skip
    assert not (tmp_path / "s3:").exists()


def test_models_that_do_not_merge_leave_the_merge_that_was_there(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths")
    write_model(tmp_path / "poems", random_tensors(1))
    out = tmp_path / "out"
    merge(varm_of(tmp_path, "maths"), out)
    before = snapshot(out)
    assert command(capsys, varm_of(tmp_path, "maths", "poems"), out, *SMALL, "--overwrite")[0] == 1
    assert snapshot(out) == before


def test_numbers_that_do_not_merge_leave_the_merge_that_was_there(tmp_path: Path, capsys: Capture) -> None:
    """Found by reading the whole model."""
    write_models(tmp_path, "base", "maths", "poems")
    tensors = moved(random_tensors(0, rows=300, width=32), 1)
    name = max(tensors)
    tensors[name].view(-1)[-1] = float("nan")
    write_model(tmp_path / "poems", tensors)
    out = tmp_path / "out"
    merge(varm_of(tmp_path, "maths"), out)
    before = snapshot(out)
    code, _, err = command(capsys, varm_of(tmp_path, "maths", "poems"), out, *SMALL, "--overwrite")
    assert code == 1
    assert f"tensor {name!r}" in err
    assert snapshot(out) == before
    write_model(tmp_path / "poems", moved(random_tensors(0, rows=300, width=32), 1))
    assert command(capsys, varm_of(tmp_path, "maths", "poems"), out, *SMALL, "--overwrite")[0] == 0
    assert is_whole(out)
    assert snapshot(out) != before


@pytest.mark.parametrize("place", ["maths", "maths/merged", "."])
def test_a_model_is_not_merged_into_itself(tmp_path: Path, capsys: Capture, place: str) -> None:
    """Merges of merges: with --overwrite the model would be gone before it is read."""
    write_models(tmp_path, "base", "poems")
    merge(varm_of(tmp_path, "poems"), tmp_path / "maths")
    before = snapshot(tmp_path)
    code, _, err = command(capsys, varm_of(tmp_path, "maths"), tmp_path / place, *SMALL, "--overwrite")
    assert code == 2
    assert "is one of the models, or lies in it or around it: give a folder of its own" in err
    assert {name: stamp for name, stamp in snapshot(tmp_path).items() if name in before and name != "merge.yml"} == {
        name: stamp for name, stamp in before.items() if name != "merge.yml"
    }


def test_a_merge_that_was_damaged_since_is_not_called_whole(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "maths")
    path, out = varm_of(tmp_path, "maths"), tmp_path / "out"
    merge(path, out)
    whole = hashes(out)
    (out / "model-00002-of-00003.safetensors").unlink()
    code, _, err = command(capsys, path, out, *SMALL)
    assert code == 2
    assert err == f"error: {out} holds this merge, but model-00002-of-00003.safetensors is missing or was changed: --overwrite it\n"  # fmt: skip
    assert command(capsys, path, out, *SMALL, "--overwrite")[0] == 0
    assert hashes(out) == whole


def test_the_tokenizer_s_folder_belongs_to_the_merge(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "maths")
    words = write_model(tmp_path / "words", random_tensors(0))
    path = varm_of(tmp_path, "maths", tokenizer_source="words")
    merge(path, tmp_path / "out")
    (words / "tokenizer.json").write_text('{"version": "2.0"}')
    with pytest.raises(merge_command.ConfigError, match="holds another merge"):
        merge(path, tmp_path / "out")


def test_what_changes_beside_a_model_does_not_matter(tmp_path: Path) -> None:
    """Training may go on in a folder, tools leave their files in it."""
    write_models(tmp_path, "base", "maths")
    path, out = varm_of(tmp_path, "maths"), tmp_path / "out"
    merge(path, out)
    for name in (".git/index", "checkpoint-9/model.safetensors", "optimizer.pt", "trainer_log.jsonl", ".cache/config.json"):  # fmt: skip
        (tmp_path / "maths" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "maths" / name).write_text("new")
    assert merge(path, out).was_there


# killed

KILLED = """
import os, signal, sys
from pathlib import Path
from fusion_ray import merge_command
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.store import Folder
from fusion_ray.workers import merge_units

moment, path, out, overwrite = sys.argv[1:]

def killed_before(owner, name, chosen):
    real = getattr(owner, name)
    def instead(*arguments, **named):
        if chosen(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    setattr(owner, name, instead)

shard = "model-00003-of-00004.safetensors"
if moment == "while measuring":
    killed_before(merge_units, "measure_shard", lambda models, unit, *others: unit.file == shard)
elif moment == "between shards":
    killed_before(merge_units, "merge_shard", lambda models, unit, *others: unit.file == shard)
elif moment == "within a shard":
    killed_before(ShardWriter, "write", lambda writer, name, *others: shard in str(writer._path))
elif moment == "before a shard is recorded":
    killed_before(Folder, "write_json", lambda folder, name, value: name == f"_units/{shard}.json")
elif moment == "before the manifest":
    killed_before(Folder, "write_json", lambda folder, name, value: name == "manifest.json" and "shards" in value["info"])
elif moment == "before it is tidy":
    killed_before(Folder, "remove", lambda folder, name="": name == "merge.json")
elif moment == "while it is overwritten":
    killed_before(Folder, "remove", lambda folder, name="": name == "model-00003-of-00004.safetensors")
merge_command.merge_file(
    Path(path), Path(out), max_bytes_in_flight=1 << 22, max_shard_bytes=20_000, threads=2, overwrite=bool(overwrite), report=lambda figures: None
)
"""


def run_and_kill(moment: str, path: Path, out: Path, *, overwrite: bool = False) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(path), str(out), "yes" if overwrite else ""],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == -9, run.stderr


@pytest.mark.parametrize(
    "moment",
    [
        "while measuring",
        "between shards",
        "within a shard",
        "before a shard is recorded",
        "before the manifest",
        "before it is tidy",
    ],
)
def test_goes_on_where_it_was_killed(tmp_path: Path, moment: str) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    path, out = varm_of(tmp_path, "maths", "poems", dtype="float32"), tmp_path / "out"
    run_and_kill(moment, path, out)
    records = {file.name.removesuffix(".json") for file in (out / "_units").glob("model-*.json")}
    assert len(records) == {"while measuring": 0, "before the manifest": 4, "before it is tidy": 0}.get(moment, 2)
    before = snapshot(out)
    if moment == "within a shard":
        assert [name for name in before if ".tmp-" in name]
    merged = merge(path, out)
    assert merged.was_there is (moment == "before it is tidy")
    assert {name: stamp for name, stamp in snapshot(out).items() if name in records} == {
        name: before[name] for name in records
    }
    assert is_whole(out)
    merge(path, tmp_path / "undisturbed")
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_a_kept_shard_that_was_damaged_meanwhile_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut may leave a file of the right size that was never filled."""
    write_models(tmp_path, "base", "maths", "poems")
    path, out = varm_of(tmp_path, "maths", "poems", dtype="float32"), tmp_path / "out"
    run_and_kill("before the manifest", path, out)
    damaged, kept = out / "model-00002-of-00004.safetensors", "model-00001-of-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100] + bytes(100))
    before = snapshot(out)
    merge(path, out)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"merge: {damaged} was changed since it was written: it is made again"
    ]
    assert snapshot(out)[kept] == before[kept]
    merge(path, tmp_path / "undisturbed")
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_killed_while_it_replaced_another_merge(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    path, out = varm_of(tmp_path, "maths", "poems", dtype="float32"), tmp_path / "out"
    merge(path, out)
    path = varm_of(tmp_path, "maths", dtype="float32")
    run_and_kill("while it is overwritten", path, out, overwrite=True)
    merge(path, out, overwrite=True)
    merge(path, tmp_path / "undisturbed")
    assert is_whole(out)
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_two_commands_at_once(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "maths")
    path, out = varm_of(tmp_path, "maths"), tmp_path / "out"
    run_merge, said = merge_command.run_merge, []

    def meanwhile(*arguments, **named):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(merge_command, "run_merge", run_merge)
        said.append(command(capsys, path, out, *SMALL))
        return run_merge(*arguments, **named)

    monkeypatch.setattr(merge_command, "run_merge", meanwhile)
    merge(path, out)
    assert said == [
        (2, "", f"error: {out}: another merge is writing there: wait for its end, or give another folder\n")
    ]
    assert is_whole(out)
    assert command(capsys, path, out, *SMALL)[1].endswith("(was there already)\n")


def test_interrupted_by_its_user(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "maths")
    path, out = varm_of(tmp_path, "maths"), tmp_path / "out"
    merge_shard = merge_units.merge_shard

    def interrupted(models, unit, *others, **named):  # type: ignore[no-untyped-def]
        if unit.file == "model-00002-of-00003.safetensors":
            raise KeyboardInterrupt
        return merge_shard(models, unit, *others, **named)

    monkeypatch.delitem(sys.modules, "ray", raising=False)  # where Ray runs, the process ends at once
    monkeypatch.setattr(merge_units, "merge_shard", interrupted)
    code, said, err = command(capsys, path, out, *SMALL)
    assert (code, said) == (130, "")
    assert err == "interrupted: what was sealed is kept; the same command goes on from there\n"
    monkeypatch.setattr(merge_units, "merge_shard", merge_shard)
    kept = snapshot(out)["model-00001-of-00003.safetensors"]
    assert command(capsys, path, out, *SMALL)[0] == 0
    assert snapshot(out)["model-00001-of-00003.safetensors"] == kept
    assert is_whole(out)


# statistics


@pytest.fixture
def measured(monkeypatch: Patch) -> list[str]:
    """The models that the first passes have read, in their order."""
    found: list[str] = []
    mapped, measure_shard = Checkpoint.mapped, merge_units.measure_shard

    def measure(*arguments, **named):  # type: ignore[no-untyped-def]
        def read(model: Checkpoint, name: str, start: int, stop: int) -> object:
            if model.model not in found:
                found.append(model.model)
            return mapped(model, name, start, stop)

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "mapped", read)
            return measure_shard(*arguments, **named)

    monkeypatch.setattr(merge_units, "measure_shard", measure)
    return found


def test_one_target_more_is_all_that_is_measured(tmp_path: Path, capsys: Capture, measured: list[str]) -> None:
    write_models(tmp_path, "base", "maths", "poems", "code")
    merge(varm_of(tmp_path, "maths", "poems"), tmp_path / "two")
    assert set(measured) == {"base", "maths", "poems"}
    measured.clear()
    path, out = varm_of(tmp_path, "code", "poems", "maths"), tmp_path / "three"
    code, said, err = command(capsys, path, out, *SMALL)
    assert (code, err) == (0, "")
    assert set(measured) == {"base", "code"}
    assert said.splitlines()[1] == "not measured again: poems, maths (statistics of an earlier merge)"
    measured.clear()
    sce = write_merge(tmp_path / "sce.yml", "sce", {"code": {}, "maths": {}}, base_model="base")
    assert merge(sce, tmp_path / "sce").reused == ("code", "maths")
    assert measured == []


def test_reused_statistics_change_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    merge(varm_of(tmp_path, "maths"), tmp_path / "one")
    path = varm_of(tmp_path, "maths", "poems")
    assert merge(path, tmp_path / "reused").reused == ("maths",)
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "empty"))
    assert merge(path, tmp_path / "alone").reused == ()
    assert hashes(tmp_path / "reused") == hashes(tmp_path / "alone")
    said = [json.loads((tmp_path / name / "reused.json").read_text()) for name in ("reused", "alone")]
    assert said == [{"reused": ["maths"]}, {"reused": []}]
    assert fingerprint_model(str(tmp_path / "reused")) == fingerprint_model(str(tmp_path / "alone"))


def test_a_model_that_changed_is_measured_again(tmp_path: Path, measured: list[str]) -> None:
    write_models(tmp_path, "base", "maths", "poems")
    path = varm_of(tmp_path, "maths", "poems")
    merge(path, tmp_path / "before")
    measured.clear()
    write_model(tmp_path / "poems", moved(random_tensors(0, rows=300, width=32), 9), vocab_size=300)
    with pytest.raises(merge_command.ConfigError, match="or its models or settings have changed since"):
        merge(path, tmp_path / "before")
    assert merge(path, tmp_path / "after").reused == ("maths",)
    assert set(measured) == {"base", "poems"}
    measured.clear()
    os.utime(tmp_path / "base" / "model.safetensors")
    assert merge(path, tmp_path / "base_touched").reused == ()


def test_statistics_of_slices_are_not_those_of_the_models(tmp_path: Path) -> None:
    """A slice calls layer 1 of a model layer 0."""
    write_models(tmp_path, "base", "maths", "poems")
    ranges = [{"model": name, "layer_range": [1, 2]} for name in ("base", "maths", "poems")]
    sliced = {"merge_method": "varm", "base_model": "base", "slices": [{"sources": ranges}]}
    (tmp_path / "sliced.yml").write_text(yaml.safe_dump(sliced))
    merge(tmp_path / "sliced.yml", tmp_path / "sliced")
    path = varm_of(tmp_path, "maths", "poems")
    merge(path, tmp_path / "after_slices")
    (tmp_path / "cache").rename(tmp_path / "gone")
    merge(path, tmp_path / "alone")
    assert hashes(tmp_path / "after_slices") == hashes(tmp_path / "alone")
    merge(tmp_path / "sliced.yml", tmp_path / "after_whole")
    assert hashes(tmp_path / "after_whole") == hashes(tmp_path / "sliced")


def test_without_a_place_for_statistics_it_merges_all_the_same(tmp_path: Path, monkeypatch: Patch, cache: Path) -> None:
    """A home that is read-only, as in many containers."""
    write_models(tmp_path, "base", "maths")
    cache.write_text("no folder")
    assert not merge(varm_of(tmp_path, "maths"), tmp_path / "out").was_there
    assert is_whole(tmp_path / "out")


def test_without_a_home_it_merges_all_the_same(tmp_path: Path, monkeypatch: Patch) -> None:
    """A container whose user nobody knows."""
    write_models(tmp_path, "base", "maths")
    monkeypatch.delenv("FUSION_RAY_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.chdir(tmp_path)
    merge(varm_of(tmp_path, "maths"), tmp_path / "out")
    assert is_whole(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "maths", "merge.yml", "out"}


def test_damaged_statistics_are_measured_again(tmp_path: Path, cache: Path, measured: list[str]) -> None:
    write_models(tmp_path, "base", "maths")
    path = varm_of(tmp_path, "maths")
    merge(path, tmp_path / "out")
    (file,) = cache.rglob("changes.json")
    file.write_text("{")
    measured.clear()
    assert merge(path, tmp_path / "again").reused == ()
    assert set(measured) == {"base", "maths"}
    assert merge(path, tmp_path / "third").reused == ("maths",)

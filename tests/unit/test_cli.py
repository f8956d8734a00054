"""The command line: exit codes, messages, and that usage errors cost no heavy import."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_ray.cli import main


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    for name in ("pivot", "a"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vocab_size": 10, "name": name}))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer.json").write_text("{}")
        header = json.dumps({"w": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(160))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: t, storage: {tmp_path}/runs}}\npivot: {{path: pivot}}\nsources: [{{name: a, path: a}}]\ncorpus: {{path: rows.jsonl}}\n"
    )
    return path


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "--help")
    assert code == 0
    for command in (
        "run",
        "plan",
        "teach",
        "align",
        "distill",
        "merge-targets",
        "evaluate",
        "report",
        "serve",
        "doctor",
    ):
        assert command in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], ["No such command 'rum'", "run"]),
        (["run"], ["Missing argument 'CONFIG'"]),
        (["run", "absent.yaml"], ["cannot read the config 'absent.yaml'"]),
        (["plan", "--deep", "x.yaml"], ["No such option", "--deep"]),
    ],
)
def test_bad_usage_is_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    code, _, err = say(capsys, *arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_config_errors_are_exit_2_and_name_the_key(capsys: pytest.CaptureFixture[str], run_yaml: Path) -> None:
    code, _, err = say(capsys, "run", str(run_yaml), "distil.epochs=3")
    assert (code, "unknown key `distil`: did you mean 'distill'?" in err) == (2, True)
    code, _, err = say(capsys, "teach", str(run_yaml), "--only", "nobody")
    assert (code, "has the branches a, pivot" in err) == (2, True)


def test_debug_gives_the_traceback(run_yaml: Path) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        main(["run", str(run_yaml), "x=1", "--debug"])


def test_plan_shows_nodes_and_does_nothing(capsys: pytest.CaptureFixture[str], run_yaml: Path) -> None:
    code, out, err = say(capsys, "plan", str(run_yaml))
    assert (code, err) == (0, "")
    for word in ("corpus", "teach", "align", "distill", "merge", "to do"):
        assert word in out
    assert not (run_yaml.parent / "runs").exists()


def test_plan_finds_what_would_stop_the_run(capsys: pytest.CaptureFixture[str], run_yaml: Path) -> None:
    (run_yaml.parent / "a" / "chat_template.jinja").unlink()
    (run_yaml.parent / "a" / "model.safetensors").unlink()
    code, _, err = say(capsys, "plan", str(run_yaml), "distill.batch_size=1", "resources.distill.max_workers=2")
    assert code == 1
    for word in ("model 'a'", "no chat template", "no safetensors weights", "distill.batch_size 1"):
        assert word in err


def test_run_refuses_a_truncated_model_before_it_starts(capsys: pytest.CaptureFixture[str], run_yaml: Path) -> None:
    file = run_yaml.parent / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    code, _, err = say(capsys, "run", str(run_yaml))
    assert code == 2
    assert "model 'a'" in err
    assert "truncated or damaged" in err
    assert not (run_yaml.parent / "runs").exists()


def test_help_and_plan_import_no_engine(run_yaml: Path) -> None:
    code = (
        "import sys; from fusion_ray.cli import main; assert main(['plan', sys.argv[1]]) == 0;"
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run_yaml)], check=False).returncode == 0


def test_interrupt_says_that_work_is_kept(
    capsys: pytest.CaptureFixture[str], run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion_ray.plan.plan_table", interrupted)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # where Ray runs, the process ends at once
    code, _, err = say(capsys, "plan", str(run_yaml))
    assert (code, "the same command goes on from there" in err) == (130, True)

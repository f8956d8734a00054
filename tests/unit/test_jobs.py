"""The entry points for `ray job submit`: each says what it reads and writes, parses before it imports anything heavy, and passes the exit code on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
COMMANDS = {
    "fuse": "run",
    "teach": "teach",
    "align": "align",
    "distill": "distill",
    "merge_targets": "merge-targets",
    "evaluate": "evaluate",
    "serve": "serve",
}


def run(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / f"{job}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_there_is_a_job_for_every_stage() -> None:
    assert {path.stem for path in JOBS.glob("*.py")} - {"zoo"} == set(COMMANDS)


@pytest.mark.parametrize("job", list(COMMANDS))
def test_the_docstring_says_inputs_outputs_gpus_and_how_to_submit(job: str) -> None:
    tree = ast.parse((JOBS / f"{job}.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    for part in ("Inputs:", "Outputs:", "GPUs:", "ray job submit --address", f"-- python jobs/{job}.py jobs/configs/"):
        assert part in text
    assert len(tree.body) <= 4, "a docstring, two imports and one call"


@pytest.mark.parametrize(("job", "command"), list(COMMANDS.items()))
def test_the_job_is_that_command(job: str, command: str) -> None:
    assert f'main(["{command}", *sys.argv[1:]])' in (JOBS / f"{job}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("job", ["fuse", "merge_targets"])
def test_a_missing_config_ends_with_code_2_and_one_message(job: str, tmp_path: Path) -> None:
    done = run(job, str(tmp_path / "absent.yaml"))
    assert done.returncode == 2
    assert "absent.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_to_come() -> None:
    done = run("fuse", "--help")
    assert done.returncode == 0
    assert "CONFIG" in done.stdout

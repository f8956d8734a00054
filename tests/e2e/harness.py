"""What the end-to-end tests share: the demo's config made small, the command line in a process of its own, and what an artefact holds.

Called by the tests of this folder. A small run is the demo's graph with two sources, 64 conversations and 16 questions: every real part, minutes in all.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from fusion_ray.config import FusionConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "fusion_ray" / "zoo" / "data"
DEMO = ROOT / "jobs" / "configs" / "demo.yaml"
SOURCES = ("qwen3", "neox")
QUESTIONS_A_CATEGORY = 2
LIMIT_SECONDS = 900


def small_config(folder: Path, *, sources: tuple[str, ...] = SOURCES, storage: Path | None = None) -> Path:
    """The demo's YAML cut small, with absolute paths, written into `folder`."""
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(_few_questions()) + "\n")
    heldout = folder / "heldout.jsonl"
    heldout.write_text("\n".join((DATA / "heldout.jsonl").read_text().splitlines()[:16]) + "\n")
    raw = yaml.safe_load(DEMO.read_text())
    base = DEMO.parent
    raw["run"] |= {"name": "small", "storage": str(storage or folder / "runs")}
    raw["pivot"]["path"] = str((base / raw["pivot"]["path"]).resolve())
    models = {source["name"]: source for source in raw["sources"]}
    for name in sources:
        model = models.get(
            name, {"name": name, "path": f"../../fusion_ray/zoo/models/source_{name}", "dtype": "float32"}
        )
        models[name] = model | {"path": str((base / model["path"]).resolve())}
    raw["sources"] = [models[name] for name in sources]
    raw["corpus"] |= {"path": str(DATA / "corpus.jsonl"), "max_rows": 64, "rows_per_shard": 16}
    raw["distill"] |= {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 3}
    raw["merge"]["max_shard_bytes"] = 1_000_000
    raw["evaluate"] |= {"questions": str(questions), "heldout": str(heldout), "max_tokens": 24, "bootstrap": 200}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def _few_questions() -> Iterator[str]:
    taken: dict[str, int] = {}
    for line in (DATA / "questions.jsonl").read_text().splitlines():
        category = json.loads(line)["category"]
        taken[category] = taken.get(category, 0) + 1
        if taken[category] <= QUESTIONS_A_CATEGORY:
            yield line


def fusion_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fusion_ray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        cwd=ROOT,
    )


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """The command line in the background, its output in `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fusion_ray.cli", *arguments], stdout=file, stderr=file, cwd=ROOT
        )


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], log: Path) -> None:
    """`kill -9` the driver at the moment `reached` becomes true; fails when it ends before."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not reached():
        assert process.poll() is None, f"the run ended before it could be killed:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"never reached:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def load(path: Path) -> FusionConfig:
    return load_config(path)


def manifests(storage: Path, stage: str) -> dict[str, list[tuple[str, str]]]:
    """Key to (unit, sha256) of every sealed artefact of a stage."""
    found = {}
    for path in sorted((storage / "artifacts" / stage).glob("*/manifest.json")):
        units = json.loads(path.read_text())["units"]
        found[path.parent.name] = [(unit["name"], unit["sha256"]) for unit in units]
    return found

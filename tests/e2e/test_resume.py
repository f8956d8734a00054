"""`kill -9` of the driver in the middle of teach, distill and merge in turn: the next run finishes, and nothing differs from an undisturbed run."""

import json
from pathlib import Path

import pytest

from tests.e2e.harness import fusion_ray, kill_when, manifests, small_config, start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def units(storage: Path, stage: str, suffix: str) -> int:
    """Committed units of a stage whose artefact is not sealed yet."""
    records = (storage / "artifacts" / stage).glob(f"*/_units/*{suffix}.json")
    return sum(not (record.parents[1] / "manifest.json").exists() for record in records)


def test_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed, storage = tmp_path / "undisturbed", tmp_path / "killed"
    config = small_config(tmp_path, storage=storage)
    log = tmp_path / "log"

    process = start("merge-targets", str(config), log=log)
    kill_when(process, lambda: units(storage, "teach", ".parquet") > 0, log)
    assert not manifests(storage, "align")
    taught = {path: path.stat().st_mtime_ns for path in (storage / "artifacts" / "teach").glob("*/shard-*.parquet")}

    process = start("merge-targets", str(config), log=log)
    checkpoints = lambda: list((storage / "artifacts" / "distill").glob("*/_work/checkpoints/*"))  # noqa: E731  # one expression
    kill_when(process, lambda: bool(checkpoints()), log)
    assert all(path.stat().st_mtime_ns == taught[path] for path in taught), "a committed shard was written again"

    process = start("merge-targets", str(config), log=log)
    kill_when(process, lambda: units(storage, "merge", ".safetensors") > 0, log)
    assert len(manifests(storage, "distill")) == 2

    done = fusion_ray("merge-targets", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    calm = fusion_ray("merge-targets", str(config), f"run.storage={undisturbed}")
    assert calm.returncode == 0, calm.stdout + calm.stderr
    for stage in ("teach", "align", "merge"):
        assert manifests(storage, stage) == manifests(undisturbed, stage), stage
    for steps in (storage / "artifacts" / "distill").glob("*/metrics.jsonl"):
        numbers = [json.loads(line)["step"] for line in steps.read_text().splitlines()]
        assert numbers == list(range(1, len(numbers) + 1)), "a step is missing or stands twice"

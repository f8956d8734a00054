"""The merge stage with one worker and with two, on the same models. Run by `merge.py` as a process of its own; prints one JSON line of seconds.

    cd jobs/benchmarks; ../../.venv/bin/python -m merging_speed.stage --pivot FOLDER --targets FOLDER... --work FOLDER --settings sce ties

The targets become artefacts by links to their files. Workers are started and warmed before anything is timed. Shards of a tenth of a model: two workers end
at nearly the same time. Each setting runs twice: with every worker held to one core (speed/cores.py), and free, where one worker's threads that read ahead,
hash and write have the second core too. The line: {"one core each": {setting: [seconds of one worker, of two]}, "free": ...}, a list of repeats each.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fusion_ray.config import MergeConfig, MergeMethod, ModelConfig, ResourcesConfig, WorkerResources
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.merge import merge
from fusion_ray.store import Artifact, Unit, file_sha256
from merging_speed.settings import SETTINGS, Setting
from speed.cores import free, one_core_each
from speed.line import progress, timed

WORKERS = (1, 2)
IN_FLIGHT = 256_000_000
SHARDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pivot", type=Path, required=True)
    parser.add_argument("--targets", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder on the models' disk, removed at the end")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for what is merged, removed at the end")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    # As in stage_scaling.py: at 15, Ray's default, whatever else runs on the machine would decide.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        targets = {path.name: linked(path, given.work / path.name) for path in given.targets}
        with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
            found = {}
            for kind, cores in (("one core each", one_core_each("ray::merge:")), ("free", free("ray::merge:"))):
                progress(kind)
                with cores:
                    found[kind] = stage_seconds(given.pivot, targets, given.out, given.settings, given.repeats)
            print(json.dumps(found))
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
        shutil.rmtree(given.out, ignore_errors=True)


def linked(model: Path, folder: Path) -> Artifact:
    """A sealed distill artefact with hard links to the model's files."""
    artifact = Artifact(str(folder), "distill", model.name)
    folder.mkdir(parents=True)
    units = []
    for path in sorted(model.iterdir()):
        os.link(path, folder / path.name)
        units.append(Unit(path.name, 0, path.stat().st_size, file_sha256(path)))
    artifact.seal(units)
    return artifact


def stage_seconds(
    pivot: Path, targets: dict[str, Artifact], out: Path, settings: Sequence[str], repeats: int
) -> dict[str, list[list[float]]]:
    """The stage's seconds for each setting with each of WORKERS, `repeats` times in turn."""
    bytes_of_shard = (pivot / "model.safetensors").stat().st_size // SHARDS

    def run(setting: Setting, workers: int) -> None:
        started = time.perf_counter()
        artifact = Artifact(str(out / f"{setting.name}-{workers}"), "merge", setting.name)
        merge(
            artifact,
            pivot=ModelConfig(name="pivot", path=str(pivot)),
            targets=targets,
            method=MergeMethod.model_validate({"method": setting.method, **setting.whole, **setting.each}),
            config=MergeConfig(max_bytes_in_flight=IN_FLIGHT, max_shard_bytes=bytes_of_shard),
            resources=WorkerResources(max_workers=workers),
            report=lambda figures: None,
        )
        artifact.remove()
        progress(f"merge stage: {setting.name} by {workers} worker(s) in {time.perf_counter() - started:.1f} s")

    found = {}
    for name in settings:
        run(SETTINGS[name], max(WORKERS))
        times = timed(*(partial(run, SETTINGS[name], workers) for workers in WORKERS), repeats=repeats)
        found[name] = [each.wall for each in times]
    return found


if __name__ == "__main__":
    main()

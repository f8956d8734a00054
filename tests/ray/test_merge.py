"""The merge stage on a local cluster: same bytes as without Ray, a killed worker's shard redone, errors as they are, nothing done twice."""

import os
import threading
import time

import psutil
import pytest
import ray

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.config import MergeConfig, MergeMethod, ModelConfig, ResourcesConfig, WorkerResources
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.merge import merge
from fusion_ray.store import Artifact
from fusion_ray.workers.merge_job import merge_locally
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.tensor_blocks import smallest_bound
from tests.folders import moved, random_tensors, write_model
from tests.merges import merge as merge_command
from tests.merges import write_merge

pytestmark = pytest.mark.ray
RESOURCES = WorkerResources(max_workers=2)
CONFIG = MergeConfig(max_bytes_in_flight=1 << 20, max_shard_bytes=400_000)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback; ray read its mode when it was imported
    with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
        yield


def silent(progress):
    pass


def models(tmp_path, *, rows=2000, width=64, change=lambda tensors: tensors):
    """(pivot reference, sealed target artefacts)."""
    pivot = random_tensors(0, rows=rows, width=width)
    reference = ModelConfig(name="pivot", path=str(write_model(tmp_path / "pivot", pivot)))
    targets = {}
    for seed, name in enumerate(("maths", "poems"), start=1):
        folder = write_model(
            tmp_path / "exports" / name, change(moved(pivot, seed)) if name == "poems" else moved(pivot, seed)
        )
        artifact = Artifact(str(tmp_path / "targets" / name), "distill", name)
        artifact.seal(artifact.commit_folder(folder))
        targets[name] = artifact
    return reference, targets


def through_ray(out, pivot, targets, method, report=silent):
    return merge(out, pivot=pivot, targets=targets, method=method, config=CONFIG, resources=RESOURCES, report=report)


def locally(out, pivot, targets, method):
    job = MergeJob(
        (("pivot", pivot), *targets.items()),
        method.method,
        method.parameters,
        CONFIG.dtype,
        CONFIG.max_bytes_in_flight,
        CONFIG.max_shard_bytes,
    )
    return merge_locally(out, job, report=silent)


@pytest.mark.parametrize(
    "method", [MergeMethod(method="varm", granularity="layer"), MergeMethod(method="sce", select_topk=0.1)]
)
def test_same_bytes_as_without_ray(tmp_path, method):
    pivot, targets = models(tmp_path)
    seen = []
    ours = through_ray(Artifact(str(tmp_path / "ray"), "merge", "k"), pivot, targets, method, seen.append)
    theirs = locally(Artifact(str(tmp_path / "local"), "merge", "k"), pivot, targets, method)
    assert ours == theirs  # every unit's sha256 and what was counted
    assert sum(unit.name.startswith("model-") for unit in ours.units) >= 2
    assert (tmp_path / "ray" / "manifest.json").read_bytes() == (tmp_path / "local" / "manifest.json").read_bytes()
    assert seen[-1]["done"] == seen[-1]["total"]
    Artifact(str(tmp_path / "ray"), "merge", "k").verify()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sce", {"variant": "paper", "select_topk": 0.2}),
        ("ties", {"weight": 0.5, "density": 0.4}),
        ("dare_linear", {"weight": 0.5, "density": 0.4, "seed": 7}),
        ("della", {"weight": 0.5, "density": 0.4, "epsilon": 0.2, "seed": 7}),
        ("karcher", {}),
    ],
)
def test_same_bytes_as_the_command(tmp_path, monkeypatch, method, parameters):
    """Rows of 65 elements, so that blocks of whole rows end elsewhere than others; the command has other threads and reads less at a time."""
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    pivot, targets = models(tmp_path, width=65)
    given = MergeMethod(method=method, **parameters)
    stage = through_ray(Artifact(str(tmp_path / "ray"), "merge", "k"), pivot, targets, given)
    assert sum(unit.name.startswith("model-") for unit in stage.units) >= 2
    path = write_merge(
        tmp_path / "merge.yml",
        method,
        {artifact.path(): {} for artifact in targets.values()},
        parameters=parameters,
        **({} if method == "karcher" else {"base_model": pivot.path}),
    )
    shard = CONFIG.max_shard_bytes
    command = merge_command(path, tmp_path / "command", bound=smallest_bound(3, 3), shard=shard, threads=3).manifest
    of_command = {unit.name: unit.sha256 for unit in command.units}
    same = [unit for unit in stage.units if unit.name.startswith(("model", "tokenizer", "chat_template", "config"))]
    assert {unit.name: unit.sha256 for unit in same} == {unit.name: of_command[unit.name] for unit in same}
    assert len(same) >= 6


def test_statistics_of_one_method_serve_the_next(tmp_path):
    pivot, targets = models(tmp_path)
    kept = {name: Artifact(str(tmp_path / "changes" / name), "changes", name) for name in targets}
    phases = []

    def through_both(name, method, statistics):
        out = Artifact(str(tmp_path / name), "merge", "k")
        phases.clear()
        return merge(
            out,
            pivot=pivot,
            targets=targets,
            method=method,
            config=CONFIG,
            resources=RESOURCES,
            report=lambda figures: phases.append(figures["phase"]),
            statistics=statistics,
        )

    sce, varm = MergeMethod(method="sce", select_topk=0.2), MergeMethod(method="varm", granularity="layer")
    through_both("first", sce, kept)
    assert set(phases) == {"measure", "merge"}
    assert all(artifact.sealed for artifact in kept.values())
    reused = through_both("second", varm, kept)
    assert set(phases) == {"merge"}
    alone = through_both("alone", varm, None)
    assert set(phases) == {"measure", "merge"}
    assert reused == alone
    assert not (tmp_path / "second" / "_statistics").exists()
    kept["poems"].remove()
    one_more = through_both("third", varm, kept)
    assert set(phases) == {"measure", "merge"}
    assert one_more == alone


def test_errors_travel_as_they_are_and_leave_nothing(tmp_path):
    def poison(tensors):
        tensors["lm_head.weight"][3, 3] = float("nan")
        return tensors

    pivot, targets = models(tmp_path, change=poison)
    with pytest.raises(MergeError, match=r"model 'poems': tensor 'lm_head\.weight' in .* holds NaN"):
        through_ray(Artifact(str(tmp_path / "out"), "merge", "k"), pivot, targets, MergeMethod(method="varm"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_goes_on_after_the_shards_that_are_committed(tmp_path):
    pivot, targets = models(tmp_path)
    method = MergeMethod(method="varm")
    whole = through_ray(Artifact(str(tmp_path / "whole"), "merge", "k"), pivot, targets, method)

    class KilledError(Exception):
        pass

    def kill_driver(progress):
        if progress["phase"] == "merge":
            raise KilledError

    out = Artifact(str(tmp_path / "out"), "merge", "k")
    with pytest.raises(KilledError):
        through_ray(out, pivot, targets, method, kill_driver)
    kept = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors") if out.unit(path.name)
    }
    assert kept
    assert not out.sealed
    assert through_ray(out, pivot, targets, method) == whole
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


def workers_of(task):
    """Processes of this test's Ray workers that are running the task now (Ray puts its name in the process title)."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if f"ray::{task}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_workers_shard_is_done_again(tmp_path):
    pivot, targets = models(tmp_path, rows=40_000)  # long enough to meet a worker at work
    method = MergeMethod(method="sce", select_topk=0.1)
    expected = locally(Artifact(str(tmp_path / "whole"), "merge", "k"), pivot, targets, method)
    killed = []

    def kill_one():
        end = time.monotonic() + 60
        while not killed and time.monotonic() < end:
            for process in workers_of("merge:MergeUnit")[:1]:
                process.kill()
                killed.append(process.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        got = through_ray(Artifact(str(tmp_path / "out"), "merge", "k"), pivot, targets, method)
    finally:
        killed.append(0)
        thread.join()
    assert len(killed) == 2, "no worker was met at work"
    assert got == expected
    left = [path.name for path in (tmp_path / "out").rglob("*") if ".tmp-" in path.name]
    assert left == []
    assert ray.is_initialized()

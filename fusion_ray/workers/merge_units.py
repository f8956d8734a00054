"""The two kinds of unit in a merge, with the storage around them: measure a shard, merge a shard. Picklable; run by this process or by any other.

A unit reads its models itself and leaves its result in the artefact: nothing large crosses a process border, and what is there is never done again.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.changes import Changes
from fusion_ray.store import Artifact, Json, Unit
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.merger import Device, MergedTensor, Recipes, measure_shard, merge_shard

STATISTICS = "_statistics"  # results of the first pass, one file a shard; removed when the artefact is sealed


def _silent(name: str) -> None: ...


@dataclass(frozen=True)
class MeasureUnit:
    """The first pass over one shard, for the targets with these places in the recipes; leaves its statistics in the artefact. Picklable."""

    job: MergeJob
    out: Artifact
    recipes: Recipes
    targets: tuple[int, ...]
    progress: Callable[[str], None] = _silent

    def __call__(self, unit: WorkUnit) -> None:
        with _device(self.job) as device:
            changes = measure_shard(self.job.open(), unit, self.recipes, self.targets, self.progress, device)
        self.out.write_json(statistics_name(unit, self.targets), to_json(changes))


@dataclass(frozen=True)
class MergeUnit:
    """The merge of one shard; commits it with the weights and figures of its tensors. Picklable."""

    job: MergeJob
    out: Artifact
    recipes: Recipes
    weights: Mapping[str, Weights | None]
    progress: Callable[[str], None] = _silent

    def __call__(self, unit: WorkUnit) -> None:
        scratch = self.out.path() if self.out.is_local else tempfile.mkdtemp(prefix="fusion_ray_merge_")
        # The name marks it as left over when this process is killed: `seal` removes it.
        path = Path(scratch) / f"{unit.file}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with _device(self.job) as device:
                done, sha256 = merge_shard(
                    self.job.open(),
                    unit,
                    self.recipes,
                    path,
                    weights=self.weights,
                    progress=self.progress,
                    device=device,
                )
            info: dict[str, Json] = {
                name: {"weights": _json(tensor.weights), "moved": tensor.moved, "squares": tensor.squares}
                for name, tensor in done.items()
            }
            self.out.commit_moved(unit.file, path, sha256=sha256, rows=len(unit.tensors), info={"tensors": info})
        finally:
            path.unlink(missing_ok=True)
            if not self.out.is_local:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _device(job: MergeJob) -> Iterator[Device | None]:
    """What takes the job's tensors off this processor, if anything. Raises MergeError where the job wants one and there is none."""
    if job.device == "cpu":
        yield None
        return
    from fusion_ray.workers.merge_on_device import cuda_device  # loads torch: seconds that other merges do without

    with cuda_device() as device:
        yield device


def statistics_name(unit: WorkUnit, targets: tuple[int, ...]) -> str:
    """Other targets have other files: a run that was cut off may go on when statistics of some have come from elsewhere."""
    return f"{STATISTICS}/{unit.file}.{'-'.join(map(str, targets))}.json"


def to_json(changes: Mapping[str, Changes]) -> dict[str, object]:
    return {name: asdict(change) for name, change in changes.items()}


def from_json(entries: Mapping[str, object]) -> dict[str, Changes]:
    plain = json.loads(json.dumps(entries))
    return {
        name: Changes(
            size=entry["size"],
            squares=tuple(entry["squares"]),
            absolutes=tuple(entry["absolutes"]),
            moved=tuple(entry["moved"]),
            finite=tuple(entry["finite"]),
        )
        for name, entry in plain.items()
    }


def merged_tensors(unit: Unit) -> dict[str, MergedTensor]:
    """What MergeUnit counted, from the unit's record."""
    tensors = json.loads(json.dumps(unit.info["tensors"]))
    return {
        name: MergedTensor(
            None if entry["weights"] is None else tuple(entry["weights"]), entry["moved"], entry["squares"]
        )
        for name, entry in tensors.items()
    }


def _json(weights: Weights | None) -> Json:
    return None if weights is None else list(weights)

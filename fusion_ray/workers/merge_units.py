"""The two kinds of unit in a merge, with the storage around them: measure a shard, merge a shard. Picklable; run by this process or by any other.

A unit reads its models itself and leaves its result in the artefact: nothing large crosses a process border, and what is there is never done again.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.checkpoints.reader import open_checkpoint
from fusion_ray.config import ModelConfig
from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.changes import Changes
from fusion_ray.models import local_folder
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.merger import MergedTensor, Models, measure_shard, merge_shard

STATISTICS = "_statistics"  # results of the first pass, one file a shard; removed when the artefact is sealed


@dataclass(frozen=True)
class MergeJob:
    """What is merged and how; picklable. `models` are named places with the pivot first: an artefact, or a reference that `local_folder` makes a folder."""

    models: tuple[tuple[str, Artifact | ModelConfig], ...]
    method: str
    parameters: Mapping[str, object]
    dtype: str
    max_bytes_in_flight: int
    max_shard_bytes: int

    def open(self) -> Models:
        """The models on this machine, from their headers. Raises MergeError for a folder that is not whole."""
        pivot, *targets = (open_checkpoint(_folder_of(place), model=name) for name, place in self.models)
        return Models(pivot, tuple(targets), self.max_bytes_in_flight)


@dataclass(frozen=True)
class MeasureUnit:
    """The first pass over one shard; leaves its statistics in the artefact. Picklable."""

    job: MergeJob
    out: Artifact

    def __call__(self, unit: WorkUnit) -> None:
        changes = measure_shard(self.job.open(), unit)
        self.out.write_json(statistics_name(unit), {name: asdict(change) for name, change in changes.items()})


@dataclass(frozen=True)
class MergeUnit:
    """The merge of one shard; commits it with the weights and figures of its tensors. Picklable."""

    job: MergeJob
    out: Artifact
    parameters: Mapping[str, object]
    weights: Mapping[str, Weights | None]

    def __call__(self, unit: WorkUnit) -> None:
        scratch = self.out.path() if self.out.is_local else tempfile.mkdtemp(prefix="fusion_ray_merge_")
        # The name marks it as left over when this process is killed: `seal` removes it.
        path = Path(scratch) / f"{unit.file}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            done = merge_shard(
                self.job.open(), unit, path, method=self.job.method, parameters=self.parameters, weights=self.weights
            )
            info = {
                name: {"weights": tensor.weights, "moved": tensor.moved, "squares": tensor.squares}
                for name, tensor in done.items()
            }
            self.out.commit_file(
                unit.file, path, rows=len(unit.tensors), info={"tensors": json.loads(json.dumps(info))}
            )
        finally:
            path.unlink(missing_ok=True)
            if not self.out.is_local:
                shutil.rmtree(scratch, ignore_errors=True)


def statistics_name(unit: WorkUnit) -> str:
    return f"{STATISTICS}/{unit.file}.json"


def read_statistics(out: Artifact, unit: WorkUnit) -> dict[str, Changes]:
    """What MeasureUnit left."""
    return {
        name: Changes(
            size=entry["size"],
            squares=tuple(entry["squares"]),
            absolutes=tuple(entry["absolutes"]),
            moved=tuple(entry["moved"]),
            finite=tuple(entry["finite"]),
        )
        for name, entry in json.loads(out.read_bytes(statistics_name(unit))).items()
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


def _folder_of(place: Artifact | ModelConfig) -> str:
    return place.local_folder() if isinstance(place, Artifact) else local_folder(place.path, place.revision)

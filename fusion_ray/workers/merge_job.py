"""A whole merge, top to bottom: gates, first pass, weights, shards, report. No Ray here: who does the units is an argument.

`merge_locally` does them one after the other in this process (`fusion-ray merge`); stages/merge.py gives them to Ray tasks. Both run the same functions on
the same plan, so the bytes are the same. A unit that is committed is not done again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fusion_ray.checkpoints.dtypes import BY_CONFIG_NAME, MERGEABLE
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.gates import Compatibility, check_compatible, check_free_space
from fusion_ray.checkpoints.plan import PlannedTensor, WorkUnit, index_of, plan_units
from fusion_ray.checkpoints.reader import INDEX, Checkpoint
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import complete_parameters
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Manifest, Unit
from fusion_ray.workers.merge_report import fused_figures, merge_report
from fusion_ray.workers.merge_units import (
    STATISTICS,
    MeasureUnit,
    MergeJob,
    MergeUnit,
    merged_tensors,
    read_statistics,
    statistics_name,
)
from fusion_ray.workers.merger import Models

REPORT = "merge_report.json"
COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*.py",
)  # fmt: skip


# What does the units: calls the function on each item, anywhere and in any order, and yields as they finish.
Spread = Callable[[Callable[[WorkUnit], None], Sequence[WorkUnit]], Iterator[None]]


def merge_locally(out: Artifact, job: MergeJob, *, report: Report) -> Manifest:
    """The merge in this process. Same bytes as through Ray."""
    return run_merge(out, job, spread=lambda function, units: map(function, units), report=report)


def run_merge(out: Artifact, job: MergeJob, *, spread: Spread, report: Report) -> Manifest:
    """Merge into the artefact and seal it: a plain Hugging Face model folder and `merge_report.json`.

    Raises MergeError, before anything is written, for models that do not merge; ValueError for parameters the method does not take.
    """
    if out.sealed:
        return out.manifest()
    parameters = complete_parameters(job.method, job.parameters, targets=len(job.models) - 1)
    models = job.open()
    compatibility = check_compatible(models.pivot, models.targets)
    units = plan_merge(models.pivot, compatibility, dtype=job.dtype, max_shard_bytes=job.max_shard_bytes)
    _check_room(out, units, models.block_size)

    total = 2 * len(units)
    done = _Progress(report, total)
    unmeasured = [unit for unit in units if not out.exists(statistics_name(unit))]
    done.skip(len(units) - len(unmeasured))
    try:
        done.follow(spread(MeasureUnit(job, out), unmeasured), phase="measure")
    except MergeError:
        out.remove(STATISTICS)  # models that do not merge leave nothing behind
        raise
    changes = {name: change for unit in units for name, change in read_statistics(out, unit).items()}

    weights = METHODS[job.method].weights(changes, parameters)
    unmerged = [unit for unit in units if out.unit(unit.file) is None]
    done.skip(len(units) - len(unmerged))
    done.follow(spread(MergeUnit(job, out, parameters, weights), unmerged), phase="merge")
    return _finish(out, job, parameters, models, compatibility, units, changes)


def plan_merge(
    pivot: Checkpoint, compatibility: Compatibility, *, dtype: str, max_shard_bytes: int
) -> tuple[WorkUnit, ...]:
    """The output's shards. `dtype` is float32, bfloat16, float16 or pivot (each tensor as the pivot stores it); integer tensors stay what they are."""
    tensors = (pivot.tensors[name] for name in compatibility.tensors)
    return plan_units(
        (
            PlannedTensor(
                info.name,
                BY_CONFIG_NAME.get(dtype, info.dtype) if info.dtype in MERGEABLE else info.dtype,
                info.shape,
                info.size,
            )
            for info in tensors
        ),
        max_shard_bytes=max_shard_bytes,
    )


class _Progress:
    """Counts finished shards of both passes into the report callable."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def skip(self, count: int) -> None:
        self._done += count

    def follow(self, finished: Iterable[None], *, phase: str) -> None:
        for _ in finished:
            self._done += 1
            self._report({"done": self._done, "total": self._total, "unit": "shards", "phase": phase})


def _finish(
    out: Artifact,
    job: MergeJob,
    parameters: Mapping[str, object],
    models: Models,
    compatibility: Compatibility,
    units: Sequence[WorkUnit],
    changes: Mapping[str, Changes],
) -> Manifest:
    """The files around the tensors, the report and the manifest."""
    committed = [unit for work in units if (unit := out.unit(work.file)) is not None]
    assert len(committed) == len(units), "a shard was merged and is not committed"
    merged = {name: tensor for unit in committed for name, tensor in merged_tensors(unit).items()}
    content = merge_report(
        models.pivot, models.targets, method=job.method, parameters=parameters, dtype=job.dtype,
        changes=changes, merged=merged, compatibility=compatibility,
    )  # fmt: skip
    if len(units) > 1:
        committed.append(out.commit_bytes(INDEX, index_of(units)))
    committed.extend(_copy_files(out, models.pivot, job.dtype))
    committed.append(out.commit_bytes(REPORT, (json.dumps(content, indent=1) + "\n").encode()))
    info: dict[str, object] = {"method": job.method, "parameters": dict(parameters), "shards": len(units)}
    manifest = out.seal(committed, info | {"fused": fused_figures(changes, merged)})
    out.remove(STATISTICS)
    return manifest


def _copy_files(out: Artifact, pivot: Checkpoint, dtype: str) -> Iterator[Unit]:
    """Config, tokenizer and chat template are the pivot's; the config's element type is changed where the output's differs."""
    root = Path(pivot.folder)
    names = {path.relative_to(root).as_posix() for pattern in COPIED for path in root.glob(pattern) if path.is_file()}
    for name in sorted(names):
        if name == "config.json" and dtype != "pivot":
            config = dict(pivot.config)
            for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
                config[key] = dtype
            yield out.commit_bytes(name, (json.dumps(config, indent=2) + "\n").encode())
        else:
            yield out.commit_bytes(name, (root / name).read_bytes())


def _check_room(out: Artifact, units: Sequence[WorkUnit], block_size: int) -> None:
    """Room for what is not there yet, and for the largest shard once more: it is written beside its place. `block_size` has checked the bound."""
    assert block_size > 0
    missing = [unit.bytes for unit in units if out.unit(unit.file) is None]
    if missing and out.is_local:
        check_free_space(out.path(), sum(missing) + max(missing))

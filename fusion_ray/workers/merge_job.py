"""A whole merge, top to bottom: gates, first pass, weights, shards, report. No Ray here: who does the units is an argument.

`merge_locally` does them one after the other in this process (`fusion-ray merge`); stages/merge.py gives them to Ray tasks. Both run the same functions on
the same plan, so the bytes are the same. A unit that is committed is not done again.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.gates import check_free_space
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import check_parameters
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Manifest, StoreError, Unit
from fusion_ray.workers.merge_files import check_tokenizer, index_unit, model_files
from fusion_ray.workers.merge_plan import MergeJob, MergePlan, plan_merge
from fusion_ray.workers.merge_report import fused_figures, merge_report
from fusion_ray.workers.merge_units import (
    STATISTICS,
    MeasureUnit,
    MergeUnit,
    from_json,
    merged_tensors,
    statistics_name,
    to_json,
)
from fusion_ray.workers.merger import Models, is_merged

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"
CHANGES = "changes.json"  # of a target's statistics, an artefact of its own
REUSED = "reused.json"  # {"reused": the targets not measured again}; stays, and is no unit: equal merges have equal units, however they came about

# What does the units: calls the function on each item, anywhere and in any order, and yields as they finish.
Spread = Callable[[Callable[[WorkUnit], None], Sequence[WorkUnit]], Iterator[None]]
# Where the statistics of a target (the second model's name) against the model that it is compared with (the first's) are kept, if anywhere.
Statistics = Callable[[str, str], Artifact | None]


def merge_locally(out: Artifact, job: MergeJob, *, report: Report) -> Manifest:
    """The merge in this process. Same bytes as through Ray."""
    return run_merge(out, job, spread=lambda function, units: map(function, units), report=report)


def run_merge(
    out: Artifact,
    job: MergeJob,
    *,
    spread: Spread,
    report: Report,
    statistics: Statistics = lambda reference, target: None,
    replace: Callable[[], None] | None = None,
) -> Manifest:
    """Merge into the artefact and seal it: a plain Hugging Face model folder and `merge_report.json`.

    Targets whose `statistics` are there are not measured again; the others' are left there. `replace` removes another merge that the artefact holds; it is
    called when nothing stands in the way of this one.
    Raises MergeError, before anything is written, for models that do not merge; ValueError for parameters the method does not take.
    """
    if out.sealed and replace is None:
        return out.manifest()
    models, plan = check_job(job)
    for warning in plan.warnings:
        logger.warning("merge: %s", warning)
    _check_room(out, plan.units)

    done = _Progress(report, 2 * len(plan.units))
    changes, reused = _measured(out, job, models, plan, spread, done, statistics)
    if replace is not None:
        replace()
    out.write_json(REUSED, {"reused": reused})
    weights = _weights(plan, changes)
    unmerged = [unit for unit in plan.units if out.unit(unit.file) is None]
    done.skip(len(plan.units) - len(unmerged))
    done.follow(spread(MergeUnit(job, out, plan.recipes, weights), unmerged), phase="merge")
    return _finish(out, job, models, plan, changes)


def check_job(job: MergeJob) -> tuple[Models, MergePlan]:
    """The gates that need the models' headers alone. Raises MergeError and ValueError as `run_merge`."""
    check_parameters(job.method, job.parameters)
    models = job.open()
    plan = plan_merge(job, models)
    models.check_bound()
    check_tokenizer(job)
    return models, plan


def _measured(
    out: Artifact,
    job: MergeJob,
    models: Models,
    plan: MergePlan,
    spread: Spread,
    done: "_Progress",
    statistics: Statistics,
) -> tuple[dict[str, Changes], list[str]]:
    """The first pass over all shards, for the targets whose statistics are not there yet; the names of those whose are."""
    places: dict[int, Artifact] = {}
    names: dict[int, str] = {}
    if plan.alike and plan.keeps_names:
        first = next(iter(plan.recipes.values()))
        reference = job.models[first.reference[0]][0]
        for target, number in enumerate(first.models):
            names[target] = job.models[number][0]
            place = statistics(reference, names[target])
            if place is not None:
                places[target] = place
    merged = [name for name, recipe in plan.recipes.items() if is_merged(models, recipe)]
    kept = {target: _kept(place, merged) for target, place in places.items()}
    known = {target: found for target, found in kept.items() if found is not None}
    missing = tuple(target for target in plan.targets if target not in known)
    reused = [names[target] for target in known]
    if known:
        logger.info("merge: statistics of %s reused", ", ".join(reused))
    unmeasured = [unit for unit in plan.units if missing and not out.exists(statistics_name(unit, missing))]
    done.skip(len(plan.units) - len(unmeasured))
    try:
        done.follow(spread(MeasureUnit(job, out, plan.recipes, missing), unmeasured), phase="measure")
    except MergeError:
        out.remove(STATISTICS)  # models that do not merge leave nothing behind
        raise
    found: dict[str, Changes] = {}
    for unit in plan.units if missing else ():
        found |= from_json(out.read_json(statistics_name(unit, missing)))
    for at, target in enumerate(missing):
        known[target] = {name: change.of(at) for name, change in found.items() if at < change.targets}
        if target in places:
            _keep(places[target], known[target])
    return {name: _joined([known[t][name] for t in plan.targets if name in known[t]]) for name in known[0]}, reused


def _kept(place: Artifact, names: Sequence[str]) -> dict[str, Changes] | None:
    """The statistics of these tensors; None where they are not all there, as after a merge of some layers, or cannot be read."""
    if not place.sealed:
        return None
    try:
        found = from_json(place.read_json(CHANGES))
        return {name: found[name] for name in names}
    except (ValueError, KeyError, TypeError, StoreError):
        return None


def _keep(place: Artifact, changes: Mapping[str, Changes]) -> None:
    """A merge needs no place for statistics: where it cannot be written, the next merge measures again."""
    try:
        place.seal([place.commit_bytes(CHANGES, json.dumps(to_json(changes)).encode())])
    except StoreError as error:
        logger.warning("merge: statistics are not kept for later merges: %s", error)


def _joined(changes: Sequence[Changes]) -> Changes:
    first, *others = changes
    for other in others:
        first = first + other
    return first


def _weights(plan: MergePlan, changes: Mapping[str, Changes]) -> dict[str, Weights | None]:
    """The methods' first phase (slices of one model pass it through). Raises ValueError where it goes over all tensors and they have different settings."""
    found: dict[str, Weights | None] = {}
    for method in sorted({plan.recipes[name].method for name in changes}):
        of_method = {name: change for name, change in changes.items() if plan.recipes[name].method == method}
        first, *others = (plan.recipes[name].parameters for name in of_method)
        if METHODS[method].over_units is not None and any(other != first for other in others):
            raise ValueError(
                f"{method} compares tensors with each other, so its settings must be the same for all: leave out filters and gradients"
            )
        found |= METHODS[method].weights(of_method, first)
    return found


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


def _finish(out: Artifact, job: MergeJob, models: Models, plan: MergePlan, changes: Mapping[str, Changes]) -> Manifest:
    """The files around the tensors, the report and the manifest."""
    committed: list[Unit] = [unit for work in plan.units if (unit := out.unit(work.file)) is not None]
    assert len(committed) == len(plan.units), "a shard was merged and is not committed"
    merged = {name: tensor for unit in committed for name, tensor in merged_tensors(unit).items()}
    content = merge_report(models.checkpoints, job, plan, changes=changes, merged=merged)
    committed.extend(index_unit(out, plan.units))
    parameters = content["parameters"]
    assert isinstance(parameters, dict)
    committed.extend(model_files(out, job, models.checkpoints, parameters))
    committed.append(out.commit_bytes(REPORT, (json.dumps(content, indent=1) + "\n").encode()))
    info: dict[str, object] = {"method": job.method, "parameters": parameters, "shards": len(plan.units)}
    manifest = out.seal(committed, info | {"fused": fused_figures(changes, merged)})
    out.remove(STATISTICS)
    return manifest


def _check_room(out: Artifact, units: Sequence[WorkUnit]) -> None:
    """Room for what is not there yet, less what another merge there will give back; a shard is written beside its place and renamed."""
    if out.sealed:
        missing = sum(unit.bytes for unit in units) - sum(unit.bytes for unit in out.manifest().units)
    else:
        missing = sum(unit.bytes for unit in units if out.unit(unit.file) is None)
    if missing > 0 and out.is_local:
        check_free_space(out.path(), missing)

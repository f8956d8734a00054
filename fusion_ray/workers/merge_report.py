"""The content of `merge_report.json`: what the HTML report draws of a merge, and what a reader checks.

    {"format": 1, "method", "parameters" (those that all tensors share), "dtype", "pivot", "targets": [name, ...],
     "totals": {"parameters", "targets": [{"name", "moved", "norm"}, ...]}, "fused": {"parameters", "moved", "norm"},
     "tensors": {name: {"layer": 0 | null, "kind": "mlp.up_proj.weight", "shape", "weights": [one a target] | null, "moved": [one a target], "norms": [one a
                 target], "fused_moved", "fused_norm"}},
     "layers": [{"layer", "parameters", "weights", "moved", "fused_moved"}, ...], "kinds": [{"kind", ... the same}, ...],
     "tied": [tensor, ...], "config_differences": {target: {key: {"pivot", "target"}}}}

`moved` is the share of elements that differ from the pivot's, `norm` the Euclidean norm of the task vector (the fused model's: of what was written, minus the
pivot). The weights of a layer or kind are means over its tensors by number of elements; null where each element has its own. Layers are those inside the
decoder; kinds cover all tensors. No time, path or host: equal merges have equal reports.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.names import layer_and_kind
from fusion_ray.workers.merge_plan import MergeJob, MergePlan
from fusion_ray.workers.merger import MergedTensor

Entry = dict[str, object]


def merge_report(
    models: Sequence[Checkpoint],
    job: MergeJob,
    plan: MergePlan,
    *,
    changes: Mapping[str, Changes],
    merged: Mapping[str, MergedTensor],
) -> dict[str, object]:
    """The report, from the first pass's changes and the merged tensors' figures, both by tensor name."""
    names = [name for name in plan.recipes if name in merged]
    first = next(iter(plan.recipes.values()))
    targets = [models[number].model for number in first.models] if plan.alike else [m.model for m in models]
    return {
        "format": 1,
        "method": job.method,
        "parameters": _parameters(plan),
        "dtype": job.dtype,
        "pivot": models[job.files_of].model,
        "targets": targets,
        "totals": {
            "parameters": sum(changes[name].size for name in names),
            "targets": [_total(target, number, names, changes) for number, target in enumerate(targets)]
            if plan.alike
            else [],
        },
        "fused": fused_figures(changes, merged),
        "tensors": {name: _tensor(name, models, plan, changes[name], merged[name]) for name in names},
        "layers": _groups("layer", lambda name: layer_and_kind(name)[0], names, changes, merged),
        "kinds": _groups("kind", lambda name: layer_and_kind(name)[1], names, changes, merged),
        "tied": list(plan.tied),
        "config_differences": plan.config_differences,
    }


def _parameters(plan: MergePlan) -> dict[str, object]:
    """Those that are the same for all tensors; a file with filters, gradients or slices says the others itself."""
    first, *others = (recipe.parameters for recipe in plan.recipes.values())
    same = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in same.items()}


def _total(target: str, number: int, names: Sequence[str], changes: Mapping[str, Changes]) -> Entry:
    size = sum(changes[name].size for name in names)
    return {
        "name": target,
        "moved": sum(changes[name].moved[number] for name in names) / size if size else 0.0,
        "norm": math.sqrt(math.fsum(changes[name].squares[number] for name in names)),
    }


def fused_figures(changes: Mapping[str, Changes], merged: Mapping[str, MergedTensor]) -> dict[str, float]:
    """Elements, the share of them that the merge moved, and the norm of the fused model's task vector."""
    size = sum(changes[name].size for name in merged)
    return {
        "parameters": size,
        "moved": sum(tensor.moved for tensor in merged.values()) / size if size else 0.0,
        "norm": math.sqrt(math.fsum(tensor.squares for tensor in merged.values())),
    }


def _tensor(name: str, models: Sequence[Checkpoint], plan: MergePlan, change: Changes, merged: MergedTensor) -> Entry:
    layer, kind = layer_and_kind(name)
    recipe = plan.recipes[name]
    number, stored = recipe.reference
    sources: Entry = {} if plan.alike else {"targets": [models[each].model for each in recipe.models]}
    return sources | {
        "layer": layer,
        "kind": kind,
        "shape": list(models[number].tensors[stored].shape),
        "weights": None if merged.weights is None else list(merged.weights),
        "moved": [count / change.size for count in change.moved],
        "norms": [math.sqrt(square) for square in change.squares],
        "fused_moved": merged.moved / change.size,
        "fused_norm": math.sqrt(merged.squares),
    }


def _groups(
    label: str,
    group_of: Callable[[str], int | str | None],
    names: Sequence[str],
    changes: Mapping[str, Changes],
    merged: Mapping[str, MergedTensor],
) -> list[Entry]:
    groups: dict[int | str, list[str]] = {}
    for name in names:
        group = group_of(name)
        if group is not None:
            groups.setdefault(group, []).append(name)
    return [{label: group, **_mean(members, changes, merged)} for group, members in groups.items()]


def _mean(names: Sequence[str], changes: Mapping[str, Changes], merged: Mapping[str, MergedTensor]) -> Entry:
    size = sum(changes[name].size for name in names)
    targets = range(min(changes[name].targets for name in names))
    weights = [(changes[name].size, merged[name].weights) for name in names]
    return {
        "parameters": size,
        "weights": None
        if any(values is None for _, values in weights)
        else [
            math.fsum(count * values[target] for count, values in weights if values is not None) / size
            for target in targets
        ],
        "moved": [sum(changes[name].moved[target] for name in names) / size for target in targets],
        "fused_moved": sum(merged[name].moved for name in names) / size,
    }

"""What must hold before a merge writes anything: one architecture, one set of tensors, one shape each, room on the disk.

Every refusal is a MergeError that names the model, the file and the tensor and says what to do. Differences that do not matter are returned, for the
report. Called by the merge job with checkpoints whose headers were read; non-finite values are found by the first pass over the data.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion_ray.checkpoints.architecture import differing, plain
from fusion_ray.checkpoints.dtypes import MERGEABLE
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.merging.recipe import TensorRecipe

_NOT_COMPARED = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
_INPUT_ROWS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
_OUTPUT_ROWS = ("lm_head.weight", "embed_out.weight")
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Compatibility:
    """The tensors to merge, the output heads left out because they are the embeddings, and the config keys that differ without effect on the merge."""

    tensors: tuple[str, ...]
    tied: tuple[str, ...]
    config_differences: dict[str, dict[str, object]]  # target -> key -> {"pivot", "target"}


def check_compatible(pivot: Checkpoint, targets: Sequence[Checkpoint]) -> Compatibility:
    """Compare every target with the pivot. Raises MergeError for the first difference that matters."""
    differences = compare_configs(pivot, targets)
    tied = tied_heads((pivot, *targets))
    names = [name for name in pivot.tensors if name not in tied]
    for target in targets:
        _compare_tensors(pivot, target, names, tied)
    return Compatibility(tuple(names), tied, differences)


def compare_configs(
    pivot: Checkpoint, targets: Sequence[Checkpoint], *, but: Sequence[str] = ()
) -> dict[str, dict[str, object]]:
    """Target -> key -> {"pivot", "target"} of the differences without effect. Raises MergeError for others, except in the keys `but`."""
    found = {target.model: _compare_config(pivot, target, but) for target in targets}
    return {name: differences for name, differences in found.items() if differences}


def tied_heads(models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Output heads that are the embeddings, so that the output leaves them out. Raises MergeError for a tied head that is not."""
    return tuple(sorted({head for model in models for head in _tied_heads(model, models)}))


def check_shapes(models: Sequence[Checkpoint], recipes: Sequence[TensorRecipe]) -> None:
    """Raises MergeError for the first output tensor whose inputs differ in shape, or in that some are no floating numbers."""
    for recipe in recipes:
        (first, name), *others = recipe.inputs
        for number, other in others:
            _compare_shapes(models[first], name, models[number], other)


def check_free_space(folder: str | Path, needed: int) -> None:
    """Raises MergeError when the disk of `folder` (or of its nearest existing parent) has less than `needed` bytes and a little."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise MergeError(
            f"{folder}: the merge needs {_megabytes(needed + _SPARE_BYTES)} MB and {_megabytes(free)} MB are free: make room or choose another place"
        )


def check_finite(inputs: Sequence[tuple[Checkpoint, str]], finite: Sequence[bool]) -> None:
    """Raises MergeError for the first model whose tensor (its name there) holds NaN or infinite values."""
    for (model, name), good in zip(inputs, finite, strict=True):
        if not good:
            raise MergeError(
                f"model {model.model!r}: tensor {name!r} in {_file(model, name)} holds NaN or infinite values: "
                "its training diverged or its export failed; train or export it again"
            )


def check_same(inputs: Sequence[tuple[Checkpoint, str]], same: Sequence[bool]) -> None:
    """Raises MergeError for the first model whose integer or boolean tensor (its name there) is not the first one's."""
    for (model, name), good in zip(inputs, same, strict=True):
        if not good:
            raise MergeError(
                f"model {model.model!r}: tensor {name!r} in {_file(model, name)} is {model.tensors[name].dtype} and differs from the pivot's: only floating "
                "tensors are merged; export the models so that it is the same in all"
            )


def _compare_config(pivot: Checkpoint, target: Checkpoint, but: Sequence[str]) -> dict[str, object]:
    """All keys that are not written alike; those that make another architecture are refused."""
    differ = differing(pivot.config, target.config, but=but)
    if differ:
        key, (ours, theirs) = next(iter(differ.items()))
        raise MergeError(
            f"model {target.model!r}: `{key}` in {target.folder}/config.json {_said(target, key, theirs)}, the pivot's (model {pivot.model!r}, "
            f"{pivot.folder}/config.json) {_said(pivot, key, ours)}: only models of one architecture merge; make every target from this pivot, or mend the "
            "config.json that is wrong"
        )
    return {
        key: {"pivot": pivot.config.get(key), "target": target.config.get(key)}
        for key in sorted(set(pivot.config) | set(target.config))
        if key not in _NOT_COMPARED and pivot.config.get(key) != target.config.get(key)
    }


def _said(model: Checkpoint, key: str, value: object) -> str:
    """In words what a config means by a key, which may be written under another name."""
    written = json.dumps(value, default=str)
    if key in model.config or (key in plain(model.config) and value is not None):
        return f"is {written}"
    return "is not set" if value is None else f"is not set, which means {written}"


def _tied_heads(model: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    """Heads of `model` that are its own embeddings again: stored although tied, or absent in another model because it ties them."""
    heads = [name for name in model.tensors if name.endswith(_OUTPUT_ROWS)]
    embeddings = next((name for name in model.tensors if name.endswith(_INPUT_ROWS)), None)
    found = []
    for head in heads:
        says_tied = any(other.config.get("tie_word_embeddings") is True for other in models)
        if not says_tied and all(head in other.tensors for other in models):
            continue
        if embeddings is not None and _same_values(model, head, embeddings):
            found.append(head)
        elif says_tied:
            raise MergeError(
                f"model {model.model!r}: tensor {head!r} in {_file(model, head)} differs from {embeddings!r}, and `tie_word_embeddings` is true: "
                "untie all models (set it to false and export each with its own head) or export this one tied"
            )
    return found


def _same_values(model: Checkpoint, first: str, second: str) -> bool:
    a, b = model.tensors[first], model.tensors[second]
    step = 1 << 20
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        np.array_equal(
            model.read(first, start, min(start + step, a.size)), model.read(second, start, min(start + step, a.size))
        )
        for start in range(0, a.size, step)
    )


def _compare_tensors(pivot: Checkpoint, target: Checkpoint, names: Sequence[str], tied: Sequence[str]) -> None:
    for name in names:
        if name not in target.tensors:
            raise MergeError(
                f"model {target.model!r}: tensor {name!r} is missing in {target.folder} (the pivot has it in {_file(pivot, name)}): "
                f"export the target again from a model of the pivot's class{_nearest(name, target.tensors)}"
            )
        _compare_shapes(pivot, name, target, name)
    extra = [name for name in target.tensors if name not in pivot.tensors and name not in tied]
    if extra:
        raise MergeError(
            f"model {target.model!r}: {_file(target, extra[0])} has tensor {extra[0]!r} ({len(extra)} such in all), which the pivot does not have: "
            "export the target without it (adapters merged in, no added heads)"
        )


def _compare_shapes(pivot: Checkpoint, name: str, target: Checkpoint, other: str) -> None:
    ours, theirs = pivot.tensors[name], target.tensors[other]
    where = f"model {target.model!r}: tensor {other!r} in {_file(target, other)}"
    if ours.shape != theirs.shape:
        if other.endswith(_INPUT_ROWS + _OUTPUT_ROWS) and ours.shape[1:] == theirs.shape[1:]:
            raise MergeError(
                f"{where} has {theirs.shape[0]} vocabulary rows, the pivot's has {ours.shape[0]}: "
                "merging neither adds nor drops tokens. Train the target on the pivot's own tokenizer, or bring its embeddings back with "
                f"model.resize_token_embeddings({ours.shape[0]}) if the rows past the pivot's are padding"
            )
        raise MergeError(
            f"{where} has the shape {list(theirs.shape)}, the pivot's {list(ours.shape)}: "
            "only models of one size merge; make every target from this pivot"
        )
    if ours.dtype != theirs.dtype and not (ours.dtype in MERGEABLE and theirs.dtype in MERGEABLE):
        raise MergeError(f"{where} is {theirs.dtype}, the pivot's {ours.dtype}: export both in one floating type")


def _nearest(name: str, names: Mapping[str, object]) -> str:
    """Other names for the same tensor come from a prefix that the exporting class adds or drops."""
    other = next((found for found in names if found.endswith(f".{name}") or name.endswith(f".{found}")), None)
    return f" (it has {other!r}: the two were exported by different classes)" if other else ""


def _file(model: Checkpoint, name: str) -> str:
    return os.path.join(model.folder, model.tensors[name].file)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"

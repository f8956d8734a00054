"""`fusion-ray merge MERGE.yml OUT`: a merge file carried out on this machine, without Ray. Called by cli.py alone.

OUT becomes a Hugging Face folder. While it is unfinished it holds `merge.json`, which says what is being made there: the same command goes on after the last
whole shard, another one is refused. `manifest.json` is written last and lists every file with its sha256.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.config import ConfigError, ModelConfig, is_url
from fusion_ray.merge_recipe import Recipe
from fusion_ray.merge_yaml import load_recipe, resolved_yaml
from fusion_ray.models import local_folder
from fusion_ray.records import CHANGES_FORMAT, MERGE_FORMAT, Report
from fusion_ray.store import MANIFEST, UNITS, Artifact, Manifest, Store, content_key
from fusion_ray.workers.merge_job import REUSED, Spread, run_merge
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.merge_units import MeasureUnit, MergeUnit
from fusion_ray.workers.merger import usable_threads

MARK = "merge.json"
RECIPE_FILE = "mergekit_config.yml"


@dataclass(frozen=True)
class Merged:
    """What the command did: the folder's manifest, whether it was there already, and the models whose statistics were reused."""

    manifest: Manifest
    was_there: bool
    reused: tuple[str, ...]


def merge_file(
    path: Path,
    out: Path,
    *,
    max_bytes_in_flight: int,
    max_shard_bytes: int,
    threads: int | None,
    overwrite: bool,
    report: Report,
) -> Merged:
    """Merge as the file `path` says into the folder `out`.

    Raises ConfigError for a file or a folder that the user must mend, MergeError for models that do not merge, StoreError for a full or read-only disk.
    """
    recipe = load_recipe(path)
    folders = [_local(model) for model in recipe.models]
    prints = {model.name: _print(folder) for model, folder in zip(recipe.models, folders, strict=True)}
    settings: dict[str, object] = {"merge": resolved_yaml(recipe), "max_shard_bytes": max_shard_bytes}
    folder = Artifact(
        str(out.absolute()), "merge", content_key("merge", MERGE_FORMAT, settings, prints), settings, prints
    )
    if _claim(folder, overwrite=overwrite):
        return Merged(folder.manifest(), True, ())
    job = _job(recipe, folders, max_bytes_in_flight, max_shard_bytes, threads or usable_threads())
    cache = Store(os.environ.get("FUSION_RAY_CACHE", str(Path.home() / ".cache" / "fusion_ray")))

    def statistics(reference: str, target: str) -> Artifact:
        inputs = {"base": prints[reference], "target": prints[target]}
        return cache.artifact("changes", CHANGES_FORMAT, {}, inputs)

    try:
        manifest = run_merge(folder, job, spread=_spread(report), report=lambda figures: None, statistics=statistics)
    except MergeError:
        _let_go(folder)
        raise
    found = folder.read_json(REUSED)["reused"] if folder.exists(REUSED) else []
    assert isinstance(found, list)
    for leftover in (UNITS, MARK, REUSED):
        folder.remove(leftover)
    return Merged(manifest, False, tuple(map(str, found)))


def _job(
    recipe: Recipe,
    folders: list[str],
    max_bytes_in_flight: int,
    max_shard_bytes: int,
    threads: int,
) -> MergeJob:
    places = tuple(
        (model.name, model.model_copy(update={"path": folder, "revision": None}))
        for model, folder in zip(recipe.models, folders, strict=True)
    )
    return MergeJob(
        models=places,
        method=recipe.method,
        parameters={},
        dtype=recipe.written_dtype,
        max_bytes_in_flight=max_bytes_in_flight,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        recipe=recipe,
        files_of=recipe.pivot,
        tokenizer=None if recipe.tokenizer is None else _local(recipe.tokenizer),
        chat_template=recipe.chat_template,
        layers=recipe.layers,
        extra_files=((RECIPE_FILE, resolved_yaml(recipe)),),
    )


def _local(model: ModelConfig) -> str:
    return model.path if is_url(model.path) else local_folder(model.path, model.revision)


def _print(folder: str) -> str:
    """What tells a folder from its changed self without reading its weights: names, sizes and times of change (an object's checksum)."""
    if is_url(folder):
        from fusion_ray.models import fingerprint_model

        return fingerprint_model(folder)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return content_key("folder", 1, {"path": os.path.realpath(folder), "files": entries}, {})


def _claim(folder: Artifact, *, overwrite: bool) -> bool:
    """Make the folder ready for this merge; True where it holds it already. Raises ConfigError where it holds something else."""
    ours = (
        folder.read_json(MANIFEST if folder.sealed else MARK)
        if folder.exists(MANIFEST) or folder.exists(MARK)
        else None
    )
    if ours is None:
        if folder.names():
            raise ConfigError(
                f"{folder.path()} is not empty and holds no merge of this program: give a new folder, or empty it yourself"
            )
    elif ours.get("key") == folder.key and not overwrite:
        return folder.sealed
    elif not overwrite:
        raise ConfigError(
            f"{folder.path()} holds another merge (or its models or settings have changed since): give a new folder, or --overwrite it"
        )
    else:
        folder.remove()
    folder.write_json(MARK, {"key": folder.key})
    return False


def _let_go(folder: Artifact) -> None:
    """Models that do not merge leave nothing behind, unless shards were made before."""
    if not any(name.startswith("model") for name in folder.names()):
        folder.remove(MARK)
        folder.remove(UNITS)
        with suppress(OSError):
            os.rmdir(folder.path())


def _spread(report: Report) -> Spread:
    """One shard after the other, told tensor by tensor: a merge often has one shard. Each phase counts from 0."""

    def spread(work: Callable[[WorkUnit], None], units: Sequence[WorkUnit]) -> Iterator[None]:
        assert isinstance(work, MeasureUnit | MergeUnit)
        phase = "measure" if isinstance(work, MeasureUnit) else "merge"
        total = sum(len(unit.tensors) for unit in units)
        done = 0

        def tell(name: str) -> None:
            nonlocal done
            done += 1
            report({"done": done, "total": total, "unit": "tensors", "phase": phase})

        return map(replace(work, progress=tell), units)

    return spread


def read_bytes(text: str) -> int:
    """`256MB`, `1.5GB` or a plain number as bytes (decimal units, as disks are sold). Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().rstrip("BbKkMmGgTt")
    unit = text.strip()[len(number) :].upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{text!r} is not a number of bytes: give for example 256MB or 2GB") from error


def describe(merged: Merged, out: Path) -> str:
    """What the command says at its end."""
    manifest = merged.manifest
    size = sum(unit.bytes for unit in manifest.units if unit.name.endswith(".safetensors")) / 1e6
    fused = json.loads(json.dumps(manifest.info["fused"]))
    lines = [
        f"{out}: {size:,.0f} MB in {manifest.info['shards']} file(s), {fused['moved']:.1%} of {fused['parameters']:,} parameters moved"
        + (" (was there already)" if merged.was_there else "")
    ]
    if merged.reused:
        lines.append(f"not measured again: {', '.join(merged.reused)} (statistics of an earlier merge)")
    return "\n".join(lines)

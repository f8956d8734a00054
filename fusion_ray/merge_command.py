"""`fusion-ray merge MERGE.yml OUT`: a merge file carried out on this machine, without Ray. Called by cli.py alone.

OUT becomes a Hugging Face folder. The same command goes on after the last whole shard, another one is refused (merge_folder.py). `manifest.json` is written
last and lists every file with its sha256 but `reused.json`, the targets whose statistics were kept from an earlier merge.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from fusion_ray.checkpoints.files import RemoteFiles, files_of, stat_of
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.config import ConfigError, ModelConfig, is_url
from fusion_ray.merge_folder import claim, held, let_go, tidy
from fusion_ray.merge_folder import replace as replace_merge
from fusion_ray.merge_recipe import Recipe
from fusion_ray.merge_yaml import load_recipe, resolved_yaml
from fusion_ray.models import fingerprint_model, local_folder
from fusion_ray.places import PlaceError
from fusion_ray.records import CHANGES_FORMAT, MERGE_FORMAT, Report
from fusion_ray.store import Artifact, Manifest, Store, content_key
from fusion_ray.workers.find_cuda import DeviceKind, choose_device
from fusion_ray.workers.merge_files import is_read
from fusion_ray.workers.merge_job import REUSED, Spread, Statistics, check_job, run_merge
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.merge_units import MeasureUnit, MergeUnit
from fusion_ray.workers.merger import usable_threads

RECIPE_FILE = "mergekit_config.yml"
_URL = re.compile(r"\w[\w+.-]+:/")  # a Path has lost the second stroke
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Merged:
    """What the command did: the folder's manifest, whether it was there already, the models whose statistics were reused, and what computed it."""

    manifest: Manifest
    was_there: bool
    reused: tuple[str, ...]
    device: DeviceKind = "cpu"


def merge_file(
    path: Path,
    out: Path,
    *,
    max_bytes_in_flight: int,
    max_shard_bytes: int,
    threads: int | None,
    overwrite: bool,
    report: Report,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Merged:
    """Merge as the file `path` says into the folder `out`.

    Raises ConfigError for a file or a folder that the user must mend, MergeError for models that do not merge, StoreError for a full or read-only disk.
    """
    if _URL.match(str(out)):
        raise ConfigError(
            f"{out}: the merged model is written to a folder of this machine: give one, and copy it from there"
        )
    recipe = load_recipe(path)
    folders = [_local(model, recipe.key_of(number)) for number, model in enumerate(recipe.models)]
    tokenizer = None if recipe.tokenizer is None else _local(recipe.tokenizer, "tokenizer")
    _check_apart(out, [*folders, *filter(None, [tokenizer])])
    prints = {
        model.name: _print(model, folder, recipe.key_of(number))
        for number, (model, folder) in enumerate(zip(recipe.models, folders, strict=True))
    }
    settings: dict[str, object] = {"merge": resolved_yaml(recipe), "max_shard_bytes": max_shard_bytes}
    if recipe.tokenizer is not None and tokenizer is not None:
        settings["tokenizer"] = _print(recipe.tokenizer, tokenizer, "tokenizer")
    folder = Artifact(
        str(out.absolute()), "merge", content_key("merge", MERGE_FORMAT, settings, prints), settings, prints
    )
    job = _job(recipe, folders, tokenizer, max_bytes_in_flight, max_shard_bytes, threads or usable_threads())
    if overwrite:  # before what is there is removed
        choose_device(device)
        check_job(job)
    with held(folder):
        if claim(folder, overwrite=overwrite):
            return Merged(folder.manifest(), True, ())
        try:
            job = replace(job, device=choose_device(device))
            manifest = run_merge(
                folder,
                job,
                spread=_spread(report),
                report=lambda figures: None,
                statistics=_statistics(prints),
                replace=partial(replace_merge, folder) if folder.sealed else None,
            )
        except Exception:
            let_go(folder)
            raise
        found = folder.read_json(REUSED)["reused"]
        assert isinstance(found, list)
        tidy(folder)
    return Merged(manifest, False, tuple(map(str, found)), job.device)


def _statistics(prints: Mapping[str, str]) -> Statistics:
    """The user's cache, where the user has a home."""
    place = os.environ.get("FUSION_RAY_CACHE") or os.path.expanduser("~/.cache/fusion_ray")
    if place.startswith("~"):
        return lambda reference, target: None
    cache = Store(place)

    def statistics(reference: str, target: str) -> Artifact:
        inputs = {"base": prints[reference], "target": prints[target]}
        return cache.artifact("changes", CHANGES_FORMAT, {}, inputs)

    return statistics


def _job(
    recipe: Recipe,
    folders: list[str],
    tokenizer: str | None,
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
        tokenizer=tokenizer,
        chat_template=recipe.chat_template,
        layers=recipe.layers,
        extra_files=((RECIPE_FILE, resolved_yaml(recipe)),),
    )


def _local(model: ModelConfig, key: str) -> str:
    with _named_by(key):
        return model.path if is_url(model.path) else local_folder(model.path, model.revision)


@contextmanager
def _named_by(key: str) -> Iterator[None]:
    """Raises ConfigError, with the file's key, for a model that cannot be read."""
    try:
        yield
    except PlaceError as error:
        raise ConfigError(f"`{key}`: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"`{key}`: cannot read {error.filename}: {error.strerror or error}: give a Hugging Face model folder that may be read"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"`{key}`: {error}") from error


def _check_apart(out: Path, folders: Sequence[str]) -> None:
    """Raises ConfigError where the merge would be written over one of its models, or into it, which changes it."""
    place = Path(os.path.realpath(out))
    for folder in folders:
        model = Path(os.path.realpath(folder))
        if not is_url(folder) and (place == model or place in model.parents or model in place.parents):
            raise ConfigError(
                f"{out.absolute()} is one of the models, or lies in it or around it: give a folder of its own ({folder} is read)"
            )


def _print(model: ModelConfig, folder: str, key: str) -> str:
    """What tells a model from its changed self without reading its weights: a hub id's commit, the objects' checksums, the names, sizes and times of change
    of a folder's files."""
    entries: dict[str, object]
    with _named_by(key):
        files = files_of(folder)
        if isinstance(files, RemoteFiles):
            entries = {name: files.checksum(name) for name in files.names() if is_read(name)}
            return content_key("url", 1, {"url": folder, "objects": entries}, {})
        if model.path != folder:
            return fingerprint_model(model.path, model.revision)
        stats = {name: stat_of(os.path.join(folder, name)) for name in files.names() if is_read(name)}
    entries = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    return content_key("folder", 1, {"path": os.path.realpath(folder), "files": entries}, {})


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
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?B?)\s*", text, re.IGNORECASE)
    number = 0 if found is None else int(float(found[1]) * _UNITS[found[2].upper().rstrip("B")])
    if not number:
        raise ConfigError(f"{text!r} is not a number of bytes: give for example 256MB or 2GB")
    return number


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
    if merged.device == "cuda":
        lines.append("computed on a CUDA device (the same bytes as without: --device cpu)")
    return "\n".join(lines)

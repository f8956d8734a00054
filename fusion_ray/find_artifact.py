"""An artefact from the path or URL that a user gives, one row of it, and the model whose tokens its rows are. Called by inspect_artifact.py and exchange.py.

An artefact names its model by a fingerprint only (store.py: no paths in manifests). The model is looked for where the runs of the same storage say that
their models lie (`runs/<name>/config.yaml`), and in what the user gives as --model.
"""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fusion_ray.config import ConfigError, is_url
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.models import fingerprint_model
from fusion_ray.store import MANIFEST, UNITS, Artifact, Folder, StoreError, Unit

STAGES = ("corpus", "teach", "align", "distill", "merge", "evaluate", "changes")
WITH_ROWS = ("corpus", "teach", "align")
NEAREST = 3  # ids named when the one asked for is not there


@dataclass(frozen=True)
class Found:
    """An artefact as it lies in the storage; `units` are those of its manifest, or those committed so far."""

    artifact: Artifact
    units: tuple[Unit, ...]
    info: dict[str, object]

    @property
    def sealed(self) -> bool:
        return self.artifact.sealed

    @property
    def shards(self) -> list[str]:
        """Names of the units that hold rows."""
        wanted = self.artifact.stage in WITH_ROWS
        return [unit.name for unit in self.units if wanted and unit.name.endswith(".parquet") and unit.name != REJECTED]

    @cached_property
    def storage(self) -> str:
        """The storage that the artefact lies in: `<storage>/artifacts/<stage>/<key>`."""
        return self.artifact.url.rsplit("/", 3)[0]


def find_artifact(path: str) -> Found:
    """Raises ConfigError for what is no artefact, and StoreError for one whose manifest cannot be read."""
    url = path.rstrip("/") if is_url(path) else os.path.abspath(path)
    folder = Folder(url.removesuffix(f"/{MANIFEST}"))
    if folder.exists(MANIFEST):
        return _sealed(folder)
    stage, key = folder.url.rsplit("/", 2)[-2:] if folder.url.count("/") > 1 else ("", "")
    if not folder.fs.exists(folder.path()):
        raise ConfigError(
            f"there is nothing at {path}: give the folder or URL of an artefact, <storage>/artifacts/<stage>/<key>"
        )
    if stage not in STAGES or not folder.exists(UNITS):
        held = sorted({name.split("/", 1)[0] for name in folder.names()})[:4]
        raise ConfigError(
            f"{path} is no artefact: it has no {MANIFEST} and no {UNITS} folder, and holds {', '.join(held) or 'nothing'}. "
            "Give the folder of one, <storage>/artifacts/<stage>/<key>"
        )
    artifact = Artifact(folder.url, stage, key)
    names = [name[len(UNITS) + 1 : -len(".json")] for name in folder.names(UNITS)]
    return Found(artifact, tuple(artifact.units(names).values()), {})


def _sealed(folder: Folder) -> Found:
    try:
        raw = folder.read_json(MANIFEST)
        artifact = Artifact(folder.url, str(raw["stage"]), str(raw["key"]), raw["config"], raw["inputs"])  # type: ignore[arg-type]
        manifest = artifact.manifest()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder.url}/{MANIFEST} is not a manifest of this project ({type(error).__name__}: {error}): "
            "if it was one, remove the artefact and run its stage again"
        ) from error
    return Found(artifact, manifest.units, dict(manifest.info))


def read_shard(found: Found, name: str) -> pa.Table:
    """A shard's table. Raises StoreError naming a shard that is damaged."""
    data = found.artifact.read_bytes(name)
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{found.artifact.url}/{name} is damaged ({str(error).splitlines()[0]}): "
            f"remove {found.artifact.url} and run the {found.artifact.stage} stage again"
        ) from error


def find_row(found: Found, row: str | None) -> pa.Table:
    """The row of this id as a table of one row; the first one by default. Raises ConfigError naming the nearest ids for one that is not there."""
    if not found.shards:
        raise ConfigError(f"{found.artifact.url} has no rows{'' if found.sealed else ' yet'}")
    ids: list[str] = []
    for name in found.shards:
        table = read_shard(found, name)
        names = table["id"].to_pylist()
        at = 0 if row is None and names else names.index(row) if row in names else None
        if at is not None:
            return table.slice(at, 1)
        ids += names
    if row is None:
        raise ConfigError(f"{found.artifact.url} has no rows")
    near = difflib.get_close_matches(row, ids, NEAREST, cutoff=0) if len(ids) < 20_000 else []
    prefixed = [name for name in ids if name.startswith(row)][:NEAREST]
    raise ConfigError(
        f"there is no row {row!r} among the {len(ids)} rows of {found.artifact.url}; the nearest are {', '.join(prefixed or near or ids[:NEAREST])}"
    )


def model_of(found: Found, given: str | None) -> str:
    """The folder on this machine of the model whose vocabulary the rows are in: the teacher's, or the pivot's of an alignment.

    Raises ConfigError saying why none is found, and for a `given` model that is another one.
    """
    wanted = _fingerprint(found)
    if given is not None:
        if fingerprint_model(given) != wanted:
            raise ConfigError(
                f"--model {given} is not the model of {found.artifact.url}: its fingerprint is {fingerprint_model(given)[:12]}, "
                f"the artefact's {wanted[:12]}. Give the very folder that was the teacher's (of an alignment: the pivot's)"
            )
        return given
    seen: list[str] = []
    for path, revision in _models(found):
        folder = _here(path, revision)
        seen.append(path)
        if folder is not None and _is(path, revision, wanted):
            return folder
    where = (
        f"none of the models of its runs is it and lies on this machine ({', '.join(seen)})"
        if seen
        else "its storage has no run that names a model"
    )
    raise ConfigError(
        f"the model of {found.artifact.url} (fingerprint {wanted[:12]}) is not found: {where}; give its folder with --model"
    )


def _fingerprint(found: Found) -> str:
    """The fingerprint of the model in whose vocabulary the rows are. Raises ConfigError where an input is gone."""
    inputs, stage = found.artifact.inputs, found.artifact.stage
    if not found.sealed:
        raise ConfigError(f"{found.artifact.url} is not finished, and only the manifest says which model it is of")
    if stage == "teach":
        return str(inputs["model"])
    needs = [("teach", key) for name, key in inputs.items() if name == "pivot"]
    needs += [("align", key) for name, key in inputs.items() if name.startswith("source:")]
    for need, key in needs:
        return _fingerprint(find_artifact(f"{found.storage}/artifacts/{need}/{key}"))
    raise ConfigError(f"the stage {stage} has no rows in a model's tokens")


def _models(found: Found) -> Iterator[tuple[str, str | None]]:
    """Path and revision of every model that a run of the storage names, once each."""
    runs = Folder(f"{found.storage}/runs")
    seen = set()
    for name in runs.names():
        if not name.endswith("/config.yaml"):
            continue
        config = yaml.safe_load(runs.read_bytes(name))
        for model in [config.get("pivot"), *(config.get("sources") or [])]:
            if isinstance(model, dict) and (reference := (str(model.get("path")), model.get("revision"))) not in seen:
                seen.add(reference)
                yield reference


def _here(path: str, revision: str | None) -> str | None:
    """The folder of a model that is on this machine already; nothing is downloaded for a look."""
    if os.path.isdir(path):
        return path
    if is_url(path):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import, needed for hub ids alone

    cached = try_to_load_from_cache(path, "config.json", revision=revision)
    return str(Path(cached).parent) if isinstance(cached, str) else None


def _is(path: str, revision: str | None, wanted: str) -> bool:
    try:
        return fingerprint_model(path, revision) == wanted
    except ConfigError:  # a folder that is no model any more: not the one that is looked for
        return False

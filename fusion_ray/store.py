"""Artefacts on any fsspec URL: units committed atomically, a manifest sealed last (design.md section 4). Called by stages and workers.

An artefact is the folder `<storage>/artifacts/<stage>/<key>/`. A unit of work is one file in it: written under a temporary name, flushed, renamed, then
recorded in `_units/<name>.json` with its rows, bytes and sha256; it counts as done only with that record. `manifest.json` lists every unit and is written
last; readers trust manifests only. Neither holds a time, a host or a path, so equal work gives equal bytes.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
MANIFEST = "manifest.json"
UNITS = "_units"
REQUESTS = 32  # at a time to an object store
WAITS = (
    1.0,
    4.0,
    10.0,
)  # seconds before each further try of what may pass: a share or an object store that does not answer
_MAY_PASS = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EPIPE", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EREMOTEIO",
    )
    if hasattr(errno, name)
}  # fmt: skip


class StoreError(OSError):
    """Storage that cannot be written or read, or an artefact whose files are not what its manifest says; names the path."""


@dataclass(frozen=True)
class Unit:
    """One committed file of an artefact. `info` holds what its writer counted."""

    name: str
    rows: int
    bytes: int
    sha256: str
    info: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a sealed artefact holds and what made it. `info` holds the stage's counts."""

    stage: str
    key: str
    config: dict[str, Json]
    inputs: dict[str, str]
    units: tuple[Unit, ...]
    info: dict[str, Json]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)


def content_key(stage: str, format_version: int, config: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """The name of what `config` makes of `inputs` (name to key or fingerprint): 32 hex digits of a sha256 over their canonical JSON."""
    payload = {"stage": stage, "format": format_version, "config": config, "inputs": dict(inputs)}
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """The storage of runs: `<url>/artifacts/...` and `<url>/runs/...`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def artifact(
        self, stage: str, format_version: int, config: Mapping[str, object], inputs: Mapping[str, str]
    ) -> "Artifact":
        """The artefact that `stage` makes from `config` and `inputs`, finished or not."""
        key = content_key(stage, format_version, config, inputs)
        return Artifact(f"{self.url}/artifacts/{stage}/{key}", stage, key, config, inputs)

    def run_folder(self, name: str) -> "Folder":
        return Folder(f"{self.url}/runs/{name}")


class Folder:
    """A folder on any fsspec URL with atomic writes. Picklable: only the URL crosses a process border."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_resolved"}

    @cached_property
    def _resolved(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = fsspec.core.url_to_fs(self.url)
        return fs, path.rstrip("/")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._resolved[0]

    def path(self, name: str = "") -> str:
        """The path of `name` on `fs`. Raises ValueError for a name that leaves the folder."""
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} would leave the folder {self.url}: give a relative name without '..'")
        return f"{self._resolved[1]}/{name}" if name else self._resolved[1]

    @property
    def is_local(self) -> bool:
        protocol = self.fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def exists(self, name: str) -> bool:
        return self._size(name) is not None

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`. Raises StoreError when it cannot be read."""
        with self._errors("read", name):
            return self._again(f"reading {name}", lambda: bytes(self.fs.cat_file(self.path(name))))

    def read_json(self, name: str) -> dict[str, Json]:
        return dict(json.loads(self.read_bytes(name)))

    def write_bytes(self, name: str, data: bytes, *, flushed: bool = True) -> None:
        """Write `name` whole or not at all. What is not flushed outlives this process, not a power cut. Raises StoreError on a full, read-only or
        unreachable storage."""

        def write() -> None:
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            with _replacing(self.path(name), flushed=flushed) as temporary, open(temporary, "wb") as file:
                file.write(data)
                if flushed:
                    file.flush()
                    os.fsync(file.fileno())

        with self._errors("write", name):
            self._again(f"writing {name}", write)

    def write_json(self, name: str, value: Mapping[str, object], *, flushed: bool = True) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), flushed=flushed)

    def put_file(self, name: str, local: str | Path) -> None:
        """Copy the local file to `name`, whole or not at all. Raises StoreError as write_bytes."""

        def put() -> None:
            if not self.is_local:
                self.fs.put_file(str(local), self.path(name))
                return
            with _replacing(self.path(name)) as temporary:
                shutil.copyfile(local, temporary)
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())

        with self._errors("write", name):
            self._again(f"writing {name}", put)

    def get_file(self, name: str, local: str | Path) -> None:
        """Copy `name` to the local path. Raises StoreError when it cannot be read."""
        with self._errors("read", name):
            self._again(f"reading {name}", lambda: self.fs.get_file(self.path(name), str(local)))

    def names(self, folder: str = "") -> list[str]:
        """The files below `folder`, as names relative to this folder, sorted; empty where nothing exists."""
        root = self.path(folder)
        base = len(self.path()) + 1

        def find() -> list[str]:
            return sorted(str(found)[base:] for found in self.fs.find(root)) if self.fs.exists(root) else []

        with self._errors("list", folder):
            return self._again(f"listing {folder or 'it'}", find)

    def remove(self, name: str = "") -> None:
        """Remove a file or, with everything below it, a folder; nothing happens where there is none."""
        path = self.path(name)

        def remove() -> None:
            if self.fs.isfile(path):  # a recursive rm of a file finds nothing on some file systems (memory)
                self.fs.rm_file(path)
            elif self.fs.exists(path):
                self.fs.rm(path, recursive=True)

        with self._errors("remove", name):
            self._again(f"removing {name or 'it'}", remove)

    def _size(self, name: str) -> int | None:
        """The bytes of a file, None where there is none; 0 for a folder."""

        def ask() -> int | None:
            try:
                return int(self.fs.info(self.path(name))["size"] or 0)
            except (FileNotFoundError, NotADirectoryError):
                return None

        with self._errors("look for", name):
            return self._again(f"looking for {name}", ask)

    def _again(self, what: str, call: Callable[[], Result]) -> Result:
        """The call's result, tried again after WAITS where the storage fails in a way that may pass. Raises its last error, as an OSError."""
        for wait in (*WAITS, None):
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
                raise
            except OSError as error:
                # Object stores' own errors often have no number.
                passes = error.errno in _MAY_PASS or (not self.is_local and error.errno is None)
                if wait is None or not passes:
                    raise
                why: object = error.strerror or error
            except Exception as error:  # of an object store's client, some of which raise errors of their own kinds
                if self.is_local or isinstance(
                    error, ValueError | TypeError | LookupError | AttributeError | AssertionError
                ):
                    raise
                why = f"{type(error).__name__}: {error}"
                if wait is None:
                    raise OSError(why) from error
            logger.warning("%s: %s failed (%s), tried again in %g s", self.url, what, why, wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """The storage's errors as StoreError, which names the path and, for what is written, what to do."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            place = f"{self.url}/{name}" if name else self.url
            cure = ""
            if verb in ("write", "remove"):
                cure = ". What was committed before is kept: free space or fix permissions (or write elsewhere: a run writes to run.storage) and run again"
            why = error.strerror or str(error) or type(error).__name__
            raise StoreError(f"cannot {verb} {place}: {why}{cure}") from error


class Artifact(Folder):
    """One stage's output under one key; `config` and `inputs` are what the key was computed from."""

    def __init__(
        self,
        url: str,
        stage: str,
        key: str,
        config: Mapping[str, object] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(url)
        self.stage = stage
        self.key = key
        self.config = dict(config or {})
        self.inputs = dict(inputs or {})

    @property
    def sealed(self) -> bool:
        return self.exists(MANIFEST)

    def manifest(self) -> Manifest:
        """Raises StoreError when the artefact is not sealed."""
        if not self.sealed:
            raise StoreError(f"{self.url} is not finished (it has no {MANIFEST}): run the {self.stage} stage first")
        raw = self.read_json(MANIFEST)
        units = tuple(Unit(**unit) for unit in raw.pop("units"))  # type: ignore[union-attr, arg-type]
        return Manifest(units=units, **raw)  # type: ignore[arg-type]

    def unit(self, name: str) -> Unit | None:
        """The record of a committed unit, or None when it is still to do."""
        record = f"{UNITS}/{name}.json"
        if not self.exists(record):
            return None
        unit = Unit(**self.read_json(record))  # type: ignore[arg-type]
        return unit if self._size(name) == unit.bytes else None

    def units(self, names: Sequence[str]) -> dict[str, Unit]:
        """The records of those of `names` that are committed, by name, in that order; an object store, which takes its time, is asked for many at a time."""
        with ThreadPoolExecutor(1 if self.is_local else REQUESTS) as pool:
            found = zip(names, pool.map(self.unit, names), strict=True)
            return {name: unit for name, unit in found if unit is not None}

    def commit_bytes(self, name: str, data: bytes, *, rows: int = 0, info: Mapping[str, Json] | None = None) -> Unit:
        """Write one unit from memory. Raises StoreError as write_bytes."""
        unit = Unit(name, rows, len(data), hashlib.sha256(data).hexdigest(), dict(info or {}))
        self.write_bytes(name, data)
        self.write_json(f"{UNITS}/{name}.json", asdict(unit))
        return unit

    def commit_file(
        self, name: str, local: str | Path, *, rows: int = 0, info: Mapping[str, Json] | None = None
    ) -> Unit:
        """Copy one unit from a local file. Raises StoreError as write_bytes."""
        unit = Unit(name, rows, os.path.getsize(local), file_sha256(local), dict(info or {}))
        self.put_file(name, local)
        self.write_json(f"{UNITS}/{name}.json", asdict(unit))
        return unit

    def commit_moved(
        self, name: str, local: str | Path, *, sha256: str, rows: int = 0, info: Mapping[str, Json] | None = None
    ) -> Unit:
        """As `commit_file` of a finished file whose hash is known, which is moved where it lies on the same file system. Raises StoreError as write_bytes."""
        unit = Unit(name, rows, os.path.getsize(local), sha256, dict(info or {}))
        with self._errors("write", name):
            if self.is_local and os.stat(local).st_dev == os.stat(self.path()).st_dev:
                os.replace(local, self.path(name))
                _sync_folder(os.path.dirname(self.path(name)))
            else:
                self.put_file(name, local)
        self.write_json(f"{UNITS}/{name}.json", asdict(unit))
        return unit

    def commit_folder(self, local: str | Path) -> list[Unit]:
        """Every file below the local folder as a unit of the same relative name, in sorted order."""
        root = Path(local)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [self.commit_file(path.relative_to(root).as_posix(), path) for path in files]

    def seal(self, units: Iterable[Unit], info: Mapping[str, object] | None = None) -> Manifest:
        """Write the manifest; the artefact is finished from here on."""
        listed = sorted(units, key=lambda unit: unit.name)
        content = {
            "stage": self.stage,
            "key": self.key,
            "config": self.config,
            "inputs": self.inputs,
            "info": dict(info or {}),
        }
        self.write_json(MANIFEST, content | {"units": [asdict(unit) for unit in listed]})
        for name in self.names():  # what a killed writer left behind
            if ".tmp-" in name.rsplit("/", 1)[-1]:
                self.remove(name)
        return self.manifest()

    def verify(self) -> None:
        """Compare every unit with the manifest. Raises StoreError naming the first file that is missing or differs."""
        for unit in self.manifest().units:
            if not self.exists(unit.name):
                raise StoreError(
                    f"{self.url}/{unit.name} is missing: remove {self.url} and run the {self.stage} stage again"
                )
            found = hashlib.sha256(self.read_bytes(unit.name)).hexdigest()
            if found != unit.sha256:
                raise StoreError(
                    f"{self.url}/{unit.name} has sha256 {found[:12]}, its manifest says {unit.sha256[:12]}: "
                    f"remove {self.url} and run the {self.stage} stage again"
                )

    def local_folder(self) -> str:
        """A folder on this machine that holds the sealed artefact's units; downloaded once where the storage is remote."""
        if self.is_local:
            return self.path()
        target = Path(tempfile.gettempdir()) / "fusion_ray" / self.stage / self.key
        for unit in self.manifest().units:
            local = target / unit.name
            if local.exists() and local.stat().st_size == unit.bytes:
                continue
            with _replacing(str(local)) as temporary:
                self.get_file(unit.name, temporary)
        return str(target)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _replacing(path: str, *, flushed: bool = True) -> Iterator[str]:
    """A temporary name beside `path` that takes its place on success and is removed on failure."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if flushed:
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

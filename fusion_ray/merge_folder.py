"""The folder that the command `merge` writes: whose it is, and what of it may be removed. Called by merge_command.py.

While a merge is unfinished `merge.json` says which one it is; `manifest.json`, written last, lists the files of a finished one, except `reused.json`, which
says which statistics of earlier merges it took: that is no property of the model. Only files that a merge made
are ever removed, the manifest after all others: whenever a command is cut off, the next one knows whose the rest is.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch

from fusion_ray.config import ConfigError
from fusion_ray.store import MANIFEST, UNITS, Artifact, StoreError, file_sha256
from fusion_ray.workers.merge_job import REUSED
from fusion_ray.workers.merge_units import STATISTICS

logger = logging.getLogger(__name__)

MARK = "merge.json"
_SHARDS = "model*.safetensors"
_OF_A_RUN = (UNITS, STATISTICS, MARK)  # needed while a merge runs
_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}$")


@contextmanager
def held(folder: Artifact) -> Iterator[None]:
    """The folder, made where it is not there, for one command at a time. An empty one is removed at the end. Raises ConfigError while another command works
    there, StoreError where there cannot be a folder."""
    path = folder.path()
    if os.path.isfile(path):
        raise ConfigError(f"{path} is a file: give a folder")
    try:
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StoreError(
            f"cannot make the folder {path}: {error.strerror or error}: give another, or fix permissions"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{path}: another merge is writing there: wait for its end, or give another folder"
        ) from error
    except OSError:  # a file system without locks
        logger.info("merge: %s cannot be locked: let no other merge write there", path)
    try:
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            os.rmdir(path)


def claim(folder: Artifact, *, overwrite: bool) -> bool:
    """Make the folder, which is held, ready for this merge; True where it holds it already, whole. Raises ConfigError where it holds something else.

    A whole merge that is to be overwritten stays until `replace`: models that do not merge are found by reading all of them.
    """
    names = folder.names()
    key, made = _owner(folder, names)
    if names and key is None:
        raise ConfigError(
            f"{folder.path()} is not empty and holds no merge of this program: give a new folder, or empty it yourself"
        )
    if overwrite:
        _check_own(folder, names, made)
        for name in (STATISTICS, MARK):
            folder.remove(name)
        if folder.sealed:
            _remove_leftovers(folder, names)
            return False
        _clear(folder, made)
    elif key == folder.key and folder.sealed:
        _check_whole(folder)
        tidy(folder)
        return True
    elif key not in (None, folder.key):
        raise ConfigError(
            f"{folder.path()} holds another merge (or its models or settings have changed since): give a new folder, or --overwrite it"
        )
    _remove_leftovers(folder, names)
    _check_kept(folder, names)
    folder.write_json(MARK, {"key": folder.key})
    return False


def replace(folder: Artifact) -> None:
    """Remove the whole merge that was left, if one was, and begin this one."""
    if folder.sealed:
        _clear(folder, {unit.name for unit in folder.manifest().units})
        folder.write_json(MARK, {"key": folder.key})


def tidy(folder: Artifact) -> None:
    """Remove what a finished merge needs no more."""
    for name in _OF_A_RUN:
        folder.remove(name)


def let_go(folder: Artifact) -> None:
    """Models that do not merge leave nothing behind, unless shards were made before, of this merge or of the one that was to be overwritten."""
    if folder.sealed:
        folder.remove(STATISTICS)
    elif not any(fnmatch(name, _SHARDS) for name in folder.names()):
        tidy(folder)
        folder.remove(REUSED)


def _owner(folder: Artifact, names: Sequence[str]) -> tuple[str | None, set[str]]:
    """The key of the merge in the folder and the files that it made; None where there is no merge of this program."""
    shards = {name for name in names if fnmatch(name, _SHARDS)}
    with suppress(ValueError, TypeError, KeyError, StoreError):  # another program's file of that name
        if MANIFEST in names:
            manifest = folder.manifest()
            if manifest.stage == folder.stage and isinstance(manifest.key, str):
                return manifest.key, {unit.name for unit in manifest.units}
        elif MARK in names:
            mark = folder.read_json(MARK)
            if set(mark) == {"key"}:
                recorded = (name[len(UNITS) + 1 :].removesuffix(".json") for name in names if name.startswith(UNITS))
                return str(mark["key"]), {*recorded, *shards}
    return None, set()


def _check_own(folder: Artifact, names: Sequence[str], made: set[str]) -> None:
    """Raises ConfigError where there are other people's files."""
    others = [
        name
        for name in names
        if name not in (*made, MANIFEST)
        and name.split("/")[0] not in (*_OF_A_RUN, REUSED)
        and not _TEMPORARY.search(name)
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ConfigError(
            f"{folder.path()} holds files that no merge of this program made ({', '.join(others[:3])}{more}): move them elsewhere, or give a new folder"
        )


def _clear(folder: Artifact, made: set[str]) -> None:
    for name in (*sorted(made), STATISTICS, REUSED, UNITS, MANIFEST):
        folder.remove(name)


def _check_whole(folder: Artifact) -> None:
    """By sizes: the weights are not read again."""
    for unit in folder.manifest().units:
        if not folder.exists(unit.name) or folder.fs.size(folder.path(unit.name)) != unit.bytes:
            raise ConfigError(
                f"{folder.path()} holds this merge, but {unit.name} is missing or was changed: --overwrite it"
            )


def _check_kept(folder: Artifact, names: Sequence[str]) -> None:
    """Shards that an interrupted merge left are read again, and made again where they are not what was written: a machine may have gone down with them."""
    for name in names:
        unit = folder.unit(name) if fnmatch(name, _SHARDS) else None
        if unit is not None and file_sha256(folder.path(name)) != unit.sha256:
            logger.warning("merge: %s was changed since it was written: it is made again", folder.path(name))
            folder.remove(f"{UNITS}/{name}.json")
            folder.remove(name)


def _remove_leftovers(folder: Artifact, names: Sequence[str]) -> None:
    """Files of commands that were killed: they may be as large as a shard, and the disk may be no larger than the merge."""
    for name in names:
        if _TEMPORARY.search(name):
            folder.remove(name)

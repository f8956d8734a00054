"""The store: whole files or none, records of units, manifests last, equal bytes for equal work, on a disk and on a remote filesystem."""

import errno
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import pytest

from fusion_ray import store as storage
from fusion_ray.store import Artifact, Folder, Store, StoreError, content_key


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "file" else f"memory://{uuid.uuid4().hex}")


def make(store: Store, **config: object) -> Artifact:
    return store.artifact("teach", 1, config, {"corpus": "abc"})


def test_key_covers_stage_format_config_and_inputs_only() -> None:
    key = content_key("teach", 1, {"k": 10, "a": 1}, {"corpus": "x"})
    assert key == content_key("teach", 1, {"a": 1, "k": 10}, {"corpus": "x"})
    others = [
        content_key("align", 1, {"k": 10, "a": 1}, {"corpus": "x"}),
        content_key("teach", 2, {"k": 10, "a": 1}, {"corpus": "x"}),
        content_key("teach", 1, {"k": 11, "a": 1}, {"corpus": "x"}),
        content_key("teach", 1, {"k": 10, "a": 1}, {"corpus": "y"}),
    ]
    assert len({key, *others}) == 5


def test_unit_counts_only_once_committed(store: Store) -> None:
    artifact = make(store)
    assert artifact.unit("shard-0") is None
    artifact.write_bytes("shard-0", b"without a record")
    assert artifact.unit("shard-0") is None
    unit = artifact.commit_bytes("shard-0", b"rows", rows=2, info={"cut": 1})
    assert artifact.unit("shard-0") == unit
    artifact.write_bytes("shard-0", b"shorter than it says"[:3])
    assert artifact.unit("shard-0") is None  # another size than its record: to be done again


def test_sealed_artifact_lists_its_units_and_verifies(store: Store) -> None:
    artifact = pickle.loads(pickle.dumps(make(store, k=10)))
    units = [artifact.commit_bytes(name, name.encode(), rows=1) for name in ("b", "a")]
    assert not artifact.sealed
    manifest = artifact.seal(units, {"cut_rows": 3})
    assert artifact.sealed
    assert [unit.name for unit in manifest.units] == ["a", "b"]
    assert (manifest.rows, manifest.bytes, manifest.info, manifest.config) == (2, 2, {"cut_rows": 3}, {"k": 10})
    artifact.verify()
    artifact.write_bytes("a", b"x")
    with pytest.raises(StoreError, match=r"/a has sha256"):
        artifact.verify()
    artifact.remove("a")
    with pytest.raises(StoreError, match=r"/a is missing"):
        artifact.verify()


def test_equal_work_gives_equal_manifest_bytes(tmp_path: Path) -> None:
    def work(root: Path) -> bytes:
        artifact = make(Store(str(root)), k=1)
        artifact.seal([artifact.commit_bytes("u", b"data", rows=1)], {"n": 1})
        return artifact.read_bytes("manifest.json")

    assert work(tmp_path / "one") == work(tmp_path / "two")


def test_unsealed_artifact_has_no_manifest(store: Store) -> None:
    with pytest.raises(StoreError, match="run the teach stage first"):
        make(store).manifest()


def test_local_folder_holds_the_units(store: Store) -> None:
    artifact = make(store)
    artifact.seal([artifact.commit_bytes("sub/config.json", b"{}")])
    assert (Path(artifact.local_folder()) / "sub" / "config.json").read_bytes() == b"{}"


def test_names_cannot_leave_the_folder(store: Store) -> None:
    for name in ("../x", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="would leave the folder"):
            make(store).write_bytes(name, b"")


def test_failed_write_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make(Store(str(tmp_path)))
    artifact.write_bytes("u", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device.*free space"):
        artifact.commit_bytes("u", b"new")
    assert artifact.names() == ["u"]
    assert artifact.read_bytes("u") == b"old"


def test_killed_writers_leftovers_go_when_the_artifact_is_sealed(tmp_path: Path) -> None:
    artifact = make(Store(str(tmp_path)))
    unit = artifact.commit_bytes("u", b"x")
    (Path(artifact.path()) / "v.tmp-123-abcd").write_bytes(b"half")
    artifact.seal([unit])
    assert not [name for name in artifact.names() if ".tmp-" in name]


def test_storage_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match="cannot write"):
        make(Store(str(tmp_path / "runs"))).commit_bytes("u", b"x")


class Flaky:
    """An operation of the storage that fails so many times."""

    def __init__(self, real: Any, error: Exception, times: int) -> None:
        self.real, self.error, self.left, self.calls = real, error, times, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return self.real(*arguments, **named)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
def test_a_storage_that_hiccups_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float], number: int
) -> None:
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(storage.os, "fsync", Flaky(os.fsync, OSError(number, os.strerror(number)), 2))
    folder.write_bytes("name", b"content")
    assert folder.read_bytes("name") == b"content"
    assert waited[:2] == [1.0, 4.0]
    assert [file.name for file in tmp_path.iterdir()] == ["name"]


def test_a_storage_that_stays_away_is_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    monkeypatch.setattr(storage.os, "fsync", Flaky(os.fsync, OSError(errno.EIO, "Input/output error"), 99))
    with pytest.raises(StoreError, match=r"cannot write .*name: Input/output error"):
        Folder(str(tmp_path)).write_bytes("name", b"content")
    assert waited == list(storage.WAITS)
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_s_own_errors_may_pass_too(monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    folder = Folder("memory://flaky")
    monkeypatch.setattr(
        folder.fs, "pipe_file", Flaky(folder.fs.pipe_file, OSError("Please reduce your request rate."), 1)
    )
    folder.write_bytes("name", b"content")
    assert folder.read_bytes("name") == b"content"
    assert waited == [1.0]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "no")]
)
def test_what_does_not_pass_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float], error: OSError
) -> None:
    monkeypatch.setattr(storage.os, "fsync", Flaky(os.fsync, error, 99))
    with pytest.raises(StoreError):
        Folder(str(tmp_path)).write_bytes("name", b"content")
    assert waited == []


class HttpError(Exception):
    """As of an object store's client whose errors are no OSError."""


@pytest.mark.parametrize("error", [OSError(errno.EIO, "SlowDown"), OSError("503"), HttpError("502"), TimeoutError()])
@pytest.mark.parametrize("operation", ["info", "cat_file", "pipe_file", "find", "rm_file"])
def test_every_request_to_an_object_store_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, waited: list[float], operation: str, error: Exception
) -> None:
    artifact = make(Store(f"memory://{uuid.uuid4().hex}"))
    done = artifact.commit_bytes("shard-0", b"rows", rows=1)
    monkeypatch.setattr(artifact.fs, operation, Flaky(getattr(artifact.fs, operation), error, 2))
    assert artifact.units(["shard-0", "shard-1"]) == {"shard-0": done}
    assert artifact.names() == ["_units/shard-0.json", "shard-0"]
    artifact.commit_bytes("shard-1", b"rows", rows=1)
    artifact.remove("shard-1")
    assert not artifact.exists("shard-1")
    assert waited in ([1.0, 4.0], [1.0, 1.0])  # of one request, or of two that were made side by side


@pytest.mark.parametrize("error", [OSError(errno.EIO, "SlowDown"), HttpError("SlowDown")])
def test_a_storage_that_does_not_answer_is_not_one_without_the_file(
    monkeypatch: pytest.MonkeyPatch, waited: list[float], error: Exception
) -> None:
    artifact = make(Store(f"memory://{uuid.uuid4().hex}"))
    artifact.commit_bytes("shard-0", b"rows")
    monkeypatch.setattr(artifact.fs, "info", Flaky(artifact.fs.info, error, 99))
    with pytest.raises(StoreError, match=r"cannot look for memory://.*_units/shard-0.json: .*SlowDown"):
        artifact.unit("shard-0")
    assert waited == list(storage.WAITS)

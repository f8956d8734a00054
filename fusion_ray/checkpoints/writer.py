"""Writes one safetensors shard piece by piece: never the whole shard, nor a whole tensor, in memory; whole on disk or not at all.

The file is laid out before the first piece comes, so pieces may come in any order and from several threads. What is written goes to the disk while the rest
is computed, so little is left to wait for at the end.
"""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from fusion_ray.checkpoints.dtypes import NUMPY_DTYPES
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.store import StoreError

_HASHED_AT_A_TIME = 1 << 20
_FLUSHED_AT_A_TIME = 64 << 20


class ShardWriter:
    """Context manager. `write` takes elements of the unit's tensors; the file appears under its name when all have come."""

    def __init__(self, path: str | Path, unit: WorkUnit) -> None:
        self._path = Path(path)
        self._called = unit.file  # where the path is a passing one
        self._temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._tensors = {tensor.name: tensor for tensor in unit.tensors}
        self._remaining = {tensor.name: tensor.size for tensor in unit.tensors}
        self._lock = threading.Lock()
        header = shard_header(unit)
        self._ends: dict[str, int] = {}
        end = len(header)
        for tensor in unit.tensors:
            end += tensor.bytes
            self._ends[tensor.name] = end
        self._header, self._size = header, end
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._room = memoryview(bytearray(_HASHED_AT_A_TIME))
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> Self:
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with self._errors():
                os.ftruncate(self._file, self._size)
            self._write_at(0, memoryview(self._header))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, start: int, values: npt.NDArray[np.generic]) -> None:
        """The elements (n,) of a tensor from `start` on, in its planned type. Each element must come once."""
        tensor = self._tensors[name]
        assert values.dtype == NUMPY_DTYPES[tensor.dtype], f"{name} is planned as {tensor.dtype}, not {values.dtype}"
        assert start + values.size <= tensor.size, f"{name} has more elements than its plan"
        if not values.size:
            return
        at = self._ends[name] - tensor.bytes + start * values.itemsize
        self._write_at(at, np.ascontiguousarray(values).view(np.uint8).data)
        with self._lock:
            self._remaining[name] -= values.size

    def hash_up_to(self, name: str) -> None:
        """Take what lies before the end of this tensor into the file's sha256; all of it must have been written. Called in the unit's order."""
        self._hash_to(self._ends[name])
        if self._hashed >= (len(self._flushes) + 1) * _FLUSHED_AT_A_TIME and all(each.done() for each in self._flushes):
            self._flushes.append(self._flusher.submit(os.fdatasync, self._file))

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is finished."""
        assert self._hashed == self._size, "the shard is not finished"
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not any(self._remaining.values()), f"{self._path.name}: not every tensor was written"
                self._hash_to(self._size)
                with self._errors():
                    for flush in self._flushes:
                        flush.result()
                    os.fsync(self._file)
                    os.replace(self._temporary, self._path)
        finally:
            self._discard()

    def _hash_to(self, end: int) -> None:
        while self._hashed < end:
            count = os.preadv(self._file, [self._room[: end - self._hashed]], self._hashed)
            self._hash.update(self._room[:count])
            self._hashed += count

    def _write_at(self, offset: int, data: memoryview) -> None:
        with self._errors():
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write {self._called} in {self._path.parent}: {error.strerror or error}. Files that are whole are kept: free space or fix "
                "permissions and run again"
            ) from error

    def _discard(self) -> None:
        self._flusher.shutdown()
        os.close(self._file)
        self._temporary.unlink(missing_ok=True)


def shard_header(unit: WorkUnit) -> bytes:
    """The first bytes of a safetensors file: length and header, padded to 8 so that the data is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in unit.tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

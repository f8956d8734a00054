"""Writes one safetensors shard piece by piece: never the whole shard, nor a whole tensor, in memory; whole on disk or not at all.

The file is laid out before the first piece comes, so pieces may come in any order and from several threads. What is written goes to the disk and into the
sha256 while the rest is computed, so little is left to wait for at the end.
"""

import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from fusion_ray.checkpoints.direct import DirectFile
from fusion_ray.checkpoints.dtypes import NUMPY_DTYPES
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.store import StoreError


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
        self._sha256 = ""

    def __enter__(self) -> Self:
        try:
            with self._errors():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = DirectFile(self._temporary, self._size)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        self._write_at(0, memoryview(self._header))  # the first piece: it waits for nothing
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

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is finished."""
        assert self._sha256, "the shard is not finished"
        return self._sha256

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not any(self._remaining.values()), f"{self._path.name}: not every tensor was written"
                with self._errors():
                    sha256 = self._file.finish()
                    os.replace(self._temporary, self._path)
                self._sha256 = sha256
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write_at(self, offset: int, data: memoryview) -> None:
        with self._errors():
            self._file.write(offset, data)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write {self._called} in {self._path.parent}: {error.strerror or error}. Files that are whole are kept: free space or fix "
                "permissions and run again"
            ) from error


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

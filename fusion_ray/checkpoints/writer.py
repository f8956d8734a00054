"""Writes one safetensors shard piece by piece: never the whole shard, nor a whole tensor, in memory; whole on disk or not at all."""

import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fusion_ray.checkpoints.dtypes import TORCH_DTYPES
from fusion_ray.checkpoints.plan import WorkUnit


class ShardWriter:
    """Context manager. `write` takes the elements of the unit's tensors in the unit's order; the file appears under its name when all have come."""

    def __init__(self, path: str | Path, unit: WorkUnit) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._unit = unit
        self._remaining = [tensor.size for tensor in unit.tensors]
        self._current = 0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")
        self._file.write(shard_header(self._unit))
        return self

    def write(self, name: str, values: torch.Tensor) -> None:
        """Append elements (n,) of the tensor whose turn it is, in its planned type."""
        if values.numel() == 0:
            return
        while self._remaining[self._current] == 0:
            self._current += 1
        tensor = self._unit.tensors[self._current]
        assert tensor.name == name, f"{tensor.name} is to be written before {name}"
        assert values.dtype == TORCH_DTYPES[tensor.dtype], f"{name} is planned as {tensor.dtype}, not {values.dtype}"
        assert values.numel() <= self._remaining[self._current], f"{name} has more elements than its plan"
        self._remaining[self._current] -= values.numel()
        self._file.write(values.contiguous().view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not any(self._remaining), f"{self._path.name}: not every tensor was written"
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
        finally:
            self._file.close()
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

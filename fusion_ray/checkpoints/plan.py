"""The work units of a merge: one output shard is one unit, with what it will hold to the byte. The same plan on every machine."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion_ray.checkpoints.dtypes import ITEM_BYTES
from fusion_ray.checkpoints.reader import SINGLE


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: `dtype` is what it is written in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class WorkUnit:
    """One output shard: file name and tensors in the order in which they lie in the file."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def bytes(self) -> int:
        """Of the tensors; the file's header comes on top."""
        return sum(tensor.bytes for tensor in self.tensors)


def plan_units(tensors: Iterable[PlannedTensor], *, max_shard_bytes: int) -> tuple[WorkUnit, ...]:
    """Shards of at most `max_shard_bytes` of tensors (a larger tensor has one to itself), tensors by name with layer 2 before layer 10.

    Within a shard wider element types come first: data stays aligned to its own size. One shard is called `model.safetensors`.
    """
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: natural_order(tensor.name)):
        if groups[-1] and filled + tensor.bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    return tuple(
        WorkUnit(_file(number, len(groups)), tuple(sorted(group, key=lambda tensor: -ITEM_BYTES[tensor.dtype])))
        for number, group in enumerate(groups, start=1)
    )


def index_of(units: Sequence[WorkUnit]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    weight_map = {tensor.name: unit.file for unit in units for tensor in unit.tensors}
    total = sum(unit.bytes for unit in units)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _file(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

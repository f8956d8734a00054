"""One actor's work in a merge: the first pass over a shard's tensors, and the shard itself. No Ray here; the merge job and the stage call it.

Tensors are read in blocks of every model, computed in float32, cast once and appended to the shard. The bytes do not depend on the size of the blocks, on
threads, or on who does the work. Memory is bounded by `max_bytes_in_flight` whatever the tensor's size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusion_ray.checkpoints.dtypes import ITEM_BYTES, MERGEABLE, TORCH_DTYPES
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.gates import check_finite, check_same
from fusion_ray.checkpoints.plan import PlannedTensor, WorkUnit
from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.merging.blocks import CHUNK, Block, Weights, chunk_sums
from fusion_ray.merging.changes import Changes, measure_changes
from fusion_ray.merging.methods import METHODS

_LARGEST_BLOCK = 1 << 16  # elements: a block of every model and what is computed of it stay near the cache
_BYTES_PER_ELEMENT = 36  # of one model: as stored and as float32, a delta, two float64 intermediates, masks


@dataclass(frozen=True)
class Models:
    """The open models of one merge and the bound on what is read of them at a time."""

    pivot: Checkpoint
    targets: tuple[Checkpoint, ...]
    max_bytes_in_flight: int

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        return (self.pivot, *self.targets)

    @property
    def block_size(self) -> int:
        """Elements of a block. Raises MergeError where the bound leaves no room for the smallest one."""
        smallest = CHUNK * _BYTES_PER_ELEMENT * len(self.all)
        if self.max_bytes_in_flight < smallest:
            raise MergeError(
                f"max_bytes_in_flight is {self.max_bytes_in_flight}: merging {len(self.all)} models takes at least {smallest}: raise it"
            )
        return min(_LARGEST_BLOCK, self.max_bytes_in_flight // smallest * CHUNK)


class TensorBlocks:
    """The blocks of one tensor, read from the models' files at each pass; kept in memory after the first where all of them fit the bound."""

    def __init__(self, models: Models, name: str) -> None:
        self._models = models
        self._name = name
        self._size = models.pivot.tensors[name].size
        self._keep = self._size * _BYTES_PER_ELEMENT * len(models.all) <= models.max_bytes_in_flight // 2
        self._kept: list[Block] = []

    def __iter__(self) -> Iterator[Block]:
        if self._kept:
            yield from self._kept
            return
        blocks: list[Block] = []
        step = self._models.block_size
        for start in range(0, self._size, step):
            stop = min(start + step, self._size)
            pivot, *targets = (model.read(self._name, start, stop).to(torch.float32) for model in self._models.all)
            block = Block(start, pivot, tuple(targets))
            if self._keep:
                blocks.append(block)
            yield block
        self._kept = blocks


@dataclass(frozen=True)
class MergedTensor:
    """What became of one tensor: the targets' weights (None where each element has its own), and how far the result lies from the pivot as stored."""

    weights: Weights | None
    moved: int
    squares: float


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are too small for torch's threads to gain from, and on a busy machine they lose tens of times by spinning. Units run side by side instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def measure_shard(
    models: Models, unit: WorkUnit, progress: Callable[[str], None] = lambda name: None
) -> dict[str, Changes]:
    """The first pass: how far every target moved, for the tensors of one shard.

    Raises MergeError for non-finite values, and for an integer or boolean tensor that is not the same in every model: those have no mean.
    """
    changes: dict[str, Changes] = {}
    for tensor in unit.tensors:
        if _is_merged(models, tensor):
            found = measure_changes(TensorBlocks(models, tensor.name), targets=len(models.targets))
            check_finite(models.all, tensor.name, found.finite)
            changes[tensor.name] = found
        else:
            for pivot, *targets in _stored_blocks(models.all, models.max_bytes_in_flight, tensor):
                check_same(models.all, tensor.name, [torch.equal(pivot, target) for target in targets])
        progress(tensor.name)
    return changes


@_one_thread()
def merge_shard(
    models: Models,
    unit: WorkUnit,
    path: str | Path,
    *,
    method: str,
    parameters: Mapping[str, object],
    weights: Mapping[str, Weights | None],
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, MergedTensor]:
    """Write one shard to `path`, whole or not at all. `weights` come from the method's first phase, by tensor."""
    done: dict[str, MergedTensor] = {}
    with ShardWriter(path, unit) as writer:
        for tensor in unit.tensors:
            if _is_merged(models, tensor):
                blocks = TensorBlocks(models, tensor.name)
                ready = METHODS[method].prepare(blocks, weights[tensor.name], **parameters)
                done[tensor.name] = _write_merged(writer, tensor, blocks, ready.apply, ready.weights)
            else:
                for (values,) in _stored_blocks([models.pivot], models.max_bytes_in_flight, tensor):
                    writer.write(tensor.name, values)
            progress(tensor.name)
    return done


def _is_merged(models: Models, tensor: PlannedTensor) -> bool:
    return tensor.size > 0 and models.pivot.tensors[tensor.name].dtype in MERGEABLE


def _write_merged(
    writer: ShardWriter,
    tensor: PlannedTensor,
    blocks: TensorBlocks,
    apply: Callable[[Block], torch.Tensor],
    weights: Weights | None,
) -> MergedTensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    moved = 0
    squares: list[float] = []
    for block in blocks:
        merged = apply(block).to(dtype)
        if not bool(torch.isfinite(merged).all()):
            raise MergeError(
                f"tensor {tensor.name!r}: the merged values leave the range of {tensor.dtype}: write float32 or bfloat16 (merge.dtype)"
            )
        writer.write(tensor.name, merged)
        moved += int(torch.count_nonzero(merged != block.pivot.to(dtype)))
        squares.extend(chunk_sums((merged.to(torch.float32) - block.pivot).double().square_()))
    return MergedTensor(weights, moved, math.fsum(squares))


def _stored_blocks(models: Sequence[Checkpoint], bound: int, tensor: PlannedTensor) -> Iterator[list[torch.Tensor]]:
    """Ranges of a tensor as the models store it."""
    step = max(1, bound // (2 * ITEM_BYTES[tensor.dtype] * len(models)))
    for start in range(0, tensor.size, step):
        yield [model.read(tensor.name, start, min(start + step, tensor.size)) for model in models]

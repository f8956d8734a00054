"""One actor's work in a merge: the first pass over a shard's tensors, and the shard itself. No Ray here; the merge job and the stage call it.

Tensors are read in blocks of every model, computed in float32, cast once and written at their place in the shard. Several tensors are under way at a time,
one a thread; each reads the next window of its files while it computes the last. The bytes do not depend on the size of the blocks, on threads, or on who
does the work. What is read at a time is bounded by `max_bytes_in_flight`, whatever the tensor's size.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fusion_ray.checkpoints.dtypes import MERGEABLE, NUMPY_DTYPES
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.floats import Caster
from fusion_ray.checkpoints.gates import check_finite, check_same
from fusion_ray.checkpoints.plan import PlannedTensor, WorkUnit
from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.merging.blocks import Doubles, Weights, exact_sum
from fusion_ray.merging.changes import Changes, measure_changes
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.recipe import TensorRecipe
from fusion_ray.workers.tensor_blocks import Room, TensorBlocks, plain_memory, smallest_bound

Result = TypeVar("Result")
Recipes = Mapping[str, TensorRecipe]  # by the name of the output tensor


@dataclass(frozen=True)
class Models:
    """The open models of one merge, how much is read of them at a time, and how many tensors are under way."""

    checkpoints: tuple[Checkpoint, ...]
    max_bytes_in_flight: int
    threads: int = 1

    def check_bound(self) -> None:
        """Raises MergeError where the bound leaves no room for the smallest blocks."""
        least = smallest_bound(len(self.checkpoints), self.threads)
        if self.max_bytes_in_flight < least:
            raise MergeError(
                f"max_bytes_in_flight is {self.max_bytes_in_flight}: merging {len(self.checkpoints)} models in {self.threads} "
                f"thread{'s' if self.threads > 1 else ''} takes at least {least}: raise it "
                "(merge.max_bytes_in_flight of a run, --max-bytes-in-flight of the command `merge`), or merge in fewer threads"
            )


@dataclass(frozen=True)
class MergedTensor:
    """What became of one tensor: the targets' weights (None where each element has its own), and how far the result lies from the base as stored."""

    weights: Weights | None
    moved: int
    squares: float


class Device(Protocol):
    """What takes whole tensors off the processor, without a change to the bytes; several threads use it. merge_on_device.TorchDevice, which loads torch."""

    def allocate(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory of the host to read files into."""

    def measure(self, blocks: TensorBlocks) -> Changes | None:
        """None for a tensor that the device has no room for: nothing was done."""

    def merge(
        self,
        blocks: TensorBlocks,
        recipe: TensorRecipe,
        tensor: PlannedTensor,
        weights: Weights | None,
        writer: ShardWriter,
    ) -> MergedTensor | None:
        """Likewise. Raises MergeError for values that leave the range of the written type."""


def usable_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure_shard(
    models: Models,
    unit: WorkUnit,
    recipes: Recipes,
    targets: Sequence[int],
    progress: Callable[[str], None] = lambda name: None,
    device: Device | None = None,
) -> dict[str, Changes]:
    """The first pass: how far the targets with these places in the recipes moved, for the tensors of one shard.

    Raises MergeError for non-finite values, and for an integer or boolean tensor that is not the same in every model: those have no mean.
    """

    def measure(room: Room, tensor: PlannedTensor) -> Changes | None:
        recipe = recipes[tensor.name]
        if not is_merged(models, recipe):
            _check_copied(models, recipe)
            return None
        chosen = [place for place in targets if place < len(recipe.models)]
        if not chosen:
            return None
        blocks = TensorBlocks(models.checkpoints, recipe, room, places=chosen)
        found = (device.measure(blocks) if device else None) or measure_changes(blocks)
        at = [recipe.reference, *((recipe.models[place], recipe.names[place]) for place in chosen)]
        check_finite([(models.checkpoints[number], name) for number, name in at], found.finite)
        return found

    with _tensors_side_by_side(models, unit, measure, device) as results:
        changes: dict[str, Changes] = {}
        for tensor, found in results:
            if found is not None:
                changes[tensor.name] = found
            progress(tensor.name)
    return changes


def merge_shard(
    models: Models,
    unit: WorkUnit,
    recipes: Recipes,
    path: str | Path,
    *,
    weights: Mapping[str, Weights | None],
    progress: Callable[[str], None] = lambda name: None,
    device: Device | None = None,
) -> tuple[dict[str, MergedTensor], str]:
    """Write one shard to `path`, whole or not at all; its tensors' figures and its sha256. `weights` come from the method's first phase, by tensor."""
    done: dict[str, MergedTensor] = {}
    with ShardWriter(path, unit) as writer:

        def merge(room: Room, tensor: PlannedTensor) -> MergedTensor | None:
            recipe = recipes[tensor.name]
            if not is_merged(models, recipe):
                _copy(models, recipe, tensor, writer)
                return None
            whole_rows = METHODS[recipe.method].whole_rows(recipe.parameters)
            blocks = TensorBlocks(models.checkpoints, recipe, room, whole_rows=whole_rows)
            given = weights.get(tensor.name)
            there = device.merge(blocks, recipe, tensor, given, writer) if device else None
            return there or _merge_tensor(blocks, recipe, room, tensor, given, writer)

        with _tensors_side_by_side(models, unit, merge, device) as results:
            for tensor, merged in results:
                if merged is not None:
                    done[tensor.name] = merged
                progress(tensor.name)
    return done, writer.sha256


def _merge_tensor(
    blocks: TensorBlocks,
    recipe: TensorRecipe,
    room: Room,
    tensor: PlannedTensor,
    weights: Weights | None,
    writer: ShardWriter,
) -> MergedTensor:
    ready = METHODS[recipe.method].prepare(blocks, weights, **recipe.parameters)
    caster = Caster(blocks.row if blocks.whole_rows else None)
    moved = 0
    squares: list[Doubles] = []
    for block in blocks:
        merged = room.output.take(1, block.size)[0]
        ready.apply(block, merged)
        stored, found = caster.cast(merged, block, tensor.dtype)
        if found.odd:
            raise out_of_range(tensor)
        writer.write(tensor.name, block.start, stored)
        moved += found.moved
        squares.append(found.squares)
    return MergedTensor(ready.weights, moved, exact_sum(squares))


def out_of_range(tensor: PlannedTensor) -> MergeError:
    return MergeError(
        f"tensor {tensor.name!r}: the merged values leave the range of {tensor.dtype}: write float32 or bfloat16 "
        "(`out_dtype` of a merge file, `merge.dtype` of a run)"
    )


def is_merged(models: Models, recipe: TensorRecipe) -> bool:
    """Whether there is arithmetic to do; other tensors are copied."""
    number, name = recipe.reference
    info = models.checkpoints[number].tensors[name]
    return info.size > 0 and info.dtype in MERGEABLE


def _check_copied(models: Models, recipe: TensorRecipe) -> None:
    """The tensor must be the same in every model."""
    inputs = [(models.checkpoints[number], name) for number, name in recipe.inputs]
    for values in _stored_blocks(inputs, models.max_bytes_in_flight // models.threads):
        check_same(inputs, [bool(np.array_equal(values[0], each)) for each in values])


def _copy(models: Models, recipe: TensorRecipe, tensor: PlannedTensor, writer: ShardWriter) -> None:
    number, name = recipe.reference
    start = 0
    for (values,) in _stored_blocks([(models.checkpoints[number], name)], models.max_bytes_in_flight // models.threads):
        writer.write(tensor.name, start, values)
        start += values.size


def _stored_blocks(inputs: Sequence[tuple[Checkpoint, str]], bound: int) -> Iterator[list[npt.NDArray[np.generic]]]:
    """Ranges of a tensor as the models store it."""
    model, name = inputs[0]
    info = model.tensors[name]
    step = max(1, bound // (2 * np.dtype(NUMPY_DTYPES[info.dtype]).itemsize * len(inputs)))
    for start in range(0, info.size, step):
        yield [each.read(name, start, min(start + step, info.size)) for each, name in inputs]


@contextmanager
def _tensors_side_by_side(
    models: Models, unit: WorkUnit, work: Callable[[Room, PlannedTensor], Result], device: Device | None
) -> Iterator[Iterator[tuple[PlannedTensor, Result]]]:
    """`work` on every tensor of the unit in as many threads as the models say, the results in the unit's order. An error stops the rest."""
    readers = ThreadPoolExecutor(models.threads, "read")
    allocate = device.allocate if device else plain_memory
    bound, maps = models.max_bytes_in_flight // models.threads, device is None
    rooms = [Room(bound, readers, allocate, maps=maps) for _ in range(models.threads)]

    def do(tensor: PlannedTensor) -> Result:
        room = rooms.pop()
        try:
            return work(room, tensor)
        finally:
            rooms.append(room)

    threads = ThreadPoolExecutor(models.threads, "merge")
    try:
        yield zip(unit.tensors, threads.map(do, unit.tensors), strict=True)
    finally:
        threads.shutdown(cancel_futures=True)
        readers.shutdown(cancel_futures=True)

"""The blocks of one output tensor, from the models' files: in windows of many blocks, the next one being read while the last is computed.

Files of this machine are mapped: nothing is copied, and what was read once stays where the machine has memory for it. Others are read into memory of our own,
where a tensor that fits one window is read once, however often a merge method goes over it. Called by `merger.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait

import numpy as np
import numpy.typing as npt

from fusion_ray.checkpoints.dtypes import ITEM_BYTES, NUMPY_DTYPES
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.merging.blocks import CHUNK, Block, Scratch, widen
from fusion_ray.merging.recipe import TensorRecipe

BLOCK = 1 << 18  # elements: what is computed of a block stays in the cache of a core
_WINDOWS = 2
_WIDEST = 8  # bytes of an element
_LARGEST_WINDOW = 32 << 20  # bytes: larger ones read no faster, and the first must come before anything is computed
_PER_ELEMENT = 32  # bytes beside the windows, of one model and element of a block: float32, what methods make of it


def smallest_bound(models: int, threads: int) -> int:
    """The least `max_bytes_in_flight`: half of it is for windows, a quarter for blocks, a quarter or more for what methods keep of a tensor."""
    return threads * CHUNK * models * max(2 * _WINDOWS * _WIDEST, 4 * _PER_ELEMENT)


def plain_memory(size: int) -> npt.NDArray[np.uint8]:
    return np.empty(size, np.uint8)


class Room:
    """Memory of one thread, used again for one tensor after the other: fresh memory costs more than the loops that fill it."""

    def __init__(
        self,
        bound: int,
        readers: Executor,
        allocate: Callable[[int], npt.NDArray[np.uint8]] = plain_memory,
        *,
        maps: bool = True,
    ) -> None:
        self.readers = readers
        self.maps = maps  # files where they can be; else all are read into memory that `allocate` gives
        self._bound = bound
        self._allocate = allocate
        self._windows: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)] * _WINDOWS
        self.floats, self.widened = Scratch(np.float32), Scratch(np.float32)
        self.output = Scratch(np.float32)
        self.kept = Scratch(np.uint32)

    def block_size(self, models: int, unit: int) -> int:
        """Elements of a block: a multiple of `unit`, within a quarter of the bound. Raises MergeError where a unit alone is too large."""
        most = self._bound // 4 // (models * _PER_ELEMENT)
        size = min(max(BLOCK, unit), most) // unit * unit
        if not size:
            raise MergeError(
                f"rows of {unit} elements of {models} models do not fit max_bytes_in_flight ({self._bound} bytes a thread): raise it"
            )
        return size

    def spare(self, blocks: int, windows: int) -> int:
        """What is left for methods of the bound, beside the bytes of blocks and of windows."""
        return max(self._bound - blocks - windows, self._bound // 4)

    def window_size(self, item_bytes: int, block: int) -> int:
        """Elements of a window, a multiple of a block; `item_bytes` of one element of all models."""
        most = min(self._bound // 2, _WINDOWS * _LARGEST_WINDOW) // _WINDOWS // item_bytes
        return max(block, most // block * block)

    def window(self, number: int, size: int) -> npt.NDArray[np.uint8]:
        if self._windows[number].size < size:
            self._windows[number] = self._allocate(size)
        return self._windows[number][:size]


class TensorBlocks:
    """merging.blocks.Blocks of a recipe; `places` chooses some of its targets. One thread goes over it at a time."""

    def __init__(
        self,
        models: Sequence[Checkpoint],
        recipe: TensorRecipe,
        room: Room,
        *,
        places: Sequence[int] | None = None,
        whole_rows: bool = False,
    ) -> None:
        chosen = range(len(recipe.models)) if places is None else places
        targets = [(models[recipe.models[place]], recipe.names[place]) for place in chosen]
        number, name = recipe.reference
        reference = (models[number], name)
        shared = reference in targets  # without a base, a target is what the others are compared with
        self._inputs = targets if shared else [reference, *targets]
        self.reference = self._inputs.index(reference)  # which input is the base's
        self.first_target = len(self._inputs) - len(targets)
        info = reference[0].tensors[name]
        self.dtypes = [model.tensors[each].dtype for model, each in self._inputs]
        self.room = room
        self._resident = False
        self.whole_rows = whole_rows
        self.name = recipe.name
        self.size = info.size
        self.row = info.shape[-1] if info.shape else 1
        self.targets = len(targets)
        self._block = room.block_size(len(self._inputs), self.row if whole_rows else CHUNK)
        item_bytes = sum(ITEM_BYTES[dtype] for dtype in self.dtypes)
        self._window = room.window_size(item_bytes, self._block)
        self.kept = room.kept
        self.spare = room.spare(
            self._block * len(self._inputs) * _PER_ELEMENT, 0 if self._maps() else _WINDOWS * self._window * item_bytes
        )

    def __iter__(self) -> Iterator[Block]:
        as_it_is = set(self.dtypes) in ({"F32"}, {"BF16"})  # what compiled loops take; others are made float32
        order = [self.reference, *range(self.first_target, len(self._inputs))]
        for start, stored in self.windows():
            for at in range(0, stored[0].size, self._block):
                values = [stored[number][at : at + self._block] for number in order]
                yield Block(start + at, values if as_it_is else self._floats(values), self.room.floats)

    def _floats(self, stored: Sequence[npt.NDArray[np.generic]]) -> Sequence[npt.NDArray[np.generic]]:
        floats = self.room.widened.take(len(stored), stored[0].size)
        for values, row in zip(stored, floats, strict=True):
            widen(values, row)
        return list(floats)

    def windows(self) -> Iterator[tuple[int, list[npt.NDArray[np.generic]]]]:
        """(first element, the stored elements of every input), window after window; the arrays may be overwritten when the next is asked for."""
        if self._maps():
            yield from self._mapped_windows()
            return
        if self._window >= self.size:
            if not self._resident:
                self._read(0, 0)
                self._resident = True
            yield 0, self._arrays(0, self.size)
            return
        starts = range(0, self.size, self._window)
        coming: Future[None] = self.room.readers.submit(self._read, 0, 0)
        try:
            for number, start in enumerate(starts):
                coming.result()
                turn = number % _WINDOWS
                if number + 1 < len(starts):
                    coming = self.room.readers.submit(self._read, (number + 1) % _WINDOWS, starts[number + 1])
                yield start, self._arrays(turn, min(self._window, self.size - start))
        finally:
            wait([coming])  # who leaves early may begin anew, in the same memory

    def _maps(self) -> bool:
        return self.room.maps and all(model.mapped(name, 0, 0) is not None for model, name in self._inputs)

    def _mapped_windows(self) -> Iterator[tuple[int, list[npt.NDArray[np.generic]]]]:
        for start in range(0, self.size, self._window):
            stop = min(start + self._window, self.size)
            if stop < self.size:
                self.room.readers.submit(self._expect, stop, min(stop + self._window, self.size))
            found = [model.mapped(name, start, stop) for model, name in self._inputs]
            yield start, [values for values in found if values is not None]

    def _expect(self, start: int, stop: int) -> None:
        for model, name in self._inputs:
            model.expect(name, start, stop)

    def _arrays(self, turn: int, count: int) -> list[npt.NDArray[np.generic]]:
        """One after the other in the window's memory, the widest types first in their own alignment."""
        room = self.room.window(turn, count * sum(ITEM_BYTES[dtype] for dtype in self.dtypes))
        arrays: dict[int, npt.NDArray[np.generic]] = {}
        at = 0
        for row in sorted(range(len(self.dtypes)), key=lambda row: -ITEM_BYTES[self.dtypes[row]]):
            size = count * ITEM_BYTES[self.dtypes[row]]
            arrays[row] = room[at : at + size].view(NUMPY_DTYPES[self.dtypes[row]])
            at += size
        return [arrays[row] for row in range(len(self.dtypes))]

    def _read(self, turn: int, start: int) -> None:
        for (model, name), values in zip(
            self._inputs, self._arrays(turn, min(self._window, self.size - start)), strict=True
        ):
            model.read_into(name, start, values)

"""Whole tensors of a merge on a torch device: there as they are stored, measured, or merged and cast, and back. No device changes the bytes of a merge: the
arithmetic is `merging/on_torch`, which has the bits of the compiled loops.

The threads of `merger.py` share a `TorchDevice`; each has a stream of its own there, so one's tensor travels while another's is computed, and files are read
into page-locked memory, which is copied from without the processor. merge_units.py opens the device; nothing else of a merge loads torch, which takes seconds.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_ray.checkpoints.dtypes import ITEM_BYTES, NUMPY_DTYPES
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.plan import PlannedTensor
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.merging.blocks import CHUNK, Weights
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.on_torch.blocks import TorchBlocks, piece_of
from fusion_ray.merging.on_torch.methods import TORCH_METHODS
from fusion_ray.merging.on_torch.sums import chunk_sums, measure_changes, total_of
from fusion_ray.merging.recipe import TensorRecipe
from fusion_ray.workers.merger import MergedTensor, out_of_range
from fusion_ray.workers.tensor_blocks import TensorBlocks, plain_memory

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARE = 0.8  # of the device's free memory: the rest is for what torch keeps and for gaps between tensors
_RANKS = 8  # bytes of an element of the tensor, beside the models and the result as stored: its rank, and masks of it
_PER_MODEL = 24  # bytes of an element of a piece, of each model
_PER_PIECE = 200  # and besides: della's sort takes the most


@contextmanager
def cuda_device() -> Iterator["TorchDevice"]:
    """The CUDA device of this process; its memory is given back at the end. Raises MergeError where there is none."""
    if not torch.cuda.is_available():
        raise MergeError(
            "the merge is to use a CUDA device, and torch finds none on this machine: set resources.merge.gpus to 0, or install torch "
            "with CUDA and check what CUDA_VISIBLE_DEVICES lets it see"
        )
    free = torch.cuda.mem_get_info()[0]
    device = TorchDevice(torch.device("cuda", torch.cuda.current_device()), int(_SHARE * free))
    try:
        yield device
    finally:
        if device.left:
            logger.info("merge: %d tensors did not fit the device's memory: done by the processor", device.left)
        torch.cuda.empty_cache()  # a worker of Ray lives on, and others may use the device


class TorchDevice:
    """`memory` bytes of a torch device, shared by threads: each takes what its tensor needs, and waits for it. A larger tensor is `left` to the processor."""

    def __init__(self, device: torch.device, memory: int) -> None:
        self._device = device
        self._memory = self._free = memory
        self._changed = threading.Condition()
        self._thread = threading.local()
        self.left = 0

    def allocate(self, size: int) -> npt.NDArray[np.uint8]:
        """Page-locked memory of the host where the device is CUDA's."""
        if self._device.type != "cuda":
            return plain_memory(size)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    def measure(self, blocks: TensorBlocks) -> Changes | None:
        """As `changes.measure_changes`; None for a tensor that is left."""
        with self._place(needed(blocks)) as fits:
            if fits:
                return measure_changes(self._load(blocks))
        return None

    def merge(
        self,
        blocks: TensorBlocks,
        recipe: TensorRecipe,
        tensor: PlannedTensor,
        weights: Weights | None,
        writer: ShardWriter,
    ) -> MergedTensor | None:
        """Merge and write one tensor; None, and nothing written, for one that is left. Raises MergeError for values out of the written type's range."""
        with self._place(needed(blocks, ITEM_BYTES[tensor.dtype])) as fits:
            if fits:
                stored, merged = self._merge(self._load(blocks), recipe, tensor, weights)
                self._write(blocks, tensor, stored, writer)
                return merged
        return None

    def _merge(
        self, there: TorchBlocks, recipe: TensorRecipe, tensor: PlannedTensor, weights: Weights | None
    ) -> tuple[Tensor, MergedTensor]:
        """The merged (n,) as stored, and its figures: as `floats.Caster` takes them."""
        ready = TORCH_METHODS[recipe.method](there, weights, **recipe.parameters)
        stored = torch.empty(there.size, dtype=TORCH_DTYPES[tensor.dtype], device=self._device)
        moved, odd = torch.zeros((2,), dtype=torch.int64, device=self._device)
        squares = []
        for piece in there:
            cast = stored[piece.start : piece.start + piece.size]
            cast.copy_(ready.apply(piece))
            odd += cast.numel() - cast.isfinite().count_nonzero()
            moved += (cast != piece.base.to(cast.dtype)).count_nonzero()
            apart = cast.float() - piece.base
            rows = apart.view(-1, there.row) if there.whole_rows else apart
            squares.append(chunk_sums(rows, rows).view(-1))
        if int(odd):
            raise out_of_range(tensor)
        return stored, MergedTensor(ready.weights, int(moved), float(total_of(squares)))

    def _load(self, blocks: TensorBlocks) -> TorchBlocks:
        inputs = [torch.empty(blocks.size, dtype=TORCH_DTYPES[each], device=self._device) for each in blocks.dtypes]
        for start, arrays in blocks.windows():
            for there, here in zip(inputs, arrays, strict=True):
                there[start : start + here.size].copy_(_as_torch(here, there.dtype))
        targets = inputs[blocks.first_target :]
        return TorchBlocks(inputs[blocks.reference], targets, blocks.name, blocks.row, blocks.whole_rows)

    def _write(self, blocks: TensorBlocks, tensor: PlannedTensor, stored: Tensor, writer: ShardWriter) -> None:
        item = ITEM_BYTES[tensor.dtype]
        step = blocks.room.window_size(item, CHUNK)
        for start in range(0, tensor.size, step):
            part = stored[start : start + step]
            here = blocks.room.window(0, part.numel() * item).view(NUMPY_DTYPES[tensor.dtype])
            _as_torch(here, stored.dtype).copy_(part)
            writer.write(tensor.name, start, here)

    @contextmanager
    def _place(self, bytes_: int) -> Iterator[bool]:
        """True with room for so much taken, in this thread's stream; False for what never fits. The block is cut short, silently, where the device is full."""
        if bytes_ > self._memory:
            self._leave()
            yield False
            return
        with self._changed:
            self._changed.wait_for(lambda: self._free >= bytes_)
            self._free -= bytes_
        try:
            with self._stream():
                yield True
        except (
            torch.OutOfMemoryError
        ):  # others use the device too; results are written when all is computed, so nothing was
            self._leave()
        finally:
            with self._changed:
                self._free += bytes_
                self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self.left += 1

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._thread.stream)


def needed(blocks: TensorBlocks, written: int = 0) -> int:
    """Bytes of the device that a tensor takes: the models as stored, `written` bytes an element of the result, and what is made of a piece."""
    piece = min(blocks.size, piece_of(blocks.row if blocks.whole_rows else CHUNK))
    whole = sum(ITEM_BYTES[each] for each in blocks.dtypes) + written + _RANKS
    return blocks.size * whole + piece * (_PER_MODEL * len(blocks.dtypes) + _PER_PIECE)


def _as_torch(stored: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """The same memory; numpy holds bfloat16 as its bits."""
    return torch.from_numpy(stored.view(np.uint8)).view(dtype)

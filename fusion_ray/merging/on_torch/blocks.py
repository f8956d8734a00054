"""One tensor of every model on a torch device, in pieces: what `merging/blocks.py` is to the compiled loops, for the methods of this folder.

They merge where there is a CUDA device and run on any. Their results have the bits of the compiled loops: each step is one operation of IEEE 754 on all
elements of a piece, in the order of the loops. So no two operations are fused into one (`alpha=`, `addcmul`), floats are added up in `sums.py` alone, nothing
is a product of matrices, and a tensor is never divided by a number, which torch multiplies by its inverse on CUDA. Legend of letters: M targets, p elements of
a piece.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion_ray.merging.blocks import CHUNK, Weights

PIECE = (
    1 << 22
)  # elements, a multiple of CHUNK: enough to keep a device busy, and what is made of a piece stays small beside the models


@dataclass(frozen=True)
class Piece:
    """Elements `start : start + p` of one flattened tensor in float32: the base's (p,) and the targets' (M, p)."""

    start: int
    base: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        return int(self.base.numel())

    @property
    def deltas(self) -> Tensor:
        """(M, p) the task vectors."""
        return self.targets - self.base


@dataclass(frozen=True)
class TorchBlocks:
    """The models' tensors (n,) as they are stored, of any floating type. `base` is what the result is compared with where a merge has none."""

    base: Tensor
    stored: Sequence[Tensor]  # the targets'
    name: str  # of the output tensor: the seed of random methods
    row: int  # elements of the last dimension
    whole_rows: bool = False  # pieces of whole rows, else of whole chunks
    most: int = PIECE  # elements of a piece

    @property
    def size(self) -> int:
        return int(self.base.numel())

    @property
    def targets(self) -> int:
        return len(self.stored)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def piece(self) -> int:
        """Elements of a piece."""
        return piece_of(self.row if self.whole_rows else CHUNK, self.most)

    def __iter__(self) -> Iterator[Piece]:
        for start in range(0, self.size, self.piece):
            part = slice(start, start + self.piece)
            yield Piece(start, self.base[part].float(), torch.stack([target[part].float() for target in self.stored]))

    def of(self, target: int) -> "TorchBlocks":
        """Those of one target."""
        return replace(self, stored=(self.stored[target],))


@dataclass(frozen=True)
class TorchMerge:
    """A method made ready for one tensor. `apply(piece)` is the merged (p,) float32; `weights` are None where each element has its own."""

    weights: Weights | None
    apply: Callable[[Piece], Tensor]


def piece_of(unit: int, most: int = PIECE) -> int:
    """The elements of a piece of whole units: at most `most`, or one unit."""
    return max(most // unit, 1) * unit

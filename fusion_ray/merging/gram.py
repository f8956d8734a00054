"""Inner products of a tensor's models: all that the spherical methods and Model Stock need, since what they compute is a weighted sum of the models.

Called by `sphere.py` and `model_stock.py`. Letters: M targets.
"""

from typing import Literal

import numpy as np

from fusion_ray.merging.blocks import Block, Blocks, Doubles, Floats, exact_sum
from fusion_ray.merging.kernels import chunks_of, dot_chunks

Of = Literal["targets", "deltas", "base and targets"]


def gram_matrix(blocks: Blocks, *, of: Of) -> Doubles:
    """Inner products of the flattened tensors in float64, in one pass; the same for any size of block.

    (M, M) of the targets or of their task vectors, (M + 1, M + 1) of the base and the targets.
    """
    count = blocks.targets + (of == "base and targets")
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    chunks: list[list[Doubles]] = [[] for _ in pairs]
    for block in blocks:
        base = block.base if of == "deltas" else np.zeros(block.size, np.float32)
        tensors = _tensors(block, of)
        for (i, j), into in zip(pairs, chunks, strict=True):
            sums = np.empty(chunks_of(block.size))
            dot_chunks(tensors[i], tensors[j], base, sums)
            into.append(sums)
    gram = np.empty((count, count))
    for (i, j), sums_of_blocks in zip(pairs, chunks, strict=True):
        gram[i, j] = gram[j, i] = exact_sum(sums_of_blocks)
    return gram


def _tensors(block: Block, of: Of) -> list[Floats]:
    targets = list(block.targets)
    return [block.base, *targets] if of == "base and targets" else targets

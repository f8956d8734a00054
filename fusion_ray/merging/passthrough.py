"""Passthrough: the one model's tensor as it is, for outputs that are put together from layers of several models."""

from fusion_ray.merging.blocks import Block, Blocks, Floats, TensorMerge, Weights


def passthrough(blocks: Blocks, weights: Weights | None = None) -> TensorMerge:
    """Raises ValueError for more than one model. `weights` is not used."""
    if blocks.targets != 1:
        raise ValueError(
            f"passthrough takes one model a tensor; {blocks.targets} are given: choose a method that merges"
        )

    def apply(block: Block, out: Floats) -> None:
        out[:] = block.targets[0]

    return TensorMerge((1.0,), apply)

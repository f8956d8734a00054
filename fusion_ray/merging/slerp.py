"""SLERP between the base (t = 0) and the one target (t = 1), of the flattened tensors (Shoemake, SIGGRAPH 1985).

    merged = sin((1 - t) Omega) / sin(Omega) theta_v + sin(t Omega) / sin(Omega) theta_1        Omega the angle between the two

Linear, (1 - t) theta_v + t theta_1, where |cos Omega| > 0.9995, as mergekit has it: the angle of nearly parallel tensors says nothing.
A zero tensor makes no angle either.
"""

import numpy as np

from fusion_ray.merging.blocks import Block, Blocks, Doubles, Floats, TensorMerge, Weights
from fusion_ray.merging.gram import gram_matrix
from fusion_ray.merging.sphere import directions

PARALLEL = 0.9995


def slerp(blocks: Blocks, weights: Weights | None = None, *, t: float) -> TensorMerge:
    """Raises ValueError unless there is one target. `weights` is not used."""
    of_base, of_target = coefficients(gram_matrix(blocks, of="base and targets"), t=t)
    narrow = np.float32(of_base), np.float32(of_target)

    def apply(block: Block, out: Floats) -> None:
        np.multiply(block.targets[0], narrow[1], out=out)
        out += block.base * narrow[0]

    return TensorMerge((of_target,), apply)


def coefficients(gram: Doubles, *, t: float) -> tuple[float, float]:
    """What the base and the target are multiplied by, from their inner products (2, 2). Raises ValueError for those of more."""
    if len(gram) != 2:
        raise ValueError(
            f"slerp goes between two models, the base and one other; {len(gram) - 1} others are given: take multislerp or karcher"
        )
    norms, cosines = directions(gram)
    cosine = float(cosines[0, 1])
    if abs(cosine) > PARALLEL or not norms.all():
        return 1.0 - t, t
    angle = float(np.arccos(cosine))
    return float(np.sin((1.0 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))

"""VaRM, merging by variation ratio (FuseChat v1, arXiv 2402.16107): a target weighs as much as it moved from the pivot.

    W[j, m] = E_m[(theta_j - theta_v)^2] / sum_j E_m[(theta_j - theta_v)^2]
    merged_m = sum_j W[j, m] theta_j = theta_v + sum_j W[j, m] (theta_j - theta_v)

with the mean E over all elements of unit m: one parameter, one matrix (the paper's choice), one decoder layer (a tensor outside the layers is its own
unit) or the whole model. The second form is computed: it leaves an element that nobody moved exactly at the pivot's value. `square=False` takes
|theta_j - theta_v| instead. A unit that no target moved has equal weights. The released code does none of this: its weights are always equal.
"""

import re
from collections.abc import Mapping

import torch

from fusion_ray.merging.blocks import Block, Blocks, TensorMerge, Weights, shares, weighted_sum
from fusion_ray.merging.changes import Changes

_LAYER = re.compile(r"^((?:[^.]+\.)*?(\d+))\.(.+)$")


def varm_weights(
    changes: Mapping[str, Changes], *, granularity: str = "matrix", square: bool = True
) -> dict[str, Weights | None]:
    """The weights of every tensor, by name, from the changes of all tensors. None at `parameter` granularity: each element has its own."""
    if granularity == "parameter":
        return dict.fromkeys(changes)
    units: dict[str, list[Changes]] = {}
    for name, change in changes.items():
        units.setdefault(unit_of(name, granularity), []).append(change)
    # Every target has the same number of elements in a unit, so the ratio of means is the ratio of sums.
    weights = {
        unit: shares(
            [sum(amounts) for amounts in zip(*(c.squares if square else c.absolutes for c in members), strict=True)]
        )
        for unit, members in units.items()
    }
    return {name: weights[unit_of(name, granularity)] for name in changes}


def varm(blocks: Blocks, weights: Weights | None, *, granularity: str = "matrix", square: bool = True) -> TensorMerge:
    """VaRM of one tensor with its weights from `varm_weights`; at `parameter` granularity they are computed where they are applied."""
    if granularity == "parameter":
        return TensorMerge(None, lambda block: _merge_elements(block, square=square))
    if weights is None:
        raise ValueError(
            f"varm at {granularity} granularity needs the tensor's weights: compute them with varm_weights"
        )
    known = weights
    return TensorMerge(known, lambda block: block.pivot + weighted_sum(block.deltas, known))


def _merge_elements(block: Block, *, square: bool) -> torch.Tensor:
    """Weights in float64, where the square of the smallest float32 is not zero; where nobody moved every delta is zero, whatever its weight."""
    deltas = block.deltas
    amounts = [delta.double().square() if square else delta.double().abs() for delta in deltas]
    total = amounts[0].clone()
    for amount in amounts[1:]:
        total += amount
    total[total == 0] = 1.0
    merged = torch.zeros_like(block.pivot)
    for delta, amount in zip(deltas, amounts, strict=True):
        merged += delta * (amount / total).to(torch.float32)
    return block.pivot + merged


def unit_of(name: str, granularity: str) -> str:
    """The unit that a tensor belongs to. Raises ValueError for an unknown granularity."""
    if granularity == "model":
        return ""
    if granularity == "layer":
        layer = _LAYER.match(name)
        return layer[1] if layer else name
    if granularity == "matrix":
        return name
    raise ValueError(f"granularity {granularity!r}: give parameter, matrix, layer or model")


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj.weight` is of layer 3 and kind `mlp.up_proj.weight`; outside the layers: None and the whole name."""
    layer = _LAYER.match(name)
    return (int(layer[2]), layer[3]) if layer else (None, name)

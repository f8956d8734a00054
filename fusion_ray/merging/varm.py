"""VaRM, merging by variation ratio (FuseChat v1, arXiv 2402.16107): a target weighs as much as it moved from the base.

    W[j, m] = E_m[(theta_j - theta_v)^2] / sum_j E_m[(theta_j - theta_v)^2]
    merged_m = sum_j W[j, m] theta_j = theta_v + sum_j W[j, m] (theta_j - theta_v)

with the mean E over all elements of unit m: one parameter, one matrix (the paper's choice), one decoder layer (a tensor outside the layers is its own
unit) or the whole model. The second form is computed: it leaves an element that nobody moved exactly at the base's value. `square=False` takes
|theta_j - theta_v| instead. A unit that no target moved has equal weights. With a `temperature` T the ratios W become softmax_j(W / T), which the paper
tried. The released code does none of this: its weights are always equal.
"""

import math
from collections.abc import Mapping

import numpy as np
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Blocks, Floats, Inputs, TensorMerge, Weights, shares
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.kernels import add_weighted_deltas, as_float32, load, load_delta
from fusion_ray.merging.names import unit_of


def varm_weights(
    changes: Mapping[str, Changes],
    *,
    granularity: str = "matrix",
    square: bool = True,
    temperature: float | None = None,
) -> dict[str, Weights | None]:
    """The weights of every tensor, by name, from the changes of all tensors. None at `parameter` granularity: each element has its own."""
    if granularity == "parameter":
        return dict.fromkeys(changes)
    units: dict[str, list[Changes]] = {}
    for name, change in changes.items():
        units.setdefault(unit_of(name, granularity), []).append(change)
    # Every target has the same number of elements in a unit, so the ratio of means is the ratio of sums.
    weights = {
        unit: _tempered(
            shares(
                [
                    math.fsum(amounts)
                    for amounts in zip(*(c.squares if square else c.absolutes for c in members), strict=True)
                ]
            ),
            temperature,
        )
        for unit, members in units.items()
    }
    return {name: weights[unit_of(name, granularity)] for name in changes}


def varm(
    blocks: Blocks,
    weights: Weights | None,
    *,
    granularity: str = "matrix",
    square: bool = True,
    temperature: float | None = None,
) -> TensorMerge:
    """VaRM of one tensor with its weights from `varm_weights`; at `parameter` granularity they are computed where they are applied.

    Raises ValueError without weights at any other, and for a temperature at `parameter` granularity, where there is no ratio to temper but each element's.
    """
    if granularity == "parameter":
        if temperature is not None:
            raise ValueError(
                "varm: `temperature` goes with the granularities matrix, layer and model, not with parameter"
            )
        return TensorMerge(None, lambda block, out: _merge_elements(block.inputs, square, out))
    if weights is None:
        raise ValueError(
            f"varm at {granularity} granularity needs the tensor's weights: compute them with varm_weights"
        )
    narrow = as_float32(weights)
    return TensorMerge(weights, lambda block, out: add_weighted_deltas(block.inputs, narrow, out))


def _tempered(ratios: Weights, temperature: float | None) -> Weights:
    if temperature is None:
        return ratios
    largest = max(ratios)
    return shares([math.exp((ratio - largest) / temperature) for ratio in ratios])


@njit(cache=True, nogil=True, error_model="numpy")
def _merge_elements(inputs: Inputs, square: bool, out: Floats) -> None:
    """Weights in float64, where the square of the smallest float32 is not zero; where nobody moved every delta is zero, whatever its weight."""
    amounts, totals = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64)
    room = np.empty((2, CHUNK), np.float32)
    for start in range(0, out.size, CHUNK):
        merged = out[start : start + CHUNK]
        base, apart = room[0, : merged.size], room[1, : merged.size]
        amount, total = amounts[: merged.size], totals[: merged.size]
        amount[:] = 0.0
        total[:] = 0.0
        load(inputs, 0, start, base)
        for j in range(inputs.addresses.size - 1):
            load_delta(inputs, j, start, base, apart)
            for i in range(amount.size):
                delta = np.float64(apart[i])
                size = delta * delta if square else abs(delta)
                amount[i] += size
                total[i] += size * delta
        for i in range(amount.size):
            moved = total[i] / amount[i] if amount[i] > 0.0 else 0.0
            merged[i] = np.float32(np.float64(base[i]) + moved)

"""The merge methods. A merge has two phases: weights from the statistics of all tensors (where a method shares them between tensors), then each tensor
by itself, in blocks. Called by the merge worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fusion_ray.merging.blocks import TensorMerge, Weights
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.linear import linear
from fusion_ray.merging.sce import sce
from fusion_ray.merging.task_arithmetic import task_arithmetic
from fusion_ray.merging.varm import varm, varm_weights


@dataclass(frozen=True)
class Method:
    """`prepare(blocks, weights, **parameters)` makes the method ready for one tensor; `over_units(changes, **parameters)` gives `weights` by tensor."""

    prepare: Callable[..., TensorMerge]
    over_units: Callable[..., dict[str, Weights | None]] | None = None

    def weights(self, changes: Mapping[str, Changes], parameters: Mapping[str, object]) -> dict[str, Weights | None]:
        """The first phase: what the second is given for each tensor."""
        return dict.fromkeys(changes) if self.over_units is None else self.over_units(changes, **parameters)


METHODS: dict[str, Method] = {
    "varm": Method(varm, varm_weights),
    "sce": Method(sce),
    "linear": Method(linear),
    "task_arithmetic": Method(task_arithmetic),
}

"""The merge methods. A merge has two phases: weights from the statistics of all tensors (where a method shares them between tensors), then each tensor
by itself, in blocks. Called by the merge worker. What each method takes is in `parameters.py`, which loads nothing heavy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fusion_ray.merging.blocks import TensorMerge, Weights
from fusion_ray.merging.breadcrumbs import breadcrumbs, breadcrumbs_ties
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.dare import dare_linear, dare_ties
from fusion_ray.merging.della import della, della_linear
from fusion_ray.merging.karcher import karcher
from fusion_ray.merging.linear import linear
from fusion_ray.merging.model_stock import model_stock
from fusion_ray.merging.multislerp import multislerp
from fusion_ray.merging.passthrough import passthrough
from fusion_ray.merging.sce import sce
from fusion_ray.merging.slerp import slerp
from fusion_ray.merging.task_arithmetic import task_arithmetic
from fusion_ray.merging.ties import ties
from fusion_ray.merging.varm import varm, varm_weights


@dataclass(frozen=True)
class Method:
    """`prepare(blocks, weights, **parameters)` makes the method ready for one tensor; `over_units(changes, **parameters)` gives `weights` by tensor.

    `whole_rows(parameters)`: whether blocks must hold whole rows of the tensor's last dimension.
    """

    prepare: Callable[..., TensorMerge]
    over_units: Callable[..., dict[str, Weights | None]] | None = None
    whole_rows: Callable[[Mapping[str, object]], bool] = lambda parameters: False

    def weights(self, changes: Mapping[str, Changes], parameters: Mapping[str, object]) -> dict[str, Weights | None]:
        """The first phase: what the second is given for each tensor."""
        return dict.fromkeys(changes) if self.over_units is None else self.over_units(changes, **parameters)


METHODS: dict[str, Method] = {
    "varm": Method(varm, varm_weights),
    "sce": Method(sce),
    "linear": Method(linear),
    "slerp": Method(slerp),
    "multislerp": Method(multislerp),
    "karcher": Method(karcher),
    "model_stock": Method(model_stock, whole_rows=lambda parameters: bool(parameters.get("filter_wise"))),
    "task_arithmetic": Method(task_arithmetic),
    "ties": Method(ties),
    "dare_linear": Method(dare_linear),
    "dare_ties": Method(dare_ties),
    "breadcrumbs": Method(breadcrumbs),
    "breadcrumbs_ties": Method(breadcrumbs_ties),
    "della": Method(della, whole_rows=lambda parameters: True),
    "della_linear": Method(della_linear, whole_rows=lambda parameters: True),
    "passthrough": Method(passthrough),
}

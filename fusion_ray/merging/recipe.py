"""How one tensor of a merged model is made: from which tensors, by which method, with which arguments.

Made by merge_recipe.py from a merge file and by the merge stage from a run's targets; carried out by the merge worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorRecipe:
    """Models are numbers into the merge's list of models. A tensor may have another name in each: slices renumber layers."""

    name: str  # of the output tensor
    method: str  # the merge's, or `passthrough` for a slice of one model under a method that does not merge one
    models: tuple[int, ...]  # the merged models, in their order, without the base
    names: tuple[str, ...]  # what the tensor is called in each of them
    base: int | None  # what task vectors are taken from (slerp: t = 0); None where the method has none
    base_name: str | None
    parameters: Mapping[str, object]  # the method's arguments; those of the models are tuples, one entry each

    @property
    def reference(self) -> tuple[int, str]:
        """What the result is compared with in reports: the base's tensor, else the first model's."""
        if self.base is None or self.base_name is None:
            return self.models[0], self.names[0]
        return self.base, self.base_name

    @property
    def inputs(self) -> tuple[tuple[int, str], ...]:
        """Every tensor that is read, the reference first."""
        others = tuple(zip(self.models, self.names, strict=True))
        return others if self.base is None else (self.reference, *others)

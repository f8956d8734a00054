"""A parameter's value for each tensor, as merge files state it: a value, a gradient over the layers, or either by what the tensor's name holds.

Documented by mergekit: a gradient [a, b, c] is a in the first layer, b in the middle, c in the last, and linear between; of entries with a filter the first
that matches counts. Read by merge_file.py, asked by merge_recipe.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion_ray.merging.parameters import Value

EVERYTHING = "*"


@dataclass(frozen=True)
class Choice:
    """`values` is one value, or a gradient of numbers; it holds for tensors whose name contains `filter`, or for all."""

    values: tuple[Value, ...]
    filter: str | None = None

    @property
    def is_for_all(self) -> bool:
        return self.filter is None or self.filter == EVERYTHING


Setting = tuple[Choice, ...]
Settings = Mapping[str, Setting]  # by the name of the parameter


def value_at(setting: Setting, tensor: str, place: float) -> Value | None:
    """The value for a tensor at `place` (0 the first layer, 1 the last); None where no filter matches its name."""
    for choice in setting:
        if choice.is_for_all or (choice.filter is not None and choice.filter in tensor):
            return (
                choice.values[0] if len(choice.values) == 1 else interpolate([float(v) for v in choice.values], place)
            )
    return None


def interpolate(values: Sequence[float], place: float) -> float:
    """Piecewise linear through `values` at equal distances over 0..1."""
    at = place * (len(values) - 1)
    left = min(int(at), len(values) - 2)
    low, high = values[left], values[left + 1]
    part = at - left
    return high if part == 1 else low + (high - low) * part

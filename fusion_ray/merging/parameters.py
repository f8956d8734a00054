"""The merge methods by name and the parameters each takes. Imports no torch: the plan and the command line check a config with it before any work."""

import difflib
from collections.abc import Collection, Mapping

METHOD_PARAMETERS: dict[str, tuple[str, ...]] = {
    "varm": ("granularity", "square"),
    "sce": ("variant", "select_topk"),
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
}


def check_parameters(method: str, given: Collection[str]) -> None:
    """Raises ValueError for an unknown method (naming the nearest) and for a parameter that the method does not take."""
    if method not in METHOD_PARAMETERS:
        near = difflib.get_close_matches(method, METHOD_PARAMETERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known methods: {', '.join(METHOD_PARAMETERS)}"
        raise ValueError(f"unknown merge method {method!r}: {hint}")
    takes = METHOD_PARAMETERS[method]
    for name in sorted(given):
        if name not in takes:
            raise ValueError(f"the merge method {method!r} takes {' and '.join(takes)}, not `{name}`: remove that key")


def complete_parameters(method: str, given: Mapping[str, object], *, targets: int) -> dict[str, object]:
    """Keyword arguments of the method for so many targets: one `weight` for all becomes one each; linear without any weighs them equally.

    Raises ValueError as check_parameters, and for weights that are missing or not one a target.
    """
    check_parameters(method, given)
    if "weight" not in METHOD_PARAMETERS[method]:
        return dict(given)
    weight = given.get("weight", 1.0 if method == "linear" else None)
    if weight is None:
        raise ValueError(
            f"the merge method {method!r} needs `weight`: one number for all targets or one each (the FuseChat paper's is 0.3)"
        )
    weights = (float(weight),) * targets if isinstance(weight, int | float) else tuple(map(float, weight))  # type: ignore[call-overload]
    if len(weights) != targets:
        raise ValueError(
            f"`weight` of the merge method {method!r} has {len(weights)} numbers for {targets} targets: give one each, in their order"
        )
    return {**given, "weight": weights}

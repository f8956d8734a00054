"""What every merge method takes: its parameters and what each is when it is left out, a base or none, how many models.

Imports neither torch nor numba: the plan, the command line and the reader of merge files check with it before any work. The bounds of the values are the
fields of config.MergeMethod.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Value = bool | int | float | str
_CANCELS = 1e-6  # float32 holds no more of what is divided


@dataclass(frozen=True)
class Parameter:
    """One parameter. `name` is the method's argument; a parameter that is not `required` and has no default is left out when it is not given."""

    name: str
    default: Value | None = None
    kind: type[bool] | type[int] | type[float] | type[str] = float
    required: bool = False
    per_model: bool = False  # one value for each merged model; the others are the merge's
    whole: bool = False  # one value for all tensors
    mergekit: Value | None = None  # the default in mergekit's files, where it is another
    hint: str = ""

    @property
    def key(self) -> str:
        """What YAML files call it."""
        return "lambda" if self.name == "scale" else self.name

    @property
    def default_in_mergekit(self) -> Value | None:
        return self.default if self.mergekit is None else self.mergekit


@dataclass(frozen=True)
class Takes:
    """What one method takes. `base`: is there a model that the merged ones are compared with; `least` and `most` count the merged ones without it."""

    base: Literal["needed", "optional", "none"]
    parameters: tuple[Parameter, ...] = ()
    least: int = 1
    most: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)


_WEIGHT = Parameter(
    "weight", required=True, per_model=True, hint="one number for all models or one each (the FuseChat paper's is 0.3)"
)
_SHARE = Parameter("weight", 1.0, per_model=True)  # of a mean: all the same is its own default
_DENSITY = Parameter("density", 1.0, per_model=True)
_SCALE = Parameter("scale", 1.0)
_CHANCE = (Parameter("rescale", True, bool), Parameter("seed", 0, int))


def _normalize(default: bool, name: str = "normalize") -> Parameter:
    return Parameter(name, default, bool)


METHOD_PARAMETERS: dict[str, Takes] = {
    "varm": Takes(
        "needed",
        (
            Parameter("granularity", "matrix", str, whole=True),
            Parameter("square", True, bool, whole=True),
            Parameter("temperature", whole=True),
        ),
    ),
    "sce": Takes(
        "needed", (Parameter("variant", "paper", str, mergekit="mergekit"), Parameter("select_topk", 0.1, mergekit=1.0))
    ),
    "linear": Takes("none", (_SHARE, _normalize(True))),
    "slerp": Takes("needed", (Parameter("t", required=True, hint="0 is the base, 1 the other model"),), most=1),
    "multislerp": Takes("optional", (_SHARE, _normalize(True, "normalize_weights"), Parameter("eps", 1e-8)), least=2),
    "karcher": Takes("none", (Parameter("max_iter", 10, int), Parameter("tol", 1e-5)), least=2),
    "model_stock": Takes("needed", (Parameter("filter_wise", False, bool),), least=2),
    "task_arithmetic": Takes("needed", (_WEIGHT, _normalize(False), _SCALE)),
    "ties": Takes("needed", (_WEIGHT, _DENSITY, _normalize(True), _SCALE)),
    "dare_linear": Takes("needed", (_WEIGHT, _DENSITY, _normalize(False), _SCALE, *_CHANCE)),
    "dare_ties": Takes("needed", (_WEIGHT, _DENSITY, _normalize(False), _SCALE, *_CHANCE)),
    **dict.fromkeys(
        ("breadcrumbs", "breadcrumbs_ties"),
        Takes("needed", (_WEIGHT, _DENSITY, Parameter("gamma", 0.01, per_model=True), _normalize(False), _SCALE)),
    ),
    **{
        name: Takes(
            "needed",
            (_WEIGHT, _DENSITY, Parameter("epsilon", 0.15, per_model=True), _normalize(normalize), _SCALE, *_CHANCE),
        )
        for name, normalize in (("della", True), ("della_linear", False))
    },
    "passthrough": Takes("none", most=1),
}


def takes(method: str) -> Takes:
    """Raises ValueError for an unknown method, naming the nearest."""
    if method not in METHOD_PARAMETERS:
        near = difflib.get_close_matches(method, METHOD_PARAMETERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known methods: {', '.join(METHOD_PARAMETERS)}"
        raise ValueError(f"unknown merge method {method!r}: {hint}")
    return METHOD_PARAMETERS[method]


def parameter_of(method: str, key: str) -> Parameter:
    """The parameter that YAML files call `key`. Raises ValueError where the method does not take it, naming the nearest that it does take."""
    known = {parameter.key: parameter for parameter in takes(method).parameters}
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    what = f"takes {_listed(known)}" if known else "takes no parameters"
    hint = f"did you mean {near[0]!r}?" if near else "remove that key"
    raise ValueError(f"the merge method {method!r} {what}, not `{key}`: {hint}")


def check_parameters(method: str, given: Iterable[str]) -> None:
    """Raises ValueError for an unknown method and for a parameter (by the name of its argument) that the method does not take."""
    names = takes(method).names
    for name in sorted(given):
        if name not in names:
            parameter_of(method, Parameter(name).key)


def check_models(method: str, *, targets: int, base: bool) -> None:
    """Raises ValueError unless the method merges so many models (the base not counted), with or without a base."""
    wants = takes(method)
    if wants.base == "needed" and not base:
        raise ValueError(f"the merge method {method!r} needs a base: the model that the others were made from")
    if targets < wants.least or (wants.most is not None and targets > wants.most):
        number = "one model" if wants.least == 1 else f"{wants.least} models"
        least = "" if wants.least == wants.most else "at least "
        besides = " besides the base" if wants.base == "needed" else ""
        cure = "give more models or take another method" if targets < wants.least else _MORE[method]
        raise ValueError(f"the merge method {method!r} takes {least}{number}{besides}, and {targets} are given: {cure}")


_MORE = {"slerp": "take multislerp or karcher", "passthrough": "take a method that merges"}


def complete_parameters(method: str, given: Mapping[str, object], *, targets: int) -> dict[str, object]:
    """Keyword arguments of the method for so many targets with the pivot as their base: what is given, one value for all made one each, and defaults.

    Raises ValueError as check_parameters, check_models and keyword_arguments, and for a parameter that is missing or has not one value a target.
    """
    check_parameters(method, given)
    check_models(method, targets=targets, base=True)
    found: dict[str, object] = {}
    for parameter in takes(method).parameters:
        value = given.get(parameter.name, parameter.default)
        if value is not None:
            found[parameter.name] = _one_each(method, parameter, value, targets) if parameter.per_model else value
        elif parameter.required:
            raise ValueError(f"the merge method {method!r} needs `{parameter.key}`: {parameter.hint}")
    return keyword_arguments(method, found, base=True)


def keyword_arguments(method: str, parameters: Mapping[str, object], *, base: bool) -> dict[str, object]:
    """Complete parameters as the method is called with them. Raises ValueError for values that do not go together."""
    if method in ("della", "della_linear"):
        for density, epsilon in zip(_numbers(parameters["density"]), _numbers(parameters["epsilon"]), strict=True):
            if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise ValueError(
                    f"the merge method {method!r} with `density` {density:g} and `epsilon` {epsilon:g}: keep density - epsilon above 0 and "
                    "density + epsilon below 1, the smallest and the largest keep probability"
                )
    if method == "varm" and parameters["granularity"] == "parameter" and "temperature" in parameters:
        raise ValueError(
            "the merge method 'varm' takes no `temperature` at granularity `parameter`, where no ratio is shared: remove that key"
        )
    divided = parameters.get("normalize" if method == "linear" else "normalize_weights")
    if method in ("linear", "multislerp") and divided and cancel(_numbers(parameters["weight"])):
        raise ValueError(
            f"the merge method {method!r} divides by the sum of its weights, and {list(_numbers(parameters['weight']))} add up to zero: change a `weight`"
        )
    return {**parameters, "has_base": base} if takes(method).base == "optional" else dict(parameters)


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of the weights is zero, or would be but for roundings (0.1, 0.2 and -0.3): what is divided by it is noise."""
    return abs(math.fsum(weights)) <= _CANCELS * math.fsum(map(abs, weights))


def _one_each(method: str, parameter: Parameter, value: object, targets: int) -> tuple[float, ...]:
    numbers = (float(value),) * targets if isinstance(value, int | float) else _numbers(value)
    if len(numbers) != targets:
        raise ValueError(
            f"`{parameter.key}` of the merge method {method!r} has {len(numbers)} numbers for {targets} targets: give one each, in their order"
        )
    return numbers


def _numbers(values: object) -> tuple[float, ...]:
    return tuple(map(float, values))  # type: ignore[call-overload]


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last

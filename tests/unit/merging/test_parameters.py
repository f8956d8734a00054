"""What each merge method takes: the table agrees with the methods and with the config, defaults are filled in, and what does not fit is refused by name."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.config import MergeMethod, keys_of
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import (
    METHOD_PARAMETERS,
    Takes,
    check_models,
    check_parameters,
    complete_parameters,
    parameter_of,
)

REQUIRED = {"weight": 0.3, "t": 0.4}


def minimal(takes: Takes) -> dict[str, object]:
    return {parameter.name: REQUIRED[parameter.name] for parameter in takes.parameters if parameter.required}


@pytest.mark.parametrize("method", METHOD_PARAMETERS)
def test_the_table_says_what_the_method_s_signature_says(method: str) -> None:
    takes = METHOD_PARAMETERS[method]
    arguments = {
        name: argument
        for name, argument in inspect.signature(METHODS[method].prepare).parameters.items()
        if argument.kind is argument.KEYWORD_ONLY
    }
    assert set(arguments) == set(takes.names) | ({"has_base"} if takes.base == "optional" else set())
    for parameter in takes.parameters:
        default = arguments[parameter.name].default
        if not parameter.per_model and not parameter.required:
            assert default == parameter.default, parameter.name
        else:
            assert default is inspect.Parameter.empty, parameter.name


def test_methods_and_table_name_the_same_methods() -> None:
    assert METHODS.keys() == METHOD_PARAMETERS.keys()


def test_the_config_has_a_field_for_every_parameter_and_no_other() -> None:
    keys = {parameter.key for takes in METHOD_PARAMETERS.values() for parameter in takes.parameters}
    assert set(keys_of(MergeMethod)) == keys | {"method", "name"}


@pytest.mark.parametrize("method", METHOD_PARAMETERS)
def test_defaults_are_within_the_bounds_of_the_config(method: str) -> None:
    for parameter in METHOD_PARAMETERS[method].parameters:
        for default in (parameter.default, parameter.default_in_mergekit):
            if default is not None:
                assert isinstance(default, parameter.kind)
                assert MergeMethod.model_validate({"method": method, parameter.key: default}).parameters == {
                    parameter.name: default
                }


def test_the_defaults() -> None:
    assert complete_parameters("varm", {}, targets=2) == {"granularity": "matrix", "square": True}
    assert complete_parameters("sce", {}, targets=2) == {"variant": "paper", "select_topk": 0.1}
    assert complete_parameters("linear", {}, targets=2) == {"weight": (1.0, 1.0), "normalize": True}
    assert complete_parameters("slerp", {"t": 0.4}, targets=1) == {"t": 0.4}
    assert complete_parameters("karcher", {}, targets=2) == {"max_iter": 10, "tol": 1e-5}
    assert complete_parameters("model_stock", {}, targets=2) == {"filter_wise": False}
    assert complete_parameters("multislerp", {}, targets=2) == {
        "weight": (1.0, 1.0),
        "normalize_weights": True,
        "eps": 1e-8,
        "has_base": True,
    }
    plain = {"weight": (0.3, 0.3), "normalize": False, "scale": 1.0}
    dense = plain | {"density": (1.0, 1.0)}
    chance = {"rescale": True, "seed": 0}
    expected = {
        "task_arithmetic": plain,
        "ties": dense | {"normalize": True},
        "dare_linear": dense | chance,
        "dare_ties": dense | chance,
        "breadcrumbs": dense | {"gamma": (0.01, 0.01)},
        "breadcrumbs_ties": dense | {"gamma": (0.01, 0.01)},
        "della": dense | chance | {"epsilon": (0.15, 0.15), "normalize": True},
        "della_linear": dense | chance | {"epsilon": (0.15, 0.15)},
    }
    for method, parameters in expected.items():
        assert complete_parameters(method, {"weight": 0.3}, targets=2) == parameters, method


def test_what_was_set_is_kept_and_passed_by_the_name_of_the_argument() -> None:
    method = MergeMethod.model_validate({"method": "dare_ties", "weight": [0.2, 0.4], "density": 0.5, "lambda": 0.7})
    assert method.parameters == {"weight": (0.2, 0.4), "density": 0.5, "scale": 0.7}
    done = complete_parameters(method.method, method.parameters, targets=2)
    assert (done["weight"], done["density"], done["scale"], done["seed"]) == ((0.2, 0.4), (0.5, 0.5), 0.7, 0)


@given(
    targets=st.integers(1, 6),
    method=st.sampled_from(
        [name for name, takes in METHOD_PARAMETERS.items() if any(p.per_model for p in takes.parameters)]
    ),
    value=st.floats(0.1, 1.0),
)
def test_one_number_for_all_is_the_same_as_one_each(targets: int, method: str, value: float) -> None:
    takes = METHOD_PARAMETERS[method]
    targets = max(targets, takes.least)
    one = complete_parameters(method, minimal(takes) | {"weight": value}, targets=targets)
    each = complete_parameters(method, minimal(takes) | {"weight": [value] * targets}, targets=targets)
    assert one == each
    for parameter in takes.parameters:
        found = one.get(parameter.name)
        if parameter.per_model:
            assert isinstance(found, tuple)
            assert len(found) == targets
        else:
            assert not isinstance(found, tuple)


@pytest.mark.parametrize(
    ("method", "given", "targets", "words"),
    [
        ("vram", {}, 2, ["unknown merge method 'vram'", "did you mean 'varm'"]),
        ("quantum", {}, 2, ["unknown merge method 'quantum'", "known methods: varm, sce, linear"]),
        ("sce", {"granularity": "matrix"}, 2, ["'sce' takes variant and select_topk, not `granularity`", "remove"]),
        ("ties", {"weights": 1, "weight": 1}, 2, ["not `weights`", "did you mean 'weight'"]),
        ("varm", {"scale": 1.0}, 2, ["'varm' takes granularity, square and temperature, not `lambda`"]),
        ("passthrough", {"weight": 1.0}, 1, ["'passthrough' takes no parameters, not `weight`"]),
        ("ties", {}, 2, ["'ties' needs `weight`: one number for all models or one each"]),
        ("slerp", {}, 1, ["'slerp' needs `t`: 0 is the base, 1 the other model"]),
        ("ties", {"weight": (0.1, 0.2, 0.3)}, 2, ["`weight` of the merge method 'ties' has 3 numbers for 2 targets"]),
        ("della", {"weight": 1, "density": (0.5,)}, 2, ["`density`", "has 1 numbers for 2 targets"]),
        ("slerp", {"t": 0.4}, 2, ["'slerp' takes one model besides the base, and 2 are given: take multislerp"]),
        ("karcher", {}, 1, ["'karcher' takes at least 2 models, and 1 are given"]),
        ("model_stock", {}, 1, ["'model_stock' takes at least 2 models besides the base, and 1 are given"]),
        ("passthrough", {}, 3, ["'passthrough' takes one model, and 3 are given: take a method that merges"]),
        ("della", {"weight": 1, "density": 0.9}, 2, ["`density` 0.9 and `epsilon` 0.15", "density + epsilon below 1"]),
        ("varm", {"granularity": "parameter", "temperature": 1.0}, 2, ["no `temperature` at granularity `parameter`"]),
        ("linear", {"weight": (0.1, 0.2, -0.3)}, 3, ["[0.1, 0.2, -0.3] add up to zero: change a `weight`"]),
        (
            "multislerp",
            {"weight": (0.1, 0.2, -0.3)},
            3,
            ["'multislerp' divides by the sum of its weights", "add up to zero"],
        ),
        ("linear", {"weight": (1, -1)}, 2, ["'linear' divides by the sum", "[1.0, -1.0] add up to zero"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    method: str, given: dict[str, object], targets: int, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        complete_parameters(method, given, targets=targets)
    for word in words:
        assert word in str(caught.value)


def test_a_base_is_asked_for_where_the_method_needs_one() -> None:
    with pytest.raises(ValueError, match="'ties' needs a base: the model that the others were made from"):
        check_models("ties", targets=2, base=False)
    check_models("linear", targets=1, base=False)
    check_models("multislerp", targets=2, base=False)


def test_keys_and_arguments() -> None:
    assert parameter_of("ties", "lambda").name == "scale"
    with pytest.raises(ValueError, match="not `scale`"):
        parameter_of("ties", "scale")
    check_parameters("ties", ["scale", "weight"])

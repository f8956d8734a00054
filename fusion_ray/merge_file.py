"""What may stand in a merge file, mergekit's YAML dialect: its keys (`MergeFile`), and the values of its `parameters` (`read_settings`).

A model is a folder, a URL or a hub id, as a string or as {path, revision} or {model: either}. A key of mergekit's that is not supported is declared here
with what to do instead. Called by merge_yaml.py, which says what it all means.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fusion_ray.config import ConfigError, MergeMethod, Section, validate
from fusion_ray.merging.parameters import Parameter, Value, parameter_of, takes
from fusion_ray.merging.settings import Choice, Setting, Settings

PASSED_OVER = ("int8_mask",)  # saves mergekit memory and changes nothing


def _refused(why: str) -> BeforeValidator:
    """For a key that the dialect has and this reader has not."""

    def refuse(value: object) -> None:
        if value is not None:
            raise ValueError(why)

    return BeforeValidator(refuse)


def _given(value: object) -> str:
    """What config.validate adds to a message only where it is no list and no mapping."""
    return f" (given: {value!r})" if isinstance(value, dict | list) else ""


def _mapping(example: str) -> BeforeValidator:
    """For an entry with keys."""

    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping such as {example}{_given(value)}")
        return value

    return BeforeValidator(check)


def _list(example: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"expected a list such as {example}{_given(value)}")
        return value

    return BeforeValidator(check)


def _named_parameters(value: object) -> object:
    """A section `parameters`, which may be empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"expected names and values, such as {{weight: 0.5}}{_given(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(
                f"the key {key!r} is not the name of a parameter: give names and values, such as {{weight: 0.5}}"
            )
    return value


def _range(value: object) -> object:
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int for each in value):
        raise ValueError(
            f"expected two whole numbers, the first layer and the one after the last, as [0, 16]{_given(value)}"
        )
    return value


def _unwrapped(value: object) -> object:
    """The forms of a model reference: a string, {path, revision}, or {model: either of them}."""
    if not isinstance(value, str | dict):
        raise ValueError(
            f"expected a model: a folder, a URL or a hub id as text, or {{path: ..., revision: ...}}{_given(value)}"
        )
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, dict) and "model" in value:
        inner = _unwrapped(value["model"])
        return (
            {**inner, **{key: other for key, other in value.items() if key != "model"}}
            if isinstance(inner, dict)
            else inner
        )
    return value


_NO_ARCHITECTURE = _refused("the architecture is what the model's config.json says: remove the key")
_NO_ADAPTERS = _refused(
    "adapters are not applied: merge it into its model first (peft's merge_and_unload, then save_pretrained) and name that folder"
)


class Reference(Section):
    path: str = Field(min_length=1)
    revision: str | None = None
    lora: Annotated[None, _NO_ADAPTERS] = None
    override_architecture: Annotated[None, _NO_ARCHITECTURE] = None


_Model = Annotated[Reference, BeforeValidator(_unwrapped)]
_Parameters = Annotated[dict[str, object], BeforeValidator(_named_parameters)]
_Dtype = Literal["float32", "bfloat16", "float16"]


class _Input(Section):
    model: _Model
    parameters: _Parameters = Field(default_factory=dict)


class _Source(Section):
    model: _Model
    layer_range: Annotated[tuple[int, int], BeforeValidator(_range)] = Field(
        description="the first layer and the one after the last"
    )
    parameters: _Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ordered(self) -> "_Source":
        first, end = self.layer_range
        if not 0 <= first <= end:
            raise ValueError(
                f"`layer_range` {list(self.layer_range)}: give the first layer and the one after the last, as [0, 16]"
            )
        return self


_SOURCE = "{model: path, layer_range: [0, 16]}"
_NO_RESIDUAL = _refused(
    "what a slice adds to the residual stream is not scaled: remove the key, or merge those weights beforehand"
)
_NO_BASE = _refused(
    "the base is one for the whole merge: give `base_model` at the top of the file, and list it among the slice's sources"
)


class _Slice(Section):
    sources: Annotated[tuple[Annotated[_Source, _mapping(_SOURCE)], ...], _list(f"[{_SOURCE}]")] = Field(min_length=1)
    parameters: _Parameters = Field(default_factory=dict)
    residual_weight: Annotated[None, _NO_RESIDUAL] = None
    base_model: Annotated[None, _NO_BASE] = None


_NO_MODULES = _refused(
    "parts of a model with recipes of their own are not supported: give `models` or `slices` for the whole model"
)
_NO_TOKENS = _refused("merging neither adds nor drops tokens and takes their rows as they are: remove the key")


class _Tokenizer(Section):
    source: _Model
    tokens: Annotated[None, _NO_TOKENS] = None
    pad_to_multiple_of: Annotated[None, _NO_TOKENS] = None


_SLICE = f"{{sources: [{_SOURCE}]}}"


class MergeFile(Section):
    """The keys of a merge file."""

    merge_method: str
    base_model: _Model | None = None
    models: Annotated[tuple[Annotated[_Input, _mapping("{model: path}")], ...] | None, _list("[{model: path}]")] = (
        Field(None, min_length=1)
    )
    slices: Annotated[tuple[Annotated[_Slice, _mapping(_SLICE)], ...] | None, _list(f"[{_SLICE}]")] = Field(
        None, min_length=1
    )
    modules: Annotated[None, _NO_MODULES] = None
    parameters: _Parameters = Field(default_factory=dict)
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    tokenizer_source: _Model | None = None
    tokenizer: Annotated[_Tokenizer, _mapping("{source: base}")] | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "MergeFile":
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either `models` (whole models) or `slices` (ranges of layers)")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("`tokenizer_source` is the older form of `tokenizer.source`: give one of the two")
        return self


def read_settings(method: str, given: Mapping[str, object], where: str, *, of: str = "merge") -> dict[str, Setting]:
    """The settings of one `parameters` section, which is of the merge, of a slice or of a model."""
    found: dict[str, Setting] = {}
    for key, value in given.items():
        if key in PASSED_OVER:
            continue
        try:
            parameter = parameter_of(method, key)
        except ValueError as error:
            raise ConfigError(f"`{where}.{key}`: {error}") from error
        if (of == "model" and not parameter.per_model) or (of == "slice" and parameter.whole):
            level = "the whole merge" if parameter.whole or of == "slice" else "the merge and not of a model"
            raise ConfigError(
                f"`{where}.{key}`: `{key}` is of {level}: put it under `parameters` at the top of the file"
            )
        setting = _setting(method, parameter, value, f"{where}.{key}")
        if parameter.whole and not (len(setting) == 1 and setting[0].is_for_all and len(setting[0].values) == 1):
            raise ConfigError(f"`{where}.{key}`: `{key}` is one for all tensors: give one value")
        found[parameter.name] = setting
    return found


def _setting(method: str, parameter: Parameter, given: object, where: str) -> Setting:
    entries = [given] if isinstance(given, dict) else given
    if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
        return (Choice(_values(method, parameter, given, where)),)
    choices: list[Choice] = []
    for number, entry in enumerate(entries):
        at = f"{where}.{number}" if entries is given else where
        if not isinstance(entry, dict) or "value" not in entry or not set(entry) <= {"filter", "value"}:
            raise ConfigError(
                f"`{at}`: {entry!r} is not an entry with the keys `filter` (part of a tensor's name) and `value`"
            )
        if choices and choices[-1].is_for_all:
            raise ConfigError(
                f"`{at}`: the entry before it holds for all tensors, so this one never would: put that one last"
            )
        name = entry.get("filter")
        if name is not None and not (isinstance(name, str) and name):
            raise ConfigError(
                f"`{at}.filter`: {name!r} is not a part of a tensor's name: give text such as self_attn, or `*` for all"
            )
        choices.append(Choice(_values(method, parameter, entry["value"], f"{at}.value"), name))
    return tuple(choices)


def _values(method: str, parameter: Parameter, given: object, where: str) -> tuple[Value, ...]:
    """One value or the values of a gradient, within the bounds that config.MergeMethod states."""
    if not isinstance(given, list):
        return (_value(method, parameter, given, where),)
    if parameter.kind is not float:
        raise ConfigError(
            f"`{where}`: a list is a gradient, which goes through numbers, and `{parameter.key}` is none: give one value"
        )
    if not given:
        raise ConfigError(f"`{where}`: the list is empty: give the values from the first layer to the last")
    return tuple(_value(method, parameter, value, f"{where}.{number}") for number, value in enumerate(given))


_KINDS = {
    bool: "true or false: give one of these, without quotes",
    int: "a whole number: give one, without quotes",
    float: "a number: give one, without quotes",
    str: "text: give one of the names that the parameter takes",
}


def _value(method: str, parameter: Parameter, given: object, where: str) -> Value:
    if given is None:
        raise ConfigError(f"`{where}`: there is no value: give one or remove the key")
    if isinstance(given, bool) is not (parameter.kind is bool) or isinstance(given, str) is not (parameter.kind is str):
        raise ConfigError(f"`{where}`: {given!r} is not {_KINDS[parameter.kind]}")
    try:
        value = getattr(validate(MergeMethod, {"method": method, parameter.key: given}), parameter.name)
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {str(error).partition(': ')[2]}") from error
    assert isinstance(value, bool | int | float | str), "a single value was given"
    return value


def complete_settings(method: str, given: Settings, *, said: Collection[str]) -> dict[str, Setting]:
    """The settings of the whole merge with the dialect's default for every tensor of which neither they say a thing nor, for the parameters `said`, the
    slices and models."""
    found: dict[str, Setting] = {}
    for parameter in takes(method).parameters:
        setting, default = given.get(parameter.name, ()), parameter.default_in_mergekit
        if default is not None and parameter.name not in said and not any(choice.is_for_all for choice in setting):
            setting = (*setting, Choice((default,)))
        if setting:
            found[parameter.name] = setting
    return found


def written_settings(method: str, settings: Settings) -> dict[str, object]:
    """The `parameters` section that `read_settings` would read so; nothing where there are none."""
    keys = {parameter.name: parameter.key for parameter in takes(method).parameters}
    said = {keys[name]: _said(setting) for name, setting in settings.items()}
    return {"parameters": said} if said else {}


def _said(setting: Setting) -> object:
    values = [list(choice.values) if len(choice.values) > 1 else choice.values[0] for choice in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return values[0]
    return [
        ({} if choice.filter is None else {"filter": choice.filter}) | {"value": value}
        for choice, value in zip(setting, values, strict=True)
    ]

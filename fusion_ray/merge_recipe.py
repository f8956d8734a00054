"""A merge as a merge file states it, and what that means for every tensor of the output (`tensor_recipes`). Reads no file and imports no torch.

`merge_yaml.load_recipe` makes a Recipe; the command `merge` and the merge worker ask it for the recipes of its tensors once the models' headers are read.

Where a parameter is a gradient, a layer's place in it is 0 for the first layer of its slice (without slices: of the model) to 1 for the last, and 1 for a
slice of one layer. Tensors before the layers (embeddings) belong to the first slice, tensors behind them (last norm, head) to the last one, which may be a
slice of no layers; both are at place 0. That is what mergekit 0.1.5 computes (its author's word in issue 27, place 1 for those behind, is not).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from fusion_ray.config import ConfigError, ModelConfig
from fusion_ray.merging.names import comes_before_layers, in_stack
from fusion_ray.merging.parameters import Parameter, Value, keyword_arguments, takes
from fusion_ray.merging.recipe import TensorRecipe
from fusion_ray.merging.settings import Settings, value_at

PASSTHROUGH = "passthrough"


@dataclass(frozen=True)
class Source:
    """One model of a slice: `layers` from the first to before the last, or None for the whole model. `key` is where the file names it."""

    model: int
    key: str
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """So many consecutive layers of the output. `given` has the sources in the file's order, `targets` those that are merged, `base` what with."""

    given: tuple[Source, ...]
    targets: tuple[Source, ...]
    base: Source | None
    method: str  # the merge's, or passthrough
    key: str
    parameters: Settings = field(default_factory=dict)

    @property
    def length(self) -> int:
        """In layers. Only of a merge of slices."""
        layers = self.targets[0].layers
        assert layers is not None, "a slice of whole models has no number of layers of its own"
        return layers[1] - layers[0]


@dataclass(frozen=True)
class Recipe:
    """A merge: what of, by which method, with which parameters (defaults filled in), and what is written.

    `models` are the distinct models in the order in which the file names them; everything else refers to them by number. Without `slices` in the file there is
    one slice of whole models. The arithmetic is always in float32: `dtype` (of the arithmetic, in mergekit) is the type of the output where `out_dtype` says
    nothing.
    """

    method: str
    models: tuple[ModelConfig, ...]
    base: int | None  # what the file calls base_model, also where the method has no use for a base
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: ModelConfig | None = None  # whose tokenizer files are copied; None: the pivot's
    chat_template: str | None = None  # None: as it comes with the tokenizer

    @property
    def pivot(self) -> int:
        """The model whose config, generation config and, unless the file says otherwise, tokenizer the output has: the base, else the first."""
        return 0 if self.base is None else self.base

    def key_of(self, model: int) -> str:
        """Where the file names the model first."""
        sources = (source for part in self.slices for source in part.given if source.model == model)
        found = next(sources, None)
        return "base_model" if found is None or model == self.base else f"{found.key}.model"

    @property
    def written_dtype(self) -> str:
        """float32, bfloat16 or float16, or `pivot`: each tensor as the pivot stores it."""
        return self.out_dtype or self.dtype or "pivot"

    @property
    def is_sliced(self) -> bool:
        return self.slices[0].given[0].layers is not None

    @property
    def layers(self) -> int | None:
        """Layers of the output, its `num_hidden_layers`; None where it has as many as the pivot."""
        return sum(part.length for part in self.slices) if self.is_sliced else None


@dataclass(frozen=True)
class _Output:
    """One tensor of the output: its slice, its place in gradients, and its name in each target and in the base."""

    name: str
    slice: Slice
    place: float
    names: tuple[str, ...]
    base_name: str | None


def tensor_recipes(recipe: Recipe, tensors: Sequence[Collection[str]]) -> list[TensorRecipe]:
    """The recipe of every output tensor, from the names of every model's tensors (in the order of `recipe.models`, tied heads left out).

    Raises ConfigError, naming the file's key, for layers that a model does not have and for parameters that are missing or do not go together at some tensor;
    ValueError for a tensor that one model has and another has not.
    """
    outputs = _sliced(recipe, tensors) if recipe.is_sliced else _whole(recipe, tensors)
    return [_tensor_recipe(recipe, output) for output in outputs]


def unmatched_filters(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """In words the filters that are a part of no output tensor's name: what they set, they set for nothing."""
    owners = [("parameters", recipe.parameters)]
    for part in recipe.slices:
        owners.append((f"{part.key}.parameters", part.parameters))
        owners.extend((f"{source.key}.parameters", source.parameters) for source in part.given)
    return [
        f"`{where}.{name}`: no tensor's name has the filter {choice.filter!r} in it: its value is used nowhere"
        for where, settings in owners
        for name, setting in settings.items()
        for choice in setting
        if not choice.is_for_all and not any(str(choice.filter) in each for each in names)
    ]


def _whole(recipe: Recipe, tensors: Sequence[Collection[str]]) -> Iterator[_Output]:
    """Every tensor has one name in all models."""
    part = recipe.slices[0]
    names = _shared([(_model(recipe, source), tensors[source.model]) for source in _used(part)])
    lengths: dict[str, int] = {}
    for stack, layer, _ in filter(None, map(in_stack, names)):
        lengths[stack] = max(layer + 1, lengths.get(stack, 0))
    for name in names:
        found = in_stack(name)
        place = _place(found[1], lengths[found[0]]) if found else 0.0
        yield _Output(name, part, place, (name,) * len(part.targets), name if part.base else None)


def _sliced(recipe: Recipe, tensors: Sequence[Collection[str]]) -> Iterator[_Output]:
    """What lies outside of the layers, with the first and the last slice; then layers one after the other, in the order of the slices."""
    used = {source.model for part in recipe.slices for source in _used(part)}
    stacks = {model: _Stack(f"model {recipe.models[model].name!r}", tensors[model]) for model in sorted(used)}
    for part, before in ((recipe.slices[0], True), (recipe.slices[-1], False)):
        for name in _shared([(_model(recipe, source), stacks[source.model].outside(before)) for source in _used(part)]):
            yield _Output(name, part, 0.0, (name,) * len(part.targets), name if part.base else None)
    stack = stacks[recipe.slices[0].targets[0].model].name
    number = 0
    for part in recipe.slices:
        for source in _used(part):
            stacks[source.model].check(source)
        for offset in range(part.length):
            layers = [stacks[source.model].layer(source, offset) for source in _used(part)]
            of_targets = [stacks[source.model].layer(source, offset)[1] for source in part.targets]
            of_base = stacks[part.base.model].layer(part.base, offset)[1] if part.base else None
            for kind in _shared(layers):
                yield _Output(
                    f"{stack}.{number}.{kind}",
                    part,
                    _place(offset, part.length),
                    tuple(names[kind] for names in of_targets),
                    of_base[kind] if of_base else None,
                )
            number += 1


class _Stack:
    """The tensors of one model by layer. Raises ConfigError for a model with none or several rows of layers, which slices cannot tell apart."""

    def __init__(self, model: str, tensors: Collection[str]) -> None:
        self._model = model
        self._layers: dict[int, dict[str, str]] = {}
        self._outside: list[str] = []
        stacks: dict[str, None] = {}
        for name in tensors:
            found = in_stack(name)
            if found is None:
                self._outside.append(name)
            else:
                stacks[found[0]] = None
                self._layers.setdefault(found[1], {})[found[2]] = name
        if len(stacks) != 1:
            listed = " and ".join(map(repr, stacks)) or "none"
            raise ConfigError(
                f"`slices`: {model} has the rows of layers {listed}, and slices need exactly one: merge whole models under `models`"
            )
        self.name = next(iter(stacks))

    def outside(self, before: bool) -> list[str]:
        return [name for name in self._outside if comes_before_layers(name) is before]

    def check(self, source: Source) -> None:
        """Raises ConfigError for layers that the model does not have."""
        assert source.layers is not None, "a source of a slice has layers"
        count = max(self._layers) + 1
        if source.layers[1] > count:
            raise ConfigError(
                f"`{source.key}.layer_range`: {list(source.layers)} goes past the {count} layers of {self._model}: "
                f"end it at {count} or before (the end is not included)"
            )

    def layer(self, source: Source, offset: int) -> tuple[str, dict[str, str]]:
        """Which layer it is, in words, and the names of its tensors by kind."""
        assert source.layers is not None, "a source of a slice has layers"
        layer = source.layers[0] + offset
        return f"layer {layer} of {self._model}", self._layers.get(layer, {})


def _used(part: Slice) -> tuple[Source, ...]:
    return part.targets if part.base is None else (*part.targets, part.base)


def _model(recipe: Recipe, source: Source) -> str:
    return f"model {recipe.models[source.model].name!r}"


def _shared(owners: Sequence[tuple[str, Collection[str]]]) -> list[str]:
    """The names that all owners (in words) have, in the first one's order. Raises ValueError where one has a name that another has not."""
    first, names = owners[0]
    known = set(names)
    for other, theirs in owners[1:]:
        for has, lacks, differ in ((first, other, known - set(theirs)), (other, first, set(theirs) - known)):
            if differ:
                raise ValueError(
                    f"{lacks} has no tensor {min(differ)!r}, and {has} has it ({len(differ)} such in all): only models of one architecture merge; "
                    "export them by one class, with adapters merged in and no heads added"
                )
    return list(names)


def _place(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def _tensor_recipe(recipe: Recipe, output: _Output) -> TensorRecipe:
    part = output.slice
    arguments: dict[str, object] = {}
    for parameter in takes(part.method).parameters:
        if parameter.per_model:
            values = [
                _value(recipe, output, parameter, (source.parameters, part.parameters, recipe.parameters), source)
                for source in part.targets
            ]
            arguments[parameter.name] = tuple(values)
        else:
            value = _value(recipe, output, parameter, (part.parameters, recipe.parameters))
            if value is not None:
                arguments[parameter.name] = value
    try:
        arguments = keyword_arguments(part.method, arguments, base=part.base is not None)
    except ValueError as error:
        raise ConfigError(f"`{part.key}`, tensor {output.name!r}: {error}") from error
    return TensorRecipe(
        name=output.name,
        method=part.method,
        models=tuple(source.model for source in part.targets),
        names=output.names,
        base=None if part.base is None else part.base.model,
        base_name=output.base_name,
        parameters=arguments,
    )


def _value(
    recipe: Recipe, output: _Output, parameter: Parameter, levels: Sequence[Settings], source: Source | None = None
) -> Value | None:
    """The value of the first level whose setting says one for this tensor. Raises ConfigError where none does and the method needs one."""
    for settings in levels:
        value = value_at(settings.get(parameter.name, ()), output.name, output.place)
        if value is not None:
            return value
    if parameter.required:
        where = output.slice.key if source is None else source.key
        raise ConfigError(
            f"`{where}`: no filter of `{parameter.key}` matches the tensor {output.name!r}, and the merge method {recipe.method!r} needs it: "
            "add an entry without filter, for all other tensors"
        )
    return None

"""mergekit's YAML dialect: a merge file becomes a `Recipe` (`load_recipe`), and a recipe a file again with everything said (`resolved_yaml`).

Follows mergekit's documentation (README and docs/merge_methods.md of 0.1): of `parameters`, those of a source go before those of its slice, and these before
the file's own. A parameter is a value, a list that is a gradient over the layers, or a list of `{filter, value}`, where a filter is a part of the tensor's
name or `*`, the first that matches counts and the entry without one is for the rest; where none matches, the next level says. `int8_mask`, which saves
mergekit memory and changes nothing, is passed over. On top of mergekit: the method varm, and the parameters `variant`, `seed` and `temperature`. Called by
the command `merge`.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from fusion_ray.config import (
    HUB_ID,
    ConfigError,
    ModelConfig,
    is_url,
    read_mapping,
    resolve_path,
    validate,
)
from fusion_ray.merge_file import MergeFile, Reference, complete_settings, read_settings, written_settings
from fusion_ray.merge_recipe import PASSTHROUGH, Recipe, Slice, Source
from fusion_ray.merging.parameters import check_models, takes
from fusion_ray.merging.settings import Settings, value_at

_EXAMPLE = "jobs/configs/merge/fusechat_sce.yml"
_WITH_REVISION = re.compile(r"^([^@]+)@([\w./-]+)$")


def load_recipe(path: str | Path) -> Recipe:
    """The merge in the YAML file `path`. Raises ConfigError, naming the key, for anything that is not a merge this project does."""
    path = Path(path)
    read_mapping(path, MergeFile, kind="merge file", example=_EXAMPLE)  # whether it is there, and holds a mapping
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except _TwiceError as error:
        raise ConfigError(f"{path}: {error}") from error
    content = validate(MergeFile, raw)
    return _Reader(content, path.resolve().parent).recipe()


class _TwiceError(ValueError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML with each key once in its mapping, and with 1e-8 as the number that it is in YAML 1.2 and in mergekit's files."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        lines: dict[object, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _TwiceError(
                    f"the key `{key.value}` stands twice, in line {lines[key.value]} and in line {line}: keep one of them"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Reader:
    """One file becoming a recipe. `_numbers` fills up while references are read, in their order."""

    def __init__(self, content: MergeFile, folder: Path) -> None:
        self._content, self._folder = content, folder
        self._method = content.merge_method
        self._numbers: dict[tuple[str, str | None], int] = {}
        try:
            self._takes = takes(self._method)
        except ValueError as error:
            raise ConfigError(f"`merge_method`: {error}") from error

    def recipe(self) -> Recipe:
        content = self._content
        given = self._whole_models() if content.models is not None else self._ranges()
        base = None if content.base_model is None else self._number(content.base_model, "base_model")
        if base is None and self._takes.base == "needed":
            raise ConfigError(
                f"missing key `base_model`: the merge method {self._method!r} needs a base, the model that the others were made from"
            )
        parameters = read_settings(self._method, content.parameters, "parameters")
        slices = tuple(self._slice(part, base) for part in given)
        self._check_required(slices, parameters)
        if content.slices is not None:
            self._check_slices(slices, parameters)
        models = _named(self._numbers)
        return Recipe(
            method=self._method,
            models=models,
            base=base,
            slices=slices,
            parameters=complete_settings(self._method, parameters, said=self._said_below(slices)),
            dtype=content.dtype,
            out_dtype=content.out_dtype,
            tokenizer=self._tokenizer(models, base),
            chat_template=_template(content.chat_template),
        )

    def _whole_models(self) -> list[Slice]:
        sources: list[Source] = []
        for number, each in enumerate(self._content.models or ()):
            key = f"models.{number}"
            model = self._number(each.model, f"{key}.model")
            if any(source.model == model for source in sources):
                raise ConfigError(f"`{key}.model`: {each.model.path!r} is given twice: give each model once")
            settings = read_settings(self._method, each.parameters, f"{key}.parameters", of="model")
            sources.append(Source(model, key, None, settings))
        return [Slice(tuple(sources), (), None, self._method, "models")]

    def _ranges(self) -> list[Slice]:
        slices = []
        for number, part in enumerate(self._content.slices or ()):
            key = f"slices.{number}"
            sources = []
            for place, each in enumerate(part.sources):
                of_source = f"{key}.sources.{place}"
                settings = read_settings(self._method, each.parameters, f"{of_source}.parameters", of="model")
                model = self._number(each.model, f"{of_source}.model")
                sources.append(Source(model, of_source, each.layer_range, settings))
            lengths = [each.layer_range[1] - each.layer_range[0] for each in part.sources]
            if len(set(lengths)) > 1:
                raise ConfigError(
                    f"`{key}`: the sources have {' and '.join(map(str, lengths))} layers: layers are merged one by one, so give ranges of one length"
                )
            settings = read_settings(self._method, part.parameters, f"{key}.parameters", of="slice")
            slices.append(Slice(tuple(sources), (), None, self._method, key, settings))
        return slices

    def _slice(self, part: Slice, base: int | None) -> Slice:
        """The slice with its sources told apart: what is merged, what with, and whether there is anything to merge."""
        targets, of_base = part.given, None
        if base is not None and self._takes.base != "none":
            of_base = next((source for source in part.given if source.model == base), None)
            targets = tuple(source for source in part.given if source is not of_base)
        is_range = part.given[0].layers is not None
        alone = is_range and len(part.given) == 1
        if alone and (not targets or self._takes.least > 1 or self._method == "slerp"):
            return replace(part, targets=part.given, method=PASSTHROUGH)
        if of_base is not None and of_base.parameters:
            raise ConfigError(
                f"`{of_base.key}.parameters`: it is the base model, of which the merge method {self._method!r} takes no parameters: remove them"
            )
        if base is not None and of_base is None and self._takes.base != "none":
            of_base = self._base_beside(part, base)
        try:
            check_models(self._method, targets=len(targets), base=of_base is not None)
        except ValueError as error:
            raise ConfigError(f"`{part.key}`: {error}") from error
        return replace(part, targets=targets, base=of_base)

    def _base_beside(self, part: Slice, base: int) -> Source:
        """The base of a slice that does not list it: of its layers, those that the sources all give."""
        ranges = {source.layers for source in part.given}
        if len(ranges) > 1 or (self._method == "slerp" and None not in ranges):
            raise ConfigError(f"`{part.key}`: list the base model among its sources, with its own `layer_range`")
        return Source(base, "base_model", ranges.pop())

    def _check_required(self, slices: Sequence[Slice], parameters: Settings) -> None:
        """Before any tensor is known: a required parameter that nothing sets for a model."""
        for parameter in self._takes.parameters:
            for part in slices:
                said = parameter.name in parameters or parameter.name in part.parameters
                if said or not parameter.required or part.method == PASSTHROUGH:
                    continue
                key = f"parameters.{parameter.key}"
                unsaid = [
                    f"`{source.key}.{key}`, or `{key}` for all"
                    for source in part.targets
                    if parameter.name not in source.parameters
                ]
                if unsaid or not parameter.per_model:
                    where = unsaid[0] if parameter.per_model else f"`{key}`"
                    raise ConfigError(
                        f"missing key {where}: the merge method {self._method!r} needs it: {parameter.hint}"
                    )

    def _said_below(self, slices: Sequence[Slice]) -> set[str]:
        """The parameters that every slice, or each of its models, sets for all tensors: the merge's own setting is never asked."""

        def says(owner: Source | Slice, name: str) -> bool:
            return any(choice.is_for_all for choice in owner.parameters.get(name, ()))

        return {
            parameter.name
            for parameter in self._takes.parameters
            if all(
                says(part, parameter.name)
                or (parameter.per_model and all(says(source, parameter.name) for source in part.targets))
                for part in slices
                if part.method != PASSTHROUGH
            )
        }

    def _check_slices(self, slices: Sequence[Slice], parameters: Settings) -> None:
        if not any(part.length for part in slices):
            raise ConfigError("`slices` have no layers: the end of a `layer_range` is not included, [3, 4] is layer 3")
        granularity = value_at(parameters.get("granularity", ()), "", 0)
        merged = {tuple(source.model for source in part.targets) for part in slices}
        if granularity == "model" and len(merged) > 1:
            raise ConfigError(
                "`parameters.granularity`: model weighs the same models everywhere, and the slices merge different ones: give layer or matrix"
            )

    def _number(self, reference: Reference, key: str) -> int:
        return self._numbers.setdefault(self._located(reference, key), len(self._numbers))

    def _located(self, reference: Reference, key: str) -> tuple[str, str | None]:
        """Path and revision."""
        path, revision = reference.path, reference.revision
        if not is_url(path) and not (self._folder / Path(path).expanduser()).exists():
            model, plus, adapter = path.partition("+")
            if plus:
                raise ConfigError(
                    f"`{key}`: {path!r} asks for the adapter {adapter!r} on {model!r}, and adapters are not applied: merge it into the model "
                    "first (peft's merge_and_unload, then save_pretrained) and name that folder"
                )
            found = _WITH_REVISION.match(path)
            if found and revision is None and HUB_ID.match(found[1]):
                path, revision = found[1], found[2]
        return resolve_path(path, self._folder, may_be_hub_id=True), revision

    def _tokenizer(self, models: Sequence[ModelConfig], base: int | None) -> ModelConfig | None:
        """The model whose tokenizer is asked for; None where it is the pivot's."""
        given = self._content.tokenizer
        reference = self._content.tokenizer_source if given is None else given.source
        key = "tokenizer_source" if given is None else "tokenizer.source"
        if reference is None or reference.path == "base":
            return None
        if reference.path == "union":
            raise ConfigError(
                f"`{key}`: 'union' makes a new vocabulary, and merging here neither adds nor drops tokens: where all models have the same tokens "
                "give base, else bring them to one vocabulary first"
            )
        path = reference.path.removeprefix("model:")
        place = self._located(reference.model_copy(update={"path": path}), key)
        number = self._numbers.get(place)
        if number is None:
            return ModelConfig(name="tokenizer", path=place[0], revision=place[1])
        return None if number == (base or 0) else models[number]


def _named(numbers: Mapping[tuple[str, str | None], int]) -> tuple[ModelConfig, ...]:
    """References with names for messages and reports: the last part of the path, made unique by a number."""
    found: dict[str, ModelConfig] = {}
    for path, revision in numbers:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.rstrip("/").rsplit("/", 1)[-1]).lstrip("._-")[:50] or "model"
        name, count = stem, 1
        while name in found:
            count += 1
            name = f"{stem}-{count}"
        found[name] = ModelConfig(name=name, path=path, revision=revision)
    return tuple(found.values())


def _template(given: str | None) -> str | None:
    if given is None:
        return None
    if "{{" in given or "{%" in given:
        from fusion_ray.merge_template import template_problem  # loads jinja2

        problem = template_problem(given)
        if problem:
            raise ConfigError(
                f"`chat_template`: it is not a valid Jinja template ({problem}): mend it, or leave the key out for the tokenizer's own"
            )
        return given
    what = "auto takes the most frequent among the models" if given == "auto" else f"{given!r} is not a template"
    raise ConfigError(
        f"`chat_template`: {what}: give the Jinja text itself, or leave the key out for the tokenizer's own"
    )


def resolved_yaml(recipe: Recipe) -> str:
    """A merge file that says the same: paths as they were found, every parameter explicit. `load_recipe` reads it back."""
    content: dict[str, object] = {"merge_method": recipe.method}
    if recipe.base is not None:
        content["base_model"] = _reference(recipe.models[recipe.base])
    parts = [
        {
            "sources": [
                {"model": _reference(recipe.models[source.model])}
                | ({} if source.layers is None else {"layer_range": list(source.layers)})
                | written_settings(recipe.method, source.parameters)
                for source in part.given
            ],
            **written_settings(recipe.method, part.parameters),
        }
        for part in recipe.slices
    ]
    content |= {"slices": parts} if recipe.is_sliced else {"models": parts[0]["sources"]}
    content |= written_settings(recipe.method, recipe.parameters)
    content |= {key: value for key in ("dtype", "out_dtype") if (value := getattr(recipe, key)) is not None}
    content["tokenizer"] = {"source": _reference(recipe.tokenizer or recipe.models[recipe.pivot])}
    if recipe.chat_template is not None:
        content["chat_template"] = recipe.chat_template
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=160)


def _reference(model: ModelConfig) -> object:
    return model.path if model.revision is None else {"model": {"path": model.path, "revision": model.revision}}

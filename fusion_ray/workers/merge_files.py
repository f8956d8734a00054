"""What goes beside the tensors of a merged model: config, tokenizer and chat template, the model card, the index. Called by `merge_job.py`."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

import yaml

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.files import Files, files_of
from fusion_ray.checkpoints.plan import WorkUnit, index_of
from fusion_ray.checkpoints.reader import INDEX, Checkpoint
from fusion_ray.config import ModelConfig, is_url
from fusion_ray.merge_recipe import Recipe
from fusion_ray.merge_yaml import resolved_yaml
from fusion_ray.store import MANIFEST, Artifact, Unit
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.model_card import CARD, Ancestor, licence_of, merge_card

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")  # what families call it
TEMPLATE = "chat_template.jinja"
OF_MODEL = (CONFIG, "generation_config.json", "*.py")
OF_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
TEMPLATES = ("chat_template*", "additional_chat_templates/*")


def is_read(name: str) -> bool:
    """Whether a merge reads a file of this name, relative to a model's folder: logs, pickled states and folders of checkpoints may change beside it."""
    return _matches(name, (*OF_MODEL, *OF_TOKENIZER, *TEMPLATES, CARD, MANIFEST, INDEX, "*.safetensors"))


def index_unit(out: Artifact, units: Sequence[WorkUnit]) -> Iterator[Unit]:
    """The index where there are several shards."""
    if len(units) > 1:
        yield out.commit_bytes(INDEX, index_of(units))


def check_tokenizer(job: MergeJob) -> None:
    """Raises MergeError where the folder whose tokenizer is asked for holds none."""
    if job.tokenizer is not None and not _named(files_of(job.tokenizer), OF_TOKENIZER):
        raise MergeError(
            f"the tokenizer's source {job.tokenizer} holds no tokenizer (tokenizer.json and the like): give the folder of a model that has one"
        )


def model_files(
    out: Artifact, job: MergeJob, models: Sequence[Checkpoint], parameters: Mapping[str, object]
) -> Iterator[Unit]:
    """The config is the base's, with the output's element type and number of layers; the rest is copied."""
    model = models[job.files_of]
    tokenizer = model.files if job.tokenizer is None else files_of(job.tokenizer)
    for name in _named(model.files, OF_MODEL):
        yield out.commit_bytes(name, _config(job, models) if name == CONFIG else model.files.read(name))
    for name in _named(tokenizer, OF_TOKENIZER):
        yield out.commit_bytes(
            name, tokenizer.read(name) if job.chat_template is None else _untemplated(tokenizer, name)
        )
    if job.chat_template is None:
        for name in _named(tokenizer, TEMPLATES):
            yield out.commit_bytes(name, tokenizer.read(name))
    else:
        yield out.commit_bytes(TEMPLATE, job.chat_template.encode())
    for name, text in job.extra_files:
        yield out.commit_bytes(name, text.encode())
    yield out.commit_bytes(
        CARD, merge_card(job.method, _ancestors(out, job, models), _recipe(job, parameters)).encode()
    )


def _ancestors(out: Artifact, job: MergeJob, models: Sequence[Checkpoint]) -> list[Ancestor]:
    """Keys are what the artefact's own key was computed from. A merge file's local folder has the key of what made it, where this program did: what tells
    others there are their times of change."""
    found = []
    for number, ((name, place), model) in enumerate(zip(job.models, models, strict=True)):
        is_base = number == (job.files_of if job.recipe is None else job.recipe.base)
        given = (
            place if job.recipe is None else job.recipe.models[number]
        )  # where it came from, not where it was downloaded to
        local = not isinstance(given, ModelConfig) or _is_local(given)
        key = out.inputs.get(name) or out.inputs.get(f"target:{name}") or out.inputs.get("pivot" if is_base else "", "")
        found.append(
            Ancestor(
                name=name,
                role="base" if is_base else "merged",
                reference=given.path if isinstance(given, ModelConfig) and not local else None,
                revision=given.revision or _commit(place) if isinstance(given, ModelConfig) else None,
                licence=licence_of(model),
                key=_made_by(model.files) if local and job.recipe is not None else key,
            )
        )
    return found


def _made_by(files: Files) -> str:
    """The key of the artefact or merge of this program that the folder is; empty where it is none."""
    try:
        found = json.loads(files.read(MANIFEST))
    except (OSError, ValueError):
        return ""
    given = found.get("key") if isinstance(found, dict) and {"stage", "units"} <= set(found) else None
    return given if isinstance(given, str) else ""


def _is_local(model: ModelConfig) -> bool:
    return not is_url(model.path) and os.path.isdir(model.path)


def _commit(place: Artifact | ModelConfig) -> str | None:
    """Of a model that was downloaded from the hub: its cache calls the folder so."""
    folder, name = os.path.split(place.path if isinstance(place, ModelConfig) else "")
    return name if os.path.basename(folder) == "snapshots" else None


def _recipe(job: MergeJob, parameters: Mapping[str, object]) -> str:
    """The merge file with names for local folders, or for a stage's merge its method and parameters."""
    if job.recipe is None:
        return yaml.safe_dump({"merge_method": job.method, "parameters": dict(parameters)}, sort_keys=True)
    models = tuple(_without_path(model, model.name) for model in job.recipe.models)
    tokenizer = job.recipe.tokenizer
    if tokenizer in job.recipe.models:
        tokenizer = models[job.recipe.models.index(tokenizer)]
    elif tokenizer is not None:
        tokenizer = _without_path(tokenizer, os.path.basename(tokenizer.path))
    return resolved_yaml(replace(job.recipe, models=models, tokenizer=tokenizer))


def _without_path(model: ModelConfig, name: str) -> ModelConfig:
    return model.model_copy(update={"path": name}) if _is_local(model) else model


def _untemplated(files: Files, name: str) -> bytes:
    """A tokenizer's file without the template that older models keep in their tokenizer_config.json."""
    data = files.read(name)
    if name != TOKENIZER_CONFIG:
        return data
    config = json.loads(data)
    if "chat_template" not in config:
        return data
    del config["chat_template"]
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _named(files: Files, patterns: Sequence[str]) -> list[str]:
    return [name for name in files.names() if _matches(name, patterns)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _config(job: MergeJob, models: Sequence[Checkpoint]) -> bytes:
    """As it is where nothing changes."""
    model = models[job.files_of]
    if job.dtype == "pivot" and job.layers is None:
        return model.files.read(CONFIG)
    config = dict(model.config)
    if job.dtype != "pivot":
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = job.dtype
    if job.recipe is not None and job.layers is not None:
        config[next((key for key in DEPTHS if key in config), DEPTHS[0])] = job.layers
        if "layer_types" in config:
            config["layer_types"] = _layer_types(job.recipe, models)
    return (json.dumps(config, indent=2) + "\n").encode()


def _layer_types(recipe: Recipe, models: Sequence[Checkpoint]) -> list[object]:
    """What kind of attention each layer has: each slice's as its base, else its first model, has it. Raises MergeError where that one does not say."""
    found: list[object] = []
    for part in recipe.slices:
        source = part.base or part.targets[0]
        assert source.layers is not None, "a source of a slice has layers"
        types = models[source.model].config.get("layer_types")
        if not isinstance(types, list) or len(types) < source.layers[1]:
            raise MergeError(
                f"model {models[source.model].model!r}: `layer_types` of its config.json does not say of what kind each of its layers is, and the output's "
                "config has to: save its config again with a current transformers"
            )
        found.extend(types[source.layers[0] : source.layers[1]])
    return found

"""What goes beside the tensors of a merged model: config, tokenizer and chat template, the model card, the index. Called by `merge_job.py`."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch

import yaml

from fusion_ray.checkpoints.files import Files, files_of
from fusion_ray.checkpoints.plan import WorkUnit, index_of
from fusion_ray.checkpoints.reader import INDEX, Checkpoint
from fusion_ray.config import ModelConfig, is_url
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.model_card import CARD, Ancestor, licence_of, merge_card

CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
OF_MODEL = (CONFIG, "generation_config.json", "*.py")
OF_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip


def index_unit(out: Artifact, units: Sequence[WorkUnit]) -> Iterator[Unit]:
    """The index where there are several shards."""
    if len(units) > 1:
        yield out.commit_bytes(INDEX, index_of(units))


def model_files(
    out: Artifact, job: MergeJob, models: Sequence[Checkpoint], parameters: Mapping[str, object]
) -> Iterator[Unit]:
    """The config is the base's, with the output's element type and number of layers; the rest is copied."""
    model = models[job.files_of]
    tokenizer = model.files if job.tokenizer is None else files_of(job.tokenizer)
    for name in _named(model.files, OF_MODEL):
        yield out.commit_bytes(name, _config(job, model) if name == CONFIG else model.files.read(name))
    for name in _named(tokenizer, OF_TOKENIZER):
        if job.chat_template is None or name != TEMPLATE:
            yield out.commit_bytes(name, tokenizer.read(name))
    if job.chat_template is not None:
        yield out.commit_bytes(TEMPLATE, job.chat_template.encode())
    for name, text in job.extra_files:
        yield out.commit_bytes(name, text.encode())
    yield out.commit_bytes(
        CARD, merge_card(job.method, _ancestors(out, job, models), _recipe(job, parameters)).encode()
    )


def _ancestors(out: Artifact, job: MergeJob, models: Sequence[Checkpoint]) -> list[Ancestor]:
    """Keys are what the artefact's own key was computed from."""
    found = []
    for number, ((name, place), model) in enumerate(zip(job.models, models, strict=True)):
        is_base = number == job.files_of
        given = place if isinstance(place, ModelConfig) else None
        local = given is None or (not is_url(given.path) and os.path.isdir(given.path))
        found.append(
            Ancestor(
                name=name,
                role="base" if is_base else "merged",
                reference=None if given is None or local else given.path,
                revision=None if given is None else given.revision,
                licence=licence_of(model),
                key=str(
                    out.inputs.get(name)
                    or out.inputs.get(f"target:{name}")
                    or out.inputs.get("pivot" if is_base else "", "")
                ),
            )
        )
    return found


def _recipe(job: MergeJob, parameters: Mapping[str, object]) -> str:
    """The merge file with names for local folders, or for a stage's merge its method and parameters."""
    for file, text in job.extra_files:
        if file.endswith(".yml"):
            for name, place in job.models:
                if isinstance(place, ModelConfig) and os.path.isdir(place.path):
                    text = text.replace(place.path, name)
            return text
    return yaml.safe_dump({"merge_method": job.method, "parameters": dict(parameters)}, sort_keys=True)


def _named(files: Files, patterns: Sequence[str]) -> list[str]:
    return [
        name
        for name in files.names()
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]


def _config(job: MergeJob, model: Checkpoint) -> bytes:
    """As it is where nothing changes."""
    if job.dtype == "pivot" and job.layers is None:
        return model.files.read(CONFIG)
    config = dict(model.config)
    if job.dtype != "pivot":
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = job.dtype
    if job.layers is not None:
        config["num_hidden_layers"] = job.layers
    return (json.dumps(config, indent=2) + "\n").encode()

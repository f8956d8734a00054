"""What goes beside the tensors of a merged model: config, tokenizer and chat template, the index. Called by `merge_job.py`."""

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from fusion_ray.checkpoints.plan import WorkUnit, index_of
from fusion_ray.checkpoints.reader import INDEX, Checkpoint
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.merge_plan import MergeJob

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


def model_files(out: Artifact, job: MergeJob, models: Sequence[Checkpoint]) -> Iterator[Unit]:
    """The config is the base's, with the output's element type and number of layers; the rest is copied."""
    model, tokenizer = models[job.files_of], models[job.tokenizer_of]
    for name in _named(model, OF_MODEL):
        yield out.commit_bytes(name, _config(job, model) if name == CONFIG else model.files.read(name))
    for name in _named(tokenizer, OF_TOKENIZER):
        if job.chat_template is None or name != TEMPLATE:
            yield out.commit_bytes(name, tokenizer.files.read(name))
    if job.chat_template is not None:
        yield out.commit_bytes(TEMPLATE, job.chat_template.encode())
    for name, text in job.extra_files:
        yield out.commit_bytes(name, text.encode())


def _named(model: Checkpoint, patterns: Sequence[str]) -> list[str]:
    return [
        name
        for name in model.files.names()
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

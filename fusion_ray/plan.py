"""What a run would do, without doing any of it: nodes, what is cached, sizes, times, memory peaks, problems (`fusion-ray plan`).

Everything is read from headers and file sizes; imports no torch, no ray. The estimates' constants are stated where they stand.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fusion_ray.config import ConfigError, FusionConfig, LoraConfig, ModelConfig, is_url
from fusion_ray.graph import SFT, Graph, Node, build_graph
from fusion_ray.workers.engine_sizes import Sizes, engine_sizes, merged, parallel, rows_bytes, shape_of

BYTES_PER_TOKEN = 4.0  # English text under a vocabulary of 30k to 150k
ASSISTANT_SHARE = 0.6  # of a chat corpus's bytes
BYTES_PER_POSITION = {"fixed": 12, "per_k": 3.3}  # a teacher row on disk: 45 bytes at K = 10 (design.md section 5)
ACCELERATOR_FLOPS = 4e14 * 0.4  # bf16 at 40% utilisation of a current data-centre card
CPU_FLOPS = 5e10  # float32 on one core
TRAINING_BYTES = 16  # a parameter in fp32 with gradient and two Adam moments
WEIGHT_BYTES = 4  # of them, what stays where a parameter is not trained
GIB = 1 << 30


@dataclass(frozen=True)
class ModelSize:
    """`matrices` are the name, rows and columns of every tensor with two axes."""

    parameters: int
    bytes: int
    vocabulary: int
    matrices: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a node costs: bytes it writes, seconds of one device, peak bytes of one worker. None where it cannot be known."""

    bytes: float | None = None
    device_seconds: float | None = None
    peak_bytes: float | None = None


def model_size(folder: str) -> ModelSize | None:
    """The sizes of a local model folder, from headers alone; None for a reference that is not local."""
    path = Path(folder)
    if is_url(folder) or not path.is_dir():
        return None
    parameters = total = 0
    matrices: list[tuple[str, int, int]] = []
    for file in sorted(path.glob("*.safetensors")):
        header, _ = _header(file)
        parameters += sum(math.prod(tensor["shape"]) for tensor in header.values())
        total += file.stat().st_size
        shapes = {name: each["shape"] for name, each in header.items()}
        matrices += [(name, shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2]
    config = json.loads((path / "config.json").read_text())
    return ModelSize(parameters, total, int(config.get("vocab_size", 0)), tuple(matrices))


def _header(file: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Tensors of a safetensors file (name to dtype, shape, data_offsets) and the bytes that the file should have; ({}, -1) for an unreadable header."""
    with open(file, "rb") as handle:
        try:
            length = struct.unpack("<Q", handle.read(8))[0]
            header = json.loads(handle.read(min(length, file.stat().st_size)))
            header.pop("__metadata__", None)
            return header, 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (struct.error, ValueError, AttributeError, TypeError, KeyError):
            return {}, -1


def plan_table(config: FusionConfig) -> tuple[Table, list[str]]:
    """The table of nodes with their estimates, and the problems found. Raises ConfigError as build_graph does."""
    graph = build_graph(config)
    sizes = {model.name: model_size(model.path) for model in (config.pivot, *config.sources)}
    unit = "GPU" if config.resources.teach.gpus else "CPU"
    table = Table(title=f"plan of run {config.run.name} in {config.run.storage}", title_justify="left")
    for header in ("stage", "branch", "key", "state"):
        table.add_column(header)
    for header in ("writes", f"{unit}-hours", "peak memory of a worker"):
        table.add_column(header, justify="right")
    hours = written = 0.0
    for node in graph:
        done = node.artifact.sealed
        cost = estimate(config, graph, node, sizes)
        if not done:
            hours += (cost.device_seconds or 0) / 3600
            written += cost.bytes or 0
        state = "[green]cached[/green]" if done else "to do"
        figures = (_size(cost.bytes), _hours(cost.device_seconds), _size(cost.peak_bytes))
        table.add_row(node.stage, node.branch, node.key[:12], state, *figures)
    told = f"to do: about {_size(written)} written, {hours:.2f} {unit}-hours; estimates from file sizes and headers"
    table.caption = "\n".join([told, *(_teacher(config, model, sizes) for model in (config.pivot, *config.sources))])
    table.caption_justify = "left"
    return table, list(problems(config, graph, sizes, written))


def estimate(config: FusionConfig, graph: Graph, node: Node, sizes: dict[str, ModelSize | None]) -> Estimate:
    """The cost of one node; every figure is an order of magnitude, from the constants above."""
    corpus = _corpus_bytes(config)
    tokens = corpus / BYTES_PER_TOKEN
    positions = tokens * ASSISTANT_SHARE
    k, pivot = config.teach.top_k, sizes[config.pivot.name]
    row_bytes = positions * (BYTES_PER_POSITION["fixed"] + BYTES_PER_POSITION["per_k"] * k)
    speed = ACCELERATOR_FLOPS if config.resources.teach.gpus else CPU_FLOPS
    if node.stage == "corpus":
        return Estimate(bytes=corpus * 0.4)
    if node.stage == "align":
        return Estimate(bytes=row_bytes, device_seconds=0.0)
    if node.stage == "teach":
        size = sizes[node.branch]
        if size is None:
            return Estimate(bytes=row_bytes)
        if config.models[node.branch].endpoint is not None:
            return Estimate(row_bytes, 0.0)
        needs = engine_of(config, config.models[node.branch])
        held = 0
        if needs is not None:
            rows = rows_bytes(needs, rows=config.corpus.rows_per_shard, top_k=k)
            held = needs.logits_bytes + (needs.cache_bytes or 0) + rows
        return Estimate(row_bytes, 2 * size.parameters * tokens / speed, size.bytes + held)
    if pivot is None:
        return Estimate()
    if node.stage == "distill":
        passes = 3 + config.distill.gradient_checkpointing - (config.distill.lora is not None)
        seconds = 2 * passes * pivot.parameters * tokens * config.distill.epochs / speed
        head = config.distill.head_chunk * pivot.vocabulary * 12
        return Estimate(pivot.bytes, seconds, training_state(config, pivot) + head)
    if node.stage == "merge":
        targets = sum(name != SFT for name in graph.distill)
        return Estimate(pivot.bytes, (targets + 1) * pivot.bytes / 1e9, float(config.merge.max_bytes_in_flight))
    return Estimate(device_seconds=None)


def engine_of(config: FusionConfig, model: ModelConfig) -> Sizes | None:
    """What the engine of a local model's teacher is started with; None for a model that is not local or whose config does not tell its sizes."""
    path = Path(model.path) / "config.json"
    if is_url(model.path) or not path.is_file():
        return None
    fields = json.loads(path.read_text())
    fields |= fields.get("text_config") or {}
    try:
        shape = shape_of(fields.get)
    except KeyError:
        return None
    resources = config.resources.teach
    return engine_sizes(
        shape,
        top_k=config.teach.top_k,
        max_length=config.teach.max_length,
        on_gpu=resources.gpus > 0,
        given={**config.teach.engine, **resources.engine},
    )


def _teacher(config: FusionConfig, model: ModelConfig, sizes: dict[str, ModelSize | None]) -> str:
    """A line on what the teacher of one model takes."""
    if model.endpoint is not None:
        return f"teach:{model.name} asks {model.endpoint.url}, {model.endpoint.concurrency} requests at a time"
    needs, size = engine_of(config, model), sizes[model.name]
    if needs is None or size is None:
        return f"teach:{model.name} is not known before its config.json is here"
    rows = rows_bytes(needs, rows=config.corpus.rows_per_shard, top_k=config.teach.top_k)
    cache = "the rest of the GPU" if needs.cache_bytes is None else _size(needs.cache_bytes)
    return (
        f"teach:{model.name} max_num_batched_tokens {needs.max_num_batched_tokens}: {_size(needs.logits_bytes)} of logits a step, "
        f"weights {_size(size.bytes)}, key-value cache {cache}, rows at K = {config.teach.top_k} up to {_size(rows)}"
    )


def _teach_problems(config: FusionConfig, sizes: dict[str, ModelSize | None]) -> Iterator[str]:
    resources = config.resources.teach
    try:
        parallel(resources.gpus, merged(config.teach.engine, resources.engine), nodes=resources.nodes)
    except ValueError as error:
        if any(model.endpoint is None for model in config.models.values()):
            yield str(error)
    for model in config.models.values():
        size = sizes[model.name]
        if size is not None and 0 < size.vocabulary < config.teach.top_k:
            yield f"teach.top_k is {config.teach.top_k}, the vocabulary of {model.name} has {size.vocabulary} tokens: lower teach.top_k"
        key = model.endpoint.api_key_env if model.endpoint else None
        if key and not (os.environ.get(key) or os.environ.get(f"{key}_FILE")):
            yield f"`endpoint.api_key_env` of {model.name} is {key}, which is not set: set it, or leave it out for a server without a key"


def training_state(config: FusionConfig, pivot: ModelSize) -> float:
    """Bytes of one worker for weights, gradients and moments, whatever the batch."""
    workers, lora = config.resources.distill.max_workers, config.distill.lora
    trained = pivot.parameters if lora is None else adapter_parameters(lora, pivot)
    weights = WEIGHT_BYTES * (trained if lora is None else trained + pivot.parameters)
    learning = (TRAINING_BYTES - WEIGHT_BYTES) * trained
    return (weights if config.distill.zero_stage < 3 else weights / workers) + learning / workers


def adapter_parameters(lora: LoraConfig, model: ModelSize) -> int:
    """Elements of the adapters of `lora`, as if every matrix that has no side of the vocabulary's length were a linear layer."""
    count = 0
    for tensor, rows, columns in model.matrices:
        name = f".{tensor.removesuffix('.weight')}"
        wanted = lora.targets == "all-linear" or any(name.endswith(f".{end}") for end in lora.targets)
        if wanted and model.vocabulary not in (rows, columns):
            count += lora.rank * (rows + columns)
    return count


def check(config: FusionConfig, graph: Graph) -> None:
    """Raises ConfigError with every problem that is found before anything starts. Called by a run that has work to do."""
    sizes = {model.name: model_size(model.path) for model in (config.pivot, *config.sources)}
    written = sum(estimate(config, graph, node, sizes).bytes or 0 for node in graph if not node.artifact.sealed)
    found = list(problems(config, graph, sizes, written))
    if found:
        raise ConfigError("\n".join(found))


def problems(config: FusionConfig, graph: Graph, sizes: dict[str, ModelSize | None], written: float) -> Iterator[str]:
    """What would stop the run or spoil it, found before anything starts."""
    storage = config.run.storage
    if not is_url(storage):
        folder = Path(storage)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if written > free:
            yield f"run.storage {storage} has {_size(free)} free, the run writes about {_size(written)}: choose another or free space"
    for key, engine in (
        ("teach.engine", config.teach.engine),
        ("resources.teach.engine", config.resources.teach.engine),
    ):
        limit = engine.get("max_logprobs")
        if isinstance(limit, int) and 0 <= limit < config.teach.top_k:
            yield f"{key}.max_logprobs {limit} is below teach.top_k {config.teach.top_k}: leave it out or raise it"
    if any(not node.artifact.sealed for node in graph.teach.values()):
        yield from _teach_problems(config, sizes)
    if config.align.problem:
        yield config.align.problem
    for model in (config.pivot, *config.sources):
        yield from _model_problems(model, sizes[model.name])
    pivot = sizes[config.pivot.name]
    if pivot is not None and any(not node.artifact.sealed for node in graph.distill.values()):
        yield from _memory_problem(config, pivot)
    if config.distill.batch_size < config.resources.distill.max_workers:
        yield (
            f"distill.batch_size {config.distill.batch_size} is below resources.distill.max_workers "
            f"{config.resources.distill.max_workers}: some workers would have no rows"
        )


def _memory_problem(config: FusionConfig, pivot: ModelSize) -> Iterator[str]:
    """Where the state of training alone, which no setting of the batch changes, has no room."""
    resources = config.resources.distill
    if resources.gpus or "offload_optimizer" in str(config.distill.deepspeed):
        return
    state = training_state(config, pivot)
    if resources.memory_gb is not None:
        room, what = resources.memory_gb * GIB, f"resources.distill.memory_gb is {resources.memory_gb:g}"
    elif config.resources.address is None:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / resources.max_workers
        what = f"this machine has {_size(room)} for each of {resources.max_workers} workers"
    else:
        return
    if state > room:
        adapters = "train adapters alone (distill.lora), " if config.distill.lora is None else ""
        yield (
            f"distill: a worker holds {_size(state)} of weights, gradients and optimizer state at distill.zero_stage {config.distill.zero_stage}, and {what}: "
            f"set zero_stage to 3 and raise resources.distill.max_workers over more machines, {adapters}or take a smaller pivot"
        )


def _model_problems(model: ModelConfig, size: ModelSize | None) -> Iterator[str]:
    path = Path(model.path)
    if size is None:
        return
    for file in sorted(path.glob("*.safetensors")):
        wanted = _header(file)[1]
        if wanted != file.stat().st_size:
            what = (
                "has no readable header" if wanted < 0 else f"has {file.stat().st_size} bytes, its header says {wanted}"
            )
            yield f"model {model.name!r}: {file} {what}: it is truncated or damaged; fetch it again"
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
        for missing in sorted(shard for shard in shards if not (path / shard).exists()):
            yield f"model {model.name!r}: {index} names {missing}, which is not there: fetch it again"
    if not list(path.glob("*.safetensors")):
        yield f"model {model.name!r}: {path} holds no safetensors weights; pickled weights are not loaded: convert them first"
    tokenizer = path / "tokenizer_config.json"
    template = (path / "chat_template.jinja").exists()
    if tokenizer.exists():
        template = template or "chat_template" in json.loads(tokenizer.read_text())
    if not template:
        yield f"model {model.name!r}: {path} has no chat template (chat_template.jinja or in tokenizer_config.json)"


def _corpus_bytes(config: FusionConfig) -> float:
    return float(sum(Path(path).stat().st_size for path in config.corpus.paths if not is_url(path)))


def _size(value: float | None) -> str:
    if value is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.3f}"

"""What a run would do, without doing any of it: nodes, what is cached, sizes, times, memory peaks, problems (`fusion-ray plan`).

Everything is read from headers and file sizes; imports no torch, no ray. The estimates' constants are stated where they stand.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fusion_ray.config import ConfigError, FusionConfig, LoraConfig, ModelConfig, PivotConfig, is_url
from fusion_ray.graph import SFT, Graph, Node, build_graph
from fusion_ray.workers.engine_sizes import Sizes, engine_sizes, merged, parallel, rows_bytes, shape_of

BYTES_PER_TOKEN = 4.0  # English text under a vocabulary of 30k to 150k
ASSISTANT_SHARE = 0.6  # of a chat corpus's bytes
BYTES_PER_POSITION = {"fixed": 12, "per_k": 3.3}  # a teacher row on disk: 45 bytes at K = 10 (design.md section 5)
ACCELERATOR_FLOPS = 4e14 * 0.4  # bf16 at 40% utilisation of a current data-centre card
CPU_FLOPS = 5e10  # float32 on one core
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}  # of a weight, by distill.precision; at ZeRO stage 1 of its gradient too
GRADIENT_BYTES = 4  # past stage 1 micro-batches are summed in float32 (workers/zero.py)
MASTER_BYTES = 4  # of a trained weight in the optimizer, float32 whatever the precision
MOMENT_BYTES = 8  # of Adam's two moments of a trained weight, float32
GIB = 1 << 30
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"^(.*)-(\d+)-of-(\d+)\.safetensors$")
SHOWN = 3  # missing files named in one problem
# One of them is there where a model has its tokenizer; the first two are what models are published with today.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip


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


@dataclass(frozen=True)
class TrainingState:
    """Bytes of one worker, whatever the batch. `optimizer` is the master weights with their moments."""

    weights: float
    gradients: float
    optimizer: float


def model_size(folder: str, *, name: str | None = None) -> ModelSize | None:
    """The sizes of a local model folder, from headers alone; None for a reference that is not local.

    Raises ConfigError, which calls the model `name`, for a config.json that cannot be read.
    """
    path = Path(folder)
    if not _is_local(folder):
        return None
    parameters = total = 0
    matrices: list[tuple[str, int, int]] = []
    for file in _weights(path):
        header, _ = _header(file)
        parameters += sum(math.prod(tensor["shape"]) for tensor in header.values())
        total += file.stat().st_size
        shapes = {name: each["shape"] for name, each in header.items()}
        matrices += [(name, shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2]
    vocabulary = _fields(path, name or folder).get("vocab_size") or 0
    assert isinstance(vocabulary, int)
    return ModelSize(parameters, total, vocabulary, tuple(matrices))


def _sizes(config: FusionConfig) -> dict[str, ModelSize | None]:
    """By model; None also for one whose config.json cannot be read, which is a problem of its own."""
    sizes: dict[str, ModelSize | None] = {}
    for model in config.models.values():
        try:
            sizes[model.name] = model_size(model.path, name=model.name)
        except ConfigError:
            sizes[model.name] = None
    return sizes


def _is_local(path: str) -> bool:
    return not is_url(path) and Path(path).is_dir()


def _weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _object(file: Path, model: str) -> dict[str, object]:
    """The JSON object in a file of a model. Raises ConfigError naming both for what is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"model {model!r}: {file} cannot be read as JSON ({why}): fetch it again") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"model {model!r}: {file} holds a {type(value).__name__}, expected a JSON object: fetch it again"
        )
    return value


def _fields(folder: Path, model: str) -> dict[str, object]:
    """What config.json says of the model, the fields of its language model over the others. Raises ConfigError for what is not of that form."""
    file = folder / "config.json"
    fields = _object(file, model)
    text = fields.get("text_config") or {}
    if not isinstance(text, dict):
        raise ConfigError(
            f"model {model!r}: `text_config` in {file} is a {type(text).__name__}, expected a JSON object: fetch it again"
        )
    fields |= text
    size = fields.get("vocab_size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise ConfigError(
            f"model {model!r}: `vocab_size` in {file} is {size!r}, expected a positive whole number: fetch it again"
        )
    return fields


def _header(file: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Tensors of a safetensors file (name to dtype, shape, data_offsets) and the bytes that the file should have; ({}, -1) for an unreadable header."""
    try:
        with open(file, "rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            header = json.loads(handle.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
        for tensor in header.values():
            math.prod(int(size) for size in tensor["shape"])
        return header, 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (OSError, struct.error, ValueError, AttributeError, TypeError, LookupError, RecursionError):
        return {}, -1


def plan_table(config: FusionConfig) -> tuple[Table, list[str]]:
    """The table of nodes with their estimates, and the problems found. Raises ConfigError as build_graph does."""
    graph = build_graph(config)
    sizes = _sizes(config)
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
        on_gpu, on_host = _placed(config, training_state(config, pivot))
        return Estimate(pivot.bytes, seconds, head + (on_gpu if config.resources.distill.gpus else on_host))
    if node.stage == "merge":
        targets = sum(name != SFT for name in graph.distill)
        return Estimate(pivot.bytes, (targets + 1) * pivot.bytes / 1e9, float(config.merge.max_bytes_in_flight))
    return Estimate(device_seconds=None)


def engine_of(config: FusionConfig, model: ModelConfig) -> Sizes | None:
    """What the engine of a local model's teacher is started with; None for a model that is not local or whose config does not tell its sizes."""
    if not _is_local(model.path):
        return None
    try:
        shape = shape_of(_fields(Path(model.path), model.name).get)
    except (ConfigError, KeyError, TypeError, ZeroDivisionError, AssertionError):  # a field of another form
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
        return f"teach:{model.name} is not known before a config.json that tells its sizes is here"
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


def training_state(config: FusionConfig, pivot: ModelSize) -> TrainingState:
    """What ZeRO leaves of the state of training: stage 1 divides the optimizer's over the workers, 2 the gradients too, 3 the weights too."""
    distill, workers = config.distill, config.resources.distill.max_workers
    trained = pivot.parameters if distill.lora is None else adapter_parameters(distill.lora, pivot)
    held = pivot.parameters + (0 if distill.lora is None else trained)
    compute = COMPUTE_BYTES[distill.precision]
    # At stage 3 the optimizer works on weights of its own type and place as they are.
    shared = distill.zero_stage == 3 and compute == MASTER_BYTES and _offload(config, "offload_optimizer") is None
    return TrainingState(
        weights=compute * held / (workers if distill.zero_stage == 3 else 1),
        gradients=compute * trained if distill.zero_stage == 1 else GRADIENT_BYTES * trained / workers,
        optimizer=(MOMENT_BYTES + (0 if shared else MASTER_BYTES)) * trained / workers,
    )


def _offload(config: FusionConfig, name: str) -> str | None:
    """The device that `distill.deepspeed` offloads to, of `offload_optimizer` or `offload_param`."""
    zero = config.distill.deepspeed.get("zero_optimization")
    entry = zero.get(name) if isinstance(zero, Mapping) else None
    device = entry.get("device") if isinstance(entry, Mapping) else None
    return None if device in (None, "none") else str(device)


def _placed(config: FusionConfig, state: TrainingState) -> tuple[float, float]:
    """Bytes of one worker's state on its GPU (without one: 0) and on its host. What is offloaded to a disk is in neither."""
    on_gpu, on_host = state.gradients, 0.0
    weights_to = _offload(config, "offload_param") if config.distill.zero_stage == 3 else None
    for size, device in ((state.weights, weights_to), (state.optimizer, _offload(config, "offload_optimizer"))):
        on_gpu += size if device is None else 0
        on_host += size if device == "cpu" else 0
    return (on_gpu, on_host) if config.resources.distill.gpus else (0.0, on_gpu + on_host)


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
    sizes = _sizes(config)
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
        yield from _model_problems(model)
    pivot = sizes[config.pivot.name]
    if pivot is not None and any(not node.artifact.sealed for node in graph.distill.values()):
        yield from _memory_problems(config, graph, pivot)
    if config.distill.batch_size < config.resources.distill.max_workers:
        yield (
            f"distill.batch_size {config.distill.batch_size} is below resources.distill.max_workers "
            f"{config.resources.distill.max_workers}: some workers would have no rows"
        )


def _memory_problems(config: FusionConfig, graph: Graph, pivot: ModelSize) -> Iterator[str]:
    """Where the state of training alone, which no setting of the batch changes, has no room."""
    resources, state = config.resources.distill, training_state(config, pivot)
    on_gpu, on_host = _placed(config, state)
    if resources.gpus and resources.gpu_memory_gb is not None:
        room = resources.gpu_memory_gb * GIB * min(1.0, resources.gpus)
        what = f"resources.distill.gpu_memory_gb is {resources.gpu_memory_gb:g}"
        if resources.gpus < 1:
            what += f", of which a worker has {resources.gpus:g}"
        if on_gpu > room:
            yield _no_room(config, f"{_size(on_gpu)} on its GPU", what, ways=_ways(config))
    local = config.resources.address is None and not os.environ.get("RAY_ADDRESS")
    workers, branches = resources.max_workers, 1
    if resources.memory_gb is not None:
        room, what = resources.memory_gb * GIB, f"resources.distill.memory_gb is {resources.memory_gb:g}"
    elif local:
        todo = sum(not node.artifact.sealed for node in graph.distill.values())
        branches = max(1, min(config.resources.branches, todo))
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (workers * branches)
        what = f"this machine has {_size(room)} for each of {workers * branches} workers"
        if branches > 1:
            what += f" ({branches} branches side by side)"
    else:
        return
    if on_host > room:
        held = f"{_size(on_host)} offloaded to its host" if resources.gpus else _size(on_host)
        yield _no_room(config, held, what, ways=_ways(config, on_host=True, branches=branches))


def _no_room(config: FusionConfig, held: str, what: str, *, ways: Sequence[str]) -> str:
    *others, last = ways
    advice = f"{', '.join(others)}, or {last}" if others else last
    stage = config.distill.zero_stage
    return f"distill: a worker holds {held} of the state of training (weights, gradients, optimizer) at distill.zero_stage {stage}, and {what}: {advice}"


def _ways(config: FusionConfig, *, on_host: bool = False, branches: int = 1) -> list[str]:
    """What would make room, of what is not set yet."""
    distill, resources = config.distill, config.resources.distill
    ways = []
    more = f"raise resources.distill.max_workers from {resources.max_workers}"
    if on_host and resources.memory_gb is None:
        more += ", over more machines (resources.address)"
    # What a GPU's host holds is offloaded state, which every stage divides.
    offloaded = on_host and resources.gpus > 0
    if distill.zero_stage < 3 and not offloaded:
        ways.append("set distill.zero_stage to 3" + (f" and {more}" if resources.max_workers == 1 else ""))
    if (distill.zero_stage >= 2 and (distill.zero_stage == 3 or resources.max_workers > 1)) or offloaded:
        ways.append(more)
    if branches > 1:
        ways.append("set resources.branches to 1")
    if not on_host and _offload(config, "offload_optimizer") is None:
        ways.append("set distill.deepspeed.zero_optimization.offload_optimizer to {device: cpu}")
    if distill.lora is None:
        ways.append("train adapters alone (distill.lora)")
    return [*ways, "take a smaller pivot"]


def _model_problems(model: ModelConfig) -> Iterator[str]:
    """What is missing or broken in a local model folder."""
    if not _is_local(model.path):
        return
    for look in (_config_problems, _weight_problems, _index_problems, _tokenizer_problems):
        try:
            yield from look(model, Path(model.path))
        except ConfigError as error:
            yield str(error)


def _config_problems(model: ModelConfig, path: Path) -> Iterator[str]:
    """None of its own: a config.json that is not of its form raises."""
    _fields(path, model.name)
    yield from ()


def _weight_problems(model: ModelConfig, path: Path) -> Iterator[str]:
    files = _weights(path)
    for file in files:
        wanted = _header(file)[1]
        if wanted != file.stat().st_size:
            what = (
                "has no readable header" if wanted < 0 else f"has {file.stat().st_size} bytes, its header says {wanted}"
            )
            yield f"model {model.name!r}: {file} {what}: it is truncated or damaged; fetch it again"
    if not files:
        yield f"model {model.name!r}: {path} holds no safetensors weights; pickled weights are not loaded: convert them first"


def _index_problems(model: ModelConfig, path: Path) -> Iterator[str]:
    """Shards that are not there, by the index or, without one, by the numbers in the names of the others."""
    index, names = path / INDEX, {file.name for file in _weights(path)}
    if index.exists():
        shards = _object(index, model.name).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            yield f"model {model.name!r}: `weight_map` in {index} does not name a file for each tensor: fetch it again"
            return
        for missing in sorted(set(shards.values()) - names):
            yield f"model {model.name!r}: {index} names {missing}, which is not there: fetch it again"
        return
    numbered = [match for name in sorted(names) if (match := SHARD.match(name))]
    if not numbered or "model.safetensors" in names:
        return
    for stem, count in sorted({(match[1], match[3]) for match in numbered}):
        all_of = (f"{stem}-{number:0{len(count)}}-of-{count}.safetensors" for number in range(1, int(count) + 1))
        missing = [name for name in all_of if name not in names]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            yield (
                f"model {model.name!r}: {path} holds {int(count) - len(missing)} of {int(count)} shards, "
                f"{', '.join(missing[:SHOWN])}{more} not: fetch what is missing, and {INDEX}"
            )
            return
    if isinstance(model, PivotConfig):
        yield f"model {model.name!r}: {path} has shards and no {INDEX}, which training and merging read: fetch it"


def _tokenizer_problems(model: ModelConfig, path: Path) -> Iterator[str]:
    if not any(file.is_file() for pattern in TOKENIZERS for file in path.glob(pattern)):
        yield f"model {model.name!r}: {path} has no tokenizer ({TOKENIZERS[0]} or {TOKENIZERS[1]}): fetch it from where the model is from"
    template = (path / "chat_template.jinja").exists()
    settings = path / "tokenizer_config.json"
    if settings.exists():
        template = bool(_object(settings, model.name).get("chat_template")) or template
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

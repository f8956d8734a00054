"""FusionConfig: one frozen pydantic model a section of the run's YAML (design.md section 3). Imports no torch and no ray.

`load_config(path, overrides)` reads the YAML, applies `key.sub=value` overrides, resolves relative paths against the YAML's own folder and refuses
unknown keys with the nearest known one named. Called by the command line and the jobs; everything below receives plain values.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
EngineArgs = dict[str, JsonValue]
# vLLM's arguments that change what a teacher says: of the recipe, which an artefact's key holds, never of a machine.
RESULT_ARGUMENTS = {
    "config_format", "default_mm_loras", "disable_sliding_window", "dtype", "enable_lora", "hf_config_path", "hf_overrides", "kv_cache_dtype",
    "load_format", "lora_dtype", "max_model_len", "model_class_overrides", "quantization", "quantization_config",
}  # fmt: skip
# What is said elsewhere in the config or must be as it is; by argument.
OWN_ARGUMENTS = {
    "model": "sources.N.path (or pivot.path) names the model",
    "model_weights": "sources.N.path (or pivot.path) names the model",
    "tokenizer": "the model's own is used",
    "tokenizer_mode": "the model's own tokenizer is used",
    "skip_tokenizer_init": "texts are tokenized outside of the engine",
    "revision": "sources.N.revision (or pivot.revision) names it",
    "code_revision": "sources.N.revision (or pivot.revision) names it",
    "tokenizer_revision": "sources.N.revision (or pivot.revision) names it",
    "trust_remote_code": "sources.N.trust_remote_code (or pivot.trust_remote_code) says it",
    "seed": "run.seed says it",
    "logprobs_mode": "rows hold the logprobs of the model as it is",
    "runner": "logprobs come from a model that generates",
    "convert": "logprobs come from a model that generates",
}
# What the config says of DeepSpeed's keys itself: the key to set in the place of each.
OWN_DEEPSPEED = {
    "train_batch_size": "distill.batch_size",
    "train_micro_batch_size_per_gpu": "distill.micro_batch_size",
    "gradient_accumulation_steps": "distill.batch_size (the micro-batches of a step follow from it)",
    "managed_gradient_accumulation": "distill.batch_size (the micro-batches of a step follow from it)",
    "zero_optimization.stage": "distill.zero_stage",
    "fp16": "distill.precision",
    "bf16": "distill.precision",
    "bfloat16": "distill.precision",
    "amp": "distill.precision",
    "torch_autocast": "distill.precision",
    "gradient_clipping": "distill.max_grad_norm",
    "optimizer": "distill.learning_rate, distill.betas and distill.weight_decay",
    "scheduler": "distill.schedule, distill.learning_rate and distill.warmup_ratio",
}


class ConfigError(ValueError):
    """A config the user must mend; the message names the key. The command line exits with 2."""


class Section(BaseModel):
    # Built when first used, which a command that takes no run's config never does.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


def _refuse_own(given: EngineArgs, key: str) -> None:
    for name in OWN_ARGUMENTS.keys() & given.keys():
        raise ValueError(f"{key}.{name} cannot be set: {OWN_ARGUMENTS[name]}; leave it out")


class RunConfig(Section):
    name: Name = "run"
    storage: str = Field("runs", description="any fsspec URL; a relative path is relative to the working directory")
    seed: int = Field(0, ge=0)


class EndpointConfig(Section):
    """A running OpenAI-compatible vLLM server of the same model, asked for prompt logprobs in the place of an engine of ours."""

    url: str = Field(description="its base, such as http://host:8000/v1")
    model: str | None = Field(None, description="the model's id there; null: the one that the server has")
    api_key_env: str | None = Field(
        None, description="environment variable (or, with _FILE behind it, one that names a file) with the server's key"
    )
    concurrency: int = Field(16, ge=1, description="requests that one actor of resources.teach keeps open")
    timeout_s: float = Field(600.0, gt=0)
    attempts: int = Field(8, ge=1, description="at one request, before the stage stops")

    @model_validator(mode="after")
    def _plain_url(self) -> "EndpointConfig":
        if not re.match(r"^https?://[^/\s]+", self.url):
            raise ValueError(
                f"url is {self.url.rpartition('@')[2]!r}, not an http or https URL: give the server's base, such as http://host:8000/v1"
            )
        if "@" in self.url or "?" in self.url:
            raise ValueError(
                "url holds a user, a password or a query, which would be stored with the run: leave them out and name the key's variable in api_key_env"
            )
        return self


class ModelConfig(Section):
    """A model reference: a local folder, an object-store URL or a hub id with a revision."""

    name: Name
    path: str = Field(min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    endpoint: EndpointConfig | None = Field(
        None,
        description="teach asks this server instead of starting an engine; the model's tokenizer and template are still read from path. What it serves "
        "(weights, dtype, quantisation) is taken on trust and is not in the key",
    )


class PivotConfig(ModelConfig):
    name: Name = "pivot"


CorpusFormat = Literal["auto", "sharegpt", "messages", "alpaca", "prompt"]


class MixtureSource(Section):
    """One source of `corpus.mixture`. Its rows have its name as their dataset, and before the ids that they bring along."""

    path: str | tuple[str, ...]
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the rows, against the others'")
    max_rows: int | None = Field(None, ge=1, description="conversations taken from it at most")
    format: CorpusFormat | None = Field(None, description="null: corpus.format")
    name: Name | None = Field(None, description="null: the name of its first file")

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        return self.name or (PurePosixPath(self.paths[0]).name if self.paths else "")


class CorpusConfig(Section):
    path: str | tuple[str, ...] | None = Field(None, description="a conversation file or several, one after another")
    mixture: tuple[MixtureSource, ...] = Field(
        (), description="in the place of path: sources whose rows are interleaved by weight"
    )
    format: CorpusFormat = "auto"
    rows_per_shard: int = Field(256, ge=1)
    max_rows: int | None = Field(None, ge=1, description="conversations of the whole corpus at most")
    deduplicate: bool | None = Field(
        None,
        description="leave out conversations whose messages are those of an earlier one; null: in a mixture, as public sets hold each other's rows, and not "
        "with path, whose file is taken as it stands. A copy without an id of its own is always left out: nothing could tell the two apart",
    )
    shuffle_rows: int = Field(
        0,
        ge=0,
        le=100_000,
        description="shuffle within a buffer of so many conversations, which is held in memory; 0 keeps the order",
    )
    seed: int = Field(
        0,
        ge=0,
        description="of the mixture's order and of shuffle_rows; not run.seed, so that training can be repeated on the same rows",
    )
    max_rejected: float = Field(0.01, ge=0, le=1, description="share of malformed rows past which the run fails")
    template: Literal["native", "pivot"] = "native"

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file, of a mixture source by source."""
        own = (self.path,) if isinstance(self.path, str) else self.path or ()
        return own + tuple(path for source in self.mixture for path in source.paths)

    @property
    def removes_copies(self) -> bool:
        return bool(self.mixture) if self.deduplicate is None else self.deduplicate

    @model_validator(mode="after")
    def _one_origin(self) -> "CorpusConfig":
        if self.path and self.mixture:
            raise ValueError(
                "corpus.path and corpus.mixture are both set: keep path for files that are read one after another, mixture for sources with weights"
            )
        if not self.path and not self.mixture:
            raise ValueError(
                "neither corpus.path nor corpus.mixture names a file: set path to a conversation file (or a list), or mixture to sources with path and weight"
            )
        labels = [source.label for source in self.mixture]
        for number, source in enumerate(self.mixture):
            if not source.path or not all(source.paths):
                raise ValueError(f"corpus.mixture.{number}.path is empty: give the path of a conversation file")
            if source.label in labels[:number]:
                raise ValueError(
                    f"two sources of corpus.mixture are named {source.label!r}: give corpus.mixture.{number} a `name` of its own"
                )
        return self


class TeachConfig(Section):
    top_k: int = Field(10, ge=1, le=1024)
    max_length: int = Field(
        2048,
        ge=8,
        description="tokens; a longer row ends with the last assistant turn that fits; rows and turns cut are counted",
    )
    engine: EngineArgs = Field(default_factory=dict, description="vLLM engine arguments that change the result")

    @field_validator("engine", mode="before")
    @classmethod
    def _arguments(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(
                "teach.engine holds vLLM engine arguments, such as {quantization: fp8}; a teacher that is served elsewhere is told of its model: "
                "set sources.0.endpoint.url (or pivot.endpoint.url) to the server's base, such as http://host:8000/v1"
            )
        return value

    @field_validator("engine")
    @classmethod
    def _of_the_recipe(cls, value: EngineArgs) -> EngineArgs:
        _refuse_own(value, "teach.engine")
        return value


class AlignConfig(Section):
    method: Literal["spans", "fusechat"] = "spans"
    map: Literal["exact", "prefix", "canonical", "min_edit", "statistics", "shares"] = "canonical"
    chain: bool = Field(
        True, description="spans: tell the source's own text by the chain rule over its tokens; off: by the map alone"
    )
    inside: Literal["skip", "label", "condition"] = "skip"
    duplicates: Literal["sum", "first"] = Field(
        "sum", description="source ids that meet on one pivot id; method fusechat keeps the first, as published"
    )
    choose: Literal["min_ce", "avg_ce", "source", "pivot"] = Field(
        "min_ce", description="avg_ce: both teach, weighed by how well each tells the text (FuseLLM)"
    )
    per: Literal["sequence", "token"] = "sequence"
    unit: Literal["byte", "token"] = "byte"

    @property
    def problem(self) -> str | None:
        """Why these settings cannot run together. Told by `workers/align_setup.check_supported` and `plan`."""
        if self.method == "spans":
            return None
        if self.map not in ("exact", "min_edit", "statistics"):
            return (
                f"align.map is {self.map!r}, a map over bytes, which align.method: {self.method} does not take; "
                "set align.map to exact (the papers' EM), min_edit (MinED) or statistics (MS)"
            )
        if self.inside != "skip":
            return f"align.inside is {self.inside!r}, which align.method: {self.method} does not take (it knows no byte spans); leave it out"
        return None


# One value for all of what there is, or a list with one each. The tags keep the two out of each other's error messages.
_ONE, _EACH = "for all", "one each"
_ONE_OR_EACH = Discriminator(lambda value: _EACH if isinstance(value, list | tuple) else _ONE)


class LoraConfig(Section):
    """Low-rank adapters beside the pivot's linear layers (arXiv 2106.09685): they alone are trained, then merged into its weights."""

    rank: int = Field(16, ge=1, le=4096, description="columns of an adapter's two matrices")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="an adapter's output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that are left out in training")
    targets: Annotated[
        Annotated[Literal["all-linear"], Tag(_ONE)]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), Tag(_EACH)],
        _ONE_OR_EACH,
    ] = Field(
        "all-linear",
        description="all-linear: every linear layer but the output layer; or a list of the ends of layers' names, such as q_proj or mlp.up_proj",
    )


class DistillConfig(Section):
    fusion: Literal["top_k", "none"] = Field("top_k", description="none: the SFT-only control")
    branches: Literal["pairwise", "all"] = Field(
        "pairwise",
        description="a target for each source, or one (named all) that has of each conversation the best source's distributions",
    )
    lm_weight: float = Field(0.9, ge=0, le=1)
    on_pivot_win: Literal["distill", "sft"] = "distill"
    divergence: Literal["ce", "kl", "reverse_kl", "jsd"] = "ce"
    tail: Literal["renormalise", "bucket"] = "renormalise"
    temperature: float = Field(1.0, gt=0)
    epochs: int = Field(3, ge=1)
    batch_size: int = Field(128, ge=1, description="conversations in a global batch, whatever the number of workers")
    micro_batch_size: int = Field(
        4,
        ge=1,
        description="conversations in one forward of one worker; with packing, lines of up to max_length tokens",
    )
    packing: bool = Field(
        False,
        description="lay conversations one after the other in lines of up to max_length tokens instead of padding each to the longest; none sees another",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters only and merge them into the exported model; null trains every weight. Adapters want a larger learning_rate, about 1e-4",
    )
    heldout_share: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of the conversations that no step trains on; bits per byte are measured on them",
    )
    heldout_every: int = Field(50, ge=1, description="optimizer steps between two measurements on the held-out rows")
    learning_rate: float = Field(5e-6, gt=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(2048, ge=8)
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="compute; master weights are always float32"
    )
    export_dtype: Literal["float32", "bfloat16", "float16", "pivot"] = "pivot"
    gradient_checkpointing: bool = False
    zero_stage: Literal[1, 2, 3] = 2
    deepspeed: dict[str, object] = Field(default_factory=dict, description="DeepSpeed keys laid over the defaults")
    head_chunk: int = Field(1024, ge=1, description="positions whose full-vocabulary logits exist at a time")
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps")
    sft_control: bool = Field(False, description="also train the SFT-only control on the same data and steps")

    @field_validator("deepspeed")
    @classmethod
    def _not_said_elsewhere(cls, value: dict[str, object]) -> dict[str, object]:
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(
                f"distill.deepspeed.zero_optimization is {zero!r}, expected DeepSpeed's keys of it, such as {{offload_optimizer: {{device: cpu}}}}"
            )
        given = [*value, *(f"zero_optimization.{key}" for key in zero)]
        for key in given:
            if key in OWN_DEEPSPEED:
                raise ValueError(f"distill.deepspeed.{key} cannot be set: leave it out and set {OWN_DEEPSPEED[key]}")
        return value


# A parameter of each merged model.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Weights = Annotated[Annotated[Finite, Tag(_ONE)] | Annotated[tuple[Finite, ...], Tag(_EACH)], _ONE_OR_EACH]
Shares = Annotated[Annotated[Share, Tag(_ONE)] | Annotated[tuple[Share, ...], Tag(_EACH)], _ONE_OR_EACH]


class MergeMethod(Section):
    """One merge of all targets. `name` labels the fused model. Which method takes which parameters, and what each is when it is left out, is in
    merging/parameters.py, which refuses the others; the bounds of their values are here, for a run's config and for a merge file alike."""

    model_config = ConfigDict(serialize_by_alias=True)

    method: str
    name: Name | None = None
    granularity: Literal["parameter", "matrix", "layer", "model"] | None = None
    variant: Literal["paper", "fusechat_release", "mergekit"] | None = None
    select_topk: float | None = Field(None, gt=0, le=1)
    square: bool | None = None
    weight: Weights | None = None
    density: Shares | None = Field(None, description="share of a task vector's elements that is kept")
    gamma: Shares | None = Field(None, description="breadcrumbs: share of the largest elements that is left out")
    epsilon: Shares | None = Field(None, description="della: half the range of the keep probabilities")
    scale: Finite | None = Field(None, alias="lambda", description="times the sum of the task vectors")
    normalize: bool | None = None
    rescale: bool | None = Field(None, description="dare, della: divide what is kept by its keep probability")
    seed: int | None = Field(None, ge=0, lt=1 << 64, description="dare, della")
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False, description="varm: softmax of the ratios")
    t: Share | None = Field(None, description="slerp: 0 is the base, 1 the other model")
    normalize_weights: bool | None = None
    eps: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_iter: int | None = Field(None, ge=1)
    tol: float | None = Field(None, ge=0, allow_inf_nan=False)
    filter_wise: bool | None = Field(None, description="model_stock: one factor a row instead of one a tensor")

    @property
    def label(self) -> str:
        return self.name or self.method

    @property
    def parameters(self) -> dict[str, object]:
        """What was set, as keyword arguments for the method."""
        return self.model_dump(exclude={"method", "name"}, exclude_none=True, by_alias=False)


class MergeConfig(Section):
    methods: tuple[MergeMethod, ...] = Field(
        default_factory=lambda: (MergeMethod(method="varm"),),
        min_length=1,
        description="the first one is the model that is served",
    )
    dtype: Literal["float32", "bfloat16", "float16", "pivot"] = "pivot"
    max_bytes_in_flight: int = Field(1 << 30, ge=1 << 16)
    max_shard_bytes: int = Field(5 << 30, ge=1 << 10)

    @model_validator(mode="after")
    def _labels_differ(self) -> "MergeConfig":
        labels = [method.label for method in self.methods]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(f"two merge methods have the label {sorted(twice)[0]!r}: give one of them a `name`")
        return self


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port")
    max_model_len: int = Field(2048, ge=8)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(32, ge=1)
    max_ongoing_requests: int = Field(128, ge=1)
    api_key_env: str = Field(
        "FUSION_RAY_API_KEY", description="environment variable with the key that clients must send"
    )
    engine: EngineArgs = Field(default_factory=dict)


class JudgeConfig(Section):
    """MT-Bench style single-answer grading by any OpenAI-compatible endpoint."""

    questions: str
    prompts: str
    references: str | None = None
    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(8, ge=1)
    max_tokens: int = Field(2048, ge=1)


class EvaluateConfig(Section):
    questions: str | None = Field(None, description="FastChat question file with exact references in `reference`")
    heldout: str | None = Field(None, description="conversations for held-out bits per byte, any format of the corpus")
    max_tokens: int = Field(1024, ge=1)
    max_length: int = Field(2048, ge=8, description="tokens of a held-out row or of a question with its context")
    concurrency: int = Field(16, ge=1)
    bootstrap: int = Field(2000, ge=100)
    judge: JudgeConfig | None = None


class WorkerResources(Section):
    """One pool or worker group: actors of `cpus` and `gpus` each, between `min_workers` and `max_workers`."""

    min_workers: int = Field(1, ge=1)
    max_workers: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float | None = Field(None, gt=0)
    engine: EngineArgs = Field(
        default_factory=dict, description="engine arguments that change speed and memory, not the result"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerResources":
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is above max_workers {self.max_workers}")
        return self


class TeachResources(WorkerResources):
    """The pool of teachers."""

    @field_validator("engine")
    @classmethod
    def _of_the_machine(cls, value: EngineArgs) -> EngineArgs:
        _refuse_own(value, "resources.teach.engine")
        changing = sorted(RESULT_ARGUMENTS & set(value))
        if changing:
            raise ValueError(
                f"resources.teach.engine.{changing[0]} changes what a teacher says, and what is said here is not in the key of its rows: "
                f"move it to teach.engine.{changing[0]}"
            )
        return value

    nodes: int = Field(
        1,
        ge=1,
        description="for a model larger than a machine: nodes of one teacher, with `gpus` and `cpus` in each; the layers are split over the nodes",
    )


class DistillResources(WorkerResources):
    """The workers of one training."""

    gpu_memory_gb: float | None = Field(
        None, gt=0, description="memory of one GPU, for plan's check that training has room; null: not checked"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_many(cls, value: object) -> object:
        """All of max_workers, unless it is said that fewer will do: then a training goes on with what is left of its nodes, and grows again."""
        if isinstance(value, dict) and "max_workers" in value and "min_workers" not in value:
            return value | {"min_workers": value["max_workers"]}
        return value


class ResourcesConfig(Section):
    """Where and how wide a run goes; alone differs between a laptop and a cluster and never enters a key."""

    address: str | None = Field(None, description="a running Ray cluster (`auto`, host:port); none starts a local one")
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of the local cluster; default: the machine's")
    object_store_gb: float = Field(1.0, gt=0.07)
    branches: int = Field(2, ge=1, description="stages of different branches that may run side by side")
    teach: TeachResources = Field(default_factory=TeachResources)
    align: WorkerResources = Field(default_factory=WorkerResources)
    distill: DistillResources = Field(default_factory=DistillResources)
    merge: WorkerResources = Field(default_factory=WorkerResources)
    serve: WorkerResources = Field(default_factory=WorkerResources)
    evaluate: WorkerResources = Field(default_factory=WorkerResources)


class FusionConfig(Section):
    run: RunConfig = Field(default_factory=RunConfig)
    pivot: PivotConfig
    sources: tuple[ModelConfig, ...] = Field(min_length=1)
    corpus: CorpusConfig
    teach: TeachConfig = Field(default_factory=TeachConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    merge: MergeConfig = Field(default_factory=MergeConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The pivot and every source by name, the pivot first."""
        return {model.name: model for model in (self.pivot, *self.sources)}

    @model_validator(mode="after")
    def _names_differ(self) -> "FusionConfig":
        names = [self.pivot.name, *(source.name for source in self.sources)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"two models are named {sorted(twice)[0]!r}: give each of pivot and sources its own `name`"
            )
        if "sft" in names:
            raise ValueError("`sft` is the name of the SFT-only control: name the model otherwise")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> FusionConfig:
    """The config in the YAML file `path` with `key.sub=value` overrides laid over it (values are YAML).

    Raises ConfigError, naming the key, for anything that is not a valid config.
    """
    path = Path(path)
    raw = read_mapping(path, FusionConfig, kind="config", example="jobs/configs/demo.yaml")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, folder=path.parent)


def parse_config(raw: dict[str, object], folder: Path | None = None) -> FusionConfig:
    """Validate a plain mapping; relative paths of models and data are taken relative to `folder`. Raises ConfigError."""
    config = validate(FusionConfig, raw)
    return config if folder is None else _resolve_paths(config, folder.resolve())


SectionT = TypeVar("SectionT", bound=Section)


def read_mapping(path: Path, section: type[Section], *, kind: str, example: str) -> dict[str, object]:
    """The mapping in a YAML file with the keys of `section`, not yet validated. Raises ConfigError, which calls it `kind` and names an `example`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the {kind} {str(path)!r}: {getattr(error, 'strerror', None) or error}; give the path of a YAML file such as {example}"
        ) from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold a mapping with the keys {', '.join(keys_of(section))}; it holds {type(raw).__name__}"
        )
    return raw


def validate(section: type[SectionT], raw: object) -> SectionT:
    """Raises ConfigError with one line a problem, which names the key and, where it is not known, the nearest one that is."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, section))) from error


def _apply_override(raw: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, for example run.name=mine")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: object = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(parts[:depth])} is a list of {len(node)}; {part!r} is not an index into it"
                )
            index = int(part)
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(
                f"override {override!r}: {'.'.join(parts[:depth])} is the value {node!r}, which has no keys"
            )


def _explain(error: ValidationError, section: type[Section]) -> Iterator[str]:
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "too_short" and any(_inside(other["loc"], problem["loc"]) for other in problems):
            continue  # a list counts as too short when its items are wrong, which is told
        loc = tuple(part for part in problem["loc"] if part not in (_ONE, _EACH))
        where = ".".join(str(part) for part in loc)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(section, loc[:-1])
            yield f"unknown key `{where}`: {nearest(str(loc[-1]), known)}"
        elif problem["type"] == "missing":
            yield f"missing key `{where}`"
        else:
            given = "" if isinstance(problem["input"], dict | list) else f" (given: {problem['input']!r})"
            key = f"`{where}`: " if where else ""
            yield f"{key}{problem['msg'].removeprefix('Value error, ')}{given}"


def _inside(loc: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


def nearest(key: str, known: Sequence[str]) -> str:
    """What to tell about a key that is not known."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys that a section takes. A field that can only be null is there to say why the key is refused."""
    fields = section.model_fields.items()
    return [field.alias or name for name, field in fields if field.annotation is not type(None)]


def _known_keys(section: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = section
    for part in loc:
        field = _field(model, part)
        if field is None:
            continue
        found = _section_of(field.annotation)
        if found is None:
            return []
        model = found
    return keys_of(model)


def _field(model: type[BaseModel], key: int | str) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key == (field.alias or name)), None)


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg)) is not None), None)


ModelT = TypeVar("ModelT", bound=ModelConfig)

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")
HUB_ID = re.compile(r"^\w[\w.-]*(/\w[\w.-]*)?$")  # name, or owner/name


def is_url(path: str) -> bool:
    """True for an fsspec URL such as s3://bucket/key, False for a plain path or a hub id."""
    return bool(_URL.match(path))


def resolve_path(path: str, folder: Path, *, may_be_hub_id: bool = False) -> str:
    """A path of a YAML file in `folder`, absolute. URLs stay as they are, and so does what is not there and has the form of a hub id."""
    if is_url(path) or Path(path).expanduser().is_absolute():
        return path if is_url(path) else str(Path(path).expanduser())
    resolved = (folder / path).resolve()
    if may_be_hub_id and HUB_ID.match(path) and not resolved.exists():
        return path
    return str(resolved)


def _resolve_paths(config: FusionConfig, folder: Path) -> FusionConfig:
    """Relative paths of models and data are relative to the YAML's folder; `run.storage` is relative to the working directory."""

    def model(ref: ModelT) -> ModelT:
        return ref.model_copy(update={"path": resolve_path(ref.path, folder, may_be_hub_id=True)})

    def data(path: str | None) -> str | None:
        return None if path is None else resolve_path(path, folder)

    judge = config.evaluate.judge
    if judge is not None:
        judge = judge.model_copy(
            update={key: data(getattr(judge, key)) for key in ("questions", "prompts", "references")}
        )
    corpus = config.corpus.model_copy(
        update={
            "path": None
            if config.corpus.mixture
            else tuple(resolve_path(path, folder) for path in config.corpus.paths),
            "mixture": tuple(
                source.model_copy(update={"path": tuple(resolve_path(path, folder) for path in source.paths)})
                for source in config.corpus.mixture
            ),
        }
    )
    storage = config.run.storage
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"storage": storage if is_url(storage) else str(Path(storage).expanduser().resolve())}
            ),
            "pivot": model(config.pivot),
            "sources": tuple(model(source) for source in config.sources),
            "corpus": corpus,
            "evaluate": config.evaluate.model_copy(
                update={
                    "questions": data(config.evaluate.questions),
                    "heldout": data(config.evaluate.heldout),
                    "judge": judge,
                }
            ),
        }
    )

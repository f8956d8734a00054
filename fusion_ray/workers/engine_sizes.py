"""What a teacher's engine is given of its machine, from the sizes of the model: tokens a step, memory, parallel workers. No vLLM, no torch.

Called by workers/engine.py, which starts the engine with it, by stages/teach.py, and by plan.py, which shows it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fusion_ray.config import EngineArgs

LOGITS_BYTES = (
    1 << 30
)  # of one step: tokens x vocabulary x (float32 logits and log-softmax), which vLLM's start-up does not profile
TOKENS_A_STEP = 8192
LEAST_TOKENS_A_STEP = 128
# vLLM holds flat logprobs as Python floats until a call returns: about 100 bytes each (stack notes, 2.3).
LOGPROB_BYTES = 100
ROW_BYTES = 8  # of a token and its logprob
HOST_BYTES = 1 << 30
PROMPTS_A_CALL = 64
CPU_CACHE_BYTES = 1 << 28
CPU_CACHE_PROMPTS = 8
GPU_SHARE = 0.85
GPU_RESERVED = 0.08  # of the card: its context, activations and fragmentation


@dataclass(frozen=True)
class Shape:
    """What the model's config says of its sizes. `window` is None where it names none."""

    vocabulary: int
    window: int | None
    kv_bytes: int  # of one token, in float32


@dataclass(frozen=True)
class Sizes:
    """Bytes unless said otherwise. `prompts_a_call` bounds the logprobs on the host, `cache_bytes` is None where the engine takes what is left of a GPU."""

    max_model_len: int  # tokens
    max_num_batched_tokens: int
    logits_bytes: int  # of one step
    prompts_a_call: int
    cache_bytes: int | None


def shape_of(field: Callable[[str], object]) -> Shape:
    """The sizes in a model's config, `field` giving None for what it does not hold. Raises KeyError naming what none of its spellings gives."""

    def number(*names: str) -> int:
        found = next((value for name in names if isinstance(value := field(name), int)), None)
        if found is None:
            raise KeyError(names[0])
        return found

    heads = number("num_attention_heads", "n_head")
    kv_heads = field("num_key_value_heads") or heads
    head = field("head_dim") or number("hidden_size", "n_embd") // heads
    assert isinstance(kv_heads, int)
    assert isinstance(head, int)
    windows = (field(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    window = next((window for window in windows if isinstance(window, int) and window), None)
    return Shape(number("vocab_size"), window, 2 * 4 * number("num_hidden_layers", "n_layer") * kv_heads * head)


def engine_sizes(
    shape: Shape,
    *,
    top_k: int,
    max_length: int,
    max_new_tokens: int = 1,
    on_gpu: bool,
    given: Mapping[str, object] | None = None,
) -> Sizes:
    """The sizes of an engine for prompts of up to `max_length` tokens; what the engine arguments in `given` set stands."""
    given = given or {}
    bounds = (max_length + max_new_tokens, shape.window, _whole(given.get("max_model_len")))
    longest = min(bound for bound in bounds if bound)
    fitting = LOGITS_BYTES // (8 * shape.vocabulary)
    tokens = _whole(given.get("max_num_batched_tokens")) or max(LEAST_TOKENS_A_STEP, min(TOKENS_A_STEP, fitting))
    prompts = HOST_BYTES // (longest * (top_k + 1) * LOGPROB_BYTES)
    cache = max(CPU_CACHE_BYTES, CPU_CACHE_PROMPTS * longest * shape.kv_bytes)
    return Sizes(
        longest,
        tokens,
        tokens * shape.vocabulary * 8,
        max(1, min(PROMPTS_A_CALL, prompts)),
        _whole(given.get("kv_cache_memory_bytes")) or (None if on_gpu else cache),
    )


def rows_bytes(sizes: Sizes, *, rows: int, top_k: int) -> int:
    """The most that an actor holds on its host of a shard of so many rows: the engine's answers of one call, and the arrays and the table of all rows."""
    one_row = sizes.max_model_len * (top_k + 1)
    return sizes.prompts_a_call * one_row * LOGPROB_BYTES + 2 * rows * one_row * ROW_BYTES


def gpu_share(logits_bytes: int, gpu_bytes: int) -> float:
    """vLLM's gpu_memory_utilization: what leaves room for a step's logits. A card of less than `logits_bytes` / 0.42 cannot have both and gets half."""
    return max(0.5, min(GPU_SHARE, 1 - GPU_RESERVED - logits_bytes / gpu_bytes))


def merged(result: EngineArgs, speed: EngineArgs) -> EngineArgs:
    """Engine arguments of the recipe (`teach.engine`) and of the machine (`resources.teach.engine`). Raises ValueError where both set one."""
    twice = sorted(set(result) & set(speed))
    if twice:
        raise ValueError(
            f"teach.engine.{twice[0]} and resources.teach.engine.{twice[0]} are both set: keep the first where it changes results, "
            "the second where it changes speed or memory alone"
        )
    return {**result, **speed}


def parallel(gpus: float, given: Mapping[str, object], *, nodes: int = 1, key: str = "resources.teach") -> EngineArgs:
    """The engine arguments that spread one engine over the `gpus` of its actor, in each of so many nodes; what `given` sets stands.

    Raises ValueError where the arguments want another number of GPUs than the actor has: the engine would start on cards that are another's, or wait.
    """
    if nodes > 1:
        return _over_nodes(gpus, given, nodes, key)
    tensor, pipeline = (_whole(given.get(f"{name}_parallel_size")) for name in ("tensor", "pipeline"))
    wanted = (tensor or 1) * (pipeline or 1)
    if gpus <= 1:
        if wanted > 1 and gpus:
            raise ValueError(
                f"the engine arguments want {wanted} GPUs (tensor_parallel_size x pipeline_parallel_size) and {key}.gpus is {gpus:g}: "
                f"set {key}.gpus to {wanted}"
            )
        return {}
    if gpus != int(gpus):
        raise ValueError(f"{key}.gpus is {gpus:g}: more than one GPU must be a whole number")
    count = int(gpus)
    if tensor is None and count % (pipeline or 1) == 0:
        tensor = count // (pipeline or 1)
    if (tensor or 1) * (pipeline or 1) != count:
        raise ValueError(
            f"{key}.gpus is {count} and the engine arguments want {wanted} GPUs (tensor_parallel_size x pipeline_parallel_size): "
            f"leave tensor_parallel_size out, or set {key}.gpus to {wanted}. These GPUs are in one node; a teacher may have more (resources.teach.nodes)"
        )
    # mp: the executor's own processes in this node. Inside an actor vLLM would else take Ray's, which wants a placement group.
    return _executed({"tensor_parallel_size": tensor}, given, "mp")


def _over_nodes(gpus: float, given: Mapping[str, object], nodes: int, key: str) -> EngineArgs:
    """Tensor parallel in a node, whose cards are near each other, and the layers over the nodes."""
    if gpus < 1 or gpus != int(gpus):
        raise ValueError(
            f"{key}.gpus is {gpus:g} and {key}.nodes {nodes}: give the whole number of GPUs that an engine has in each node"
        )
    tensor, pipeline = (_whole(given.get(f"{name}_parallel_size")) for name in ("tensor", "pipeline"))
    count = int(gpus) * nodes
    tensor = tensor or (int(gpus) if pipeline is None else count // pipeline)
    pipeline = pipeline or count // tensor
    if tensor * pipeline != count:
        raise ValueError(
            f"{key}.gpus in {key}.nodes are {count} GPUs and the engine arguments want {tensor * pipeline} (tensor_parallel_size {tensor} x "
            f"pipeline_parallel_size {pipeline}): leave one of them out"
        )
    return _executed({"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}, given, "ray")


def _executed(engine: EngineArgs, given: Mapping[str, object], backend: str) -> EngineArgs:
    """With the executor, unless one is given."""
    return engine if "distributed_executor_backend" in given else engine | {"distributed_executor_backend": backend}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

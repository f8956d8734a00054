"""A real vLLM engine for one chat model, its tokenizer and its chat template: what the teacher and the chat worker share.

The engine lives in this process (no engine subprocess), takes token ids made by our own tokenizer call and gives arrays. stack.md's traps that bite here:
full-vocabulary logits of a step are not profiled, so tokens a step are bounded by the vocabulary; a CPU engine asks for nearly all memory unless the size
of its key-value cache is given; a prompt as long as the model's window is refused.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import vllm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.platforms import current_platform

from fusion_ray.config import EngineArgs
from fusion_ray.corpus.spans import Located, Locator
from fusion_ray.logprobs.flat import TopK, from_flat
from fusion_ray.records import Message

logger = logging.getLogger(__name__)

ENGINE = f"vllm {vllm.__version__}"
PROMPTS_A_CALL = 64  # vLLM holds flat logprobs as Python floats until a call returns: about 100 bytes each
LOGITS_BYTES = 1 << 30  # of one step: tokens x vocabulary x (float32 logits and log-softmax)
TOKENS_A_STEP = 8192


@dataclass(frozen=True)
class Shape:
    """What the model's config says of its sizes. `window` is None where it names none."""

    vocabulary: int
    window: int | None
    kv_bytes: int  # of one token, in float32


class Engine:
    """vLLM on the model in `folder`. `max_length` is the longest prompt in tokens; `window` is what is left of it in this model's own window.

    `engine` holds vLLM engine arguments laid over ours. Raises ValueError for a folder, tokenizer or argument that does not do, naming it.
    """

    def __init__(
        self,
        folder: str,
        *,
        max_length: int,
        max_new_tokens: int = 1,
        top_k: int = 0,
        template_folder: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        engine: EngineArgs | None = None,
        name: str = "",
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # both are read when the engine is built
        os.environ.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", "nobind"
        )  # else every engine of a host binds to the same cores
        started = time.monotonic()
        self.name = name or folder
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        template = load_tokenizer(template_folder, trust_remote_code=trust_remote_code) if template_folder else None
        self.tokenizer = tokenizer
        self.locator = Locator(tokenizer, template=template, name=self.name)
        shape = read_shape(folder, trust_remote_code=trust_remote_code)
        total = max_length + max_new_tokens
        self.max_model_len = min(total, shape.window) if shape.window else total
        self.max_prompt = self.max_model_len - 1
        self._greedy_logprobs = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False
        )
        self.top_k = top_k
        if top_k > shape.vocabulary:
            raise ValueError(
                f"teach.top_k is {top_k}, the vocabulary of {self.name} has {shape.vocabulary} tokens: lower teach.top_k"
            )
        arguments: dict[str, object] = {
            "model": folder,
            "tokenizer": folder,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "max_model_len": self.max_model_len,
            "max_logprobs": max(20, top_k),
            "max_num_batched_tokens": max(128, min(TOKENS_A_STEP, LOGITS_BYTES // (8 * shape.vocabulary))),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "disable_log_stats": True,
            "seed": seed,
        }
        if current_platform.is_cpu():
            arguments["kv_cache_memory_bytes"] = max(1 << 28, 8 * self.max_model_len * shape.kv_bytes)
        else:
            arguments["gpu_memory_utilization"] = 0.85
        self._llm = LLM(**(arguments | dict(engine or {})))
        logger.info("%s: engine ready in %.1f s", self.name, time.monotonic() - started)

    def locate(self, messages: Sequence[Message]) -> Located:
        """The conversation in this model's tokens, not cut. Raises corpus.template.UnlocatedError."""
        return self.locator.locate(messages)

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], starting: Callable[[Sequence[int]], None] = lambda numbers: None
    ) -> list[TopK]:
        """For each prompt of T tokens the distributions that predict tokens 1 to T - 1, in the order given.

        `starting` is told the numbers of the prompts before the engine gets them. Batches depend on the prompts alone: stably sorted by length.
        Raises logprobs.flat.CorruptLogprobsError for an answer that is not about these tokens.
        """
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found: dict[int, TopK] = {}
        for first in range(0, len(order), PROMPTS_A_CALL):
            batch = order[first : first + PROMPTS_A_CALL]
            starting(batch)
            requests = [TokensPrompt(prompt_token_ids=list(prompts[number])) for number in batch]
            answers = self._llm.generate(requests, self._greedy_logprobs, use_tqdm=False)
            for number, answer in zip(batch, answers, strict=True):
                flat = answer.prompt_logprobs
                found[number] = from_flat(
                    flat.token_ids,
                    flat.logprobs,
                    positions=len(flat),
                    prompt_ids=prompts[number],
                    top_k=self.top_k,
                )
        return [found[number] for number in range(len(prompts))]

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt up to a token of `stop` (left out) or the model's own end token."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=list(stop), detokenize=False)
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        answers = self._llm.generate(requests, sampling, use_tqdm=False)
        return [[token for token in answer.outputs[0].token_ids if token not in stop] for answer in answers]

    def close(self) -> None:
        """Frees weights and key-value cache, so that this process may load another model; dropping the last reference alone frees neither."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def load_tokenizer(folder: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a local model folder. Raises ValueError naming the folder."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {error}") from error


def read_shape(folder: str, *, trust_remote_code: bool) -> Shape:
    """Raises ValueError naming the folder where its config.json is missing or of an unknown model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the config of {folder} cannot be loaded: {error}") from error
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return Shape(
        config.vocab_size,
        next((int(window) for window in windows if window), None),
        2 * 4 * config.num_hidden_layers * kv_heads * head,
    )


def merged(result: Mapping[str, object], speed: Mapping[str, object]) -> EngineArgs:
    """Engine arguments of the recipe (`teach.engine`) and of the machine (`resources.teach.engine`). Raises ValueError where both set one."""
    twice = sorted(set(result) & set(speed))
    if twice:
        raise ValueError(
            f"teach.engine.{twice[0]} and resources.teach.engine.{twice[0]} are both set: keep the first where it changes results, "
            "the second where it changes speed or memory alone"
        )
    return {**result, **speed}  # type: ignore[dict-item]

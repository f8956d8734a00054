"""A real vLLM engine for one chat model, its tokenizer and its chat template: what the teacher and the chat worker share.

The engine lives in this process (no engine subprocess), takes token ids made by our own tokenizer call and gives arrays. stack.md's traps that bite here:
full-vocabulary logits of a step are not profiled, so tokens a step are bounded by the vocabulary; a CPU engine asks for nearly all memory unless the size
of its key-value cache is given; a prompt as long as the model's window is refused.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence

import vllm
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform

from fusion_ray.config import EngineArgs
from fusion_ray.corpus.spans import Located, Locator
from fusion_ray.logprobs.flat import TopK, from_flat
from fusion_ray.records import Message
from fusion_ray.workers.engine_sizes import engine_sizes, gpu_share
from fusion_ray.workers.model_files import check_top_k, load_tokenizer, read_shape
from fusion_ray.workers.prompt_arrays import keep_arrays

logger = logging.getLogger(__name__)

ENGINE = f"vllm {vllm.__version__}"


class Engine:
    """vLLM on the model in `folder`. `max_length` is the longest prompt in tokens; `window` is what is left of it in this model's own window.

    `engine` holds vLLM engine arguments laid over ours. Raises ValueError for a folder, tokenizer or argument that does not do, naming it.
    """

    version = ENGINE

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
        check_top_k(top_k, shape, self.name)
        on_gpu = not current_platform.is_cpu()
        sizes = engine_sizes(
            shape, top_k=top_k, max_length=max_length, max_new_tokens=max_new_tokens, on_gpu=on_gpu, given=engine
        )
        self._prompts_a_call = sizes.prompts_a_call
        self.max_model_len = sizes.max_model_len
        self.max_prompt = self.max_model_len - 1
        self._greedy_logprobs = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False
        )
        self.top_k = top_k
        arguments: dict[str, object] = {
            "model": folder,
            "tokenizer": folder,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "max_model_len": self.max_model_len,
            "max_logprobs": max(20, top_k),
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "disable_log_stats": True,
            "seed": seed,
        }
        if on_gpu:
            share = gpu_share(sizes.logits_bytes, current_platform.get_device_total_memory())
            arguments["gpu_memory_utilization"] = share
        else:
            arguments["kv_cache_memory_bytes"] = sizes.cache_bytes
        keep_arrays()
        try:
            self._llm = LLM(**(arguments | dict(engine or {})))
        except (
            TypeError,
            VLLMClientError,
        ) as error:  # an argument that this vLLM does not know, or a value that it does not take
            raise ValueError(
                f"vLLM refuses the engine arguments of {self.name} ({', '.join(engine or {}) or 'none are given'}): {error}"
            ) from error
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
        for first in range(0, len(order), self._prompts_a_call):
            batch = order[first : first + self._prompts_a_call]
            starting(batch)
            requests = [TokensPrompt(prompt_token_ids=list(prompts[number])) for number in batch]
            try:
                answers = self._llm.generate(requests, self._greedy_logprobs, use_tqdm=False)
            except VLLMClientError as error:  # what is asked of it, whatever engine is asked
                raise ValueError(f"the engine of {self.name} refuses what it is asked: {error}") from error
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

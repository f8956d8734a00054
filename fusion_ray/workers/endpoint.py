"""A teacher that is served elsewhere: an OpenAI-compatible vLLM server asked for the logprobs of prompts, in the place of workers/engine.py.

Tokenizer and chat template are this side's; prompts go as token ids to `/completions` with vLLM's `prompt_logprobs`, and every answer passes the checks of
logprobs/served.py. Requests run side by side up to a bound; connection losses, timeouts, 408, 409, 429 and 5xx are tried again with jitter, no sooner than
the server's Retry-After. The key is in no message. Called by workers/teacher.py; needs neither vLLM nor a GPU.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import openai
import tenacity

from fusion_ray.config import EndpointConfig, EngineArgs
from fusion_ray.corpus.spans import Located, Locator
from fusion_ray.logprobs.flat import CorruptLogprobsError, TopK
from fusion_ray.logprobs.served import ENDPOINT, from_served, not_finite
from fusion_ray.records import Message
from fusion_ray.workers.engine_sizes import engine_sizes
from fusion_ray.workers.judge import EndpointError, UnreachableError
from fusion_ray.workers.model_files import check_top_k, load_tokenizer, read_shape

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
PROBE = "The capital of France is Paris, and 12 times 12 is 144."
# What a server says that cannot write NaN as JSON: the answer to a model whose logprobs are not finite.
NOT_FINITE = "not JSON compliant"


class Endpoint:
    """The model in `folder` as the server of `endpoint` has it. Parameters and attributes are those of Engine; `api_key` is None for a server without one.
    Of the engine arguments in `engine` only `max_model_len` is read.

    Raises ValueError where the server has another model or shorter prompts, EndpointError where it refuses or stays out of reach.
    """

    version = ENDPOINT

    def __init__(
        self,
        folder: str,
        *,
        endpoint: EndpointConfig,
        api_key: str | None,
        max_length: int,
        top_k: int,
        template_folder: str | None = None,
        trust_remote_code: bool = False,
        engine: EngineArgs | None = None,
        name: str = "",
        first_wait_s: float = 1.0,
    ) -> None:
        self.name = name or folder
        self.top_k = top_k
        self._endpoint, self._key, self._first_wait_s = endpoint, api_key, first_wait_s
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        template = load_tokenizer(template_folder, trust_remote_code=trust_remote_code) if template_folder else None
        self.locator = Locator(self.tokenizer, template=template, name=self.name)
        shape = read_shape(folder, trust_remote_code=trust_remote_code)
        check_top_k(top_k, shape, self.name)
        self._vocabulary = shape.vocabulary
        # The window that an engine of ours would have: what is taught must not depend on who is asked.
        sizes = engine_sizes(shape, top_k=top_k, max_length=max_length, on_gpu=False, given=engine)
        self.max_model_len = sizes.max_model_len
        self.max_prompt = self.max_model_len - 1
        self._prompts_a_call = max(sizes.prompts_a_call, endpoint.concurrency)
        self._model = endpoint.model or ""
        asyncio.run(self._check())

    def locate(self, messages: Sequence[Message]) -> Located:
        """The conversation in this model's tokens, not cut. Raises corpus.template.UnlocatedError."""
        return self.locator.locate(messages)

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], starting: Callable[[Sequence[int]], None] = lambda numbers: None
    ) -> list[TopK]:
        """As Engine's: for each prompt of T tokens the distributions that predict tokens 1 to T - 1, in the order given."""
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found: dict[int, TopK] = {}
        for first in range(0, len(order), self._prompts_a_call):
            batch = order[first : first + self._prompts_a_call]
            starting(batch)
            answers = asyncio.run(self._ask_all([list(map(int, prompts[number])) for number in batch]))
            found.update(zip(batch, answers, strict=True))
        return [found[number] for number in range(len(prompts))]

    async def _ask_all(self, prompts: Sequence[list[int]]) -> list[TopK]:
        free = asyncio.Semaphore(self._endpoint.concurrency)
        async with self._client() as client:

            async def one(ids: list[int]) -> TopK:
                async with free:
                    return (await self._ask(client, ids))[0]

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(ids)) for ids in prompts]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, client: openai.AsyncOpenAI, ids: list[int]) -> tuple[TopK, list[Any]]:
        """The distributions of one prompt and the answer's own `prompt_logprobs`."""

        async def send() -> object:
            raw = await client.completions.with_raw_response.create(
                model=self._model,
                prompt=ids,
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": self.top_k},
            )
            return _json(raw.content)

        try:
            answer = await self._tried(send, f"a prompt of {len(ids)} tokens")
        except EndpointError as error:
            if NOT_FINITE in str(error):
                return not_finite(len(ids), self.top_k), []
            raise
        positions = _positions(answer)
        if positions is None:
            raise EndpointError(
                f"{self._endpoint.url} answered for {self._model!r} without prompt_logprobs, as servers do that do not know them: the endpoint of "
                f"{self.name} must be a vLLM server (vllm serve) that is reached directly"
            )
        try:
            return from_served(positions, prompt_ids=ids, top_k=self.top_k, vocabulary=self._vocabulary), positions
        except CorruptLogprobsError as error:
            raise CorruptLogprobsError(f"{self._endpoint.url} for {self._model!r}: {error}") from None

    async def _check(self) -> None:
        """That the server has this model, as far as it can tell: its id, its window, its vocabulary and the strings of its tokens."""
        async with self._client() as client:

            async def models() -> object:
                return _json((await client.models.with_raw_response.list()).content)

            answer = await self._tried(models, "the list of its models")
            served = answer.get("data") if isinstance(answer, dict) else None
            known = {str(one.get("id")): one for one in served or () if isinstance(one, dict)}
            if not self._model:
                if len(known) != 1:
                    raise ValueError(
                        f"{self._endpoint.url} serves {len(known)} models ({', '.join(known)}): set `endpoint.model` of {self.name} to one of them"
                    )
                self._model = next(iter(known))
            elif self._model not in known:
                raise ValueError(
                    f"`endpoint.model` of {self.name} is {self._model!r}, {self._endpoint.url} serves {', '.join(known) or 'none'}"
                )
            longest = known[self._model].get("max_model_len")
            if isinstance(longest, int) and longest < self.max_model_len:
                raise ValueError(
                    f"{self._endpoint.url} takes {longest} tokens, {self.name} is to read {self.max_model_len}: start the server with "
                    f"--max-model-len {self.max_model_len} or more, or lower teach.max_length to {longest - 1}"
                )
            ids = self.tokenizer.encode(PROBE)[: self.max_prompt]
            self._check_strings((await self._ask(client, ids))[1])
        logger.info("%s: %s serves it as %s", self.name, self._endpoint.url, self._model)

    def _check_strings(self, positions: Sequence[Any]) -> None:
        """Two vocabularies of one size have the same ids for other strings; a server without a tokenizer tells none."""
        for entries in positions[1:]:
            for token, entry in entries.items():
                theirs = str(entry.get("decoded_token") or "").strip()
                ours = str(self.tokenizer.decode([int(token)])).strip()
                if theirs != ours and theirs.isascii() and theirs.isalnum() and ours.isascii() and ours.isalnum():
                    raise ValueError(
                        f"{self._endpoint.url} has {theirs!r} as token {token}, the tokenizer of {self.name} has {ours!r}: it serves another model than `path`"
                    )

    async def _tried(self, send: Callable[[], Any], what: str) -> object:
        """What `send` gives. Raises UnreachableError after the last attempt, EndpointError when the request is refused."""
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_transient),
            stop=tenacity.stop_after_attempt(self._endpoint.attempts),
            wait=self._wait,
            before_sleep=lambda state: logger.info(
                "%s: attempt %d at %s failed: %s",
                self._endpoint.url,
                state.attempt_number,
                what,
                self._said(state.outcome.exception() if state.outcome else None),
            ),
            reraise=True,
        )
        try:
            return await attempts(send)
        except (openai.OpenAIError, _NoAnswerError) as error:
            kind = UnreachableError if _transient(error) else EndpointError
            tried = f" in {self._endpoint.attempts} attempts" if kind is UnreachableError else ""
            hint = ""
            if "max_logprobs" in str(error) or "greater than max allowed" in str(error):
                hint = f"; start the server with --max-logprobs {self.top_k} or lower teach.top_k"
            # `from None`: the client's own exception holds the request with its Authorization header.
            raise kind(
                f"{self._endpoint.url} gave no answer to {what} of {self._model or self.name!r}{tried}; the last: {self._said(error)}{hint}"
            ) from None

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._endpoint.timeout_s,
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Exponential with full jitter, and no sooner than the server's Retry-After."""
        drawn = tenacity.wait_random_exponential(multiplier=self._first_wait_s, max=LONGEST_WAIT_S)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
        try:
            return float(drawn + min(float(asked or 0), LONGEST_RETRY_AFTER_S))
        except ValueError:  # an HTTP date
            return float(drawn)

    def _said(self, error: BaseException | None) -> str:
        text = f"{type(error).__name__}: {error}"[:1000]
        return text.replace(self._key, "***") if self._key else text


class _NoAnswerError(Exception):
    """A 200 whose body is no JSON: a proxy in trouble."""


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError as error:
        raise _NoAnswerError(f"the body is no JSON: {error}") from None


def _positions(answer: object) -> list[Any] | None:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    found = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    return found if isinstance(found, list) else None


def _transient(error: BaseException) -> bool:
    """APITimeoutError is an APIConnectionError."""
    if isinstance(error, openai.APIStatusError):
        if NOT_FINITE in str(error):
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | _NoAnswerError)

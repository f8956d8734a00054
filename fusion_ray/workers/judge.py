"""A client of OpenAI-compatible endpoints: two-turn answers from a served model, and single-answer grading by a judge model (FastChat's llm_judge).

Requests run side by side up to a bound; transient failures (connection, timeout, 408, 409, 429, 5xx) are tried again with jitter and the server's
Retry-After; others stop the run. Keys are arguments that come from the environment; they are in no message and no log. Called by stages/evaluate.py.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import openai
import tenacity
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from fusion_ray.judging.prompts import JudgePrompt, needs_reference, prompt_name, user_prompt
from fusion_ray.judging.questions import Answer, Judgement, Question, make_answer
from fusion_ray.judging.verdicts import ERROR_OUTPUT, NO_RATING, parse_rating
from fusion_ray.records import Report

logger = logging.getLogger(__name__)
for noisy in ("httpx", "httpx2"):  # they log a line a request
    logging.getLogger(noisy).setLevel(logging.WARNING)

_LONGEST_WAIT_S = 60.0
ResultT = TypeVar("ResultT")


class EndpointError(ConnectionError):
    """An endpoint refused a request or stayed out of reach; the message names endpoint, model and question, never the key."""


@dataclass(frozen=True)
class Retry:
    """How long a request is waited for and how often it is tried; waits grow from `first_wait_s` with full jitter."""

    attempts: int = 6
    timeout_s: float = 600.0
    first_wait_s: float = 1.0


def answers(
    base_url: str,
    api_key: str,
    model: str,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    concurrency: int,
    temperature: float | None = None,
    seed: int | None = None,
    retry: Retry | None = None,
    report: Report = lambda _: None,
) -> list[Answer]:
    """One answer a turn for every question, in their order; each turn sees the model's own earlier answers.

    `temperature` None takes each question's (FastChat's by category). Raises EndpointError when a request is refused or tried in vain.
    """

    async def ask(client: "_Client", question: Question) -> Answer:
        messages: list[ChatCompletionMessageParam] = []
        turns: list[str] = []
        for number, text in enumerate(question.turns, start=1):
            messages.append({"role": "user", "content": text})
            content = await client.complete(
                messages,
                what=f"question {question.question_id} turn {number}",
                temperature=question.temperature if temperature is None else temperature,
                max_tokens=max_tokens,
                seed=None if seed is None else seed + question.question_id,
            )
            turns.append(content.strip())  # as FastChat does, and the batch engine
            messages.append({"role": "assistant", "content": turns[-1]})
        return make_answer(question.question_id, model, turns, time.time())

    async def everything() -> list[Answer]:
        async with _Client(base_url, api_key, model, retry or Retry()) as client:
            jobs = [lambda question=question: ask(client, question) for question in questions]
            return await _bounded(jobs, concurrency, unit="questions", report=report)

    return asyncio.run(everything())


def judge(
    base_url: str,
    api_key: str,
    model: str,
    questions: Sequence[Question],
    model_answers: Mapping[int, Answer],
    *,
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Sequence[str]],
    max_tokens: int,
    concurrency: int,
    done: Collection[tuple[int, int]] = (),
    retry: Retry | None = None,
    report: Report = lambda _: None,
) -> list[Judgement]:
    """A rating of every turn of every question, except those in `done` (question id, turn), sorted by question and turn.

    A rating that cannot be read is -1. A request that failed in every attempt is a judgement `$ERROR$` with -1, as FastChat writes it; when all of them
    fail, or one is refused (key, model, size), EndpointError is raised. Raises ValueError when a question that needs a reference or an answer has none.
    """
    work = [(question, turn) for question in questions for turn in (1, 2) if turn <= len(question.turns)]
    work = [(question, turn) for question, turn in work if (question.question_id, turn) not in done]
    filled = [_filled(question, turn, model_answers, prompts, references) for question, turn in work]

    async def grade(client: "_Client", question: Question, turn: int, prompt: JudgePrompt, text: str) -> Judgement:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": prompt.system_prompt},
            {"role": "user", "content": text},
        ]
        what = f"question {question.question_id} turn {turn}"
        try:
            verdict = await client.complete(messages, what=what, temperature=0.0, max_tokens=max_tokens, seed=None)
        except UnreachableError as error:
            logger.warning("judge: %s; recorded as %s", error, ERROR_OUTPUT)
            verdict = ERROR_OUTPUT
        return Judgement(
            question_id=question.question_id,
            model=model_answers[question.question_id].model_id,
            judge=(model, prompt.name),
            user_prompt=text,
            judgment=verdict,
            score=NO_RATING if verdict == ERROR_OUTPUT else parse_rating(verdict),
            turn=turn,
            tstamp=time.time(),
        )

    async def everything() -> list[Judgement]:
        async with _Client(base_url, api_key, model, retry or Retry()) as client:
            jobs = [
                lambda question=question, turn=turn, prompt=prompt, text=text: grade(
                    client, question, turn, prompt, text
                )
                for (question, turn), (prompt, text) in zip(work, filled, strict=True)
            ]
            return await _bounded(jobs, concurrency, unit="judgements", report=report)

    judgements = asyncio.run(everything())
    if judgements and all(judgement.judgment == ERROR_OUTPUT for judgement in judgements):
        raise EndpointError(
            f"the judge {model!r} at {base_url} answered none of {len(judgements)} requests: see evaluate.judge.url"
        )
    return sorted(judgements, key=lambda judgement: (judgement.question_id, judgement.turn))


class UnreachableError(EndpointError):
    """Every attempt at one request failed for a transient reason."""


class _NoCompletionError(Exception):
    """The endpoint answered 200 with something else than a chat completion."""


def _filled(
    question: Question,
    turn: int,
    model_answers: Mapping[int, Answer],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Sequence[str]],
) -> tuple[JudgePrompt, str]:
    answer = model_answers.get(question.question_id)
    if answer is None or len(answer.turns) < turn:
        raise ValueError(
            f"question {question.question_id} has no answer to turn {turn}: make answers to every question first"
        )
    reference = references.get(question.question_id, ())
    if needs_reference(question) and len(reference) < turn:
        raise ValueError(
            f"question {question.question_id} ({question.category}) needs a reference answer to turn {turn} and has {len(reference)}: give a "
            "reference_answer file as evaluate.judge.references"
        )
    prompt = prompts[prompt_name(question, turn)]
    shown = reference if needs_reference(question) else ()
    return prompt, user_prompt(prompt, question, answer.turns, turn=turn, reference=shown)


class _Client:
    """One model behind one endpoint, over the openai client with its own retries off."""

    def __init__(self, base_url: str, api_key: str, model: str, retry: Retry) -> None:
        self.base_url, self.model, self.retry = base_url, model, retry
        self._key = api_key
        self._openai = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=retry.timeout_s
        )

    async def __aenter__(self) -> "_Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def complete(
        self,
        messages: Sequence[ChatCompletionMessageParam],
        *,
        what: str,
        temperature: float,
        max_tokens: int,
        seed: int | None,
    ) -> str:
        """The text of one completion. Raises UnreachableError after the last attempt, EndpointError when the request is refused."""
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_transient),
            stop=tenacity.stop_after_attempt(self.retry.attempts),
            wait=self._wait,
            reraise=True,
        )

        async def once() -> ChatCompletion:
            try:
                completion = await self._openai.chat.completions.create(
                    model=self.model,
                    messages=list(messages),
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seed=openai.omit if seed is None else seed,
                )
            except ValueError as error:  # a body that is no JSON
                raise _NoCompletionError(f"the body is no JSON: {error}") from None
            # A body of another content type arrives as text, one of another shape with its fields left out.
            if not isinstance(completion, ChatCompletion) or not completion.choices:
                raise _NoCompletionError(f"the body is no chat completion: {str(completion)[:200]!r}")
            return completion

        try:
            response: ChatCompletion = await attempts(once)
        except (openai.OpenAIError, _NoCompletionError) as error:
            kind = UnreachableError if _transient(error) else EndpointError
            tried = f" in {self.retry.attempts} attempts" if kind is UnreachableError else ""
            # `from None`: the client's own exception holds the request with its Authorization header.
            raise kind(
                f"{self.base_url} gave no answer to {what} of {self.model!r}{tried}: {self._said(error)}"
            ) from None
        return response.choices[0].message.content or ""

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """The server's Retry-After where it gives one, else exponential with full jitter; never above a minute."""
        drawn = tenacity.wait_random_exponential(multiplier=self.retry.first_wait_s, max=_LONGEST_WAIT_S)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
        try:
            return max(drawn, min(float(asked or 0), _LONGEST_WAIT_S))
        except ValueError:  # an HTTP date
            return drawn

    def _said(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return text.replace(self._key, "***") if self._key else text


def _transient(error: BaseException) -> bool:
    """APITimeoutError is an APIConnectionError; a 200 whose body is no completion comes from a proxy in trouble."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | openai.APIResponseValidationError | _NoCompletionError)


async def _bounded(
    jobs: Sequence[Callable[[], Awaitable[ResultT]]], concurrency: int, *, unit: str, report: Report
) -> list[ResultT]:
    """The jobs' results in order, at most `concurrency` at a time; the first failure cancels the rest."""
    free, finished = asyncio.Semaphore(concurrency), 0

    async def one(job: Callable[[], Awaitable[ResultT]]) -> ResultT:
        nonlocal finished
        async with free:
            result = await job()
        finished += 1
        report({"done": finished, "total": len(jobs), "unit": unit})
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]

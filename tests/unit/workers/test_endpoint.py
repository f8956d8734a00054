"""The served teacher against a scripted server: its arrays, what it tries again, and what stops it."""

import json
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from fusion_ray.config import EndpointConfig
from fusion_ray.logprobs.flat import CorruptLogprobsError
from fusion_ray.records import Conversation, Message
from fusion_ray.workers.endpoint import Endpoint
from fusion_ray.workers.judge import EndpointError, UnreachableError
from fusion_ray.workers.teacher import Teacher
from tests.scripted_server import DROPPED, Script, Server, scripted
from tests.tiny import make_tiny_model

KEY = "sk-very-secret"
TOP_K = 4
Entry = dict[str, dict[str, object]]
PROMPT = [3, 7, 9, 11, 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


def position(label: int, number: int) -> Entry:
    """Even positions have the label second, odd ones outside the top."""
    top = [token for token in range(40, 50) if token != label][:TOP_K]
    inside = number % 2 == 0
    if inside:
        top[1] = label
    entries = {str(token): {"logprob": -0.5 - rank, "rank": rank} for rank, token in enumerate(top, 1)}
    if inside:
        return {str(label): entries[str(label)]} | entries  # the label first, as vLLM has it
    return {str(label): {"logprob": -9.0, "rank": 77}} | entries


def answer(body: dict[str, object]) -> dict[str, object]:
    prompt = body["prompt"]
    assert isinstance(prompt, list)
    found = [None, *(position(label, number) for number, label in enumerate(prompt[1:]))]
    return {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": "x", "prompt_logprobs": found}]}


def models(*names: str, longest: int = 4096) -> dict[str, object]:
    return {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": longest} for name in names]}


def sound(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
    return 200, models("tiny") if "get" in body else answer(body), {}, 0.0


def for_prompt(script: Script) -> Script:
    """`script` answers to PROMPT, a sound server to the rest."""
    return lambda body, before: (script if body.get("prompt") == PROMPT else sound)(body, before)


def reader(server: Server, folder: str, **changes: object) -> Endpoint:
    settings: dict[str, object] = {"url": server.url, "attempts": 3, "timeout_s": 5.0}
    return Endpoint(
        folder,
        endpoint=EndpointConfig.model_validate(settings | changes),
        api_key=KEY,
        max_length=200,
        top_k=TOP_K,
        name="tiny",
        first_wait_s=0.001,
    )


def test_an_answer_is_the_arrays_of_the_engine(folder: str) -> None:
    with scripted(sound) as server:
        (top,) = reader(server, folder).prompt_logprobs([PROMPT])
    assert top.ids.tolist() == [[40, 7, 42, 43], [40, 41, 42, 43], [40, 11, 42, 43], [40, 41, 42, 43]]
    assert top.logprobs.tolist() == [[-1.5, -2.5, -3.5, -4.5]] * 4
    assert top.label_logprob.tolist() == [-2.5, -9.0, -2.5, -9.0]
    assert (top.ids.dtype, top.logprobs.dtype, top.label_logprob.dtype) == (np.int32, np.float32, np.float32)
    sent = server.requests[-1]
    assert sent == {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_K}
    assert set(server.authorizations) == {f"Bearer {KEY}"}


def test_prompts_come_back_in_order_and_no_more_than_so_many_at_a_time(folder: str) -> None:
    def slow(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return (*sound(body, before)[:3], 0.0 if "get" in body else 0.03)

    prompts = [[5] * length for length in (9, 3, 7, 5, 8, 4, 6)]
    told: list[int] = []
    with scripted(slow) as server:
        found = reader(server, folder, concurrency=3).prompt_logprobs(prompts, told.extend)
    assert [len(top.ids) + 1 for top in found] == [9, 3, 7, 5, 8, 4, 6]
    assert server.most_at_once == 3
    assert sorted(told) == list(range(7))


@pytest.mark.parametrize("status", [429, 500, 503, 408, DROPPED])
def test_what_passes_is_tried_again(folder: str, status: int) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return (status, {"error": {"message": "busy"}}, {}, 0.0) if before < 2 else sound(body, before)

    with scripted(for_prompt(script)) as server:
        (top,) = reader(server, folder).prompt_logprobs([PROMPT])
        assert top.finite
        assert server.seen[json.dumps(server.requests[-1])] == 3


def test_a_body_that_is_no_json_is_tried_again(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return (200, "<html>a proxy</html>", {}, 0.0) if before < 1 else sound(body, before)

    with scripted(for_prompt(script)) as server:
        assert reader(server, folder).prompt_logprobs([PROMPT])[0].finite


def test_retry_after_is_honoured(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return (429, {"error": {"message": "busy"}}, {"retry-after": "0.6"}, 0.0) if not before else sound(body, before)

    with scripted(for_prompt(script)) as server:
        teacher = reader(server, folder)
        started = time.monotonic()
        teacher.prompt_logprobs([PROMPT])
        assert time.monotonic() - started > 0.6


def test_it_stops_after_so_many_attempts_and_says_who_said_what(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return 503, {"error": {"message": f"overloaded, key {KEY}"}}, {}, 0.0

    caplog.set_level(logging.DEBUG, "fusion_ray")
    with scripted(for_prompt(script)) as server:
        teacher = reader(server, folder)
        with pytest.raises(UnreachableError) as caught:
            teacher.prompt_logprobs([PROMPT])
        assert server.seen[json.dumps(server.requests[-1])] == 3
    told = str(caught.value)
    assert server.url in told
    assert "in 3 attempts" in told
    assert "overloaded" in told
    assert KEY not in told + caplog.text
    assert caught.value.__cause__ is None
    assert "attempt 1" in caplog.text


def test_a_refusal_is_not_tried_again_and_a_bound_on_logprobs_has_its_cure(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        said = "Requested prompt logprobs of 4, which is greater than max allowed: 3"
        return 400, {"error": {"message": said}}, {}, 0.0

    with scripted(for_prompt(script)) as server:
        teacher = reader(server, folder)
        with pytest.raises(EndpointError, match=r"greater than max allowed: 3.*--max-logprobs 4"):
            teacher.prompt_logprobs([PROMPT])
        assert server.seen[json.dumps(server.requests[-1])] == 1


Change = Callable[[list[Entry]], object]


def changed(change: Change) -> Script:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        found = answer(body)
        choice = found["choices"][0]  # type: ignore[index]
        change(choice["prompt_logprobs"])
        return 200, found, {}, 0.0

    return for_prompt(script)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.pop(), "5 tokens came back with 4 positions"),
        (lambda found: found[2].pop("9"), "position 2 of the prompt is token 9, the server answered for token 40"),
        (lambda found: found[2].pop("43"), "expected 1 to 4"),
        (lambda found: found[2].update({"5000": {**found[2].pop("43")}}), "token 5000, the model has 640: it serves"),
        (lambda found: found[2]["42"].update(logprob=-0.1), "not in descending order"),
        (lambda found: found[2]["9"].update(logprob=-0.1), "a label is likelier"),
    ],
)
def test_an_answer_about_something_else_is_refused(folder: str, change: Change, says: str) -> None:
    with scripted(changed(change)) as server:
        teacher = reader(server, folder)
        with pytest.raises(CorruptLogprobsError, match=says) as caught:
            teacher.prompt_logprobs([PROMPT])
        assert server.url in str(caught.value)


@pytest.mark.parametrize("value", [None, math.nan, -9999.0])
def test_a_logprob_that_is_not_finite_is_seen(folder: str, value: float | None) -> None:
    with scripted(changed(lambda found: found[2]["43"].update(logprob=value))) as server:
        assert not reader(server, folder).prompt_logprobs([PROMPT])[0].finite


def test_a_server_that_cannot_write_nan_has_given_nan(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return 500, {"error": {"message": "Out of range float values are not JSON compliant: nan"}}, {}, 0.0

    with scripted(for_prompt(script)) as server:
        (top,) = reader(server, folder).prompt_logprobs([PROMPT])
    assert not top.finite
    assert top.ids.shape == (4, TOP_K)


def test_a_server_without_prompt_logprobs_is_told_at_the_start(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return 200, models("tiny") if "get" in body else {"choices": [{"index": 0, "text": "x"}]}, {}, 0.0

    with scripted(script) as server, pytest.raises(EndpointError, match="without prompt_logprobs"):
        reader(server, folder)


@pytest.mark.parametrize(
    ("served", "settings", "says"),
    [
        (models("a", "b"), {}, r"serves 2 models \(a, b\): set `endpoint.model` of tiny"),
        (models("a"), {"model": "c"}, "`endpoint.model` of tiny is 'c', .* serves a"),
        (models("a", longest=100), {}, "takes 100 tokens, tiny is to read 201: .*--max-model-len 201"),
    ],
)
def test_another_model_or_a_shorter_window_is_told_at_the_start(
    folder: str, served: dict[str, object], settings: dict[str, object], says: str
) -> None:
    with scripted(lambda body, before: (200, served, {}, 0.0)) as server, pytest.raises(ValueError, match=says):
        reader(server, folder, **settings)


def test_the_same_ids_with_other_strings_are_another_model(folder: str) -> None:
    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        if "get" in body:
            return 200, models("tiny"), {}, 0.0
        found = answer(body)
        for entries in found["choices"][0]["prompt_logprobs"][1:]:  # type: ignore[index]
            for entry in entries.values():
                entry["decoded_token"] = " zebra"
        return 200, found, {}, 0.0

    with (
        scripted(script) as server,
        pytest.raises(ValueError, match=r"has 'zebra' as token .* another model than `path`"),
    ):
        reader(server, folder)


def test_a_teacher_teaches_through_it_without_vllm(folder: str) -> None:
    rows = [Conversation("one", (Message("user", "Say it."), Message("assistant", "It is said.")))]
    with scripted(sound) as server:
        teacher = Teacher(
            folder,
            top_k=TOP_K,
            max_length=200,
            name="tiny",
            endpoint=EndpointConfig(url=server.url),
            api_key=KEY,
        )
        taught = teacher.teach(rows)
    assert (taught.counts.rows, taught.counts.quarantined) == (1, 0)
    assert teacher.version == "vllm behind an endpoint"


def test_a_row_without_finite_logprobs_is_quarantined(folder: str) -> None:
    """The probe at the start is answered soundly, every row not."""
    rows = [Conversation("one", (Message("user", "Say it."), Message("assistant", "It is said.")))]
    asked = []

    def script(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        asked.append(body)
        if len(asked) > 2:
            return 500, {"error": {"message": "Out of range float values are not JSON compliant"}}, {}, 0.0
        return sound(body, before)

    with scripted(script) as server:
        teacher = Teacher(folder, top_k=TOP_K, max_length=200, endpoint=EndpointConfig(url=server.url))
        taught = teacher.teach(rows)
    assert (taught.counts.rows, taught.counts.quarantined) == (0, 1)

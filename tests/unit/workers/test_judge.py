"""The judge and answer client against a scripted OpenAI-compatible server on loopback; MT-Bench's own files where they are at hand."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from fusion_ray.judging.prompts import SINGLE_PROMPTS, JudgePrompt, parse_prompts
from fusion_ray.judging.questions import Answer, Question, make_answer, parse_jsonl, parse_questions
from fusion_ray.workers.judge import EndpointError, Retry, answers, judge
from tests.scripted_server import say, scripted

KEY = "sk-test-0123456789"
QUICK = Retry(attempts=3, timeout_s=2.0, first_wait_s=0.01)
PROMPTS = {
    name: JudgePrompt(name, "single", f"system of {name}", template)
    for name, template in zip(
        SINGLE_PROMPTS,
        (
            "Q {question} A {answer}",
            "Q {question} R {ref_answer_1} A {answer}",
            "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
            "Q {question_1} R {ref_answer_1} A {answer_1} Q {question_2} R {ref_answer_2} A {answer_2}",
        ),
        strict=True,
    )
}
WRITING = Question(81, "writing", ("Write a line.", "Write it again."))
MATH = Question(111, "math", ("1+1?", "Twice that?"))


def grade(url: str, questions: list[Question], model_answers: dict[int, Answer], **overrides: object):  # type: ignore[no-untyped-def]
    settings: dict[str, object] = {
        "prompts": PROMPTS,
        "references": {111: ["two", "four"]},
        "max_tokens": 64,
        "concurrency": 4,
        "retry": QUICK,
    }
    return judge(url, KEY, "judge-1", questions, model_answers, **(settings | overrides))  # type: ignore[arg-type]


def two(question: Question) -> dict[int, Answer]:
    return {question.question_id: make_answer(question.question_id, "model-x", ["first", "second"], 1.0)}


def test_the_second_turn_sees_the_models_own_first_answer() -> None:
    with scripted(lambda body, _: say(f"answer {len(body['messages'])}")) as server:  # type: ignore[arg-type]
        given = answers(server.url, KEY, "m", [WRITING, MATH], max_tokens=9, concurrency=1, seed=100, retry=QUICK)
    assert [answer.turns for answer in given] == [("answer 1", "answer 3")] * 2
    assert [answer.question_id for answer in given] == [81, 111]
    assert server.requests[1]["messages"] == [
        {"role": "user", "content": "Write a line."},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "Write it again."},
    ]
    assert [(r["temperature"], r["max_tokens"], r["seed"]) for r in server.requests] == [
        (0.7, 9, 181),
        (0.7, 9, 181),
        (0.0, 9, 211),
        (0.0, 9, 211),
    ]
    assert set(server.authorizations) == {f"Bearer {KEY}"}


def test_a_fixed_temperature_holds_for_every_question() -> None:
    with scripted(lambda *_: say("x")) as server:
        answers(server.url, KEY, "m", [WRITING], max_tokens=9, concurrency=1, temperature=0.0, retry=QUICK)
    assert [(r["temperature"], "seed" in r) for r in server.requests] == [(0.0, False)] * 2


def test_requests_run_side_by_side_up_to_the_bound_and_come_back_in_order() -> None:
    questions = [Question(number, "stem", (f"say {number}",)) for number in range(24)]
    progress: list[object] = []

    def script(body: dict[str, object], _: int) -> tuple[int, object, dict[str, str], float]:
        text = str(body["messages"][0]["content"])  # type: ignore[index]
        return say(text, wait=0.06 if text.endswith(("1", "3")) else 0.02)

    with scripted(script) as server:
        given = answers(
            server.url,
            KEY,
            "m",
            questions,
            max_tokens=9,
            concurrency=5,
            retry=QUICK,
            report=lambda row: progress.append(row["done"]),
        )
    assert [answer.turns[0] for answer in given] == [f"say {number}" for number in range(24)]
    assert 2 <= server.most_at_once <= 5
    assert sorted(progress) == list(range(1, 25))  # type: ignore[type-var]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_transient_failure_is_tried_again(status: int) -> None:
    with scripted(lambda _, before: say("busy", status) if before == 0 else say("Rating: [[7]]")) as server:
        rows = grade(server.url, [WRITING], two(WRITING))
    assert [row.score for row in rows] == [7, 7]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("body", "kind"), [("{not json", "application/json"), ("<html>", "text/html"), ("{}", "application/json")]
)
def test_a_200_that_is_no_completion_is_tried_again(body: str, kind: str) -> None:
    with scripted(
        lambda _, before: (200, body, {"content-type": kind}, 0.0) if before == 0 else say("[[3]]")
    ) as server:
        rows = grade(server.url, [Question(81, "writing", ("Write.",))], two(WRITING))
    assert [row.score for row in rows] == [3]


def test_retry_after_is_obeyed() -> None:
    with scripted(
        lambda _, before: say("busy", 429, **{"retry-after": "0.5"}) if before == 0 else say("[[7]]")
    ) as server:
        started = time.monotonic()
        grade(server.url, [Question(81, "writing", ("Write.",))], two(WRITING))
    assert time.monotonic() - started >= 0.5


def test_a_time_out_is_tried_again() -> None:
    quick = Retry(attempts=2, timeout_s=0.3, first_wait_s=0.01)
    with scripted(lambda _, before: say("[[2]]", wait=1.0) if before == 0 else say("[[9]]")) as server:
        rows = grade(server.url, [Question(81, "writing", ("Write.",))], two(WRITING), retry=quick)
    assert [row.score for row in rows] == [9]


def test_a_request_that_fails_every_time_is_recorded_as_fastchat_does_and_the_others_stand() -> None:
    def script(body: dict[str, object], _: int) -> tuple[int, object, dict[str, str], float]:
        return say("down", 500) if "multi-turn" in str(body["messages"]) else say("Rating: [[6]]")

    with scripted(script) as server:
        rows = grade(server.url, [WRITING, MATH], two(WRITING) | two(MATH))
    assert [(row.question_id, row.turn, row.score, row.judgment) for row in rows] == [
        (81, 1, 6, "Rating: [[6]]"),
        (81, 2, -1, "$ERROR$"),
        (111, 1, 6, "Rating: [[6]]"),
        (111, 2, -1, "$ERROR$"),
    ]
    assert len(server.requests) == 2 + 2 * QUICK.attempts


def test_a_judge_that_never_answers_is_an_error() -> None:
    with (
        scripted(lambda *_: say("down", 503)) as server,
        pytest.raises(EndpointError, match="answered none of 2 requests"),
    ):
        grade(server.url, [WRITING], two(WRITING))


def test_nobody_listening_is_an_error_naming_the_endpoint() -> None:
    with scripted(lambda *_: say("x")) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"question 81 turn 1 of 'm' in 3 attempts") as error:
        answers(url, KEY, "m", [WRITING], max_tokens=9, concurrency=1, retry=QUICK)
    assert url in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_stops_at_once_and_never_shows_the_key(status: int) -> None:
    with scripted(lambda *_: say(f"you sent {KEY}", status)) as server, pytest.raises(EndpointError) as error:
        grade(server.url, [WRITING], two(WRITING), concurrency=1)
    assert len(server.requests) == 1
    assert KEY not in str(error.value)
    assert "you sent ***" in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("verdict", ["I like it.", "Rating: [[nine]]", "", "Rating: [[77]]"])
def test_a_malformed_verdict_scores_minus_one(verdict: str) -> None:
    with scripted(lambda *_: say(verdict)) as server:
        rows = grade(server.url, [WRITING], two(WRITING))
    assert [(row.score, row.judgment) for row in rows] == [(-1, verdict)] * 2


def test_the_judgement_rows_hold_fastchats_keys() -> None:
    with scripted(lambda *_: say("Fine. Rating: [[8]]")) as server:
        rows = [row.to_dict() for row in grade(server.url, [MATH], two(MATH))]
    assert [list(row) for row in rows] == [
        ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    ] * 2
    assert rows[0]["judge"] == ["judge-1", "single-math-v1"]
    assert rows[1]["judge"] == ["judge-1", "single-math-v1-multi-turn"]
    assert rows[0]["user_prompt"] == "Q 1+1? R two A first"
    assert rows[1]["user_prompt"] == "Q 1+1? R two A first Q Twice that? R four A second"
    assert (rows[0]["model"], rows[0]["score"]) == ("model-x", 8)
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0]
    assert server.requests[0]["messages"][0]["role"] == "system"  # type: ignore[index]


def test_what_is_done_is_not_asked_again() -> None:
    with scripted(lambda *_: say("[[5]]")) as server:
        rows = grade(server.url, [WRITING, MATH], two(WRITING) | two(MATH), done={(81, 1), (111, 2)})
    assert [(row.question_id, row.turn) for row in rows] == [(81, 2), (111, 1)]
    assert len(server.requests) == 2


def test_a_missing_reference_or_answer_is_an_error_before_anything_is_asked() -> None:
    with scripted(lambda *_: say("[[5]]")) as server:
        with pytest.raises(ValueError, match=r"question 111 \(math\) needs a reference answer to turn 2"):
            grade(server.url, [MATH], two(MATH), references={111: ["two"]})
        with pytest.raises(ValueError, match="question 81 has no answer to turn 1"):
            grade(server.url, [WRITING], {})
    assert server.requests == []


def test_mt_bench_goes_through_with_its_own_files() -> None:
    folder = Path(os.environ.get("FUSION_RAY_DATA", Path(__file__).parents[3] / ".." / "shared" / "data")) / "mt_bench"
    if not folder.exists():
        pytest.skip(f"no MT-Bench files at {folder}: set FUSION_RAY_DATA to the folder that holds mt_bench")
    questions = parse_questions((folder / "question.jsonl").read_text(encoding="utf-8"))
    prompts = parse_prompts((folder / "judge_prompts.jsonl").read_text(encoding="utf-8"))
    references = parse_jsonl(
        (folder / "reference_answer" / "gpt-4.jsonl").read_text(encoding="utf-8"), Answer, where="r"
    )
    with scripted(lambda *_: say("Well. Rating: [[7.5]]")) as server:
        given = answers(server.url, KEY, "model-x", questions, max_tokens=16, concurrency=8, retry=QUICK)
        rows = judge(
            server.url,
            KEY,
            "gpt-4",
            questions,
            {answer.question_id: answer for answer in given},
            prompts=prompts,
            references={answer.question_id: answer.turns for answer in references},
            max_tokens=64,
            concurrency=8,
            retry=QUICK,
        )
    assert len(questions) == 80
    assert len(rows) == 160
    assert {row.score for row in rows} == {7.5}
    counts = Counter(row.judge[1] for row in rows)
    assert counts == {
        "single-v1": 50,
        "single-v1-multi-turn": 50,
        "single-math-v1": 30,
        "single-math-v1-multi-turn": 30,
    }
    by_id = {reference.question_id: reference for reference in references}
    for row in rows:
        if row.judge[1].startswith("single-math"):
            assert by_id[row.question_id].turns[row.turn - 1] in row.user_prompt

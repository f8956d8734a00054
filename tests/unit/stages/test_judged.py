"""The MT-Bench path end to end: a scripted model, a scripted judge, FastChat's files out."""

import json
import os
from pathlib import Path

import pytest

from fusion_ray.config import JudgeConfig
from fusion_ray.judging.prompts import SINGLE_PROMPTS
from fusion_ray.stages.judged import judge_answers
from fusion_ray.store import Artifact, Store
from fusion_ray.workers.judge import EndpointError, Retry
from tests.scripted_server import Script, Server, say, scripted

QUICK = Retry(attempts=2, timeout_s=5.0, first_wait_s=0.01)
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Again."]},
    {"question_id": 82, "category": "writing", "turns": ["Write a song.", "Again."]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "Twice that?"], "reference": ["2", "4"]},
]


def judge_config(folder: Path, url: str, **overrides: object) -> JudgeConfig:
    """A question file and prompts in `folder`, the judge at `url`."""
    templates = ("Q {question} A {answer}", "Q {question} R {ref_answer_1} A {answer}")
    multi = ("A {answer_1} A {answer_2}", "R {ref_answer_2} A {answer_2}")
    prompts = [
        {"name": name, "type": "single", "system_prompt": "s", "prompt_template": template}
        for name, template in zip(SINGLE_PROMPTS, (*templates, *multi), strict=True)
    ]
    for name, rows in (("question.jsonl", QUESTIONS), ("judge_prompts.jsonl", prompts)):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    files = {"questions": str(folder / "question.jsonl"), "prompts": str(folder / "judge_prompts.jsonl")}
    return JudgeConfig(**(files | {"url": url, "model": "org/judge-1", "api_key_env": "TEST_JUDGE_KEY"} | overrides))


def run(out: Artifact, model: Server, config: JudgeConfig):  # type: ignore[no-untyped-def]
    return judge_answers(
        out,
        name="fused",
        endpoint=(model.url, "model-key"),
        config=config,
        max_tokens=32,
        answer_concurrency=2,
        bootstrap=100,
        seed=0,
        report=lambda _: None,
        retry=QUICK,
    )


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "judge-key-77")


@pytest.fixture
def out(tmp_path: Path) -> Artifact:
    return Store(str(tmp_path / "store")).artifact("evaluate", 1, {}, {})


def model_script(body: dict[str, object], _: int) -> tuple[int, object, dict[str, str], float]:
    return say(f" answer {len(body['messages'])} \n")  # type: ignore[arg-type]


def by_category(body: dict[str, object], _: int) -> tuple[int, object, dict[str, str], float]:
    text = str(body["messages"][1]["content"])  # type: ignore[index]
    if text.startswith("Q Write a song"):
        return say("no rating at all")
    return say("Rating: [[9]]" if " R " in text or text.startswith("R ") else "Rating: [[5]]")


def test_files_scores_and_summary(out: Artifact, tmp_path: Path) -> None:
    with scripted(model_script) as model, scripted(by_category) as judge:
        units, summary = run(out, model, judge_config(tmp_path, judge.url))
    assert [unit.name for unit in units] == [
        "mt_bench/model_answer/fused.jsonl",
        "mt_bench/model_judgment/org--judge-1_single.jsonl",
        "mt_bench/scores.json",
    ]
    answers = [json.loads(line) for line in out.read_bytes(units[0].name).splitlines()]
    assert [set(row) for row in answers] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert answers[0]["choices"] == [{"index": 0, "turns": ["answer 1", "answer 3"]}]
    rows = [json.loads(line) for line in out.read_bytes(units[1].name).splitlines()]
    assert [(row["question_id"], row["turn"], row["score"]) for row in rows] == [
        (81, 1, 5),
        (81, 2, 5),
        (82, 1, -1),
        (82, 2, 5),
        (111, 1, 9),
        (111, 2, 9),
    ]
    assert {row["model"] for row in rows} == {"fused"}
    scores = out.read_json("mt_bench/scores.json")
    assert scores["categories"]["writing"] == {"mean": 5, "low": 5, "high": 5, "n": 3, "dropped": 1}  # type: ignore[call-overload, index]
    assert scores["categories"]["math"]["mean"] == 9  # type: ignore[call-overload, index]
    assert scores["turns"]["1"]["dropped"] == 1  # type: ignore[call-overload, index]
    assert summary == {"model": "org/judge-1", "turn 1": 7, "turn 2": 19 / 3, "both": 6.6, "dropped": 1, "failed": 0}
    assert model.authorizations == ["Bearer model-key"] * 6
    assert set(judge.authorizations) == {"Bearer judge-key-77"}
    assert [name for name in out.names() if "parts" in name] == []
    stored = b"".join(out.read_bytes(name) for name in out.names())
    assert b"judge-key-77" not in stored
    assert b"model-key" not in stored


def test_a_cut_off_run_asks_only_for_what_is_missing(
    out: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_ray.stages.judged._QUESTIONS_A_PART", 1)

    def refuses_math(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return say("quota", 403) if "R" in str(body["messages"]) else by_category(body, before)

    with scripted(model_script) as model:
        with scripted(refuses_math) as judge, pytest.raises(EndpointError, match="question 111"):
            run(out, model, judge_config(tmp_path, judge.url))
        with scripted(by_category) as judge:
            _, summary = run(out, model, judge_config(tmp_path, judge.url))
        assert len(judge.requests) == 2  # question 111 alone
        with scripted(by_category) as judge:
            assert run(out, model, judge_config(tmp_path, judge.url))[1] == summary
        assert judge.requests == []
    assert len(model.requests) == 6
    assert summary["both"] == 6.6


def test_a_judge_out_of_reach_for_some_is_counted(out: Artifact, tmp_path: Path) -> None:
    def fails_on_songs(body: dict[str, object], before: int) -> tuple[int, object, dict[str, str], float]:
        return say("down", 500) if "song" in str(body["messages"]) else by_category(body, before)

    with scripted(model_script) as model, scripted(fails_on_songs) as judge:
        units, summary = run(out, model, judge_config(tmp_path, judge.url))
    assert (summary["dropped"], summary["failed"]) == (1, 1)
    rows = [json.loads(line) for line in out.read_bytes(units[1].name).splitlines()]
    assert [row["judgment"] for row in rows if row["score"] == -1] == ["$ERROR$"]


def test_what_is_missing_is_named(out: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Script = by_category
    with scripted(model_script) as model, scripted(script) as judge:
        with pytest.raises(ValueError, match=r"evaluate\.judge\.references: cannot read"):
            run(out, model, judge_config(tmp_path, judge.url, references=str(tmp_path / "nothing.jsonl")))
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"question_id": 1}')
        with pytest.raises(ValueError, match=r"broken\.jsonl, line 1"):
            run(out, model, judge_config(tmp_path, judge.url, references=str(broken)))
        monkeypatch.delenv("TEST_JUDGE_KEY")
        with pytest.raises(ValueError, match="TEST_JUDGE_KEY"):
            run(out, model, judge_config(tmp_path, judge.url))
    assert model.requests == []
    assert judge.requests == []


def test_mt_bench_files_go_in_as_they_are(out: Artifact, tmp_path: Path) -> None:
    data = Path(os.environ.get("FUSION_RAY_DATA", Path(__file__).parents[3] / ".." / "shared" / "data")) / "mt_bench"
    if not data.exists():
        pytest.skip(f"no MT-Bench files at {data}: set FUSION_RAY_DATA to the folder that holds mt_bench")
    with scripted(model_script) as model, scripted(lambda *_: say("Rating: [[6]]")) as judge:
        config = judge_config(
            tmp_path,
            judge.url,
            questions=str(data / "question.jsonl"),
            prompts=str(data / "judge_prompts.jsonl"),
            references=str(data / "reference_answer" / "gpt-4.jsonl"),
        )
        units, summary = run(out, model, config)
    assert [unit.rows for unit in units[:2]] == [80, 160]
    assert (summary["turn 1"], summary["turn 2"], summary["dropped"]) == (6, 6, 0)
    categories = out.read_json("mt_bench/scores.json")["categories"]
    assert {name: entry["n"] for name, entry in categories.items()} == dict.fromkeys(  # type: ignore[union-attr, index, call-overload]
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), 20
    )

"""The evaluate stage on a local Ray and real vLLM with tiny models: one actor for several models, files, resume, a killed actor, bad input."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from fusion_ray.config import EvaluateConfig, WorkerResources
from fusion_ray.judging.questions import dump_jsonl, make_answer
from fusion_ray.stages.evaluate import EvaluateJob, evaluate, evaluate_many
from fusion_ray.store import Artifact, Store
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.ray

ONE_ACTOR = WorkerResources(max_workers=1, engine={"kv_cache_memory_bytes": 100_000_000})
TURNS = [["What is 6 times 7?", "And twice that?"], ["List three animals.", "Again."], ["Where is Paris?", "And Rome?"]]
CATEGORIES = ["math", "stem", "stem"]
SAID = ["Paris is the capital of France.", "Où est la gare ?"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(make_tiny_model(root / family, family)) for family in ("llama", "gpt_neox", "gemma")}


def write_config(folder: Path, references: list[list[str]] | None = None, **overrides: object) -> EvaluateConfig:
    rows = [
        {"question_id": 10 + number, "category": category, "turns": turns, "reference": reference}
        for number, (category, turns, reference) in enumerate(
            zip(CATEGORIES, TURNS, references or [["x", "y"]] * 3, strict=True)
        )
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": SAID[0]}]
    talk += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": SAID[1]}]
    (folder / "heldout.jsonl").write_text(json.dumps({"conversations": talk}) + '\n{"conversations": []}\n')
    settings: dict[str, object] = {
        "questions": str(folder / "questions.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "max_tokens": 10,
        "max_length": 255,
        "bootstrap": 200,
    }
    return EvaluateConfig(**(settings | overrides))  # type: ignore[arg-type]


def artifact(folder: Path, name: str) -> Artifact:
    return Store(str(folder / "store")).artifact("evaluate", 1, {"name": name}, {})


def answers_of(out: Artifact, name: str) -> list[list[str]]:
    return [
        json.loads(line)["choices"][0]["turns"] for line in out.read_bytes(f"model_answer/{name}.jsonl").splitlines()
    ]


def evaluators() -> set[int]:
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "_Evaluator" in " ".join(process.info["cmdline"] or [])
    }


def test_models_go_through_one_actor_and_are_scored(cluster: None, folders: dict[str, str], tmp_path: Path) -> None:
    seen: set[int] = set()
    reports: dict[str, list[dict[str, object]]] = {name: [] for name in folders}
    jobs = [
        EvaluateJob(
            artifact(tmp_path, name),
            name,
            folder,
            report=lambda row, name=name: (reports[name].append(dict(row)), seen.update(evaluators())),
        )
        for name, folder in folders.items()
    ]
    manifests = evaluate_many(jobs, config=write_config(tmp_path), seed=3, resources=ONE_ACTOR)
    assert len(seen) == 1
    for job, manifest in zip(jobs, manifests, strict=True):
        assert {unit.name for unit in manifest.units} == {
            f"model_answer/{job.name}.jsonl",
            "scores.json",
            "bits_per_byte.json",
        }
        scores, bits = job.out.read_json("scores.json"), job.out.read_json("bits_per_byte.json")
        assert {name: entry["n"] for name, entry in scores["categories"].items()} == {"math": 1, "stem": 2}  # type: ignore[union-attr, index, call-overload]
        assert scores["overall"] == {"mean": 0, "low": 0, "high": 0, "n": 3}
        assert [row["question_id"] for row in scores["items"]] == [10, 11, 12]  # type: ignore[union-attr, index, call-overload]
        assert bits["bytes"] == sum(len(text.encode()) for text in SAID)
        assert (bits["conversations"], bits["rejected"]) == (1, 1)
        assert bits["bits_per_byte"] == bits["bits"] / bits["bytes"]  # type: ignore[operator]
        assert manifest.info["bits_per_byte"] == bits["bits_per_byte"]
        assert manifest.info["overall"] == scores["overall"]
        assert str(manifest.info["engine"]).startswith("vllm")
        assert reports[job.name][-1] == {"done": 1, "total": 1, "unit": "models"}
    assert len({json.dumps(answers_of(job.out, job.name)) for job in jobs}) == 3
    assert len({job.out.read_json("bits_per_byte.json")["bits"] for job in jobs}) == 3

    # The model's own answers as references score 1 where and only where they agree. Beside it a run that was killed after its answers: they are
    # scored as they lie there, only the bits are measured.
    said = answers_of(jobs[0].out, "llama")
    changed = [[said[0][0], "something else"], *said[1:]]
    again, resumed = artifact(tmp_path, "again"), artifact(tmp_path, "resumed")
    rows = [make_answer(10 + number, "llama", turns, 1.0) for number, turns in enumerate(changed)]
    unit = resumed.commit_bytes("model_answer/llama.jsonl", dump_jsonl(rows).encode(), rows=3)
    pair = [EvaluateJob(out, "llama", folders["llama"]) for out in (again, resumed)]
    first, second = evaluate_many(pair, config=write_config(tmp_path, changed), seed=3, resources=ONE_ACTOR)
    assert answers_of(again, "llama") == said
    scores = again.read_json("scores.json")
    assert [row["turns"] for row in scores["items"]] == [[1, 0], [1, 1], [1, 1]]  # type: ignore[union-attr, index, call-overload]
    assert scores["categories"]["math"]["mean"] == 0.5  # type: ignore[index, call-overload]
    assert first.info["overall"]["mean"] == pytest.approx(2.5 / 3)  # type: ignore[index, call-overload]
    assert second.info["overall"] == {"mean": 1, "low": 1, "high": 1, "n": 3}
    assert resumed.unit("model_answer/llama.jsonl") == unit
    assert second.info["bits_per_byte"] == first.info["bits_per_byte"]

    # Sealed artefacts are left alone: no actor starts.
    before = evaluators()
    assert evaluate_many(jobs, config=write_config(tmp_path), seed=3, resources=ONE_ACTOR) == manifests
    assert evaluators() <= before


def test_a_killed_actor_is_replaced(cluster: None, folders: dict[str, str], tmp_path: Path) -> None:
    others = evaluators()
    done: list[object] = []

    def work() -> None:
        manifest = evaluate(
            artifact(tmp_path, "llama"),
            name="llama",
            folder=folders["llama"],
            endpoint=None,
            config=write_config(tmp_path),
            seed=0,
            resources=ONE_ACTOR,
            report=lambda _: None,
        )
        done.append(manifest.info["overall"])

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 120
    while not (fresh := evaluators() - others):
        assert time.monotonic() < deadline, "no actor came up"
        time.sleep(0.1)
    for pid in fresh:
        psutil.Process(pid).kill()
    thread.join(timeout=240)
    assert done == [{"mean": 0, "low": 0, "high": 0, "n": 3}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "no-reference"}, r"evaluate\.questions .*question 1 has 2 turns and 0 references"),
        ({"questions": "missing"}, r"evaluate\.questions: cannot read"),
        ({"heldout": "empty"}, r"evaluate\.heldout .* holds no conversation"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    (tmp_path / "no-reference").write_text('{"question_id": 1, "category": "math", "turns": ["a", "b"]}')
    (tmp_path / "empty").write_text("")
    (tmp_path / "empty").rename(tmp_path / "empty.jsonl")
    paths = {key: str(tmp_path / (value + ".jsonl" if value == "empty" else value)) for key, value in change.items()}
    job = EvaluateJob(artifact(tmp_path, "m"), "m", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        evaluate_many([job], config=write_config(tmp_path, **paths), seed=0, resources=ONE_ACTOR)
    assert not job.out.sealed

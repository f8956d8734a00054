"""The teach stage on a local Ray cluster with real vLLM engines: equal to a plain teacher, side by side, and whole whatever is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.shards import REJECTED, decode_conversations, decode_rejected
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.stages import teach as stage
from fusion_ray.store import Artifact, Manifest, Store
from fusion_ray.workers.attempts import TeachError
from tests.teaching import make_corpus
from tests.tiny import SENTENCES, make_tiny_model

pytestmark = pytest.mark.ray
CONFIG = TeachConfig(top_k=5, max_length=256)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "one", "llama", "bytelevel", seed=1)
    make_tiny_model(folder / "two", "mistral", "sentencepiece", "nosystem", seed=2)
    return {name: ModelConfig(name=name, path=str(folder / name), dtype="float32") for name in ("one", "two")}


def run(out: Artifact, corpus: Artifact, model: ModelConfig, **changes: object) -> Manifest:
    from fusion_ray.stages.teach import teach

    settings: dict[str, object] = {
        "template": None,
        "config": CONFIG,
        "max_rejected": 0.01,
        "seed": 0,
        "resources": TeachResources(),
        "report": lambda figures: None,
    }
    return teach(out, corpus, model=model, **(settings | changes))  # type: ignore[arg-type]


def contents(out: Artifact) -> dict[str, bytes]:
    return {unit.name: out.read_bytes(unit.name) for unit in out.manifest().units}


@pytest.fixture(scope="module")
def undisturbed(
    cluster: None, models: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, dict[str, Artifact], dict[str, Manifest]]:
    """A corpus and what both models teach of it, the two stages run in two threads of this driver."""
    folder = tmp_path_factory.mktemp("undisturbed")
    corpus = make_corpus(folder)
    outs = {name: Store(str(folder / "store")).artifact("teach", 1, {"model": name}, {}) for name in models}
    manifests: dict[str, Manifest] = {}
    figures: list[object] = []

    def work(name: str) -> None:
        manifests[name] = run(outs[name], corpus, models[name], report=figures.append)

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(manifests) == set(models), "a thread failed"
    assert len(figures) == 8
    return corpus, outs, manifests


def test_two_models_side_by_side(
    undisturbed: tuple[Artifact, dict[str, Artifact], dict[str, Manifest]], models: dict[str, ModelConfig]
) -> None:
    corpus, outs, manifests = undisturbed
    for name, manifest in manifests.items():
        info = manifest.info
        assert info["rows"] == 48
        assert (info["rejected"], info["quarantined"], info["cut_rows"], info["unreached"]) == (0, 0, 0, 0)
        assert info["engine"].startswith("vllm 0.")
        assert info["bits_per_byte"] > 0.5
        assert decode_rejected(outs[name].read_bytes(REJECTED)) == []
        outs[name].verify()
        assert not outs[name].exists("_attempts")
        for unit in corpus.manifest().units:
            if unit.name != REJECTED:
                wanted = [conversation.id for conversation in decode_conversations(corpus.read_bytes(unit.name))]
                assert [row.id for row in from_table(decode(outs[name].read_bytes(unit.name)))] == wanted


def test_a_second_call_does_nothing(
    undisturbed: tuple[Artifact, dict[str, Artifact], dict[str, Manifest]], models: dict[str, ModelConfig]
) -> None:
    corpus, outs, manifests = undisturbed
    started = time.monotonic()
    assert run(outs["one"], corpus, models["one"]) == manifests["one"]
    assert time.monotonic() - started < 1


def test_a_killed_actor_loses_and_doubles_nothing(
    undisturbed: tuple[Artifact, dict[str, Artifact], dict[str, Manifest]],
    models: dict[str, ModelConfig],
    tmp_path: Path,
) -> None:
    corpus, outs, _ = undisturbed
    out = Store(str(tmp_path)).artifact("teach", 1, {}, {})
    killed: list[int] = []

    def kill_once(figures: object) -> None:
        if not killed:
            killed.extend(_actor_pids())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    manifest = run(out, corpus, models["one"], report=kill_once)
    assert killed
    assert manifest.info["rows"] == 48
    assert contents(out) == contents(outs["one"])


def _actor_pids() -> list[int]:
    """Processes of this machine that are actors of this test's class; Ray names a worker's process after its actor."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            if b"TeachShards" in command and _is_ours(int(parent)):
                found.append(int(folder.name))
    return found


def _is_ours(raylet: int) -> bool:
    return ray._private.worker._global_node.node_ip_address is not None and any(
        process.process.pid == raylet
        for processes in ray._private.worker._global_node.all_processes.values()
        for process in processes
    )


def test_a_row_that_kills_engines_is_quarantined(cluster: None, models: dict[str, ModelConfig], tmp_path: Path) -> None:
    """Whatever process has the long row in its engine is killed: stopped first, so that the marker is sure to speak of the moment of its death."""
    turns = [("human", "Tell it all."), ("gpt", " ".join(SENTENCES))]
    long = {"id": "killer", "conversations": [{"from": role, "value": value} for role, value in turns]}
    corpus = make_corpus(tmp_path, rows=11, rows_per_shard=12, extra=[long])
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    killed: set[int] = set()
    stop = threading.Event()

    def kill_what_reads_it() -> None:
        while not stop.is_set():
            for marker in Path(out.path("_attempts")).glob("*.json"):
                state = _read(marker)
                pid = state.get("pid", 0)
                if "killer" not in state.get("running", ()) or pid in killed:
                    continue
                os.kill(pid, signal.SIGSTOP)
                if "killer" in _read(marker).get("running", ()):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                else:
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.001)

    # One token-bounded step after the other, so that the long row is in the engine for a good while.
    slow = TeachResources(engine={"max_num_batched_tokens": 32, "max_num_seqs": 1})
    killer = threading.Thread(target=kill_what_reads_it)
    killer.start()
    try:
        settings = TeachConfig(top_k=5, max_length=480)
        manifest = run(out, corpus, models["one"], max_rejected=0.1, resources=slow, config=settings)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 3  # once in a batch, twice alone
    assert manifest.info["quarantined"] == 1
    assert manifest.info["rows"] == 11
    (missing,) = decode_rejected(out.read_bytes(REJECTED))
    assert (missing.id, missing.row) == ("killer", 12)
    assert "died twice" in missing.reason


def _read(marker: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(marker.read_text()))
    except FileNotFoundError:
        return {}


def test_a_template_that_refuses_most_rows_fails_the_stage(
    cluster: None, models: dict[str, ModelConfig], tmp_path: Path
) -> None:
    row = {"id": "first", "messages": [{"role": r, "content": "Say it."} for r in ("system", "user", "assistant")]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    corpus = Store(str(tmp_path / "store")).artifact("corpus", 1, {}, {})
    settings = {"format": "auto", "rows_per_shard": 4, "max_rows": None, "max_rejected": 0.0}
    ingest(corpus, paths=[str(tmp_path / "data.jsonl")], report=lambda figures: None, **settings)  # type: ignore[arg-type]
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    with pytest.raises(ValueError, match=r"model two.*row first.*System role not supported"):
        run(out, corpus, models["two"])
    assert not out.sealed


def test_a_model_without_chat_template_is_named(cluster: None, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "bare", template=None)
    model = ModelConfig(name="bare", path=str(tmp_path / "bare"), dtype="float32")
    corpus = make_corpus(tmp_path, rows=4)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    with pytest.raises(ValueError, match="the tokenizer of bare has no chat template"):
        run(out, corpus, model)


def test_an_argument_that_the_engine_does_not_know_is_told_once(
    cluster: None, models: dict[str, ModelConfig], tmp_path: Path
) -> None:
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    config = TeachConfig(top_k=5, max_length=256, engine={"bogus": 1})
    with pytest.raises(ValueError, match=r"vLLM refuses the engine arguments of one \(bogus\): .*'bogus'"):
        run(out, make_corpus(tmp_path, rows=4), models["one"], config=config)


class Unable:
    """A teacher whose start fails."""

    def __init__(self, *unused: object, **settings: object) -> None:
        raise RuntimeError("no memory is left on the card")

    def __call__(self, batch: object) -> object:
        raise AssertionError("it never started")


def test_an_engine_that_does_not_start_is_told_in_one_line(
    cluster: None, models: dict[str, ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "TeachShards", Unable)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    with pytest.raises(
        TeachError, match=r"^a teacher does not start: RuntimeError: no memory is left on the card \(its log"
    ):
        run(out, make_corpus(tmp_path, rows=4), models["one"])

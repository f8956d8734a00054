"""The served teacher against vLLM's own server (CPU): the arrays of the engine in this machine, alone and through the teach stage. About 80 s."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from fusion_ray.config import EndpointConfig, ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.logprobs.codec import TeacherRow, decode, encode, from_table
from fusion_ray.store import Artifact, Manifest, Store
from fusion_ray.workers.judge import EndpointError
from fusion_ray.workers.teacher import Teacher
from tests.ray.teacher_process import conversations
from tests.tiny import SENTENCES, make_tiny_model

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
KEY = "sk-of-the-test"
SETTINGS = {"top_k": 6, "max_length": 150}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
IN_PROCESS = """
import sys
from pathlib import Path
from fusion_ray.logprobs.codec import encode
from fusion_ray.workers.teacher import Teacher
from tests.ray.teacher_process import conversations
teacher = Teacher(sys.argv[1], top_k=6, max_length=150, dtype="float32", name="tiny")
Path(sys.argv[2]).write_bytes(encode(teacher.teach(conversations()).table))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    options += ["--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    with open(log, "wb") as file:
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def in_process(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[TeacherRow]:
    out = tmp_path_factory.mktemp("in_process") / "rows.parquet"
    subprocess.run([sys.executable, "-c", IN_PROCESS, folder, str(out)], env=os.environ | ENVIRONMENT, check=True)
    return from_table(decode(out.read_bytes()))


def close(one: TeacherRow, other: TeacherRow) -> None:
    for name in ("ids", "position", "byte_start", "byte_end", "message", "topk_ids"):
        assert (getattr(one, name) == getattr(other, name)).all(), name
    assert np.abs(one.topk_logprobs.astype(np.float32) - other.topk_logprobs.astype(np.float32)).max() < 5e-3  # float16
    assert np.abs(one.label_logprob - other.label_logprob).max() < 1e-4


def test_the_server_gives_what_the_engine_gives(folder: str, url: str, in_process: list[TeacherRow]) -> None:
    teacher = Teacher(folder, name="tiny", endpoint=EndpointConfig(url=url, concurrency=4), api_key=KEY, **SETTINGS)
    taught = teacher.teach(conversations())
    rows = from_table(decode(encode(taught.table)))
    assert [row.id for row in rows] == [row.id for row in in_process]
    for row, expected in zip(rows, in_process, strict=True):
        close(row, expected)


def test_a_wrong_key_is_refused_at_once(folder: str, url: str) -> None:
    started = time.monotonic()
    with pytest.raises(EndpointError, match="401"):
        Teacher(folder, name="tiny", endpoint=EndpointConfig(url=url), api_key="wrong", **SETTINGS)
    assert time.monotonic() - started < 10


def test_more_logprobs_than_the_server_allows_has_its_cure(folder: str, url: str) -> None:
    with pytest.raises(EndpointError, match="--max-logprobs 64"):
        Teacher(folder, name="tiny", endpoint=EndpointConfig(url=url), api_key=KEY, top_k=64, max_length=150)


def test_another_model_is_told(url: str, tmp_path: Path) -> None:
    other = str(make_tiny_model(tmp_path, "llama", "sentencepiece"))
    with pytest.raises(ValueError, match="another model"):
        Teacher(other, name="other", endpoint=EndpointConfig(url=url), api_key=KEY, **SETTINGS)


@pytest.fixture
def cluster() -> Iterator[Path]:
    """The folder of a local cluster's logs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    context = ray.init(
        "local",
        num_cpus=2,
        object_store_memory=200_000_000,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield Path(context.address_info["session_dir"]) / "logs"
    ray.shutdown()


def stage(out: Artifact, corpus: Artifact, model: ModelConfig, report: list[dict[str, object]]) -> Manifest:
    from fusion_ray.stages.teach import teach

    return teach(
        out,
        corpus,
        model=model,
        template=None,
        config=TeachConfig(top_k=6, max_length=150),
        max_rejected=0.0,
        seed=0,
        resources=TeachResources(max_workers=2),
        report=lambda figures: report.append(dict(figures)),
    )


def test_the_stage_asks_the_server_and_keeps_the_key_to_itself(
    cluster: Path, folder: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"id": f"r{n}", "messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(SENTENCES)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = Store(str(tmp_path / "store"))
    corpus, out = store.artifact("corpus", 1, {}, {}), store.artifact("teach", 1, {}, {})
    settings = {"format": "auto", "rows_per_shard": 4, "max_rows": None, "max_rejected": 0.0}
    ingest(corpus, paths=[str(tmp_path / "data.jsonl")], report=lambda figures: None, **settings)  # type: ignore[arg-type]
    endpoint = EndpointConfig(url=url, api_key_env="TEST_TEACHER_KEY")
    model = ModelConfig(name="tiny", path=folder, endpoint=endpoint)
    told: list[dict[str, object]] = []
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    with pytest.raises(ValueError, match="TEST_TEACHER_KEY, which is not set"):
        stage(out, corpus, model, told)
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    manifest = stage(out, corpus, model, told)
    shards = [unit for unit in manifest.units if unit.name != REJECTED]
    assert manifest.info["rows"] == len(SENTENCES)
    assert manifest.info["engine"] == "vllm behind an endpoint"
    assert told[-1]["done"] == told[-1]["total"] == len(shards)
    assert told[-1]["rows"] == len(SENTENCES)
    assert {"tokens_per_second", "rows_per_second", "eta_seconds", "tokens_per_second_of_an_actor"} <= set(told[-1])
    written = [path for path in Path(out.path("")).rglob("*") if path.is_file()]
    host = url.split("//")[1].split("/")[0]
    assert not any(text.encode() in path.read_bytes() for path in written for text in (KEY, host))
    logs = [path for path in cluster.rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if KEY.encode() in path.read_bytes()]

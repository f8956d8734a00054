"""The endpoint on real Ray Serve and vLLM with tiny models: the key, the OpenAI client, several models, evaluate through it. One Serve start for the module."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import ray
from ray import serve

from fusion_ray.config import EvaluateConfig, ServeConfig, WorkerResources
from fusion_ray.stages.evaluate import EvaluateJob, evaluate_many
from fusion_ray.stages.serve import build_app, is_loopback, serving
from fusion_ray.stages.serve_model import llm_config
from fusion_ray.store import Store
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.ray

KEY = "endpoint-key-5f1d0c"
CONFIG = ServeConfig(port=0, max_model_len=256)
SMALL = WorkerResources(cpus=1, engine={"kv_cache_memory_bytes": 100_000_000})
QUESTIONS = [
    {
        "question_id": 1,
        "category": "math",
        "turns": ["What is 6 times 7?", "And twice that?"],
        "reference": ["42", "84"],
    },
    {"question_id": 2, "category": "stem", "turns": ["List three animals.", "Again."], "reference": ["a cat", "a dog"]},
]


@dataclass(frozen=True)
class Endpoint:
    url: str
    folders: dict[str, str]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("TEST_APP_KEY", "key-of-the-deployed-app")  # replicas inherit it, as a pod's secret
        ray.init("local", num_cpus=4, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def endpoint(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "tiny-llama": str(make_tiny_model(root / "llama", "llama")),
        "tiny-qwen": str(make_tiny_model(root / "qwen", "qwen2", seed=3)),
    }
    with serving(folders, config=CONFIG, resources=SMALL, api_key=KEY) as url:
        yield Endpoint(url, folders)
    assert serve.status().applications == {}


def raw(url: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_both_models_answer_an_openai_client(endpoint: Endpoint) -> None:
    client = endpoint.client()
    assert {model.id for model in client.models.list()} == {"tiny-llama", "tiny-qwen"}
    texts = set()
    for model in endpoint.folders:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is your name?"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        assert reply.model == model
        assert reply.usage is not None
        assert 0 < reply.usage.completion_tokens <= 8
        assert reply.choices[0].logprobs is not None
        texts.add(reply.choices[0].message.content)
    assert len(texts) == 2


def test_answers_stream(endpoint: Endpoint) -> None:
    stream = endpoint.client().chat.completions.create(
        model="tiny-llama", messages=[{"role": "user", "content": "Hello"}], max_tokens=6, temperature=0, stream=True
    )
    assert sum(1 for chunk in stream if chunk.choices) >= 2


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", KEY.upper()])
def test_a_wrong_key_is_refused(endpoint: Endpoint, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        endpoint.client(key).chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
    assert error.value.status_code == 401
    assert error.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "path", ["/models", "/chat/completions", "/completions", "/../docs", "/../openapi.json", "/../tokenize"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": KEY}, {"X-Api-Key": KEY}])
def test_a_missing_key_is_refused_on_every_route(endpoint: Endpoint, path: str, headers: dict[str, str]) -> None:
    url = endpoint.url + path if ".." not in path else endpoint.url.removesuffix("/v1") + path.removeprefix("/..")
    for body in (None, b"{}"):
        status, answer = raw(url, headers | {"Content-Type": "application/json"}, body)
        assert status == 401
        assert set(answer["error"]) == {"message", "type", "param", "code"}  # type: ignore[call-overload]


def test_an_unknown_model_is_not_found(endpoint: Endpoint) -> None:
    with pytest.raises(openai.NotFoundError):
        endpoint.client().chat.completions.create(model="other", messages=[{"role": "user", "content": "Hello"}])


def test_the_key_is_in_no_log_and_no_status(endpoint: Endpoint) -> None:
    endpoint.client().models.list()
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # type: ignore[attr-defined]
    files = [file for file in logs.rglob("*") if file.is_file() and not file.is_socket()]
    assert any("serve" in file.name for file in files)
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    assert KEY not in str(serve.status())


def test_autoscaling_targets_are_finite(endpoint: Endpoint) -> None:
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeInstanceDetails

    details = ServeInstanceDetails(**_get_global_client().get_serve_details())
    for deployment in details.applications["fusion-ray"].deployments.values():
        settings = deployment.deployment_config
        assert settings.max_ongoing_requests <= 1000
        assert settings.autoscaling_config["target_ongoing_requests"] <= 1000
        assert settings.autoscaling_config["max_replicas"] == 1


def test_evaluate_through_the_endpoint_gives_the_batch_answers(endpoint: Endpoint, tmp_path: Path) -> None:
    questions, heldout = tmp_path / "questions.jsonl", tmp_path / "heldout.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    row = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Paris is the capital."}]}
    heldout.write_text(json.dumps(row))
    config = EvaluateConfig(
        questions=str(questions), heldout=str(heldout), max_tokens=12, max_length=255, bootstrap=100
    )
    store = Store(str(tmp_path / "store"))
    jobs = [
        EvaluateJob(
            out=store.artifact("evaluate", 1, {"model": name, "through": through}, {}),
            name=name,
            folder=folder,
            endpoint=(endpoint.url, KEY) if through == "endpoint" else None,
        )
        for name, folder in endpoint.folders.items()
        for through in ("endpoint", "batch")
    ]
    manifests = evaluate_many(jobs, config=config, seed=0, resources=SMALL)
    said = [
        [json.loads(line)["choices"] for line in job.out.read_bytes(f"model_answer/{job.name}.jsonl").splitlines()]
        for job in jobs
    ]
    for through_endpoint, in_batch in ((said[0], said[1]), (said[2], said[3])):
        for (served,), (batch,) in zip(through_endpoint, in_batch, strict=True):
            # A random model is cut off in the middle of a character, which the two detokenizers show differently; turn 2 follows turn 1.
            first, second = (row["turns"][0].rstrip("\ufffd") for row in (served, batch))
            assert first == second
            if served["turns"][0] == batch["turns"][0]:
                assert served["turns"][1].rstrip("\ufffd") == batch["turns"][1].rstrip("\ufffd")
    assert said[0] != said[2]
    assert ["served_by" in manifest.info for manifest in manifests] == [True, False, True, False]
    assert manifests[0].info["bits_per_byte"] == manifests[1].info["bits_per_byte"]
    assert KEY not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "store").rglob("*") if path.is_file()
    )


def test_a_deployed_app_reads_its_key_in_the_replica(endpoint: Endpoint) -> None:
    """What `serve deploy` and RayService do with `fusion_ray.stages.serve:build_app`, beside the running application."""
    model = llm_config("deployed", endpoint.folders["tiny-llama"], config=CONFIG, resources=SMALL)
    app = build_app(
        {
            "llm_configs": [model],
            "api_key_env": "TEST_APP_KEY",
            "ingress_deployment_config": {"ray_actor_options": {"num_cpus": 0}},
        }
    )
    serve.run(app, name="deployed", route_prefix="/deployed")
    root = endpoint.url.removesuffix("/v1")
    try:
        assert raw(f"{root}/deployed/v1/models", {"Authorization": f"Bearer {KEY}"})[0] == 401
        status, answer = raw(f"{root}/deployed/v1/models", {"Authorization": "Bearer key-of-the-deployed-app"})
        assert status == 200
        assert [row["id"] for row in answer["data"]] == ["deployed"]  # type: ignore[attr-defined, index]
    finally:
        serve.delete("deployed")
    assert endpoint.client().models.list().data


def test_without_a_key_serving_is_refused_unless_insecure_on_loopback() -> None:
    models = {"m": "/nowhere"}
    with (
        pytest.raises(ValueError, match="FUSION_RAY_API_KEY"),
        serving(models, config=CONFIG, resources=SMALL, api_key=None),
    ):
        pass
    open_host = ServeConfig(port=0, host="0.0.0.0")
    with (
        pytest.raises(ValueError, match=r"loopback hosts only and serve\.host is '0\.0\.0\.0'"),
        pytest.MonkeyPatch.context() as patch,
        serving_without_serve(patch, models, open_host),
    ):
        pass


def serving_without_serve(patch: pytest.MonkeyPatch, models: dict[str, str], config: ServeConfig):  # type: ignore[no-untyped-def]
    """As if no Serve were running: the host of the config counts then."""
    patch.setattr("fusion_ray.stages.serve._get_global_client", lambda raise_if_no_controller_running: None)
    return serving(models, config=config, resources=SMALL, api_key=None, insecure=True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_build_app_names_an_unknown_argument() -> None:
    with pytest.raises(ValueError, match="unknown argument 'insecure' of build_app"):
        build_app({"llm_configs": [], "insecure": True})

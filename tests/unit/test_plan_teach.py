"""What `plan` says of the teachers, and that an endpoint is no part of a key."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusion_ray.config import ConfigError, FusionConfig, parse_config
from fusion_ray.graph import build_graph
from fusion_ray.plan import plan_table

FIELDS = {
    "vocab_size": 32_000,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 128,
    "max_position_embeddings": 4096,
}
URL = "http://teacher.example:8000/v1"


def config_of(tmp_path: Path, *, endpoint: object = None, **sections: object) -> FusionConfig:
    for name in ("pivot", "a"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(FIELDS))
        (folder / "chat_template.jinja").write_text("x")
        (folder / "tokenizer.json").write_text("{}")
        save_file({"weight": np.zeros((8, 4), np.float32)}, folder / "model.safetensors")
    (tmp_path / "corpus.jsonl").write_text("{}")
    source: dict[str, object] = {"name": "a", "path": str(tmp_path / "a")}
    raw: dict[str, object] = {
        "run": {"storage": str(tmp_path / "runs")},
        "pivot": {"path": str(tmp_path / "pivot")},
        "sources": [source | ({"endpoint": endpoint} if endpoint else {})],
        "corpus": {"path": "corpus.jsonl"},
        "distill": {"batch_size": 1},
    }
    return parse_config(raw | sections, folder=tmp_path)


def said(config: FusionConfig) -> tuple[str, list[str]]:
    table, problems = plan_table(config)
    return str(table.caption), problems


def test_each_teacher_s_step_weights_and_cache_are_shown(tmp_path: Path) -> None:
    caption, problems = said(config_of(tmp_path))
    assert problems == []
    for name in ("pivot", "a"):
        assert (
            f"teach:{name} max_num_batched_tokens 4194: 1.1 GB of logits a step, weights 200 B, key-value cache 268.4 MB, "
            "rows at K = 10 up to 236.6 MB" in caption
        )
    gpu, _ = said(config_of(tmp_path, resources={"teach": {"gpus": 1, "engine": {"max_num_batched_tokens": 100}}}))
    assert "max_num_batched_tokens 100: 25.6 MB of logits" in gpu
    assert "key-value cache the rest of the GPU" in gpu


def test_a_served_teacher_is_shown_with_its_url(tmp_path: Path) -> None:
    caption, problems = said(config_of(tmp_path, endpoint={"url": URL, "concurrency": 7}))
    assert f"teach:a asks {URL}, 7 requests at a time" in caption
    assert problems == []


def test_what_stops_a_teacher_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "vocab_size", 8)
    assert said(config_of(tmp_path))[1] == [
        f"teach.top_k is 10, the vocabulary of {name} has 8 tokens: lower teach.top_k" for name in ("pivot", "a")
    ]
    monkeypatch.setitem(FIELDS, "vocab_size", 32_000)
    wide = config_of(tmp_path, resources={"teach": {"gpus": 2, "engine": {"tensor_parallel_size": 4}}})
    assert "set resources.teach.gpus to 4" in said(wide)[1][0]
    keyed = config_of(tmp_path, endpoint={"url": URL, "api_key_env": "NO_SUCH_KEY_HERE"})
    assert "NO_SUCH_KEY_HERE, which is not set" in said(keyed)[1][0]


def test_an_endpoint_is_no_part_of_the_key(tmp_path: Path) -> None:
    own = build_graph(config_of(tmp_path))
    served = build_graph(config_of(tmp_path, endpoint={"url": URL}))
    assert {node.id: node.key for node in own} == {node.id: node.key for node in served}


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ({"url": "http://user:secret@host/v1"}, "would be stored with the run"),
        ({"url": "http://host/v1?key=secret"}, "would be stored with the run"),
        ({"url": "host:8000/v1"}, "not an http or https URL"),
        ({"uri": URL}, r"unknown key `sources.0.endpoint.uri`: did you mean 'url'"),
    ],
)
def test_a_bad_endpoint_is_refused(tmp_path: Path, endpoint: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        config_of(tmp_path, endpoint=endpoint)
    assert "secret" not in str(caught.value)


def test_the_other_spelling_is_told_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`teach.engine`: .*set sources.0.endpoint.url"):
        config_of(tmp_path, teach={"engine": "endpoint"})

"""Which steps a request needs: a stage of one branch takes nothing of the others along."""

import json
from pathlib import Path

import pytest

from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.graph import Graph, build_graph
from fusion_ray.pipeline import steps_for


@pytest.fixture
def config(tmp_path: Path) -> FusionConfig:
    for name in ("pivot", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    for name in ("rows.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text(name)
    raw = {
        "run": {"storage": str(tmp_path / "runs")},
        "pivot": {"path": "pivot"},
        "sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}],
        "corpus": {"path": "rows.jsonl"},
        "evaluate": {"questions": "questions.jsonl"},
    }
    return parse_config(raw, folder=tmp_path)


def ids(config: FusionConfig, graph: Graph, *wanted: str) -> list[str]:
    nodes = [node for node in graph if node.id in wanted]
    return [node.id for step in steps_for(config, graph, nodes) for node in step.nodes]


def test_whole_graph_has_every_node_once(config: FusionConfig) -> None:
    graph = build_graph(config)
    found = ids(config, graph, *(node.id for node in graph))
    assert sorted(found) == sorted(node.id for node in graph)


def test_one_branch_alone(config: FusionConfig) -> None:
    graph = build_graph(config)
    assert ids(config, graph, "align:a") == ["corpus:all", "teach:pivot", "teach:a", "align:a"]
    assert ids(config, graph, "evaluate:pivot") == ["evaluate:pivot"]
    assert ids(config, graph, "evaluate:a", "evaluate:b") == ["evaluate:a", "evaluate:b"]
    assert "distill:b" not in ids(config, graph, "evaluate:target_a")

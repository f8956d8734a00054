"""From the YAML's keys to the sealed corpus: the pipeline's first step gets every setting of the section."""

import json
from collections import Counter
from pathlib import Path

from fusion_ray.config import parse_config
from fusion_ray.corpus.shards import REJECTED, decode_conversations
from fusion_ray.graph import build_graph
from fusion_ray.pipeline import steps_for
from fusion_ray.store import Artifact


def corpus(tmp_path: Path, **section: object) -> Artifact:
    for name in ("pivot", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    raw = {
        "run": {"storage": str(tmp_path / "runs")},
        "pivot": {"path": "pivot"},
        "sources": [{"name": "a", "path": "a"}],
        "corpus": section,
    }
    config = parse_config(raw, folder=tmp_path)
    graph = build_graph(config)
    (step,) = steps_for(config, graph, [graph.corpus])
    step.work([graph.corpus], lambda node: lambda figures: None)
    return graph.corpus.artifact


def rows(out: Artifact) -> list[tuple[str, str]]:
    names = [unit.name for unit in out.manifest().units if unit.name != REJECTED]
    found = [row for name in names for row in decode_conversations(out.read_bytes(name))]
    return [(row.dataset, row.messages[0].content) for row in found]


def test_the_settings_of_a_mixture_reach_the_corpus(tmp_path: Path) -> None:
    for name, key in (("one", "prompt"), ("two", "instruction")):
        answer = {"prompt": "completion", "instruction": "output"}[key]
        lines = [json.dumps({"id": n, key: f"{name if n % 5 else 'both'} {n}", answer: "x"}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = [
        {"path": "one.jsonl", "weight": 3, "format": "prompt"},
        {"path": "two.jsonl", "name": "second", "max_rows": 6},
    ]
    section = {"mixture": mixture, "max_rows": 30, "rows_per_shard": 8, "format": "alpaca"}
    out = corpus(tmp_path, **section)
    found = rows(out)
    assert Counter(dataset for dataset, _ in found) == {"one.jsonl": 24, "second": 6}
    assert len({content for _, content in found}) == 30  # the rows that both have come once
    sources = out.manifest().info["sources"]
    assert sum(counts["duplicates"] for counts in sources.values()) > 0  # type: ignore[union-attr, index, call-overload, misc]
    doubled = corpus(tmp_path, **section, deduplicate=False)
    assert len({content for _, content in rows(doubled)}) < 30
    # Of two sources many seeds give one order.
    assert any(rows(corpus(tmp_path, **section, seed=seed)) != found for seed in range(1, 5))
    shuffled = rows(corpus(tmp_path, **section, shuffle_rows=10))
    assert shuffled != found
    assert sorted(shuffled) == sorted(found)

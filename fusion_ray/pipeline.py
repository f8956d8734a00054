"""The whole run, top to bottom: corpus, teach, align, distill, merge, serve and evaluate, report. The file one reads first.

`graph.py` says which artefacts a config makes; here stands what makes each of them. Every step seals its artefact under a content key, so a second run
does nothing and a run that was cut off goes on where it was. Called by the command line and the jobs.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from fusion_ray.config import ConfigError, FusionConfig, ModelConfig
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.mixture import Source
from fusion_ray.graph import ALL, SFT, Candidate, Graph, Node
from fusion_ray.merging.parameters import complete_parameters
from fusion_ray.models import local_folder
from fusion_ray.records import Report
from fusion_ray.schedule import Listener, StageRun, Step, one, run_steps
from fusion_ray.stages.align import align
from fusion_ray.stages.align_combine import combine_all
from fusion_ray.stages.cluster import check_room, connected
from fusion_ray.stages.distill import distill
from fusion_ray.stages.evaluate import EvaluateJob, evaluate_many
from fusion_ray.stages.merge import merge
from fusion_ray.stages.serve import serving
from fusion_ray.stages.teach import teach
from fusion_ray.workers.align_setup import check_supported
from fusion_ray.workers.api_key import read_key


def run_graph(config: FusionConfig, graph: Graph, nodes: Sequence[Node], listener: Listener) -> list[StageRun]:
    """Make the artefacts of `nodes` and of all that they need. Raises the first step's error once independent work is sealed."""
    steps = steps_for(config, graph, nodes)
    if all(node.artifact.sealed for step in steps for node in step.nodes):
        return run_steps(steps, width=1, listener=listener)  # nothing to do: no cluster is started
    _check_methods(config, targets=sum(name != SFT for name in graph.distill))
    todo = {node.stage for step in steps for node in step.nodes if not node.artifact.sealed}
    with connected(config.resources):
        check_room(config.resources, todo)
        return run_steps(steps, width=config.resources.branches, listener=listener)


def steps_for(config: FusionConfig, graph: Graph, nodes: Sequence[Node]) -> list[Step]:
    """The steps that make `nodes` and all that they need, without the other nodes of a shared step."""
    wanted = {node.id for node in graph.closure(nodes)}
    kept = [(step, tuple(node for node in step.nodes if node.id in wanted)) for step in all_steps(config, graph)]
    return [replace(step, nodes=members) for step, members in kept if members]


def _check_methods(config: FusionConfig, *, targets: int) -> None:
    """What the stages would refuse hours later. Raises ConfigError naming the key."""
    check_supported(config.align)
    for number, method in enumerate(config.merge.methods):
        try:
            complete_parameters(method.method, method.parameters, targets=targets)
        except ValueError as error:
            raise ConfigError(f"`merge.methods.{number}`: {error}") from error


def all_steps(config: FusionConfig, graph: Graph) -> Iterator[Step]:
    """Every step of the run, each after what it needs."""
    resources, seed = config.resources, config.run.seed
    models = {model.name: model for model in (config.pivot, *config.sources)}

    yield one(
        graph.corpus,
        partial(
            ingest,
            paths=config.corpus.paths,
            mixture=[
                Source(
                    name=source.label,
                    paths=source.paths,
                    format=source.format or config.corpus.format,
                    key=f"corpus.mixture.{number}.path",
                    weight=source.weight,
                    max_rows=source.max_rows,
                )
                for number, source in enumerate(config.corpus.mixture)
            ],
            format=config.corpus.format,
            rows_per_shard=config.corpus.rows_per_shard,
            max_rows=config.corpus.max_rows,
            max_rejected=config.corpus.max_rejected,
            deduplicate=config.corpus.removes_copies,
            shuffle_rows=config.corpus.shuffle_rows,
            seed=config.corpus.seed,
        ),
    )

    for name, node in graph.teach.items():
        foreign = config.corpus.template == "pivot" and name != config.pivot.name
        yield one(
            node,
            partial(
                teach,
                corpus=graph.corpus.artifact,
                model=models[name],
                template=config.pivot if foreign else None,
                config=config.teach,
                max_rejected=config.corpus.max_rejected,
                seed=seed,
                resources=resources.teach,
            ),
        )

    for name, node in graph.align.items():
        yield one(
            node,
            partial(
                align,
                pivot_rows=graph.teach[config.pivot.name].artifact,
                source_rows=graph.teach[name].artifact,
                pivot=config.pivot,
                source=models[name],
                config=config.align,
                max_rejected=config.corpus.max_rejected,
                resources=resources.align,
            ),
        )

    for node in graph.combine.values():
        sources = {name: aligned.artifact for name, aligned in graph.align.items()}
        yield one(node, partial(combine_all, sources=sources, config=config.align, resources=resources.align))

    for name, node in graph.distill.items():
        settings = config.distill.model_copy(update={"fusion": "none"}) if name == SFT else config.distill
        yield one(
            node,
            partial(
                distill,
                rows=node.needs[0].artifact,
                pivot=config.pivot,
                sources=[source for source in config.sources if name in (source.name, ALL)],
                config=settings,
                seed=seed,
                max_rejected=config.corpus.max_rejected,
                resources=resources.distill,
            ),
        )

    targets = {name: node.artifact for name, node in graph.distill.items() if name != SFT}
    for method in config.merge.methods:
        yield one(
            graph.merge[method.label],
            partial(
                merge,
                pivot=config.pivot,
                targets=targets,
                method=method,
                config=config.merge,
                resources=resources.merge,
                statistics=graph.changes,
            ),
        )

    if graph.evaluate:
        batch = [candidate for candidate in graph.candidates if not candidate.served]
        served = [candidate for candidate in graph.candidates if candidate.served]
        yield Step(tuple(graph.evaluate[c.name] for c in served), partial(_evaluate_served, config, served))
        yield Step(tuple(graph.evaluate[c.name] for c in batch), partial(_evaluate, config, batch, None))


def model_folder(candidate: Candidate) -> str:
    """The local folder of a model of the graph: a reference's own or an artefact's."""
    if candidate.made_by is not None:
        return candidate.made_by.artifact.local_folder()
    assert candidate.model is not None
    return local_folder(candidate.model.path, candidate.model.revision)


def endpoint_key(config: FusionConfig) -> str:
    """The key that the run's endpoint asks for: the user's from the environment, else one made for this process."""
    return read_key(config.serve.api_key_env) or os.environ.setdefault(
        config.serve.api_key_env, secrets.token_urlsafe(32)
    )


def _evaluate(
    config: FusionConfig,
    candidates: Sequence[Candidate],
    endpoint: tuple[str, str] | None,
    todo: Sequence[Node],
    report_for: Callable[[Node], Report],
) -> None:
    nodes = {node.branch: node for node in todo}
    jobs = [
        EvaluateJob(
            out=nodes[candidate.name].artifact,
            name=candidate.name,
            folder=model_folder(candidate),
            trust_remote_code=_trusts(config, candidate.model),
            endpoint=endpoint,
            report=report_for(nodes[candidate.name]),
        )
        for candidate in candidates
        if candidate.name in nodes
    ]
    evaluate_many(jobs, config=config.evaluate, seed=config.run.seed, resources=config.resources.evaluate)


def _evaluate_served(
    config: FusionConfig, candidates: Sequence[Candidate], todo: Sequence[Node], report_for: Callable[[Node], Report]
) -> None:
    """The fused models answer through the endpoint that users would call."""
    names = {node.branch for node in todo}
    folders = {candidate.name: model_folder(candidate) for candidate in candidates if candidate.name in names}
    key = endpoint_key(config)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(folders, config=config.serve, resources=config.resources.serve, api_key=key))
        _evaluate(config, candidates, (url, key), todo, report_for)


def _trusts(config: FusionConfig, model: ModelConfig | None) -> bool:
    return (model or config.pivot).trust_remote_code

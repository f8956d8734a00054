"""What the command line shows or serves beside a run: one row in two tokenizations, an endpoint. Called by cli.py alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fusion_ray.config import ConfigError, FusionConfig, ResourcesConfig, ServeConfig, is_url, load_config
from fusion_ray.graph import Graph, build_graph
from fusion_ray.models import local_folder
from fusion_ray.pipeline import model_folder
from fusion_ray.report.explained import ExplainedView
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.serve import serve_forever
from fusion_ray.workers.align_counts import read_counts
from fusion_ray.workers.aligner import explained_row
from fusion_ray.workers.api_key import missing_key, read_key


def explain_row(config: FusionConfig, source: str, row: str) -> ExplainedView:
    """Row `row` (an id of the corpus) of the sealed alignment of `source`, to be printed. Raises ConfigError for a row that is not there."""
    graph = build_graph(config)
    model = next(model for model in config.sources if model.name == source)
    rows = (graph.teach[config.pivot.name].artifact, graph.teach[source].artifact)
    counts = read_counts(graph.align[source].artifact, config.align)
    found = explained_row(*rows, pivot=config.pivot, source=model, config=config.align, row=row, counts=counts)
    return ExplainedView(found, source)


def serve_model(target: str, overrides: Sequence[str], *, insecure: bool, say: Callable[[str], None]) -> None:
    """Serve the fused model of a run's YAML, or a model folder under its own name, until interrupted."""
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, overrides)
        folders, serve, resources = _fused(build_graph(config)), config.serve, config.resources
    else:
        if overrides:
            raise ConfigError(
                f"{overrides[0]!r}: overrides go with a run's YAML; {target!r} is served with the defaults"
            )
        name = Path(target.rstrip("/")).name if not is_url(target) else target.rstrip("/").rsplit("/", 1)[-1]
        folders, serve, resources = {name: local_folder(target)}, ServeConfig(), ResourcesConfig()
    key = None if insecure else read_key(serve.api_key_env)
    if key is None and not insecure:
        raise ConfigError(missing_key(serve.api_key_env))
    with connected(resources):
        say(f"starting {', '.join(folders)} ...")
        serve_forever(
            folders,
            config=serve,
            resources=resources.serve,
            api_key=key,
            insecure=insecure,
            ready=lambda url: say(f"{', '.join(folders)} at {url}; stop with Ctrl-C"),
        )


def _fused(graph: Graph) -> dict[str, str]:
    served = [candidate for candidate in graph.candidates if candidate.served]
    for candidate in served:
        assert candidate.made_by is not None
        if not candidate.made_by.artifact.sealed:
            raise ConfigError(f"the run has no model {candidate.name!r} yet: make it with `fusion-ray run` first")
    return {candidate.name: model_folder(candidate) for candidate in served}

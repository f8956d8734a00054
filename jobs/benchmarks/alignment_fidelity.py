"""How much of what a teacher knows survives the change of vocabulary, without training: every method and map on the same rows.

    .venv/bin/python jobs/benchmarks/alignment_fidelity.py                       # a quarter of an hour on two cores
    .venv/bin/python jobs/benchmarks/alignment_fidelity.py --rows 100 --methods spans_canonical_chain fusechat_statistics

The zoo's teachers read the zoo's corpus and GSM8K (--data; left out where it is not there) through the teach stage, the align stage carries their rows to
the zoo's pivot with `choose: source`, and the projected distributions are asked for the pivot's true tokens: `bits_per_byte_<method>_<map>` is the sum of
-log2 q(label) over the positions that have a source's distribution, over their bytes, all teachers and texts together. A label outside the projected
top-k is charged its share of the tail, spread evenly over the ids outside. `bits_per_byte_teacher` is the teachers' own, in their own tokens, on the whole
text; `teacher_bits_per_byte_<method>_<map>` is theirs on the bytes that the method covers, a token's bits spread evenly over its bytes: the least that
can be asked of it. `coverage_` is the share of pivot positions with a source's distribution; labels alone (one-hot) do not count. `missing_` is the share of
those where the label is not among the candidates. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

from fusion_ray.config import AlignConfig, FusionConfig, ModelConfig, parse_config
from fusion_ray.graph import build_graph
from fusion_ray.logprobs.codec import TeacherRow, decode, from_table
from fusion_ray.pipeline import run_graph
from fusion_ray.stages.cluster import connected
from fusion_ray.store import Artifact
from fusion_ray.workers.align_counts import needs_counts
from fusion_ray.workers.aligner import Aligner
from fusion_ray.zoo.catalogue import CORPUS, PIVOT, ZOO_MODELS
from probe.fidelity import Cost, cost
from probe.listener import Quiet
from probe.models import read_problems, write_conversations
from speed.line import Metric, line, metric, progress

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
TOP_K = 10
LENGTH = 512

SPANS = {
    f"spans_{name}{'_chain' * chain}{'_condition' * condition}": AlignConfig(
        method="spans", map=name, chain=chain, inside="condition" if condition else "skip", choose="source"
    )
    for name in ("exact", "min_edit", "statistics", "prefix", "canonical", "shares")
    for chain, condition in ((False, False), (True, False), (True, True))
}
FUSECHAT = {
    f"fusechat_{name}": AlignConfig(method="fusechat", map=name, choose="source")
    for name in ("exact", "min_edit", "statistics")
}
METHODS: Mapping[str, AlignConfig] = FUSECHAT | SPANS


@dataclass(frozen=True)
class Shard:
    """The same rows under the pivot and under one teacher."""

    pivot: bytes
    source: bytes
    pivot_rows: Mapping[str, TeacherRow]
    source_rows: Mapping[str, TeacherRow]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's test.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmarks/alignment_fidelity")
    parser.add_argument("--rows", type=int, default=400, help="of each text")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), metavar="METHOD", help="these alone")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    before = os.getloadavg()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    texts = {"zoo": CORPUS}
    if given.data.exists():
        problems = read_problems(given.data / "test.jsonl")[: given.rows]
        texts["gsm8k"] = write_conversations(work / f"gsm8k-{given.rows}.jsonl", problems)
    else:
        progress(f"{given.data} is not there: the zoo's corpus alone")
    sources = [model.name for model in ZOO_MODELS.values() if model.name != PIVOT.name]
    configs = {text: config_of(path, sources, work, given.rows) for text, path in texts.items()}
    shards: dict[tuple[str, str], list[Shard]] = {}
    with connected(next(iter(configs.values())).resources):
        for text, config in configs.items():
            shards |= {(text, source.name): taught for source, taught in teach(config).items()}
            progress(f"{text}: taught by the pivot and {', '.join(sources)}")
    metrics: dict[str, Metric] = {"bits_per_byte_teacher": metric(own_bits_per_byte(shards), "bits/byte")}
    for name in given.methods or METHODS:
        costs = {
            (text, source): measure(METHODS[name], configs[text], source, taught)
            for (text, source), taught in shards.items()
        }
        metrics |= figures(name, costs)
        progress(f"{name}: {metrics[f'bits_per_byte_{name}']['value']:.4f} bits per byte")
    loads = (before[0], os.getloadavg()[0])
    print(line("alignment_fidelity", metrics, loads=loads, packages=("numpy", "ray", "vllm", "transformers")))


def config_of(corpus: Path, sources: list[str], work: Path, rows: int) -> FusionConfig:
    return parse_config(
        {
            "run": {"name": "fidelity", "storage": str(work / "runs")},
            "pivot": {"name": PIVOT.name, "path": str(PIVOT.path), "dtype": "float32"},
            "sources": [
                {"name": name, "path": str(ZOO_MODELS[name].path), "dtype": "float32"} for name in sources
            ],
            "corpus": {"path": str(corpus), "rows_per_shard": 500, "max_rows": rows},
            "teach": {"top_k": TOP_K, "max_length": LENGTH},
            "merge": {"methods": [{"method": "linear"}]},
            "resources": {
                "num_cpus": 8,
                "object_store_gb": 0.3,
                "branches": 2,
                "teach": {"min_workers": 1, "max_workers": 1},
            },
        }
    )  # fmt: skip


def teach(config: FusionConfig) -> dict[ModelConfig, list[Shard]]:
    """Every source's shards beside the pivot's."""
    graph = build_graph(config)
    run_graph(config, graph, list(graph.teach.values()), Quiet())
    pivot = graph.teach[config.pivot.name].artifact
    found: dict[ModelConfig, list[Shard]] = {}
    for source in config.sources:
        theirs = graph.teach[source.name].artifact
        names = [unit.name for unit in pivot.manifest().units if unit.name.startswith("shard-")]
        found[source] = [_shard(pivot, theirs, name) for name in names]
    return found


def _shard(pivot: Artifact, source: Artifact, name: str) -> Shard:
    mine, theirs = pivot.read_bytes(name), source.read_bytes(name)
    return Shard(
        mine,
        theirs,
        {row.id: row for row in from_table(decode(mine))},
        {row.id: row for row in from_table(decode(theirs))},
    )


def measure(settings: AlignConfig, config: FusionConfig, source_name: str, shards: list[Shard]) -> Cost:
    """One method on one teacher's rows of one text."""
    source = next(model for model in config.sources if model.name == source_name)
    aligner = Aligner.of_models(config.pivot, source, settings)
    if needs_counts(settings):
        counts = reduce(add, [aligner.count(shard.pivot, shard.source) for shard in shards])
        aligner = Aligner.of_models(config.pivot, source, settings, counts)
    total = Cost()
    for shard in shards:
        aligned = aligner.align(shard.pivot, shard.source).table
        total += cost(aligned, shard.pivot_rows, shard.source_rows, top_k=TOP_K, vocabulary=aligner.pivot.size)
    return total


def own_bits_per_byte(shards: Mapping[tuple[str, str], list[Shard]]) -> float:
    """The teachers' own, in their own tokens, on all that they read."""
    rows = [row for taught in shards.values() for shard in taught for row in shard.source_rows.values()]
    nats = -sum(float(row.label_logprob.sum()) for row in rows)
    size = sum(int((row.byte_end - row.byte_start).sum()) for row in rows)
    return nats / math.log(2) / size


def figures(name: str, costs: Mapping[tuple[str, str], Cost]) -> dict[str, Metric]:
    total = reduce(add, costs.values())
    single = {f"{text}:{source}": each.bits / max(1, each.bytes) for (text, source), each in costs.items()}
    return {
        f"bits_per_byte_{name}": metric(total.bits / max(1, total.bytes), "bits/byte"),
        f"teacher_bits_per_byte_{name}": metric(total.teacher_bits / max(1, total.bytes), "bits/byte"),
        f"coverage_{name}": metric(total.covered / max(1, total.positions), "of pivot positions"),
        f"missing_{name}": metric(total.missing / max(1, total.covered), "of covered positions"),
        f"bits_per_byte_by_text_and_teacher_{name}": metric(single, "bits/byte"),
    }


if __name__ == "__main__":
    main()

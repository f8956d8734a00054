"""Which objective: lm_weight, what is done where the pivot wins, one target or several, the divergence and the merge method, with real training throughout.

    .venv/bin/python jobs/benchmarks/objective.py                      # 3 seeds: about two hours on two cores
    .venv/bin/python jobs/benchmarks/objective.py --seeds 1 --arms same-0.3-sft-ce-pairwise same-0.3-sft-ce-all
    .venv/bin/python jobs/benchmarks/objective.py --models zoo         # the zoo's models in place of the specialists

The stages themselves run: teach (vLLM), align, distill (Ray Train, DeepSpeed) and merge; probe/grounds.py has the models, what they are trained on and what
is scored. An arm is called TOKENIZER-LM_WEIGHT-ON_PIVOT_WIN-DIVERGENCE-BRANCHES; `pairwise` trains a target for each source and merges them by every method of
`methods`, `all` trains one from every source. TOKENIZER is `same`, `other` or `zoo`: sources of another tokenizer come through what docs/alignment.md
recommends (`spans`, `shares`, `chain`, 64 candidates), those of the pivot's own with 10 candidates as in the papers. Seeds order the training rows. The figure
is bits per byte of held-out answers, the mean of their domains, lower is better; differences from SFT on the same rows and steps have a paired 95% interval
over the held-out answers. Everything is kept in --work, so a run that was cut off goes on; the table goes to --work/table.md and to docs/objective.md.
Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.graph import ALL, SFT, Node, build_graph
from fusion_ray.pipeline import run_graph
from fusion_ray.stages.cluster import connected
from probe.grounds import Bits, Ground, specialists, zoo
from probe.intervals import Answers, difference
from probe.listener import Quiet
from probe.models import MAX_LENGTH
from speed.line import Metric, line, metric, progress

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SPANS = {"method": "spans", "map": "shares", "chain": True, "inside": "skip"}
ALIGN = {"same": {"method": "spans", "map": "exact", "chain": False}, "other": SPANS, "zoo": SPANS}
TOP_K = {"same": 10, "other": 64, "zoo": 64}
TOKENIZERS = {"specialists": ("same", "other"), "zoo": ("zoo",)}  # by --models


def methods(targets: int) -> list[dict[str, object]]:
    """How so many targets are merged."""
    return [
        {"name": "linear", "method": "linear"},
        {"name": "varm_matrix", "method": "varm", "granularity": "matrix"},
        {"name": "varm_parameter", "method": "varm", "granularity": "parameter"},
        {"name": "varm_model", "method": "varm", "granularity": "model"},
        {"name": "sce_10", "method": "sce", "variant": "paper", "select_topk": 0.1},
        {"name": "sce_100", "method": "sce", "variant": "paper", "select_topk": 1.0},
        {"name": "sce_release", "method": "sce", "variant": "fusechat_release", "select_topk": 0.1},
        {"name": "task_arithmetic_0.7", "method": "task_arithmetic", "weight": [0.7] * targets},
        {"name": "ties_0.7", "method": "ties", "weight": [0.7] * targets, "density": [0.7] * targets},
        {"name": "dare_0.7", "method": "dare_linear", "weight": [1 / targets] * targets, "density": [0.7] * targets},
    ]


@dataclass(frozen=True)
class Arm:
    tokenizer: str
    lm_weight: float
    on_pivot_win: str
    divergence: str
    branches: str

    @property
    def name(self) -> str:
        return f"{self.tokenizer}-{self.lm_weight}-{self.on_pivot_win}-{self.divergence}-{self.branches}"


CONTROLS = {  # of each the SFT control alone is trained
    "specialists": Arm("same", 1.0, "sft", "ce", "pairwise"),
    "zoo": Arm("zoo", 1.0, "sft", "ce", "pairwise"),
}
ARMS = (
    *(
        Arm("same", weight, win, "ce", branches)
        for weight in (0.9, 0.5, 0.3, 0.1)
        for win in ("distill", "sft")
        for branches in ("pairwise", "all")
    ),
    *(
        Arm("other", weight, win, "ce", branches)
        for weight in (0.9, 0.3)
        for win in ("distill", "sft")
        for branches in ("pairwise", "all")
    ),
    *(Arm("same", 0.3, "sft", "reverse_kl", branches) for branches in ("pairwise", "all")),
    *(
        Arm("zoo", weight, win, "ce", branches)
        for weight, win in ((0.9, "distill"), (0.3, "sft"))
        for branches in ("pairwise", "all")
    ),
)


@dataclass(frozen=True)
class Run:
    """One arm with one seed: what is made for it, by the name of its figures."""

    arm: Arm
    seed: int
    config: FusionConfig
    nodes: Mapping[str, Node]

    @property
    def is_control(self) -> bool:
        return self.arm in CONTROLS.values()

    @property
    def name(self) -> str:
        return f"{SFT if self.is_control else self.arm.name}, seed {self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=sorted(TOKENIZERS), default="specialists")
    parser.add_argument("--data", type=Path, default=GSM8K, help="the specialists' GSM8K: train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, help="default: runs/benchmarks/objective, and the models' name behind it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=500, help="the specialists' conversations of each kind")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--heldout", type=int, default=200, help="the specialists' answers of each kind that are scored"
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument(
        "--arms", nargs="+", choices=names, metavar="ARM", help=f"default: all of the models; {', '.join(names)}"
    )
    parser.add_argument("--side-by-side", type=int, default=2, help="trainings at a time, one core each")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fusion_ray").setLevel(logging.WARNING)
    before = os.getloadavg()
    torch.set_num_threads(1)
    work = (given.work or ROOT / f"runs/benchmarks/objective/{given.models}").resolve()
    chosen = [arm for arm in ARMS if arm.tokenizer in TOKENIZERS[given.models] and arm.name in (given.arms or names)]
    if not chosen:
        parser.error(f"none of --arms {' '.join(given.arms)} is an arm of --models {given.models}")
    if given.models == "zoo":
        ground = zoo(work)
    else:
        ground = specialists(work, given.data, given.rows, given.heldout, side_by_side=given.side_by_side)
    runs = [
        run_of(arm, seed, ground, work, given.epochs)
        for seed in range(given.seeds)
        for arm in (CONTROLS[given.models], *chosen)
    ]
    with connected(runs[0].config.resources):
        scored = train_and_score(runs, ground, work / "scores", given.side_by_side)
    answers = gather(runs, scored, list(ground.heldout), given.seeds)
    metrics = {f"bits_per_byte_{name}": metric(value, "bits/byte") for name, value in ground.bits_per_byte.items()}
    metrics |= figures(answers)
    (work / "table.md").write_text(table(answers, list(ground.heldout)), encoding="utf-8")
    packages = ("torch", "ray", "vllm", "deepspeed", "transformers")
    print(line("objective", metrics, loads=(before[0], os.getloadavg()[0]), packages=packages))


def run_of(arm: Arm, seed: int, ground: Ground, work: Path, epochs: int) -> Run:
    control = arm in CONTROLS.values()
    sources = ground.sources[arm.tokenizer]
    config = parse_config(
        {
            "run": {"name": f"{arm.name}-{seed}", "storage": str(work / "runs"), "seed": seed},
            "pivot": {"name": "pivot", "path": str(ground.pivot), "dtype": "float32"},
            "sources": [{"name": name, "path": str(path), "dtype": "float32"} for name, path in sources.items()],
            "corpus": {"path": str(ground.corpus), "format": ground.corpus_format, "rows_per_shard": 250},
            "teach": {"top_k": TOP_K[arm.tokenizer], "max_length": MAX_LENGTH},
            "align": {"choose": "min_ce", "per": "sequence", "unit": "byte"} | ALIGN[arm.tokenizer],
            "distill": {
                "lm_weight": 0.5 if control else arm.lm_weight,
                "on_pivot_win": arm.on_pivot_win,
                "divergence": arm.divergence,
                "branches": arm.branches,
                "epochs": epochs,
                "batch_size": 32,
                "micro_batch_size": 16,
                "learning_rate": ground.learning_rate,
                "warmup_ratio": 0.05,
                "max_length": MAX_LENGTH,
                "precision": "float32",
                "export_dtype": "float32",
                "checkpoint_every": 10_000,
                "sft_control": control,
            },
            "merge": {"methods": methods(len(sources)) if arm.branches == "pairwise" else [{"method": "linear"}]},
            "resources": {
                "num_cpus": 8,
                "object_store_gb": 0.3,
                "branches": 1,
                "teach": {"min_workers": 1, "max_workers": 1},
                "distill": {"min_workers": 1, "max_workers": 1},
                "merge": {"min_workers": 1, "max_workers": 1},
            },
        }
    )
    graph = build_graph(config)
    if control:
        nodes = {SFT: graph.distill[SFT]}
    elif arm.branches == ALL:
        nodes = {arm.name: graph.distill[ALL]}
    else:
        nodes = {f"{arm.name} target {name}": graph.distill[name] for name in sources}
        nodes |= {f"{arm.name} {label}": node for label, node in graph.merge.items()}
    return Run(arm, seed, config, nodes)


Scores = dict[str, Bits]  # of the held-out answers, by domain


def train_and_score(runs: Sequence[Run], ground: Ground, kept: Path, side_by_side: int) -> list[dict[str, Scores]]:
    """Arms share teach and align artefacts, so those are made first, one after another; then an arm's trainings and merges, side by side with another's."""
    graphs = [build_graph(run.config) for run in runs]
    done = 0

    def work(number: int) -> dict[str, Scores]:
        nonlocal done
        run = runs[number]
        run_graph(run.config, graphs[number], list(run.nodes.values()), Quiet())
        found = {name: score(node, ground, kept) for name, node in run.nodes.items()}
        done += 1
        progress(f"{run.name}: {done} of {len(runs)}")
        return found

    for run, graph in zip(runs, graphs, strict=True):
        shared = [*graph.teach.values(), *graph.align.values(), *graph.combine.values()]
        run_graph(run.config, graph, shared[:1] if run.is_control else shared, Quiet())
    progress("taught and aligned")
    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(work, range(len(runs))))


def score(node: Node, ground: Ground, kept: Path) -> Scores:
    """Of a trained or merged model; kept by its content key."""
    size = sum(map(len, ground.heldout.values()))
    path = kept / f"{node.key}-{size}.json"
    if not path.exists():
        folder = node.artifact.local_folder()
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = {domain: ground.score(network, tokenizer, rows) for domain, rows in ground.heldout.items()}
        kept.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def gather(
    runs: Sequence[Run], scored: Sequence[Mapping[str, Scores]], domains: Sequence[str], seeds: int
) -> dict[str, Answers]:
    """Every figure's answers, seeds together."""
    found: dict[str, list[Scores]] = {}
    for _, scores in zip(runs, scored, strict=True):
        for name, each in scores.items():
            found.setdefault(name, []).append(each)
    answers = {}
    for name, by_seed in found.items():
        assert len(by_seed) == seeds, f"{name} has {len(by_seed)} seeds"
        arrays = {domain: np.array([scores[domain] for scores in by_seed], np.float64) for domain in domains}
        answers[name] = Answers(
            [arrays[domain][:, :, 0] for domain in domains], [arrays[domain][0, :, 1] for domain in domains]
        )
    return answers


def figures(answers: Mapping[str, Answers]) -> dict[str, Metric]:
    """Mean bits per byte of everything, and how much less than SFT."""
    metrics: dict[str, Metric] = {}
    for name, each in answers.items():
        key = name.replace(" ", "_")
        metrics[f"bits_per_byte_{key}"] = metric(float(each.by_seed().mean()), "bits/byte")
        if name != SFT:
            apart, low, high = difference(each, answers[SFT])
            metrics[f"gain_{key}"] = metric(
                {"mean": -apart, "low": -high, "high": -low}, "bits/byte less than SFT, and its 95% interval"
            )
    return metrics


def table(answers: Mapping[str, Answers], domains: Sequence[str]) -> str:
    """Markdown, the best first."""
    heads = ["arm", "bits/byte", "seeds' s.e.", *domains, "from SFT", "95% interval"]
    rows = [heads, ["---"] * len(heads)]
    for name, each in sorted(answers.items(), key=lambda item: item[1].by_seed().mean()):
        values = each.by_seed()
        spread = f"{values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else "-"
        parts = [f"{of.mean(0).sum() / size.sum():.4f}" for of, size in zip(each.bits, each.bytes, strict=True)]
        apart, low, high = difference(each, answers[SFT])
        rows.append(
            [f"`{name}`", f"{values.mean():.4f}", spread, *parts, f"{apart:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()

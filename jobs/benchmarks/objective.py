"""Which objective: lm_weight, what is done where the pivot wins, one target or several, the divergence and the merge method, with real training throughout.

    .venv/bin/python jobs/benchmarks/objective.py                      # 3 seeds: about two hours on two cores
    .venv/bin/python jobs/benchmarks/objective.py --seeds 1 --arms same-0.3-sft-ce-pairwise same-0.3-sft-ce-all

Two specialists of 1.4M parameters, one trained on GSM8K (--data), one on the functions of Python's standard library, once in the vocabulary of the pivot and
once in another (byte-level, 2,400 and 1,024 entries); a weak pivot of 0.8M that has seen a little of both. The stages themselves run: teach (vLLM), align,
distill (Ray Train, DeepSpeed) and merge, on --rows conversations of each kind that no model was trained on. An arm is called
TOKENIZER-LM_WEIGHT-ON_PIVOT_WIN-DIVERGENCE-BRANCHES; `pairwise` trains a target for each source and merges them by every method of METHODS, `all` trains one
from every source. The sources of another tokenizer come through what docs/alignment.md recommends (`spans`, `shares`, `chain`, 64 candidates), the others
with 10 candidates as in the papers. Seeds order the training rows. The figure is bits per byte of held-out answers, the mean of the two domains, lower is
better; differences from SFT on the same rows and steps have a paired 95% interval over the held-out answers. Everything is kept in --work, so a run that
was cut off goes on; the table goes to --work/table.md and to docs/objective.md. Progress goes to stderr, one JSON line to stdout.
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
from probe.functions import python_functions
from probe.intervals import Answers, difference
from probe.listener import Quiet
from probe.models import MAX_LENGTH, Made, Problem, bits_of_answers, make, read_problems, write_conversations
from speed.line import Metric, line, metric, progress

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
DOMAINS = ("math", "code")
VOCABULARIES = {"same": 2400, "other": 1024}
PIVOT = Made("pivot", vocabulary=VOCABULARIES["same"], width=96, layers=3, epochs=0.15, seed=3)
TEACHERS = {
    (domain, tokenizer): Made(f"{domain}_{tokenizer}", vocabulary=size, width=128, layers=4, epochs=epochs, seed=seed)
    for tokenizer, size, seed in (("same", VOCABULARIES["same"], 1), ("other", VOCABULARIES["other"], 2))
    for domain, epochs in (("math", 1.4), ("code", 2.0))
}
SPANS = {"method": "spans", "map": "shares", "chain": True, "inside": "skip"}
ALIGN = {"same": {"method": "spans", "map": "exact", "chain": False}, "other": SPANS}
TOP_K = {"same": 10, "other": 64}
METHODS = (
    {"name": "linear", "method": "linear"},
    {"name": "varm_matrix", "method": "varm", "granularity": "matrix"},
    {"name": "varm_parameter", "method": "varm", "granularity": "parameter"},
    {"name": "varm_model", "method": "varm", "granularity": "model"},
    {"name": "sce_10", "method": "sce", "variant": "paper", "select_topk": 0.1},
    {"name": "sce_100", "method": "sce", "variant": "paper", "select_topk": 1.0},
    {"name": "sce_release", "method": "sce", "variant": "fusechat_release", "select_topk": 0.1},
    {"name": "task_arithmetic_0.7", "method": "task_arithmetic", "weight": [0.7, 0.7]},
    {"name": "ties_0.7", "method": "ties", "weight": [0.7, 0.7], "density": [0.7, 0.7]},
    {"name": "dare_0.7", "method": "dare_linear", "weight": [0.5, 0.5], "density": [0.7, 0.7]},
)


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


CONTROL = Arm("same", 1.0, "sft", "ce", "pairwise")  # its SFT control alone is trained
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
)


@dataclass(frozen=True)
class Run:
    """One arm with one seed: what is made for it, by the name of its figures."""

    arm: Arm
    seed: int
    config: FusionConfig
    nodes: Mapping[str, Node]

    @property
    def name(self) -> str:
        return f"{self.arm.name if self.arm is not CONTROL else SFT}, seed {self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmarks/objective")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=500, help="conversations of each kind")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--heldout", type=int, default=200, help="answers of each kind that are scored")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--side-by-side", type=int, default=2, help="trainings at a time, one core each")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fusion_ray").setLevel(logging.WARNING)
    before = os.getloadavg()
    torch.set_num_threads(1)
    work = given.work.resolve()
    learned, heldout, corpus = read_data(given.data, work, given.rows, given.heldout)
    metrics = {
        f"bits_per_byte_{name}": metric(value, "bits/byte")
        for name, value in make_models(work, learned, heldout, given.side_by_side).items()
    }
    arms = [CONTROL, *(arm for arm in ARMS if arm.name in given.arms)]
    runs = [run_of(arm, seed, work, corpus, given.epochs) for seed in range(given.seeds) for arm in arms]
    with connected(runs[0].config.resources):
        scored = train_and_score(runs, heldout, work / "scores", given.side_by_side)
    answers = gather(runs, scored, given.seeds)
    metrics |= figures(answers)
    (work / "table.md").write_text(table(answers), encoding="utf-8")
    packages = ("torch", "ray", "vllm", "deepspeed", "transformers")
    print(line("objective", metrics, loads=(before[0], os.getloadavg()[0]), packages=packages))


Problems = Mapping[str, Sequence[Problem]]  # by domain


def read_data(data: Path, work: Path, rows: int, held_out: int) -> tuple[Problems, Problems, Path]:
    """What teachers learn from, what is scored, and the corpus: the first `rows` of each kind, which no model learns from."""
    functions, other_functions = python_functions()
    math_train, math_test = (read_problems(data / name) for name in ("train.jsonl", "test.jsonl"))
    train: Problems = {"math": math_train, "code": functions}
    test: Problems = {"math": math_test[:held_out], "code": other_functions[:held_out]}
    mixed = [problem for pair in zip(*(train[domain][:rows] for domain in DOMAINS), strict=True) for problem in pair]
    corpus = write_conversations(work / f"corpus-{rows}.jsonl", mixed, "mixed")
    return {domain: train[domain][rows:] for domain in DOMAINS}, test, corpus


def make_models(work: Path, learned: Problems, heldout: Problems, side_by_side: int) -> dict[str, float]:
    """The pivot's and the teachers' held-out bits per byte, each teacher's in its own domain."""
    texts = [problem for domain in DOMAINS for problem in learned[domain]]
    scored = [problem for domain in DOMAINS for problem in heldout[domain]]
    with ThreadPoolExecutor(side_by_side) as pool:
        coming = {PIVOT.name: pool.submit(make, PIVOT, work / PIVOT.name, texts, scored, texts)}
        for (domain, _), made in TEACHERS.items():
            coming[made.name] = pool.submit(make, made, work / made.name, learned[domain], heldout[domain], texts)
        return {name: each.result()["bits_per_byte"] for name, each in coming.items()}


def run_of(arm: Arm, seed: int, work: Path, corpus: Path, epochs: int) -> Run:
    config = parse_config(
        {
            "run": {"name": f"{arm.name}-{seed}", "storage": str(work / "runs"), "seed": seed},
            "pivot": {"name": "pivot", "path": str(work / PIVOT.name), "dtype": "float32"},
            "sources": [
                {"name": domain, "path": str(work / TEACHERS[domain, arm.tokenizer].name), "dtype": "float32"}
                for domain in DOMAINS
            ],
            "corpus": {"path": str(corpus), "format": "messages", "rows_per_shard": 250},
            "teach": {"top_k": TOP_K[arm.tokenizer], "max_length": MAX_LENGTH},
            "align": {"choose": "min_ce", "per": "sequence", "unit": "byte"} | ALIGN[arm.tokenizer],
            "distill": {
                "lm_weight": arm.lm_weight if arm is not CONTROL else 0.5,
                "on_pivot_win": arm.on_pivot_win,
                "divergence": arm.divergence,
                "branches": arm.branches,
                "epochs": epochs,
                "batch_size": 32,
                "micro_batch_size": 16,
                "learning_rate": 1e-3,
                "warmup_ratio": 0.05,
                "max_length": MAX_LENGTH,
                "precision": "float32",
                "export_dtype": "float32",
                "checkpoint_every": 10_000,
                "sft_control": arm is CONTROL,
            },
            "merge": {"methods": list(METHODS) if arm.branches == "pairwise" else [{"method": "linear"}]},
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
    if arm is CONTROL:
        nodes = {SFT: graph.distill[SFT]}
    elif arm.branches == ALL:
        nodes = {arm.name: graph.distill[ALL]}
    else:
        nodes = {f"{arm.name} target {domain}": graph.distill[domain] for domain in DOMAINS}
        nodes |= {f"{arm.name} {label}": node for label, node in graph.merge.items()}
    return Run(arm, seed, config, nodes)


Scores = dict[str, list[tuple[float, int]]]  # (bits, bytes) of each held-out answer, by domain


def train_and_score(runs: Sequence[Run], heldout: Problems, kept: Path, side_by_side: int) -> list[dict[str, Scores]]:
    """Arms share teach and align artefacts, so those are made first, one after another; then an arm's trainings and merges, side by side with another's."""
    graphs = [build_graph(run.config) for run in runs]
    done = 0

    def work(number: int) -> dict[str, Scores]:
        nonlocal done
        run = runs[number]
        run_graph(run.config, graphs[number], list(run.nodes.values()), Quiet())
        found = {name: score(node, heldout, kept) for name, node in run.nodes.items()}
        done += 1
        progress(f"{run.name}: {done} of {len(runs)}")
        return found

    for run, graph in zip(runs, graphs, strict=True):
        shared = [*graph.teach.values(), *graph.align.values(), *graph.combine.values()]
        run_graph(run.config, graph, shared[:1] if run.arm is CONTROL else shared, Quiet())
    progress("taught and aligned")
    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(work, range(len(runs))))


def score(node: Node, heldout: Problems, kept: Path) -> Scores:
    """Of a trained or merged model; kept by its content key."""
    size = sum(map(len, heldout.values()))
    path = kept / f"{node.key}-{size}.json"
    if not path.exists():
        folder = node.artifact.local_folder()
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = {domain: bits_of_answers(network, tokenizer, problems) for domain, problems in heldout.items()}
        kept.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def gather(runs: Sequence[Run], scored: Sequence[Mapping[str, Scores]], seeds: int) -> dict[str, Answers]:
    """Every figure's answers, seeds together."""
    found: dict[str, list[Scores]] = {}
    for _, scores in zip(runs, scored, strict=True):
        for name, each in scores.items():
            found.setdefault(name, []).append(each)
    answers = {}
    for name, by_seed in found.items():
        assert len(by_seed) == seeds, f"{name} has {len(by_seed)} seeds"
        arrays = {domain: np.array([scores[domain] for scores in by_seed], np.float64) for domain in DOMAINS}
        answers[name] = Answers(
            [arrays[domain][:, :, 0] for domain in DOMAINS], [arrays[domain][0, :, 1] for domain in DOMAINS]
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


def table(answers: Mapping[str, Answers]) -> str:
    """Markdown, the best first."""
    lines = [
        "| arm | bits/byte | seeds' s.e. | math | code | from SFT | 95% interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in sorted(answers.items(), key=lambda item: item[1].by_seed().mean()):
        values = each.by_seed()
        spread = f"{values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else "-"
        domains = [of.mean(0).sum() / size.sum() for of, size in zip(each.bits, each.bytes, strict=True)]
        apart, low, high = difference(each, answers[SFT])
        lines.append(
            f"| `{name}` | {values.mean():.4f} | {spread} | {domains[0]:.4f} | {domains[1]:.4f} | {apart:+.4f} | {low:+.4f} to {high:+.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What another tokenizer costs: the share of a same-tokenizer teacher's gain over plain fine-tuning that each alignment carries, with real training.

    .venv/bin/python jobs/benchmarks/alignment_gain.py                   # 13 arms, 3 seeds, both directions: a minute each, 80 minutes on two cores
    .venv/bin/python jobs/benchmarks/alignment_gain.py --directions longer_source --arms sft same_tokenizer spans_shares_chain_k64

Two teachers of equal strength (1.39 bits per byte) and two weak pivots are trained on GSM8K (--data) in byte-level vocabularies of 2,400 and of 1,024
entries. Direction `longer_source`: the pivot has the 1,024, the other teacher the longer tokens; `shorter_source`: the reverse. Then the stages themselves
run, teach (vLLM), align and distill (Ray Train, DeepSpeed), once an arm and a seed, on the same rows and steps. The figure is held-out bits per byte of
the answers to test problems, lower is better; an arm's share is (SFT - arm) / (SFT - same tokenizer), seed by seed, where `same_tokenizer` keeps the
top 10 whatever the arm keeps; `same_tokenizer_k64` is there to be compared with at 64. Seeds order the training rows; teachers, pivots and rows are the
same. The objective is that of arXiv 2402.16107 with lm_weight 0.3 and `sft` where the pivot wins. Everything is kept in --work, so a run that was cut
off goes on. docs/alignment.md has the tables. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import logging
import math
import os
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.graph import SFT, build_graph
from fusion_ray.pipeline import run_graph
from fusion_ray.stages.cluster import connected
from probe.arms import ARMS, NONE, OTHER, SAME, TABLE, Arm
from probe.listener import Quiet
from probe.models import MAX_LENGTH, Made, Problem, bits_per_byte, make, read_problems, write_conversations
from speed.line import Metric, line, metric, progress

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
LONG, SHORT = 2400, 1024
MODELS = (
    Made("pivot_2400", vocabulary=LONG, width=96, layers=3, epochs=0.15, seed=3),
    Made("pivot_1024", vocabulary=SHORT, width=96, layers=3, epochs=0.15, seed=3),
    Made("teacher_2400", vocabulary=LONG, width=128, layers=4, epochs=1.35, seed=1),
    Made("teacher_1024", vocabulary=SHORT, width=128, layers=4, epochs=1.55, seed=2),
)
DIRECTIONS = {
    "longer_source": (SHORT, LONG),
    "shorter_source": (LONG, SHORT),
}  # the pivot's vocabulary, the other teacher's
GOAL, RECOMMENDED = 0.9, "spans_shares_chain_k64"  # of the same-tokenizer gain, held against what recommended.yaml does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmarks/alignment_gain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--heldout", type=int, default=300, help="test problems that are scored")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=list(TABLE), metavar="ARM", help=", ".join(names))
    parser.add_argument("--side-by-side", type=int, default=2, help="trainings at a time, one core each")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fusion_ray").setLevel(logging.WARNING)
    before = os.getloadavg()
    torch.set_num_threads(1)
    train, test = (read_problems(given.data / name) for name in ("train.jsonl", "test.jsonl"))
    heldout = test[: given.heldout]
    work = given.work.resolve()
    teachers = {made.name: make(made, work / made.name, train, heldout)["bits_per_byte"] for made in MODELS}
    corpus = write_conversations(work / f"corpus-{given.rows}.jsonl", train[: given.rows])
    arms = [arm for arm in ARMS if arm.name in given.arms]
    runs = [
        Run(arm, direction, seed, config_of(arm, direction, seed, work, corpus, given.epochs))
        for seed in range(given.seeds)
        for direction in given.directions
        for arm in arms
    ]
    found: dict[str, dict[str, list[float]]] = {name: {arm.name: [] for arm in arms} for name in given.directions}
    with connected(runs[0].config.resources):
        for run, folder in zip(runs, train_all(runs, given.side_by_side), strict=True):
            found[run.direction][run.arm.name].append(score(folder, heldout))
            progress(f"{run.name}: {found[run.direction][run.arm.name][-1]:.4f} bits per byte")
    metrics = {f"bits_per_byte_{name}": metric(value, "bits/byte") for name, value in teachers.items()}
    loads = (before[0], os.getloadavg()[0])
    packages = ("torch", "ray", "vllm", "deepspeed", "transformers")
    for direction, values in found.items():
        metrics |= {f"{name}_{direction}": each for name, each in figures(values).items()}
    print(line("alignment_gain", metrics, loads=loads, packages=packages))


@dataclass(frozen=True)
class Run:
    """One training: an arm in a direction, with a seed."""

    arm: Arm
    direction: str
    seed: int
    config: FusionConfig

    @property
    def name(self) -> str:
        return f"{self.direction} {self.arm.name}, seed {self.seed}"

    @property
    def wanted(self) -> str:
        """The node of the graph that is trained."""
        return SFT if self.arm.teacher == NONE else self.arm.teacher


def config_of(arm: Arm, direction: str, seed: int, work: Path, corpus: Path, epochs: int) -> FusionConfig:
    mine, other = DIRECTIONS[direction]
    teacher, vocabulary = (OTHER, other) if arm.teacher == OTHER else (SAME, mine)
    return parse_config(
        {
            "run": {"name": f"{direction}-{arm.name}-{seed}", "storage": str(work / "runs"), "seed": seed},
            "pivot": {"name": "pivot", "path": str(work / f"pivot_{mine}"), "dtype": "float32"},
            "sources": [{"name": teacher, "path": str(work / f"teacher_{vocabulary}"), "dtype": "float32"}],
            "corpus": {"path": str(corpus), "format": "messages", "rows_per_shard": 300},
            "teach": {"top_k": 10, "max_length": MAX_LENGTH} | dict(arm.teach),
            "align": {"choose": "min_ce", "per": "sequence", "unit": "byte"} | dict(arm.align),
            "distill": {
                "lm_weight": 0.3,
                "on_pivot_win": "sft",
                "epochs": epochs,
                "batch_size": 32,
                "micro_batch_size": 16,
                "learning_rate": 1e-3,
                "warmup_ratio": 0.05,
                "max_length": MAX_LENGTH,
                "precision": "float32",
                "export_dtype": "float32",
                "checkpoint_every": 10_000,
                "sft_control": arm.teacher == NONE,
            }
            | dict(arm.distill),
            "merge": {"methods": [{"method": "linear"}]},
            "resources": {
                "num_cpus": 8,
                "object_store_gb": 0.3,
                "teach": {"min_workers": 1, "max_workers": 1},
                "distill": {"min_workers": 1, "max_workers": 1},
            },
        }
    )


def train_all(runs: Sequence[Run], side_by_side: int) -> list[str]:
    """The trained model's folder of every run. Arms share teach and align artefacts, so those are made first, one after another."""
    graphs = [build_graph(run.config) for run in runs]
    lock = threading.Lock()
    done = 0

    def train(number: int) -> str:
        nonlocal done
        run, graph = runs[number], graphs[number]
        node = graph.distill[run.wanted]
        run_graph(run.config, graph, [node], Quiet())
        with lock:
            done += 1
            progress(f"{run.name}: trained ({done} of {len(runs)})")
        return node.artifact.local_folder()

    for run, graph in zip(runs, graphs, strict=True):
        run_graph(run.config, graph, list(graph.distill[run.wanted].needs), Quiet())
    progress("taught and aligned")
    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(train, range(len(runs))))


def score(folder: str, heldout: Sequence[Problem]) -> float:
    """Held-out bits per byte of a trained model, kept beside it."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return bits_per_byte(network, AutoTokenizer.from_pretrained(folder), heldout)


def figures(found: Mapping[str, Sequence[float]]) -> dict[str, Metric]:
    """Mean bits per byte of every arm, its seeds' standard error, and the share of the same-tokenizer gain with its own."""
    metrics: dict[str, Metric] = {}
    sft, same = found.get("sft"), found.get("same_tokenizer")
    for name, values in found.items():
        metrics[f"bits_per_byte_{name}"] = metric(statistics.mean(values), "bits/byte")
        metrics[f"standard_error_{name}"] = metric(_standard_error(values), "bits/byte")
        if sft is None or same is None or name in ("sft", "same_tokenizer"):
            continue
        shares = [(s - v) / (s - t) for s, v, t in zip(sft, values, same, strict=True)]
        at_least = GOAL if name == RECOMMENDED else None
        metrics[f"gain_share_{name}"] = metric(statistics.mean(shares), "of the same-tokenizer gain", at_least=at_least)
        metrics[f"gain_share_standard_error_{name}"] = metric(_standard_error(shares), "of the same-tokenizer gain")
    return metrics


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()

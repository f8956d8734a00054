"""What the trainer's tests share: aligned shards of random rows, and training in freshly started processes joined by gloo."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.config import DistillConfig
from fusion_ray.records import aligned_schema

ROOT = Path(__file__).parents[2]
K = 4

CONFIG: dict[str, object] = {
    "epochs": 2,
    "batch_size": 6,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "lm_weight": 0.3,
    "warmup_ratio": 0.1,
    "precision": "float32",
    "max_length": 48,
    "head_chunk": 16,
    "checkpoint_every": 3,
}


def write_shards(folder: Path, *, rows: int = 20, shards: int = 2, vocabulary: int = 600, seed: int = 0) -> list[Path]:
    """Rows of 12 to 60 tokens, a third of the positions without a target; row number 3 has no predicting position at all."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    made = [aligned_row(rng, f"row-{number}", vocabulary, empty=number == 3) for number in range(rows)]
    paths = []
    for shard, part in enumerate(np.array_split(np.arange(rows), shards)):
        path = folder / f"shard-{shard:05d}.parquet"
        pq.write_table(
            pa.Table.from_pylist([made[i] for i in part], schema=aligned_schema(K)), path, compression="zstd"
        )
        paths.append(path)
    return paths


def aligned_row(rng: np.random.Generator, name: str, vocabulary: int, *, empty: bool = False) -> dict[str, object]:
    length = int(rng.integers(12, 60))
    first = int(rng.integers(2, 8))
    position = [] if empty else [*range(first, length - 4), length - 2]
    logits = np.sort(rng.normal(size=(len(position), K + 6)) * 2)[:, ::-1]
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[:, :K].astype(np.float16)
    topk = np.stack([rng.choice(vocabulary, K, replace=False) for _ in position]) if position else np.zeros((0, K))
    has_target = rng.random(len(position)) < 0.67
    won = bool(rng.random() < 0.5)
    return {
        "id": name,
        "ids": rng.integers(0, vocabulary, length).tolist(),
        "position": position,
        "kind": [0] * len(position),
        "has_target": has_target.tolist(),
        "from_source": (has_target & won).tolist(),
        "topk_ids": topk.astype(int).ravel().tolist(),
        "topk_logprobs": logprobs.ravel().tolist(),
        "bytes": 3 * len(position),
        "source_won": won,
        "source_ce_token": 1.0,
        "pivot_ce_token": 1.5,
        "source_ce_byte": 0.5,
        "pivot_ce_byte": 0.7,
    }


def config(**changes: object) -> DistillConfig:
    return DistillConfig.model_validate(CONFIG | changes)


def run_training(
    work: Path,
    pivot: Path,
    shards: list[Path],
    settings: DistillConfig,
    *,
    world_size: int = 1,
    key: str = "key",
    checkpoints: str | None = None,
    stop_after: int | None = None,
    kill_converting: bool = False,
) -> list[dict[str, object]]:
    """Train in `world_size` new processes and return rank 0's reports; `work/export` is the model, `work/facts.json` what `train` returned and
    `work/stderr-<rank>.txt` what a rank logged.

    `stop_after` kills rank 0 with SIGKILL in the report of that step, `kill_converting` in the middle of the conversion of a checkpoint of another
    number of ranks; the other ranks fail then. Raises RuntimeError with the workers' errors.
    """
    work.mkdir(parents=True, exist_ok=True)
    task = {
        "work": str(work),
        "pivot": str(pivot),
        "shards": [str(path) for path in shards],
        "config": settings.model_dump(),
        "key": key,
        "checkpoints": checkpoints,
        "stop_after": stop_after,
        "kill_converting": kill_converting,
        "world_size": world_size,
        "store": str(work / f"rendezvous-{np.random.default_rng().integers(1 << 62)}"),
    }
    reports = work / "reports.jsonl"
    reports.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("train_process.py")), json.dumps(task | {"rank": rank})],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for rank, error in enumerate(errors):
        (work / f"stderr-{rank}.txt").write_text(error)
    killed = stop_after is not None or kill_converting
    if not killed and any(process.returncode for process in processes):  # the ranks beside a killed one fail too
        raise RuntimeError(
            "\n".join(
                f"rank {rank} ended with code {process.returncode}:\n{error}"
                for rank, (process, error) in enumerate(zip(processes, errors, strict=True))
            )
        )
    return [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []

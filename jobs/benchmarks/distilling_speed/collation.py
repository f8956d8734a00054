"""Collation of micro-batches from aligned shards, and the published collator's loop over positions as a plain writing of it. Called by `distill.py`."""

from collections.abc import Sequence

import torch

from fusion_ray.workers.rows import Batch, Rows
from fusion_ray.workers.schedule import MicroBatch, Schedule


def micro_batches(rows: Rows, size: int, *, seed: int = 0) -> list[MicroBatch]:
    """One epoch of one rank in the trainer's order."""
    schedule = Schedule(rows.lengths, batch_size=size, micro_batch_size=size, epochs=1, world_size=1, seed=seed)
    return [lines for number in range(schedule.steps) for lines in schedule.step(number).micro_batches[0]]


def collate_all(rows: Rows, batches: Sequence[MicroBatch]) -> int:
    """The predicted positions that were collated."""
    return sum(len(rows.collate(lines).position) for lines in batches)


def listed(batch: Batch) -> list[list[tuple[list[int], list[float]]]]:
    """The targets as the published files hold them: for every token of every row lists of ids and logprobs, empty where there is no target."""
    if batch.topk_logprobs is None:
        raise ValueError("this batch was collated without targets")
    B, T = batch.ids.shape
    found: list[list[tuple[list[int], list[float]]]] = [[([], []) for _ in range(T)] for _ in range(B)]
    for n, at in enumerate(batch.position.tolist()):
        found[at // T][at % T] = (batch.head_ids[n, 1:].tolist(), batch.topk_logprobs[n].tolist())
    return found


def dense_collated(targets: Sequence[Sequence[tuple[list[int], list[float]]]], *, vocabulary: int) -> torch.Tensor:
    """(B, T, V) bfloat16, position by position (paper.md 1.7 Q16): softmax over the stored logits, nothing elsewhere."""
    dense = torch.zeros(len(targets), len(targets[0]), vocabulary, dtype=torch.bfloat16)
    for b, row in enumerate(targets):
        for t, (ids, logprobs) in enumerate(row):
            if ids:
                dense[b, t].scatter_add_(
                    0, torch.tensor(ids), torch.softmax(torch.tensor(logprobs, dtype=torch.bfloat16), 0)
                )
    return dense

"""Rows that no step trains on, and what the student makes of them in bits per byte while it learns. Called by workers/trainer.py.

The figure is -log2 of the pivot's true tokens at the predicting positions, ends of turns included, over the assistant bytes under those positions
(records.py): bytes are the same under any tokenizer and any branch, so its curves can be compared.
"""

import hashlib
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fusion_ray.workers.rows import Rows
from fusion_ray.workers.schedule import Schedule
from fusion_ray.workers.student import METRICS

BITS = "heldout_bits_per_byte"
SHOWN = 16  # ids in a message
KEPT = "heldout"  # beside the epochs in a run's totals, so that a resumed run has them


def is_heldout(row: str, *, share: float, seed: int) -> bool:
    """Whether the hash of seed and row id is among the lowest `share` of all hashes: whatever else the corpus holds, and in whatever order."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def hold_out(rows: Rows, *, share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on and the held-out ones. Raises ValueError with the counts where one of them is none, or no held-out row has bytes."""
    held = np.array([is_heldout(rows.id(row), share=share, seed=seed) for row in range(len(rows))], bool)
    if not held.any() or held.all() or not rows.bytes[held].sum():
        raise ValueError(
            f"distill.heldout_share {share} holds out {held.sum()} of {len(rows)} rows, with {rows.bytes[held].sum():.0f} assistant bytes; at least one row "
            "with bytes must be held out, and one be left to train on: give another share, 0 for no held-out rows, or a larger corpus"
        )
    return rows.part(np.flatnonzero(~held)), rows.part(np.flatnonzero(held))


class Heldout:
    """The held-out rows in this rank's micro-batches, equally many on every rank. `line_length` packs them, as in Schedule."""

    def __init__(self, rows: Rows, *, micro_batch_size: int, line_length: int | None) -> None:
        self.rows = rows
        schedule = Schedule(
            rows.lengths,
            batch_size=len(rows),
            micro_batch_size=micro_batch_size,
            epochs=1,
            world_size=dist.get_world_size(),
            seed=0,
            line_length=line_length,
        )
        self.micro_batches = schedule.step(0).micro_batches[dist.get_rank()]

    @staticmethod
    def due(step: int, steps: int, *, every: int) -> bool:
        """Whether the figure is taken when `step` of `steps` steps are done: before the first, after the last, and every so many between."""
        return step % every == 0 or step == steps

    def measure(
        self, model: nn.Module, device: torch.device, *, step: int, totals: dict[str, dict[str, float]]
    ) -> dict[str, float]:
        """Collective: the figure after `step` steps, by its name, which `totals` keeps where it is the last or the best. Raises ValueError where it is not
        finite. The model is back in training mode after it, and nothing random was drawn."""
        mine, broken = self.nats(model, device)
        nats = torch.tensor([mine], dtype=torch.float64, device=device)
        dist.all_reduce(nats)
        bits = float(nats) / math.log(2) / float(self.rows.bytes.sum())
        if not math.isfinite(bits):
            found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, broken)
            names = sorted({name for each in found for name in each})
            raise ValueError(
                f"the loss of the {len(self.rows)} held-out rows is not finite after step {step}; rows of the micro-batches concerned: "
                f"{', '.join(map(repr, names[:SHOWN]))}{' and more' if len(names) > SHOWN else ''}. Lower distill.learning_rate; if it is so at step 0, "
                "remove the rows that the pivot cannot read from the corpus, or set distill.heldout_share to 0"
            )
        kept = totals.setdefault(KEPT, {"best": math.inf, "best_step": step})
        kept |= {"last": bits, "last_step": step}
        if bits < kept["best"]:
            kept |= {"best": bits, "best_step": step}
        return {BITS: bits}

    def nats(self, model: nn.Module, device: torch.device) -> tuple[float, list[str]]:
        """What the labels of this rank's rows cost, and the ids of the micro-batches in which that is not finite. A rank without rows of its own reads the
        shortest of all, as ZeRO's collectives need, and leaves it out."""
        shortest = int(np.argmin(self.rows.lengths))
        sums, broken = 0.0, list[str]()
        model.eval()
        with torch.no_grad():
            for lines in self.micro_batches:
                batch = self.rows.collate(lines or [[shortest]])
                arrays = (batch.ids, batch.position, batch.head_ids[:, :1])
                ids, position, labels = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in arrays)
                begins = None if batch.position_ids is None else torch.from_numpy(batch.position_ids).to(device)
                _, metrics = model(ids, position, labels, None, None, None, begins)
                cost = float(metrics[METRICS.index("nll")]) if lines else 0.0
                sums += cost
                if not math.isfinite(cost):
                    broken += [self.rows.id(row) for line in lines for row in line]
        model.train()
        return sums, broken

    def facts(self, totals: dict[str, dict[str, float]]) -> dict[str, float]:
        """How many rows and bytes there are, and the last and the best figure with the steps done when it was taken."""
        kept = totals[KEPT]
        return {
            "rows": len(self.rows),
            "bytes": float(self.rows.bytes.sum()),
            "last_bits_per_byte": kept["last"],
            "last_step": kept["last_step"],
            "best_bits_per_byte": kept["best"],
            "best_step": kept["best_step"],
        }

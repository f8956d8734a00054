"""Whether a training still learns: by the size of its loss, and by how far that rose above the best of the same run. Called by workers/trainer.py."""

import math
from dataclasses import dataclass

GUESSING = 2.0  # times what guessing evenly costs, in nats a position: a model that learns stays far below, from its first step on
RISEN = 1.5  # nats a position above the best: batches differ by tenths where rows are drawn evenly
DECAY = 0.875  # of the running mean a step: it remembers about eight
KEPT = "loss"  # beside the epochs in a run's totals, so that a resumed run goes on with it


@dataclass(frozen=True)
class LossWatch:
    """For a pivot of so many rows in its vocabulary."""

    vocabulary: int

    def add(self, loss: float, totals: dict[str, dict[str, float]]) -> str | None:
        """Why a step whose labels cost `loss` nats a position says that the run has diverged, or None. `totals` keep the running mean and its least value."""
        guessing = math.log(self.vocabulary)
        if loss > GUESSING * guessing:
            return f"{loss:.4g} nats a position, where guessing evenly costs {guessing:.4g}"
        kept = totals.setdefault(KEPT, {"sum": 0.0, "weight": 0.0, "best": math.inf})
        kept["sum"] = DECAY * kept["sum"] + loss
        kept["weight"] = DECAY * kept["weight"] + 1.0
        mean = kept["sum"] / kept["weight"]
        kept["best"] = min(kept["best"], mean)
        # Twice the best too: where little was learned yet, a hard batch is not a collapse.
        if mean > max(2 * kept["best"], kept["best"] + RISEN):
            return f"the last steps cost {mean:.4g} nats a position, earlier ones {kept['best']:.4g}"
        return None

"""What a training run tells about a step: loss parts a position, rates, memory and the time left. Called by workers/trainer.py."""

import math
import resource
import time
from collections.abc import Mapping

import torch


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """`sft` and `fusion` in nats a position, and the shares of positions that were distilled, and distilled towards the source."""
    positions = max(1.0, sums["positions"])
    return {
        "sft": sums["nll"] / positions,
        "fusion": sums["fusion"] / max(1.0, sums["distilled"]),
        "distilled": sums["distilled"] / positions,
        "from_source": sums["from_source"] / positions,
    }


class Clock:
    """Tokens a second, the most memory held, and seconds to go, smoothed over the last steps. The first step, which warms up, is left out of the mean where it
    can be."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last = time.monotonic()
        self.asked = self.last
        self.mean = math.nan
        self.ticks = 0

    def tick(self, step: int, tokens: int) -> dict[str, float]:
        now = time.monotonic()
        seconds, self.last = max(now - self.last, 1e-9), now
        self.mean = seconds if self.ticks < 2 else 0.9 * self.mean + 0.1 * seconds
        self.ticks += 1
        return {
            "tokens_per_second": tokens / seconds,
            "eta_seconds": self.mean * (self.steps - step),
            "peak_memory_bytes": peak_memory(),
        }

    def asks(self, *, every: float) -> bool:
        """True once in so many seconds."""
        now = time.monotonic()
        if now - self.asked < every:
            return False
        self.asked = now
        return True

    def restart(self) -> None:
        """What was done since the last tick was no step: the next one begins now."""
        self.last = time.monotonic()


def peak_memory() -> int:
    """The most that this process has held: of the accelerator's memory where it has one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

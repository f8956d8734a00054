"""Rows of several sources in one stream: interleaved by weight, shuffled within a buffer; each in its seed's order on every run. Called by ingest.py."""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Source:
    """Files read one after another. `key` is the config key that errors name; `max_rows` None takes all."""

    name: str
    paths: tuple[str, ...]
    format: str
    key: str
    weight: float = 1.0
    max_rows: int | None = None


def interleave(
    sources: Sequence[Iterator[Row]], *, weights: Sequence[float], generator: random.Random
) -> Iterator[Row]:
    """One stream in which each source has its weight's share of every stretch, within one row; a source that ends leaves its share to the others.

    Stride scheduling (Waldspurger and Weihl, MIT/LCS/TM-528): row n of a source is due at (n + u) / weight, u drawn once a source, and the row that is due
    first is next. One row of each source is in memory at most.
    """
    starts = [generator.random() for _ in sources]
    due = [((start / weight), number, 0) for number, (start, weight) in enumerate(zip(starts, weights, strict=True))]
    heapq.heapify(due)
    while due:
        _, number, count = due[0]
        try:
            row = next(sources[number])
        except StopIteration:
            heapq.heappop(due)
            continue
        heapq.heapreplace(due, ((count + 1 + starts[number]) / weights[number], number, count + 1))
        yield row


def shuffled(rows: Iterator[Row], *, size: int, generator: random.Random) -> Iterator[Row]:
    """The rows in another order, `size` of them in memory: each leaves the buffer at random once it is full."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        slot = int(generator.random() * size)
        out, buffer[slot] = buffer[slot], row
        yield out
    while buffer:
        slot = int(generator.random() * len(buffer))
        buffer[slot], buffer[-1] = buffer[-1], buffer[slot]
        yield buffer.pop()

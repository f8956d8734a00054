"""The one JSON line that a benchmark ends with (design.md section 10), and repeated timing. Called by the benchmarks."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

Figure = float | Mapping[str, float]
Metric = Mapping[str, Figure | str | bool | None]


def metric(value: Figure, unit: str, *, at_least: float | None = None, at_most: float | None = None) -> Metric:
    """One figure with the goal that it is held against, if any."""
    goal, holds = None, None
    if isinstance(value, float | int):
        if at_least is not None:
            goal, holds = f">= {at_least:g}", value >= at_least
        elif at_most is not None:
            goal, holds = f"<= {at_most:g}", value <= at_most
    return {"value": value, "goal": goal, "unit": unit, "holds": holds}


def line(benchmark: str, metrics: Mapping[str, Metric], *, loads: Sequence[float], packages: Sequence[str]) -> str:
    """`loads` are the machine's load averages before and after: more than this benchmark's own share says that others had the cores too."""
    return json.dumps(
        {
            "benchmark": benchmark,
            "metrics": {name: dict(metrics[name]) for name in metrics},
            "machine": {
                "cpus": os.cpu_count(),
                "processor": _processor(),
                "load_average": [round(x, 2) for x in loads],
            },
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        }
    )


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat: by the clock on the wall, and of processor time of all threads of this process."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def timed(*work: Callable[[], object], repeats: int) -> list[Times]:
    """The times of each piece of work, `repeats` times in turn, so that a busy moment of the machine falls on all of them."""
    found = [Times() for _ in work]
    for _ in range(repeats):
        for times, piece in zip(found, work, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            piece()
            times.wall.append(time.perf_counter() - wall)
            times.processor.append(time.process_time() - processor)
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def progress(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _version(package: str) -> str:
    """vllm's builds for processors alone are a package of another name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-cpu")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [row.split(":", 1)[1].strip() for row in file if row.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

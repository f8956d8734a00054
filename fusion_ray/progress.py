"""What a person sees while a run goes on: rich bars on a terminal, plain lines elsewhere. Called by the command line."""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusion_ray.graph import Node
from fusion_ray.records import Report
from fusion_ray.schedule import Status

LINE_EVERY = 5.0  # seconds
# Figures that a stage may report beside done/total/unit, in the order shown, with their formats.
FIGURES = {
    "loss": "loss {:.3f}",
    "sft": "sft {:.3f}",
    "fusion": "fusion {:.3f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "rows_per_second": "{:,.0f} rows/s",
}


def describe(figures: Mapping[str, object], *, eta: bool = False) -> str:
    """Figures as words: `3/8 shards, 1,234 tok/s`. `eta` adds the time left, unless the stage's own message tells it."""
    parts = []
    if "done" in figures and "total" in figures:
        parts.append(f"{figures['done']}/{figures['total']} {figures.get('unit', '')}".strip())
    for name, form in FIGURES.items():
        value = figures.get(name)
        if isinstance(value, int | float):
            parts.append(form.format(value))
    message, left = str(figures.get("message") or ""), figures.get("eta_seconds")
    if eta and isinstance(left, int | float) and math.isfinite(left) and left > 0 and "ETA" not in message:
        parts.append(f"ETA {timedelta(seconds=round(left))}")
    if message:
        parts.append(message)
    return ", ".join(parts)


class Lines:
    """One plain line when a node starts, at most one every `every` seconds while it works, one when it ends."""

    def __init__(self, console: Console, every: float = LINE_EVERY) -> None:
        self._console, self._every = console, every
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def _line(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)

    def started(self, node: Node) -> None:
        with self._lock:
            self._last[node.id] = time.monotonic()
            self._line(f"{node.id} started")

    def progressed(self, node: Node, figures: dict[str, object]) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last.get(node.id, 0.0) >= self._every:
                self._last[node.id] = now
                self._line(f"{node.id} {describe(figures, eta=True)}")

    def finished(self, node: Node, status: Status, seconds: float) -> None:
        with self._lock:
            self._line(f"{node.id} {'cached' if status == 'cached' else f'done in {seconds:.1f} s'}  {node.key[:12]}")

    def failed(self, node: Node, error: BaseException) -> None:
        with self._lock:
            self._line(f"{node.id} failed: {first_line(error)}")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Bars:
    """One bar a node that is at work; finished nodes stay as lines above."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[label]:<24}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def started(self, node: Node) -> None:
        with self._lock:
            self._tasks[node.id] = self._progress.add_task("", total=None, label=node.id, words="starting")

    def progressed(self, node: Node, figures: dict[str, object]) -> None:
        done, total = figures.get("done"), figures.get("total")
        with self._lock:
            self._progress.update(
                self._tasks[node.id],
                completed=done if isinstance(done, int | float) else None,
                total=total if isinstance(total, int | float) else None,
                words=describe(figures),
            )

    def finished(self, node: Node, status: Status, seconds: float) -> None:
        with self._lock:
            if node.id in self._tasks:
                self._progress.remove_task(self._tasks.pop(node.id))
            mark = "[dim]cached[/dim]" if status == "cached" else f"[green]done[/green] in {seconds:.1f} s"
            self._progress.console.print(f"{node.id:<24} {mark}  [dim]{node.key[:12]}[/dim]", highlight=False)

    def failed(self, node: Node, error: BaseException) -> None:
        with self._lock:
            if node.id in self._tasks:
                self._progress.remove_task(self._tasks.pop(node.id))
            self._progress.console.print(f"{node.id:<24} [red]failed[/red]", highlight=False)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def listener_for(console: Console) -> Bars | Lines:
    return Bars(console) if console.is_terminal else Lines(console)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def tensors_of(console: Console) -> Iterator[Report]:
    """For a merge on this machine: a bar on a terminal, elsewhere a line at most every few seconds."""
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        ) as bars:  # fmt: skip
            task = bars.add_task("merge", figures="", total=None)

            def show(figures: Mapping[str, object]) -> None:
                done, total = int(str(figures["done"])), int(str(figures["total"]))
                bars.update(task, completed=done, total=total, description=f"merge: {figures['phase']}", figures=f"{done}/{total} tensors")  # fmt: skip

            yield show
        return
    last = time.monotonic()

    def say(figures: Mapping[str, object]) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            line = f"{time.strftime('%H:%M:%S')} merge {figures['phase']}: {describe(figures)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    yield say

"""Steps run as soon as what they need is done, side by side up to a width (plain threads; each step's own work is Ray's). Called by pipeline.py.

A step that fails leaves the others' work sealed: what does not depend on it still runs, then the first failure is raised.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Literal, Protocol

from fusion_ray.graph import Node
from fusion_ray.records import Report

Status = Literal["ran", "cached"]


@dataclass(frozen=True)
class StageRun:
    """One line of the run's record: what became of a node."""

    stage: str
    branch: str
    key: str
    status: Status
    seconds: float


@dataclass(frozen=True)
class Step:
    """Work that seals the artefacts of `nodes` (usually one; several where starting an engine once for all is cheaper).

    `work(todo, report)` gets the nodes that are not sealed yet.
    """

    nodes: tuple[Node, ...]
    work: Callable[[Sequence[Node], Callable[[Node], Report]], None]


class Listener(Protocol):
    """Who is told of a run's progress; calls come from several threads."""

    def started(self, node: Node) -> None: ...
    def progressed(self, node: Node, figures: dict[str, object]) -> None: ...
    def finished(self, node: Node, status: Status, seconds: float) -> None: ...
    def failed(self, node: Node, error: BaseException) -> None: ...


def one(node: Node, work: Callable[..., object]) -> Step:
    """A step of one node: `work(artifact, report=...)` seals its artefact."""

    def run(todo: Sequence[Node], report_for: Callable[[Node], Report]) -> None:
        for each in todo:
            work(each.artifact, report=report_for(each))

    return Step((node,), run)


def run_steps(steps: Sequence[Step], *, width: int, listener: Listener) -> list[StageRun]:
    """Run `steps` (given with needs before what needs them) and return what became of every node, in the steps' order.

    Raises the first step's error after every step that does not depend on it has run. KeyboardInterrupt passes at once.
    """
    runs: dict[str, StageRun] = {}
    errors: list[BaseException] = []
    broken: set[str] = set()  # ids of nodes that will not come
    waiting, running = list(steps), 0
    events: Queue[tuple[Step, float, BaseException | None]] = Queue()

    def execute(step: Step, todo: Sequence[Node]) -> None:
        start = time.monotonic()
        error: BaseException | None = None
        try:
            step.work(todo, lambda node: lambda figures: listener.progressed(node, dict(figures)))
            for node in todo:
                if not node.artifact.sealed:
                    raise RuntimeError(f"{node.id} returned without sealing {node.artifact.url}")
        except BaseException as caught:  # handed to the caller's thread, which raises it
            error = caught
        events.put((step, time.monotonic() - start, error))

    def record(node: Node, status: Status, seconds: float) -> None:
        runs[node.id] = StageRun(node.stage, node.branch, node.key, status, round(seconds, 1))
        listener.finished(node, status, seconds)

    while waiting or running:
        for step in list(waiting):
            needs = {need.id for node in step.nodes for need in node.needs}
            if needs & broken:
                waiting.remove(step)
                broken |= {node.id for node in step.nodes}
                continue
            if running >= width or not needs <= runs.keys():
                continue
            waiting.remove(step)
            todo = [node for node in step.nodes if not node.artifact.sealed]
            for node in step.nodes:
                if node not in todo:
                    record(node, "cached", 0.0)
            if todo:
                for node in todo:
                    listener.started(node)
                running += 1
                threading.Thread(target=execute, args=(step, todo), name=todo[0].id, daemon=True).start()
        if not running:
            if waiting and not any(_ready(step, runs.keys() | broken) for step in waiting):
                raise RuntimeError(f"steps that wait for nothing that runs: {[step.nodes[0].id for step in waiting]}")
            continue
        step, seconds, error = events.get()
        running -= 1
        for node in step.nodes:
            if node.id in runs:
                continue
            if error is None:
                record(node, "ran", seconds)
            else:
                broken.add(node.id)
                listener.failed(node, error)
        if error is not None:
            errors.append(error)
    if errors:
        raise errors[0]
    return [runs[node.id] for step in steps for node in step.nodes]


def _ready(step: Step, settled: set[str]) -> bool:
    return {need.id for node in step.nodes for need in node.needs} <= settled

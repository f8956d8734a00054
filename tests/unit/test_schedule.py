"""The scheduler: order, width, caching, and what a failing step leaves."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusion_ray.graph import Node
from fusion_ray.records import Report
from fusion_ray.schedule import Status, Step, one, run_steps
from fusion_ray.store import Artifact, Store


class Silent:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, node: Node) -> None:
        self.events.append(("started", node.id))

    def progressed(self, node: Node, figures: dict[str, object]) -> None:
        self.events.append(("progressed", node.id))

    def finished(self, node: Node, status: Status, seconds: float) -> None:
        self.events.append((status, node.id))

    def failed(self, node: Node, error: BaseException) -> None:
        self.events.append(("failed", node.id))


def node(store: Store, name: str, *needs: Node) -> Node:
    return Node("s", name, store.artifact("s", 1, {"name": name}, {need.id: need.key for need in needs}), needs)


def seal(out: Artifact, report: Report) -> None:
    report({"done": 1, "total": 1})
    out.seal([out.commit_bytes("u", b"x")])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_needs_come_first_and_a_second_run_does_nothing(store: Store) -> None:
    a = node(store, "a")
    b = node(store, "b", a)
    steps = [one(b, seal), one(a, seal)]
    listener = Silent()
    runs = run_steps(steps, width=4, listener=listener)
    assert [(run.branch, run.status) for run in runs] == [("b", "ran"), ("a", "ran")]
    assert listener.events.index(("ran", "s:a")) < listener.events.index(("started", "s:b"))
    assert {run.status for run in run_steps(steps, width=4, listener=Silent())} == {"cached"}


def test_width_bounds_what_runs_side_by_side(store: Store) -> None:
    lock, now, peak = threading.Lock(), [0], [0]

    def work(out: Artifact, report: Report) -> None:
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        seal(out, report)

    run_steps([one(node(store, str(n)), work) for n in range(6)], width=2, listener=Silent())
    assert peak[0] == 2


def test_failure_spares_what_does_not_depend_on_it(store: Store) -> None:
    bad, good = node(store, "bad"), node(store, "good")
    below, beside = node(store, "below", bad), node(store, "beside", good)

    def fail(out: Artifact, report: Report) -> None:
        raise ValueError("row 3 is broken")

    listener = Silent()
    with pytest.raises(ValueError, match="row 3 is broken"):
        run_steps([one(bad, fail), one(below, seal), one(good, seal), one(beside, seal)], width=1, listener=listener)
    assert beside.artifact.sealed
    assert not below.artifact.sealed
    assert ("failed", "s:bad") in listener.events
    assert ("started", "s:below") not in listener.events


def test_step_of_several_nodes_gets_only_those_to_do(store: Store) -> None:
    done, todo = node(store, "done"), node(store, "todo")
    seal(done.artifact, lambda _: None)
    seen: list[str] = []

    def work(nodes: Sequence[Node], report_for: Callable[[Node], Report]) -> None:
        for each in nodes:
            seen.append(each.id)
            seal(each.artifact, report_for(each))

    runs = run_steps([Step((done, todo), work)], width=1, listener=Silent())
    assert seen == ["s:todo"]
    assert [run.status for run in runs] == ["cached", "ran"]


def test_work_that_seals_nothing_is_an_error(store: Store) -> None:
    with pytest.raises(RuntimeError, match="without sealing"):
        run_steps([one(node(store, "a"), lambda out, report: None)], width=1, listener=Silent())

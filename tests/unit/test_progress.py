"""What a run tells: figures as words, plain lines bounded in number, failures in one line."""

import io
from pathlib import Path

from rich.console import Console

from fusion_ray.graph import Node
from fusion_ray.progress import Lines, describe, listener_for
from fusion_ray.store import Store


def test_figures_as_words() -> None:
    figures = {
        "done": 3,
        "total": 8,
        "unit": "steps",
        "sft": 0.25,
        "learning_rate": 2e-3,
        "tokens_per_second": 1234.5,
        "epoch": 1,
    }
    assert describe(figures) == "3/8 steps, sft 0.250, lr 2.0e-03, 1,234 tok/s"
    assert describe({}) == ""


def test_plain_lines_tell_the_time_left_once(tmp_path: Path) -> None:
    out = io.StringIO()
    lines = Lines(Console(file=out, width=200), every=0)
    node = Node("distill", "a", Store(str(tmp_path)).artifact("distill", 1, {}, {}))
    figures = {"done": 3, "total": 8, "unit": "steps", "eta_seconds": 3725.4}
    for more in (
        {},
        {"message": "saved"},
        {"message": "2 rows missing, ETA 1:00:00"},
        {"eta_seconds": float("nan")},
        {"eta_seconds": 0.0},
    ):
        lines.progressed(node, figures | more)
    assert [line.partition("3/8 steps")[2] for line in out.getvalue().splitlines()] == [
        ", ETA 1:02:05",
        ", ETA 1:02:05, saved",
        ", 2 rows missing, ETA 1:00:00",
        "",
        "",
    ]
    assert describe(figures) == "3/8 steps"  # a bar has a column for it


def test_lines_are_bounded_and_name_the_node(tmp_path: Path) -> None:
    out = io.StringIO()
    lines = Lines(Console(file=out, width=200), every=3600)
    node = Node("teach", "pivot", Store(str(tmp_path)).artifact("teach", 1, {}, {}))
    lines.started(node)
    for done in range(100):
        lines.progressed(node, {"done": done, "total": 100, "unit": "shards"})
    lines.finished(node, "ran", 1.25)
    lines.failed(node, ValueError("row [3] is broken\nand a page of context"))
    said = [line[9:] for line in out.getvalue().splitlines()]
    assert said == [
        "teach:pivot started",
        f"teach:pivot done in 1.2 s  {node.key[:12]}",
        "teach:pivot failed: row [3] is broken",
    ]


def test_bars_on_a_terminal_only() -> None:
    assert isinstance(listener_for(Console(file=io.StringIO())), Lines)
    assert not isinstance(listener_for(Console(file=io.StringIO(), force_terminal=True)), Lines)

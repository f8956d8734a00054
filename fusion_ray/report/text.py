"""The table of models and categories for a terminal, at the end of a run. Called by the command line.

The same cells as the HTML report's table: mean, 95% interval and, where paired intervals are given, where the difference to the pivot lies.
"""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusion_ray.report.content import (
    OVERALL,
    Interval,
    RunReport,
    Score,
    against_pivot,
    categories,
    role_name,
    score_of,
    sorted_models,
)

MARKS = {"above": ("▲", "green"), "below": ("▼", "red"), "noise": ("≈", "dim")}


def score_table(report: RunReport, paired: Mapping[str, Mapping[str, Interval]] | None = None) -> RenderableType:
    """Models in the order of their roles, `overall` first. `paired` as in content.Extras. A run without scores gives a sentence."""
    models = sorted_models(report.get("models") or [])
    names = categories(models)
    if not names:
        return Text("This run has no scores: its config names no evaluation questions.", style="dim")
    table = Table(
        title=Text(f"{report.get('run', 'run')}: mean score and 95% interval"), title_justify="left", pad_edge=False
    )
    table.add_column("model", no_wrap=True)
    for name in [OVERALL, *names]:
        table.add_column(escape(name), justify="right")
    table.add_column("bits/byte", justify="right")
    for model in models:
        title = Text(model["name"], style="bold" if model["role"] in ("pivot", "fused") else "")
        title.append(f"\n{role_name(model)}", style="dim")
        cells = [_cell(score_of(model, name), against_pivot(paired or {}, model, name)) for name in [OVERALL, *names]]
        bits = model.get("bits_per_byte")
        table.add_row(title, *cells, "-" if bits is None else f"{bits:.3f}", end_section=model["role"] == "pivot")
    if not paired:
        return table
    key = Text("against the pivot, paired: ▲ above, ▼ below, ≈ inside the noise", style="dim")
    return Group(table, key)


def _cell(score: Score | None, mark: str | None) -> Text:
    if score is None:
        return Text("-")
    text = Text(f"{score['mean']:.2f}")
    if mark:
        sign, colour = MARKS[mark]
        text.append(f" {sign}", style=colour)
    return text.append(f"\n{score['low']:.2f}-{score['high']:.2f}", style="dim")

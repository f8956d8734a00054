"""The table of models and categories for a terminal, at the end of a run. Called by the summary.

The same figures as the HTML report's table: mean, 95% interval and, where paired intervals are given, where the difference to the pivot lies. A terminal
that is too narrow for every interval gets the overall one and short headings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fusion_ray.report.content import (
    OVERALL,
    Interval,
    ModelScores,
    RunReport,
    Score,
    against_pivot,
    categories,
    role_name,
    score_of,
    sorted_models,
)

MARKS = {"above": ("▲", "green"), "below": ("▼", "red"), "noise": ("≈", "dim")}
INTERVAL = len("0.00-0.00")
MARKED = len("0.00▲")
SHORT = 4  # letters of a category's name in a narrow table
KEY = "against the pivot (paired over items): ▲ above, ▼ below, ≈ inside the noise"


def score_table(report: RunReport, paired: Mapping[str, Mapping[str, Interval]] | None = None) -> RenderableType:
    """Models in the order of their roles, `overall` first. `paired` as in content.Extras. A run without scores gives a sentence."""
    models = sorted_models(report.get("models") or [])
    names = categories(models)
    if not names:
        return Text("This run has no scores: its config names no evaluation questions.", style="dim")
    return ScoreTable(str(report.get("run", "run")), models, names, paired or {})


@dataclass(frozen=True)
class ScoreTable:
    """Renders itself for the width that it is given."""

    run: str
    models: Sequence[ModelScores]
    categories: Sequence[str]
    paired: Mapping[str, Mapping[str, Interval]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = max(len(model["name"]) for model in self.models)
        columns = [max(len(name), INTERVAL) + 2 for name in (OVERALL, *self.categories)]
        wide = options.max_width >= longest + sum(columns) + len("  bits/byte")
        yield Text(f"{self.run}: mean score and 95% interval; held-out bits per byte, lower is better")
        yield self._table(wide)
        if self.paired:
            yield Text(KEY, style="dim")

    def _table(self, wide: bool) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, int(wide), 0, 0), pad_edge=False, show_edge=False)
        table.add_column("model", no_wrap=True, overflow="ellipsis")
        table.add_column(OVERALL, justify="right", no_wrap=True, min_width=INTERVAL)
        for name in self.categories:
            heading = Text(name if wide else name[:SHORT])
            table.add_column(heading, justify="right", no_wrap=True, min_width=INTERVAL if wide else MARKED)
        table.add_column("bits/byte" if wide else "b/b", justify="right", no_wrap=True, min_width=len("0.000"))
        for model in self.models:
            title = Text(model["name"], style="bold" if model["role"] in ("pivot", "fused") else "")
            title.append(f"\n{role_name(model)}", style="dim not bold")
            bits = model.get("bits_per_byte")
            table.add_row(
                title,
                self._cell(model, OVERALL, interval=True),
                *(self._cell(model, name, interval=wide) for name in self.categories),
                "-" if bits is None else f"{bits:.3f}",
                end_section=model["role"] == "pivot",
            )
        return table

    def _cell(self, model: ModelScores, category: str, *, interval: bool) -> Text:
        score: Score | None = score_of(model, category)
        if score is None:
            return Text("-")
        text = Text(f"{score['mean']:.2f}")
        mark = against_pivot(self.paired, model, category)
        sign, colour = MARKS[mark] if mark else (" ", "")
        text.append(sign if self.paired else "", style=colour)
        return text.append(f"\n{score['low']:.2f}-{score['high']:.2f}", style="dim") if interval else text

"""One row in both tokenizations for a terminal (`fusion-ray align --explain ROW`): a line a byte at which a token begins, matches in colour and by mark.

Colours are rich's: on a terminal only, none under NO_COLOR; the marks say the same without them. Called by views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fusion_ray.alignment.explain import Candidate, ExplainedRow, side_by_side, source_kinds
from fusion_ray.report.visible import visible

MARKS = {"strict": "=", "comparable": "<", "inside": ".", "none": "-"}
STYLES = {"strict": "green", "comparable": "cyan", "inside": "yellow", "none": "red"}
WORDS = {
    "strict": "same bytes",
    "comparable": "same context, other length",
    "inside": "begins within the other side's token",
    "none": "nothing on the other side",
}
TAUGHT = "*"
GOES_ON = "┆"  # a token of this side goes on here
HEADINGS = ("bytes", "", "pivot", "source", "source says", "in the pivot's vocabulary")
GAP = "  "
WIDEST = 28  # cells of a token's column; a longer token is cut on its line


@dataclass(frozen=True)
class ExplainedView:
    """Renders itself; lines are cut to the width of a terminal, and whole where the output is no terminal."""

    row: ExplainedRow
    source: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines():
            if console.is_terminal:
                line.truncate(options.max_width, overflow="ellipsis")
            line.no_wrap = True
            yield line

    def lines(self) -> Iterator[Text]:
        yield from self._head()
        rows = list(self._cells())
        widths = [max(cell_len(cells[column].plain) for cells in rows) for column in range(len(HEADINGS))]
        for cells in rows:
            line = Text()
            for column, cell in enumerate(cells):
                line.append_text(cell)
                if column < len(cells) - 1:
                    line.append(" " * (widths[column] - cell_len(cell.plain)) + GAP)
            line.rstrip()
            yield line

    def _head(self) -> Iterator[Text]:
        row = self.row
        sides = [(self.source, row.get("source_bits")), ("pivot", row.get("pivot_bits"))]
        bits = ", ".join(f"{name} {value:.3f}" for name, value in sides if value is not None)
        winner = f"the source {self.source}" if row["source_won"] else "the pivot"
        yield Text(f"row {row['id']}: MinCE takes {winner}{f' (bits per byte: {bits})' if bits else ''}", style="bold")
        legend = Text()
        for kind, words in WORDS.items():
            legend.append(f"{MARKS[kind]} {words}", style=STYLES[kind]).append(GAP)
        yield legend.append(f"{TAUGHT} the source teaches here{GAP}{GOES_ON} goes on", style="dim")

    def _cells(self) -> Iterator[list[Text]]:
        yield [Text(heading, style="dim") for heading in HEADINGS]
        met = iter(source_kinds(self.row))
        reach: list[tuple[int, int]] = [(0, 0), (0, 0)]  # message and last byte of each side's latest token
        for line in side_by_side(self.row):
            token = line.pivot or line.source
            assert token is not None
            message, start = token["message"], token["byte_start"]
            kind = line.pivot["kind"] if line.pivot else ""
            kinds = (kind, next(met) if line.source else "")
            texts = []
            for side, own in enumerate(line):
                if own is not None:
                    reach[side] = (message, own["byte_end"])
                goes_on = reach[side][0] == message and start < reach[side][1]
                texts.append(_cut(visible(own["text"])) if own is not None else GOES_ON if goes_on else "")
            taught = TAUGHT if line.pivot and line.pivot.get("from_source") else ""
            yield [
                Text(f"{message}:{start}-{token['byte_end']}", style="dim"),
                Text(MARKS.get(kind, "") + taught, style=STYLES.get(kind, "")),
                *(Text(text, style=STYLES.get(own_kind, "dim")) for text, own_kind in zip(texts, kinds, strict=True)),
                _candidates(line.source.get("says") if line.source else None),
                _candidates(line.pivot.get("becomes") if line.pivot else None),
            ]


def _candidates(candidates: Sequence[Candidate] | None) -> Text:
    text = Text()
    for number, candidate in enumerate(candidates or ()):
        text.append(GAP if number else "").append(_cut(visible(candidate["text"])))
        text.append(f" {candidate['probability']:.2f}", style="dim")
    return text


def _cut(text: str) -> str:
    return text if cell_len(text) <= WIDEST else f"{set_cell_size(text, WIDEST - 1).rstrip()}…"

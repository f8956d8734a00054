"""How drawings look: one altair chart to one inline SVG that follows the page's colours, needs nothing from the net and can stand beside others.

Colours are CSS variables of page.css (`var(--ink)`), so that the same drawing works in light, in dark and on paper. Called by the charts and sections.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import altair as alt
import vl_convert

INK, SOFT, GRID, PAPER = "var(--ink)", "var(--soft)", "var(--line)", "var(--paper)"
FONT = "system-ui, sans-serif"

_CONFIG: dict[str, object] = {
    "background": "transparent",
    "font": FONT,
    "padding": 8,
    "view": {"stroke": None},
    "axis": {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 260,
    },
    "header": {"labelColor": INK, "titleColor": SOFT, "labelFontSize": 13, "labelFontWeight": "bold"},
    "legend": {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "title": {"color": INK, "fontSize": 13},
    "text": {"color": INK, "fontSize": 12},
}


SERIES = 7  # --series-0 ... in page.css


@dataclass(frozen=True)
class Style:
    """How one model is drawn. `color` is a CSS value; `dash` an SVG dash pattern."""

    color: str
    width: float = 1.6
    dash: tuple[int, ...] = (1, 0)
    fill: float = 0.0


def inline_svg(chart: alt.LayerChart | alt.Chart | alt.ConcatChart | alt.HConcatChart, label: str) -> str:
    """The drawing as one <svg> element that scales to its container, a wide one down to 70%; screen readers announce one image called `label`."""
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), config=_CONFIG, allowed_base_urls=[])
    opening, body = _split(svg)
    width, height = (
        float(found.group(1)) for name in ("width", "height") if (found := re.search(rf'\b{name}="([\d.]+)"', opening))
    )
    body = re.sub(
        r'\s(?:aria-[a-z]+|role)="[^"]*"', "", body
    )  # thousands of per-mark labels: the figure's own label speaks for them
    prefix = f"c{hashlib.sha256(label.encode()).hexdigest()[:8]}-"  # two drawings on one page must not share ids
    for number, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', body))):
        body = body.replace(f'id="{name}"', f'id="{prefix}{number}"').replace(
            f"url(#{name})", f"url(#{prefix}{number})"
        )
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width:g}px;--least:{0.7 * width if width > 700 else 0:g}px"><g aria-hidden="true">{body}</g></svg>'
    )


def _split(svg: str) -> tuple[str, str]:
    start = svg.index(">") + 1
    return svg[:start], svg[start : svg.rindex("</svg>")]


def legend(entries: Iterable[tuple[str, Style]]) -> str:
    """The names and line styles under a drawing, as an HTML list."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke="{style.color}" stroke-width="{style.width}" '
        f'stroke-dasharray="{" ".join(map(str, style.dash)) if style.dash[1] else "none"}"/></svg>{escape(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def name_axis(names: Sequence[str]) -> alt.Axis:
    """Room for the names whatever font the reader's browser takes: it may be wider than the one measured here."""
    room = 8 * max((len(name) for name in names), default=0) + 10
    return alt.Axis(ticks=False, domain=False, labelPadding=8, labelColor=INK, minExtent=min(room, 270))


def inline_data(rows: Sequence[Mapping[str, object]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])

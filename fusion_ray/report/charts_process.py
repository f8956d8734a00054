"""The report's drawings of how the fused model came about: training curves, merge weights, alignment coverage. Called by process.

Each function turns plain numbers into one inline SVG; colours are the page's CSS variables.
"""

import math
from collections.abc import Mapping, Sequence

import altair as alt

from fusion_ray.report.content import AlignmentSummary, MergeWeight
from fusion_ray.report.svg import INK, PAPER, SERIES, inline_data, inline_svg, name_axis

CURVE_POINTS = 500
WIDE = 1000  # pixels: about the page
MATCHES = ("strict", "comparable", "inside", "none")
MATCH_WORDS: Mapping[str, str] = {
    "strict": "same bytes",
    "comparable": "same context, other length",
    "inside": "inside a source token",
    "none": "no source token",
}


def training_curves(
    training: Mapping[str, Sequence[Mapping[str, float]]], losses: Mapping[str, tuple[str, str]]
) -> str:
    """Loss by optimizer step, one panel a loss (`losses`: metric to its title and unit), one line a branch; "" where there is nothing to draw."""
    branches = list(training)
    colour = alt.Color(
        "branch:N",
        scale=alt.Scale(domain=branches, range=[branch_colour(number) for number in range(len(branches))]),
        legend=None,
    )
    panels = []
    for metric, (title, unit) in losses.items():
        rows = [
            {"branch": branch, "step": step, "loss": loss}
            for branch, metrics in training.items()
            for step, loss in _curve(metrics, metric)
        ]
        if not rows:
            continue
        panels.append(
            alt.Chart(inline_data(rows))
            .mark_line(
                strokeWidth=1.8,
                clip=True,
                point={"size": 18, "filled": True} if len(rows) < 40 * len(branches) else False,
            )
            .encode(
                alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickMinStep=1)),
                alt.Y("loss:Q", title=unit, scale=alt.Scale(zero=False)),
                colour,
            )
            .properties(width=440, height=220, title=title)
        )
    if not panels:
        return ""
    return inline_svg(alt.concat(*panels, columns=2), f"Training losses by step for {', '.join(branches)}")


def _curve(metrics: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, loss) of the steps that have a finite one; means of neighbours past CURVE_POINTS; no fusion loss where nothing was distilled."""
    points = [
        (row["step"], row[name])
        for row in metrics
        if "step" in row and _finite(row.get(name)) and not (name == "fusion" and row.get("distilled") == 0)
    ]
    width = math.ceil(len(points) / CURVE_POINTS)
    bins = [points[start : start + width] for start in range(0, len(points), width)] if points else []
    return [(sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)) for part in bins]


def branch_colour(number: int) -> str:
    return f"var(--series-{number % SERIES})"


def merge_weights(weights: Sequence[MergeWeight], label: str) -> str:
    """Share of each target by layer (column) and matrix (row), one panel a target. The colour runs from the page's paper to the accent."""
    targets = list(dict.fromkeys(row["target"] for row in weights))
    matrices = list(dict.fromkeys(row["matrix"].removesuffix(".weight") for row in weights))
    layers = sorted({row["layer"] for row in weights if row["layer"] is not None})
    names = [str(layer) for layer in layers] + (["-"] if any(row["layer"] is None for row in weights) else [])
    top = max((row["weight"] for row in weights), default=1.0) or 1.0
    cells = [
        {
            "target": row["target"],
            "matrix": row["matrix"].removesuffix(".weight"),
            "layer": "-" if row["layer"] is None else str(row["layer"]),
            "opacity": row["weight"] / top,
            "text": f"{row['weight']:.2f}",
            "dark": row["weight"] / top > 0.62,
        }
        for row in weights
    ]
    cell = 34 if len(names) <= 16 else 16
    x = alt.X(
        "layer:N",
        sort=names,
        title="layer",
        axis=alt.Axis(labelAngle=0, values=names if cell > 20 else names[::4], ticks=False, domain=False),
    )
    columns = max(1, round(WIDE / (cell * len(names))))
    panels = []
    for number, target in enumerate(targets):
        y = alt.Y(
            "matrix:N",
            sort=matrices,
            title=None,
            axis=name_axis(matrices) if number % columns == 0 else alt.Axis(ticks=False, domain=False, labels=False),
        )
        rows = [row for row in cells if row["target"] == target]
        base = alt.Chart(inline_data(rows))
        drawn: list[alt.Chart] = [
            base.mark_rect(fill="var(--fused)", stroke=PAPER, strokeWidth=1).encode(
                x,
                y,
                fillOpacity=alt.FillOpacity("opacity:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 1]), legend=None),
            )
        ]
        if cell > 20:
            drawn.append(
                base.mark_text(fontSize=10).encode(
                    x,
                    y,
                    text="text:N",
                    color=alt.condition("datum.dark", alt.value("var(--on-fused)"), alt.value(INK)),
                )
            )
        panels.append(alt.layer(*drawn).properties(width=alt.Step(cell), height=alt.Step(24), title=target))
    summary = f"Weight of {', '.join(targets)} by layer and matrix in the {label} merge"
    return inline_svg(alt.concat(*panels, columns=columns, spacing=14), summary)


def coverage_bars(alignment: Sequence[AlignmentSummary]) -> str:
    """Share of the pivot's positions by kind of match, one stacked bar a source."""
    kinds = _kinds(alignment)
    sources = [entry["source"] for entry in alignment if entry.get("coverage")]
    rows = [
        {"source": entry["source"], "kind": kind, "order": kinds.index(kind), "share": share}
        for entry in alignment
        for kind, share in (entry.get("coverage") or {}).items()
    ]
    chart = (
        alt.Chart(inline_data(rows))
        .mark_bar(height=18, stroke=PAPER, strokeWidth=1)
        .encode(
            alt.X(
                "share:Q", title="share of the pivot's positions", stack="zero", axis=alt.Axis(format="%", tickCount=5)
            ),
            alt.Y("source:N", sort=sources, title=None, axis=name_axis(sources)),
            alt.Color(
                "kind:N", scale=alt.Scale(domain=kinds, range=[f"var(--match-{kind})" for kind in kinds]), legend=None
            ),
            order="order:Q",
        )
        .properties(width=520, height=alt.Step(30))
    )
    return inline_svg(chart, f"Alignment coverage of {', '.join(sources)}")


def _kinds(alignment: Sequence[AlignmentSummary]) -> list[str]:
    found = dict.fromkeys(kind for entry in alignment for kind in entry.get("coverage") or {})
    return [kind for kind in MATCHES if kind in found] + [kind for kind in found if kind not in MATCHES]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

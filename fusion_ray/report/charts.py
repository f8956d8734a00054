"""The report's drawings: each function turns plain numbers into one inline SVG (svg.inline_svg). Called by html.

Colours are the page's CSS variables; a model keeps one style in every drawing and in the legends (`Style`).
"""

import math
from collections.abc import Mapping, Sequence

import altair as alt

from fusion_ray.report.content import (
    AlignmentSummary,
    MergeWeight,
    ModelScores,
    best_source,
    by_role,
    score_of,
    sorted_models,
)
from fusion_ray.report.svg import GRID, INK, PAPER, SOFT, Style, inline_svg

SERIES = 7  # --series-0 ... in page.css
CURVE_POINTS = 500
MATCHES = ("strict", "comparable", "inside", "none")
MATCH_WORDS: Mapping[str, str] = {
    "strict": "same bytes",
    "comparable": "same context, other length",
    "inside": "inside a source token",
    "none": "no source token",
}


def model_styles(models: Sequence[ModelScores]) -> dict[str, Style]:
    """Model name to style: pivot and the first fused model stand out, the rest stays thin; one colour a model."""
    styles: dict[str, Style] = {}
    series = 0
    first_fused = True
    for model in sorted_models(models):
        role = model["role"]
        if role == "pivot":
            style = Style("var(--pivot)", 2.6, (6, 4))
        elif role == "fused" and first_fused:
            style, first_fused = Style("var(--fused)", 3.2, (1, 0), 0.12), False
        elif role == "sft":
            style = Style("var(--sft)", 1.8, (2, 3))
        else:
            style = Style(
                f"var(--series-{series % SERIES})",
                2.0 if role == "fused" else 1.4,
                (8, 3) if role == "fused" else (1, 0),
            )
            series += 1
        styles[model["name"]] = style
    return styles


def radar_models(models: Sequence[ModelScores], axes: Sequence[str]) -> list[ModelScores]:
    """Pivot, best source, SFT only, targets and fused models that have a score in every category: those that `did fusion help?` compares."""
    best = best_source(models)
    chosen = [model for model in sorted_models(models) if model["role"] != "source" or model is best]
    return [model for model in chosen if all(score_of(model, axis) for axis in axes)]


def radar(models: Sequence[ModelScores], axes: Sequence[str]) -> str:
    """Mean score (0..1) by category for the models of `radar_models`; at least three categories."""
    shown = radar_models(models, axes)
    styles = model_styles(models)
    order = [model["name"] for model in shown]

    def point(value: float, axis: float) -> dict[str, float]:
        angle = 2 * math.pi * axis / len(axes)
        return {"x": value * math.sin(angle), "y": value * math.cos(angle)}

    rings = [
        {"ring": ring, "step": step} | point(ring, step)
        for ring in (0.25, 0.5, 0.75, 1.0)
        for step in range(len(axes) + 1)
    ]
    spokes = [{"axis": axis, "step": step} | point(float(step), axis) for axis in range(len(axes)) for step in (0, 1)]
    names = [{"text": name} | point(1.13, axis) for axis, name in enumerate(axes)]
    ticks = [{"text": f"{ring:g}"} | point(ring, 0.5) for ring in (0.25, 0.5, 0.75, 1.0)]
    lines = [
        {"model": model["name"], "step": step} | point(model["scores"][axes[step % len(axes)]]["mean"], step)
        for model in shown
        for step in range(len(axes) + 1)
    ]
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-1.4, 1.4], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[-1.25, 1.25], nice=False))
    layers = [
        alt.Chart(_data(rings)).mark_line(color=GRID, strokeWidth=1).encode(x, y, detail="ring:N", order="step:Q"),
        alt.Chart(_data(spokes)).mark_line(color=GRID, strokeWidth=1).encode(x, y, detail="axis:N", order="step:Q"),
    ]
    for name in sorted(order, key=lambda model: styles[model].width):  # the highlighted ones on top
        style = styles[name]
        rows = [row for row in lines if row["model"] == name]
        if style.fill:
            layers.append(
                alt.Chart(_data(rows))
                .mark_line(filled=True, fill=style.color, fillOpacity=style.fill, strokeWidth=0)
                .encode(x, y, order="step:Q")
            )
        layers.append(
            alt.Chart(_data(rows))
            .mark_line(color=style.color, strokeWidth=style.width, strokeDash=list(style.dash), strokeJoin="round")
            .encode(x, y, order="step:Q")
        )
        if style.width > 2:
            layers.append(
                alt.Chart(_data(rows)).mark_point(filled=True, color=style.color, size=40, opacity=1).encode(x, y)
            )
    layers.append(alt.Chart(_data(ticks)).mark_text(color=SOFT, fontSize=11).encode(x, y, text="text:N"))
    layers.append(alt.Chart(_data(names)).mark_text(color=INK, fontSize=13).encode(x, y, text="text:N"))
    chart = alt.layer(*layers).properties(width=476, height=425)
    return inline_svg(chart, f"Radar of the mean score over {', '.join(axes)} for {', '.join(order)}")


def overall_intervals(models: Sequence[ModelScores]) -> str:
    """Overall score with its 95% interval, one row a model, the pivot's mean as a rule through all rows."""
    styles = model_styles(models)
    shown = [model for model in sorted_models(models) if model.get("overall")]
    rows: list[dict[str, object]] = []
    for model in shown:
        score = model["overall"]
        assert score is not None
        rows.append({"model": model["name"], "mean": score["mean"], "low": score["low"], "high": score["high"]})
    names = [model["name"] for model in shown]
    colour = alt.Color(
        "model:N", scale=alt.Scale(domain=names, range=[styles[name].color for name in names]), legend=None
    )
    y = alt.Y("model:N", sort=names, title=None, axis=_name_axis(names))
    x = alt.X(
        "low:Q", title="overall score, 95% interval", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6)
    )
    base = alt.Chart(_data(rows))
    layers: list[alt.Chart] = [
        base.mark_rule(strokeWidth=3, opacity=0.55).encode(x, alt.X2("high:Q"), y, colour),
        base.mark_point(filled=True, size=110, opacity=1).encode(alt.X("mean:Q"), y, colour),
    ]
    pivots = [score["mean"] for model in by_role(shown, "pivot") if (score := model.get("overall"))]
    if pivots:
        rule = alt.Chart(_data([{"mean": pivots[0]}]))
        layers.insert(0, rule.mark_rule(color="var(--pivot)", strokeDash=[4, 4]).encode(alt.X("mean:Q")))
    chart = alt.layer(*layers).properties(width=350, height=alt.Step(28))
    summary = "; ".join(f"{row['model']} {row['mean']:.3f}" for row in rows)
    return inline_svg(chart, f"Overall score with 95% intervals: {summary}")


def training_curves(training: Mapping[str, Sequence[Mapping[str, float]]], losses: Mapping[str, str]) -> str:
    """Loss by optimizer step, one panel a loss (`losses`: metric to its title), one line a branch; "" where there is nothing to draw."""
    branches = list(training)
    colour = alt.Color(
        "branch:N",
        scale=alt.Scale(domain=branches, range=[branch_colour(number) for number in range(len(branches))]),
        legend=None,
    )
    panels = []
    for metric, title in losses.items():
        rows = [
            {"branch": branch, "step": step, "loss": loss}
            for branch, metrics in training.items()
            for step, loss in _curve(metrics, metric)
        ]
        if not rows:
            continue
        panels.append(
            alt.Chart(_data(rows))
            .mark_line(
                strokeWidth=1.8,
                clip=True,
                point={"size": 18, "filled": True} if len(rows) < 40 * len(branches) else False,
            )
            .encode(
                alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickMinStep=1)),
                alt.Y("loss:Q", title="nats a position", scale=alt.Scale(zero=False)),
                colour,
            )
            .properties(width=440, height=220, title=title)
        )
    if not panels:
        return ""
    return inline_svg(alt.hconcat(*panels), f"Training losses by step for {', '.join(branches)}")


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
        "layer:N", sort=names, title="layer", axis=alt.Axis(labelAngle=0, ticks=False, domain=False, orient="bottom")
    )
    panels = []
    for number, target in enumerate(targets):
        y = alt.Y(
            "matrix:N",
            sort=matrices,
            title=None,
            axis=_name_axis(matrices) if number == 0 else alt.Axis(ticks=False, domain=False, labels=False),
        )
        rows = [row for row in cells if row["target"] == target]
        base = alt.Chart(_data(rows))
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
    return inline_svg(alt.hconcat(*panels, spacing=14), summary)


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
        alt.Chart(_data(rows))
        .mark_bar(height=18, stroke=PAPER, strokeWidth=1)
        .encode(
            alt.X(
                "share:Q", title="share of the pivot's positions", stack="zero", axis=alt.Axis(format="%", tickCount=5)
            ),
            alt.Y("source:N", sort=sources, title=None, axis=_name_axis(sources)),
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


def _name_axis(names: Sequence[str]) -> alt.Axis:
    """Room for the names whatever font the reader's browser takes: it may be wider than the one measured here."""
    room = 8 * max((len(name) for name in names), default=0) + 10
    return alt.Axis(ticks=False, domain=False, labelPadding=8, labelColor=INK, minExtent=min(room, 270))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _data(rows: Sequence[Mapping[str, object]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])

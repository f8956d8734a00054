"""The report's drawings of scores: radar and overall intervals, each one inline SVG. Called by scores.

Colours are the page's CSS variables; a model keeps one style in every drawing and in the legends (`Style`).
"""

import math
from collections.abc import Sequence

import altair as alt

from fusion_ray.report.content import (
    ModelScores,
    best_source,
    by_role,
    score_of,
    sorted_models,
)
from fusion_ray.report.svg import GRID, INK, SERIES, SOFT, Style, inline_data, inline_svg, name_axis


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
        alt.Chart(inline_data(rings))
        .mark_line(color=GRID, strokeWidth=1)
        .encode(x, y, detail="ring:N", order="step:Q"),
        alt.Chart(inline_data(spokes))
        .mark_line(color=GRID, strokeWidth=1)
        .encode(x, y, detail="axis:N", order="step:Q"),
    ]
    for name in sorted(order, key=lambda model: styles[model].width):  # the highlighted ones on top
        style = styles[name]
        rows = [row for row in lines if row["model"] == name]
        if style.fill:
            layers.append(
                alt.Chart(inline_data(rows))
                .mark_line(filled=True, fill=style.color, fillOpacity=style.fill, strokeWidth=0)
                .encode(x, y, order="step:Q")
            )
        layers.append(
            alt.Chart(inline_data(rows))
            .mark_line(color=style.color, strokeWidth=style.width, strokeDash=list(style.dash), strokeJoin="round")
            .encode(x, y, order="step:Q")
        )
        if style.width > 2:
            layers.append(
                alt.Chart(inline_data(rows)).mark_point(filled=True, color=style.color, size=40, opacity=1).encode(x, y)
            )
    layers.append(alt.Chart(inline_data(ticks)).mark_text(color=SOFT, fontSize=11).encode(x, y, text="text:N"))
    layers.append(alt.Chart(inline_data(names)).mark_text(color=INK, fontSize=13).encode(x, y, text="text:N"))
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
    y = alt.Y("model:N", sort=names, title=None, axis=name_axis(names))
    x = alt.X(
        "low:Q", title="overall score, 95% interval", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6)
    )
    base = alt.Chart(inline_data(rows))
    layers: list[alt.Chart] = [
        base.mark_rule(strokeWidth=3, opacity=0.55).encode(x, alt.X2("high:Q"), y, colour),
        base.mark_point(filled=True, size=110, opacity=1).encode(alt.X("mean:Q"), y, colour),
    ]
    pivots = [score["mean"] for model in by_role(shown, "pivot") if (score := model.get("overall"))]
    if pivots:
        rule = alt.Chart(inline_data([{"mean": pivots[0]}]))
        layers.insert(0, rule.mark_rule(color="var(--pivot)", strokeDash=[4, 4]).encode(alt.X("mean:Q")))
    chart = alt.layer(*layers).properties(width=350, height=alt.Step(28))
    summary = "; ".join(f"{row['model']} {row['mean']:.3f}" for row in rows)
    return inline_svg(chart, f"Overall score with 95% intervals: {summary}")

"""The report's sections on results: headline figures, drawings and table of scores, the judge's ratings. Called by html."""

from collections.abc import Mapping, Sequence
from html import escape

from fusion_ray.report import charts
from fusion_ray.report.content import (
    OVERALL,
    Interval,
    ModelScores,
    Score,
    against_pivot,
    best_source,
    by_role,
    categories,
    role_name,
    score_of,
)
from fusion_ray.report.svg import legend

MARKS: Mapping[str, tuple[str, str]] = {
    "above": ("▲", "above the pivot: the paired interval lies above zero"),
    "below": ("▼", "below the pivot: the paired interval lies below zero"),
    "noise": ("≈", "inside the noise: the paired interval holds zero"),
}


def headline(models: Sequence[ModelScores], paired: Mapping[str, Mapping[str, Interval]]) -> str:
    fused, pivots, best = by_role(models, "fused"), by_role(models, "pivot"), best_source(models)
    boxes = [
        (f"fused: {fused[0]['name']}", fused[0]) if fused else None,
        (f"pivot: {pivots[0]['name']}", pivots[0]) if pivots else None,
        (f"best source: {best['name']}", best) if best else None,
    ]
    cells = [
        f'<div class="figure"><b>{score["mean"]:.3f}</b><span>{escape(label)}<br>{_between(score)}</span></div>'
        for box in boxes
        if box
        for label, model in (box,)
        if (score := score_of(model, OVERALL))
    ]
    if fused and (interval := paired.get(fused[0]["name"], {}).get(OVERALL)):
        mark = against_pivot(paired, fused[0], OVERALL) or "noise"
        words = {"above": "outside the noise", "below": "below the pivot", "noise": "inside the noise"}[mark]
        cells.append(
            f'<div class="figure"><b class="{mark}">{interval["mean"]:+.3f}</b>'
            f"<span>fused against pivot, {words}<br>{_between(interval, signed=True)}</span></div>"
        )
    if not cells:
        return '<p class="note">No model of this run has been scored.</p>'
    return f'<div class="figures">{"".join(cells)}</div>\n<p class="note">Overall score, 0 to 1, with its 95% bootstrap interval.</p>'


def scores(models: Sequence[ModelScores], paired: Mapping[str, Mapping[str, Interval]]) -> str:
    names = categories(models)
    if not names:
        return '<p class="note">This run has no scores: its config names no evaluation questions.</p>'
    return _drawings(models, names) + _score_table(models, names, paired)


def _drawings(models: Sequence[ModelScores], names: Sequence[str]) -> str:
    styles = charts.model_styles(models)
    drawn = charts.radar_models(models, names) if len(names) >= 3 else []
    figures = []
    if drawn:
        best = best_source(models)
        left_out = [model["name"] for model in models if model not in drawn and model is not best]
        caption = "Mean score by category: pivot, best source, SFT only, targets and fused."
        caption += f" Not drawn: {escape(', '.join(left_out))} (see the table)." if left_out else ""
        styled = legend((model["name"], styles[model["name"]]) for model in drawn)
        figures.append(f"<figure>{charts.radar(models, names)}{styled}<figcaption>{caption}</figcaption></figure>")
    if any(model.get("overall") for model in models):
        caption = "Overall score with its 95% interval; the dashed rule is the pivot."
        figures.append(f"<figure>{charts.overall_intervals(models)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pair">{"".join(figures)}</div>' if len(figures) > 1 else "".join(figures)


def _score_table(
    models: Sequence[ModelScores], names: Sequence[str], paired: Mapping[str, Mapping[str, Interval]]
) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [OVERALL, *names])
    rows = []
    for model in models:
        cells = "".join(
            _score_cell(score_of(model, name), against_pivot(paired, model, name)) for name in [OVERALL, *names]
        )
        bits = model.get("bits_per_byte")
        rows.append(
            f'<tr class="{escape(model["role"])}"><th scope="row">{escape(model["name"])}<small>{escape(role_name(model))}{_size(model)}</small></th>'
            f"{cells}<td>{'–' if bits is None else f'{bits:.3f}'}</td></tr>"
        )
    items = [score["n"] for model in models for name in names if (score := score_of(model, name))]
    count = f"{min(items)}" if min(items) == max(items) else f"{min(items)} to {max(items)}"
    caption = f"Mean score with its 95% bootstrap interval over {count} items a category; held-out bits per byte: lower is better."
    key = (
        "<p class='note'>Against the pivot, paired over the same items: "
        + ", ".join(f'<span class="{kind}">{mark}</span> {text.split(":")[0]}' for kind, (mark, text) in MARKS.items())
        + ".</p>"
        if paired
        else '<p class="note">No paired intervals were given: a difference smaller than the intervals is to be taken as noise.</p>'
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th scope="col">model</th>{head}'
        f'<th scope="col">bits per byte</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n{key}'
    )


def _score_cell(score: Score | None, mark: str | None) -> str:
    if score is None:
        return "<td>–</td>"
    sign = f' <span class="{mark}" title="{MARKS[mark][1]}">{MARKS[mark][0]}</span>' if mark else ""
    return f"<td>{score['mean']:.2f}{sign}<small>{score['low']:.2f}–{score['high']:.2f}</small></td>"


def _size(model: ModelScores) -> str:
    count = model.get("parameters")
    if not count:
        return ""
    return f", {count / 1e9:.1f}B" if count >= 1e9 else f", {count / 1e6:.1f}M"


def _between(interval: Interval, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{interval['low']:{form}} to {interval['high']:{form}}"


def judge(models: Sequence[ModelScores], ratings: Mapping[str, Mapping[str, float]]) -> str:
    turns = list(dict.fromkeys(turn for scores in ratings.values() for turn in scores))
    if not turns:
        return '<p class="note">No judge was set for this run (<code>evaluate.judge</code>).</p>'
    order = [model["name"] for model in models if model["name"] in ratings]
    order += [name for name in ratings if name not in order]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{ratings[name][turn]:.2f}</td>" if turn in ratings[name] else "<td>–</td>" for turn in turns)
        + "</tr>"
        for name in order
    )
    head = "".join(f'<th scope="col">{escape(turn)}</th>' for turn in turns)
    caption = "Mean of the judge's ratings, 1 to 10."
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )

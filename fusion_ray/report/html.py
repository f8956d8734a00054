"""The HTML report of a run: one self-contained page (no script, no external address) from report.json and what lies beside it. Called by the pipeline.

Every text that comes from outside (names, keys, row texts) passes through `html.escape`; drawings come from charts as inline SVG. A part that the run
does not have is replaced by a sentence that says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from fusion_ray.report import charts
from fusion_ray.report.content import (
    OVERALL,
    AlignmentExample,
    Extras,
    Interval,
    ModelScores,
    RunReport,
    Score,
    against_pivot,
    best_source,
    by_role,
    categories,
    role_name,
    score_of,
    sorted_models,
)

LOSSES: Mapping[str, str] = {"loss": "objective", "sft": "SFT loss", "fusion": "fusion loss"}
MARKS: Mapping[str, tuple[str, str]] = {
    "above": ("▲", "above the pivot: the paired interval lies above zero"),
    "below": ("▼", "below the pivot: the paired interval lies below zero"),
    "noise": ("≈", "inside the noise: the paired interval holds zero"),
}


def build_report_html(report: RunReport, extras: Extras | None = None) -> str:
    """The page. `report` is report.json, `extras` as content.Extras says; see both for what may be missing."""
    extras = extras or {}
    models = sorted_models(report.get("models") or [])
    name = escape(str(report.get("run", "run")))
    sections = [
        _headline(models, extras.get("paired") or {}),
        _section("Scores", _scores(models, extras.get("paired") or {})),
        _section("Judge", _judge(models, extras.get("judge") or {})),
        _section("Training", _training(extras.get("training") or {})),
        _section("Merge weights", _merges(extras)),
        _section("Token alignment", _alignment(report, extras.get("alignment_examples") or {})),
        _section("Stages", _stages(report)),
        _section("Versions", _versions(report)),
    ]
    css = files("fusion_ray.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{name} - fusion_ray</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{name}</h1>\n<p class="soft">{_subtitle(models)}</p>\n'
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _subtitle(models: Sequence[ModelScores]) -> str:
    pivots, sources = by_role(models, "pivot"), by_role(models, "source")
    if not pivots or not sources:
        return "fusion_ray run"
    names = ", ".join(escape(model["name"]) for model in sources)
    return f"{escape(pivots[0]['name'])} fused with {names}"


# Headline -------------------------------------------------------------------------------------------------------------------------------------------


def _headline(models: Sequence[ModelScores], paired: Mapping[str, Mapping[str, Interval]]) -> str:
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


# Scores ---------------------------------------------------------------------------------------------------------------------------------------------


def _scores(models: Sequence[ModelScores], paired: Mapping[str, Mapping[str, Interval]]) -> str:
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
        legend = _legend((model["name"], styles[model["name"]]) for model in drawn)
        figures.append(f"<figure>{charts.radar(models, names)}{legend}<figcaption>{caption}</figcaption></figure>")
    if any(model.get("overall") for model in models):
        caption = "Overall score with its 95% interval; the dashed rule is the pivot."
        figures.append(f"<figure>{charts.overall_intervals(models)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pair">{"".join(figures)}</div>' if len(figures) > 1 else "".join(figures)


def _legend(entries: Iterable[tuple[str, charts.Style]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke="{style.color}" stroke-width="{style.width}" '
        f'stroke-dasharray="{" ".join(map(str, style.dash)) if style.dash[1] else "none"}"/></svg>{escape(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


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


# Judge ----------------------------------------------------------------------------------------------------------------------------------------------


def _judge(models: Sequence[ModelScores], judge: Mapping[str, Mapping[str, float]]) -> str:
    turns = list(dict.fromkeys(turn for scores in judge.values() for turn in scores))
    if not turns:
        return '<p class="note">No judge was set for this run (<code>evaluate.judge</code>).</p>'
    order = [model["name"] for model in models if model["name"] in judge]
    order += [name for name in judge if name not in order]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{judge[name][turn]:.2f}</td>" if turn in judge[name] else "<td>–</td>" for turn in turns)
        + "</tr>"
        for name in order
    )
    head = "".join(f'<th scope="col">{escape(turn)}</th>' for turn in turns)
    caption = "Mean of the judge's ratings, 1 to 10."
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


# Training and merging -------------------------------------------------------------------------------------------------------------------------------


def _training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    drawing = charts.training_curves(training, LOSSES)
    if not drawing:
        return '<p class="note">No training curves were recorded for this run.</p>'
    legend = _legend((branch, charts.Style(charts.branch_colour(n), 2.4)) for n, branch in enumerate(training))
    return f"<figure>{drawing}{legend}<figcaption>Losses by optimizer step for every branch.</figcaption></figure>"


def _merges(extras: Extras) -> str:
    merges = {label: weights for label, weights in (extras.get("merges") or {}).items() if weights}
    if not merges:
        return '<p class="note">No merge of this run reported weights by layer and matrix.</p>'
    parts = [
        f"<h3>{escape(label)}</h3><figure>{charts.merge_weights(weights, label)}"
        "<figcaption>What each target got; a column is a layer, <code>-</code> stands for tensors outside the layers.</figcaption></figure>"
        for label, weights in merges.items()
    ]
    return "\n".join(parts)


# Alignment ------------------------------------------------------------------------------------------------------------------------------------------


def _alignment(report: RunReport, examples: Mapping[str, Sequence[AlignmentExample]]) -> str:
    entries = [entry for entry in report.get("alignment") or [] if entry.get("coverage")]
    if not entries:
        return '<p class="note">This run aligned no source.</p>' + _examples(examples)
    kinds = _legend((charts.MATCH_WORDS[kind], charts.Style(f"var(--match-{kind})", 8)) for kind in charts.MATCHES)
    rows = "".join(
        f'<tr><th scope="row">{escape(entry["source"])}</th>'
        + "".join(f"<td>{_share(entry['coverage'].get(kind))}</td>" for kind in charts.MATCHES)
        + f"<td>{_share(entry.get('mass_kept'))}</td><td>{_share(entry.get('source_won'))}</td></tr>"
        for entry in entries
    )
    head = "".join(f'<th scope="col">{kind}</th>' for kind in (*charts.MATCHES, "mass kept", "source won"))
    return (
        f"<figure>{charts.coverage_bars(entries)}{kinds}<figcaption>How the pivot's predicted tokens meet each source's tokens.</figcaption></figure>"
        f'<div class="scroll"><table><thead><tr><th scope="col">source</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="note">Mass kept: share of the source\'s probability that its top-k and the vocabulary map carry over. '
        "Source won: share of rows where MinCE chose the source.</p>" + _examples(examples)
    )


def _examples(examples: Mapping[str, Sequence[AlignmentExample]]) -> str:
    parts = []
    for source, rows in examples.items():
        for row in rows:
            pivot = "".join(
                f'<span class="{escape(token["kind"])}">{_visible(token["text"])}</span>' for token in row["pivot"]
            )
            other = "".join(f"<span>{_visible(text)}</span>" for text in row["source"])
            parts.append(
                f'<div class="row"><p class="note">{escape(source)}, row <code>{escape(row["id"])}</code></p>'
                f'<p class="tokens"><b>pivot </b>{pivot}</p><p class="tokens"><b>source</b>{other}</p></div>'
            )
    if not parts:
        return '<p class="note">No rows were kept to be shown in both tokenizations.</p>'
    return "<h3>Rows in both tokenizations</h3>" + "".join(parts)


def _visible(text: str) -> str:
    return escape(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")) or "∅"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


# Stages and versions --------------------------------------------------------------------------------------------------------------------------------


def _stages(report: RunReport) -> str:
    stages = report.get("stages") or []
    if not stages:
        return '<p class="note">No stage was recorded.</p>'
    rows = "".join(
        f'<tr><td class="text">{escape(stage["stage"])}</td><td class="text">{escape(stage.get("branch") or "–")}</td>'
        f'<td class="text"><code>{escape(stage["key"][:12])}</code></td>'
        f'<td class="text"><span class="tag {escape(stage["status"])}">{escape(stage["status"])}</span></td><td>{stage["seconds"]:.1f}</td></tr>'
        for stage in stages
    )
    head = '<th class="text" scope="col">stage</th><th class="text" scope="col">branch</th><th class="text" scope="col">key</th>'
    head += '<th class="text" scope="col">status</th><th scope="col">seconds</th>'
    cached = sum(stage["status"] == "cached" for stage in stages)
    total = sum(stage["seconds"] for stage in stages)
    note = f"{len(stages)} stages, {cached} cached; {total:.0f} s of work (branches may run side by side)."
    return f'<p class="note">{note}</p><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _versions(report: RunReport) -> str:
    entries = {
        **(report.get("versions") or {}),
        **{f"engine of {name}": text for name, text in (report.get("engine") or {}).items()},
    }
    if not entries:
        return '<p class="note">No versions were recorded.</p>'
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in entries.items())
    return f'<dl class="versions">{items}</dl>'

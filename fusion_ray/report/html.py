"""The HTML report of a run: one self-contained page (no script, no external address) from report.json and what lies beside it. Called by the summary.

Every text that comes from outside (names, keys, row texts) passes through `html.escape`; drawings come from charts as inline SVG. A part that the run
does not have is replaced by a sentence that says so. The sections on results are in scores.py, those on how they came about in process.py and alignment.py.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from fusion_ray.report.alignment import alignment
from fusion_ray.report.content import Extras, ModelScores, RunReport, by_role, sorted_models
from fusion_ray.report.process import merges, training
from fusion_ray.report.scores import headline, judge, scores


def build_report_html(report: RunReport, extras: Extras | None = None) -> str:
    """The page. `report` is report.json, `extras` as content.Extras says; see both for what may be missing."""
    extras = extras or {}
    models = sorted_models(report.get("models") or [])
    name = escape(str(report.get("run", "run")))
    sections = [
        headline(models, extras.get("paired") or {}),
        _section("Scores", scores(models, extras.get("paired") or {})),
        _section("Judge", judge(models, extras.get("judge") or {})),
        _section("Training", training(extras.get("training") or {})),
        _section("Merge weights", merges(extras)),
        _section("Token alignment", alignment(report, extras.get("alignment_examples") or {})),
        _section("Corpus", _corpus(report)),
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


def _corpus(report: RunReport) -> str:
    corpus = report.get("corpus") or {}
    if "rows" not in corpus:
        return '<p class="note">No counts of the corpus were recorded.</p>'
    note = f"{corpus['rows']:,} conversations; {corpus.get('rejected', 0):,} malformed rows"
    note += f" and {corpus.get('duplicates', 0):,} copies were left out."
    sources = corpus.get("sources") or {}
    if not sources:
        return f'<p class="note">{note}</p>'
    columns = ("read", "kept", "rejected", "duplicates")
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{counts[column]:,}</td>" for column in columns)  # type: ignore[literal-required]
        + "</tr>"
        for name, counts in sources.items()
    )
    table = f'<table><thead><tr><th scope="col">source</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="note">{note}</p><div class="scroll">{table}</div>'


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
    for merge in report.get("merges") or []:
        if merge["reused"]:
            note += f" The merge {escape(merge['name'])} took the statistics of {escape(', '.join(merge['reused']))} from an earlier one."
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

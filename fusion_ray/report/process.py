"""The report's sections on how the fused model came about: training curves, merge weights, token alignment. Called by html."""

from collections.abc import Mapping, Sequence
from html import escape

from fusion_ray.report import charts_process as charts
from fusion_ray.report.content import AlignmentExample, Extras, MergeWeight, RunReport
from fusion_ray.report.svg import Style, legend

LOSSES: Mapping[str, str] = {"sft": "SFT loss", "fusion": "fusion loss"}


def training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    drawing = charts.training_curves(training, LOSSES)
    if not drawing:
        return '<p class="note">No training curves were recorded for this run.</p>'
    names = legend((branch, Style(charts.branch_colour(n), 2.4)) for n, branch in enumerate(training))
    caption = "Losses of each optimizer step's batch for every branch; the fusion loss over the positions that were distilled."
    return f"<figure>{drawing}{names}<figcaption>{caption}</figcaption></figure>"


def merges(extras: Extras) -> str:
    found = extras.get("merges") or {}
    if not found:
        return '<p class="note">This run merged nothing.</p>'
    return "\n".join(f"<h3>{escape(label)}</h3>{_weights(label, rows)}" for label, rows in found.items())


def _weights(label: str, rows: Sequence[MergeWeight]) -> str:
    if not rows:
        return '<p class="note">This merge has no weights by layer and matrix: each element has its own.</p>'
    caption = "What each target got; a column is a layer, <code>-</code> stands for tensors outside the layers."
    return f"<figure>{charts.merge_weights(rows, label)}<figcaption>{caption}</figcaption></figure>"


def alignment(report: RunReport, examples: Mapping[str, Sequence[AlignmentExample]]) -> str:
    entries = [entry for entry in report.get("alignment") or [] if entry.get("coverage")]
    if not entries:
        return '<p class="note">This run aligned no source.</p>' + _examples(examples)
    missing = [entry["source"] for entry in report["alignment"] if not entry.get("coverage")]
    note = f'<p class="note">No coverage is recorded for {escape(", ".join(missing))}.</p>' if missing else ""
    kinds = legend((charts.MATCH_WORDS[kind], Style(f"var(--match-{kind})", 8)) for kind in charts.MATCHES)
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
        "Source won: share of rows where MinCE chose the source.</p>" + note + _examples(examples)
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

"""The report's section on token alignment: how each source's tokens meet the pivot's, what was lost, and rows in both tokenizations. Called by html."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fusion_ray.alignment.explain import Candidate, ExplainedRow, ExplainedToken, Line, side_by_side, source_kinds
from fusion_ray.report import charts_process as charts
from fusion_ray.report.content import AlignmentSummary, RunReport, TokenPair
from fusion_ray.report.svg import Style, legend
from fusion_ray.report.visible import visible

PAIRS = 10  # of a source
LINES = 60  # of a row, position by position
OF_SOURCE = {**charts.MATCH_WORDS, "inside": "inside a pivot token", "none": "no pivot token"}
# Column, and what it means.
SHARES: Mapping[str, tuple[str, str]] = {
    "mass_kept": ("mass kept", "share of the source's probability that its top-k and the vocabulary map carry over"),
    "top1_agreement": ("same top-1", "share of projected positions where the source's likeliest token is the pivot's"),
    "source_won": (
        "rows won",
        "share of rows that MinCE gives to the source (by token: rows with most of their positions)",
    ),
    "positions_won": ("positions won", "share of the pivot's positions that MinCE gives to the source"),
    "one_hot": ("one-hot", "share of those where the source says nothing, so that the true token alone teaches"),
}


def alignment(report: RunReport, examples: Mapping[str, Sequence[ExplainedRow]]) -> str:
    entries = [entry for entry in report.get("alignment") or [] if entry.get("coverage")]
    if not entries:
        return '<p class="note">This run aligned no source.</p>' + _examples(examples)
    missing = [entry["source"] for entry in report["alignment"] if not entry.get("coverage")]
    note = f'<p class="note">No coverage is recorded for {escape(", ".join(missing))}.</p>' if missing else ""
    return (
        f"<figure>{charts.coverage_bars(entries)}{_legend()}"
        "<figcaption>How the pivot's predicted tokens meet each source's tokens.</figcaption></figure>"
        + _figures(entries)
        + _combined(report)
        + note
        + "".join(_pairs(entry["source"], entry.get("worst_pairs") or []) for entry in entries)
        + _examples(examples)
    )


def _combined(report: RunReport) -> str:
    """Who teaches the one target of all sources."""
    combined = report.get("combined")
    if combined is None or not combined["rows"]:
        return ""
    rows, won = combined["rows"], combined["won"]
    shares = [*won.items(), ("the pivot itself", rows - sum(won.values()))]
    said = ", ".join(f"{escape(name)} {count / rows:.1%}" for name, count in shares)
    return (
        f'<p class="note">The one target of all sources takes of each of {rows:,} conversations the best: {said}.</p>'
    )


def _legend() -> str:
    return legend((charts.MATCH_WORDS[kind], Style(f"var(--match-{kind})", 8)) for kind in charts.MATCHES)


def _figures(entries: Sequence[AlignmentSummary]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(entry["source"])}{_counts(entry)}</th>'
        + "".join(f"<td>{_share(entry['coverage'].get(kind))}</td>" for kind in charts.MATCHES)
        + "".join(f"<td>{_share(entry.get(key))}</td>" for key in SHARES)  # type: ignore[arg-type]  # a share each
        + "</tr>"
        for entry in entries
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in (*charts.MATCHES, *(name for name, _ in SHARES.values())))
    words = "; ".join(f"{name}: {meaning}" for name, meaning in SHARES.values())
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">source</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{words[0].upper()}{words[1:]}.</p>'
    )


def _counts(entry: AlignmentSummary) -> str:
    rows, positions, rejected = entry.get("rows"), entry.get("positions"), entry.get("rejected")
    if rows is None or positions is None:
        return ""
    return f"<small>{rows:,} rows, {positions:,} positions{f', {rejected:,} rejected' if rejected else ''}</small>"


def _pairs(source: str, pairs: Sequence[TokenPair]) -> str:
    if not pairs:
        return f'<p class="note">{escape(source)}: no token became one of other bytes.</p>'
    rows = "".join(
        f'<tr><td class="text">{_token(pair["source"])}</td>'
        f'<td class="text">{"nothing" if pair["pivot"] is None else _token(pair["pivot"])}</td>'
        f"<td>{pair['mass']:.2f}</td><td>{pair['positions']:,}</td></tr>"
        for pair in pairs[:PAIRS]
    )
    head = '<th class="text" scope="col">source token</th><th class="text" scope="col">became</th>'
    head += '<th scope="col">probability</th><th scope="col">positions</th>'
    return (
        f"<details><summary>Worst token pairs of {escape(source)}: tokens that the vocabulary map turns into others</summary>"
        f'<div class="scroll"><table class="pairs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _examples(examples: Mapping[str, Sequence[ExplainedRow]]) -> str:
    parts = [_row(source, row) for source, rows in examples.items() for row in rows]
    if not parts:
        return '<p class="note">No rows were kept to be shown in both tokenizations.</p>'
    return f"<h3>Rows in both tokenizations</h3>{_legend()}" + "".join(parts)


def _row(source: str, row: ExplainedRow) -> str:
    winner = source if row["source_won"] else "the pivot"
    bits = [(source, row.get("source_bits")), ("pivot", row.get("pivot_bits"))]
    known = ", ".join(f"{escape(name)} {value:.3f}" for name, value in bits if value is not None)
    return (
        f'<div class="row"><p class="note">{escape(source)}, row <code>{escape(row["id"])}</code>: MinCE takes {escape(winner)}'
        f"{f' (bits per byte: {known})' if known else ''}</p>"
        f'<p class="tokens"><b>pivot </b>{_tokens(row["pivot"], [token["kind"] for token in row["pivot"]], charts.MATCH_WORDS)}</p>'
        f'<p class="tokens"><b>source</b>{_tokens(row["source"], source_kinds(row), OF_SOURCE)}</p>'
        f"{_positions(row)}</div>"
    )


def _tokens(tokens: Sequence[ExplainedToken], kinds: Sequence[str], words: Mapping[str, str]) -> str:
    return "".join(
        f'<span class="{escape(kind)}" title="{escape(_place(token))}, {escape(words.get(kind, kind))}">{_shown(token["text"])}</span>'
        for token, kind in zip(tokens, kinds, strict=True)
    )


def _positions(row: ExplainedRow) -> str:
    """What the source said at each position and what it became, folded away."""
    lines = side_by_side(row)
    more = f"; the first {LINES} of {len(lines)} lines" if len(lines) > LINES else ""
    body = "".join(map(_line, lines[:LINES]))
    names = ("bytes", "pivot", "source", "source says", "in the pivot's vocabulary")
    head = "".join(f'<th class="text" scope="col">{name}</th>' for name in names)
    return (
        f"<details><summary>Position by position{more}</summary>"
        f'<div class="scroll"><table class="positions"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _line(line: Line) -> str:
    token = line.pivot or line.source
    assert token is not None
    cells = (
        escape(_place(token)),
        _token(line.pivot["text"], line.pivot["kind"]) if line.pivot else "",
        _token(line.source["text"]) if line.source else "",
        _candidates(line.source.get("says") or () if line.source else ()),
        _candidates(line.pivot.get("becomes") or () if line.pivot else ()),
    )
    body = "".join(f'<td class="text">{cell}</td>' for cell in cells)
    return f"<tr>{body}</tr>"


def _candidates(candidates: Iterable[Candidate]) -> str:
    return " ".join(f"{_token(candidate['text'])} {candidate['probability']:.2f}" for candidate in candidates)


def _place(token: ExplainedToken) -> str:
    return f"{token['message']}:{token['byte_start']}–{token['byte_end']}"


def _token(text: str, kind: str = "") -> str:
    coloured = f' class="{escape(kind)}"' if kind else ""
    return f'<span class="tokens"><span{coloured}>{_shown(text)}</span></span>'


def _shown(text: str) -> str:
    return escape(visible(text))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

"""The report's section on token alignment: every figure of every source, the worst pairs, rows in both tokenizations."""

import re

from fusion_ray.alignment.explain import ExplainedRow
from fusion_ray.report.alignment import LINES, PAIRS, alignment
from fusion_ray.report.content import AlignmentSummary, RunReport


def source(name: str, **figures: object) -> AlignmentSummary:
    found: AlignmentSummary = {
        "source": name,
        "rows": 1200,
        "rejected": 3,
        "positions": 54321,
        "coverage": {"strict": 0.71, "comparable": 0.13, "inside": 0.14, "none": 0.02},
        "mass_kept": 0.951,
        "one_hot": 0.163,
        "top1_agreement": 0.442,
        "source_won": 0.617,
        "positions_won": 0.634,
        "positions_from_source": 0.53,
        "worst_pairs": [
            {"source": " answer", "pivot": " ans", "mass": 41.25, "positions": 118},
            {"source": "\n\n", "pivot": None, "mass": 7.5, "positions": 9},
        ],
    }
    return found | figures  # type: ignore[return-value]


def report(*sources: AlignmentSummary) -> RunReport:
    return {"run": "x", "alignment": list(sources)}


def example() -> ExplainedRow:
    """pivot |Hi| you|<end>, source |Hi yo|u|</s>"""
    return {
        "id": "row-3",
        "source_won": False,
        "pivot_bits": 0.5,
        "source_bits": 1.25,
        "pivot": [
            {"text": "Hi", "message": 1, "byte_start": 0, "byte_end": 2, "kind": "comparable", "source_index": 0,
             "becomes": [{"text": "Hi", "probability": 0.375}]},
            {"text": " you", "message": 1, "byte_start": 2, "byte_end": 6, "kind": "inside", "source_index": 0, "becomes": []},
            {"text": "<end>", "message": 1, "byte_start": 6, "byte_end": 6, "kind": "strict", "source_index": 2, "becomes": []},
        ],
        "source": [
            {"text": "Hi yo", "message": 1, "byte_start": 0, "byte_end": 5, "says": [{"text": "Hi yo", "probability": 0.25}]},
            {"text": "u", "message": 1, "byte_start": 5, "byte_end": 6, "says": []},
            {"text": "</s>", "message": 1, "byte_start": 6, "byte_end": 6, "says": []},
        ],
    }  # fmt: skip


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_every_figure_of_every_source_is_there() -> None:
    page = alignment(report(source("qwen"), source("neox", mass_kept=0.902, rejected=0)), {})
    text = text_of(page)
    for figure in ("71.0%", "13.0%", "14.0%", "2.0%", "95.1%", "90.2%", "16.3%", "44.2%", "61.7%", "63.4%"):
        assert figure in text, figure
    assert "1,200 rows, 54,321 positions, 3 rejected" in text
    assert text.count("rejected") == 1
    for name in ("mass kept", "same top-1", "rows won", "positions won", "one-hot"):
        assert f'<th scope="col">{name}</th>' in page
        assert f"{name}: share" in text.replace("Mass kept", "mass kept")  # what it is a share of


def test_who_teaches_the_one_target_of_all_sources() -> None:
    made = report(source("qwen"), source("neox")) | {"combined": {"rows": 1000, "won": {"qwen": 612, "neox": 88}}}
    said = "takes of each of 1,000 conversations the best: qwen 61.2%, neox 8.8%, the pivot itself 30.0%."
    assert said in text_of(alignment(made, {}))
    assert "conversations the best" not in alignment(report(source("qwen")), {})


def test_the_worst_pairs_are_shown_heaviest_first_with_what_they_became() -> None:
    many = [{"source": f"s{n}", "pivot": f"p{n}", "mass": 100.0 - n, "positions": n} for n in range(PAIRS + 5)]
    text = text_of(
        alignment(report(source("qwen"), source("neox", worst_pairs=many), source("gemma", worst_pairs=[])), {})
    )
    assert "·answer ·ans 41.25 118" in text
    assert "↵↵ nothing 7.50 9" in text
    assert "s0 p0 100.00 0" in text
    assert f"s{PAIRS - 1} " in text
    assert f"s{PAIRS} " not in text
    assert "gemma: no token became one of other bytes." in text


def test_rows_are_shown_in_both_tokenizations_with_matches_coloured() -> None:
    page = alignment(report(source("qwen")), {"qwen": [example()]})
    pivot, other = re.findall(r'<p class="tokens"><b>(?:pivot |source)</b>(.*?)</p>', page)
    coloured = r'<span class="(\w+)" title="([^"]+)">([^<]+)</span>'
    assert re.findall(coloured, pivot) == [
        ("comparable", "1:0–2, same context, other length", "Hi"),
        ("inside", "1:2–6, inside a source token", "·you"),
        ("strict", "1:6–6, same bytes", "&lt;end&gt;"),
    ]
    assert re.findall(coloured, other) == [
        ("comparable", "1:0–5, same context, other length", "Hi·yo"),
        ("inside", "1:5–6, inside a pivot token", "u"),
        ("strict", "1:6–6, same bytes", "&lt;/s&gt;"),
    ]
    assert "MinCE takes the pivot (bits per byte: qwen 1.250, pivot 0.500)" in text_of(page)
    table = text_of(page[page.index("Position by position") :])
    assert "1:0–2 Hi Hi·yo Hi·yo 0.25 Hi 0.38" in table
    assert "1:5–6 u" in table


def test_a_long_row_is_cut_in_its_table_and_says_so() -> None:
    row = example()
    row["pivot"] = [
        {"text": "a", "message": 1, "byte_start": at, "byte_end": at + 1, "kind": "none", "source_index": -1}
        for at in range(LINES + 7)
    ]
    row["source"] = []
    page = alignment(report(source("qwen")), {"qwen": [row]})
    assert f"Position by position; the first {LINES} of {LINES + 7} lines" in page
    assert page.count("<tr><td") == LINES + 2  # and two pairs


def test_figures_and_rows_of_an_older_artefact_are_shown_as_far_as_they_go() -> None:
    row = example()
    del row["pivot_bits"], row["source_bits"]
    for token in (*row["pivot"], *row["source"]):
        token.pop("becomes", None)
        token.pop("says", None)
    old: AlignmentSummary = {"source": "qwen", "coverage": {"strict": 1.0}, "mass_kept": 0.9, "source_won": None}
    text = text_of(alignment(report(old), {"qwen": [row]}))
    assert "90.0%" in text
    assert "–" in text
    assert "MinCE takes the pivot pivot" in text  # no bits; then the first line of tokens

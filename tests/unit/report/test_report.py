"""The report of a run: complete, degraded and hostile input."""

import copy
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fusion_ray.alignment.explain import ExplainedRow
from fusion_ray.report.content import (
    CATEGORIES,
    Extras,
    Interval,
    MergeWeight,
    ModelScores,
    Role,
    RunReport,
    Score,
    against_pivot,
    best_source,
    categories,
    sorted_models,
)
from fusion_ray.report.html import build_report_html
from fusion_ray.report.text import score_table

HOSTILE = '<script>alert("1")</script>'
VOID = {"meta", "br", "link", "img", "input", "hr"}


def score(mean: float, n: int = 40) -> Score:
    return {"mean": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1), "n": n}


def model(name: str, role: Role, mean: float, merge: str | None = None) -> ModelScores:
    scores = {category: score(mean + number / 100) for number, category in enumerate(CATEGORIES)}
    return {
        "name": name,
        "role": role,
        "merge": merge,
        "parameters": 1_050_000,
        "scores": scores,
        "overall": score(mean, 320),
        "bits_per_byte": 1.5 - mean,
    }


def difference(mean: float) -> Interval:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def make_report() -> RunReport:
    return {
        "run": "demo",
        "versions": {"torch": "2.13.0"},
        "engine": {"teach": "vllm 0.29.0"},
        "corpus": {
            "rows": 960,
            "rejected": 40,
            "duplicates": 0,
            "sources": {"all": {"read": 1000, "kept": 960, "rejected": 40, "duplicates": 0}},
        },
        "stages": [
            {"stage": "teach", "branch": "qwen", "key": "0123456789abcdef", "status": "ran", "seconds": 12.34},
            {"stage": "merge", "branch": None, "key": "fedcba9876543210", "status": "cached", "seconds": 0.0},
        ],
        "models": [
            model("fused-varm", "fused", 0.8, "varm"),
            model("target-qwen", "target", 0.6),
            model("sft", "sft", 0.5),
            model("qwen", "source", 0.4),
            model("neox", "source", 0.45),
            model("pivot", "pivot", 0.3),
        ],
        "alignment": [
            {
                "source": "qwen",
                "coverage": {"strict": 0.7, "comparable": 0.1, "inside": 0.15, "none": 0.05},
                "mass_kept": 0.72,
                "source_won": 0.61,
                "worst_pairs": [{"source": " fusion", "pivot": " fus", "mass": 12.5, "positions": 40}],
            }
        ],
    }


def explained_row(name: str, first: str, second: str, whole: str, kind: str = "comparable") -> ExplainedRow:
    """Two tokens of the pivot under one of the source."""
    middle, end = len(first), len(first) + len(second)
    return {
        "id": name,
        "source_won": True,
        "pivot": [
            {"text": first, "message": 1, "byte_start": 0, "byte_end": middle, "kind": kind, "source_index": 0},
            {"text": second, "message": 1, "byte_start": middle, "byte_end": end, "kind": "inside", "source_index": 0},
        ],
        "source": [
            {
                "text": whole,
                "message": 1,
                "byte_start": 0,
                "byte_end": end,
                "says": [{"text": whole, "probability": 0.5}],
            }
        ],
    }


def make_extras() -> Extras:
    weights: list[MergeWeight] = [
        {"layer": layer, "matrix": matrix, "target": target, "weight": 0.25 if target == "qwen" else 0.75}
        for layer in (0, 1, None)
        for matrix in (("q_proj", "up_proj") if layer is not None else ("lm_head",))
        for target in ("qwen", "neox")
    ]
    example = explained_row("row-7", "fus", "ion", "fusion")
    return {
        "training": {
            "qwen": [
                {"step": 1, "sft": 1.0, "fusion": 3.0, "distilled": 0.9},
                {"step": 2, "sft": 0.9, "fusion": 2.5, "distilled": 0.8},
            ],
            "sft": [
                {"step": 1, "sft": 1.0, "fusion": 0.0, "distilled": 0.0},
                {"step": 2, "sft": 0.8, "fusion": 0.0, "distilled": 0.0},
            ],
        },
        "merges": {"varm": weights},
        "alignment_examples": {"qwen": [example]},
        "paired": {
            "fused-varm": {"overall": difference(0.5), "math": difference(0.05)},
            "qwen": {"overall": difference(-0.4)},
        },
        "judge": {"pivot": {"turn 1": 5.25, "turn 2": 4.5}},
    }


@pytest.fixture
def report() -> RunReport:
    return make_report()


@pytest.fixture
def extras() -> Extras:
    return make_extras()


@pytest.fixture(scope="module")
def page() -> str:
    """The page of the whole run, built once: drawing it takes most of a second."""
    return build_report_html(make_report(), make_extras())


class Page(HTMLParser):
    """Tags opened and closed, texts, and every attribute value."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def drawings(page: str) -> list[str]:
    return re.findall(r'<svg class="chart".*?</svg>', page, flags=re.DOTALL)


def test_the_page_holds_every_part_and_is_well_formed(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    for title in ("Scores", "Judge", "Training", "Merge weights", "Token alignment", "Corpus", "Stages", "Versions"):
        assert f"<h2>{title}</h2>" in page
    assert 'class="note">No ' not in page  # nothing is missing, so no sentence says so
    assert len(drawings(page)) == 5
    for text in ("0.80", "5.25", "0.700", "+0.500", "row-7", "0123456789ab", "12.3", "72.0%", "vllm 0.29.0", "2.13.0"):
        assert text in page, text


def test_the_page_is_self_contained(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "use"} & set(parsed.tags)
    assert "://" not in page
    assert "@import" not in page
    assert not [value for value in re.findall(r"url\(([^)]*)\)", page) if not value.startswith("#")]


def test_every_drawing_is_announced_as_one_image_and_valid(page: str) -> None:
    for drawing in drawings(page):
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 20
        assert next(iter(root)).get("aria-hidden") == "true"


def test_drawings_do_not_share_ids(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_text_from_outside_is_escaped_everywhere(report: RunReport, extras: Extras) -> None:
    hostile = copy.deepcopy(report)
    hostile["run"] = HOSTILE
    for entry in hostile["models"]:
        entry["name"] += HOSTILE
        entry["merge"] = HOSTILE
        entry["scores"] = {name + HOSTILE: value for name, value in entry["scores"].items()}
    hostile["stages"][0] = {"stage": HOSTILE, "branch": HOSTILE, "key": HOSTILE, "status": HOSTILE, "seconds": 1.0}
    hostile["alignment"][0]["source"] = HOSTILE
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["engine"] = {HOSTILE: HOSTILE}
    weight: MergeWeight = {"layer": 0, "matrix": HOSTILE, "target": HOSTILE, "weight": 1.0}
    example = explained_row(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    hostile["alignment"][0]["worst_pairs"] = [{"source": HOSTILE, "pivot": HOSTILE, "mass": 1.0, "positions": 1}]
    more: Extras = {
        "training": {HOSTILE: extras["training"]["qwen"]},
        "merges": {HOSTILE: [weight]},
        "alignment_examples": {HOSTILE: [example]},
        "judge": {HOSTILE: {HOSTILE: 1.0}},
        "paired": {"fused-varm" + HOSTILE: {"overall": difference(0.1)}},
    }
    page = build_report_html(hostile, more)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.open == []
    assert not [value for name, value in parsed.attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;") > 20


def test_nothing_but_a_name_still_gives_a_page_with_sentences() -> None:
    page = build_report_html({"run": "empty"})
    assert Page(page).open == []
    for sentence in (
        "No model of this run has been scored",
        "This run has no scores",
        "No judge was set",
        "No training curves",
        "This run merged nothing",
        "aligned no source",
        "No rows were kept",
        "No stage was recorded",
        "No versions were recorded",
    ):
        assert sentence in page, sentence


@pytest.mark.parametrize("role", ["sft", "target", "fused", "source", "pivot"])
def test_a_run_without_one_role_is_drawn(report: RunReport, role: str) -> None:
    report["models"] = [entry for entry in report["models"] if entry["role"] != role]
    page = build_report_html(report)
    assert len(drawings(page)) == 3
    assert Page(page).open == []


def test_a_model_without_one_category_is_left_out_of_the_radar_and_named(report: RunReport) -> None:
    del report["models"][1]["scores"]["math"]
    page = build_report_html(report)
    assert "Not drawn: neox" not in page  # the best source is drawn
    assert re.search(r"Not drawn: [^<]*target-qwen", page)
    assert "<td>–</td>" in page


def test_two_categories_give_a_table_without_a_radar(report: RunReport) -> None:
    for entry in report["models"]:
        entry["scores"] = {name: entry["scores"][name] for name in ("math", "coding")}
    page = build_report_html(report)
    assert "Radar" not in page
    assert ">coding</th>" in page


def test_differences_to_the_pivot_are_marked_by_their_paired_interval(
    page: str, report: RunReport, extras: Extras
) -> None:
    paired = extras["paired"]
    by_name = {entry["name"]: entry for entry in report["models"]}
    assert against_pivot(paired, by_name["fused-varm"], "overall") == "above"
    assert against_pivot(paired, by_name["fused-varm"], "math") == "noise"
    assert against_pivot(paired, by_name["qwen"], "overall") == "below"
    assert against_pivot(paired, by_name["fused-varm"], "coding") is None
    assert against_pivot({"pivot": {"overall": difference(1.0)}}, by_name["pivot"], "overall") is None
    row = page[page.index('<tr class="fused">') :]
    row = row[: row.index("</tr>")]
    assert row.count("▲") == 1
    assert row.count("≈") == 1
    assert "No paired intervals were given" in build_report_html({"run": "x", "models": report["models"][:1]})


def test_models_are_ordered_by_role_and_the_best_source_is_found(report: RunReport) -> None:
    names = [entry["name"] for entry in sorted_models(report["models"])]
    assert names == ["pivot", "qwen", "neox", "sft", "target-qwen", "fused-varm"]
    best = best_source(report["models"])
    assert best is not None
    assert best["name"] == "neox"


def test_categories_are_in_the_benchmarks_order_with_others_last(report: RunReport) -> None:
    report["models"][0]["scores"] = {"poetry": score(0.5), "math": score(0.5), "writing": score(0.5)}
    assert categories(report["models"][:1]) == ["writing", "math", "poetry"]


def test_steps_that_are_not_finite_are_not_drawn() -> None:
    rows = [{"step": 1, "sft": float("nan")}, {"step": 2, "sft": 1.0}]
    assert len(drawings(build_report_html({"run": "x"}, {"training": {"a": rows}}))) == 1
    assert drawings(build_report_html({"run": "x"}, {"training": {"a": rows[:1]}})) == []


def test_the_sft_control_has_no_fusion_curve(extras: Extras) -> None:
    both = build_report_html({"run": "x"}, {"training": extras["training"]})
    control = build_report_html({"run": "x"}, {"training": {"sft": extras["training"]["sft"]}})
    assert ">fusion loss<" in both
    assert ">fusion loss<" not in control
    assert ">SFT loss<" in control


def test_a_long_run_is_thinned() -> None:
    rows = [{"step": step, "sft": 1 / step} for step in range(1, 20_001)]
    page = build_report_html({"run": "x"}, {"training": {"a": rows}})
    assert len(page) < 60_000


def test_a_source_without_coverage_is_named(report: RunReport) -> None:
    report["alignment"].append({"source": "neox", "coverage": {}, "mass_kept": None, "source_won": None})
    assert "No coverage is recorded for neox." in build_report_html({"run": "x", "alignment": report["alignment"]})


def test_a_merge_without_weights_by_matrix_is_named(extras: Extras) -> None:
    page = build_report_html({"run": "x"}, {"merges": {"varm": extras["merges"]["varm"], "varm-parameter": []}})
    assert len(drawings(page)) == 1
    assert "<h3>varm-parameter</h3>" in page
    assert "each element has its own" in page


def test_the_same_run_gives_the_same_page(page: str, report: RunReport, extras: Extras) -> None:
    assert build_report_html(report, extras) == page


def shown(report: RunReport, width: int, paired: Mapping[str, Mapping[str, Interval]] | None = None) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(score_table(report, paired))
    return console.export_text()


def test_the_terminal_table_holds_every_model_and_mark(report: RunReport, extras: Extras) -> None:
    report["models"][0]["name"] = "fused[red]"
    text = shown(report, 200, {"fused[red]": extras["paired"]["fused-varm"]})
    for part in ("pivot", "neox", "fused[red]", "SFT only", "humanities", "0.80▲", "≈", "0.70-0.90", "0.700"):
        assert part in text, part
    assert text.index("pivot") < text.index("qwen") < text.index("fused[red]")


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_gets_every_mean_and_the_overall_interval(
    report: RunReport, extras: Extras, width: int
) -> None:
    text = shown(report, width, extras["paired"])
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    fused = next(line for line in text.splitlines() if line.startswith("fused-varm"))
    assert [cell.rstrip("▲≈▼") for cell in fused.split()[1:]] == [
        *("0.80", "0.80", "0.81", "0.82", "0.83", "0.84", "0.85", "0.86", "0.87"),
        "0.700",
    ]
    assert "0.70-0.90" in text


def test_the_terminal_says_when_there_is_nothing_to_show() -> None:
    assert "no scores" in shown({"run": "x"}, 100)


def test_the_stages_say_which_statistics_were_reused():
    stages = [{"stage": "merge", "branch": "varm", "key": "k" * 32, "status": "ran", "seconds": 1.0}]
    merges = [
        {"name": "varm", "method": "varm", "reused": ["qwen3", "neox"]},
        {"name": "sce", "method": "sce", "reused": []},
    ]
    page = build_report_html({"run": "x", "stages": stages, "merges": merges})
    assert "The merge varm took the statistics of qwen3, neox from an earlier one." in page
    assert "merge sce took" not in page


def test_held_out_conversations_have_a_panel_of_their_own_where_they_were_measured() -> None:
    rows = [{"step": step, "sft": 2.0 / step, "fusion": 1.0, "distilled": 0.5} for step in range(1, 9)]
    without = build_report_html({"run": "x"}, {"training": {"a": rows}})
    assert "bits per byte" not in drawings(without)[0]
    rows[3]["heldout_bits_per_byte"], rows[7]["heldout_bits_per_byte"] = 1.4, 1.2
    page = build_report_html({"run": "x"}, {"training": {"a": rows}})
    assert "held-out conversations" in drawings(page)[0]
    assert "bits per byte" in drawings(page)[0]
    assert "No step trains on the held-out conversations" in page
    assert "No step trains on" not in without


def test_the_corpus_by_source() -> None:
    counts = {"read": 1200, "kept": 1000, "rejected": 150, "duplicates": 50}
    corpus = {"rows": 1000, "rejected": 150, "duplicates": 50, "sources": {"share<gpt>": counts}}
    page = build_report_html({"run": "r", "corpus": corpus})  # type: ignore[typeddict-item]
    assert "1,000 conversations; 150 malformed rows and 50 copies were left out." in page
    assert "share&lt;gpt&gt;</th><td>1,200</td><td>1,000</td><td>150</td><td>50</td>" in page
    assert "No counts of the corpus" in build_report_html({"run": "r"})

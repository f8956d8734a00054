"""A row in both tokenizations on a terminal: what stands beside what, what is visible, how wide it is."""

from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from fusion_ray.alignment.explain import ExplainedRow, ExplainedToken, side_by_side, source_kinds
from fusion_ray.report.explained import ExplainedView
from fusion_ray.report.visible import visible


def token(text: str, start: int, end: int, message: int = 1, **more: object) -> ExplainedToken:
    return {"text": text, "message": message, "byte_start": start, "byte_end": end, **more}  # type: ignore[typeddict-item]


def says(*pairs: tuple[str, float]) -> list[dict[str, object]]:
    return [{"text": text, "probability": probability} for text, probability in pairs]


def row() -> ExplainedRow:
    """pivot |The| quick| brown|end and |漢|end, source |The| qu|ick| bro|wn|end and nothing of the second message."""
    return {
        "id": "row-7[red]",
        "source_won": True,
        "pivot_bits": 1.25,
        "source_bits": 0.5,
        "pivot": [
            token(
                "The", 0, 3, kind="strict", source_index=0, becomes=says(("The", 0.5), ("A", 0.25)), from_source=True
            ),
            token(" quick", 3, 9, kind="comparable", source_index=1, becomes=says((" quick", 0.4))),
            token(" br", 9, 12, kind="comparable", source_index=3, becomes=[]),
            token("own", 12, 15, kind="inside", source_index=3, becomes=[]),
            token("<end>", 15, 15, kind="strict", source_index=4, becomes=says(("<end>", 0.9))),
            token("漢", 0, 3, 3, kind="none", source_index=-1, becomes=[]),
        ],
        "source": [
            token("The", 0, 3, says=says(("The", 0.5), ("A", 0.25))),
            token(" qu", 3, 6, says=says((" qu", 0.8))),
            token("ick", 6, 9, says=says(("ick", 0.5), ("\n", 0.125))),
            token(" brown", 9, 15, says=says((" brown", 0.7))),
            token("</s>", 15, 15, says=says(("</s>", 0.9))),
        ],
    }


def shown(explained: ExplainedRow, *, width: int = 200, terminal: bool = False, **options: object) -> str:
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, **options)  # type: ignore[arg-type]
    console.print(ExplainedView(explained, "qwen"), highlight=False, soft_wrap=True)  # as the command line does
    return out.getvalue()


def test_the_tokens_of_both_sides_stand_on_the_line_of_their_first_byte() -> None:
    lines = [
        tuple(own and (own["message"], own["byte_start"], own["byte_end"]) for own in line)
        for line in side_by_side(row())
    ]
    assert lines == [
        ((1, 0, 3), (1, 0, 3)),
        ((1, 3, 9), (1, 3, 6)),
        (None, (1, 6, 9)),
        ((1, 9, 12), (1, 9, 15)),
        ((1, 12, 15), None),
        ((1, 15, 15), (1, 15, 15)),
        ((3, 0, 3), None),
    ]
    assert source_kinds(row()) == ["strict", "comparable", "inside", "comparable", "strict"]


def test_an_empty_message_and_its_end_of_turn_keep_their_order() -> None:
    both = [token("<end>", 0, 0, 1, kind="strict", source_index=0), token("a", 0, 1, 3, kind="strict", source_index=1)]
    lines = side_by_side({"id": "x", "source_won": False, "pivot": both, "source": []})
    assert [line.pivot for line in lines] == both


def test_plain_output_has_marks_and_no_colour() -> None:
    text = shown(row())
    assert "\x1b" not in text
    first, legend, headings, *lines = text.splitlines()
    assert first == "row row-7[red]: MinCE takes the source qwen (bits per byte: qwen 0.500, pivot 1.250)"
    assert legend.startswith("= same bytes  < same context, other length  .")
    assert headings.split("  ")[0] == "bytes"
    cells = [line.split() for line in lines]
    assert cells == [
        ["1:0-3", "=*", "The", "The", "The", "0.50", "A", "0.25", "The", "0.50", "A", "0.25"],
        ["1:3-9", "<", "·quick", "·qu", "·qu", "0.80", "·quick", "0.40"],
        ["1:6-9", "┆", "ick", "ick", "0.50", "↵", "0.12"],
        ["1:9-12", "<", "·br", "·brown", "·brown", "0.70"],
        ["1:12-15", ".", "own", "┆"],
        ["1:15-15", "=", "<end>", "</s>", "</s>", "0.90", "<end>", "0.90"],
        ["3:0-3", "-", "漢"],
    ]


def test_colours_are_for_terminals_and_not_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(row(), terminal=True, color_system="standard")
    assert "\x1b[32mThe\x1b[0m" in coloured  # strict: green
    assert "\x1b[36m·quick\x1b[0m" in coloured  # comparable: cyan
    assert "\x1b[33mown\x1b[0m" in coloured  # inside: yellow
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(row(), terminal=True, color_system="standard")


@pytest.mark.parametrize(
    "texts", [("The", "漢字", "한국어"), ("ab", "👩", "é"), ("x", "e\u0301", "\u200d"), ("a", "\n", "\x00\t")]
)
def test_columns_stay_in_line_whatever_the_width_of_the_characters(texts: tuple[str, ...]) -> None:
    tokens = [
        token(text, at, at + 1, kind="strict", source_index=at, becomes=says(("B", 1.0)))
        for at, text in enumerate(texts)
    ]
    theirs = [token("|", at, at + 1, says=says(("S", 1.0))) for at in range(len(texts))]
    lines = shown({"id": "x", "source_won": False, "pivot": tokens, "source": theirs}).splitlines()[3:]
    assert len(lines) == len(texts)
    assert len({cell_len(line[: line.index("|")]) for line in lines}) == 1


@pytest.mark.parametrize("width", [40, 72])
def test_lines_are_cut_to_a_terminal_and_whole_elsewhere(width: int) -> None:
    explained = row()
    explained["pivot"][0]["text"] = "漢" * 200
    cut = shown(explained, width=width, terminal=True, color_system=None).splitlines()
    assert max(cell_len(line) for line in cut) <= width
    assert len(cut) == 10
    whole = shown(explained, width=width).splitlines()
    assert len(whole) == 10
    assert "The 0.50  A 0.25" in whole[3]


def test_a_row_of_an_older_artefact_is_shown_without_candidates() -> None:
    old = row()
    del old["pivot_bits"], old["source_bits"]
    for own in (*old["pivot"], *old["source"]):
        own.pop("becomes", None)
        own.pop("says", None)
    old["source_won"] = False
    text = shown(old)
    assert text.startswith("row row-7[red]: MinCE takes the pivot\n")
    assert "·quick" in text
    assert len(text.splitlines()) == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "∅"),
        (" a b", "·a·b"),
        ("\n\t\r", "↵⇥␍"),
        ("\x00\x1b[0m\x7f", "␀␛[0m␡"),
        ("\x85\u2028\u00a0\u3000", "⟨85⟩⟨2028⟩⟨A0⟩⟨3000⟩"),
        ("\u200d", "⟨200D⟩"),
        ("\u202eabc", "⟨202E⟩abc"),
        ("\ufeff", "⟨FEFF⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("漢字 שלום", "漢字·שלום"),
        ("\\xe6", "\\xe6"),
    ],
)
def test_every_character_is_visible_and_none_moves_the_cursor(text: str, expected: str) -> None:
    assert visible(text) == expected

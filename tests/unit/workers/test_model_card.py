"""The card of a merged model and of a target: front matter that the hub reads, one row a model, what it says of licences."""

from pathlib import Path

import pytest
import yaml

from fusion_ray.checkpoints.reader import open_checkpoint
from fusion_ray.workers.model_card import (
    UNKNOWN,
    Ancestor,
    front_matter,
    licence_in,
    licence_of,
    merge_card,
    target_card,
)
from tests.folders import random_tensors, write_model

RECIPE = "merge_method: ties\n"


def ancestor(name: str, *, licence: str = "mit", reference: str | None = None, role: str = "merged") -> Ancestor:
    return Ancestor(name, role, reference, None, licence, "0123456789abcdef")


def test_equal_licences_are_the_merge_s() -> None:
    card = merge_card("ties", [ancestor("a"), ancestor("b")], RECIPE)
    assert front_matter(card)["license"] == "mit"
    assert "**Licence.**" not in card


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (
            ("mit", "apache-2.0", "mit"),
            "**Licence.** The models have different licences (apache-2.0, mit): this one is subject to all of them.",
        ),
        (
            ("mit", UNKNOWN, "mit"),
            "**Licence.** Not every model says its licence (known: mit): find out before you pass this one on.",
        ),
        ((UNKNOWN, UNKNOWN), "**Licence.** No model says its licence: find out before you pass this one on."),
    ],
)
def test_other_licences_are_said_and_none_is_claimed(licences: tuple[str, ...], said: str) -> None:
    ancestors = [ancestor(f"m{number}", licence=licence) for number, licence in enumerate(licences)]
    card = merge_card("ties", ancestors, RECIPE)
    assert "license" not in front_matter(card)
    assert said in card.splitlines()


def test_base_model_has_the_hub_ids_and_nothing_else() -> None:
    """The hub refuses cards with other references there."""
    ancestors = [
        ancestor("maths", reference="lab/maths"),
        ancestor("poems", reference="s3://bucket/poems"),
        ancestor("base", role="base"),
    ]
    card = merge_card("ties", ancestors, RECIPE)
    assert front_matter(card) == {
        "base_model": ["lab/maths"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "fusion_ray"],
        "license": "mit",
    }
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == [
        "| model | role | from | revision | licence | key |",
        "| maths | merged | lab/maths |  | mit | `0123456789ab` |",
        "| poems | merged | s3://bucket/poems |  | mit | `0123456789ab` |",
        "| base | base | a local folder |  | mit | `0123456789ab` |",
    ]


def test_models_of_this_machine_alone_have_no_base_model() -> None:
    assert "base_model" not in front_matter(merge_card("ties", [ancestor("a")], RECIPE))


def test_equal_merges_have_equal_cards() -> None:
    first, second = (
        merge_card("ties", [ancestor("a", licence="mit"), ancestor("b", licence="gpl")], RECIPE) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("recipe", [RECIPE, "chat_template: '```{{ messages }}```'\n"], ids=["plain", "with a fence"])
def test_the_recipe_can_be_copied_out_of_the_card(recipe: str) -> None:
    lines = merge_card("ties", [ancestor("a")], recipe).splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.endswith("yaml") and line[0] in "`~"]
    fence = lines[start].removesuffix("yaml")
    block = lines[start + 1 : lines.index(fence, start + 1)]
    assert yaml.safe_load("\n".join(block)) == yaml.safe_load(recipe)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\r\nlicense: apache-2.0\r\n---\r\n# Model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\n", UNKNOWN),
        ("---\nlicense: [\n---\n", UNKNOWN),
        ("# A model without front matter\n---\nlicense: mit\n---\n", UNKNOWN),
        ("---\nlicense: mit", "mit"),
        ("", UNKNOWN),
    ],
)
def test_the_licence_that_a_model_says(tmp_path: Path, text: str, licence: str) -> None:
    folder = write_model(tmp_path / "model", random_tensors(0))
    (folder / "README.md").write_bytes(text.encode())
    assert licence_of(open_checkpoint(str(folder), model="model")) == licence


def test_a_model_without_a_card_says_no_licence(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_tensors(0))
    assert licence_of(open_checkpoint(str(folder), model="model")) == UNKNOWN


def test_a_target_is_a_fine_tune_of_its_pivot() -> None:
    pivot = ancestor("pivot", role="pivot", reference="lab/pivot", licence="apache-2.0")
    source = ancestor("maths", role="source", reference="lab/maths", licence="apache-2.0")
    card = target_card(pivot, [source], "lm_weight: 0.3\n")
    assert front_matter(card) == {
        "base_model": ["lab/pivot"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fusion_ray"],
        "license": "apache-2.0",
    }
    assert "# pivot, distilled from maths" in card
    assert "| maths | source | lab/maths |  | apache-2.0 | `0123456789ab` |" in card
    assert "lm_weight: 0.3" in card
    assert "# pivot, fine-tuned" in target_card(pivot, [], "")


def test_a_target_says_when_a_source_hides_its_licence() -> None:
    card = target_card(ancestor("pivot"), [ancestor("maths", licence=UNKNOWN)], "")
    assert "license" not in front_matter(card)
    assert "Not every model says its licence" in card


def test_the_licence_of_a_folder(tmp_path: Path) -> None:
    assert licence_in(str(tmp_path)) == UNKNOWN
    assert licence_in("lab/not-a-folder") == UNKNOWN
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_in(str(tmp_path)) == "mit"

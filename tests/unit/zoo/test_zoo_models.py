"""The five shipped folders: sizes, families, loading, and a few right answers in a strong skill."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_ray.zoo.answers import scores, two_turns
from fusion_ray.zoo.catalogue import FOURTH, MAX_LENGTH, MODELS, PIVOT, SKILL_NAMES, SOURCES, ZOO_MODELS, ZooModel
from fusion_ray.zoo.skills.item import draw_items
from fusion_ray.zoo.skills.table import SKILLS

EVERY = [pytest.param(model, id=model.name) for model in ZOO_MODELS.values()]
ALL_SOURCES = [pytest.param(model, id=model.name) for model in (*SOURCES, FOURTH)]


def test_the_folders_are_the_catalogue_and_stay_under_12_megabytes() -> None:
    assert {path.name for path in MODELS.iterdir() if path.is_dir()} == set(ZOO_MODELS)
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 12_000_000


def test_the_first_sources_cover_every_skill() -> None:
    assert {skill for source in SOURCES for skill in source.strong} == set(SKILL_NAMES)
    assert not PIVOT.strong
    assert FOURTH.strong not in [source.strong for source in SOURCES]


@pytest.mark.parametrize("model", EVERY)
def test_a_folder_is_a_complete_hugging_face_model(model: ZooModel) -> None:
    config = json.loads((model.path / "config.json").read_text())
    generation = json.loads((model.path / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    assert config["model_type"] == model.family
    assert config["max_position_embeddings"] == MAX_LENGTH
    assert config["vocab_size"] % 64 == 0
    assert config["vocab_size"] >= len(tokenizer)
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert (model.path / "chat_template.jinja").read_text() == tokenizer.chat_template
    with safe_open(model.path / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("model", ALL_SOURCES)
def test_a_source_answers_a_strong_skill_and_not_all_others(model: ZooModel) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    strong = list(itertools.islice(draw_items(SKILLS[model.strong[0]], "heldout", seed=8), 12))
    assert scores(network, tokenizer, strong)[model.strong[0]] >= 0.75
    weak = [skill for skill in SKILL_NAMES if skill not in model.strong]
    others = [item for skill in weak for item in itertools.islice(draw_items(SKILLS[skill], "heldout", seed=8), 4)]
    found = scores(network, tokenizer, others)
    assert sum(found.values()) / len(found) <= 0.5


def test_answers_are_told_apart_by_chat_and_do_not_depend_on_their_company() -> None:
    network = AutoModelForCausalLM.from_pretrained(PIVOT.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(PIVOT.path)
    items = [next(draw_items(SKILLS[skill], "validation", seed=8)) for skill in SKILL_NAMES]
    together = two_turns(network, tokenizer, items)
    alone = [two_turns(network, tokenizer, [item])[0] for item in items]
    assert together == alone
    assert len(set(together)) == len(items)

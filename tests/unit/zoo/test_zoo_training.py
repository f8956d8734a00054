"""The trainer's parts: what is counted in the loss, the schedule, and that a few steps on one skill lower the loss."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from fusion_ray.zoo.architectures import new_model, padded
from fusion_ray.zoo.catalogue import PIVOT, SKILL_NAMES, ZOO_MODELS
from fusion_ray.zoo.recipes import RECIPES
from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.train import Recipe, batches, learning_rate_share, loss_sums, rendered, train

ITEM = Item("math", ("What is one and one?", "And one more?"), ("It is two.", "It is three."))


@pytest.mark.parametrize("name", ZOO_MODELS)
def test_the_assistants_tokens_and_end_of_turn_are_marked_and_nothing_else(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO_MODELS[name].path)
    ids, said = rendered(ITEM, tokenizer)
    marked = tokenizer.decode([token for token, mine in zip(ids, said, strict=True) if mine])
    assert marked == f"It is two.{tokenizer.eos_token}It is three.{tokenizer.eos_token}"
    chat = [
        {"role": role, "content": text}
        for question, answer in zip(ITEM.questions, ITEM.answers, strict=True)
        for role, text in (("user", question), ("assistant", answer))
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert whole[: len(ids)] == ids  # the template may end with a line break after the last end of turn


def test_the_loss_is_the_weighted_sum_over_next_tokens() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    ids = torch.tensor([[0, 1, 0]])
    total, count = loss_sums(logits, ids, torch.tensor([[1.0, 1.0, 0.5]]))
    assert total.item() == pytest.approx(math.log(2) + 0.5 * math.log(4))
    assert count.item() == 1.5


def test_batches_pad_with_no_weight_and_are_the_same_for_a_seed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PIVOT.path)
    recipe = Recipe(mix={"math": 1.0, "stem": 2.0}, steps=3, seed=4, rows=4)
    first, again = list(batches(recipe, tokenizer, pool=2)), list(batches(recipe, tokenizer, pool=2))
    assert len(first) == 3
    for (ids, weights), (ids_again, weights_again) in zip(first, again, strict=True):
        assert ids.shape == weights.shape
        assert ids.shape[0] == 4
        assert torch.equal(ids, ids_again)
        assert torch.equal(weights, weights_again)
        assert (weights[ids == tokenizer.pad_token_id] == 0).all()
        assert {round(weight, 6) for weight in weights.unique().tolist()} <= {0.0, recipe.other_tokens, 1.0}


def test_the_schedule_rises_then_falls_to_a_fiftieth() -> None:
    recipe = Recipe(mix={"math": 1.0}, steps=110, seed=0, warmup=10)
    shares = [learning_rate_share(step, recipe) for step in range(110)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.02, abs=1e-3)


def test_a_few_steps_lower_the_loss_and_repeat_exactly() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(PIVOT.path)
    recipe = Recipe(mix={"roleplay": 1.0}, steps=12, seed=3, rows=8, warmup=4)
    ids, weights = next(batches(recipe, tokenizer))
    runs = []
    for _ in range(2):
        model = new_model(PIVOT, tokenizer, seed=3)
        with torch.inference_mode():
            before, count = loss_sums(model(input_ids=ids).logits, ids, weights)
        train(model, tokenizer, recipe)
        with torch.inference_mode():
            after, _ = loss_sums(model(input_ids=ids).logits, ids, weights)
        assert after / count < 0.75 * before / count
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_every_model_has_a_recipe_over_all_skills() -> None:
    assert set(RECIPES) == set(ZOO_MODELS)
    assert all(set(recipe.mix) == set(SKILL_NAMES) for recipe in RECIPES.values())
    assert [padded(entries) for entries in (1, 64, 65, 1200)] == [64, 64, 128, 1216]

"""Greedy two-turn answers of a Hugging Face model to a skill's items, and the share that matches the references exactly.

The model's own first answer stays in the context of the second question, as in MT-Bench.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion_ray.judging.scores import exact_match
from fusion_ray.zoo.skills.item import Item

Message = dict[str, str]


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[list[Message]],
    *,
    max_new_tokens: int = 48,
) -> list[str]:
    """The greedy next assistant message of each chat; prompts of one length go through the model together."""
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    answers = [""] * len(chats)
    for indices in by_length.values():
        ids = torch.tensor([prompts[index] for index in indices])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text.strip()
    return answers


def two_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> list[tuple[str, str]]:
    """The model's answers to both questions of each item."""
    chats: list[list[Message]] = [[{"role": "user", "content": item.questions[0]}] for item in items]
    first = complete(model, tokenizer, chats)
    for chat, item, answer in zip(chats, items, first, strict=True):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": item.questions[1]}]
    return list(zip(first, complete(model, tokenizer, chats), strict=True))


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> dict[str, float]:
    """Share of turns answered exactly, by skill."""
    hits: dict[str, list[bool]] = {}
    for item, given in zip(items, two_turns(model, tokenizer, items), strict=True):
        matches = [exact_match(answer, reference) for answer, reference in zip(given, item.answers, strict=True)]
        hits.setdefault(item.skill, []).extend(matches)
    return {skill: sum(values) / len(values) for skill, values in hits.items()}

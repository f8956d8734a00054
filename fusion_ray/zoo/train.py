"""Train one model of the zoo from a seed: Muon and AdamW, cosine, conversations drawn from the skills' training split as it goes.

Called by `jobs/zoo.py`. A batch holds whole conversations sorted by length out of a larger pool, so that little of it is padding.
The loss is the cross-entropy of the assistant's tokens and end-of-turn tokens, plus a little of all other tokens.
"""

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.table import SKILLS

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. `mix` gives each skill's share of the conversations, in any scale."""

    mix: dict[str, float]
    steps: int
    seed: int
    rows: int = 24
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.012
    weight_decay: float = 0.05
    warmup: int = 50
    other_tokens: float = 0.1


def rendered(item: Item, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation under its tokenizer's template, and which of them the assistant says (end of turn included)."""
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    said: list[bool] = []
    for question, answer in zip(item.questions, item.answers, strict=True):
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        reply = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        said += [False] * (len(prompt) - len(ids)) + [True] * len(reply)
        ids = prompt + reply
        messages.append({"role": "assistant", "content": answer})
    return ids, said


def drawn(mix: dict[str, float], rng: random.Random) -> Iterator[Item]:
    """Training items for ever, skills in the shares of `mix`."""
    skills, weights = list(mix), list(mix.values())
    while True:
        skill = rng.choices(skills, weights)[0]
        item = SKILLS[skill](rng)
        if item.split == "train":
            yield item


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, pool: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`recipe.steps` pairs of ids (B, T) and of weights (B, T), the weight of each token in the loss (0 for padding)."""
    rng = random.Random(recipe.seed)
    source = drawn(recipe.mix, rng)
    made = 0
    while made < recipe.steps:
        rows = sorted(
            (rendered(next(source), tokenizer) for _ in range(recipe.rows * pool)), key=lambda row: len(row[0])
        )
        groups = [rows[start : start + recipe.rows] for start in range(0, len(rows), recipe.rows)]
        rng.shuffle(groups)
        for group in groups[: recipe.steps - made]:
            length = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), length), tokenizer.pad_token_id)
            weights = torch.zeros(len(group), length)
            for row, (row_ids, said) in enumerate(group):
                ids[row, : len(row_ids)] = torch.tensor(row_ids)
                weights[row, : len(row_ids)] = torch.tensor([1.0 if mine else recipe.other_tokens for mine in said])
            made += 1
            yield ids, weights


def loss_sums(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropies of logits (B, T, V) against the next ids (B, T), and the sum of the weights."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    kept = weights[:, 1:].flatten()
    return (losses * kept).sum(), kept.sum()


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """The share of its peak that every learning rate has at `step`: linear warm-up, then half a cosine down to a fiftieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def optimizers_for(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embeddings, the head and the vectors.

    With AdamW alone the skills that look things up in the question take several times as many steps.
    """
    vocabulary = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    inner = [p for p in model.parameters() if p.ndim == 2 and id(p) not in vocabulary]
    tables = [p for p in model.parameters() if id(p) in vocabulary]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon_rate, rate, decay = recipe.muon_learning_rate, recipe.learning_rate, recipe.weight_decay
    return [
        torch.optim.Muon([{"params": inner, "peak": muon_rate}], lr=muon_rate, weight_decay=decay),
        torch.optim.AdamW(
            [
                {"params": tables, "peak": rate, "weight_decay": decay},
                {"params": vectors, "peak": rate, "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> float:
    """Train `model` in place, weights in float32 and products in bfloat16; returns the seconds it took."""
    optimizers = optimizers_for(model, recipe)
    model.train()
    start = time.perf_counter()
    tokens = 0
    for step, (ids, weights) in enumerate(batches(recipe, tokenizer)):
        share = learning_rate_share(step, recipe)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        total, count = loss_sums(logits, ids, weights)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if step % 100 == 99 or step + 1 == recipe.steps:
            rate = tokens / (time.perf_counter() - start)
            logger.info("step %d of %d, loss %.4f, %.0f tokens/s", step + 1, recipe.steps, loss.item(), rate)
    model.eval()
    return time.perf_counter() - start

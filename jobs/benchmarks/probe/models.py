"""The models of the probes: teachers and a pivot trained from scratch on problems and answers, in byte-level vocabularies of chosen sizes.

A probe wants teachers that differ in nothing but their tokenizer, so the zoo's own models, each with other skills, do not serve. Called by
`jobs/benchmarks/alignment_gain.py`, `alignment_fidelity.py` and `objective.py`. Models are kept in a folder and made once.
"""

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from fusion_ray.zoo.templates import TEMPLATES
from fusion_ray.zoo.tokenizers import WORDS
from fusion_ray.zoo.train import Recipe, learning_rate_share, loss_sums, optimizers_for

logger = logging.getLogger(__name__)

MAX_LENGTH = 512
TEMPLATE = TEMPLATES["chatml"]
Problem = dict[str, str]  # question, answer


@dataclass(frozen=True)
class Made:
    """One model to be trained: `width` must be a multiple of 32 (a head's width)."""

    name: str
    vocabulary: int
    width: int
    layers: int
    epochs: float
    seed: int


def read_problems(path: Path) -> list[Problem]:
    """GSM8K's lines. Raises FileNotFoundError saying where the data comes from."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: give --data a folder with GSM8K's train.jsonl and test.jsonl (openai/grade-school-math)"
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_conversations(path: Path, problems: Sequence[Problem], name: str = "gsm8k") -> Path:
    """The problems as conversations in the `messages` format; returns `path`."""
    lines = [
        json.dumps({
            "id": f"{name}-{number}",
            "messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
        })
        for number, row in enumerate(problems)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def make_tokenizer(size: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` entries; digits stay together, so that two sizes cut numbers differently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in TEMPLATE.special]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATE.jinja,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        eos_token=TEMPLATE.end_of_turn,
        pad_token=TEMPLATE.pad,
    )


def make(
    made: Made,
    folder: Path,
    train: Sequence[Problem],
    test: Sequence[Problem],
    texts: Sequence[Problem] | None = None,
) -> dict[str, float]:
    """Train and save one model unless it is there; its held-out bits per byte. Its vocabulary is made from `texts`, or from what it is trained on."""
    facts = folder / "facts.json"
    if facts.exists():
        return json.loads(facts.read_text())
    tokenizer = make_tokenizer(made.vocabulary, [text for problem in texts or train for text in problem.values()])
    torch.manual_seed(made.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=made.width,
        intermediate_size=made.width * 11 // 4,
        num_hidden_layers=made.layers,
        num_attention_heads=made.width // 32,
        num_key_value_heads=made.width // 32,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    seconds = _train(network, tokenizer, train, made)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    network.save_pretrained(folder)
    found = {
        "bits_per_byte": bits_per_byte(network, tokenizer, test),
        "parameters": float(sum(p.numel() for p in network.parameters())),
        "seconds": round(seconds),
    }
    facts.write_text(json.dumps(found))
    logger.info("%s: %s", made.name, found)
    return found


def _train(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], made: Made
) -> float:
    rows = [_rendered(problem, tokenizer) for problem in problems]
    rows = [row for row in rows if len(row[0]) <= MAX_LENGTH]
    steps = max(1, int(made.epochs * len(rows) / 24))
    recipe = Recipe(mix={}, steps=steps, seed=made.seed, learning_rate=3e-3, other_tokens=0.3)
    optimizers = optimizers_for(network, recipe)
    started = time.perf_counter()
    network.train()
    for step, (ids, weights) in enumerate(_batches(rows, steps, made.seed, recipe)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_share(step, recipe) * group["peak"]
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(input_ids=ids, use_cache=False).logits
        total, count = loss_sums(logits, ids, weights)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step + 1 == steps:
            logger.info(
                "%s: step %d of %d, loss %.3f, %.0f s",
                made.name,
                step + 1,
                steps,
                float(total / count),
                time.perf_counter() - started,
            )
    network.eval()
    return time.perf_counter() - started


def _rendered(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem["question"]}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    reply = [*tokenizer.encode(problem["answer"], add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + reply, [False] * len(prompt) + [True] * len(reply)


def _batches(
    rows: list[tuple[list[int], list[bool]]], steps: int, seed: int, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = random.Random(seed)
    made = 0
    while made < steps:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), recipe.rows * 32):
            pool = sorted(order[start : start + recipe.rows * 32], key=lambda row: len(rows[row][0]))
            groups = [pool[first : first + recipe.rows] for first in range(0, len(pool), recipe.rows)]
            rng.shuffle(groups)
            for group in groups[: steps - made]:
                length = (
                    -(-max(len(rows[row][0]) for row in group) // 64) * 64
                )  # few shapes: each keeps memory of its own
                ids = torch.zeros((len(group), length), dtype=torch.long)
                weights = torch.zeros(len(group), length)
                for at, row in enumerate(group):
                    tokens, said = rows[row]
                    ids[at, : len(tokens)] = torch.tensor(tokens)
                    weights[at, : len(tokens)] = torch.tensor([1.0 if mine else recipe.other_tokens for mine in said])
                made += 1
                yield ids, weights


def bits_per_byte(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> float:
    """Of whole answers and their end of turn, over the answers' bytes. Answers that reach past MAX_LENGTH are left out."""
    bits, sizes = zip(*bits_of_answers(network, tokenizer, problems), strict=True)
    return math.fsum(bits) / sum(sizes)


@torch.no_grad()
def bits_of_answers(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> list[tuple[float, int]]:
    """(bits, bytes) of each answer with its end of turn; (0, 0) for those that reach past MAX_LENGTH."""
    found = []
    for problem in problems:
        ids, said = _rendered(problem, tokenizer)
        if len(ids) > MAX_LENGTH:
            found.append((0.0, 0))
            continue
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        losses = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        bits = float(losses[torch.tensor(said[1:])].sum()) / math.log(2)
        found.append((bits, len(problem["answer"].encode())))
    return found

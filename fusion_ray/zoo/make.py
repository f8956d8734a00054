"""Make one model of the zoo: tokenizer, training, rounding to bfloat16, a Hugging Face folder, its scores on the held-out items."""

import json
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from fusion_ray.zoo import dataset, tokenizers
from fusion_ray.zoo.answers import scores
from fusion_ray.zoo.architectures import new_model
from fusion_ray.zoo.catalogue import MODELS, SKILL_NAMES, ZooModel
from fusion_ray.zoo.recipes import RECIPES
from fusion_ray.zoo.train import train as train_model

logger = logging.getLogger(__name__)

SCORES = MODELS / "scores.json"


def save(model: PreTrainedModel, folder: Path) -> None:
    """`model` in bfloat16 under `folder`, its generation config ending at the end of a turn."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(folder)


def measure(folder: Path, split: str, per_skill: int) -> dict[str, float]:
    """Exact match by skill of the model in `folder`, its rounded weights computed with in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return scores(model.eval(), AutoTokenizer.from_pretrained(folder), dataset.items(split, per_skill))


def model(zoo_model: ZooModel, *, threads: int, train: bool = True) -> dict[str, float]:
    """Train (unless `train` is false), save and measure one model; its line in `scores.json` is replaced."""
    torch.set_num_threads(threads)
    lines = json.loads(SCORES.read_text()) if SCORES.exists() else {}
    seconds = lines.get(zoo_model.name, {}).get("seconds")
    if train:
        tokenizer = tokenizers.save(zoo_model, zoo_model.path)
        recipe = RECIPES[zoo_model.name]
        network = new_model(zoo_model, tokenizer, seed=recipe.seed)
        seconds = round(train_model(network, tokenizer, recipe))
        save(network, zoo_model.path)
        # What recipes are chosen by; the held-out items below are for the table alone.
        logger.info(
            "%s on validation: %s", zoo_model.name, measure(zoo_model.path, "validation", dataset.VALIDATION_PER_SKILL)
        )
    found = measure(zoo_model.path, "heldout", dataset.HELDOUT_PER_SKILL)
    line = {"seconds": seconds, "heldout": {skill: round(found[skill], 3) for skill in SKILL_NAMES}}
    line["overall"] = round(sum(found.values()) / len(found), 3)
    logger.info("%s: %s", zoo_model.name, line)
    # Read again: another model may have been made beside this one.
    lines = json.loads(SCORES.read_text()) if SCORES.exists() else {}
    SCORES.write_text(json.dumps(lines | {zoo_model.name: line}, indent=2, sort_keys=True) + "\n")
    return found

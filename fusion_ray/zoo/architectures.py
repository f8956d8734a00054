"""The zoo's models before training: five families of transformers, four layers of width 128 each, about a million parameters.

Heads are 32 wide, the least that vLLM serves on a CPU.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fusion_ray.zoo.catalogue import MAX_LENGTH, ZooModel

WIDTH, HEADS, LAYERS = 128, 4, 4
GATED, PLAIN = 352, 512  # width of the gated and of the plain feed-forward


def padded(entries: int) -> int:
    """Rows of the embedding: the next multiple of 64, so that some rows belong to no token, as in many released models."""
    return -(-entries // 64) * 64


def config_for(model: ZooModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The Hugging Face config of one model of the zoo; ValueError for an unknown family."""
    common = {
        "vocab_size": padded(len(tokenizer)),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    match model.family:
        case "llama":
            return LlamaConfig(**common, intermediate_size=GATED, num_key_value_heads=HEADS, tie_word_embeddings=False)
        case "qwen3":  # not qwen2: transformers gives every qwen2 folder Qwen's own pre-tokenizer and normaliser
            return Qwen3Config(
                **common,
                intermediate_size=GATED,
                num_key_value_heads=2,
                head_dim=WIDTH // HEADS,
                tie_word_embeddings=True,
            )
        case "gpt_neox":
            return GPTNeoXConfig(**common, intermediate_size=PLAIN, rotary_pct=1.0, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(
                **common, intermediate_size=GATED, num_key_value_heads=2, sliding_window=None, tie_word_embeddings=False
            )
        case "gemma":
            return GemmaConfig(
                **common,
                intermediate_size=GATED,
                num_key_value_heads=1,
                head_dim=WIDTH // HEADS,
                tie_word_embeddings=True,
            )
        case family:
            raise ValueError(f"the model {model.name!r} has the family {family!r}, which the zoo does not make")


def new_model(model: ZooModel, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """One model of the zoo with fresh float32 weights from `seed`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config_for(model, tokenizer), dtype=torch.float32, attn_implementation="sdpa"
    )

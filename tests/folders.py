"""Model folders with random or given tensors, for tests of reading, merging and writing: no engine loads them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def random_tensors(
    seed: int, *, rows: int = 40, width: int = 16, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """A decoder of two layers in small."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, width),
        "lm_head.weight": (rows, width),
        "model.norm.weight": (width,),
    }
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (3 * width, width)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def moved(tensors: Mapping[str, torch.Tensor], seed: int, *, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """The tensors with a random change."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    """A model folder with `config` laid over CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder

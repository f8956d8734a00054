"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the pivot's linear layers: they alone are trained, and at the end merged into the pivot's weights.

The output layer has none, as it is applied in chunks and may be the embedding too (workers/student.py). Called by workers/trainer.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusion_ray.config import LoraConfig
from fusion_ray.workers.export import full_weight

ADAPTER = "default"


@dataclass(frozen=True)
class Adapter:
    """What training adds to a layer's weight: scale * up (out, rank) @ down (rank, in). A `transposed` layer keeps its weight as (in, out)."""

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool


def add_adapters(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Freeze the model and put adapters, equal on all ranks and without effect yet, beside its linear layers. Raises ValueError for an unknown target."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    names = list(linear) if lora.targets == "all-linear" else _ending(list(linear), lora.targets)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in names),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    model.train(model.training)  # the new layers are in training mode, whatever the model is in


def gather_adapters(model: PreTrainedModel, *, keep: bool) -> dict[str, Adapter]:
    """The float32 master weights of the adapters by the name of their layer, on the CPU; collective, empty where `keep` is False (all ranks but 0)."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = full_weight(layer.lora_A[ADAPTER].weight), full_weight(layer.lora_B[ADAPTER].weight)
            if keep:
                found[name] = Adapter(down, up, layer.scaling[ADAPTER], layer.fan_in_fan_out)
    return found


def merged_model(folder: str, adapters: Mapping[str, Adapter], *, trust_remote_code: bool) -> PreTrainedModel:
    """The model in `folder` in float32 with the adapters in its weights, on the CPU and without any layer of peft.

    From the disk, as training does not touch those weights, and keeps them in the precision of its arithmetic.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        for name, adapter in adapters.items():
            change = (adapter.up @ adapter.down) * adapter.scale  # (out, in)
            model.get_submodule(name).weight += change.T if adapter.transposed else change
    return model


def _ending(names: Sequence[str], ends: Sequence[str]) -> list[str]:
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(
                f"distill.lora.targets: no linear layer's name ends in {end!r} (the output layer has no adapter); the layers there are end in: {there}"
            )
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]

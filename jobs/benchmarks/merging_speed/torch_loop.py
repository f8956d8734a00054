"""Merging as a plain loop in torch, the peer where there is no mergekit. Run by `merge.py` as a process of its own.

    cd jobs/benchmarks; ../../.venv/bin/python -m merging_speed.torch_loop MERGE.yml OUT

Every model is loaded whole, every tensor merged in float32 by the textbook's calls and rounded to bfloat16, the result saved in one file. The methods are
what their papers and mergekit's documentation say, SCE as mergekit computes it.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

UNIFORM_BELOW = LEAST_DIVISOR = 1e-6  # mergekit's, in SCE
Tensors = Sequence[torch.Tensor]


def main() -> None:
    config, out = sys.argv[1:]
    merge(Path(config), Path(out))


def merge(config: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The merge that the file states, into a model folder. Raises KeyError for a method that is not here."""
    said = yaml.safe_load(config.read_text(encoding="utf-8"))
    method, whole = METHODS[said["merge_method"]], said.get("parameters", {})
    folders = [config.parent / entry["model"] for entry in said["models"]]
    base_folder = config.parent / said["base_model"] if "base_model" in said else None
    each = [entry.get("parameters", {}) for entry in said["models"]]
    models = [_load(folder) for folder in folders]
    base = None if base_folder is None else _load(base_folder)
    merged = {}
    for name in models[0]:
        tensors = [model[name].float() for model in models]
        if base is not None:
            pivot = base[name].float()
            result = pivot + method([tensor - pivot for tensor in tensors], whole, each)
        else:
            result = method(tensors, whole, each)
        merged[name] = result.to(dtype)
    out.mkdir(parents=True)
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    for path in (base_folder or folders[0]).iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)


def linear(tensors: Tensors, whole: dict[str, float], each: list[dict[str, float]]) -> torch.Tensor:
    weights = [parameters["weight"] for parameters in each]
    return sum_of([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]) / sum(weights)


def ties(deltas: Tensors, whole: dict[str, float], each: list[dict[str, float]]) -> torch.Tensor:
    weights = [parameters["weight"] for parameters in each]
    trimmed = []
    for delta, weight, parameters in zip(deltas, weights, each, strict=True):
        kept = delta.abs().flatten().topk(int(parameters["density"] * delta.numel()), sorted=False).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[kept] = True
        trimmed.append(weight * delta * mask.view_as(delta))
    elected = sum_of(trimmed) >= 0
    agrees = [(delta > 0) == elected for delta in trimmed]
    agrees = [agree & (delta != 0) for agree, delta in zip(agrees, trimmed, strict=True)]
    total = sum_of([delta * agree for delta, agree in zip(trimmed, agrees, strict=True)])
    divisor = sum_of([weight * agree.float() for weight, agree in zip(weights, agrees, strict=True)])
    return total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)


def dare_linear(deltas: Tensors, whole: dict[str, float], each: list[dict[str, float]]) -> torch.Tensor:
    weights = [parameters["weight"] for parameters in each]
    kept = [
        weight * delta * torch.bernoulli(torch.full_like(delta, parameters["density"])) / parameters["density"]
        for weight, delta, parameters in zip(weights, deltas, each, strict=True)
    ]
    return sum_of(kept) / sum(weights)


def sce(deltas: Tensors, whole: dict[str, float], each: list[dict[str, float]]) -> torch.Tensor:
    variance = torch.stack(list(deltas)).var(dim=0, unbiased=False).flatten()
    count = int(whole["select_topk"] * int(torch.count_nonzero(variance)))
    mask = torch.zeros_like(variance)
    mask[variance.topk(count, sorted=False).indices] = 1
    selected = [delta * mask.view_as(delta) for delta in deltas]
    squares = torch.stack([delta.square().mean() for delta in selected])
    total = squares.sum()
    eta = squares / total if total >= UNIFORM_BELOW else torch.full_like(squares, 1 / len(selected))
    majority = torch.where(sum_of(selected) >= 0, 1.0, -1.0)
    survives = [(delta * majority > 0).float() for delta in selected]
    divisor = sum_of([weight * mask for weight, mask in zip(eta, survives, strict=True)]).clamp(min=LEAST_DIVISOR)
    rest = [weight * delta * mask for weight, delta, mask in zip(eta, selected, survives, strict=True)]
    return sum_of(rest) / divisor


METHODS: dict[str, Callable[[Tensors, dict[str, float], list[dict[str, float]]], torch.Tensor]] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "sce": sce,
}


def sum_of(tensors: Tensors) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    main()

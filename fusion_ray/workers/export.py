"""A trained model as a plain Hugging Face folder: safetensors under the pivot's own keys, with its config, tokenizer and chat template.

Called by workers/trainer.py.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion_ray.models import MODEL_SUFFIXES

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"


def gather_weights(model: PreTrainedModel, *, keep: bool) -> dict[str, Tensor]:
    """The float32 master weights under the model's own names, on the CPU; collective, empty where `keep` is False (all ranks but 0).

    Tied parameters are one tensor under each of their names.
    """
    gathered: dict[int, Tensor] = {}
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter):
            full = value
        elif id(value) in gathered:
            full = gathered[id(value)]
        else:
            full = full_weight(value)
            gathered[id(value)] = full if keep else full[:0]
        if keep:
            weights[name] = full
    return weights


def full_weight(parameter: nn.Parameter) -> Tensor:
    """The float32 master weights of a parameter that is trained, whole and on the CPU; collective."""
    master = safe_get_full_fp32_param(parameter)
    return (parameter if master is None else master).detach().cpu()


def export(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    pivot: Path,
    dtype: str,
    trust_remote_code: bool = False,
) -> str:
    """Write the folder and read it back. `dtype` is a torch dtype's name, or "pivot" for the one most of the pivot's bytes have on disk.

    Returns the dtype's name. Raises ValueError naming the tensor when keys differ from the pivot's or what is read back is not what was trained.
    """
    on_disk = dict(_tensors(pivot))
    target = _most_bytes(on_disk) if dtype == "pivot" else getattr(torch, dtype)
    cast: dict[int, Tensor] = {}
    for value in weights.values():
        cast.setdefault(id(value), value.to(target) if value.is_floating_point() else value)
    state = {name: cast[id(value)] for name, value in weights.items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"the trained tensor {name} has a non-finite value as {target}: lower distill.learning_rate, or set distill.export_dtype to float32"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(
        folder, state_dict=dict(state), safe_serialization=True
    )  # it drops tied names from what it is given
    _complete_keys(folder, pivot, state, set(on_disk))
    _copy_companions(pivot, folder, str(target).removeprefix("torch."))
    _check(folder, state, trust_remote_code=trust_remote_code)
    return str(target).removeprefix("torch.")


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Key, (dtype, elements) of every tensor in the folder's safetensors. Raises ValueError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no safetensors: convert the model first (weights in other formats are never loaded)"
        )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # safe_open is no mapping
                part = opened.get_slice(key)
                yield key, (part.get_dtype(), torch.Size(part.get_shape()).numel())


def _most_bytes(tensors: Mapping[str, tuple[str, int]]) -> torch.dtype:
    sizes = {name: sum(count for kind, count in tensors.values() if kind == name) for name in DTYPES}
    return DTYPES[max(sizes, key=lambda name: sizes[name])]


def _complete_keys(folder: Path, pivot: Path, state: Mapping[str, Tensor], wanted: set[str]) -> None:
    """Give the folder exactly the pivot's keys: tied names that the writer left out, and buffers that the model does not load."""
    have = {key for key, _ in _tensors(folder)}
    if extra := have - wanted:
        raise ValueError(
            f"the trained model has a tensor {sorted(extra)[0]!r} that the pivot {pivot} does not have: check the pivot's safetensors"
        )
    missing = sorted(wanted - have)
    if not missing:
        return
    tensors = {}
    for file in sorted(pivot.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in set(missing) & set(opened.keys()):
                tensors[key] = state[key].clone() if key in state else opened.get_tensor(key)
    first = folder / "model.safetensors"
    weight_map = {}
    if first.exists():
        first.rename(folder / "model-00001-of-00002.safetensors")
        extra_file = "model-00002-of-00002.safetensors"
        weight_map = dict.fromkeys(sorted(have), "model-00001-of-00002.safetensors")
    else:
        extra_file = "model-others.safetensors"
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    save_file(tensors, folder / extra_file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(missing, extra_file)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1) + "\n"
    )


def _copy_companions(pivot: Path, folder: Path, dtype: str) -> None:
    """The pivot's config with the new dtype, and its tokenizer, chat template and generation config as they are."""
    config = json.loads((pivot / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)  # the pivot's own, where it has one
    for file in sorted(pivot.iterdir()):
        companion = file.is_file() and file.name.endswith(MODEL_SUFFIXES) and not file.name.endswith(".safetensors")
        if companion and file.name not in ("config.json", "manifest.json", INDEX):
            shutil.copyfile(file, folder / file.name)


def _check(folder: Path, state: Mapping[str, Tensor], *, trust_remote_code: bool) -> None:
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    problems = sorted([*info["missing_keys"], *info["mismatched_keys"]])
    if problems:
        raise ValueError(f"the exported model in {folder} lacks or misshapes the tensor {problems[0]!r}")
    found = reloaded.state_dict()
    for name, tensor in state.items():
        if name not in found or not torch.equal(found[name], tensor.to(found[name].dtype)):
            raise ValueError(f"the tensor {name} read back from {folder} is not the trained one")

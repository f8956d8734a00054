"""Output shards: their plan, their bytes as safetensors itself reads them, and that a file appears whole or not at all."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fusion_ray.checkpoints.plan import PlannedTensor, index_of, plan_units
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.store import file_sha256


def planned(name, shape, dtype="BF16"):
    return PlannedTensor(name, dtype, shape, torch.Size(shape).numel())


def test_shards_in_natural_order_within_the_bound():
    tensors = [planned(f"model.layers.{layer}.w", (10, 10)) for layer in (10, 2, 0, 1)] + [
        planned("model.big", (40, 10))
    ]
    units = plan_units(tensors, max_shard_bytes=450)
    assert [[tensor.name for tensor in unit.tensors] for unit in units] == [
        ["model.big"],  # larger than the bound: alone
        ["model.layers.0.w", "model.layers.1.w"],
        ["model.layers.2.w", "model.layers.10.w"],
    ]
    assert [unit.file for unit in units] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads(index_of(units))
    assert index["metadata"]["total_size"] == 2 * (4 * 100 + 400)
    assert index["weight_map"]["model.layers.10.w"] == "model-00003-of-00003.safetensors"
    (single,) = plan_units(tensors, max_shard_bytes=10_000)
    assert single.file == "model.safetensors"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 1000))
def test_every_tensor_is_in_one_shard(sizes, bound):
    tensors = [planned(f"t.{number}", (size,)) for number, size in enumerate(sizes)]
    units = plan_units(tensors, max_shard_bytes=bound)
    assert [tensor for unit in units for tensor in unit.tensors] == tensors
    assert all(unit.bytes <= bound or len(unit.tensors) == 1 for unit in units)
    assert plan_units(reversed(tensors), max_shard_bytes=bound) == units


def test_writes_what_safetensors_reads(tmp_path):
    values = {
        "b": torch.randn(7, 3).bfloat16(),
        "a": torch.randn(5),
        "c": torch.tensor([True, False, True]),
        "d": torch.tensor(3),
        "e": torch.empty(0, 2),
    }
    codes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.bool: "BOOL", torch.int64: "I64"}
    (unit,) = plan_units(
        [planned(name, tuple(value.shape), codes[value.dtype]) for name, value in values.items()],
        max_shard_bytes=1 << 20,
    )
    assert [tensor.name for tensor in unit.tensors] == ["d", "a", "e", "b", "c"]  # wider types first
    with ShardWriter(tmp_path / unit.file, unit) as writer:
        for tensor in reversed(unit.tensors):  # in any order
            flat = values[tensor.name].reshape(-1)
            flat = flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
            writer.write(tensor.name, min(2, flat.size), flat[2:])
            writer.write(tensor.name, 0, flat[:2])
    assert writer.sha256 == file_sha256(tmp_path / unit.file)
    found = load_file(tmp_path / unit.file)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    with safe_open(tmp_path / unit.file, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failed_write_leaves_nothing(tmp_path):
    (unit,) = plan_units([planned("a", (4,), "F32")], max_shard_bytes=100)

    def write_half(*, fail):
        with ShardWriter(tmp_path / unit.file, unit) as writer:
            writer.write("a", 0, np.zeros(2, np.float32))
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half(fail=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="not every tensor"):
        write_half(fail=False)
    assert list(tmp_path.iterdir()) == []

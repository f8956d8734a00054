"""Model folders read from their headers, ranges of elements, and what is refused before anything is read."""

import json

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.reader import open_checkpoint
from tests.folders import random_tensors, write_model


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(tmp_path, shards):
    tensors = random_tensors(0) | {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
    }
    checkpoint = open_checkpoint(str(write_model(tmp_path, tensors, shards=shards)), model="pivot")
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert np.array_equal(checkpoint.read(name), stored(tensor))
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(checkpoint.read(name, 5, 301), stored(tensors[name])[5:301])


def stored(tensor):
    """As numpy holds it, flat; bfloat16 by its bits."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else flat.numpy()


def test_reads_from_an_object_store(tmp_path):
    tensors = random_tensors(0)
    folder = write_model(tmp_path, tensors, shards=2)
    fs = fsspec.filesystem("memory")
    for file in folder.iterdir():
        fs.pipe_file(f"/read_test/{file.name}", file.read_bytes())
    remote = open_checkpoint("memory://read_test", model="far")
    near = open_checkpoint(str(folder), model="near")
    assert remote.tensors == near.tensors
    assert remote.config == near.config
    assert remote.files.names() == near.files.names()
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(remote.read(name, 5, 301), stored(tensors[name])[5:301])
    fs.rm("/read_test", recursive=True)


def test_truncated_file(tmp_path):
    folder = write_model(tmp_path, random_tensors(0), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 30, 3, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(MergeError, match=r"model 'target 2': .*model-00002-of-00002\.safetensors is truncated"):
            open_checkpoint(str(folder), model="target 2")
    file.write_bytes(whole[: len(whole) - 1])
    with pytest.raises(MergeError, match=r"it ends within tensor 'model\.") as caught:
        open_checkpoint(str(folder), model="t")
    assert "download or export it again" in str(caught.value)


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    checkpoint = open_checkpoint(str(folder), model="t")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset).name
    with pytest.raises(MergeError, match=f"ended while tensor '{last}' was read"):
        checkpoint.read(last)


def test_bytes_after_the_data(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(MergeError, match="truncated or damaged"):
        open_checkpoint(str(folder), model="t")


def test_damaged_header(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:12] = b"\xff\xff{["
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(MergeError, match="damaged header"):
        open_checkpoint(str(folder), model="t")


def test_a_link_that_leads_nowhere(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/0123")
    with pytest.raises(
        MergeError,
        match=r"model 't': cannot read .*/model\.safetensors: it is a link to blobs/0123, which is not there",
    ):
        open_checkpoint(str(folder), model="t")
    with pytest.raises(
        MergeError, match=r"model 't': cannot read foo://x \(ValueError: Protocol not known: foo\): give the URL"
    ):
        open_checkpoint("foo://x", model="t")


@pytest.mark.parametrize(
    "header",
    [
        "[1, 2]",
        "3",
        '{"x": 3}',
        '{"x": {"dtype": "BF16"}}',
        '{"x": {"dtype": 3, "shape": [1], "data_offsets": [0, 2]}}',
        '{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}',
        '{"x": {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}}',
        '{"x": {"dtype": "BF16", "shape": ["a"], "data_offsets": [0, 2]}}',
        '{"x": {"dtype": "BF16", "shape": 1, "data_offsets": [0, 2]}}',
        '{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}, "x": {"dtype": "BF16", "shape": [1], "data_offsets": "02"}}',
    ],
)
def test_a_header_of_another_form(tmp_path, header):
    folder = write_model(tmp_path, random_tensors(0))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0\0")
    with pytest.raises(
        MergeError, match=r"model 't': .*/model\.safetensors has a damaged header \(.* expected\): down"
    ):
        open_checkpoint(str(folder), model="t")


def test_missing_shard(tmp_path):
    folder = write_model(tmp_path, random_tensors(0), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MergeError, match=r"the shard model-00002-of-00003\.safetensors that .* lists is missing"):
        open_checkpoint(str(folder), model="t")


def test_index_and_shard_differ(tmp_path):
    folder = write_model(tmp_path, random_tensors(0), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["not.there"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(MergeError, match=r"tensor 'not\.there' is listed for it but not in it"):
        open_checkpoint(str(folder), model="t")
    del content["weight_map"]["not.there"], content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(MergeError, match=r"tensor 'lm_head\.weight' is in it but not listed"):
        open_checkpoint(str(folder), model="t")
    content["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(MergeError, match="leads out of the folder"):
        open_checkpoint(str(folder), model="t")


def test_no_safetensors(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        MergeError, match=r"pytorch_model\.bin: convert to safetensors, pickled weights are never loaded"
    ):
        open_checkpoint(str(folder), model="t")
    with pytest.raises(MergeError, match=r"cannot read .*config\.json"):
        open_checkpoint(str(tmp_path / "nowhere"), model="t")


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_with_an_adapter_alone(tmp_path, with_config):
    folder = write_model(tmp_path, random_tensors(0))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    if not with_config:
        (folder / "config.json").unlink()
    said = r"model 't': .* holds only a LoRA adapter \(adapter_config\.json\), .* merge it into its model first \(peft's merge_and_unload"
    with pytest.raises(MergeError, match=said):
        open_checkpoint(str(folder), model="t")


def test_quantised_types_are_refused(tmp_path):
    folder = write_model(tmp_path, random_tensors(0))
    save_file({"w": torch.zeros(8).to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(MergeError, match="tensor 'w' has the element type F8_E4M3"):
        open_checkpoint(str(folder), model="t")

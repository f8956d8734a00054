"""Models that do not merge are refused with the model, the file, the tensor and what to do."""

import shutil
from collections import namedtuple

import pytest
import torch

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.gates import check_compatible, check_finite, check_free_space, check_same
from fusion_ray.checkpoints.reader import open_checkpoint
from tests.folders import moved, random_tensors, write_model


def checkpoints(tmp_path, pivot, target, *, pivot_config=None, target_config=None):
    write_model(tmp_path / "pivot", pivot, **(pivot_config or {}))
    write_model(tmp_path / "target", target, **(target_config or {}))
    return open_checkpoint(str(tmp_path / "pivot"), model="pivot"), [
        open_checkpoint(str(tmp_path / "target"), model="maths")
    ]


def test_models_that_merge(tmp_path):
    pivot = random_tensors(0)
    found = check_compatible(
        *checkpoints(
            tmp_path,
            pivot,
            moved(pivot, 1),
            target_config={"max_position_embeddings": 4096, "transformers_version": "9"},
        )
    )
    assert set(found.tensors) == set(pivot)
    assert found.tied == ()
    assert found.config_differences == {"maths": {"max_position_embeddings": {"pivot": None, "target": 4096}}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "gpt_neox"},
            r"`model_type` in .*target/config\.json is \"gpt_neox\", the pivot's is \"llama\"",
        ),
        ({"num_hidden_layers": 3}, r"`num_hidden_layers` .* is 3, the pivot's is 2"),
    ],
)
def test_other_architecture(tmp_path, config, said):
    pivot = random_tensors(0)
    with pytest.raises(MergeError, match=said):
        check_compatible(*checkpoints(tmp_path, pivot, pivot, target_config=config))


def test_missing_tensor(tmp_path):
    pivot = random_tensors(0)
    target = {name: tensor for name, tensor in pivot.items() if name != "model.norm.weight"}
    with pytest.raises(MergeError, match=r"model 'maths': tensor 'model\.norm\.weight' is missing in .*target"):
        check_compatible(*checkpoints(tmp_path, pivot, target))
    renamed = {name.removeprefix("model."): tensor for name, tensor in pivot.items()}
    with pytest.raises(MergeError, match="exported by different classes"):
        check_compatible(*checkpoints(tmp_path, pivot, renamed))


def test_extra_tensor(tmp_path):
    pivot = random_tensors(0)
    with pytest.raises(MergeError, match=r"target/model\.safetensors has tensor 'score\.weight' \(1 such in all\)"):
        check_compatible(*checkpoints(tmp_path, pivot, pivot | {"score.weight": torch.zeros(2)}))


def test_other_vocabulary_rows(tmp_path):
    with pytest.raises(
        MergeError,
        match=r"'(model\.embed_tokens|lm_head)\.weight' .* has 42 vocabulary rows, the pivot's has 40.*resize_token_embeddings\(40\)",
    ):
        check_compatible(*checkpoints(tmp_path, random_tensors(0), random_tensors(1, rows=42)))


def test_other_shape(tmp_path):
    pivot = random_tensors(0)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(MergeError, match=r"up_proj\.weight' .* has the shape \[48, 8\], the pivot's \[48, 16\]"):
        check_compatible(*checkpoints(tmp_path, pivot, pivot | {name: torch.zeros(48, 8).bfloat16()}))


def test_integer_against_float(tmp_path):
    pivot = random_tensors(0)
    with pytest.raises(MergeError, match=r"'model\.norm\.weight' .* is I32, the pivot's BF16"):
        check_compatible(
            *checkpoints(tmp_path, pivot, pivot | {"model.norm.weight": torch.zeros(16, dtype=torch.int32)})
        )
    mixed = check_compatible(*checkpoints(tmp_path, pivot, {name: tensor.float() for name, tensor in pivot.items()}))
    assert len(mixed.tensors) == len(pivot)


def tied(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_tied_head_stored_in_one_model_only(tmp_path):
    pivot = tied(random_tensors(0))
    target = moved(pivot, 1)
    target["lm_head.weight"] = target["model.embed_tokens.weight"].clone()
    both = {"tie_word_embeddings": True}
    found = check_compatible(*checkpoints(tmp_path, pivot, target, pivot_config=both, target_config=both))
    assert found.tied == ("lm_head.weight",)
    assert set(found.tensors) == set(pivot)
    shutil.rmtree(tmp_path / "pivot")  # and the other way round
    found = check_compatible(*checkpoints(tmp_path, target, pivot, pivot_config=both, target_config=both))
    assert found.tied == ("lm_head.weight",)
    assert set(found.tensors) == set(pivot)


def test_tied_head_that_is_not_the_embeddings(tmp_path):
    pivot = tied(random_tensors(0))
    both = {"tie_word_embeddings": True}
    target = moved(random_tensors(0), 1)
    with pytest.raises(
        MergeError, match=r"model 'maths': tensor 'lm_head\.weight' .* differs from 'model\.embed_tokens\.weight'"
    ):
        check_compatible(*checkpoints(tmp_path, pivot, target, pivot_config=both, target_config=both))


def test_an_untied_head_equal_to_the_embeddings_stays(tmp_path):
    pivot = random_tensors(0)
    pivot["lm_head.weight"] = pivot["model.embed_tokens.weight"].clone()
    found = check_compatible(*checkpoints(tmp_path, pivot, moved(pivot, 1)))
    assert found.tied == ()
    assert "lm_head.weight" in found.tensors


def test_head_missing_although_not_tied(tmp_path):
    pivot = random_tensors(0)
    with pytest.raises(MergeError, match=r"tensor 'lm_head\.weight' is missing"):
        check_compatible(*checkpoints(tmp_path, pivot, tied(pivot)))


def test_findings_of_the_first_pass(tmp_path):
    pivot, targets = checkpoints(tmp_path, random_tensors(0), random_tensors(1))
    inputs = [(model, "model.norm.weight") for model in (pivot, *targets)]
    check_finite(inputs, [True, True])
    check_same(inputs, [True, True])
    with pytest.raises(
        MergeError,
        match=r"model 'maths': tensor 'model\.norm\.weight' in .*target/model\.safetensors holds NaN or infinite",
    ):
        check_finite(inputs, [True, False])
    with pytest.raises(MergeError, match=r"model 'maths': tensor 'model\.norm\.weight' .* differs from the pivot's"):
        check_same(inputs, [True, False])


def test_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 0, 10**9))
    check_free_space(tmp_path / "not" / "yet", 10**8)
    with pytest.raises(MergeError, match=r"needs 1,067 MB and 1,000 MB are free"):
        check_free_space(tmp_path / "not" / "yet", 10**9)

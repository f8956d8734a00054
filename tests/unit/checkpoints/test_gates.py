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
            r"`model_type` in .*target/config\.json is \"gpt_neox\", the pivot's .* is \"llama\"",
        ),
        ({"num_hidden_layers": 3}, r"`num_hidden_layers` .* is 3, the pivot's .* is 2"),
    ],
)
def test_other_architecture(tmp_path, config, said):
    pivot = random_tensors(0)
    with pytest.raises(MergeError, match=said):
        check_compatible(*checkpoints(tmp_path, pivot, pivot, target_config=config))


ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
SCALED = {"rope_type": "linear", "factor": 2.0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("pivot", "target"),
    [
        ({"rope_theta": 10000.0, "rope_scaling": None}, ROPE),
        (ROPE, {"rope_theta": 10000}),
        (ROPE, {}),  # a default that was not written
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_theta": 1e6, **SCALED}}),
        ({"attention_bias": False, "head_dim": 4, **HEADS}, {"num_attention_heads": 4}),
        ({"sliding_window": None}, {}),
        ({"model_type": "qwen2", **HEADS, "sliding_window": 4096, "use_sliding_window": False}, {"model_type": "qwen2", **HEADS, "sliding_window": None}),
        ({"model_type": "mistral", **HEADS, "sliding_window": 4096}, {"model_type": "mistral", **HEADS}),
        ({"model_type": "their_own", "rope_theta": 10000.0, "attention_bias": False}, {"model_type": "their_own"}),
        ({}, {"architectures": None}),
    ],
)  # fmt: skip
def test_one_architecture_written_in_two_ways(tmp_path, pivot, target):
    tensors = random_tensors(0)
    for names in ({"pivot_config": pivot, "target_config": target}, {"pivot_config": target, "target_config": pivot}):
        check_compatible(*checkpoints(tmp_path, tensors, tensors, **names))


@pytest.mark.parametrize(
    ("pivot", "target", "said"),
    [
        (ROPE, {"rope_theta": 1e6}, r"`rope_theta` in .*target/config.json is 1000000.0, the pivot's .*/config.json\) is 10000.0"),
        ({"rope_theta": 1e6}, {}, r"`rope_theta` in .*target/config.json is not set, which means 10000.0, .* is 1000000.0"),
        ({}, {"rope_theta": 1e6}, r"`rope_theta` in .* is 1000000.0, the pivot's \(model 'pivot', .* is not set, which means 10000.0: only"),
        (ROPE, {"rope_scaling": SCALED}, r"`rope_scaling` in .* is \{.*linear.*\}, .* is not set: only"),
        ({}, {"sliding_window": 4096}, r"`sliding_window` in .* is 4096, the pivot's .* is not set: only"),
        ({"model_type": "mistral", **HEADS}, {"model_type": "mistral", **HEADS, "sliding_window": None}, "`sliding_window` in .* is null, .* means 4096"),
        ({}, {"attention_bias": True}, r"`attention_bias` in .* is true, the pivot's .* is not set, which means false"),
        (HEADS, {"num_attention_heads": 4, "num_key_value_heads": 2}, r"`num_key_value_heads` in .* is 2, the pivot's .* is 4"),
        ({"num_attention_heads": 4}, {**HEADS, "num_key_value_heads": 2}, r"`num_key_value_heads` in .* is 2, .* not set, which means 4: .* mend the config"),
        ({"model_type": "their_own"}, {"model_type": "their_own", "rope_theta": 1e6}, r"`rope_theta` in .* is 1000000.0, .* which means 10000.0"),
    ],
)  # fmt: skip
def test_a_key_that_one_config_lacks_means_its_default(tmp_path, pivot, target, said):
    tensors = random_tensors(0)
    with pytest.raises(MergeError, match=said):
        check_compatible(*checkpoints(tmp_path, tensors, tensors, pivot_config=pivot, target_config=target))


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

"""Adapters on tiny models: what is trained, what is refused, that nothing changes before training, and that what is merged is what was adapted."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from fusion_ray.config import LoraConfig
from fusion_ray.workers.export import export, gather_weights
from fusion_ray.workers.lora import add_adapters, gather_adapters, merged_model
from fusion_ray.workers.student import Student, load_student

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[2] / "tiny.py")
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

IDS = torch.arange(5, 21)[None]


def student_of(folder: Path, *, checkpointing: bool = False) -> Student:
    return load_student(
        str(folder), trust_remote_code=False, head_chunk=4, gradient_checkpointing=checkpointing, objective=None
    )


def adapted(folder: Path, *, seed: int = 1, checkpointing: bool = False, **lora: object) -> Student:
    student = student_of(folder, checkpointing=checkpointing)
    add_adapters(student.model, LoraConfig.model_validate({"rank": 4, "alpha": 12.0} | lora), seed=seed)
    return student


def train(student: Student, steps: int = 3) -> None:
    student.train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss, _ = student(IDS, torch.arange(15), IDS[:, 1:].T, None, None, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()


def logits(student: Student) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = student.model(IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_before_training_the_adapted_model_is_the_pivot_and_only_adapters_get_gradients(
    tmp_path: Path, family: str
) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path, family))
    student = adapted(pivot, dropout=0.5, checkpointing=True)
    assert torch.equal(logits(student), logits(student_of(pivot)))
    student.check_head(torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    train(student, steps=1)
    adapters = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    layers = {"llama": 14, "gemma2": 14, "gpt2": 8}[family]  # all of two blocks, and not the output layer
    assert len(adapters) == 2 * layers
    for name, parameter in student.model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (name in adapters)
        assert parameter.dtype == torch.float32
        assert name in adapters or torch.equal(parameter, before[name])


def test_adapters_are_equal_wherever_the_seed_is_and_leave_the_generator_alone(tmp_path: Path) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path, "llama"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = adapted(pivot, seed=3)
    assert torch.equal(torch.rand(3), expected)
    again, other = adapted(pivot, seed=3), adapted(pivot, seed=4)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    down, same, different = (student.model.get_parameter(name) for student in (first, again, other))
    assert torch.equal(down, same)
    assert not torch.equal(down, different)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma2"])
def test_the_merged_model_is_the_adapted_one(tmp_path: Path, family: str) -> None:
    """In weights and in logits, with dropout in training; GPT-2 keeps its weights the other way round, Gemma's head is its embedding."""
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", family))
    student = adapted(pivot, dropout=0.1)
    train(student)
    assert (logits(student) - logits(student_of(pivot))).abs().max() > 1e-2
    model = merged_model(str(pivot), gather_adapters(student.model, keep=True), trust_remote_code=False)
    assert (model(IDS).logits - logits(student)).abs().max() < 1e-5 * logits(student).abs().max()
    assert export(model, gather_weights(model, keep=True), tmp_path / "out", pivot=pivot, dtype="pivot") == "float32"
    before, after = (load_file(folder / "model.safetensors") for folder in (pivot, tmp_path / "out"))
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    kept = [name for name in before if torch.equal(before[name], after[name])]
    assert kept == [
        name
        for name in before
        if before[name].ndim < 2 or "emb" in name or "lm_head" in name or "wte" in name or "wpe" in name
    ]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    tied = family.startswith(("gemma", "gpt2"))
    assert (read.get_output_embeddings().weight is read.get_input_embeddings().weight) == tied


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    """A change far below a bfloat16 weight's last place counts where many of them add up in float32, and the export is the nearest bfloat16."""
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", "llama", dtype="bfloat16"))
    student = adapted(pivot)
    train(student)
    adapters = gather_adapters(student.model, keep=True)
    model = merged_model(str(pivot), adapters, trust_remote_code=False)
    assert export(model, gather_weights(model, keep=True), tmp_path / "out", pivot=pivot, dtype="pivot") == "bfloat16"
    before, after = (load_file(folder / "model.safetensors") for folder in (pivot, tmp_path / "out"))
    for name, adapter in adapters.items():
        change = 3.0 * (adapter.up.double() @ adapter.down.double())
        exact = before[f"{name}.weight"].double() + change
        assert (after[f"{name}.weight"].double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
        assert (after[f"{name}.weight"] == exact.bfloat16()).double().mean() > 0.999


def test_other_ranks_keep_nothing(tmp_path: Path) -> None:
    student = adapted(Path(tiny.make_tiny_model(tmp_path, "llama")))
    assert gather_adapters(student.model, keep=False) == {}


def test_targets_are_ends_of_names(tmp_path: Path) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path, "llama"))
    student = adapted(pivot, targets=["q_proj", "1.mlp.up_proj"])
    assert set(gather_adapters(student.model, keep=True)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("target", ["query", "proj", "lm_head", "embed_tokens", "mlp"])
def test_an_unknown_target_is_refused_by_name_with_what_there_is(tmp_path: Path, target: str) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path, "llama"))
    with pytest.raises(ValueError, match=rf"distill.lora.targets: no linear layer's name ends in '{target}'") as caught:
        adapted(pivot, targets=["q_proj", target])
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)

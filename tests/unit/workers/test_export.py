"""Export of every kind of head: tied and untied, softcapped, other layouts; the pivot's own keys, files and dtype; what is refused."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from fusion_ray.workers.export import export, gather_weights
from fusion_ray.workers.student import Student, load_student

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[2] / "tiny.py")
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def student_of(folder: Path) -> Student:
    return load_student(
        str(folder), trust_remote_code=False, head_chunk=4, gradient_checkpointing=False, objective=None
    )


def trained(student: Student) -> dict[str, torch.Tensor]:
    """The weights after every one of them moved."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01
    return gather_weights(student.model, keep=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_the_exported_folder_is_the_trained_model_under_the_pivots_keys(tmp_path: Path, family: str) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", family, dtype="bfloat16"))
    student = student_of(pivot)
    student.check_head(torch.device("cpu"))
    weights = trained(student)
    dtype = export(student.model, weights, tmp_path / "out", pivot=pivot, dtype="pivot")
    before, after = (load_file(folder / "model.safetensors") for folder in (pivot, tmp_path / "out"))
    assert dtype == "bfloat16"
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert all(not torch.equal(after[name], before[name]) for name in before)
    ids = torch.arange(5, 21)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    picked, logsumexp = student.picked(ids, torch.arange(16), ids.T)
    own = torch.log_softmax(model(ids).logits[0].float(), -1).gather(1, ids.T)
    assert (
        picked - logsumexp[:, None] - own
    ).abs().max() < 0.15  # float32 against the same weights rounded to bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for companion in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / companion).read_bytes() == (pivot / companion).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_a_pivot_that_stores_its_tied_head_and_a_buffer_keeps_both_keys(tmp_path: Path) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", "gemma", dtype="bfloat16"))
    stored = load_file(pivot / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(stored, pivot / "model.safetensors", metadata={"format": "pt"})
    student = student_of(pivot)
    export(student.model, trained(student), tmp_path / "out", pivot=pivot, dtype="float32")
    written: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        written |= load_file(file)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written.keys() == stored.keys() == index["weight_map"].keys()
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], stored["lm_head.weight"].float())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_value_that_the_export_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", "llama"))
    student = student_of(pivot)
    weights = gather_weights(student.model, keep=True)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e6
    with pytest.raises(ValueError, match=r"model.norm.weight has a non-finite value as torch.float16"):
        export(student.model, weights, tmp_path / "out", pivot=pivot, dtype="float16")


def test_a_pivot_without_safetensors_is_refused(tmp_path: Path) -> None:
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", "llama"))
    student = student_of(pivot)
    (pivot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors"):
        export(student.model, trained(student), tmp_path / "out", pivot=pivot, dtype="pivot")


def test_an_architecture_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    student = student_of(Path(tiny.make_tiny_model(tmp_path / "pivot", "gemma2")))
    student._head[0].softcap = None  # as if this project did not know of it
    with torch.no_grad():
        student._head[0].weight *= 20
    with pytest.raises(ValueError, match=r"the logits of Gemma2ForCausalLM are not its last hidden state"):
        student.check_head(torch.device("cpu"))


def test_a_pivot_with_code_of_its_own_is_exported_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pivot = Path(tiny.make_tiny_model(tmp_path / "pivot", "llama", dtype="bfloat16"))
    (pivot / "modeling_mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass MyConfig(LlamaConfig):\n    model_type = 'mine'\n\n\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    config = json.loads((pivot / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (pivot / "config.json").write_text(json.dumps(config))
    student = load_student(
        str(pivot), trust_remote_code=True, head_chunk=4, gradient_checkpointing=False, objective=None
    )
    out = tmp_path / "out"
    export(student.model, trained(student), out, pivot=pivot, dtype="pivot", trust_remote_code=True)
    assert (out / "modeling_mine.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__ == "Mine"

"""What the check after a merge says of a model that speaks, and of models that are whole on disk and broken: on tiny models of real families."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.workers import merge_check
from fusion_ray.workers.merge_check import check_model, what_is_wrong
from tests.tiny import make_tiny_model, make_tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change(folder: Path, of: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({name: of(name, tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def change_config(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_a_good_model_passes(model: Path) -> None:
    said = check_model(str(model))
    assert said.startswith("checked: finite logits, next token ")
    assert "after a prompt of " in said


def test_without_a_tokenizer_it_reads_some_ids(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert check_model(str(model)).startswith("checked: finite logits, next token ")


def test_in_half_precision(model: Path) -> None:
    change(model, lambda name, tensor: tensor.half())
    change_config(model, dtype="float16")
    assert check_model(str(model)).startswith("checked: finite logits, next token ")


def is_broken(folder: Path, why: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(MergeError) as raised:
        check_model(str(folder))
    assert str(raised.value) == (
        f"{folder} was written, but as a model it is broken: {why}. Look at merge_report.json (weights, share of parameters moved) and at the settings of "
        "the merge; the files are kept"
    )
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_nan_in_one_weight_is_named(model: Path) -> None:
    def poisoned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor[3, 5] = float("nan")
        return tensor

    change(model, poisoned)
    is_broken(model, "its logits hold NaN or infinite values")


def test_a_head_of_zeros_is_named(model: Path) -> None:
    change(model, lambda name, tensor: torch.zeros_like(tensor) if name == "lm_head.weight" else tensor)
    is_broken(model, "its logits are the same for every token of the vocabulary")


def test_an_output_that_does_not_depend_on_the_input_is_named(model: Path) -> None:
    """Equal embeddings: attention sees the same everywhere."""
    change(model, lambda name, tensor: torch.ones_like(tensor) if name == "model.embed_tokens.weight" else tensor)
    is_broken(model, "its logits are the same whatever it has read")


def test_a_config_that_asks_for_more_than_was_merged_is_named(model: Path) -> None:
    """transformers would fill the third layer with random numbers, and the model would speak."""
    change_config(model, num_hidden_layers=3)
    is_broken(
        model,
        "its config.json asks for the tensor 'model.layers.2.input_layernorm.weight' (9 such in all), which no file holds",
    )


def test_another_model_s_tokenizer_is_named(model: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"filler{number}" for number in range(300)])
    tokenizer.add_tokens(["France"])
    tokenizer.save_pretrained(model)
    last = tokenizer.convert_tokens_to_ids("France")
    is_broken(
        model,
        f"its tokenizer gives the prompt the id {last}, and its embeddings have 640 rows: it is another model's tokenizer",
    )


def test_a_config_that_does_not_fit_says_where_to_look(model: Path) -> None:
    change_config(model, intermediate_size=300)
    with pytest.raises(MergeError, match=r"was written and does not load as a causal language model .*; look at its"):
        check_model(str(model))


def test_code_that_comes_with_a_model_is_not_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(model, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (model / "own.py").write_text("raise SystemExit('the code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks a user at a terminal
    assert check_model(str(model)) == "not checked: the model comes with code of its own, which is not run"


def test_a_model_that_does_not_fit_memory_is_not_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    monkeypatch.setattr(merge_check, "_free_memory", lambda: size)
    monkeypatch.setattr(merge_check, "AutoModelForCausalLM", None)
    said = check_model(str(model))
    assert said == f"not checked: the model of {size / 1e9:.1f} GB does not fit the {size / 1e9:.1f} GB of memory that are free"  # fmt: skip


def test_memory_that_holds_pages_of_files_is_free() -> None:
    """After a merge the models' files fill most of the memory, and give way when it is wanted."""
    with open("/proc/meminfo") as file:
        kinds = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    assert merge_check._free_memory() == pytest.approx(kinds["MemAvailable"], rel=0.2)


@pytest.mark.parametrize(
    ("logits", "problem"),
    [
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), None),
        (torch.tensor([[0.0, 1.0]]), None),
        (torch.tensor([[0.0, 1.0], [1.0, float("inf")]]), "its logits hold NaN or infinite values"),
        (torch.tensor([[0.0, 1.0], [3.0, 3.0]]), "its logits are the same for every token of the vocabulary"),
        (torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "its logits are the same whatever it has read"),
    ],
)
def test_what_is_wrong(logits: torch.Tensor, problem: str | None) -> None:
    assert what_is_wrong(logits) == problem

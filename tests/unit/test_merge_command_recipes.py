"""What a merge file says is what the merged folder holds: slices, gradients, filters, element types, tokenizers, references. Expected tensors by hand."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion_ray.workers.model_card import front_matter
from fusion_ray.workers.tensor_blocks import smallest_bound
from tests.folders import moved, random_tensors, write_model
from tests.merges import alone, command, hashes, is_whole, merge, tensors_in, varm_of, write_merge, write_models
from tests.tiny import make_tiny_model, make_tokenizer

Capture = pytest.CaptureFixture[str]
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
KINDS = ("self_attn.q_proj.weight", "mlp.up_proj.weight")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(tmp_path, monkeypatch)


def deep(folder: Path, name: str, value: float, *, layers: int = 3, **config: object) -> Path:
    """A model all of whose elements are `value`, plus the number of their layer."""
    tensors = {each: torch.full((4, 4), float(value)) for each in OUTSIDE}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{kind}": torch.full((4, 4), float(value + layer)) for kind in KINDS}
    return write_model(folder / name, tensors, num_hidden_layers=layers, dtype="float32", **config)  # type: ignore[arg-type]


def sliced(folder: Path, method: str, *slices: Mapping[str, object], **content: object) -> Path:
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({"merge_method": method, "slices": list(slices), **content}))
    return path


def part(*sources: tuple[str, int, int], **content: object) -> dict[str, object]:
    return {"sources": [{"model": name, "layer_range": [first, end]} for name, first, end in sources], **content}


def values(folder: Path) -> dict[str, float]:
    """The one value of every tensor."""
    found = {}
    for name, tensor in tensors_in(folder).items():
        assert bool((tensor == tensor.view(-1)[0]).all()), name
        found[name] = float(tensor.view(-1)[0])
    return found


def layer_values(folder: Path, kind: str = KINDS[1]) -> list[float]:
    found = values(folder)
    return [found[f"model.layers.{number}.{kind}"] for number in range((len(found) - 3) // 2)]


def settings_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


# slices


def test_passthrough_stacks_layers(tmp_path: Path) -> None:
    deep(tmp_path, "a", 10)
    deep(tmp_path, "b", 20)
    path = sliced(tmp_path, "passthrough", part(("a", 0, 2)), part(("b", 1, 3)), part(("a", 2, 3)))
    merge(path, tmp_path / "out")
    assert is_whole(tmp_path / "out")
    assert layer_values(tmp_path / "out") == [10, 11, 21, 22, 12]
    found = values(tmp_path / "out")
    assert [found[name] for name in OUTSIDE] == [10, 10, 10]
    assert settings_of(tmp_path / "out")["num_hidden_layers"] == 5


def test_slerp_over_ranges_of_layers(tmp_path: Path) -> None:
    """Parallel tensors have no angle: slerp is linear between them. `t` is a gradient within its slice."""
    deep(tmp_path, "a", 10)
    deep(tmp_path, "b", 20)
    path = sliced(
        tmp_path, "slerp", part(("a", 0, 1), ("b", 2, 3)), part(("a", 0, 3), ("b", 0, 3)), base_model="a", parameters={"t": [0, 1]}
    )  # fmt: skip
    merge(path, tmp_path / "out")
    # A slice of one layer is at the gradient's end; then a's 10, 11, 12 to b's 20, 21, 22.
    assert layer_values(tmp_path / "out") == pytest.approx([22, 10, (11 + 21) / 2, 22])
    found = values(tmp_path / "out")
    assert [found[name] for name in OUTSIDE] == [10, 10, 10]  # at the gradient's start


def test_a_slice_of_one_model_beside_one_that_is_merged(tmp_path: Path) -> None:
    """The first slice passes a model through, and its embeddings come first: the weights of the others must not go by it."""
    for name, value in (("base", 10), ("a", 11), ("b", 13)):
        deep(tmp_path, name, value)
    merged = part(("base", 1, 3), ("a", 1, 3), ("b", 1, 3))
    for slices in ([part(("base", 0, 1)), merged], [merged, part(("base", 0, 1))]):
        path = sliced(tmp_path, "varm", *slices, base_model="base")
        merge(path, tmp_path / "out", overwrite=True)
        moved = 0.1 * 1 + 0.9 * 3  # the squares are 1 and 9
        expected = [11 + moved, 12 + moved]
        assert layer_values(tmp_path / "out") == pytest.approx(
            [10, *expected] if slices[1] is merged else [*expected, 10]
        )
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["tensors"]["model.layers.0.mlp.up_proj.weight"]["weights"] == pytest.approx([0.1, 0.9])
    assert report["tensors"]["model.layers.0.mlp.up_proj.weight"]["targets"] == ["a", "b"]


def test_layers_that_are_not_there_are_said_and_leave_nothing(tmp_path: Path, capsys: Capture) -> None:
    deep(tmp_path, "a", 10)
    deep(tmp_path, "b", 20, layers=2)
    path = sliced(tmp_path, "passthrough", part(("a", 0, 2)), part(("b", 1, 4)))
    code, _, err = command(capsys, path, tmp_path / "out", "--no-check")
    assert (code, err) == (
        2,
        "error: `slices.1.sources.0.layer_range`: [1, 4] goes past the 2 layers of model 'b': end it at 2 or before (the end is not included)\n",
    )
    assert not (tmp_path / "out").exists()


def test_models_of_different_depth_stack_and_do_not_merge_whole(tmp_path: Path, capsys: Capture) -> None:
    deep(tmp_path, "a", 10)
    deep(tmp_path, "b", 20, layers=2)
    merge(sliced(tmp_path, "passthrough", part(("a", 0, 3)), part(("b", 0, 2))), tmp_path / "out")
    assert layer_values(tmp_path / "out") == [10, 11, 12, 20, 21]
    path = write_merge(tmp_path / "whole.yml", "linear", {"a": {}, "b": {}})
    code, _, err = command(capsys, path, tmp_path / "whole", "--no-check")
    assert (code, err) == (
        1,
        f"error: model 'b': `num_hidden_layers` in {tmp_path}/b/config.json is 2, the pivot's (model 'a', {tmp_path}/a/config.json) is 3: only models of one "
        "architecture merge; make every target from this pivot, or mend the config.json that is wrong\n",
    )


def test_each_layer_keeps_its_kind_of_attention(tmp_path: Path) -> None:
    """Configs of many families list it layer by layer."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    deep(tmp_path, "a", 10, layer_types=kinds)
    deep(tmp_path, "b", 20, layer_types=kinds[:2], layers=2)
    merge(sliced(tmp_path, "passthrough", part(("a", 1, 3)), part(("b", 0, 2)), part(("a", 0, 1))), tmp_path / "out")
    assert settings_of(tmp_path / "out")["layer_types"] == [*kinds[1:], *kinds[:2], kinds[0]]
    assert settings_of(tmp_path / "out")["num_hidden_layers"] == 5


@pytest.mark.parametrize(("family", "depth"), [("qwen3", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_stack_loads_in_transformers(tmp_path: Path, capsys: Capture, family: str, depth: str) -> None:
    for seed, name in enumerate("ab"):
        make_tiny_model(tmp_path / name, family, seed=seed)
    path = sliced(tmp_path, "passthrough", part(("a", 0, 2)), part(("b", 0, 2)))
    code, said, err = command(capsys, path, tmp_path / "out")
    assert code == 0, err
    assert "\nchecked: finite logits, next token " in said
    assert settings_of(tmp_path / "out")[depth] == 4
    merged, first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "a", "b"))
    stack = {name.partition(".")[0] for name, _ in merged.named_children()} - {"lm_head"}
    layers = [list(getattr(model, *stack).children()) for model in (merged, first, second)]
    rows = [next(each for each in children if isinstance(each, torch.nn.ModuleList)) for children in layers]
    for number, (model, layer) in enumerate([(1, 0), (1, 1), (2, 0), (2, 1)]):
        for (name, ours), theirs in zip(
            rows[0][number].state_dict().items(), rows[model][layer].state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name


def test_a_merge_that_does_not_speak_is_said_and_kept(tmp_path: Path, capsys: Capture) -> None:
    for seed, name in enumerate("ab"):
        make_tiny_model(tmp_path / name, seed=seed)
    head = {"weight": [{"filter": "lm_head", "value": 0}, {"value": 0.5}]}
    path = write_merge(tmp_path / "m.yml", "linear", {"a": head, "b": head}, parameters={"normalize": False})
    out = tmp_path / "out"
    for times in ("made", "found"):
        code, said, err = command(capsys, path, out)
        assert (code, "(was there already)" in said) == (1, times == "found")
        assert f"error: {out} was written, but as a model it is broken: its logits are the same for every token of the vocabulary. Look at" in err  # fmt: skip
    assert is_whole(out)
    assert command(capsys, path, out, "--no-check")[0] == 0


def test_a_tied_head_that_one_model_stores_all_the_same(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in random_tensors(0).items() if name != "lm_head.weight"}
    write_model(tmp_path / "base", base, tie_word_embeddings=True)
    near = moved(base, 1)
    stored = near | {"lm_head.weight": near["model.embed_tokens.weight"].clone()}
    write_model(tmp_path / "a", stored, tie_word_embeddings=True)
    merge(varm_of(tmp_path, "a"), tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == base.keys()
    for name, tensor in tensors_in(tmp_path / "out").items():
        assert torch.equal(tensor, near[name]), name  # one target has all the weight


# parameters


def test_a_gradient_goes_over_the_layers(tmp_path: Path) -> None:
    deep(tmp_path, "base", 10)
    deep(tmp_path, "a", 20)
    path = write_merge(tmp_path / "m.yml", "task_arithmetic", {"a": {"weight": [0, 0.4, 1]}}, base_model="base")
    merge(path, tmp_path / "out")
    assert layer_values(tmp_path / "out") == pytest.approx([10, 11 + 4, 12 + 10])
    found = values(tmp_path / "out")
    assert [found[name] for name in OUTSIDE] == [10, 10, 10]  # all as the first layer, as mergekit 0.1.5 has it


def test_filters_choose_tensors_and_the_first_that_matches_counts(tmp_path: Path) -> None:
    deep(tmp_path, "base", 10)
    deep(tmp_path, "a", 20)
    weight = [
        {"filter": "layers.1.mlp", "value": 1},
        {"filter": "mlp", "value": [0, 0.5]},
        {"filter": "lm_head", "value": 0.3},
        {"value": 0.1},
    ]
    path = write_merge(tmp_path / "m.yml", "task_arithmetic", {"a": {"weight": weight}}, base_model="base")
    merge(path, tmp_path / "out")
    assert layer_values(tmp_path / "out", "mlp.up_proj.weight") == pytest.approx([10, 21, 17])
    assert layer_values(tmp_path / "out", "self_attn.q_proj.weight") == pytest.approx([11, 12, 13])
    found = values(tmp_path / "out")
    assert [found[name] for name in OUTSIDE] == pytest.approx([11, 11, 13])


def test_a_filter_that_matches_no_tensor_is_told_once(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    deep(tmp_path, "base", 10)
    deep(tmp_path, "a", 20)
    weight = [{"filter": "mpl", "value": 1}, {"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.1}]
    density = [{"filter": "self_atn", "value": 0.5}, {"value": 1}]
    models: dict[str, dict[str, object]] = {"a": {"weight": weight}}
    path = write_merge(tmp_path / "m.yml", "ties", models, base_model="base", parameters={"density": density})
    assert command(capsys, path, tmp_path / "out", "--no-check")[0] == 0
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "merge: `parameters.density`: no tensor's name has the filter 'self_atn' in it: its value is used nowhere",
        "merge: `models.0.parameters.weight`: no tensor's name has the filter 'mpl' in it: its value is used nowhere",
    ]


@pytest.mark.parametrize("variant", ["paper", "fusechat_release", "mergekit"])
def test_sce_of_one_target_is_told_to_be_the_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    write_models(tmp_path, "base", "a")
    for share, told in (
        (0.1, int(variant != "fusechat_release")),
        (1, 0),
    ):  # the release leaves in what it does not select
        caplog.clear()
        settings = {"variant": variant, "select_topk": share}
        path = write_merge(tmp_path / "m.yml", "sce", {"a": {}}, base_model="base", parameters=settings)
        merge(path, tmp_path / f"out_{share}")
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len([line for line in said if line.startswith("merge: sce with one target selects nothing")]) == told
        merged, base = tensors_in(tmp_path / f"out_{share}"), tensors_in(tmp_path / "base")
        assert all(torch.equal(merged[name], base[name]) for name in base) is bool(told)


def test_a_model_s_own_setting_goes_before_the_merge_s(tmp_path: Path) -> None:
    for name, value in (("base", 10), ("a", 20), ("b", 30)):
        deep(tmp_path, name, value)
    models: dict[str, dict[str, object]] = {"a": {"weight": [{"filter": "mlp", "value": 0.5}]}, "b": {"weight": 0.25}}
    path = write_merge(
        tmp_path / "m.yml", "task_arithmetic", models, base_model="base", parameters={"weight": 0.1, "lambda": 2}
    )
    merge(path, tmp_path / "out")
    assert layer_values(tmp_path / "out", "mlp.up_proj.weight") == pytest.approx(
        [base + 2 * (0.5 * 10 + 0.25 * 20) for base in (10, 11, 12)]
    )
    assert layer_values(tmp_path / "out", "self_attn.q_proj.weight") == pytest.approx(
        [base + 2 * (0.1 * 10 + 0.25 * 20) for base in (10, 11, 12)]
    )


def test_settings_that_differ_by_tensor_do_not_go_with_varm(tmp_path: Path, capsys: Capture) -> None:
    deep(tmp_path, "base", 10)
    deep(tmp_path, "a", 20)
    parameters = {"temperature": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}
    path = write_merge(tmp_path / "m.yml", "varm", {"a": {}}, base_model="base", parameters=parameters)
    code, _, err = command(capsys, path, tmp_path / "out", "--no-check")
    assert (code, err) == (
        2,
        "error: `parameters.temperature`: `temperature` is one for all tensors: give one value\n",
    )


# element types


@pytest.mark.parametrize("keys", [{"dtype": "float16"}, {"dtype": "bfloat16", "out_dtype": "float16"}])
def test_float16_is_the_float32_result_cast_once(tmp_path: Path, keys: dict[str, str]) -> None:
    write_models(tmp_path, "base", "a", "b")
    merge(varm_of(tmp_path, "a", "b", dtype="float16", out_dtype="float32"), tmp_path / "wide")
    merge(varm_of(tmp_path, "a", "b", **keys), tmp_path / "half")
    wide, half = tensors_in(tmp_path / "wide"), tensors_in(tmp_path / "half")
    assert (settings_of(tmp_path / "wide")["dtype"], settings_of(tmp_path / "half")["dtype"]) == ("float32", "float16")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    for name, tensor in wide.items():
        assert torch.equal(half[name], tensor.half()), name
        assert not torch.equal(tensor, tensor.bfloat16().float()), "computed in float32, whatever `dtype` says"


def test_without_a_type_each_tensor_stays_what_the_base_has(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(6, 4).bfloat16(), "b.weight": torch.randn(6, 4).half(), "c.weight": torch.randn(3)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", {name: tensor.float() + 1 for name, tensor in base.items()})
    merge(varm_of(tmp_path, "a"), tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in tensors_in(tmp_path / "out").items()} == {
        name: tensor.dtype for name, tensor in base.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_an_older_config_keeps_its_word_for_the_type(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "a")
    config = settings_of(tmp_path / "base")
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    merge(varm_of(tmp_path, "a", out_dtype="float32"), tmp_path / "out")
    assert settings_of(tmp_path / "out") == config | {"torch_dtype": "float32"}


# tokenizers and templates


@pytest.mark.parametrize("given", [{"tokenizer_source": "a"}, {"tokenizer": {"source": "words"}}, {"tokenizer": {"source": "model:a"}}])  # fmt: skip
def test_the_tokenizer_of_another_folder(tmp_path: Path, given: dict[str, object]) -> None:
    write_models(tmp_path, "base", "a")
    (tmp_path / "words").mkdir()
    (tmp_path / "base" / "vocab.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"max_length": 1}')
    for place in ("a", "words"):
        (tmp_path / place / "tokenizer.json").write_text('{"version": "another"}')
        (tmp_path / place / "tokenizer.model").write_bytes(b"\0\1")
        (tmp_path / place / "chat_template.jinja").write_text("another")
        (tmp_path / place / "generation_config.json").write_text('{"max_length": 2}')
    merge(varm_of(tmp_path, "a", **given), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == '{"version": "another"}'
    assert (out / "tokenizer.model").read_bytes() == b"\0\1"
    assert (out / "chat_template.jinja").read_text() == "another"
    assert (out / "generation_config.json").read_text() == '{"max_length": 1}'
    assert not (out / "vocab.json").exists(), "a file of the base's tokenizer"


def test_a_tokenizer_source_that_holds_none_is_refused(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    (tmp_path / "nothing").mkdir()
    path = varm_of(tmp_path, "a", tokenizer_source="nothing")
    code, _, err = command(capsys, path, tmp_path / "out", "--no-check")
    assert (code, err) == (
        1,
        f"error: the tokenizer's source {tmp_path}/nothing holds no tokenizer (tokenizer.json and the like): give the folder of a model that has one\n",
    )
    assert not (tmp_path / "out").exists()


TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def test_a_chat_template_of_its_own(tmp_path: Path) -> None:
    """Whatever the base has: a file, an entry in tokenizer_config.json (older models), named templates."""
    write_models(tmp_path, "base", "a")
    tokenizer = make_tokenizer(template="chatml")
    tokenizer.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "old"}))
    (tmp_path / "base" / "chat_template.json").write_text('{"chat_template": "old"}')
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("old")
    merge(varm_of(tmp_path, "a", chat_template=TEMPLATE), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "[Hi]"
    assert [path.name for path in (tmp_path / "out").rglob("*template*")] == ["chat_template.jinja"]
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_named_templates_come_along(tmp_path: Path) -> None:
    write_models(tmp_path, "base", "a")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    merge(varm_of(tmp_path, "a"), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


# where models are


def test_relative_paths_are_of_the_file_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path / "models", "base", "a")
    path = write_merge(
        tmp_path / "recipes" / "m.yml", "varm", {"../models/a": {}}, base_model="../models/base", tokenizer_source="../models/a"
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge(Path(os.path.relpath(path)), Path("out"))
    merge(varm_of(tmp_path / "models", "a"), tmp_path / "direct")
    assert hashes(tmp_path / "elsewhere" / "out", "*.safetensors") == hashes(tmp_path / "direct", "*.safetensors")


@pytest.fixture
def bucket() -> Iterator[str]:
    MemoryFileSystem.store.clear()
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


def test_models_in_an_object_store_are_read_by_ranges(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, "base", "a", "b", rows=2000, width=64)
    for name in ("base", "a", "b"):
        fsspec.filesystem("memory").put(str(tmp_path / name), f"{bucket}/{name}", recursive=True)
    local = write_merge(tmp_path / "local.yml", "sce", {"a": {}, "b": {}}, base_model="base")
    remote = write_merge(
        tmp_path / "remote.yml", "sce", {f"{bucket}/a": {}, f"{bucket}/b": {}}, base_model=f"{bucket}/base"
    )
    asked: list[tuple[str, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def cat(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **named: object) -> bytes:  # fmt: skip
        data = bytes(cat_file(self, path, start, end, **named))
        asked.append((path, len(data)))
        return data

    def downloaded(*_: object, **__: object) -> None:
        raise AssertionError("a whole file was downloaded")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)
    monkeypatch.setattr(MemoryFileSystem, "get_file", downloaded)
    bound = smallest_bound(3, 2)
    merge(remote, tmp_path / "remote", bound=bound, shard=200_000)
    largest = max(size for path, size in asked if path.endswith(".safetensors"))
    weights = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert largest <= bound // 2 < weights
    merge(local, tmp_path / "local", bound=bound, shard=200_000)
    assert hashes(tmp_path / "remote", "*.safetensors") == hashes(tmp_path / "local", "*.safetensors")
    for name in ("config.json", "merge_report.json", "tokenizer.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert "base_model" not in front_matter((tmp_path / "remote" / "README.md").read_text())
    assert merge(remote, tmp_path / "remote", bound=bound, shard=200_000).was_there
    other = write_merge(tmp_path / "other.yml", "varm", {f"{bucket}/b": {}}, base_model=f"{bucket}/base")
    assert merge(other, tmp_path / "other", bound=bound).reused == ("b",)

"""What `plan` says of model folders that are broken: each problem names the model and the file, and none stops the others from being told."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusion_ray.config import ConfigError, FusionConfig, parse_config
from fusion_ray.graph import build_graph
from fusion_ray.plan import INDEX, check, model_size, plan_table


def make(tmp_path: Path) -> FusionConfig:
    for name in ("pivot", "a"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"vocab_size": 32}))
        (folder / "chat_template.jinja").write_text("x")
        (folder / "tokenizer.json").write_text("{}")
        save_file({"weight": np.zeros((32, 4), np.float32)}, folder / "model.safetensors")
    (tmp_path / "corpus.jsonl").write_text("{}")
    return parse_config(
        {
            "run": {"storage": str(tmp_path / "runs")},
            "pivot": {"path": str(tmp_path / "pivot")},
            "sources": [{"name": "a", "path": str(tmp_path / "a")}],
            "corpus": {"path": "corpus.jsonl"},
        },
        folder=tmp_path,
    )


def said(config: FusionConfig) -> list[str]:
    return plan_table(config)[1]


def shards(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        save_file({name: np.zeros(4, np.float32)}, folder / name)


def test_a_whole_folder_has_no_problem(tmp_path: Path) -> None:
    assert said(make(tmp_path)) == []


def test_a_shard_without_an_index_tells_which_are_missing(tmp_path: Path) -> None:
    config, folder = make(tmp_path), tmp_path / "a"
    shards(folder, "model-00001-of-00002.safetensors")
    assert said(config) == [
        f"model 'a': {folder} holds 1 of 2 shards, model-00002-of-00002.safetensors not: fetch what is missing, and {INDEX}"
    ]
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(folder / "model-00003-of-00009.safetensors")
    (problem,) = said(config)
    assert (
        "model-00001-of-00009.safetensors, model-00002-of-00009.safetensors, model-00004-of-00009.safetensors and 5 more not"
        in problem
    )


def test_all_shards_without_an_index_are_enough_for_a_teacher_alone(tmp_path: Path) -> None:
    """vLLM loads every safetensors file; transformers and the merge want the index."""
    config = make(tmp_path)
    for name in ("a", "pivot"):
        shards(tmp_path / name, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (problem,) = said(config)
    assert problem.startswith(f"model 'pivot': {tmp_path / 'pivot'} has shards and no {INDEX}")


def test_a_file_that_an_index_names_and_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    config, folder = make(tmp_path), tmp_path / "a"
    (folder / "b.safetensors").symlink_to(folder / "gone")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}}))
    assert said(config) == [f"model 'a': {folder / INDEX} names b.safetensors, which is not there: fetch it again"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    config, folder = make(tmp_path), tmp_path / "a"
    (folder / "tokenizer.json").unlink()
    (problem,) = said(config)
    assert problem.startswith(f"model 'a': {folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    (folder / "tokenizer.model").write_bytes(b"x")
    assert said(config) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": ', "cannot be read as JSON"), (b"\xff\xfe{", "cannot be read as JSON"), (b"[]", "holds a list, expected a JSON object")],
)  # fmt: skip
def test_broken_json_is_a_problem_of_a_model_and_a_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    config = make(tmp_path)
    for model in ("pivot", "a"):
        (tmp_path / model / name).write_bytes(content)
    problems = said(config)
    assert [problem.partition(":")[0] for problem in problems] == ["model 'pivot'", "model 'a'"]
    for problem, model in zip(problems, ("pivot", "a"), strict=True):
        assert str(tmp_path / model / name) in problem
        assert words in problem
    with pytest.raises(ConfigError, match=r"model 'pivot': [^\n]*\nmodel 'a': "):
        check(config, build_graph(config))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config.json", {"vocab_size": "many"}, "`vocab_size` in {} is 'many', expected a positive whole number"),
        ("config.json", {"vocab_size": 0}, "`vocab_size` in {} is 0"),
        ("config.json", {"text_config": [1]}, "`text_config` in {} is a list, expected a JSON object"),
        (INDEX, {}, "`weight_map` in {} does not name a file for each tensor"),
        (INDEX, {"weight_map": ["a"]}, "`weight_map` in {} does not name a file for each tensor"),
        (INDEX, {"weight_map": {"a": 3}}, "`weight_map` in {} does not name a file for each tensor"),
    ],
)
def test_json_of_another_form(tmp_path: Path, name: str, value: object, words: str) -> None:
    config, file = make(tmp_path), tmp_path / "a" / name
    file.write_text(json.dumps(value))
    (problem,) = said(config)
    assert problem.startswith(f"model 'a': {words.format(file)}")


def test_a_config_whose_sizes_are_of_another_form_is_no_traceback(tmp_path: Path) -> None:
    config = make(tmp_path)
    fields = {"vocab_size": 32, "num_attention_heads": 0, "hidden_size": 8, "num_hidden_layers": 1}
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields))
    assert said(config) == []


def test_a_header_of_another_form(tmp_path: Path) -> None:
    config, file = make(tmp_path), tmp_path / "a" / "model.safetensors"
    header = json.dumps({"x": {"data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert said(config) == [f"model 'a': {file} has no readable header: it is truncated or damaged; fetch it again"]


def test_a_null_template_is_none(tmp_path: Path) -> None:
    config, folder = make(tmp_path), tmp_path / "a"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    (problem,) = said(config)
    assert "has no chat template" in problem


def test_the_sizes_of_a_folder_name_it_where_nobody_named_the_model(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=f"model '{tmp_path / 'a'}'"):
        model_size(str(tmp_path / "a"))

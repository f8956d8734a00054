"""Configs: what is refused, how it is explained, what overrides and relative paths mean."""

from pathlib import Path

import pytest

from fusion_ray.config import ConfigError, CorpusConfig, load_config, parse_config

MINIMAL = {"pivot": {"path": "p"}, "sources": [{"name": "a", "path": "q"}], "corpus": {"path": "rows.jsonl"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL_YAML = "pivot: {path: p}\nsources: [{name: a, path: q}]\ncorpus: {path: rows.jsonl}\n"


def test_minimal_config_takes_the_papers_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.teach.top_k == 10
    assert config.distill.lm_weight == 0.9
    assert config.merge.methods[0].method == "varm"


def test_engine_arguments_of_any_depth_are_passed_on() -> None:
    engine = {"hf_overrides": {"rope_parameters": {"factor": 4.0, "kinds": ["yarn", {"of": None}]}}}
    config = parse_config(MINIMAL | {"teach": {"engine": engine}})
    assert config.teach.engine == engine
    assert config.teach.model_dump(mode="json")["engine"] == engine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distil": {}}, ["unknown key `distil`", "did you mean 'distill'"]),
        ({"distill": {"lm_wieght": 0.5}}, ["unknown key `distill.lm_wieght`", "did you mean 'lm_weight'"]),
        ({"resources": {"teach": {"cpu": 1}}}, ["unknown key `resources.teach.cpu`", "did you mean 'cpus'"]),
        ({"sources": [{"name": "a", "path": "q", "revison": "x"}]}, ["`sources.0.revison`", "did you mean 'revision'"]),
        (
            {"merge": {"methods": [{"method": "sce", "select_top": 0.1}]}},
            ["merge.methods.0.select_top", "'select_topk'"],
        ),
        (
            {"merge": {"methods": [{"method": "ties", "density": [0.5, 1.5]}]}},
            ["`merge.methods.0.density.1`: Input should be less than or equal to 1 (given: 1.5)"],
        ),
        ({"merge": {"methods": [{"method": "ties", "weight": "x"}]}}, ["`merge.methods.0.weight`: ", "given: 'x'"]),
        ({"merge": {"methods": [{"method": "ties", "lamda": 1}]}}, ["did you mean 'lambda'"]),
        ({"distill": {"lm_weight": 1.5}}, ["`distill.lm_weight`", "less than or equal to 1", "given: 1.5"]),
        (
            {"resources": {"teach": {"engine": {"quantization": "fp8"}}}},
            ["resources.teach.engine.quantization changes what a teacher says", "move it to teach.engine.quantization"],
        ),
        (
            {"teach": {"engine": {"logprobs_mode": "raw_logits"}}},
            ["teach.engine.logprobs_mode cannot be set: rows hold the logprobs of the model as it is"],
        ),
        ({"distill": {"lora": {"rank": 0}}}, ["`distill.lora.rank`", "greater than or equal to 1", "given: 0"]),
        ({"distill": {"lora": {"dropout": 1}}}, ["`distill.lora.dropout`", "less than 1"]),
        ({"distill": {"lora": {"alpha": 0}}}, ["`distill.lora.alpha`", "greater than 0"]),
        ({"distill": {"lora": {"targets": "q_proj"}}}, ["`distill.lora.targets`: Input should be 'all-linear'"]),
        ({"distill": {"lora": {"targets": []}}}, ["`distill.lora.targets`", "at least 1 item"]),
        ({"distill": {"lora": {"r": 8}}}, ["unknown key `distill.lora.r`", "rank"]),
        ({"sources": [{"name": "pivot", "path": "q"}]}, ["two models are named 'pivot'"]),
        ({"sources": [{"name": "sft", "path": "q"}]}, ["SFT-only control"]),
        ({"sources": [{"name": "../up", "path": "q"}]}, ["`sources.0.name`"]),
        ({"merge": {"methods": [{"method": "varm"}, {"method": "varm"}]}}, ["two merge methods have the label 'varm'"]),
        ({"resources": {"teach": {"min_workers": 3, "max_workers": 2}}}, ["min_workers 3 is above max_workers 2"]),
    ],
)
def test_bad_values_are_named_and_explained(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | change)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"train_batch_size": 8}, "train_batch_size cannot be set: leave it out and set distill.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "set distill.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "set distill.batch_size (the micro-batches"),
        ({"zero_optimization": {"stage": 3}}, "distill.deepspeed.zero_optimization.stage cannot be set: leave it out and set distill.zero_stage"),
        ({"fp16": {"enabled": True}}, "set distill.precision"),
        ({"bf16": {"enabled": False}}, "set distill.precision"),
        ({"gradient_clipping": 0.5}, "set distill.max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "set distill.learning_rate, distill.betas and distill.weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, "set distill.schedule, distill.learning_rate and distill.warmup_ratio"),
        ({"zero_optimization": 3}, "distill.deepspeed.zero_optimization is 3, expected DeepSpeed's keys of it"),
    ],
)  # fmt: skip
def test_deepspeed_s_keys_that_the_config_has_are_refused(deepspeed: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | {"distill": {"deepspeed": deepspeed}})
    assert str(caught.value).startswith("`distill.deepspeed`: ")
    assert words in str(caught.value)


def test_deepspeed_s_other_keys_are_passed_on() -> None:
    deepspeed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "wall_clock_breakdown": True}
    assert parse_config(MINIMAL | {"distill": {"deepspeed": deepspeed}}).distill.deepspeed == deepspeed


def test_lora_is_off_until_its_section_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL_YAML)
    assert load_config(path).distill.lora is None
    assert load_config(path, ["distill.lora=null"]).distill.lora is None
    lora = load_config(path, ["distill.lora={}"]).distill.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32.0, 0.0, "all-linear")
    lora = load_config(path, ["distill.lora.rank=4", "distill.lora.targets=[q_proj, mlp.up_proj]"]).distill.lora
    assert lora is not None
    assert (lora.rank, lora.targets) == (4, ("q_proj", "mlp.up_proj"))
    assert all(field.description for field in type(lora).model_fields.values())


def test_one_problem_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | {"merge": {"methods": [{"method": "ties", "density": 2}]}})
    assert len(str(caught.value).splitlines()) == 1


def test_a_method_is_stored_and_read_again_under_its_keys() -> None:
    method = {"method": "ties", "weight": [0.2, 0.3], "lambda": 0.7}
    config = parse_config(MINIMAL | {"merge": {"methods": [method]}})
    assert config.merge.methods[0].parameters == {"weight": (0.2, 0.3), "scale": 0.7}
    stored = config.model_dump(mode="json")
    assert stored["merge"]["methods"][0]["lambda"] == 0.7
    assert parse_config(stored) == config


def test_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="missing key `corpus`"):
        parse_config({key: value for key, value in MINIMAL.items() if key != "corpus"})


def test_overrides_lay_over_nested_keys_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL_YAML)
    config = load_config(
        path, ["distill.epochs=7", "sources.0.name=b", "merge.methods=[{method: sce, select_topk: 0.5}]"]
    )
    assert config.distill.epochs == 7
    assert config.sources[0].name == "b"
    assert config.merge.methods[0].parameters == {"select_topk": 0.5}


@pytest.mark.parametrize("override", ["distill.epochs", "=3", "sources.4.name=x", "pivot.path.deep=1", "a..b=1"])
def test_malformed_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"override"):
        load_config(write(tmp_path, MINIMAL_YAML), [override])


def test_relative_paths_are_relative_to_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    config = load_config(write(tmp_path, MINIMAL_YAML), ["sources.0.path=org/model", "run.storage=memory://x"])
    assert config.pivot.path == str(tmp_path / "p")
    assert config.sources[0].path == "org/model"  # nothing of that name beside the YAML: a hub id
    assert config.corpus.paths == (str(tmp_path / "rows.jsonl"),)
    assert config.run.storage == "memory://x"


def test_unreadable_and_non_mapping_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1"))


def corpus_of(tmp_path: Path, **corpus: object) -> CorpusConfig:
    return parse_config(MINIMAL | {"corpus": corpus}, folder=tmp_path).corpus


def test_a_mixture_takes_the_place_of_a_path(tmp_path: Path) -> None:
    sources = [{"path": "a.jsonl", "weight": 2}, {"path": ["s3://x/b.json", "c.json"], "name": "b", "format": "alpaca"}]
    corpus = corpus_of(tmp_path, mixture=sources, format="sharegpt")
    assert corpus.paths == (str(tmp_path / "a.jsonl"), "s3://x/b.json", str(tmp_path / "c.json"))
    assert [(s.label, s.weight, s.format, s.max_rows) for s in corpus.mixture] == [
        ("a.jsonl", 2.0, None, None),
        ("b", 1.0, "alpaca", None),
    ]
    stored = parse_config(MINIMAL | {"corpus": corpus.model_dump(mode="json")})
    assert stored.corpus == corpus


def test_copies_are_left_out_of_a_mixture_unless_told_otherwise(tmp_path: Path) -> None:
    mixture = [{"path": "a.jsonl"}]
    assert corpus_of(tmp_path, mixture=mixture).removes_copies
    assert not corpus_of(tmp_path, mixture=mixture, deduplicate=False).removes_copies
    assert not corpus_of(tmp_path, path="a.jsonl").removes_copies
    assert corpus_of(tmp_path, path="a.jsonl", deduplicate=True).removes_copies


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ({}, "neither corpus.path nor corpus.mixture names a file"),
        ({"path": []}, "neither corpus.path nor corpus.mixture names a file"),
        ({"path": "a.jsonl", "mixture": [{"path": "b.jsonl"}]}, "corpus.path and corpus.mixture are both set"),
        (
            {"mixture": [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}]},
            "two sources .* named 'a.jsonl': give corpus.mixture.1",
        ),
        ({"mixture": [{"path": "a.jsonl"}, {"path": []}]}, "corpus.mixture.1.path is empty"),
        ({"mixture": [{"path": "a.jsonl", "weight": 0}]}, "`corpus.mixture.0.weight`: .*greater than 0"),
        (
            {"mixture": [{"path": "a.jsonl", "wieght": 1}]},
            "unknown key `corpus.mixture.0.wieght`: did you mean 'weight'",
        ),
        ({"mixture": [{"weight": 1}]}, "missing key `corpus.mixture.0.path`"),
        ({"path": "a.jsonl", "shuffle_rows": 10**6}, "`corpus.shuffle_rows`: .*less than or equal to 100000"),
    ],
)
def test_corpora_that_cannot_be_are_explained(tmp_path: Path, corpus: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        corpus_of(tmp_path, **corpus)

"""Merge files: every golden and every shipped one loads; what a parameter is for each tensor; slices; and each refusal's words."""

import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.config import ConfigError
from fusion_ray.merge_recipe import Recipe, tensor_recipes
from fusion_ray.merge_yaml import load_recipe, resolved_yaml
from fusion_ray.merging.names import comes_before_layers, in_stack
from fusion_ray.merging.recipe import TensorRecipe
from fusion_ray.merging.settings import Choice, interpolate, value_at

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "jobs" / "configs" / "merge").glob("*.yml"))
GOLDEN = Path(os.environ.get("FUSION_RAY_GOLDEN", ROOT.parent / "shared" / "golden"))
FUSECHAT_MODELS = [
    f"FuseAI/OpenChat-3.5-7B-{name}-v2.0" for name in ("Starling", "SOLAR", "InternLM", "Mixtral", "Qwen")
]
OUTSIDE = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
KINDS = ("mlp.up_proj.weight", "self_attn.q_proj.weight")


def tensors(layers: int = 5) -> list[str]:
    """Names of a Llama in the order of a safetensors file: the head comes first."""
    return [*OUTSIDE[:2], *(f"model.layers.{n}.{kind}" for n in range(layers) for kind in KINDS), OUTSIDE[2]]


def write(folder: Path, text: str) -> Path:
    path = folder / "merge.yml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *, models: str = "abc") -> Recipe:
    for name in models:
        (folder / name).mkdir(exist_ok=True)
    return load_recipe(write(folder, text))


def by_name(recipe: Recipe, *layers: int) -> dict[str, TensorRecipe]:
    """The recipes of all tensors, for models of so many layers each (one number for all)."""
    counts = layers * len(recipe.models) if len(layers) == 1 else layers
    return {found.name: found for found in tensor_recipes(recipe, [tensors(count) for count in counts])}


def layer(number: int, kind: str = KINDS[0]) -> str:
    return f"model.layers.{number}.{kind}"


# files


@pytest.mark.golden
@pytest.mark.skipif(not list(GOLDEN.rglob("mergekit_*.yml")), reason=f"no mergekit files under {GOLDEN}")
def test_every_golden_file_loads() -> None:
    for path in sorted(GOLDEN.rglob("mergekit_*.yml")):
        recipe = load_recipe(path)
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert recipe.method == raw["merge_method"], path.name
        assert all(Path(model.path).is_dir() for model in recipe.models), path.name
        found = by_name(recipe, 2)
        assert set(found) == set(tensors(2)), path.name
        for parameter, value in raw.get("parameters", {}).items():
            assert found[layer(0)].parameters[parameter] == value, path.name
        for place, model in enumerate(raw["models"]):
            for parameter, value in model.get("parameters", {}).items():
                values = found[layer(0)].parameters[parameter]
                assert isinstance(values, tuple)
                assert values[place] == value, path.name


def test_what_is_shipped() -> None:
    names = {path.stem for path in SHIPPED}
    assert names == {f"fusechat_{name}" for name in ("linear", "task_arithmetic", "ties", "dare", "sce", "varm")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_says_how_it_is_run(path: Path) -> None:
    recipe = load_recipe(path)
    assert [model.path for model in recipe.models[:5]] == FUSECHAT_MODELS
    assert f"fusion-ray merge jobs/configs/merge/{path.name} OUT" in path.read_text(encoding="utf-8")
    if recipe.method != "linear":
        assert recipe.base == 5
        assert recipe.models[5].path == "openchat/openchat_3.5"


@pytest.mark.parametrize(
    ("name", "method", "dtype", "parameters"),
    [
        ("linear", "linear", "float16", {"weight": (0.2,) * 5, "normalize": True}),
        ("task_arithmetic", "task_arithmetic", "bfloat16", {"weight": (0.3,) * 5, "normalize": False, "scale": 1.0}),
        (
            "ties",
            "ties",
            "bfloat16",
            {"weight": (0.2,) * 5, "density": (0.6,) * 5, "normalize": True, "scale": 1.0},
        ),
        (
            "dare",
            "dare_linear",
            "bfloat16",
            {
                **{"weight": (0.2,) * 5, "density": (0.6,) * 5, "normalize": True, "scale": 1.0},
                **{"rescale": True, "seed": 0},
            },
        ),
        ("sce", "sce", "bfloat16", {"variant": "paper", "select_topk": 0.1}),
        ("varm", "varm", "bfloat16", {"granularity": "matrix", "square": True}),
    ],
)
def test_fusechat_s_settings(name: str, method: str, dtype: str, parameters: dict[str, object]) -> None:
    recipe = load_recipe(ROOT / "jobs" / "configs" / "merge" / f"fusechat_{name}.yml")
    assert (recipe.method, recipe.written_dtype) == (method, dtype)
    for found in by_name(recipe, 3).values():
        assert found.parameters == parameters


# references


def test_references_are_paths_of_the_file_s_folder_urls_or_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "deep" / "a+b").mkdir()
    recipe = load(
        tmp_path / "deep",
        """
merge_method: linear
models:
  - model: ../near
  - model: org/model
  - model: org/model@v1
  - model: {model: {path: org/model, revision: v2}}
  - model: {path: org/model, revision: v3}
  - model: s3://bucket/some+where/model
  - model: /nowhere/model
  - model: a+b
  - model: not/an/id
tokenizer_source: model:org/model
""",
        models="",
    )
    assert [(model.path, model.revision) for model in recipe.models] == [
        (str(tmp_path / "near"), None),
        ("org/model", None),
        ("org/model", "v1"),
        ("org/model", "v2"),
        ("org/model", "v3"),
        ("s3://bucket/some+where/model", None),
        ("/nowhere/model", None),
        (str(tmp_path / "deep" / "a+b"), None),
        (str(tmp_path / "deep" / "not" / "an" / "id"), None),
    ]
    assert [model.name for model in recipe.models] == [
        *("near", "model", "model-2", "model-3", "model-4", "model-5", "model-6", "a-b", "id"),
    ]
    assert recipe.tokenizer == recipe.models[1]


def test_models_are_told_apart_once_in_order_of_appearance(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
base_model: b
merge_method: slerp
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: ./b, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]
parameters: {t: 0.5}
""",
    )
    assert [model.name for model in recipe.models] == ["a", "b"]
    assert (recipe.base, recipe.pivot) == (1, 1)


def test_what_is_written(tmp_path: Path) -> None:
    plain = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    recipe = load(tmp_path, plain)
    assert (recipe.written_dtype, recipe.tokenizer, recipe.chat_template, recipe.layers) == ("pivot", None, None, None)
    assert load(tmp_path, plain + "dtype: float32").written_dtype == "float32"
    assert load(tmp_path, plain + "dtype: float32\nout_dtype: bfloat16").written_dtype == "bfloat16"
    assert load(tmp_path, plain + "tokenizer_source: base").tokenizer is None
    assert load(tmp_path, plain + "tokenizer: {source: a}").tokenizer is None  # the pivot's, as without
    assert load(tmp_path, plain + "tokenizer: {source: b}").tokenizer == recipe.models[1]
    other = load(tmp_path, plain + "tokenizer: {source: c}")
    assert other.tokenizer is not None
    assert (other.tokenizer.path, len(other.models)) == (str(tmp_path / "c"), 2)
    assert load(tmp_path, plain + "chat_template: '{{ messages }}'").chat_template == "{{ messages }}"


# the base


def test_the_base_is_not_merged_where_the_method_compares_with_it(tmp_path: Path) -> None:
    listed = load(
        tmp_path,
        "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: 1}",
    )
    found = by_name(listed, 2)[layer(0)]
    assert (found.models, found.names, found.base, found.base_name) == ((1, 2), (layer(0),) * 2, 0, layer(0))
    beside = load(
        tmp_path, "merge_method: ties\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {weight: 1}"
    )
    found = by_name(beside, 2)[layer(0)]
    assert (found.models, found.base) == ((0, 1), 2)
    slerp = load(tmp_path, "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.4}")
    found = by_name(slerp, 2)[layer(0)]
    assert (found.models, found.base, found.parameters) == ((0,), 1, {"t": 0.4})


def test_the_base_of_a_mean_gives_the_config_and_is_merged_where_it_is_listed(tmp_path: Path) -> None:
    recipe = load(tmp_path, "merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]")
    found = by_name(recipe, 2)[layer(0)]
    assert (recipe.pivot, found.models, found.base) == (1, (0, 1), None)


@pytest.mark.parametrize(("base", "has_base"), [("", False), ("base_model: c\n", True)])
def test_multislerp_is_told_whether_it_has_a_base(tmp_path: Path, base: str, has_base: bool) -> None:
    recipe = load(tmp_path, base + "merge_method: multislerp\nmodels: [{model: a}, {model: b}]")
    found = by_name(recipe, 2)[layer(0)]
    assert (found.parameters["has_base"], found.base) == (has_base, 2 if has_base else None)


# defaults


def test_defaults_of_the_dialect_differ_from_the_stage_s_for_sce(tmp_path: Path) -> None:
    recipe = load(tmp_path, "merge_method: sce\nbase_model: a\nmodels: [{model: b}, {model: c}]")
    assert by_name(recipe, 2)[layer(0)].parameters == {"variant": "mergekit", "select_topk": 1.0}


def test_lambda_int8_mask_and_empty_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: dare_ties
base_model: a
models:
  - model: a
    parameters:
  - model: b
    parameters: {weight: 1, density: 0.5}
parameters: {lambda: 0.7, int8_mask: true, seed: 3}
""",
    )
    assert by_name(recipe, 2)[layer(1)].parameters == {
        **{"weight": (1.0,), "density": (0.5,), "normalize": False},
        **{"scale": 0.7, "rescale": True, "seed": 3},
    }


# gradients and filters


def test_a_gradient_goes_over_the_layers_and_its_start_holds_outside(tmp_path: Path) -> None:
    recipe = load(tmp_path, "merge_method: linear\nmodels: [{model: a, parameters: {weight: [0, 1, 0.5]}}, {model: b}]")
    found = by_name(recipe, 5)
    weights = {name: each.parameters["weight"] for name, each in found.items()}
    assert [weights[layer(number)] for number in range(5)] == [(w, 1.0) for w in (0.0, 0.5, 1.0, 0.75, 0.5)]
    assert weights["model.embed_tokens.weight"] == (0.0, 1.0)
    # mergekit 0.1.5 writes the same.
    assert weights["model.norm.weight"] == weights["lm_head.weight"] == (0.0, 1.0)


def test_each_row_of_layers_has_a_gradient_of_its_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [0.5, 1]}")
    names = [f"encoder.block.{n}.w" for n in range(3)] + [f"decoder.block.{n}.w" for n in range(2)] + ["head.0.w"]
    found = {each.name: each.parameters["weight"] for each in tensor_recipes(recipe, [names] * 2)}
    assert found == {
        "encoder.block.0.w": (0.5, 0.5),
        "encoder.block.1.w": (0.75, 0.75),
        "encoder.block.2.w": (1.0, 1.0),
        "decoder.block.0.w": (0.5, 0.5),
        "decoder.block.1.w": (1.0, 1.0),
        "head.0.w": (0.5, 0.5),
    }


def test_filters_first_match_wins_and_the_last_entry_is_for_the_rest(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
    - {filter: layers.0.mlp, value: 0.9}
    - {filter: mlp, value: [1, 0]}
    - {filter: self_attn, value: [0, 0.5, 1]}
    - value: 0.3
""",
    )
    t = {name: found.parameters["t"] for name, found in by_name(recipe, 5).items()}
    assert [t[layer(number)] for number in range(5)] == [0.9, 0.75, 0.5, 0.25, 0.0]
    assert [t[layer(number, KINDS[1])] for number in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {t[name] for name in OUTSIDE} == {0.3}


def test_where_no_filter_matches_the_next_level_says_and_then_the_default(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: ties
base_model: a
models:
  - model: b
    parameters: {weight: {filter: mlp, value: 0.1}, density: [{filter: self_attn, value: 0.2}]}
parameters:
  weight: [{filter: "*", value: 0.5}]
  density: [{filter: mlp, value: 0.3}]
""",
    )
    found = by_name(recipe, 1)
    values = {name: (each.parameters["weight"], each.parameters["density"]) for name, each in found.items()}
    assert values[layer(0)] == ((0.1,), (0.3,))
    assert values[layer(0, KINDS[1])] == ((0.5,), (0.2,))
    assert values["lm_head.weight"] == ((0.5,), (1.0,))


def test_a_filter_that_leaves_a_required_parameter_open_is_told_with_the_tensor(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: [{filter: mlp, value: 1}]}}]",
    )
    with pytest.raises(ConfigError) as caught:
        by_name(recipe, 1)
    for word in ("`models.0`", "no filter of `weight` matches", "'lm_head.weight'", "an entry without filter"):
        assert word in str(caught.value)


def test_values_that_do_not_go_together_are_told_with_the_tensor(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [1, -1]}}]
""",
    )
    with pytest.raises(
        ConfigError, match=r"`models`, tensor 'model.layers.2.mlp.up_proj.weight': .* add up to zero: change a `weight`"
    ):
        by_name(recipe, 3)


# slices

STACKED = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
dtype: float16
"""


def test_passthrough_stacks_layers_and_renumbers_them(tmp_path: Path) -> None:
    recipe = load(tmp_path, STACKED)
    assert recipe.layers == 6
    found = by_name(recipe, 3, 4)
    assert set(found) == set(tensors(6))
    assert {each.method for each in found.values()} == {"passthrough"}
    assert all(each.parameters == {} and each.base is None for each in found.values())
    sources = [(found[layer(number)].models, found[layer(number)].names) for number in range(6)]
    assert sources == [((0,), (layer(n),)) for n in range(3)] + [((1,), (layer(n),)) for n in range(1, 4)]
    assert found["model.embed_tokens.weight"].models == (0,)
    assert found["model.norm.weight"].models == found["lm_head.weight"].models == (1,)


def test_precedence_source_then_slice_then_merge(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: ties
base_model: c
slices:
  - sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: 0.1}}
      - {model: b, layer_range: [0, 1]}
      - {model: c, layer_range: [0, 1]}
    parameters: {weight: 0.2, normalize: false}
  - sources:
      - {model: a, layer_range: [1, 2], parameters: {density: 0.5}}
      - {model: b, layer_range: [1, 2]}
parameters: {weight: 0.3, normalize: true, lambda: 0.9}
""",
    )
    found = by_name(recipe, 2)
    first, second = found[layer(0)].parameters, found[layer(1)].parameters
    assert first == {"weight": (0.1, 0.2), "density": (1.0, 1.0), "normalize": False, "scale": 0.9}
    assert second == {"weight": (0.3, 0.3), "density": (0.5, 1.0), "normalize": True, "scale": 0.9}
    assert found["model.embed_tokens.weight"].parameters == first
    assert found["lm_head.weight"].parameters == second
    assert found[layer(1)].base == 2
    assert found[layer(1)].base_name == layer(1)  # not listed there: the layers that the sources give


def test_gradients_go_over_each_slice_and_a_single_layer_takes_the_last_value(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [2, 5]}]
  - sources: [{model: a, layer_range: [4, 5]}, {model: b, layer_range: [0, 1]}]
parameters: {weight: [0, 1], normalize: false}
""",
    )
    found = by_name(recipe, 5)
    weights = [found[layer(number)].parameters["weight"] for number in range(4)]
    assert weights == [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.0, 1.0)]
    assert [found[layer(number)].names for number in (1, 3)] == [(layer(1), layer(3)), (layer(4), layer(0))]


def test_a_slice_of_one_model_or_of_no_layers_is_passed_through(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [2, 2]}]
parameters: {t: 0.5}
""",
    )
    assert recipe.layers == 2
    found = by_name(recipe, 2)
    assert (found[layer(1)].method, found[layer(1)].models, found[layer(1)].base) == ("slerp", (1,), 0)
    head = found["lm_head.weight"]
    assert (head.method, head.models, head.base, head.parameters) == ("passthrough", (1,), None, {})


def test_a_model_may_meet_itself_at_another_depth(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
merge_method: slerp
base_model: a
slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]}]
parameters: {t: 0.5}
""",
    )
    found = by_name(recipe, 4)[layer(0)]
    assert (found.models, found.names, found.base, found.base_name) == ((0,), (layer(3),), 0, layer(0))


@pytest.mark.parametrize("text", [STACKED, "merge_method: linear\nmodels: [{model: a}, {model: b}]"])
def test_a_tensor_that_one_model_lacks_is_told(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, text)
    if recipe.is_sliced:
        names = [[name for name in tensors(4) if "layers.1." not in name], tensors(3)]
        words = ["`slices.1.sources.0.layer_range`: [1, 4] goes past the 3 layers of model 'b'"]
        error: type[ValueError] = ConfigError
    else:
        names = [tensors(2), [name for name in tensors(2) if name != layer(1)]]
        words = [f"model 'b' has no tensor '{layer(1)}', and model 'a' has it (1 such in all)"]
        error = ValueError
    with pytest.raises(error) as caught:
        tensor_recipes(recipe, names)
    for word in words:
        assert word in str(caught.value)


def test_slices_need_one_row_of_layers(tmp_path: Path) -> None:
    recipe = load(tmp_path, STACKED)
    names = ["encoder.block.0.w", "decoder.block.0.w"]
    with pytest.raises(ConfigError, match=r"model 'a' has the rows of layers 'encoder.block' and 'decoder.block'"):
        tensor_recipes(recipe, [names, names])


def test_layers_of_one_slice_have_the_same_tensors(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [1, 2]}]}]",
    )
    names = [name for name in tensors(2) if name != layer(1)]
    with pytest.raises(ValueError, match=r"layer 1 of model 'b' has no tensor 'mlp.up_proj.weight', and layer 0 of"):
        tensor_recipes(recipe, [names, names])


# resolved


RESOLVABLE = [
    STACKED,
    "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: [{filter: mlp, value: [0, 1]}]}}]",
    "merge_method: karcher\nmodels: [{model: a}, {model: x/y@z}]\ntokenizer: {source: b}\nchat_template: '{{ messages }}'",
    "merge_method: della\nbase_model: c\nmodels: [{model: c}, {model: b}]\nout_dtype: float32\nparameters: {weight: 1, lambda: 2}",
    "merge_method: ties\nbase_model: c\nslices: [{sources: [{model: b, layer_range: [0, 2]}], parameters: {weight: 1}}]",
    "merge_method: varm\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {temperature: 0.5}",
]


@pytest.mark.parametrize("text", RESOLVABLE)
def test_the_resolved_file_says_the_same_from_anywhere(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, text)
    resolved = resolved_yaml(recipe)
    (tmp_path / "elsewhere").mkdir()
    again = load_recipe(write(tmp_path / "elsewhere", resolved))
    assert again == recipe
    assert by_name(again, 5) == by_name(recipe, 5)
    assert resolved_yaml(again) == resolved


def test_the_resolved_file_makes_defaults_explicit_where_they_are_asked_for(tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 0.5}}]"
    said = yaml.safe_load(resolved_yaml(load(tmp_path, text)))
    assert said == {
        "merge_method": "ties",
        "base_model": str(tmp_path / "a"),
        "models": [{"model": str(tmp_path / "b"), "parameters": {"weight": 0.5}}],
        "parameters": {"density": 1.0, "normalize": True, "lambda": 1.0},
        "tokenizer": {"source": str(tmp_path / "a")},
    }


# refusals

MODELS = "models: [{model: a}, {model: b}]\n"
LINEAR = "merge_method: linear\n" + MODELS
TIES = "merge_method: ties\nbase_model: c\n" + MODELS + "parameters: {weight: 1}\n"
SLICE = "{model: a, layer_range: [0, 2]}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", ["must hold a mapping with the keys merge_method, base_model, models", "it holds list"]),
        ("a: [1", ["is not valid YAML"]),
        (MODELS, ["missing key `merge_method`"]),
        ("merge_method: linear\n", ["give either `models` (whole models) or `slices`"]),
        (LINEAR + f"slices: [{{sources: [{SLICE}]}}]", ["give either `models`"]),
        ("merge_metod: linear\n" + MODELS, ["unknown key `merge_metod`: did you mean 'merge_method'?"]),
        (LINEAR + "dtyp: float32", ["unknown key `dtyp`: did you mean 'dtype'?"]),
        (LINEAR + "dtype: float64", ["`dtype`", "'float32', 'bfloat16' or 'float16'", "float64"]),
        ("merge_method: linaer\n" + MODELS, ["`merge_method`: unknown merge method 'linaer': did you mean 'linear'?"]),
        ("merge_method: nuslerp\n" + MODELS, ["unknown merge method 'nuslerp'"]),
        ("merge_method: linear\nmodels: []", ["`models`", "at least 1 item"]),
        (
            "merge_method: linear\nmodels: [a, b]",
            ["`models.0`: expected a mapping such as {model: path} (given: 'a')", "`models.1`: expected"],
        ),
        ("merge_method: linear\nmodels: a", ["`models`: expected a list such as [{model: path}] (given: 'a')"]),
        (
            "merge_method: linear\nmodels: {model: a}",
            ["`models`: expected a list such as [{model: path}] (given: {'model': 'a'})"],
        ),
        (
            "merge_method: linear\nslices: [a]",
            ["`slices.0`: expected a mapping such as {sources: [{model: path, lay"],
        ),
        ("merge_method: linear\nslices: [{sources: a}]", ["`slices.0.sources`: expected a list"]),
        ("merge_method: linear\nslices: [{sources: [a]}]", ["`slices.0.sources.0`: expected a mapping"]),
        (
            "merge_method: linear\nmodels: [{model: [a]}]",
            ["`models.0.model`: expected a model: a folder, a URL or a hub id"],
        ),
        ("merge_method: linear\nmodels: [{model: }]", ["`models.0.model`: expected a model"]),
        (LINEAR + "tokenizer: base", ["`tokenizer`: expected a mapping such as {source: base}"]),
        (LINEAR + "parameters: {1: 2}", ["`parameters`: the key 1 is not the name of a parameter", "{weight: 0.5}"]),
        (LINEAR + "parameters: 3", ["`parameters`: expected names and values, such as {weight: 0.5} (given: 3)"]),
        *(
            (
                f"merge_method: linear\nslices: [{{sources: [{{model: a, layer_range: {given}}}]}}]",
                [
                    "`slices.0.sources.0.layer_range`:",
                    "expected two whole numbers, the first layer and the one after the last, as [0, 16] (given: ",
                ],
            )
            for given in ("[0, 1, 2]", "[0]", "3", "[a, b]", "[0, 1.5]", "[false, true]")
        ),
        (
            f"merge_method: linear\nslices: [{{sources: [{SLICE}], residual_weight: 0.3}}]",
            ["`slices.0.residual_weight`:", "remove the key"],
        ),
        (
            f"merge_method: linear\nslices: [{{sources: [{SLICE}], base_model: a}}]",
            ["`slices.0.base_model`:", "`base_model` at the top"],
        ),
        (
            LINEAR + "dtype: float32\ndtype: bfloat16",
            ["merge.yml: the key `dtype` stands twice, in line 3 and in line 4: keep one"],
        ),
        (LINEAR + "parameters:\n  weight: 1\n  weight: 2", ["the key `weight` stands twice, in line 4 and in line 5"]),
        (LINEAR + "parameters: {weight: 1, weight: 2}", ["the key `weight` stands twice, in line 3 and in line 3"]),
        (LINEAR + "parameters: {weight: true}", ["`parameters.weight`: True is not a number"]),
        (
            LINEAR + "parameters: {weight: '0.5'}",
            ["`parameters.weight`: '0.5' is not a number: give one, without quotes"],
        ),
        (LINEAR + "parameters: {normalize: 1}", ["`parameters.normalize`: 1 is not true or false"]),
        (LINEAR + "parameters: {normalize: 'yes'}", ["`parameters.normalize`: 'yes' is not true or false"]),
        (
            LINEAR.replace("linear", "karcher") + "parameters: {max_iter: '3'}",
            ["`parameters.max_iter`: '3' is not a whole number"],
        ),
        (
            LINEAR + "chat_template: '{{ messages'",
            ["`chat_template`: it is not a valid Jinja template (line 1: ", "mend it"],
        ),
        ("merge_method: linear\nmodels: [{modle: a}]", ["unknown key `models.0.modle`: did you mean 'model'?"]),
        ("merge_method: linear\nmodels: [{model: {pth: a}}]", ["unknown key `models.0.model.pth`", "'path'"]),
        ("merge_method: linear\nmodels: [{model: 3}]", ["`models.0.model`", "given: 3"]),
        ("merge_method: linear\nmodels: [{model: a}, {model: ./a}]", ["`models.1.model`: './a' is given twice"]),
        (
            "merge_method: linear\nmodels: [{model: a+lora}]",
            ["`models.0.model`: 'a+lora' asks for the adapter 'lora' on 'a'", "merge_and_unload"],
        ),
        (
            "merge_method: linear\nmodels: [{model: {model: {path: a}, lora: {path: x}}}]",
            ["`models.0.model.lora`: adapters are not applied", "merge_and_unload"],
        ),
        (
            "merge_method: linear\nmodels: [{model: {model: a, override_architecture: X}}]",
            ["`models.0.model.override_architecture`"],
        ),
        ("merge_method: linear\nmodules: {x: {}}\n" + MODELS, ["`modules`", "give `models` or `slices`"]),
        (LINEAR + "tokenizer_source: union", ["`tokenizer_source`: 'union' makes a new vocabulary", "give base"]),
        (LINEAR + "tokenizer: {source: union}", ["`tokenizer.source`: 'union'"]),
        (LINEAR + "tokenizer: {source: a, tokens: {x: {source: b}}}", ["`tokenizer.tokens`", "neither adds nor drops"]),
        (LINEAR + "tokenizer: {source: a, pad_to_multiple_of: 8}", ["`tokenizer.pad_to_multiple_of`"]),
        (LINEAR + "tokenizer: {source: a}\ntokenizer_source: a", ["`tokenizer_source` is the older form"]),
        (LINEAR + "chat_template: auto", ["`chat_template`: auto takes the most frequent", "leave the key out"]),
        (LINEAR + "chat_template: chatml", ["`chat_template`: 'chatml' is not a template: give the Jinja text"]),
        (LINEAR + "parameters: {wieght: 1}", ["`parameters.wieght`", "takes weight and normalize", "mean 'weight'?"]),
        (LINEAR + "parameters: {density: 1}", ["`parameters.density`: the merge method 'linear' takes", "remove"]),
        (TIES.replace("{weight: 1}", "{weight: 1, scale: 2}"), ["`parameters.scale`", "normalize and lambda"]),
        (LINEAR + "parameters: {weight: heavy}", ["`parameters.weight`: 'heavy' is not a number", "without quotes"]),
        (LINEAR + "parameters: {weight: }", ["`parameters.weight`: there is no value"]),
        (LINEAR + "parameters: {weight: []}", ["`parameters.weight`: the list is empty"]),
        (LINEAR + "parameters: {weight: [1, x]}", ["`parameters.weight.1`: 'x' is not a number"]),
        (LINEAR + "parameters: {normalize: [true, false]}", ["`parameters.normalize`: a list is a gradient"]),
        (
            TIES.replace("{weight: 1}", "{weight: 1, density: [0.5, 1.5]}"),
            ["`parameters.density.1`: Input should be less than or equal to 1 (given: 1.5)"],
        ),
        (
            LINEAR + "parameters: {weight: [{filter: mlp}]}",
            ["`parameters.weight.0`: {'filter': 'mlp'} is not an entry"],
        ),
        (LINEAR + "parameters: {weight: [{filer: x, value: 1}]}", ["`parameters.weight.0`", "`filter`"]),
        (LINEAR + "parameters: {weight: [{filter: 3, value: 1}]}", ["`parameters.weight.0.filter`: 3 is not a part"]),
        (LINEAR + "parameters: {weight: [1, {value: 1}]}", ["`parameters.weight.0`: 1 is not an entry"]),
        (
            LINEAR + "parameters: {weight: [{value: 1}, {filter: mlp, value: 2}]}",
            ["`parameters.weight.1`: the entry before it holds for all tensors", "put that one last"],
        ),
        (
            LINEAR + "parameters: {weight: [{filter: mlp, value: [1, x]}]}",
            ["`parameters.weight.0.value.1`: 'x' is not a number"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}, {model: b}]",
            ["`models.0.parameters.normalize`: `normalize` is of the merge and not of a model", "top of the file"],
        ),
        ("merge_method: ties\n" + MODELS, ["missing key `base_model`: the merge method 'ties' needs a base"]),
        (
            "merge_method: ties\nbase_model: c\n" + MODELS,
            ["missing key `models.0.parameters.weight`, or `parameters.weight` for all", "'ties' needs it"],
        ),
        (
            "merge_method: slerp\nbase_model: a\n" + MODELS,
            ["missing key `parameters.t`: the merge method 'slerp' needs it: 0 is the base"],
        ),
        (
            "merge_method: slerp\nbase_model: c\nparameters: {t: 0.5}\n" + MODELS,
            ["`models`: the merge method 'slerp' takes one model besides the base, and 2 are given"],
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: a}]\nparameters: {weight: 1}",
            ["`models`: the merge method 'ties' takes at least one model besides the base, and 0 are given"],
        ),
        ("merge_method: karcher\nmodels: [{model: a}]", ["`models`", "at least 2 models, and 1 are given"]),
        ("merge_method: passthrough\n" + MODELS, ["`models`: the merge method 'passthrough' takes one model"]),
        (
            "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 2}}]",
            ["`models.0.parameters.scale`: the merge method 'passthrough' takes no parameters"],
        ),
        (
            TIES.replace("{model: b}", "{model: c, parameters: {density: 0.5}}"),
            ["`models.1.parameters`: it is the base model", "remove them"],
        ),
        (
            "merge_method: varm\nbase_model: c\nparameters: {granularity: [{filter: mlp, value: layer}]}\n" + MODELS,
            ["`parameters.granularity`: `granularity` is one for all tensors"],
        ),
        (
            "merge_method: varm\nbase_model: c\nparameters: {temperature: [0.5, 1]}\n" + MODELS,
            ["`parameters.temperature`: `temperature` is one for all tensors"],
        ),
        (
            "merge_method: varm\nbase_model: c\nparameters: {granularity: row}\n" + MODELS,
            ["`parameters.granularity`: Input should be 'parameter', 'matrix', 'layer' or 'model'", "row"],
        ),
        (
            f"merge_method: varm\nbase_model: c\nslices: [{{sources: [{SLICE}], parameters: {{square: false}}}}]",
            ["`slices.0.parameters.square`: `square` is of the whole merge"],
        ),
        (
            "merge_method: varm\nbase_model: c\nparameters: {granularity: model}\nslices: "
            "[{sources: [{model: a, layer_range: [0, 1]}]}, {sources: [{model: b, layer_range: [1, 2]}]}]",
            ["`parameters.granularity`: model weighs the same models everywhere"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a}]}]",
            ["missing key `slices.0.sources.0.layer_range`"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]",
            ["`slices.0.sources.0`: `layer_range` [3, 1]: give the first layer and the one after the last"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]",
            ["`slices` have no layers", "[3, 4] is layer 3"],
        ),
        (
            f"merge_method: linear\nslices: [{{sources: [{SLICE}, {{model: b, layer_range: [0, 3]}}]}}]",
            ["`slices.0`: the sources have 2 and 3 layers"],
        ),
        (
            f"merge_method: slerp\nbase_model: c\nparameters: {{t: 0.5}}\nslices: [{{sources: [{SLICE}, {SLICE}]}}]",
            ["`slices.0`: list the base model among its sources"],
        ),
        (
            f"merge_method: passthrough\nslices: [{{sources: [{SLICE}, {SLICE}]}}]",
            ["`slices.0`: the merge method 'passthrough' takes one model, and 2 are given"],
        ),
        (f"merge_method: linear\nslices: [{{source: [{SLICE}]}}]", ["`slices.0.source`: did you mean 'sources'?"]),
    ],
)
def test_each_refusal_names_the_key_and_says_what_to_do(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_numbers_as_mergekit_s_users_write_them(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, LINEAR.replace("linear", "multislerp") + "parameters: {eps: 1e-8, weight: [1E-1, 5.e-1, +2e0]}"
    )
    assert by_name(recipe, 3)[layer(1)].parameters["eps"] == 1e-8
    assert by_name(recipe, 3)[layer(1)].parameters["weight"] == (0.5, 0.5)


def test_a_chat_template_may_use_what_transformers_gives_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert load(tmp_path, LINEAR + f"chat_template: '{template}'").chat_template == template


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the merge file .*absent.yml.*jobs/configs/merge/fusechat_sce"):
        load_recipe(tmp_path / "absent.yml")
    assert (ROOT / "jobs/configs/merge/fusechat_sce.yml").exists()


def test_shipped_files_hold_no_secret_and_no_machine_s_path() -> None:
    for path in SHIPPED:
        assert not re.search(r"(sk-|hf_|AKIA|AIza)[A-Za-z0-9]{16,}|: [/~]", path.read_text(encoding="utf-8"))


# the pure parts

numbers = st.floats(-10, 10)


@given(values=st.lists(numbers, min_size=2, max_size=9), place=st.floats(0, 1))
def test_a_gradient_stays_between_its_values_and_meets_them(values: list[float], place: float) -> None:
    found = interpolate(values, place)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    assert interpolate(values, 0.0) == values[0]
    assert interpolate(values, 1.0) == values[-1]
    for number, value in enumerate(values):
        assert interpolate(values, number / (len(values) - 1)) == pytest.approx(value, abs=1e-9)
    assert interpolate(values[::-1], 1 - place) == pytest.approx(found, abs=1e-6)
    assert interpolate([values[0]] * len(values), place) == values[0]


@given(
    name=st.text("abc.", max_size=12),
    filters=st.lists(st.text("abc.*", min_size=1, max_size=3), max_size=4),
    rest=st.booleans(),
)
def test_the_first_filter_that_is_a_part_of_the_name_counts(name: str, filters: list[str], rest: bool) -> None:
    setting = tuple(Choice((number,), text) for number, text in enumerate(filters)) + ((Choice((-1,)),) if rest else ())
    matching = [number for number, text in enumerate(filters) if text == "*" or text in name]
    assert value_at(setting, name, 0.5) == (matching[0] if matching else -1 if rest else None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("transformer.h.11.attn.c_attn.bias", ("transformer.h", 11, "attn.c_attn.bias")),
        ("h.0.ln_1.weight", ("h", 0, "ln_1.weight")),
        ("transformer.blocks.2.norm.weight", ("transformer.blocks", 2, "norm.weight")),
        ("model.layers.1.experts.7.w1.weight", ("model.layers", 1, "experts.7.w1.weight")),
        ("encoder.block.2.layer.0.w", ("encoder.block", 2, "layer.0.w")),
        ("lm_head.weight", None),
        ("score.0.weight", None),
    ],
)
def test_layers_are_known_by_their_names(name: str, found: tuple[str, int, str] | None) -> None:
    assert in_stack(name) == found


def test_what_comes_before_the_layers() -> None:
    before = ["model.embed_tokens.weight", "gpt_neox.embed_in.weight", "transformer.wte.weight", "wpe.weight"]
    before += ["transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.bias"]
    after = ("lm_head.weight", "embed_out.weight", "model.norm.weight", "transformer.ln_f.bias", "final_norm.weight")
    assert [comes_before_layers(name) for name in (*before, *after)] == [True] * len(before) + [False] * len(after)

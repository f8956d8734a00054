"""Whatever is read at a time, in however many threads, into however many shards: every method merges to the same bytes and the same report."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from fusion_ray.merge_yaml import load_recipe
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import takes
from fusion_ray.store import Artifact
from fusion_ray.workers.merge_job import merge_locally
from fusion_ray.workers.merge_plan import MergeJob
from fusion_ray.workers.tensor_blocks import smallest_bound
from tests.folders import write_model
from tests.merges import write_merge

VECTORS = st.sampled_from([1, 7, 1023, 1024, 1025, 3001])
WIDTHS = st.sampled_from([1, 3, 63, 1000, 1024, 1025, 2500])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LARGE = 40_000  # elements: several of the smallest windows of three models
PARAMETERS: dict[str, dict[str, object]] = {
    "slerp": {"t": [0.2, 0.7]},
    "linear": {"weight": 0.4, "normalize": False},
    "sce": {"select_topk": 0.3, "variant": "mergekit"},
    "varm": {"granularity": "layer"},
    "model_stock": {"filter_wise": True},
    "ties": {"weight": 0.4, "density": 0.3},
    "task_arithmetic": {"weight": 0.4},
    **{name: {"weight": 0.4, "density": 0.6, "seed": 3} for name in ("dare_linear", "dare_ties")},
    **{name: {"weight": 0.4, "density": 0.6, "epsilon": 0.1} for name in ("della", "della_linear")},
    **{name: {"weight": 0.4, "density": 0.6, "gamma": 0.05} for name in ("breadcrumbs", "breadcrumbs_ties")},
}
VARIANTS = [
    *METHODS,
    "sce paper",
    "sce fusechat_release",
    "varm parameter",
    "varm model",
    "model_stock whole",
    "multislerp base",
]


@dataclass(frozen=True)
class Split:
    times: int  # of the least bound
    threads: int
    shard: int


SPLITS = st.builds(Split, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 30_000, 200_000, 1 << 30]))


@dataclass(frozen=True)
class Given:
    seed: int
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]  # of the base and of each target

    @property
    def longest_row(self) -> int:
        return max(shape[-1] for shape in self.shapes.values())


@st.composite
def givens(draw: st.DrawFn) -> Given:
    width = draw(WIDTHS)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (LARGE // width + draw(st.integers(0, 2)), width),
        "model.norm.weight": (draw(VECTORS),),
    }
    for layer in range(2):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (draw(st.integers(1, 9)), draw(WIDTHS))
        shapes[f"model.layers.{layer}.norm.weight"] = (draw(VECTORS),)
    return Given(draw(st.integers(0, 1000)), shapes, (draw(DTYPES), draw(DTYPES), draw(DTYPES)))


def recipe_of(variant: str, folder: Path) -> Path:
    method, _, choice = variant.partition(" ")
    targets = ("a",) if takes(method).most == 1 else ("a", "b")
    parameters = dict(PARAMETERS.get(method, {}))
    if method in ("sce", "varm") and choice:
        parameters["variant" if method == "sce" else "granularity"] = choice
    if choice == "whole":
        parameters["filter_wise"] = False
    based = takes(method).base == "needed" or choice == "base"
    return write_merge(
        folder / "merge.yml",
        method,
        {name: {} for name in targets},
        parameters=parameters,
        **({"base_model": "base"} if based else {}),
    )


def merged(job: MergeJob) -> tuple[dict[str, tuple[torch.dtype, bytes]], bytes]:
    """The bytes of every tensor, and of the report."""
    out = Artifact("memory://splits", "merge", "k")
    manifest = merge_locally(out, job, report=lambda figures: None)
    tensors: dict[str, tuple[torch.dtype, bytes]] = {}
    for unit in manifest.units:
        if unit.name.endswith(".safetensors"):
            for name, tensor in load(out.read_bytes(unit.name)).items():
                tensors[name] = (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    report = out.read_bytes("merge_report.json")
    MemoryFileSystem.store.clear()
    return tensors, report


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(models=givens(), split=SPLITS, out_dtype=st.sampled_from(["pivot", "float32", "bfloat16"]))
def test_every_split_gives_the_same_bytes(variant: str, models: Given, split: Split, out_dtype: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="splits"))
    try:
        generator = torch.Generator().manual_seed(models.seed)
        base = {name: torch.randn(shape, generator=generator) for name, shape in models.shapes.items()}
        for name, dtype in zip(("base", "a", "b"), models.dtypes, strict=True):
            tensors = {
                key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) * (name != "base")
                for key, tensor in base.items()
            }
            write_model(folder / name, {key: tensor.to(dtype) for key, tensor in tensors.items()})
        recipe = load_recipe(recipe_of(variant, folder))
        count = len(recipe.models)
        whole = MergeJob(
            models=tuple((model.name, model) for model in recipe.models),
            method=recipe.method,
            parameters={},
            dtype=out_dtype,
            max_bytes_in_flight=1 << 30,
            max_shard_bytes=1 << 30,
            recipe=recipe,
            files_of=recipe.pivot,
        )
        rows = 1
        if METHODS[recipe.method].whole_rows({"filter_wise": recipe.method == "model_stock"} | whole_rows_of(variant)):
            rows += models.longest_row // 1024
        bound = split.times * rows * smallest_bound(count, split.threads)
        parts = replace(whole, max_bytes_in_flight=bound, max_shard_bytes=split.shard, threads=split.threads)
        expected, report = merged(whole)
        got, report_of_parts = merged(parts)
        assert expected.keys() == got.keys()
        for name in expected:
            assert got[name] == expected[name], name
        assert report_of_parts == report
    finally:
        shutil.rmtree(folder)


def whole_rows_of(variant: str) -> dict[str, object]:
    return {"filter_wise": False} if variant.endswith("whole") else {}


def test_every_method_is_tried() -> None:
    assert {variant.split()[0] for variant in VARIANTS} == set(METHODS)

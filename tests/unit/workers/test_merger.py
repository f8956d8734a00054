"""Whole merges in this process: same bytes whatever the bound, resume after a unit, bad models, files of the folder, the report."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.config import ModelConfig
from fusion_ray.store import Artifact
from fusion_ray.workers import merge_units
from fusion_ray.workers.merge_job import merge_locally, run_merge
from fusion_ray.workers.merge_plan import MergeJob
from tests.folders import moved, random_tensors, write_model
from tests.tiny import make_tiny_model


def silent(progress):
    pass


def models(tmp_path, *, dtype=torch.bfloat16, changes=lambda tensors: tensors, **config):
    """A pivot and two targets; `changes` is laid over the second target's tensors."""
    pivot = random_tensors(0, rows=300, width=32, dtype=dtype)
    folders = {"pivot": pivot, "maths": moved(pivot, 1), "poems": changes(moved(pivot, 2, scale=0.1))}
    return tuple(
        (
            name,
            ModelConfig(
                name=name, path=str(write_model(tmp_path / name, tensors, shards=1 + (name == "maths"), **config))
            ),
        )
        for name, tensors in folders.items()
    )


def job(places, method="varm", parameters=None, *, dtype="pivot", bound=1 << 20, shard=20_000):
    return MergeJob(places, method, parameters or {}, dtype, max_bytes_in_flight=bound, max_shard_bytes=shard)


def artifact(path):
    return Artifact(str(path), "merge", "key")


def shas(manifest):
    return {unit.name: unit.sha256 for unit in manifest.units}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("varm", {}), ("varm", {"granularity": "model"}), ("sce", {"select_topk": 0.2}), ("linear", {})],
)
def test_same_bytes_whatever_the_bound(tmp_path, method, parameters):
    places = models(tmp_path)
    smallest = 1024 * 128 * 3  # one chunk of three models: the embeddings take ten of them
    found = [
        shas(
            merge_locally(
                artifact(tmp_path / f"out{bound}"), job(places, method, parameters, bound=bound), report=silent
            )
        )
        for bound in (smallest, 2 * smallest, 1 << 30)
    ]
    assert found[0] == found[1] == found[2]
    assert sum(name.endswith(".safetensors") for name in found[0]) > 2


@pytest.mark.parametrize(
    ("method", "parameters"), [("della", {"weight": 0.5, "density": 0.5}), ("model_stock", {"filter_wise": True})]
)
def test_same_figures_whatever_the_bound_where_rows_end_anywhere(tmp_path, method, parameters):
    tensors = random_tensors(0, rows=301, width=41, dtype=torch.float32)
    places = tuple(
        (name, ModelConfig(name=name, path=str(write_model(tmp_path / name, moved(tensors, seed)))))
        for seed, name in enumerate(("pivot", "maths", "poems"))
    )
    first, second = (
        merge_locally(artifact(tmp_path / f"out{bound}"), job(places, method, parameters, bound=bound), report=silent)
        for bound in (1024 * 128 * 3, 1 << 30)
    )
    assert first == second


def test_a_bound_too_small_says_the_least(tmp_path):
    with pytest.raises(
        MergeError, match="max_bytes_in_flight is 70000: merging 3 models in 1 thread takes at least 393216"
    ):
        merge_locally(artifact(tmp_path / "out"), job(models(tmp_path), bound=70_000), report=silent)


def test_the_folder_is_a_model_with_the_pivots_files(tmp_path):
    places = models(tmp_path)
    manifest = merge_locally(artifact(tmp_path / "out"), job(places, dtype="float32"), report=silent)
    names = {unit.name for unit in manifest.units}
    assert {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merge_report.json",
        "model.safetensors.index.json",
    } <= names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert not (tmp_path / "out" / "_statistics").exists()
    tensors = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    bf16 = merge_locally(artifact(tmp_path / "bf16"), job(places, shard=1 << 30), report=silent)
    assert (tmp_path / "bf16" / "config.json").read_bytes() == (tmp_path / "pivot" / "config.json").read_bytes()
    cast = load_file(tmp_path / "bf16" / "model.safetensors")  # one shard: no index
    assert "model.safetensors.index.json" not in {unit.name for unit in bf16.units}
    assert all(
        torch.equal(cast[name], tensor.bfloat16()) for name, tensor in tensors.items()
    )  # computed in float32, cast once


def test_report(tmp_path):
    def unmoved_head(tensors):
        return tensors | {"lm_head.weight": random_tensors(0, rows=300, width=32)["lm_head.weight"]}

    manifest = merge_locally(artifact(tmp_path / "out"), job(models(tmp_path, changes=unmoved_head)), report=silent)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    head = report["tensors"]["lm_head.weight"]
    assert head["weights"] == [1.0, 0.0]
    assert head["moved"][1] == head["norms"][1] == 0
    assert (head["layer"], head["kind"], head["shape"]) == (None, "lm_head.weight", [300, 32])
    up = report["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert (up["layer"], up["kind"]) == (1, "mlp.up_proj.weight")
    assert up["weights"][1] == pytest.approx(0.8, abs=0.02)  # twice the change, four times the square
    assert up["norms"][0] == pytest.approx(0.05 * math.sqrt(96 * 32), rel=0.1)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    kinds = {kind["kind"]: kind for kind in report["kinds"]}
    assert kinds["mlp.up_proj.weight"]["parameters"] == 2 * 96 * 32
    pair = [report["tensors"][f"model.layers.{n}.mlp.up_proj.weight"]["weights"][0] for n in (0, 1)]
    assert kinds["mlp.up_proj.weight"]["weights"][0] == pytest.approx(sum(pair) / 2)
    assert report["targets"] == ["maths", "poems"]
    assert report["totals"]["parameters"] == sum(
        tensor.numel() for tensor in random_tensors(0, rows=300, width=32).values()
    )
    assert 0.5 < report["fused"]["moved"] <= 1
    assert manifest.info["fused"] == report["fused"]


def test_parameter_granularity_has_no_weight_of_a_tensor(tmp_path):
    merge_locally(
        artifact(tmp_path / "out"), job(models(tmp_path), parameters={"granularity": "parameter"}), report=silent
    )
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["tensors"]["lm_head.weight"]["weights"] is None
    assert report["layers"][0]["weights"] is None


def test_goes_on_after_the_units_that_are_committed(tmp_path, monkeypatch):
    places = models(tmp_path)
    undisturbed = merge_locally(artifact(tmp_path / "whole"), job(places), report=silent)
    out = artifact(tmp_path / "out")

    def dies_after_two(function, units):
        for number, unit in enumerate(units):
            if isinstance(function, merge_units.MergeUnit) and number == 2:
                raise KeyboardInterrupt
            yield function(unit)

    with pytest.raises(KeyboardInterrupt):
        run_merge(out, job(places), spread=dies_after_two, report=silent)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(kept) == 2
    assert not out.sealed

    calls = []
    merge_shard, measure_shard = merge_units.merge_shard, merge_units.measure_shard
    monkeypatch.setattr(
        merge_units,
        "merge_shard",
        lambda models, unit, *a, **k: calls.append(unit.file) or merge_shard(models, unit, *a, **k),
    )
    monkeypatch.setattr(merge_units, "measure_shard", lambda *a: calls.append("measure") or measure_shard(*a))
    seen = []
    resumed = merge_locally(out, job(places), report=seen.append)
    assert shas(resumed) == shas(undisturbed)
    assert "measure" not in calls
    assert not set(kept) & set(calls)
    assert len(calls) == seen[-1]["total"] / 2 - 2
    assert seen[-1]["done"] == seen[-1]["total"]
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    calls.clear()
    assert merge_locally(out, job(places), report=silent) == resumed
    assert calls == []


def put(name, place, value):
    def change(tensors):
        tensors[name].view(-1)[place] = value
        return tensors

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_leave_nothing(tmp_path, value):
    places = models(tmp_path, changes=put("model.layers.1.mlp.up_proj.weight", 17, value))
    with pytest.raises(
        MergeError,
        match=r"model 'poems': tensor 'model\.layers\.1\.mlp\.up_proj\.weight' in .* holds NaN or infinite values",
    ):
        merge_locally(artifact(tmp_path / "out"), job(places), report=silent)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_truncated_target_leaves_nothing(tmp_path):
    places = models(tmp_path)
    file = tmp_path / "poems" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MergeError, match=r"model 'poems': .*model\.safetensors is truncated"):
        merge_locally(artifact(tmp_path / "out"), job(places), report=silent)
    assert not (tmp_path / "out").exists()


def test_overflow_of_the_output_type(tmp_path):
    places = models(tmp_path, changes=put("lm_head.weight", 3, 1e6))
    with pytest.raises(MergeError, match=r"tensor 'lm_head\.weight': the merged values leave the range of F16"):
        merge_locally(artifact(tmp_path / "out"), job(places, dtype="float16"), report=silent)
    assert not list((tmp_path / "out").glob("model*"))


def test_integer_tensors_are_copied_when_they_are_the_same(tmp_path):
    counts = torch.arange(5000)

    def with_counts(folder, values):
        tensors = random_tensors(0) | {"counts": values, "nothing": torch.empty(0)}
        return ModelConfig(name=folder.name, path=str(write_model(folder, tensors)))

    places = (("pivot", with_counts(tmp_path / "pivot", counts)), ("maths", with_counts(tmp_path / "maths", counts)))
    merge_locally(artifact(tmp_path / "out"), job(places, shard=1 << 30), report=silent)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["counts"], counts)
    other = counts.clone()
    other[4999] = 0
    places = (*places, ("poems", with_counts(tmp_path / "poems", other)))
    with pytest.raises(MergeError, match=r"model 'poems': tensor 'counts' .* is I64 and differs from the pivot's"):
        merge_locally(artifact(tmp_path / "other"), job(places), report=silent)


def test_merges_on_a_remote_storage(tmp_path):
    places = models(tmp_path)
    local = merge_locally(artifact(tmp_path / "out"), job(places), report=silent)
    out = Artifact("memory://merge_test/out", "merge", "key")
    assert shas(merge_locally(out, job(places), report=silent)) == shas(local)
    out.remove()


def test_parameters_of_another_method_are_refused_first(tmp_path):
    with pytest.raises(ValueError, match="'varm' takes granularity, square and temperature, not `select_topk`"):
        merge_locally(artifact(tmp_path / "out"), job((), parameters={"select_topk": 0.1}), report=silent)


MEASURE = """
import json, resource, sys
from fusion_ray.config import ModelConfig
from fusion_ray.store import Artifact
from fusion_ray.workers.merge_job import merge_locally
from fusion_ray.workers.merge_plan import MergeJob
root, bound, method, parameters = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
places = tuple((name, ModelConfig(name=name, path=f"{root}/{name}")) for name in ("pivot", "maths", "poems", "code"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_locally(Artifact(f"{root}/out", "merge", "k"), MergeJob(places, method, parameters, "pivot", bound, 1 << 30), report=lambda progress: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("method", "parameters"), [("sce", {}), ("ties", {"weight": 0.3, "density": 0.5})])
def test_memory_stays_near_the_bound_for_a_tensor_that_does_not_fit(tmp_path, method, parameters):
    """Three targets: one has no variance, and SCE then selects nothing."""
    tensor = {"w": torch.randn(6000, 1024).bfloat16()}
    write_model(tmp_path / "pivot", tensor)
    for seed, name in enumerate(("maths", "poems", "code")):
        write_model(tmp_path / name, moved(tensor, seed + 1))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(2 << 20), method, json.dumps(parameters)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    grown = int(run.stdout) * 1024
    assert grown < 24 << 20, (
        f"{grown >> 20} MB"
    )  # the four models alone are 98 MB in float32, what SCE makes of them five times that


def test_the_fused_folder_loads_in_transformers(tmp_path):
    places = []
    for seed, name in enumerate(("pivot", "maths", "poems")):
        folder = tmp_path / name
        make_tiny_model(folder, "gemma", "sentencepiece", seed=seed)
        places.append((name, ModelConfig(name=name, path=str(folder))))
    merge_locally(artifact(tmp_path / "out"), job(tuple(places), "linear", shard=200_000), report=silent)
    fused, *given = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "pivot", "maths", "poems")
    )
    targets = [model.state_dict() for model in given[1:]]
    for name, tensor in fused.state_dict().items():
        assert torch.allclose(tensor, (targets[0][name] + targets[1][name]) / 2, atol=1e-6), name
    assert fused.lm_head.weight.data_ptr() == fused.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template

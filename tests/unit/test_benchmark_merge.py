"""The benchmark of merging cannot rot: its models, its peers, its floor and its look at memory, in small. Nothing is timed here."""

import importlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion_ray.checkpoints.reader import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "jobs" / "benchmarks"
GOLDEN = Path(os.environ.get("FUSION_RAY_GOLDEN", ROOT.parent / "shared" / "golden")) / "merge"
MB = 1_000_000


@pytest.fixture(autouse=True)
def _beside_itself() -> Iterator[None]:
    """Imports as they are when the benchmark is run by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def part(name: str):
    return importlib.import_module(f"merging_speed.{name}")


@pytest.fixture
def models(tmp_path):
    return part("models").make_models(part("models").TINY, tmp_path / "models")


def test_the_sizes_are_those_of_the_issue() -> None:
    small, medium, large = part("models").SIZES
    assert round(small.parameters / 1e6) == 207
    assert round(small.bytes / 2**20) == 395
    assert medium.bytes / small.bytes == pytest.approx(4, rel=1e-3)
    assert large.bytes / small.bytes == pytest.approx(16, rel=1e-3)


def test_targets_moved_a_little_from_the_pivot_each_by_its_own_amount(models) -> None:
    tensors = {name: load_file(folder / "model.safetensors") for name, folder in models.items()}
    pivot = tensors["pivot"]
    assert {name: tuple(tensor.shape) for name, tensor in pivot.items()} == part("models").TINY.tensors
    weights = pivot["model.layers.1.mlp.up_proj.weight"].float()
    assert weights.std() == pytest.approx(0.02, rel=0.05)
    assert pivot["model.norm.weight"].float().mean() == pytest.approx(1, abs=0.05)
    for name, deviation in part("models").MOVED.items():
        moved = (tensors[name]["model.layers.1.mlp.up_proj.weight"].float() - weights).std()
        assert moved == pytest.approx(deviation, rel=0.05)


def test_a_model_is_whole_for_the_reader_and_for_transformers(models) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    size = part("models").TINY
    assert open_checkpoint(str(models["target1"]), model="target1").bytes == size.bytes
    config = AutoConfig.from_pretrained(models["target1"])
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == size.tensors
    assert len(AutoTokenizer.from_pretrained(models["target1"])) <= size.vocabulary


def test_models_are_made_once_and_always_the_same(models, tmp_path, monkeypatch) -> None:
    module = part("models")
    before = {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in models.items()}
    assert module.make_models(module.TINY, tmp_path / "models") == models
    assert {name: (models[name] / "model.safetensors").stat().st_mtime_ns for name in models} == before
    again = module.make_models(module.TINY, tmp_path / "again", ("target2",))
    content = (again["target2"] / "model.safetensors").read_bytes()
    assert content == (models["target2"] / "model.safetensors").read_bytes()
    assert module.read_once([again["target2"]]) > len(content)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    module.make_models(module.TINY, tmp_path / "models", ("pivot",))
    assert (models["pivot"] / "model.safetensors").stat().st_mtime_ns != before["pivot"]
    with pytest.raises(OSError, match=r"GB are needed and .* GB are free"):
        module.check_room(tmp_path, 1 << 60)


def test_bfloat16_is_rounded_to_the_nearest_ties_to_even() -> None:
    module = part("models")
    drawn = np.random.default_rng(0).standard_normal(10_000, np.float32)
    halfway = (np.arange(0x3F80, 0x3F90, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for values in (drawn, halfway):
        expected = torch.from_numpy(values.copy()).bfloat16()
        found = module.to_bfloat16(values)
        assert found.tolist() == expected.view(torch.int16).numpy().view(np.uint16).tolist()
        assert module.to_float32(found).tolist() == expected.float().tolist()


def test_every_setting_is_a_merge_that_this_project_reads(models, tmp_path) -> None:
    from fusion_ray.merge_yaml import load_recipe

    settings = part("settings")
    for name, setting in settings.SETTINGS.items():
        recipe = load_recipe(settings.write(setting, models, tmp_path / f"{name}.yml"))
        assert recipe.method == setting.method
        assert len(recipe.models) == (2 if name == "slerp" else 3 if not setting.base else 4)


def test_the_floor_copies_the_pivot(models, tmp_path) -> None:
    part("floor").copy(tmp_path / "out", list(models.values()))
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", models["pivot"]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def write_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_differences_are_counted_in_units_of_the_last_place(tmp_path) -> None:
    compare = part("outputs").compare
    one = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5], dtype=torch.bfloat16)
    other = torch.tensor([1.0078125, -1.0, -0.0, 2.0625, 0.5], dtype=torch.bfloat16)
    same = torch.ones(3, dtype=torch.bfloat16)
    first = write_tensors(tmp_path / "first", a=one, b=same)
    second = write_tensors(tmp_path / "second", a=other, b=same)
    assert compare(first, second) == part("outputs").Differences(8, 2, 1, 0.0625)
    assert compare(first, first) == part("outputs").Differences(8, 0, 0, 0.0)
    with pytest.raises(ValueError, match=r"do not hold the same tensors: b differ"):
        compare(first, write_tensors(tmp_path / "third", a=one))
    with pytest.raises(ValueError, match=r"b is F32"):
        compare(first, write_tensors(tmp_path / "fourth", b=same.float()))


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no {GOLDEN}")
@pytest.mark.parametrize(
    "name", ["mergekit_linear", "mergekit_ties_d0.6", "mergekit_sce_tau0.1", "mergekit_sce_tau1.0"]
)
def test_the_torch_loop_merges_as_mergekit_does(tmp_path, name: str) -> None:
    if not (GOLDEN / f"{name}.yml").exists():
        pytest.skip(f"no {name}.yml")
    part("torch_loop").merge(GOLDEN / f"{name}.yml", tmp_path / "out", torch.float32)
    found, expected = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(GOLDEN / f"expected_{name}.safetensors"),
    )
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-6)


def test_the_torch_loops_dare_keeps_its_share_and_its_mean() -> None:
    deltas = [torch.ones(40_000)]
    kept = part("torch_loop").dare_linear(deltas, {}, [{"weight": 0.2, "density": 0.6}])
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert kept.mean() == pytest.approx(1, abs=0.02)


def test_memory_is_what_the_process_and_its_children_hold_and_not_the_models(tmp_path) -> None:
    run = part("process").run
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "file").write_bytes(bytes(60 * MB))
    (tmp_path / "library").write_bytes(bytes(20 * MB))
    program = f"""
import mmap, subprocess, sys, time
def mapped(path):
    with open(path, "rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(found[::4096])
    return found
kept = mapped({str(tmp_path / "models" / "file")!r}), mapped({str(tmp_path / "library")!r}), bytearray(b"x") * {40 * MB}
subprocess.run([sys.executable, "-c", "import time; kept = bytearray(b'x') * {30 * MB}; time.sleep(0.8)"], check=True)
"""
    done = run([sys.executable, "-c", program], watch=True, leave_out=tmp_path / "models")
    assert 70 * MB < done.peak_anonymous < 95 * MB
    assert 90 * MB < done.peak_private < 130 * MB
    everything = run([sys.executable, "-c", program], watch=True)
    assert everything.peak_private > done.peak_private + 50 * MB
    assert done.seconds > 0.8
    assert done.processor > 0


def test_a_run_that_fails_says_what_it_said(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno such model"):
        part("process").run([sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"])
    with pytest.raises(RuntimeError, match="wrote no model"):
        part("sides").Side("nothing", ("true",)).merge(tmp_path / "a.yml", tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"has no mergekit .*: give the interpreter"):
        part("sides").mergekit(Path(sys.executable))


@pytest.fixture
def bench(tmp_path):
    """Both sides are a program that copies a model, and models are of the smallest size."""
    copies = tmp_path / "copies"
    copies.write_text(
        f"""#!{sys.executable}
import shutil, sys, yaml
if "--help" in sys.argv:
    sys.exit()
said = yaml.safe_load(open(sys.argv[1]))
shutil.copytree(said.get("base_model", said["models"][0]["model"]), sys.argv[2])
"""
    )
    copies.chmod(copies.stat().st_mode | stat.S_IXUSR)
    tiny = part("models").TINY
    sides = part("sides")
    return part("bench").Bench(
        work=tmp_path / "work",
        out=tmp_path / "out",
        peer=sides.Side(sides.MERGEKIT, (str(copies),), versions={"mergekit": "0"}),
        ours=sides.Side("fusion_ray", (str(copies),), ("--no-check",)),
        repeats=1,
        sizes=(tiny, replace(tiny, name="tiny_too")),
    )


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        (
            "peers",
            {"sce_vs_mergekit", "ties_vs_mergekit", "dare_vs_mergekit", "linear_vs_mergekit"}
            | {"varm_vs_linear_of_mergekit", "sce_paper_seconds", "differs_linear", "differs_ties", "differs_sce"},
        ),
        ("floor", {"varm_vs_floor", "sce_vs_floor", "start_up_seconds", "sce_seconds_nothing_compiled"}),
        ("memory", {"peak_mb", "peak_mb_4x"}),
        ("linearity", {"bytes_linearity"}),
    ],
)
def test_every_part_gives_its_figures(bench, name: str, figures: set[str]) -> None:
    benchmark = importlib.import_module("merge")
    found = benchmark.RUNS[name](bench)
    assert figures <= found.keys()
    goals = {key for key, figure in found.items() if figure["goal"]}
    assert goals <= figures | {"sce_paper_vs_floor"}
    if name == "peers":
        assert found["differs_ties"]["value"]["positions"] == 0
    text = json.loads(benchmark.said(bench, json.dumps({"versions": {}})))
    assert text["versions"] == {"mergekit": "0"}
    assert text["commands"]["fusion_ray"] == "copies MERGE.yml OUT --no-check"


def test_the_stage_is_run_on_links_to_the_models(models, tmp_path) -> None:
    stage = part("stage")
    artifact = stage.linked(models["target1"], tmp_path / "linked")
    assert artifact.sealed
    artifact.verify()
    assert os.path.samefile(artifact.path("model.safetensors"), models["target1"] / "model.safetensors")
    from fusion_ray.config import MergeMethod

    for name in importlib.import_module("merge").STAGE_SETTINGS:
        setting = part("settings").SETTINGS[name]
        MergeMethod.model_validate({"method": setting.method, **setting.whole, **setting.each})

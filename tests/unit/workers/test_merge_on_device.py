"""Merges whose tensors go to a torch device: the same artefact as without one, to the byte. The device is the processor by torch, or CUDA's."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.config import ConfigError, ModelConfig
from fusion_ray.store import Artifact
from fusion_ray.workers import find_cuda, merge_on_device
from fusion_ray.workers.find_cuda import choose_device
from fusion_ray.workers.merge_job import merge_locally
from fusion_ray.workers.merge_on_device import TorchDevice
from fusion_ray.workers.merge_plan import MergeJob
from tests.folders import moved, random_tensors, write_model

WEIGHT = {"weight": 0.5, "density": 0.3}
METHODS = [
    ("varm", {"granularity": "layer"}),
    ("sce", {"select_topk": 0.2}),
    ("linear", {}),
    ("slerp", {"t": 0.3}),
    ("model_stock", {"filter_wise": True}),
    ("ties", WEIGHT),
    ("dare_ties", WEIGHT),
    ("breadcrumbs", {**WEIGHT, "gamma": 0.1}),
    ("della", {"weight": 0.5, "density": 0.5}),
]
BOUND = 1 << 20


def models(tmp_path, *, rows=301, width=33, dtypes=(torch.bfloat16, torch.float32, torch.float16), change=lambda tensors: tensors):  # fmt: skip
    """A pivot and two targets, each stored in another type."""
    pivot = random_tensors(0, rows=rows, width=width, dtype=torch.float32)
    places = []
    for seed, (name, dtype) in enumerate(zip(("pivot", "maths", "poems"), dtypes, strict=True)):
        tensors = {key: tensor.to(dtype) for key, tensor in (moved(pivot, seed) if seed else pivot).items()}
        folder = write_model(tmp_path / name, change(tensors) if seed == 2 else tensors)
        places.append((name, ModelConfig(name=name, path=str(folder))))
    return tuple(places)


def merged(out, places, method, parameters, *, device="cpu", dtype="pivot", bound=BOUND):
    places = places[:2] if method == "slerp" else places
    job = MergeJob(places, method, parameters, dtype, bound, 50_000, threads=2, device=device)
    return merge_locally(Artifact(str(out), "merge", "key"), job, report=lambda figures: None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Opened where a merge opens CUDA's; every shard's is kept in the list."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return opens(monkeypatch, 1 << 30, request.param)


def opens(monkeypatch, memory, kind="cpu"):
    opened: list[TorchDevice] = []

    @contextmanager
    def open_one() -> Iterator[TorchDevice]:
        opened.append(TorchDevice(torch.device(kind), memory))
        yield opened[-1]

    monkeypatch.setattr(merge_on_device, "cuda_device", open_one)
    return opened


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[name for name, _ in METHODS])
def test_same_artefact_with_and_without_a_device(tmp_path, device, method, parameters):
    places = models(tmp_path)
    without = merged(tmp_path / "without", places, method, parameters)
    with_one = merged(tmp_path / "with", places, method, parameters, device="cuda")
    assert with_one == without  # every file's sha256, the report among them, and every figure
    assert len(device) == 2 * without.info["shards"], "the device was not asked"
    assert not any(each.left for each in device)


@pytest.mark.parametrize(("method", "parameters"), [("della", {"weight": 0.5, "density": 0.5}), ("model_stock", {"filter_wise": True})])  # fmt: skip
def test_same_figures_where_rows_end_anywhere(tmp_path, device, method, parameters):
    places = models(tmp_path, width=41, dtypes=(torch.float32,) * 3)
    without = merged(tmp_path / "without", places, method, parameters)
    assert merged(tmp_path / "with", places, method, parameters, device="cuda") == without


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "pivot"])
def test_every_type_is_cast_as_by_the_processor(tmp_path, device, dtype):
    places = models(tmp_path, dtypes=(torch.float64, torch.bfloat16, torch.float64))
    without = merged(tmp_path / "without", places, "task_arithmetic", {"weight": 0.3}, dtype=dtype)
    assert merged(tmp_path / "with", places, "task_arithmetic", {"weight": 0.3}, device="cuda", dtype=dtype) == without


def test_tensors_larger_than_the_device_are_left_to_the_processor(tmp_path, monkeypatch):
    opened = opens(monkeypatch, 2_000_000)  # the embeddings and the head are larger
    places = models(tmp_path)
    without = merged(tmp_path / "without", places, "sce", {})
    assert merged(tmp_path / "with", places, "sce", {}, device="cuda") == without
    assert sum(each.left for each in opened) == 4  # each measured and merged


def test_a_device_whose_memory_others_have_taken(tmp_path, monkeypatch):
    """It is full in the middle of a tensor, and of that alone."""
    opened = opens(monkeypatch, 1 << 30)
    places = models(tmp_path)
    without = merged(tmp_path / "without", places, "ties", WEIGHT)
    prepare = merge_on_device.TORCH_METHODS["ties"]

    def full(blocks, weights, **parameters):
        if blocks.name == "lm_head.weight":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(blocks, weights, **parameters)

    monkeypatch.setitem(merge_on_device.TORCH_METHODS, "ties", full)
    assert merged(tmp_path / "with", places, "ties", WEIGHT, device="cuda") == without
    assert sum(each.left for each in opened) == 1
    assert all(each._free == each._memory for each in opened)


def test_a_tensor_read_in_many_pieces(tmp_path, device):
    places = models(tmp_path, rows=4000)
    without = merged(tmp_path / "without", places, "dare_linear", WEIGHT, bound=1 << 30)
    assert merged(tmp_path / "with", places, "dare_linear", WEIGHT, device="cuda") == without


def test_bad_numbers_are_found_there_too(tmp_path, monkeypatch):
    opens(monkeypatch, 1 << 30)

    def put(value):
        def change(tensors):
            tensors["lm_head.weight"].view(-1)[17] = value
            return tensors

        return change

    places = models(tmp_path / "nan", change=put(float("nan")))
    with pytest.raises(MergeError, match=r"model 'poems': tensor 'lm_head\.weight' in .* holds NaN or infinite"):
        merged(tmp_path / "out", places, "linear", {}, device="cuda")
    places = models(tmp_path / "large", dtypes=(torch.float32,) * 3, change=put(1e6))
    with pytest.raises(MergeError, match=r"tensor 'lm_head\.weight': the merged values leave the range of F16"):
        merged(tmp_path / "out", places, "linear", {}, device="cuda", dtype="float16")
    assert not list((tmp_path / "out").glob("model*"))


def test_tensors_wait_for_each_other():
    device = TorchDevice(torch.device("cpu"), 100)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with device._place(60):
            entered.set()
            leave.wait(10)

    def follow():
        with device._place(60) as fits:
            assert fits
            followed.set()

    followed = threading.Event()
    first, second = threading.Thread(target=hold), threading.Thread(target=follow)
    first.start()
    assert entered.wait(10)
    second.start()
    with device._place(40) as fits:
        assert fits  # what is free goes to whoever fits
    assert not followed.wait(0.2)
    leave.set()
    assert followed.wait(10)
    first.join()
    second.join()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_where_there_is_none(tmp_path, monkeypatch):
    with pytest.raises(MergeError, match=r"the merge is to use a CUDA device, and torch finds none .* resources\.merge\.gpus to 0"):  # fmt: skip
        merged(tmp_path / "out", models(tmp_path), "linear", {}, device="cuda")
    with pytest.raises(ConfigError, match="--device cuda: torch finds no CUDA device on this machine"):
        choose_device("cuda")
    monkeypatch.setattr(find_cuda, "_FILES", (str(tmp_path / "nvidia*"),))
    (tmp_path / "nvidia0").touch()
    assert choose_device("auto") == "cpu"  # a driver, and a torch without CUDA


def test_torch_is_asked_only_where_the_driver_is(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(find_cuda, "_FILES", (str(tmp_path / "nvidia*"),))
    monkeypatch.setattr(find_cuda, "_torch_finds_one", lambda: asked.append(1) or True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (choose_device("auto"), choose_device("cpu"), asked) == ("cpu", "cpu", [])
    (tmp_path / "nvidia0").touch()
    assert (choose_device("auto"), choose_device("cpu"), choose_device("cuda")) == ("cuda", "cpu", "cuda")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device("auto") == "cpu"


MERGE = """
import sys
from pathlib import Path
from fusion_ray import cli
from fusion_ray.workers import find_cuda
find_cuda._FILES = ()
import fusion_ray.merge_command, fusion_ray.workers.merge_job
assert cli.main(["merge", "--no-check", *sys.argv[1:]]) == 0
print([name for name in ("torch", "ray", "transformers") if name in sys.modules])
"""


def test_a_merge_by_the_processor_loads_no_torch(tmp_path, monkeypatch):
    models(tmp_path)
    (tmp_path / "merge.yml").write_text(
        "merge_method: varm\nbase_model: pivot\nmodels: [{model: maths}, {model: poems}]\ndtype: float32\n"
    )
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    arguments = [str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MERGE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"

"""The benchmark of distilling cannot rot: its rows, the dense oracle, its look at memory and its parts, in small. Nothing is timed here."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_ray.workers.rows import Rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "jobs" / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_itself() -> Iterator[None]:
    """Imports as they are when the benchmark is run by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def part(name: str):
    return importlib.import_module(f"distilling_speed.{name}")


@pytest.fixture
def shape():
    return part("shards").Shape(tokens=24, prompt=6, vocabulary=1024)


@pytest.fixture
def shard(tmp_path, shape) -> Path:
    return part("shards").write_shard(tmp_path / "shard-00000.parquet", shape, rows=6)


@pytest.fixture
def bench(tmp_path, shape, monkeypatch):
    """Everything on the smallest model."""
    benchmark = importlib.import_module("distill")
    monkeypatch.setattr(benchmark, "SIZES", dict.fromkeys(benchmark.SIZES, benchmark.TINY))
    return benchmark.Bench(
        tmp_path / "work", repeats=1, batch=2, shape=shape, collate_rows=6, zero_size=benchmark.TINY, loss_steps=4
    )


def test_the_sizes_are_those_of_the_issue() -> None:
    benchmark = importlib.import_module("distill")
    assert [size.vocabulary for size in benchmark.SIZES.values()] == [32_000, 152_000]
    assert [round(size.parameters / 1e6) for size in benchmark.SIZES.values()] == [19, 81]
    shape = part("shards").Shape()
    assert (shape.tokens, shape.top_k, shape.positions) == (1024, 10, 896)


def test_rows_are_what_the_trainer_reads(tmp_path, shape, shard) -> None:
    rows = Rows([shard], cache=tmp_path / "cache", vocabulary=1024, max_length=24, targets=True)
    assert (len(rows), rows.empty, rows.cut) == (6, 0, 0)
    assert rows.lengths.tolist() == [24] * 6
    batch = rows.collate([[row] for row in range(6)])
    assert len(batch.position) == 6 * shape.positions
    assert batch.head_ids[:, 0].tolist() == batch.ids[:, 6:].ravel().tolist()
    assert batch.topk_logprobs is not None
    assert batch.has_target is not None
    known = np.isfinite(batch.topk_logprobs)
    assert set(known.sum(1).tolist()) == {8, 10}
    for ids, mask in zip(batch.head_ids[:, 1:], known, strict=True):
        assert len(set(ids[mask].tolist())) == mask.sum()
    assert 0.6 < np.mean(batch.head_ids[:, 0] == batch.head_ids[:, 1]) < 0.95
    assert 0.7 < batch.has_target.mean() < 1
    again = part("shards").write_shard(tmp_path / "again.parquet", shape, rows=6)
    assert again.read_bytes() == shard.read_bytes()


def test_the_dense_step_is_the_sparse_one(tmp_path, bench, shard) -> None:
    steps = part("steps")
    settings = steps.config(batch=3, tokens=24).model_copy(update={"head_chunk": 16})
    made = steps.Steps(bench.pivot(importlib.import_module("distill").TINY), [shard], cache=tmp_path, config=settings)
    losses, gradients = {}, {}
    for side in ("fusion", "dense"):
        loss = made.loss(side)
        loss.backward()
        losses[side] = float(loss.detach())
        gradients[side] = {name: parameter.grad.clone() for name, parameter in made.student.named_parameters()}
        made.student.zero_grad()
    assert losses["dense"] == pytest.approx(losses["fusion"], rel=1e-5)
    for name, expected in gradients["fusion"].items():
        torch.testing.assert_close(gradients["dense"][name], expected, rtol=1e-4, atol=1e-7)
    before = float(made.loss("sft").detach())
    assert before != pytest.approx(losses["fusion"], rel=1e-4)
    made.step("fusion")
    assert float(made.loss("fusion").detach()) < losses["fusion"]
    with pytest.raises(MemoryError, match="give a smaller --batch"):
        steps.check_memory(1 << 20, 1024, 152_000)


def test_the_published_loop_spreads_the_targets(tmp_path, shape, shard) -> None:
    collation = part("collation")
    rows = Rows([shard], cache=tmp_path / "cache", vocabulary=1024, max_length=24, targets=True)
    batches = collation.micro_batches(rows, 4)
    assert sorted(row for lines in batches for line in lines for row in line) == list(range(6))
    assert collation.collate_all(rows, batches) == 6 * shape.positions
    batch = rows.collate([[0], [1]])
    dense = collation.dense_collated(collation.listed(batch), vocabulary=1024)
    assert dense.shape == (2, 24, 1024)
    flat = dense.flatten(0, 1).float()
    assert flat.sum(1)[batch.position].tolist() == pytest.approx([1.0] * len(batch.position), abs=0.02)
    assert flat.sum() == pytest.approx(len(batch.position), rel=0.01)
    assert batch.topk_logprobs is not None
    expected = torch.softmax(torch.from_numpy(batch.topk_logprobs[3]), 0)
    found = flat[batch.position[3], batch.head_ids[3, 1:]][: len(expected)]
    torch.testing.assert_close(found[expected > 0], expected[expected > 0], rtol=0.03, atol=0)


def test_memory_is_what_a_step_takes_on_top() -> None:
    memory = part("memory")

    class Takes:
        def step(self, side: str) -> None:
            torch.ones(50 << 18).add_(1)  # 50 MiB

    kept = torch.ones(30 << 18)
    held = memory.held(Takes(), "fusion", 2)
    assert held.before > kept.nbytes
    assert 45 << 20 < held.step < 60 << 20


def test_memory_is_measured_in_a_fresh_process(tmp_path, bench, shard) -> None:
    settings = part("steps").config(batch=2, tokens=24)
    pivot = bench.pivot(importlib.import_module("distill").TINY)
    held = part("memory").measured("dense", pivot, [shard], cache=tmp_path, config=settings, out=tmp_path / "out")
    assert held.step > 24 * 2 * 1024 * 4 * 3  # targets, logits and their gradients at least
    assert held.before > held.step


@pytest.mark.parametrize(
    ("name", "goals"),
    [
        ("step", {"fusion_vs_sft_time_32k", "fusion_vs_sft_memory_32k", "fusion_vs_sft_time_152k"}),
        ("dense", {"memory_vs_dense_152k", "loss_vs_dense_32k"}),
        ("collate", {"collate_positions_per_second"}),
    ],
)
def test_every_part_gives_its_figures(bench, monkeypatch, name: str, goals: set[str]) -> None:
    benchmark = importlib.import_module("distill")
    monkeypatch.setattr(benchmark, "measured", lambda *_, **__: part("memory").Held(2, 1))
    found = benchmark.RUNS[name](bench)
    assert goals <= {key for key, figure in found.items() if figure["goal"]}
    json.dumps({key: dict(figure) for key, figure in found.items()})
    if name == "dense":
        assert found["loss_vs_dense_152k"]["value"] < 1e-5


@pytest.mark.ray  # starts eleven processes, too slow for the unit suite
def test_workers_train_and_say_so(bench, shape) -> None:
    found = importlib.import_module("distill").zero(replace(bench, shape=replace(shape, tokens=64), zero_steps=2))
    assert {"zero2_scaling_2_workers", "zero_loss_difference"} <= {key for key, each in found.items() if each["goal"]}
    assert found["zero_loss_difference"]["value"] < 1e-4

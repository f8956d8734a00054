"""The trainer in plain processes over gloo: equal gradients for any split, exact resume after SIGKILL, every ZeRO stage, a faithful export."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def _helper(name: str, path: Path):  # type: ignore[no-untyped-def]  # a module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training = _helper("training", Path(__file__).with_name("training.py"))
tiny = _helper("tiny", Path(__file__).parents[1] / "tiny.py")

pytestmark = pytest.mark.ray  # starts processes, too slow for the unit suite
FIGURES = ("sft", "fusion", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.make_tiny_model(tmp_path_factory.mktemp("pivot"), "llama", dtype="bfloat16"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(training.write_shards(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pivot: Path, shards: list[Path]) -> Path:
    work = tmp_path_factory.mktemp("undisturbed")
    training.run_training(work, pivot, shards, training.config())
    return work


def reports(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "reports.jsonl").read_text().splitlines()]


def sha256(work: Path) -> str:
    return hashlib.sha256((work / "export" / "model.safetensors").read_bytes()).hexdigest()


def assert_close(first: list[dict[str, float]], second: list[dict[str, float]], tolerance: float) -> None:
    assert len(first) == len(second) == 8
    for a, b in zip(first, second, strict=True):
        assert [a[name] for name in FIGURES] == pytest.approx([b[name] for name in FIGURES], rel=tolerance)


def test_losses_fall_and_steps_are_reported(undisturbed: Path) -> None:
    facts = json.loads((undisturbed / "facts.json").read_text())
    assert [line["done"] for line in reports(undisturbed)] == list(range(1, 9))
    assert facts["epochs"][1]["sft"] < facts["epochs"][0]["sft"] - 0.5
    assert (facts["rows"], facts["rows_empty"], facts["steps"]) == (19, 1, 8)
    assert facts["rows_cut"] > 0


def test_first_step_equals_an_independent_computation(undisturbed: Path, pivot: Path, shards: list[Path]) -> None:
    """The whole path - reader, shift, sparse objective, global mean - against plain transformers logits and the dense objective, by row."""
    from fusion_ray.workers.schedule import Schedule

    reference = _helper("reference_losses", Path(__file__).parents[1] / "reference" / "losses.py")
    settings = training.config()
    table = [row for path in shards for row in pq.read_table(path).to_pylist() if row["position"]]
    lengths = torch.tensor([min(len(row["ids"]), settings.max_length) for row in table]).numpy()
    plan = Schedule(lengths, batch_size=6, micro_batch_size=2, epochs=2, world_size=1, seed=7).step(0)
    model = AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.float32)
    fusion = nll = count = distilled = 0.0
    for number in plan.rows:
        row = table[number]
        logits = model(torch.tensor([row["ids"]])).logits[0].detach().double()
        for n, at in enumerate(row["position"]):
            if at + 1 >= settings.max_length:
                continue
            nll -= float(torch.log_softmax(logits[at], 0)[row["ids"][at + 1]])
            count += 1
            if row["has_target"][n]:
                part = slice(n * training.K, (n + 1) * training.K)
                ids, logprobs = row["topk_ids"][part], row["topk_logprobs"][part]
                fusion += float(
                    reference.dense_divergence(logits[at], ids, logprobs, "ce", tail="renormalise", temperature=1.0)
                )
                distilled += 1
    first = reports(undisturbed)[0]
    assert first["sft"] == pytest.approx(nll / count, rel=1e-5)
    assert first["fusion"] == pytest.approx(fusion / distilled, rel=1e-5)


def test_killed_and_resumed_equals_undisturbed_to_the_last_bit(
    tmp_path: Path, undisturbed: Path, pivot: Path, shards: list[Path]
) -> None:
    before = training.run_training(tmp_path, pivot, shards, training.config(), stop_after=5)
    after = training.run_training(tmp_path, pivot, shards, training.config())
    assert [line["done"] for line in before] == [1, 2, 3, 4, 5]
    assert [line["done"] for line in after] == [4, 5, 6, 7, 8]  # from the checkpoint of step 3
    whole = reports(undisturbed)
    for line in before + after:
        assert [line[name] for name in FIGURES] == [whole[line["done"] - 1][name] for name in FIGURES]
    assert sha256(tmp_path) == sha256(undisturbed)
    assert (tmp_path / "facts.json").read_text() == (undisturbed / "facts.json").read_text()


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"micro_batch_size": 6, "head_chunk": 1024}),
        (1, {"zero_stage": 1, "micro_batch_size": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3, "gradient_checkpointing": True}),
    ],
    ids=["one micro-batch", "stage 1", "2 ranks", "2 ranks, stage 3"],
)
def test_any_split_gives_the_same_training(
    tmp_path: Path, undisturbed: Path, pivot: Path, shards: list[Path], world_size: int, changes: dict[str, object]
) -> None:
    training.run_training(tmp_path, pivot, shards, training.config(**changes), world_size=world_size)
    assert_close(reports(tmp_path), reports(undisturbed), 2e-4)
    got, want = (load_file(work / "export" / "model.safetensors") for work in (tmp_path, undisturbed))
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].float() - want[name].float()).abs().max() < 4e-3 * want[name].float().abs().max()

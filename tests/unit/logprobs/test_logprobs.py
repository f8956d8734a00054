"""Flat logprobs become arrays or are refused; the codec gives rows back, in few and always the same bytes; tail mass by hand and by property."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.logprobs.codec import TeacherRow, decode, encode, from_table, to_table
from fusion_ray.logprobs.flat import CorruptLogprobsError, from_flat
from fusion_ray.logprobs.tail import log_mass, renormalise, tail_mass, with_tail
from fusion_ray.records import teacher_schema

PROMPT = [7, 8, 9]
FLAT_IDS = [8, 3, 8, 9, 1, 2]
FLAT_LOGPROBS = [-0.9, -0.7, -0.9, -5.0, -0.1, -3.0]


def flat(**changes: object) -> object:
    arguments: dict[str, object] = {"positions": 3, "prompt_ids": PROMPT, "top_k": 2} | changes
    return from_flat(arguments.pop("ids", FLAT_IDS), arguments.pop("logprobs", FLAT_LOGPROBS), **arguments)  # type: ignore[arg-type]


def test_flat_logprobs_by_hand() -> None:
    top = flat()
    assert top.ids.tolist() == [[3, 8], [1, 2]]
    assert top.label_logprob.tolist() == pytest.approx([-0.9, -5.0])
    assert top.logprobs.tolist() == [pytest.approx([-0.7, -0.9]), pytest.approx([-0.1, -3.0])]
    assert top.finite
    assert top.at(np.array([1])).ids.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": 2}, "came back with 2 positions"),
        ({"ids": FLAT_IDS[:-1], "logprobs": FLAT_LOGPROBS[:-1]}, "5 tokens"),
        ({"top_k": 3}, "expected 3, 8 and 8"),
        ({"prompt_ids": [7, 8, 6]}, "position 2 of the prompt is token 6, the engine answered for token 9"),
        ({"logprobs": [-0.9, -0.9, -0.7, -5.0, -0.1, -3.0]}, "not in descending order"),
        ({"logprobs": [-0.5, -0.7, -0.9, -5.0, -0.1, -3.0]}, "a label is likelier"),
    ],
)
def test_a_corrupted_answer_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CorruptLogprobsError, match=words):
        flat(**changes)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_seen(bad: float) -> None:
    assert not flat(logprobs=[-0.9, -0.7, -0.9, bad, -0.1, -3.0]).finite


def random_row(rng: np.random.Generator, name: str, positions: int, top_k: int) -> TeacherRow:
    starts = np.cumsum(rng.integers(1, 6, positions)).astype(np.int32)
    logprobs = -np.sort(rng.exponential(3, (positions, top_k)), axis=1)
    return TeacherRow(
        name,
        rng.integers(0, 50_000, 2 * positions + 3).astype(np.int32),
        np.arange(positions, dtype=np.int32) + positions,
        starts,
        starts + 2,
        np.ones(positions, np.int16),
        rng.integers(0, 50_000, (positions, top_k)).astype(np.int32),
        logprobs.astype(np.float16),
        -rng.exponential(2, positions).astype(np.float32),
    )


@given(sizes=st.lists(st.integers(0, 30), max_size=6), top_k=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_codec_gives_back_every_row(sizes: list[int], top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, f"row {n}", size, top_k) for n, size in enumerate(sizes)]
    table = to_table(rows, top_k=top_k)
    assert table.schema.equals(teacher_schema(top_k), check_metadata=True)
    data = encode(table)
    assert data == encode(to_table(rows, top_k=top_k))
    back = list(from_table(decode(data)))
    assert [row.id for row in back] == [row.id for row in rows]
    for row, other in zip(rows, back, strict=True):
        for name in TeacherRow.__dataclass_fields__:
            left, right = getattr(row, name), getattr(other, name)
            if name != "id":
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)


def test_a_table_of_several_chunks_or_a_slice_is_read_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = [random_row(rng, str(n), 5, 3) for n in range(6)]
    table = to_table(rows, top_k=3)
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2, 4)])
    for found in (pieces, table.slice(1, 5)):
        for row in from_table(found):
            np.testing.assert_array_equal(row.topk_ids, rows[int(row.id)].topk_ids)


def test_a_row_that_does_not_fit_is_named() -> None:
    row = random_row(np.random.default_rng(0), "odd", 4, 3)
    with pytest.raises(ValueError, match=r"row 'odd': topk_ids has the shape \(4, 3\), expected \(4, 5\)"):
        to_table([row], top_k=5)


def test_bytes_a_position_on_real_text() -> None:
    """45 bytes a position at K = 10 (design.md section 5): GSM8K answers under a bigram model, with noise as no two logprobs of a real model are equal."""
    data = Path(os.environ.get("FUSION_RAY_GSM8K", "../shared/data/gsm8k/train.jsonl"))
    if not data.exists():
        pytest.skip(f"{data} is not there: set FUSION_RAY_GSM8K to GSM8K's train.jsonl")
    words = [json.loads(line)["answer"].split(" ") for line in data.read_text().splitlines()[:700]]
    names = sorted({word for row in words for word in row})[:8_000]
    rng = np.random.default_rng(0)
    number = dict(zip(names, rng.permutation(8_000)[: len(names)].tolist(), strict=True))
    texts = [np.array([number[word] for word in row], np.int32) for row in words]
    unigram = np.bincount(np.concatenate(texts), minlength=8_000) + 0.01
    following: dict[int, np.ndarray] = {}
    for row in texts:
        for left, right in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            following.setdefault(left, np.zeros(8_000, np.float32))[right] += 1
    rows = []
    for n, ids in enumerate(texts[:64]):
        logits = np.stack(
            [np.log(0.1 * unigram / unigram.sum() + 0.9 * following[i] / following[i].sum()) for i in ids[:-1].tolist()]
        )
        logits += rng.normal(0, 0.5, logits.shape)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        top = np.argsort(-logits, axis=1)[:, :10]
        at = np.arange(len(ids) - 1)
        size = np.array([len(word) + 1 for word in words[n]])[1:]
        end = np.cumsum(size).astype(np.int32)
        rows.append(
            TeacherRow(
                f"{n:032x}",
                ids,
                at.astype(np.int32),
                end - size.astype(np.int32),
                end,
                np.ones(len(at), np.int16),
                top.astype(np.int32),
                np.take_along_axis(logits, top, axis=1).astype(np.float16),
                logits[at, ids[1:]].astype(np.float32),
            )
        )
    size_on_disk = len(encode(to_table(rows, top_k=10)))
    assert size_on_disk / sum(len(row.position) for row in rows) <= 45


def test_tail_mass_by_hand() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.125], [1.0, 1e-30, 1e-30]], np.float32))
    assert tail_mass(logprobs).tolist() == pytest.approx([0.125, 0.0])
    np.testing.assert_allclose(np.exp(renormalise(logprobs))[0], np.array([4, 2, 1]) / 7, rtol=1e-6)
    np.testing.assert_allclose(np.exp(with_tail(logprobs))[0], [0.5, 0.25, 0.125, 0.125], rtol=1e-6)
    assert with_tail(logprobs)[1, 3] == -np.inf
    nothing = np.full((1, 3), -np.inf, np.float32)
    assert log_mass(nothing).tolist() == [-np.inf]
    assert renormalise(nothing).tolist() == [[-np.inf] * 3]
    assert tail_mass(nothing).tolist() == [1.0]


@given(st.lists(st.floats(-60, 0), min_size=1, max_size=20))
def test_renormalised_entries_sum_to_one(values: list[float]) -> None:
    logprobs = np.array(values, np.float16)
    assert np.exp(renormalise(logprobs)).sum() == pytest.approx(1, abs=1e-5)

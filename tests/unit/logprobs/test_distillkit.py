"""DistillKit's layout: bytes worked out by hand, round trips by property, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.logprobs.distillkit import (
    FILL,
    SparseRow,
    configuration,
    index_bits,
    pack,
    read_table,
    to_table,
    unpack,
)


def row(**changes: object) -> SparseRow:
    """Four tokens; only the position that predicts the third has a distribution."""
    fields: dict[str, object] = {
        "id": "r",
        "ids": np.array([1, 2, 3, 4], np.int32),
        "position": np.array([1], np.int32),
        "topk_ids": np.array([[3, 0]], np.int32),
        "topk_logprobs": np.array([[-0.5, -1.0]], np.float16),
    }
    return SparseRow(**(fields | changes))  # type: ignore[arg-type]


def test_bits_by_hand() -> None:
    assert [index_bits(size) for size in (2, 5, 8, 9, 32_000, 151_936)] == [1, 3, 3, 4, 15, 18]
    # 3 = 011, 5 = 101, 1 = 001: 01110100 1 and seven zeros
    assert pack(np.array([[3, 5, 1]]), 3).tolist() == [[0b01110100, 0b10000000]]
    assert unpack(np.array([[0b01110100, 0b10000000]], np.uint8), 3, 3).tolist() == [[3, 5, 1]]


def test_a_row_by_hand() -> None:
    table = to_table([row()], vocabulary=5, top_k=2, dtype="float32")
    assert [str(field.type).replace("element", "item") for field in table.schema][:3] == [
        "list<item: uint64>",
        "list<item: list<item: uint8>>",
        "list<item: list<item: uint8>>",
    ]
    assert table["input_ids"].to_pylist() == [[1, 2, 3, 4]]
    assert table["labels"].to_pylist() == [[-100, -100, 3, -100]]
    values = table["compressed_logprobs"].to_pylist()[0]
    assert values[1] == [*np.array([-0.5, -1.0], "<f4").tobytes()]
    assert values[0] == values[2] == [*np.array([0, FILL], "<f4").tobytes()]
    # where nothing is known the next token is certain, and its neighbour is another token
    assert table["bytepacked_indices"].to_pylist()[0] == [[0b01000000], [0b01100000], [0b10000000]]


def test_missing_entries_become_other_tokens_of_probability_0() -> None:
    sparse = row(topk_ids=np.array([[0, 0]], np.int32), topk_logprobs=np.array([[-0.5, -np.inf]], np.float16))
    (_, ids, logprobs), *_ = read_table(
        to_table([sparse], vocabulary=5, top_k=2, dtype="float16"), configuration(5, 2, "float16")
    )
    assert (ids[1].tolist(), logprobs[1].tolist()) == ([0, 1], [-0.5, FILL])


@given(
    sizes=st.lists(st.integers(2, 20), max_size=4),
    top_k=st.integers(1, 9),
    vocabulary=st.integers(12, 200_000),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_rows_come_back(sizes: list[int], top_k: int, vocabulary: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for number, size in enumerate(sizes):
        position = np.flatnonzero(rng.random(size - 1) < 0.5).astype(np.int32)
        ids = np.stack([rng.choice(min(vocabulary, 500), top_k, replace=False) for _ in range(size - 1)])[position]
        ids = (vocabulary - 1 - ids).clip(0) if vocabulary > 500 else ids
        logprobs = -np.sort(rng.exponential(3, (len(position), top_k)), axis=1)
        rows.append(
            SparseRow(
                str(number),
                rng.integers(0, vocabulary, size).astype(np.int32),
                position,
                ids.astype(np.int32),
                logprobs.astype(np.float16),
            )
        )
    table = to_table(rows, vocabulary=vocabulary, top_k=top_k, dtype=dtype)  # type: ignore[arg-type]
    found = list(read_table(table, configuration(vocabulary, top_k, dtype)))  # type: ignore[arg-type]
    assert len(found) == len(rows)
    for (ids, topk_ids, logprobs), expected in zip(found, rows, strict=True):
        np.testing.assert_array_equal(ids, expected.ids)
        np.testing.assert_array_equal(topk_ids[expected.position], expected.topk_ids)
        np.testing.assert_array_equal(logprobs[expected.position].astype(np.float16), expected.topk_logprobs)
        assert len(topk_ids) == len(expected.ids) - 1
        assert all(len(set(line)) == top_k for line in topk_ids.tolist())
        assert np.isfinite(logprobs).all()


def test_deltas_are_summed() -> None:
    table = to_table([row()], vocabulary=5, top_k=2, dtype="float32")
    (_, _, logprobs), *_ = read_table(table, configuration(5, 2, "float32") | {"delta_encoding": True})
    assert logprobs[1].tolist() == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exact_k": 1, "residual_bins": [{"element_bits": 4}]}, "stores 1 of 2 logprobs exactly"),
        ({"polynomial_terms": [0, 1]}, "only exact ones are read"),
        ({"exact_dtype": "bfloat16"}, "'bfloat16' is not read"),
        ({"exact_dtype": "float16"}, "entry of 8 bytes, its compression_config.yaml says 4"),
        ({"d": 100_000}, "entry of 1 bytes, its compression_config.yaml says 5"),
        ({"d": "many"}, "whole numbers d, k and exact_k"),
    ],
)
def test_other_compressions_are_refused(changes: dict[str, object], words: str) -> None:
    table = to_table([row()], vocabulary=5, top_k=2, dtype="float32")
    with pytest.raises(ValueError, match=words):
        list(read_table(table, configuration(5, 2, "float32") | changes))


def test_other_files_and_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="no column 'input_ids', the columns are text"):
        list(read_table(pa.table({"text": ["a"]}), configuration(5, 2, "float32")))
    with pytest.raises(ValueError, match="row 'r' has the token id 4, the vocabulary 4 entries"):
        to_table([row()], vocabulary=4, top_k=2, dtype="float32")
    table = to_table([row()], vocabulary=5, top_k=2, dtype="float32")
    short = table.set_column(0, "input_ids", pa.array([[1, 2]], pa.list_(pa.uint64())))
    with pytest.raises(ValueError, match="row 0 has 2 tokens, 3 entries"):
        list(read_table(short, configuration(5, 2, "float32")))

"""One target from every source: the row of the source that tells a conversation best, whatever the order and whatever is missing."""

import pyarrow as pa
import pytest

from fusion_ray.records import aligned_schema
from fusion_ray.workers.align_combine import combine

K = 2


def row(
    name: str, *, loss: float, pivot: float = 1.0, mark: int = 0, tokens: int = 4, byte_loss: float | None = None
) -> dict[str, object]:
    """A row with one target id, `mark`, by which a test knows it again."""
    return {
        "id": name,
        "ids": list(range(tokens)),
        "position": [1, 2],
        "kind": [0, 0],
        "has_target": [True, True],
        "from_source": [loss < pivot] * 2,
        "topk_ids": [mark] * (2 * K),
        "topk_logprobs": [-0.5, -1.5] * 2,
        "bytes": 6,
        "source_won": loss < pivot,
        "source_ce_token": loss,
        "pivot_ce_token": pivot,
        "source_ce_byte": loss if byte_loss is None else byte_loss,
        "pivot_ce_byte": pivot,
    }


def table(*rows: dict[str, object], top_k: int = K) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=aligned_schema(top_k))


def marks(found: pa.Table) -> dict[str, int]:
    return {each["id"]: each["topk_ids"][0] for each in found.to_pylist()}


def test_each_conversation_has_its_best_source() -> None:
    a = table(row("x", loss=0.5, mark=1), row("y", loss=0.9, mark=1), row("z", loss=2.0, mark=1))
    b = table(row("x", loss=0.7, mark=2), row("y", loss=0.2, mark=2), row("z", loss=3.0, mark=2))
    found = combine({"a": a, "b": b}, unit="token")
    assert marks(found.table) == {"x": 1, "y": 2, "z": 1}
    assert found.won == {"a": 1, "b": 1}  # z is the pivot's
    assert found.table.schema.equals(aligned_schema(K), check_metadata=True)


def test_one_source_is_itself() -> None:
    a = table(row("x", loss=0.5), row("y", loss=2.0))
    assert combine({"a": a}, unit="byte").table.equals(a)


def test_the_unit_chooses() -> None:
    a, b = table(row("x", loss=0.5, byte_loss=0.9, mark=1)), table(row("x", loss=0.6, byte_loss=0.1, mark=2))
    assert marks(combine({"a": a, "b": b}, unit="token").table) == {"x": 1}
    assert marks(combine({"a": a, "b": b}, unit="byte").table) == {"x": 2}


def test_ties_go_to_the_first_and_what_is_not_a_number_comes_last() -> None:
    a, b = table(row("x", loss=0.5, mark=1)), table(row("x", loss=0.5, mark=2))
    assert marks(combine({"a": a, "b": b}, unit="byte").table) == {"x": 1}
    assert marks(combine({"b": b, "a": a}, unit="byte").table) == {"x": 2}
    broken = table(row("x", loss=float("nan"), mark=1))
    assert marks(combine({"a": broken, "b": b}, unit="byte").table) == {"x": 2}


def test_a_row_that_one_source_lacks_is_the_other_s() -> None:
    a, b = table(row("x", loss=0.5, mark=1)), table(row("w", loss=0.1, mark=2), row("x", loss=0.9, mark=2))
    assert marks(combine({"a": a, "b": b}, unit="byte").table) == {"x": 1, "w": 2}


def test_rows_with_one_id_meet_in_their_order() -> None:
    a = table(row("x", loss=0.5, mark=1), row("x", loss=0.9, mark=3))
    b = table(row("x", loss=0.9, mark=2), row("x", loss=0.5, mark=4))
    assert [each["topk_ids"][0] for each in combine({"a": a, "b": b}, unit="byte").table.to_pylist()] == [1, 4]


def test_other_pivot_tokens_are_refused() -> None:
    a, b = table(row("x", loss=0.5)), table(row("x", loss=0.4, tokens=5))
    with pytest.raises(ValueError, match=r"row 'x' has 4 pivot tokens aligned with a and 5 aligned with b"):
        combine({"a": a, "b": b}, unit="byte")


def test_other_sizes_of_targets_are_refused() -> None:
    a, b = table(row("x", loss=0.5)), table(row("x", loss=0.4) | {"topk_ids": [1, 2], "topk_logprobs": [-1.0, -1.0]}, top_k=1)  # fmt: skip
    with pytest.raises(ValueError, match=r"different sizes \(\{'a': 2, 'b': 1\}\)"):
        combine({"a": a, "b": b}, unit="byte")

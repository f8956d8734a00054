"""One target from every source: of each conversation the aligned row of the source that tells it best (FuseLLM's MinCE over all models; paper.md 1.2).

A source's aligned row holds its distributions where its cross entropy is below the pivot's, else the pivot's own, so the row with the least source cross
entropy is the choice among all models: where no source is below the pivot, every row holds the pivot's. Called by `stages/align_combine.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fusion_ray.records import aligned_schema, pivot_of, top_k_of
from fusion_ray.workers.align_rows import numbered


@dataclass(frozen=True)
class Combined:
    """`table` is of records.aligned_schema, its rows in the order of the first source that has them; `won` counts the rows that each source won."""

    table: pa.Table
    won: dict[str, int]


def combine(tables: Mapping[str, pa.Table], *, unit: str) -> Combined:
    """Of the sources' tables of one shard, by name, the best row of every conversation that any of them holds.

    `unit` (byte or token) says what the cross entropies are a mean over. Ties go to the source that comes first. Raises ValueError for tables with
    targets of different sizes, and for rows whose pivot tokens differ.
    """
    sizes = {name: top_k_of(table.schema) for name, table in tables.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the sources hold targets of different sizes ({sizes}): align them with one teach.top_k")
    order: dict[tuple[str, int], None] = {}
    rows: dict[str, dict[tuple[str, int], int]] = {}
    for name, table in tables.items():
        rows[name] = {key: row for row, key in enumerate(numbered(table["id"].to_pylist()))}
        order |= dict.fromkeys(rows[name])
    numbers = {name: number for number, name in enumerate(tables)}
    losses = {name: table[f"source_ce_{unit}"].to_numpy() for name, table in tables.items()}
    offsets = dict(zip(tables, np.cumsum([0, *(table.num_rows for table in tables.values())]).tolist(), strict=False))
    chosen: list[int] = []
    won = dict.fromkeys(tables, 0)
    for key in order:
        holders = [name for name in tables if key in rows[name]]
        best = min(holders, key=lambda name: (_known(losses[name][rows[name][key]]), numbers[name]))
        chosen.append(offsets[best] + rows[best][key])
        won[best] += bool(tables[best]["source_won"][rows[best][key]].as_py())
    pivots = {pivot_of(table.schema) for table in tables.values()}
    schema = aligned_schema(next(iter(sizes.values())), pivot=pivots.pop() if len(pivots) == 1 else "")
    together = pa.concat_tables([table.select(schema.names).cast(schema) for table in tables.values()])
    _check_same_tokens(tables, rows)
    return Combined(together.take(pa.array(chosen, pa.int64())).combine_chunks(), won)


def _known(loss: float) -> float:
    """A cross entropy that is not a number tells nothing: it comes last."""
    return float("inf") if np.isnan(loss) else float(loss)


def _check_same_tokens(tables: Mapping[str, pa.Table], rows: Mapping[str, Mapping[tuple[str, int], int]]) -> None:
    """Rows of one conversation are one text in the pivot's tokens, whatever they were aligned with."""
    first, *others = tables
    for other in others:
        for key, row in rows[other].items():
            mine = rows[first].get(key)
            if mine is not None and len(tables[first]["ids"][mine]) != len(tables[other]["ids"][row]):
                raise ValueError(
                    f"row {key[0]!r} has {len(tables[first]['ids'][mine])} pivot tokens aligned with {first} and {len(tables[other]['ids'][row])} "
                    f"aligned with {other}: they were not aligned from the same pivot's rows; remove both artefacts and align again"
                )

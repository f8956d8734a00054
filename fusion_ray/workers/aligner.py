"""One shard aligned: the pivot's and the source's teacher rows in, aligned rows and what they cover out. Called by `stages/align.py` and, without Ray, by tests.

The same inputs give the same bytes. A row that cannot be aligned is named with its reason, never dropped in silence.
"""

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.alignment.choose import Choice, cross_entropy, source_wins_rows, source_wins_tokens
from fusion_ray.alignment.coverage import Coverage, measure
from fusion_ray.alignment.edges import Edges, find_edges, settle, texts_differ
from fusion_ray.alignment.explain import Example, example
from fusion_ray.alignment.methods import METHODS, Alignment, Setting
from fusion_ray.alignment.positions import Bools, Positions, faults
from fusion_ray.alignment.project import Projection
from fusion_ray.corpus.readers import Rejected
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.align_rows import Targets, TeacherRows, encode_aligned, join_rows, teacher_rows


@dataclass(frozen=True)
class Aligned:
    """One shard: Parquet bytes of records.aligned_schema, what they cover, and the rows that are not among them."""

    data: bytes
    coverage: Coverage
    rejected: list[Rejected]
    missing_pivot: int  # rows that only the source's shard has
    missing_source: int
    examples: list[Example]


@dataclass(frozen=True)
class Aligner:
    """Aligns shards of one pivot and one source; `method`, `choose`, `per` and `unit` are the config's."""

    setting: Setting
    method: str = "spans"
    choose: Choice = "min_ce"
    per: Literal["sequence", "token"] = "sequence"
    unit: Literal["byte", "token"] = "byte"

    def align(self, pivot_table: pa.Table, source_table: pa.Table, examples: Iterable[str] = ()) -> Aligned:
        """`examples` are ids of rows to show in both tokenizations. Raises ValueError for a table that no teach stage wrote."""
        mine, theirs = join_rows(pivot_table, source_table)
        rejected: list[Rejected] = []
        pivot, source = teacher_rows(pivot_table, mine), teacher_rows(source_table, theirs)
        pivot, source = self._sound(pivot, source, rejected)
        pivot, source, edges = self._same_text(pivot, source, rejected)
        top_k = max(pivot.top_k, source.top_k)
        alignment = METHODS[self.method](pivot.positions, edges[0], source.positions, edges[1], self.setting, top_k)
        targets, one_hot = self._choose(pivot, source, alignment, top_k)
        source_won = targets.row_figures["source_won"].astype(np.bool_)
        coverage = measure(
            kind=alignment.kind,
            projection=alignment.projection,
            top1_pivot=pivot.positions.topk_ids[:, 0],
            from_source=targets.from_source,
            one_hot=one_hot,
            source_won=source_won,
            byte_count=int(targets.row_figures["bytes"].sum()),
            mapped=self.setting.mapped,
            vocabulary_source=self.setting.vocabulary_source,
            vocabulary_pivot=self.setting.vocabulary_pivot,
        )
        wanted = set(examples)
        shown = [
            example(
                row,
                pivot.positions,
                source.positions,
                name=name,
                source_won=bool(source_won[row]),
                source_index=alignment.source_index,
                kind=alignment.kind,
                vocabulary_pivot=self.setting.vocabulary_pivot,
                vocabulary_source=self.setting.vocabulary_source,
            )
            for row, name in enumerate(pivot.names)
            if name in wanted
        ]
        return Aligned(
            encode_aligned(pivot, targets),
            coverage,
            rejected,
            source_table.num_rows - len(theirs),
            pivot_table.num_rows - len(mine),
            shown,
        )

    def _sound(
        self, pivot: TeacherRows, source: TeacherRows, rejected: list[Rejected]
    ) -> tuple[TeacherRows, TeacherRows]:
        reasons: dict[int, str] = {}
        for side, rows, vocabulary in (
            ("pivot", pivot, self.setting.vocabulary_pivot),
            ("source", source, self.setting.vocabulary_source),
        ):
            for reason, mask in faults(rows.positions, vocabulary.size):
                for at in _first_of_rows(rows.positions, mask):
                    row = int(rows.positions.row[at])
                    reasons.setdefault(row, f"the {side} has {reason} at position {rows.position[at]}")
        for row in np.flatnonzero(np.bincount(pivot.positions.row, minlength=len(pivot.names)) == 0):
            reasons.setdefault(int(row), "the pivot predicts no assistant byte of it")
        return _without(pivot, source, reasons, rejected)

    def _same_text(
        self, pivot: TeacherRows, source: TeacherRows, rejected: list[Rejected]
    ) -> tuple[TeacherRows, TeacherRows, tuple[Edges, Edges]]:
        edges = self._edges(pivot.positions, source.positions)
        reasons: dict[int, str] = {}
        for side, rows, own, vocabulary in (
            ("pivot", pivot, edges[0], self.setting.vocabulary_pivot),
            ("source", source, edges[1], self.setting.vocabulary_source),
        ):
            for at in _first_of_rows(rows.positions, own.short):
                piece = vocabulary.pieces[rows.positions.label[at]]
                span = int(rows.positions.end[at] - rows.positions.start[at])
                reasons.setdefault(
                    int(rows.positions.row[at]),
                    f"the {side}'s token {rows.positions.label[at]} is {piece!r}, {len(piece)} bytes, and covers {span} at position {rows.position[at]}",
                )
        differ = texts_differ(
            pivot.positions, edges[0], self.setting.vocabulary_pivot,
            source.positions, edges[1], self.setting.vocabulary_source,
        )  # fmt: skip
        for at in _first_of_rows(pivot.positions, differ | _turns_end_elsewhere(pivot.positions, source.positions)):
            key = pivot.positions.message_key[at]
            reasons.setdefault(
                int(pivot.positions.row[at]),
                f"different text on the two sides of message {pivot.positions.message[at]} (pivot {_length(pivot.positions, key)} bytes, "
                f"source {_length(source.positions, key)} bytes), at byte {pivot.positions.start[at]}",
            )
        if not reasons:
            return pivot, source, edges
        pivot, source = _without(pivot, source, reasons, rejected)
        return pivot, source, self._edges(pivot.positions, source.positions)

    def _edges(self, pivot: Positions, source: Positions) -> tuple[Edges, Edges]:
        ours, theirs = self.setting.vocabulary_pivot, self.setting.vocabulary_source
        edges_pivot, edges_source = find_edges(pivot, ours), find_edges(source, theirs)
        return (
            settle(pivot, edges_pivot, ours, source, edges_source, theirs),
            settle(source, edges_source, theirs, pivot, edges_pivot, ours),
        )

    def _choose(
        self, pivot: TeacherRows, source: TeacherRows, alignment: Alignment, top_k: int
    ) -> tuple[Targets, Bools]:
        """The targets, and (N,) where the source won without a distribution."""
        positions, projection = pivot.positions, alignment.projection
        count = len(pivot.names)
        ce_pivot = cross_entropy(positions, source.positions, count)
        ce_source = cross_entropy(source.positions, positions, count)
        if self.per == "sequence":
            rows_won = source_wins_rows(ce_pivot, ce_source, choose=self.choose, unit=self.unit)
            won = rows_won[positions.row]
        else:
            won = source_wins_tokens(
                positions,
                source.positions,
                alignment.source_index,
                projection.known,
                choose=self.choose,
                unit=self.unit,
            ) | np.full(positions.count, self.choose == "source")
            share = np.bincount(positions.row, won, count) / np.bincount(positions.row, minlength=count)
            rows_won = share > 0.5
        from_source = won & projection.known
        has_target = from_source | ~won
        topk_ids, topk_logprobs = _topk(positions, projection, from_source, has_target, top_k)
        row_bytes = np.bincount(positions.row, positions.end - positions.start, count).astype(np.int32)
        figures: dict[str, npt.NDArray[np.generic]] = {
            "bytes": row_bytes,
            "source_won": rows_won,
            "source_ce_token": ce_source.per_token.astype(np.float32),
            "pivot_ce_token": ce_pivot.per_token.astype(np.float32),
            "source_ce_byte": ce_source.per_byte.astype(np.float32),
            "pivot_ce_byte": ce_pivot.per_byte.astype(np.float32),
        }
        targets = Targets(alignment.kind, has_target, from_source, topk_ids, topk_logprobs, figures)
        return targets, won & (~projection.known | projection.one_hot)


def align_shard(aligner: Aligner, pivot_rows: Artifact, source_rows: Artifact, out: Artifact, name: str) -> Unit:
    """Align shard `name` into `out`, unless it is there already, and return its record.

    unit.info: `coverage` (Coverage.sums), `rejected` (rows with reasons), `missing_pivot`, `missing_source`.
    Raises ValueError naming the shard for one that no teach stage wrote.
    """
    done = out.unit(name)
    if done is not None:
        return done
    try:
        result = aligner.align(read_table(pivot_rows, name), read_table(source_rows, name))
    except ValueError as error:
        raise ValueError(f"{name} of {pivot_rows.url} and {source_rows.url}: {error}") from error
    info = {
        "coverage": result.coverage.sums(),
        "rejected": [asdict(row) for row in result.rejected],
        "missing_pivot": result.missing_pivot,
        "missing_source": result.missing_source,
    }
    return out.commit_bytes(name, result.data, rows=result.coverage.rows, info=info)  # type: ignore[arg-type]


def align_examples(
    aligner: Aligner, pivot_rows: Artifact, source_rows: Artifact, wanted: Iterable[tuple[str, int]]
) -> list[Example]:
    """Rows in both tokenizations: `wanted` are shards and row numbers of the pivot's; one that was rejected is left out."""
    rows: dict[str, list[int]] = {}
    for name, row in wanted:
        rows.setdefault(name, []).append(row)
    found: list[Example] = []
    for name, numbers in rows.items():
        pivot = read_table(pivot_rows, name).take(pa.array(numbers, pa.int64()))
        found += aligner.align(pivot, read_table(source_rows, name), examples=pivot["id"].to_pylist()).examples
    return found


def read_table(rows: Artifact, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(rows.read_bytes(name)), use_threads=False)


def _topk(
    positions: Positions, projection: Projection, from_source: Bools, has_target: Bools, top_k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(N, K) the source's projected row, the pivot's own, or nothing."""
    ids = np.zeros((positions.count, top_k), np.int32)
    logprobs = np.full((positions.count, top_k), -np.inf, np.float32)
    own = has_target & ~from_source
    width = positions.topk_ids.shape[1]
    ids[own, :width] = positions.topk_ids[own]
    logprobs[own, :width] = np.minimum(positions.topk_logprobs[own], 0.0)
    ids[from_source] = projection.topk_ids[from_source]
    logprobs[from_source] = projection.topk_logprobs[from_source]
    return ids, logprobs


def _without(
    pivot: TeacherRows, source: TeacherRows, reasons: dict[int, str], rejected: list[Rejected]
) -> tuple[TeacherRows, TeacherRows]:
    keep = np.ones(len(pivot.names), np.bool_)
    keep[sorted(reasons)] = False
    rejected += [Rejected(pivot.names[row], "", 0, reasons[row]) for row in sorted(reasons)]
    return pivot.of_rows(keep), source.of_rows(keep)


def _first_of_rows(positions: Positions, mask: Bools) -> list[int]:
    """The first marked position of every row that has one."""
    marked = np.flatnonzero(mask)
    _, first = np.unique(positions.row[marked], return_index=True)
    return [int(at) for at in marked[first]]


def _turns_end_elsewhere(pivot: Positions, source: Positions) -> Bools:
    """(N,) True at an end of turn that the source sees at another byte of the same message."""
    at, theirs = np.flatnonzero(pivot.turn_ends), np.flatnonzero(source.turn_ends)
    _, mine, other = np.intersect1d(pivot.message_key[at], source.message_key[theirs], return_indices=True)
    mask = np.zeros(pivot.count, np.bool_)
    mask[at[mine[pivot.end[at[mine]] != source.end[theirs[other]]]]] = True
    return mask


def _length(positions: Positions, key: np.int64) -> int:
    of_message = positions.end[positions.message_key == key]
    return int(of_message.max()) if of_message.size else 0

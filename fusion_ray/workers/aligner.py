"""One shard aligned: the pivot's and the source's teacher rows in, aligned rows and what they cover out.

Called by `stages/align.py` and, without Ray, by the command line and tests. The same inputs give the same bytes.
A row that cannot be aligned is named with its reason, never dropped in silence.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.coverage import Coverage, measure
from fusion_ray.alignment.edges import find_edges, settle, texts_differ
from fusion_ray.alignment.explain import ExplainedRow, explained
from fusion_ray.alignment.fusechat import Sequences
from fusion_ray.alignment.methods import METHODS, PAIRS, Aligned, Side
from fusion_ray.alignment.positions import Bools, Positions, faults
from fusion_ray.alignment.shares import Shares, pair_shares
from fusion_ray.alignment.token_strings import TokenStrings
from fusion_ray.alignment.vocabulary import Vocabulary
from fusion_ray.config import AlignConfig, ConfigError, ModelConfig
from fusion_ray.corpus.readers import Rejected
from fusion_ray.store import Artifact
from fusion_ray.workers.align_rows import TeacherRows, aligned_table, encode_aligned, join_rows, teacher_rows
from fusion_ray.workers.align_setup import check_supported, load_strings, load_vocabulary, vocabulary_map


@dataclass(frozen=True)
class AlignedShard:
    """`table` is of records.aligned_schema; `missing_*` count the rows that only the other side's shard has."""

    table: pa.Table
    coverage: Coverage
    rejected: list[Rejected]
    missing_pivot: int
    missing_source: int

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def encoded(self, pivot: str = "") -> bytes:
        """The table as Parquet bytes; `pivot` is the fingerprint of the model whose tokens it holds."""
        return encode_aligned(self.table, pivot=pivot)


class Aligner:
    """Aligns the shards of one pivot and one source. Raises ConfigError for a method or a map that cannot run."""

    def __init__(
        self,
        pivot: Vocabulary,
        source: Vocabulary,
        config: AlignConfig,
        *,
        strings: tuple[TokenStrings, TokenStrings] | None = None,
        counts: PairCounts | None = None,
    ) -> None:
        """`strings` (pivot's, source's) are for the method `fusechat`, `counts` (the sum of `count` over all shards) for the maps
        `statistics` and `shares`."""
        check_supported(config)
        self.pivot = pivot
        self.source = source
        self.config = config
        self._strings = strings
        self._counts = counts

    @classmethod
    def of_models(
        cls, pivot: ModelConfig, source: ModelConfig, config: AlignConfig, counts: PairCounts | None = None
    ) -> "Aligner":
        """Raises ValueError naming a model whose tokenizer cannot be aligned."""
        strings = (load_strings(pivot), load_strings(source)) if config.method == "fusechat" else None
        return cls(load_vocabulary(pivot), load_vocabulary(source), config, strings=strings, counts=counts)

    @cached_property
    def mapped(self) -> npt.NDArray[np.int32]:
        """The vocabulary map. Raises ValueError for `statistics` and `shares` without counts."""
        return vocabulary_map(self.config, self.pivot, self.source, self._strings, self._counts)

    @cached_property
    def shares(self) -> Shares | None:
        """What goes before the map where `align.map` is `shares`."""
        if self.config.map != "shares" or self._counts is None:
            return None
        return pair_shares(self.source, self.pivot, self._counts, self.mapped)

    def count(self, pivot_rows: bytes, source_rows: bytes) -> PairCounts:
        """How often each source id meets each pivot id in a shard, as the method sees it; nothing where the vocabularies are equal."""
        if self.source.same_as(self.pivot):
            return PairCounts.none()
        _, sides, _, _ = self._read(_table(pivot_rows), _table(source_rows))
        return PairCounts.of_pairs(*PAIRS[self.config.method](*sides))

    def align(self, pivot_rows: bytes, source_rows: bytes) -> AlignedShard:
        """Both are Parquet bytes of records.teacher_schema. Raises ValueError for those that no teach stage wrote."""
        return self.align_tables(_table(pivot_rows), _table(source_rows))

    def align_tables(self, pivot_table: pa.Table, source_table: pa.Table) -> AlignedShard:
        """The same of the tables themselves."""
        pivot, sides, rejected, both = self._read(pivot_table, source_table)
        aligned = self._run(sides, len(pivot.names))
        return AlignedShard(
            aligned_table(pivot, aligned),
            measure(aligned, *sides, self.mapped, len(pivot.names)),
            rejected,
            source_table.num_rows - both,
            pivot_table.num_rows - both,
        )

    def examples(
        self, pivot_rows: bytes, source_rows: bytes, names: Collection[str] | None, count: int
    ) -> list[ExplainedRow]:
        """The rows called `names` in both tokenizations, or `count` rows spread over the shard; those that were rejected are left out."""
        pivot_table, source_table = _table(pivot_rows), _table(source_rows)
        if names is None:
            step = max(1, pivot_table.num_rows // max(1, count))
            chosen = list(range(0, pivot_table.num_rows, step))[:count]
        else:
            chosen = [row for row, name in enumerate(pivot_table["id"].to_pylist()) if name in names]
        pivot, sides, _, _ = self._read(pivot_table.take(pa.array(chosen, pa.int64())), source_table)
        aligned = self._run(sides, len(pivot.names))
        return [explained(aligned, *sides, row, name) for row, name in enumerate(pivot.names)]

    def _run(self, sides: tuple[Side, Side], rows: int) -> Aligned:
        config = self.config
        shared = {"mapped": self.mapped, "choose": config.choose, "per": config.per, "unit": config.unit}
        if config.method == "fusechat":
            return METHODS[config.method](*sides, rows, rules=config.map, **shared)
        return METHODS[config.method](
            *sides,
            rows,
            whole_tokens=config.map not in ("prefix", "canonical", "shares"),
            chain=config.chain,
            inside=config.inside,
            duplicates=config.duplicates,
            shares=self.shares,
            **shared,
        )

    def _read(
        self, pivot_table: pa.Table, source_table: pa.Table
    ) -> tuple[TeacherRows, tuple[Side, Side], list[Rejected], int]:
        """The sound rows that both tables hold: the pivot's, both sides' positions, the rejected ones, and how many both hold."""
        mine, theirs = join_rows(pivot_table, source_table)
        pivot, source = teacher_rows(pivot_table, mine), teacher_rows(source_table, theirs)
        rejected: list[Rejected] = []
        pivot, source = _without(pivot, source, self._unsound(pivot, source), rejected)
        sides = self._sides(pivot, source)
        reasons = _disagreements(pivot, source, sides)
        if reasons:
            pivot, source = _without(pivot, source, reasons, rejected)
            sides = self._sides(pivot, source)
        return pivot, sides, rejected, len(mine)

    def _sides(self, pivot_rows: TeacherRows, source_rows: TeacherRows) -> tuple[Side, Side]:
        pivot, source = pivot_rows.positions, source_rows.positions
        edges_pivot, edges_source = find_edges(pivot, self.pivot), find_edges(source, self.source)
        strings_pivot, strings_source = self._strings or (None, None)
        return (
            Side(
                pivot,
                settle(pivot, edges_pivot, self.pivot, source, edges_source, self.source),
                self.pivot,
                _sequences(pivot_rows, strings_pivot),
            ),
            Side(
                source,
                settle(source, edges_source, self.source, pivot, edges_pivot, self.pivot),
                self.source,
                _sequences(source_rows, strings_source),
            ),
        )

    def _unsound(self, pivot: TeacherRows, source: TeacherRows) -> dict[int, str]:
        """Row to the reason why nothing can be made of it, by either side alone."""
        reasons: dict[int, str] = {}
        for side, rows, vocabulary in (("pivot", pivot, self.pivot), ("source", source, self.source)):
            for reason, mask in faults(rows.positions, vocabulary.size):
                for at in _first_of_rows(rows.positions, mask):
                    row = int(rows.positions.row[at])
                    reasons.setdefault(row, f"the {side} has {reason} at position {rows.position[at]}")
            if self._strings is None:
                continue  # only positions are read
            for at in np.flatnonzero((rows.tokens < 0) | (rows.tokens >= vocabulary.size)):
                row = int(np.searchsorted(rows.token_offsets, at, side="right")) - 1
                reasons.setdefault(
                    row, f"the {side} has the token {rows.tokens[at]}, outside the vocabulary of {vocabulary.size}"
                )
        for row in np.flatnonzero(np.bincount(pivot.positions.row, minlength=len(pivot.names)) == 0):
            reasons.setdefault(int(row), "the pivot predicts no assistant byte of it")
        return reasons


def explained_row(
    pivot_rows: Artifact,
    source_rows: Artifact,
    *,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    row: str,
    counts: PairCounts | None = None,
) -> ExplainedRow:
    """The row with the id `row` in both tokenizations; `counts` as for `Aligner`.

    Raises ConfigError when no shard of both artefacts has it, or it cannot be aligned.
    """
    aligner = Aligner.of_models(pivot, source, config, counts)
    theirs = {unit.name for unit in source_rows.manifest().units}
    for unit in pivot_rows.manifest().units:
        if not unit.name.startswith("shard-") or unit.name not in theirs:
            continue
        data = pivot_rows.read_bytes(unit.name)
        if row not in pq.read_table(pa.BufferReader(data), columns=["id"], use_threads=False)["id"].to_pylist():
            continue
        found = aligner.examples(data, source_rows.read_bytes(unit.name), {row}, 1)
        if found:
            return found[0]
        raise ConfigError(f"row {row!r} cannot be aligned with {source.name!r}: see rejected.parquet of its artefacts")
    raise ConfigError(f"no row {row!r} among the rows of {pivot.name!r}: give an id of the corpus")


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def _sequences(rows: TeacherRows, strings: TokenStrings | None) -> Sequences | None:
    if strings is None:
        return None
    read = rows.token_offsets[rows.positions.row] + rows.position
    return Sequences(rows.tokens, rows.token_offsets, read, strings)


def _disagreements(pivot: TeacherRows, source: TeacherRows, sides: tuple[Side, Side]) -> dict[int, str]:
    """Row to the reason why its tokens contradict its spans, or the other side's text."""
    reasons: dict[int, str] = {}
    for name, rows, side in (("pivot", pivot, sides[0]), ("source", source, sides[1])):
        positions = side.positions
        for at in _first_of_rows(positions, side.edges.short):
            piece = side.vocabulary.pieces[positions.label[at]]
            reasons.setdefault(
                int(positions.row[at]),
                f"the {name}'s token {positions.label[at]} is {piece!r}, {len(piece)} bytes, "
                f"and covers {positions.end[at] - positions.start[at]} at position {rows.position[at]}",
            )
    mine, other = sides
    differ = texts_differ(mine.positions, mine.edges, mine.vocabulary, other.positions, other.edges, other.vocabulary)
    for at in _first_of_rows(mine.positions, differ | _turns_end_elsewhere(mine.positions, other.positions)):
        key = mine.positions.message_key[at]
        reasons.setdefault(
            int(mine.positions.row[at]),
            f"different text on the two sides of message {mine.positions.message[at]} (pivot {_length(mine.positions, key)} bytes, "
            f"source {_length(other.positions, key)} bytes), from byte {mine.positions.start[at]}",
        )
    return reasons


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

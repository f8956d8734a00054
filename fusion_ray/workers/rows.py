"""Random access to the rows of aligned shards (or teacher rows, of which only ids and positions are used) and their collation. Called by workers/trainer.py.

Parquet gives no cheap access to single rows, so each shard is written once as an uncompressed Arrow file into a cache folder on this machine's disk and
memory-mapped from there by every rank: what a rank holds of a corpus is four numbers a row, with their bytes five. Letters: B rows, T tokens, N predicting
positions, K top-k.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from fusion_ray.records import pivot_of, top_k_of

PLAIN = ("id", "ids", "position")
TARGETS = ("has_target", "from_source", "topk_ids", "topk_logprobs")
BYTES = (("byte_start", "byte_end"), ("bytes",))  # of teacher rows, of aligned rows
ROWS_A_BLOCK = 1024
SHOWN = 8  # ids in a message


@dataclass(frozen=True)
class Batch:
    """B lines of one conversation or several, padded on the right with id 0: causal attention never sees the padding from a real token.

    `position` (N,) indexes the flattened (B * T,) hidden states; `head_ids` (N, 1 + K) are the label and the target's ids (N, 1 without targets).
    `position_ids` are there where a line holds several conversations: they begin at 0 in each, which is what transformers' masks find its borders by, and
    are 0 on the padding.
    """

    ids: np.ndarray  # (B, T) int64
    position: np.ndarray  # (N,) int64
    head_ids: np.ndarray  # (N, 1 + K) int64
    topk_logprobs: np.ndarray | None = None  # (N, K) float32
    has_target: np.ndarray | None = None  # (N,) bool
    from_source: np.ndarray | None = None  # (N,) bool
    position_ids: np.ndarray | None = None  # (B, T) int64


class Rows:
    """The usable rows of the given shards, numbered from 0 in shard order.

    A row is cut to `max_length` tokens; one without a predicting position after that is not usable. Counts: `cut`, `empty`. `with_bytes` also gives the
    assistant bytes under the positions of each row (`bytes`, empty otherwise); where shards tell a row's sum alone (aligned rows), those of a cut row are
    taken in proportion to its positions.
    Raises ValueError naming file and row for a shard of another kind, an id outside [0, vocabulary), or a position outside its row, and naming both
    fingerprints for one that was aligned for another model than `pivot`.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        cache: str | Path,
        vocabulary: int,
        max_length: int,
        targets: bool,
        with_bytes: bool = False,
        pivot: str = "",
    ) -> None:
        self.max_length = max_length
        self.targets = targets
        self.with_bytes = with_bytes
        self.top_k = 0
        self.cut = 0
        self.empty = 0
        self._pivot = pivot
        self._first_empty: list[str] = []
        self._blocks: list[_Block] = []
        where, lengths, counts, sizes = [], [], [], []
        for shard in shards:
            path = self._cached(Path(shard), Path(cache))
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            for number in range(reader.num_record_batches):
                block = _Block(reader.get_batch(number), targets)
                block.check(Path(shard), vocabulary, self.top_k)
                length, count = block.measure(max_length)
                usable = np.flatnonzero(count)
                self.cut += int((np.diff(block.ids_offsets) > max_length).sum())
                self.empty += len(count) - len(usable)
                self._first_empty += [
                    block.id(row) for row in np.flatnonzero(count == 0)[: SHOWN - len(self._first_empty)]
                ]
                where.append(np.stack([np.full(len(usable), len(self._blocks)), usable], axis=1))
                lengths.append(length[usable])
                counts.append(count[usable])
                if with_bytes:
                    sizes.append(block.bytes(max_length, count)[usable])
                self._blocks.append(block)
        self._where = np.concatenate(where) if where else np.zeros((0, 2), np.int64)  # (rows, 2): block, row in it
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        self.positions = np.concatenate(counts) if counts else np.zeros(0, np.int64)
        self.bytes = np.concatenate(sizes) if sizes else np.zeros(0)

    def part(self, rows: np.ndarray) -> "Rows":
        """The given rows alone, numbered from 0 in their order; `cut` and `empty` stay those of the shards."""
        part = copy.copy(self)
        part._where, part.lengths, part.positions = self._where[rows], self.lengths[rows], self.positions[rows]
        part.bytes = self.bytes[rows] if self.with_bytes else self.bytes
        return part

    def check_empty(self, allowed: float) -> None:
        """Raises ValueError naming the first rows without a predicting position where they are more than this share of all."""
        rows = len(self) + self.empty
        if self.empty > allowed * rows:
            raise ValueError(
                f"{self.empty} of {rows} rows have no position to learn from within distill.max_length {self.max_length}, more than corpus.max_rejected "
                f"{allowed:g} allows: {', '.join(map(repr, self._first_empty))}{' and more' if self.empty > SHOWN else ''}. "
                "Raise distill.max_length if they are cut, remove them from the corpus, or raise corpus.max_rejected"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, row: int) -> str:
        block, index = self._where[row]
        return str(self._blocks[block].batch.column("id")[int(index)].as_py())

    def collate(self, lines: Sequence[Sequence[int]]) -> Batch:
        """The rows as one batch: those of a line one after the other."""
        width = max(int(self.lengths[list(line)].sum()) for line in lines)
        ids = np.zeros((len(lines), width), np.int64)
        position_ids = np.zeros_like(ids) if any(len(line) > 1 for line in lines) else None
        position, labels, topk_ids, topk_logprobs, has_target, from_source = [], [], [], [], [], []
        for row, begin in self._places(lines, width):  # `begin` counts in the flattened batch
            number, index = self._where[row]
            block, length, count = self._blocks[number], self.lengths[row], self.positions[row]
            start = block.ids_offsets[index]
            ids.reshape(-1)[begin : begin + length] = block.ids[start : start + length]
            if position_ids is not None:
                position_ids.reshape(-1)[begin : begin + length] = np.arange(length)
            first = block.position_offsets[index]
            part = slice(first, first + count)
            at = block.position[part].astype(np.int64)
            position.append(at + begin)
            labels.append(block.ids[start + at + 1])
            if self.targets:
                topk_ids.append(block.topk_ids[first * self.top_k : (first + count) * self.top_k])
                topk_logprobs.append(block.topk_logprobs[first * self.top_k : (first + count) * self.top_k])
                has_target.append(block.has_target[part])
                from_source.append(block.from_source[part])
        flat = np.concatenate(position)
        label = np.concatenate(labels).astype(np.int64)[:, None]  # (N, 1)
        if not self.targets:
            return Batch(ids, flat, label, position_ids=position_ids)
        topk = np.concatenate(topk_ids).astype(np.int64).reshape(-1, self.top_k)
        logprobs = np.concatenate(topk_logprobs).astype(np.float32).reshape(-1, self.top_k)
        source = np.concatenate(from_source).astype(bool)
        head_ids = np.concatenate([label, topk], axis=1)
        return Batch(ids, flat, head_ids, logprobs, np.concatenate(has_target).astype(bool), source, position_ids)

    def _places(self, lines: Sequence[Sequence[int]], width: int) -> Iterator[tuple[int, int]]:
        """Each row with the place of its first token in the flattened batch."""
        for b, line in enumerate(lines):
            begin = b * width
            for row in line:
                yield row, begin
                begin += int(self.lengths[row])

    def _cached(self, shard: Path, cache: Path) -> Path:
        """The shard as an Arrow file in `cache`, written now where it is not there yet; bool columns become bytes."""
        parquet = pq.ParquetFile(shard)
        columns: tuple[str, ...] = PLAIN + TARGETS if self.targets else PLAIN
        missing = [name for name in columns if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(
                f"{shard} has no column {missing[0]!r}: it is not an artefact of the align stage; set distill.fusion to none to train without targets"
            )
        if self.with_bytes:
            columns += _byte_columns(shard, parquet.schema_arrow)
        made_for = pivot_of(parquet.schema_arrow)
        if self._pivot and made_for and made_for != self._pivot:
            raise ValueError(
                f"{shard} was made for the pivot with the fingerprint {made_for}, and this training has the pivot {self._pivot}: its ids and "
                "distributions are another vocabulary's; align again with this pivot"
            )
        top_k = top_k_of(parquet.schema_arrow)
        if self.targets and self.top_k not in (0, top_k):
            raise ValueError(f"{shard} holds top-{top_k} targets, the shards before it top-{self.top_k}: align again")
        self.top_k = top_k if self.targets else 0
        kind = ("targets" if self.targets else "plain") + ("-bytes" if self.with_bytes else "")
        target = cache / f"{shard.stem}-{kind}.arrow"
        if target.exists():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        wanted = parquet.schema_arrow
        schema = pa.schema([_as_bytes(wanted.field(name)) for name in columns])
        with pa.ipc.new_file(str(temporary), schema) as writer:
            for batch in parquet.iter_batches(batch_size=ROWS_A_BLOCK, columns=list(columns)):
                writer.write_table(pa.Table.from_batches([batch]).select(list(columns)).cast(schema).combine_chunks())
        os.replace(temporary, target)
        return target


def _as_bytes(field: pa.Field) -> pa.Field:
    return field.with_type(pa.list_(pa.int8())) if field.type == pa.list_(pa.bool_()) else field


def _byte_columns(shard: Path, schema: pa.Schema) -> tuple[str, ...]:
    found = next((names for names in BYTES if all(name in schema.names for name in names)), None)
    if found is None:
        raise ValueError(
            f"{shard} has no column {BYTES[1][0]!r}: it is not an artefact of the align or the teach stage; set distill.heldout_share to 0 to train without"
        )
    return found


class _Block:
    """Views of one memory-mapped record batch."""

    def __init__(self, batch: pa.RecordBatch, targets: bool) -> None:
        self.batch = batch
        self.ids, self.ids_offsets = _flat(batch, "ids")
        self.position, self.position_offsets = _flat(batch, "position")
        if targets:
            self.has_target, self.target_offsets = _flat(batch, "has_target")
            self.from_source, _ = _flat(batch, "from_source")
            self.topk_ids, self.topk_offsets = _flat(batch, "topk_ids")
            self.topk_logprobs, _ = _flat(batch, "topk_logprobs")
        self.has_targets = targets

    def check(self, shard: Path, vocabulary: int, top_k: int) -> None:
        """Raises ValueError naming the first row whose ids or positions cannot be used with this pivot."""
        self._check_ids(shard, "ids", self.ids, self.ids_offsets, vocabulary)
        lengths = np.diff(self.ids_offsets)  # (rows,)
        counts = np.diff(self.position_offsets)
        bad = np.flatnonzero((self.position < 0) | (self.position + 1 >= np.repeat(lengths, counts)))
        if len(bad):
            row = int(np.searchsorted(self.position_offsets, bad[0], side="right")) - 1
            raise ValueError(
                f"{shard}: row {self.id(row)!r} predicts from position {self.position[bad[0]]}, but it has {lengths[row]} tokens: align again"
            )
        if not self.has_targets:
            return
        if (np.diff(self.topk_offsets) != counts * top_k).any() or (np.diff(self.target_offsets) != counts).any():
            row = int(
                np.flatnonzero(
                    (np.diff(self.topk_offsets) != counts * top_k) | (np.diff(self.target_offsets) != counts)
                )[0]
            )
            raise ValueError(
                f"{shard}: row {self.id(row)!r} has {counts[row]} positions, but {np.diff(self.topk_offsets)[row]} target ids at top-{top_k}: align again"
            )
        self._check_ids(shard, "target ids", self.topk_ids, self.topk_offsets, vocabulary)

    def measure(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and predicting positions of each row within max_length (positions are ascending, so a cut drops the last ones)."""
        lengths = np.minimum(np.diff(self.ids_offsets), max_length).astype(np.int64)
        inside = np.concatenate([[0], np.cumsum(self.position + 1 < max_length)])
        return lengths, inside[self.position_offsets[1:]] - inside[self.position_offsets[:-1]]

    def bytes(self, max_length: int, count: np.ndarray) -> np.ndarray:
        """Assistant bytes under each row's positions within max_length (rows,), of which there are `count`."""
        if "bytes" in self.batch.schema.names:
            whole = np.maximum(1, np.diff(self.position_offsets))
            return np.asarray(self.batch.column("bytes").to_numpy() * (count / whole))
        start, end = (_flat(self.batch, name)[0] for name in BYTES[0])
        inside = np.where(self.position + 1 < max_length, end - start, 0).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(inside)])
        return (sums[self.position_offsets[1:]] - sums[self.position_offsets[:-1]]).astype(np.float64)

    def _check_ids(self, shard: Path, what: str, ids: np.ndarray, offsets: np.ndarray, vocabulary: int) -> None:
        if not len(ids) or (ids.min() >= 0 and ids.max() < vocabulary):
            return
        first = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
        row = int(np.searchsorted(offsets, first, side="right")) - 1
        raise ValueError(
            f"{shard}: row {self.id(row)!r} has {what} outside the pivot's embedding of {vocabulary} rows (id {ids[first]}): "
            "these rows were made for another pivot or tokenizer; align again with this pivot"
        )

    def id(self, row: int) -> str:
        return str(self.batch.column("id")[row].as_py())


def _flat(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = batch.column(name)
    return column.values.to_numpy(), column.offsets.to_numpy()

"""Shards of conversations and of rejected rows as Parquet bytes that depend on their rows alone. Called by ingest.py, the teach stage and evaluate."""

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.corpus.readers import Rejected
from fusion_ray.records import Conversation, Message, conversation_schema, rejected_schema

REJECTED = "rejected.parquet"
GROUP = 4096  # rejected rows that wait in memory: about 3 MB at their longest
_COMPRESSION = {"compression": "zstd", "compression_level": 9}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def encode_conversations(conversations: Sequence[Conversation]) -> bytes:
    table = pa.table(
        {
            "id": [conversation.id for conversation in conversations],
            "messages": [
                [{"role": message.role, "content": message.content} for message in conversation.messages]
                for conversation in conversations
            ],
            "dataset": [conversation.dataset for conversation in conversations],
        },
        schema=conversation_schema(),
    )
    return _parquet(table)


def decode_conversations(data: bytes) -> list[Conversation]:
    return [
        Conversation(
            row["id"],
            tuple(Message(message["role"], message["content"]) for message in row["messages"]),
            row["dataset"],
        )
        for row in pq.read_table(io.BytesIO(data)).to_pylist()
    ]


def encode_rejected(rows: Sequence[Rejected]) -> bytes:
    return _parquet(_rejected_table(rows))


class RejectedFile(AbstractContextManager["RejectedFile"]):
    """A local file of rejected rows, written a group of rows at a time; whole once the context is left. `rows` counts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._waiting: list[Rejected] = []
        self._writer = pq.ParquetWriter(path, rejected_schema(), **_COMPRESSION)

    def add(self, row: Rejected) -> None:
        self.rows += 1
        self._waiting.append(row)
        if len(self._waiting) == GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(_rejected_table(self._waiting))
        self._waiting = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting and kind is None:
            self._flush()
        self._writer.close()


def _rejected_table(rows: Sequence[Rejected]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in rejected_schema().names}
    return pa.table(columns, schema=rejected_schema())


def decode_rejected(data: bytes) -> list[Rejected]:
    return [Rejected(**row) for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **_COMPRESSION)
    return sink.getvalue()

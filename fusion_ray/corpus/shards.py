"""Shards of conversations and of rejected rows as Parquet bytes that depend on their rows alone. Called by ingest.py, the teach stage and evaluate."""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.corpus.readers import Rejected
from fusion_ray.records import Conversation, Message, conversation_schema, rejected_schema

REJECTED = "rejected.parquet"


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
    columns = {name: [getattr(row, name) for row in rows] for name in rejected_schema().names}
    return _parquet(pa.table(columns, schema=rejected_schema()))


def decode_rejected(data: bytes) -> list[Rejected]:
    return [Rejected(**row) for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=9)
    return sink.getvalue()

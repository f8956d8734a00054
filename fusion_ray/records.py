"""What crosses a stage border: dataclasses and their Arrow schemas (design.md section 5). Called by every layer.

Rows are stored in shards (Parquet, zstd): shard n of every artefact of a run holds the same conversations in the same order as
shard n of the corpus, less the rows that were rejected on the way, so that stages join by `id` within a shard and never across.

Legend of letters: N predicting positions of a row, K top-k, T tokens of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else by the functions that use it: much that needs records needs no Arrow
    import pyarrow as pa

# How workers and stages tell their progress: {"done": 3, "total": 8, "unit": "shards", ...figures}. They never print.
Report = Callable[[Mapping[str, object]], None]

CORPUS_FORMAT = 1
TEACH_FORMAT = 2  # 1 cut long rows within a turn
ALIGN_FORMAT = 2
MODEL_FORMAT = 1
EVALUATE_FORMAT = 1
MERGE_FORMAT = 2
CHANGES_FORMAT = 1  # a target's statistics against its pivot


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One row of the corpus. `id` is the input's own or a stable hash of the content; `dataset` names the file it came from."""

    id: str
    messages: tuple[Message, ...]
    dataset: str = ""


class MatchKind(IntEnum):
    """How a pivot position meets the source's tokens (design.md section 6, align)."""

    STRICT = 0  # same context, and the two tokens cover the same bytes
    COMPARABLE = 1  # same context, tokens of different length
    INSIDE = 2  # the pivot token starts inside a source token
    NONE = 3  # the source has no token there (its row was cut)


def conversation_schema() -> "pa.Schema":
    import pyarrow as pa

    message = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("messages", pa.list_(message), nullable=False),
            pa.field("dataset", pa.string(), nullable=False),
        ]
    )


def rejected_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string()),  # "" where the row had none
            pa.field("dataset", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),  # line or row number in its file, from 1; 0 where unknown
            pa.field("reason", pa.string(), nullable=False),
        ]
    )


def teacher_schema(top_k: int) -> "pa.Schema":
    """One conversation under one model, in that model's own vocabulary. Lists of N entries; `topk_*` are flat lists of N * K.

    `position` i: the model, having read `ids[: i + 1]`, predicts `ids[i + 1]` (the label). `byte_start`, `byte_end`: the label's bytes within the UTF-8
    content of message number `message`; the position that predicts the end of a turn has byte_start == byte_end == the content's length.
    `topk_logprobs` and `label_logprob` are natural logarithms of normalised probabilities, so the tail mass is 1 - sum(exp(topk)).
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("ids", pa.list_(pa.int32()), nullable=False),  # (T,) the whole rendered conversation
            pa.field("position", pa.list_(pa.int32()), nullable=False),
            pa.field("byte_start", pa.list_(pa.int32()), nullable=False),
            pa.field("byte_end", pa.list_(pa.int32()), nullable=False),
            pa.field("message", pa.list_(pa.int16()), nullable=False),
            pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),  # (N * K,)
            pa.field("topk_logprobs", pa.list_(pa.float16()), nullable=False),  # (N * K,)
            pa.field("label_logprob", pa.list_(pa.float32()), nullable=False),
        ],
        metadata={"fusion_ray.top_k": str(top_k), "fusion_ray.format": str(TEACH_FORMAT)},
    )


def aligned_schema(top_k: int, *, pivot: str = "") -> "pa.Schema":
    """One conversation in the pivot's tokens with the distribution that MinCE chose at each predicting position.

    `topk_logprobs` is -inf (and `topk_ids` 0) where fewer than K ids are known. `has_target` False: no distribution at this position (the loss falls
    back to the label). `from_source`: the distribution is the source's, projected; else the pivot's own. `pivot`, where it is known, is the fingerprint
    of the model whose tokens these are.
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("ids", pa.list_(pa.int32()), nullable=False),  # (T,) pivot ids
            pa.field("position", pa.list_(pa.int32()), nullable=False),  # (N,) as in teacher_schema, for the pivot
            pa.field("kind", pa.list_(pa.int8()), nullable=False),  # (N,) MatchKind
            pa.field("has_target", pa.list_(pa.bool_()), nullable=False),
            pa.field("from_source", pa.list_(pa.bool_()), nullable=False),
            pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),  # (N * K,) pivot ids
            pa.field("topk_logprobs", pa.list_(pa.float16()), nullable=False),  # (N * K,)
            pa.field("bytes", pa.int32(), nullable=False),  # assistant bytes under the positions
            pa.field("source_won", pa.bool_(), nullable=False),  # most of the row's targets are the source's
            pa.field(
                "source_ce_token", pa.float32(), nullable=False
            ),  # nats per token of the source's own tokenization
            pa.field("pivot_ce_token", pa.float32(), nullable=False),
            pa.field("source_ce_byte", pa.float32(), nullable=False),  # bits per byte
            pa.field("pivot_ce_byte", pa.float32(), nullable=False),
        ],
        metadata={"fusion_ray.top_k": str(top_k), "fusion_ray.format": str(ALIGN_FORMAT)}
        | ({"fusion_ray.pivot": pivot} if pivot else {}),
    )


def pivot_of(schema: "pa.Schema") -> str:
    """The fingerprint of the pivot that a shard of aligned rows was made for; empty where it does not tell."""
    return (schema.metadata or {}).get(b"fusion_ray.pivot", b"").decode()


def top_k_of(schema: "pa.Schema") -> int:
    """The K that a shard was written with. Raises ValueError when the metadata is missing."""
    metadata = schema.metadata or {}
    value = metadata.get(b"fusion_ray.top_k")
    if value is None:
        raise ValueError(
            "this shard has no fusion_ray.top_k in its schema: it was not written by fusion_ray; run the stage again"
        )
    return int(value)

"""What crosses a stage border (design.md section 5): dataclasses here, the Arrow schemas of their rows in `schemas.py`. Called by every layer.

Rows are stored in shards (Parquet, zstd): shard n of every artefact of a run holds the same conversations in the same order as
shard n of the corpus, less the rows that were rejected on the way, so that stages join by `id` within a shard and never across.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

# How workers and stages tell their progress: {"done": 3, "total": 8, "unit": "shards", ...figures}. They never print.
Report = Callable[[Mapping[str, object]], None]

CORPUS_FORMAT = 1
TEACH_FORMAT = 1
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

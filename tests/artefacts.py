"""A storage with a corpus of two conversations, the teacher rows of the zoo's pivot for them (of random logprobs) and a run that names the model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.corpus.shards import REJECTED, encode_conversations, encode_rejected
from fusion_ray.corpus.spans import Locator
from fusion_ray.graph import build_graph
from fusion_ray.logprobs.codec import TeacherRow, encode, to_table
from fusion_ray.records import Conversation, Message
from fusion_ray.store import Artifact
from fusion_ray.zoo.catalogue import MODELS

PIVOT = MODELS / "pivot"
TOP_K = 4
CONVERSATIONS = (
    Conversation("r0", (Message("user", "Which city?"), Message("assistant", "Paris, of course."))),
    Conversation("r1", (Message("user", "Who?"), Message("assistant", "name: Ana"))),
)


@dataclass(frozen=True)
class Made:
    storage: str
    settings: dict[str, object]
    config: FusionConfig
    corpus: Artifact
    teach: Artifact
    rows: list[TeacherRow]

    @property
    def table(self) -> pa.Table:
        return to_table(self.rows, top_k=TOP_K)


def make(folder: Path) -> Made:
    (folder / "rows.jsonl").write_text("{}\n")
    settings: dict[str, object] = {
        "run": {"name": "t", "storage": f"{folder}/runs"},
        "pivot": {"path": str(PIVOT), "name": "pivot"},
        "sources": [{"name": "a", "path": str(MODELS / "source_neox")}],
        "corpus": {"path": f"{folder}/rows.jsonl"},
        "teach": {"top_k": TOP_K},
    }
    config = parse_config(settings)
    graph = build_graph(config)
    corpus, teach = graph.corpus.artifact, graph.teach["pivot"].artifact
    corpus.seal(
        [
            corpus.commit_bytes("shard-00000.parquet", encode_conversations(CONVERSATIONS), rows=2),
            corpus.commit_bytes(REJECTED, encode_rejected([])),
        ]
    )
    locator = Locator(AutoTokenizer.from_pretrained(PIVOT))
    rng = np.random.default_rng(0)
    rows = []
    for conversation in CONVERSATIONS:
        at = locator.locate(conversation.messages)
        count = len(at.position)
        ids = np.stack([rng.choice(500, TOP_K, replace=False) for _ in range(count)]).astype(np.int32)
        ids[::2, 0] = at.labels[::2]
        ids[::2, 1:] += 500
        logprobs = np.log(np.sort(rng.dirichlet(np.ones(TOP_K + 1), count)[:, :TOP_K], axis=1)[:, ::-1])
        labels = np.where(np.arange(count) % 2, -9, logprobs[:, 0].astype(np.float16)).astype(np.float32)
        rows.append(
            TeacherRow(
                conversation.id,
                at.ids,
                at.position,
                at.byte_start,
                at.byte_end,
                at.message,
                ids,
                logprobs.astype(np.float16),
                labels,
            )
        )
    teach.seal(
        [
            teach.commit_bytes("shard-00000.parquet", encode(to_table(rows, top_k=TOP_K)), rows=2),
            teach.commit_bytes(REJECTED, encode_rejected([])),
        ]
    )
    run = Path(config.run.storage) / "runs" / "t" / "config.yaml"
    run.parent.mkdir(parents=True)
    run.write_text(f"pivot: {{path: {PIVOT}}}\nsources: []\n")
    return Made(config.run.storage, settings, config, corpus, teach, rows)

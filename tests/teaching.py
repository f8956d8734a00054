"""What tests of teaching and of what reads it share: a small corpus, and teacher rows without an engine (real tokenizers, made-up distributions)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.spans import Locator
from fusion_ray.logprobs.codec import TeacherRow
from fusion_ray.records import Message
from fusion_ray.store import Artifact, Store
from tests.tiny import SENTENCES


def made_up_rows(
    tokenizer: PreTrainedTokenizerBase,
    contents: Sequence[str],
    *,
    top_k: int = 4,
    seed: int = 0,
    label_probability: float = 0.5,
    max_length: int = 512,
) -> list[TeacherRow]:
    """One row for each assistant content, `row-0` on; the label is the likeliest token and has `label_probability`."""
    generator = np.random.default_rng(seed)
    locator = Locator(tokenizer)
    found = []
    for number, content in enumerate(contents):
        located = locator.locate([Message("user", "Say it."), Message("assistant", content)]).cut(max_length)
        count, labels = len(located.position), located.ids[located.position + 1]
        ids = np.argsort(generator.random((count, len(tokenizer))), axis=1)[:, :top_k]
        ids = np.where(ids == labels[:, None], 0, ids)
        ids[:, 0] = labels
        rest = generator.dirichlet(np.ones(top_k), count)[:, : top_k - 1] * (1 - label_probability)
        probabilities = np.concatenate([np.full((count, 1), label_probability), -np.sort(-rest, axis=1)], axis=1)
        found.append(
            TeacherRow(
                f"row-{number}",
                located.ids,
                located.position,
                located.byte_start,
                located.byte_end,
                located.message,
                ids.astype(np.int32),
                np.log(np.maximum(probabilities, 1e-6)).astype(np.float16),
                np.full(count, np.log(label_probability), np.float32),
            )
        )
    return found


def make_corpus(folder: Path, rows: int = 48, rows_per_shard: int = 12, extra: list[dict[str, Any]] = []) -> Artifact:  # noqa: B006 never changed
    lines = []
    for number in range(rows):
        first, second = SENTENCES[number % len(SENTENCES)], SENTENCES[(5 * number + 1) % len(SENTENCES)]
        turns = [("human", f"{number}: {first}"), ("gpt", second), ("human", "And then?"), ("gpt", f"{first} {number}")]
        lines.append(json.dumps({"id": f"row-{number}", "conversations": [{"from": r, "value": v} for r, v in turns]}))
    lines += [json.dumps(row) for row in extra]
    (folder / "data.jsonl").write_text("\n".join(lines))
    corpus = Store(str(folder / "store")).artifact("corpus", 1, {}, {})
    ingest(
        corpus,
        paths=[str(folder / "data.jsonl")],
        format="auto",
        rows_per_shard=rows_per_shard,
        max_rows=None,
        max_rejected=0,
        report=lambda figures: None,
    )
    return corpus

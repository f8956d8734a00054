"""What arms of a fusion are tried on: models, the corpus that trains, held-out answers and how a model is scored. Called by `jobs/benchmarks/objective.py`.

`specialists`: two models of 1.4M parameters, one trained on GSM8K, one on the functions of Python's standard library, once in the vocabulary of the pivot and
once in another (byte-level, 2,400 and 1,024 entries), and a weak pivot of 0.8M that has seen a little of both. `zoo`: the models of `make demo`, three sources
of different architectures, tokenizers and skills, and its corpus and held-out conversations of eight categories.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import fusion_ray.zoo
from fusion_ray.corpus.rows import parse_row
from fusion_ray.corpus.spans import Locator
from fusion_ray.records import Conversation
from probe.functions import python_functions
from probe.models import MAX_LENGTH, Made, Problem, bits_of_answers, make, read_problems, write_conversations

DOMAINS = ("math", "code")
VOCABULARIES = {"same": 2400, "other": 1024}
PIVOT = Made("pivot", vocabulary=VOCABULARIES["same"], width=96, layers=3, epochs=0.15, seed=3)
TEACHERS = {
    (domain, tokenizer): Made(f"{domain}_{tokenizer}", vocabulary=size, width=128, layers=4, epochs=epochs, seed=seed)
    for tokenizer, size, seed in (("same", VOCABULARIES["same"], 1), ("other", VOCABULARIES["other"], 2))
    for domain, epochs in (("math", 1.4), ("code", 2.0))
}
ZOO = Path(fusion_ray.zoo.__file__).parent

Bits = list[tuple[float, int]]  # (bits, bytes) of each answer


@dataclass(frozen=True)
class Ground:
    """`sources` by tokenizer and name, `heldout` by domain; `bits_per_byte` of the models themselves, over what each is for."""

    pivot: Path
    sources: Mapping[str, Mapping[str, Path]]
    corpus: Path
    corpus_format: str
    learning_rate: float
    heldout: Mapping[str, Sequence[Any]]
    score: Callable[[PreTrainedModel, PreTrainedTokenizerFast, Sequence[Any]], Bits]
    bits_per_byte: Mapping[str, float]


def specialists(work: Path, data: Path, rows: int, held_out: int, *, side_by_side: int) -> Ground:
    """Models are trained in `work` unless they are there. No model learns from the first `rows` of each kind: they are the corpus."""
    functions, other_functions = python_functions()
    math_train, math_test = (read_problems(data / name) for name in ("train.jsonl", "test.jsonl"))
    train = {"math": math_train, "code": functions}
    heldout = {"math": math_test[:held_out], "code": other_functions[:held_out]}
    mixed = [problem for pair in zip(*(train[domain][:rows] for domain in DOMAINS), strict=True) for problem in pair]
    corpus = write_conversations(work / f"corpus-{rows}.jsonl", mixed, "mixed")
    learned = {domain: train[domain][rows:] for domain in DOMAINS}
    return Ground(
        pivot=work / PIVOT.name,
        sources={
            tokenizer: {domain: work / TEACHERS[domain, tokenizer].name for domain in DOMAINS}
            for tokenizer in VOCABULARIES
        },
        corpus=corpus,
        corpus_format="messages",
        learning_rate=1e-3,
        heldout=heldout,
        score=bits_of_answers,
        bits_per_byte=_make_models(work, learned, heldout, side_by_side),
    )


def _make_models(
    work: Path, learned: Mapping[str, list[Problem]], heldout: Mapping[str, list[Problem]], side_by_side: int
) -> dict[str, float]:
    """The pivot's and the teachers' held-out bits per byte, each teacher's in its own domain."""
    texts = [problem for domain in DOMAINS for problem in learned[domain]]
    scored = [problem for domain in DOMAINS for problem in heldout[domain]]
    with ThreadPoolExecutor(side_by_side) as pool:
        coming = {PIVOT.name: pool.submit(make, PIVOT, work / PIVOT.name, texts, scored, texts)}
        for (domain, _), made in TEACHERS.items():
            coming[made.name] = pool.submit(make, made, work / made.name, learned[domain], heldout[domain], texts)
        return {name: each.result()["bits_per_byte"] for name, each in coming.items()}


def zoo(work: Path) -> Ground:
    """The models of jobs/configs/demo.yaml with its corpus; its held-out conversations by category, whole conversations with all their turns."""
    work.mkdir(parents=True, exist_ok=True)
    sources = {name: ZOO / "models" / f"source_{name}" for name in ("qwen3", "neox", "mistral")}
    heldout: dict[str, list[Conversation]] = {}
    for text in (ZOO / "data/heldout.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        heldout.setdefault(row["category"], []).append(parse_row(row, format="sharegpt", dataset="zoo"))
    models = {"pivot": ZOO / "models/pivot", **sources}
    everything = [row for rows in heldout.values() for row in rows]
    return Ground(
        pivot=models["pivot"],
        sources={"zoo": sources},
        corpus=ZOO / "data/corpus.jsonl",
        corpus_format="sharegpt",
        learning_rate=2e-3,
        heldout=heldout,
        score=bits_of_conversations,
        bits_per_byte={name: _bits_per_byte(path, everything) for name, path in models.items()},
    )


def _bits_per_byte(folder: Path, conversations: Sequence[Conversation]) -> float:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bits, sizes = zip(
        *bits_of_conversations(network, AutoTokenizer.from_pretrained(folder), conversations), strict=True
    )
    return math.fsum(bits) / sum(sizes)


@torch.no_grad()
def bits_of_conversations(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]
) -> Bits:
    """Of all assistant turns of each and their ends; (0, 0) for those that reach past MAX_LENGTH."""
    locator = Locator(tokenizer)
    rows = [locator.locate(conversation.messages) for conversation in conversations]
    found = [(0.0, 0)] * len(rows)
    order = sorted((n for n, row in enumerate(rows) if len(row.ids) <= MAX_LENGTH), key=lambda n: len(rows[n].ids))
    for first in range(0, len(order), 16):
        batch = order[first : first + 16]
        # What is filled up stands behind everything that is read.
        ids = pad_sequence([torch.from_numpy(rows[n].ids).long() for n in batch], batch_first=True)
        logits = network(input_ids=ids, use_cache=False).logits.float()
        for line, n in enumerate(batch):
            position = torch.from_numpy(rows[n].position).long()
            losses = cross_entropy(logits[line, position], ids[line, position + 1], reduction="sum")
            found[n] = (float(losses) / math.log(2), rows[n].bytes)
    return found

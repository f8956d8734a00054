"""Teacher tables without a teacher: real tokenizers, real text, made-up distributions. Called by `align.py` and its test.

Alignment's speed depends on where tokens meet and on how many candidates there are, not on who predicted them. Candidates are drawn over the whole
vocabulary, which is the worst case for the caches. Letters: N positions, K top-k.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import mistral_common
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from fusion_ray.alignment.token_strings import TokenStrings
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from fusion_ray.logprobs.codec import TeacherRow, to_table

FILES = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE, TEKKEN = "mistral_instruct_tokenizer_240323.model.v3", "tekken_240718.json"
IN_TOP_K = 0.95  # of the true labels
LARGEST_TAIL = 0.2


@dataclass(frozen=True)
class TextModel:
    """What a made-up teacher knows: its vocabulary, and how it writes a text as ids whose pieces spell the text, after a dummy space or not."""

    vocabulary: Vocabulary
    encode: Callable[[str], list[int]]


def sentencepiece_model(name: str = SENTENCEPIECE) -> TextModel:
    """Mistral's SentencePiece vocabulary of 32k."""
    tokenizer = SentencePieceTokenizer(str(FILES / name))
    raw = [tokenizer.id_to_piece(number) for number in range(tokenizer.n_words)]
    fallback = {number for number, piece in enumerate(raw) if len(piece) == 6 and piece.startswith("<0x")}
    special = frozenset(number for number in range(tokenizer.n_words) if tokenizer.is_special(number))
    pieces = [
        bytes([int(piece[3:5], 16)]) if number in fallback else piece.replace("▁", " ").encode()
        for number, piece in enumerate(raw)
    ]
    vocabulary = Vocabulary(tuple(pieces), special, {END_OF_TURN: tokenizer.eos_id}, frozenset(fallback))
    return TextModel(vocabulary, lambda text: tokenizer.encode(text, bos=False, eos=False))


def tekken_model(name: str = TEKKEN) -> TextModel:
    """Mistral's byte-level vocabulary of 131k."""
    tokenizer = Tekkenizer.from_file(str(FILES / name))
    special = frozenset(range(tokenizer.num_special_tokens))
    pieces = [b"" if number in special else tokenizer.id_to_byte_piece(number) for number in range(tokenizer.n_words)]
    vocabulary = Vocabulary(tuple(pieces), special, {END_OF_TURN: tokenizer.eos_id})
    return TextModel(vocabulary, lambda text: tokenizer.encode(text, bos=False, eos=False))


def sentencepiece_strings(name: str = SENTENCEPIECE) -> TokenStrings:
    """What the papers' alignment compares of the same tokenizer."""
    tokenizer = SentencePieceTokenizer(str(FILES / name))
    ids = range(tokenizer.n_words)
    pieces = [tokenizer.id_to_piece(number) for number in ids]
    return TokenStrings([tokenizer.decode([number]) for number in ids], pieces, "▁", tokenizer.bos_id, tokenizer.eos_id)


def tekken_strings(name: str = TEKKEN) -> TokenStrings:
    """The same of Tekken, whose pieces are written as byte-level tokenizers do, a blank as Ġ."""
    tokenizer = Tekkenizer.from_file(str(FILES / name))
    special = tokenizer.num_special_tokens
    raw = [b"" if number < special else tokenizer.id_to_byte_piece(number) for number in range(tokenizer.n_words)]
    decoded = [piece.decode("utf-8", "replace") for piece in raw]
    pieces = [piece.decode("latin-1").replace(" ", "Ġ") for piece in raw]
    return TokenStrings(decoded, pieces, "Ġ", tokenizer.bos_id, tokenizer.eos_id)


def read_texts(file: Path) -> list[str]:
    """The texts of a JSON-lines file: GSM8K's `question` and `answer`, or the turns of the zoo's corpus."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        f"{row['question']}\n{row['answer']}"
        if "question" in row
        else "\n".join(turn["value"] for turn in row["conversations"])
        for row in rows
    ]


def texts_of_length(texts: Sequence[str], model: TextModel, *, positions: int, rows: int) -> list[str]:
    """`rows` texts of about `positions` positions of the model, the end of the turn among them; `texts` are begun again when they run out."""
    stream = cycle(texts)
    found = []
    for _ in range(rows):
        parts: list[str] = []
        known: list[int] = []
        while len(known) < positions - 1:
            parts.append(next(stream))
            known += model.encode(parts[-1] + "\n\n")
        spelled = b"".join(model.vocabulary.pieces[number] for number in known[: positions - 1])
        found.append(spelled.decode("utf-8", "ignore").strip())
    return found


def teacher_table(model: TextModel, texts: Sequence[str], *, top_k: int = 10, seed: int = 0) -> pa.Table:
    """A table of records.teacher_schema with one assistant message a row, `row-0` on."""
    return to_table(list(_rows(model, texts, top_k, np.random.default_rng(seed))), top_k=top_k)


def _rows(model: TextModel, texts: Sequence[str], top_k: int, generator: np.random.Generator) -> Iterator[TeacherRow]:
    vocabulary = model.vocabulary
    lengths = np.diff(vocabulary.offsets)
    ordinary = np.flatnonzero(lengths)
    end = vocabulary.roles[END_OF_TURN]
    for number, text in enumerate(texts):
        size = len(text.encode())
        content = np.asarray(model.encode(text), np.int64)
        ends = np.cumsum(lengths[content])
        dummy = int(ends[-1]) - size if content.size else 0  # bytes before the text: SentencePiece's dummy space
        ends = np.append(ends - dummy, size).astype(np.int32)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
        labels = np.append(content, end)
        position = np.flatnonzero((ends > starts) | (np.arange(labels.size) == content.size))  # not a lone dummy space
        ids, logprobs, label_logprob = _distributions(labels[position], ordinary, top_k, generator)
        yield TeacherRow(
            f"row-{number}",
            np.concatenate([[end], labels]).astype(np.int32),
            position.astype(np.int32),
            starts[position],
            ends[position],
            np.ones(position.size, np.int16),
            ids,
            logprobs,
            label_logprob,
        )


def _distributions(
    labels: npt.NDArray[np.int64], ordinary: npt.NDArray[np.int64], top_k: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """(N, K) distinct ids and their log-probabilities, descending, and (N,) the label's, which is mostly among them, the likelier the higher."""
    count = labels.size
    step = generator.integers(1, ordinary.size // (top_k + 1), (count, 1))
    # Steps of one size from the label: distinct, and never the label itself.
    ids = ordinary[(np.searchsorted(ordinary, labels)[:, None] + np.arange(1, top_k + 1) * step) % ordinary.size]
    weights = -np.sort(-(generator.exponential(size=(count, top_k)) ** 3), axis=1)
    tail = generator.uniform(0.001, LARGEST_TAIL, (count, 1))
    probabilities = (1 - tail) * weights / weights.sum(axis=1, keepdims=True)
    logprobs = np.maximum(np.log(probabilities), -30.0)
    there = np.flatnonzero(generator.random(count) < IN_TOP_K)
    rank = np.minimum(generator.geometric(0.6, there.size) - 1, top_k - 1)
    ids[there, rank] = labels[there]
    label_logprob = np.log(tail[:, 0] / 10)
    label_logprob[there] = logprobs[there, rank]
    return ids.astype(np.int32), logprobs.astype(np.float16), label_logprob.astype(np.float32)

"""Positions of real tokenizations under made-up teachers, and the one call that aligns them in tests. Called by tests/unit/alignment.

Distributions are exact (float32, no codec between): what is asked of their mass can be asked to the last digits.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from fusion_ray.alignment.edges import find_edges, settle, texts_differ
from fusion_ray.alignment.maps import MAPS
from fusion_ray.alignment.methods import METHODS, Aligned, Side
from fusion_ray.alignment.positions import Positions
from fusion_ray.alignment.project import Duplicates, Inside
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from fusion_ray.records import Message
from tests.tokenizers import locator, vocabulary

NEAR = 12  # of the ids in the order of their bytes: neighbours of the label begin as it does


def conversation(contents: Sequence[str]) -> list[Message]:
    """One turn of the user before each assistant content."""
    return [message for content in contents for message in (Message("user", "Go on."), Message("assistant", content))]


def teacher(
    name: str, rows: Sequence[Sequence[str]], *, seed: int, top_k: int = 6, whole: bool = False, spoken: bool = False
) -> Positions:
    """Positions of conversations with these assistant contents in the tokens of tests.tokenizers' `name`; raises UnlocatedError as its locator does.

    Candidates are the label (mostly), ids that begin as it does, and any ids, special ones among them. `whole`: they hold all the mass.
    `spoken`: ids that stand for bytes alone.
    """
    located = [locator(name).locate(conversation(contents)) for contents in rows]
    by_bytes = _by_bytes(name)
    rank, size = np.argsort(by_bytes), by_bytes.size
    generator = np.random.default_rng(seed)
    label = np.concatenate([row.labels for row in located] or [np.zeros(0, np.int32)]).astype(np.int32)
    count = label.size
    near = by_bytes[(rank[label][:, None] + generator.integers(-NEAR, NEAR, (count, top_k))) % size]
    any_id = generator.integers(0, size, (count, top_k)).astype(np.int32)
    ids = np.where(generator.random((count, top_k)) < 0.6, near, any_id)
    ids[:, 0] = np.where(whole | (generator.random(count) < 0.8), label, ids[:, 0])
    weights = generator.dirichlet(np.full(top_k, 0.7), count) if count else np.zeros((0, top_k))
    weights = np.maximum(weights, 1e-6)
    for k in range(1, top_k):
        weights[(ids[:, :k] == ids[:, k : k + 1]).any(axis=1), k] = 0.0
    if spoken:
        speaks = np.diff(vocabulary(name).offsets) > 0
        weights[:, 1:][~speaks[ids[:, 1:]]] = 0.0
    total = np.ones(count) if whole else generator.uniform(0.5, 0.999, count)
    weights *= (total / weights.sum(axis=1))[:, None]
    of_label = np.where(ids == label[:, None], weights, 0.0).sum(axis=1)
    of_label = np.where(of_label > 0, of_label, (1 - total) / 2)
    order = np.argsort(-weights, axis=1, kind="stable")
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.take_along_axis(weights, order, axis=1))
    return Positions(
        row=np.repeat(np.arange(len(located)), [len(row.position) for row in located]),
        message=np.concatenate([row.message for row in located] or [np.zeros(0)]).astype(np.int64),
        start=np.concatenate([row.byte_start for row in located] or [np.zeros(0)]).astype(np.int32),
        end=np.concatenate([row.byte_end for row in located] or [np.zeros(0)]).astype(np.int32),
        label=label,
        label_logprob=np.log(of_label).astype(np.float32),
        topk_ids=np.take_along_axis(ids, order, axis=1).astype(np.int32),
        topk_logprobs=logprobs.astype(np.float32),
    )


@cache
def _by_bytes(name: str) -> np.ndarray:
    pieces = vocabulary(name).pieces
    return np.array(sorted(range(len(pieces)), key=pieces.__getitem__), np.int32)


def both(
    pivot: Positions, source: Positions, pivot_words: Vocabulary, source_words: Vocabulary
) -> tuple[Side, Side] | None:
    """The two sides ready to be aligned; None where the two tokenizations do not spell the same text."""
    ours, theirs = find_edges(pivot, pivot_words), find_edges(source, source_words)
    mine = Side(pivot, settle(pivot, ours, pivot_words, source, theirs, source_words), pivot_words)
    other = Side(source, settle(source, theirs, source_words, pivot, ours, pivot_words), source_words)
    differ = texts_differ(pivot, mine.edges, pivot_words, source, other.edges, source_words)
    return None if differ.any() or mine.edges.short.any() or other.edges.short.any() else (mine, other)


def aligned(
    sides: tuple[Side, Side],
    *,
    mapped: np.ndarray | None = None,
    vocabulary_map: str = "prefix",
    chain: bool = False,
    inside: Inside = "skip",
    duplicates: Duplicates = "sum",
) -> Aligned:
    """`sides` through the method `spans`, every row the source's. `mapped` where it was made before."""
    rows = int(sides[0].positions.row.max(initial=-1)) + 1
    return METHODS["spans"](
        *sides,
        rows,
        mapped=MAPS[vocabulary_map](sides[1].vocabulary, sides[0].vocabulary) if mapped is None else mapped,
        whole_tokens=vocabulary_map not in ("prefix", "canonical"),
        chain=chain,
        inside=inside,
        duplicates=duplicates,
        choose="source",
        per="sequence",
        unit="byte",
    )


@cache
def permuted(name: str) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of `name` with its ids shuffled, and (V,) the new id of each old one. Its roles follow, its tokenizer's functions do not."""
    words = vocabulary(name)
    new = np.random.default_rng(words.size).permutation(words.size).astype(np.int32)
    shuffled = Vocabulary(
        tuple(words.pieces[old] for old in np.argsort(new)),
        frozenset(int(new[number]) for number in words.special),
        {END_OF_TURN: int(new[words.roles[END_OF_TURN]])},
        frozenset(int(new[number]) for number in words.fallback),
    )
    return shuffled, new


def distribution(ids: np.ndarray, logprobs: np.ndarray) -> dict[int, float]:
    """Id to probability of one position, padding left out."""
    return {int(i): float(np.exp(p)) for i, p in zip(ids, logprobs.astype(np.float64), strict=True) if np.isfinite(p)}

"""Token alignment the slow and obvious way: dictionaries of bytes, one position at a time. The oracle of tests/unit/alignment."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_ray.alignment.positions import Positions
from fusion_ray.alignment.vocabulary import Vocabulary

STRICT, COMPARABLE, INSIDE, NONE = range(4)


@dataclass(frozen=True)
class Token:
    """One predicting position: its label, the bytes of message `message` that it covers, and the candidates with their probabilities."""

    message: int
    start: int
    end: int
    label: int
    candidates: Sequence[tuple[int, float]] = ()
    label_probability: float = 1.0
    lead: bytes = b""  # what the label's piece has before the message
    trail: bytes = b""


def match(pivot: Sequence[Token], source: Sequence[Token]) -> list[tuple[int, int]]:
    """(source index, kind) of every pivot token, by looking at every source token."""
    found = []
    for mine in pivot:
        best = (-1, NONE)
        for index, other in enumerate(source):
            if other.message != mine.message:
                continue
            if mine.start == mine.end:
                if other.start == other.end == mine.start:
                    best = (index, STRICT)
            elif other.start == mine.start and other.end > other.start:
                best = (index, STRICT if other.end == mine.end else COMPARABLE)
            elif other.start < mine.start < other.end:
                best = (index, INSIDE)
        found.append(best)
    return found


def mapped(piece: bytes, pivot: Vocabulary, *, whole: bool) -> int:
    """The pivot id of exactly `piece`, or of its longest prefix that is one; -1 where there is none."""
    table: dict[bytes, int] = {}
    for number, known in enumerate(pivot.pieces):
        if known and number not in pivot.special and (number not in pivot.fallback or known not in table):
            table[known] = number
    lengths = [len(piece)] if whole else range(len(piece), 0, -1)
    return next((table[piece[:length]] for length in lengths if length and piece[:length] in table), -1)


def project(
    mine: Token,
    others: Sequence[Token],
    kind: int,
    pivot: Vocabulary,
    source: Vocabulary,
    *,
    whole: bool,
    condition: bool,
    chain: bool = False,
) -> dict[int, float]:
    """Pivot id to probability; empty where nothing is projected. `others`: the matched source token and those behind it."""
    if kind == NONE or (kind == INSIDE and not condition):
        return {}
    other = others[0]
    consumed_length = mine.start - other.start
    consumed = source.pieces[other.label][: len(other.lead) + consumed_length]
    told_apart = chain and goes_on(mine, others)
    reaches = (
        mine.start == mine.end or (kind == STRICT and (mine.trail or other.trail)) or (chain and other.end >= mine.end)
    )
    candidates = list(other.candidates)
    if kind == INSIDE and other.label not in [token for token, _ in candidates]:
        candidates.append((other.label, other.label_probability))
    result: dict[int, float] = {}
    fitting, fitting_ids = 0.0, 0
    for token, probability in candidates:
        target = -1
        fits = True
        if token == other.label and (reaches or chain):
            target = mine.label if reaches else -1
        elif token in source.special:
            fits = False
            for role, number in source.roles.items():
                if number == token and role in pivot.roles and kind != INSIDE:
                    target = pivot.roles[role]
        else:
            piece = source.pieces[token]
            if not piece.startswith(consumed) and (kind == INSIDE or mine.lead != other.lead):
                continue
            if token == other.label and other.trail:
                piece = piece[: -len(other.trail)]
            rest = (
                mine.lead + piece[len(consumed) :] if piece.startswith(consumed) else piece
            )  # equal leads: one context
            target = mapped(rest, pivot, whole=whole)
        if fits:
            fitting, fitting_ids = fitting + probability, fitting_ids + 1
        if target >= 0:
            result[target] = result.get(target, 0.0) + probability
    scale = 1.0
    if kind == INSIDE:
        spelled = [piece for number, piece in enumerate(source.pieces) if piece and number not in source.special]
        alike = sum(piece.startswith(consumed) for piece in spelled) - fitting_ids
        tail = max(0.0, 1.0 - sum(probability for _, probability in candidates))
        scale = fitting + tail * max(0, alike) / max(1, len(spelled) - len(other.candidates))
        result = {token: probability / scale for token, probability in result.items()}
    if told_apart:
        told = source.pieces[other.label][len(consumed) :]
        for token, probability in _told(mine, others[1:], mine.lead + told, pivot, source, whole=whole).items():
            result[token] = result.get(token, 0.0) + probability * other.label_probability / scale
    return result


def _told(
    mine: Token, others: Sequence[Token], told: bytes, pivot: Vocabulary, source: Vocabulary, *, whole: bool
) -> dict[int, float]:
    """What the source says of the pivot's token after its bytes `told`, as pivot ids."""
    other = others[0]
    result: dict[int, float] = {}
    known = dict(other.candidates) | {other.label: other.label_probability}
    for token, probability in known.items():
        if token == other.label and goes_on(mine, others):
            deeper = _told(mine, others[1:], told + source.pieces[token], pivot, source, whole=whole)
        elif token == other.label:
            deeper = {mine.label: 1.0} if other.end >= mine.end else {}
        elif token in source.special:
            ends = any(number == token and role in pivot.roles for role, number in source.roles.items())
            deeper = {mapped(told, pivot, whole=whole): 1.0} if ends else {}
        else:
            deeper = {mapped(told + source.pieces[token], pivot, whole=whole): 1.0}
        for target, share in deeper.items():
            if target >= 0:
                result[target] = result.get(target, 0.0) + probability * share
    return result


def goes_on(mine: Token, others: Sequence[Token]) -> bool:
    """The pivot's token reaches behind the source's, and the source's next token begins right there."""
    this, following = others[0], others[1:2]
    return (
        this.start < this.end < mine.end
        and bool(following)
        and following[0].message == this.message
        and following[0].start == this.end < following[0].end
    )


def bits_per_byte(nats: Sequence[float], count: int) -> float:
    return sum(nats) / math.log(2) / count


def positions_of(rows: Sequence[Sequence[Token]], top_k: int) -> Positions:
    """The tokens of each row as the arrays that the package works on."""
    flat = [(row, token) for row, tokens in enumerate(rows) for token in tokens]
    ids = np.zeros((len(flat), top_k), np.int32)
    logprobs = np.full((len(flat), top_k), -np.inf, np.float32)
    for at, (_, token) in enumerate(flat):
        for k, (candidate, probability) in enumerate(token.candidates):
            ids[at, k], logprobs[at, k] = candidate, math.log(probability)
    return Positions(
        row=np.array([row for row, _ in flat], np.int64),
        message=np.array([token.message for _, token in flat], np.int64),
        start=np.array([token.start for _, token in flat], np.int32),
        end=np.array([token.end for _, token in flat], np.int32),
        label=np.array([token.label for _, token in flat], np.int32),
        label_logprob=np.array([math.log(token.label_probability) for _, token in flat], np.float32),
        topk_ids=ids,
        topk_logprobs=logprobs,
    )

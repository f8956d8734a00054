"""From two models' positions over the same rows to the targets of distillation: match, project, choose (design.md section 6). Called by `workers/aligner.py`.

METHODS is the choice of the config's `align.method`. Letters: N pivot positions, R rows, K top-k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.average import average, source_weight
from fusion_ray.alignment.choose import (
    Choice,
    CrossEntropy,
    cross_entropy,
    source_wins_rows,
    source_wins_tokens,
    token_cross_entropies,
)
from fusion_ray.alignment.edges import Edges
from fusion_ray.alignment.fusechat import ONE_HOT, Sequences, choose_positions, match_rows, met_pairs, move_rows
from fusion_ray.alignment.positions import Bools, Positions
from fusion_ray.alignment.project import Duplicates, Inside, Projection, project
from fusion_ray.alignment.shares import Shares
from fusion_ray.alignment.spans import COMPARABLE, match_spans
from fusion_ray.alignment.vocabulary import Vocabulary

Unit = Literal["byte", "token"]
Per = Literal["sequence", "token"]
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
NO_SEQUENCES = "the method `fusechat` aligns whole rows: give both sides their `sequences`"


@dataclass(frozen=True)
class Side:
    """One model's half of an alignment."""

    positions: Positions
    edges: Edges
    vocabulary: Vocabulary
    sequences: Sequences | None = None  # the method `fusechat` alone reads them


@dataclass(frozen=True)
class Aligned:
    """The targets at the pivot's positions and what led to them."""

    kind: npt.NDArray[np.int8]  # (N,)
    source_index: npt.NDArray[np.int32]  # (N,)
    topk_ids: npt.NDArray[np.int32]  # (N, K)
    topk_logprobs: npt.NDArray[np.float32]  # (N, K)
    has_target: Bools  # (N,)
    from_source: Bools  # (N,)
    source_won: Bools  # (R,)
    projection: Projection
    ce_pivot: CrossEntropy  # (R,)
    ce_source: CrossEntropy  # (R,)


def align_spans(
    pivot: Side,
    source: Side,
    rows: int,
    *,
    mapped: npt.NDArray[np.int32],
    whole_tokens: bool,
    chain: bool,
    inside: Inside,
    duplicates: Duplicates,
    shares: Shares | None = None,
    choose: Choice,
    per: Per,
    unit: Unit,
) -> Aligned:
    """Byte spans. A row that the pivot wins keeps the pivot's own top-k; one that the source wins has no target where nothing could be projected."""
    mine, other = pivot.positions, source.positions
    index, kind = match_spans(mine.message_key, mine.start, mine.end, other.message_key, other.start, other.end)
    projection = project(
        mine,
        other,
        source_index=index,
        kind=kind,
        edges_pivot=pivot.edges,
        edges_source=source.edges,
        vocabulary_pivot=pivot.vocabulary,
        vocabulary_source=source.vocabulary,
        mapped=mapped,
        whole_tokens=whole_tokens,
        chain=chain,
        inside=inside,
        duplicates=duplicates,
        shares=shares,
        top_k=mine.topk_ids.shape[1],
    )
    return _chosen(pivot, source, rows, kind, index, projection, choose=choose, per=per, unit=unit)


def align_fusechat(
    pivot: Side,
    source: Side,
    rows: int,
    *,
    mapped: npt.NDArray[np.int32],
    rules: str,
    choose: Choice,
    per: Per,
    unit: Unit,
) -> Aligned:
    """The papers' method, to the letter (`fusechat.py`); both sides need their `sequences`, `mapped` is `fusechat_maps.row_map`'s for `rules`.

    Every position of a row that the source wins has a target: a source row, the label alone, or for an empty row the pivot's own, as in the published
    collator. With equal vocabularies rows are copied where both models have read the same bytes (`replace_model.py`). `kind` is what byte spans
    say, so that coverage is comparable; `source_index` is the position whose row was taken.
    """
    mine, other = pivot.positions, source.positions
    if pivot.sequences is None or source.sequences is None:
        raise ValueError(NO_SEQUENCES)
    index, kind = match_spans(mine.message_key, mine.start, mine.end, other.message_key, other.start, other.end)
    if source.vocabulary.same_as(pivot.vocabulary):
        taken = np.where(kind <= COMPARABLE, index, ONE_HOT).astype(np.int64)
    else:
        taken = choose_positions(pivot.sequences, source.sequences, rules=rules, mapped=mapped)
    ids, logprobs, moved, seen = move_rows(
        taken, other.topk_ids, other.topk_logprobs, mapped=mapped, width=mine.topk_ids.shape[1]
    )
    one_hot = taken == ONE_HOT
    ids[one_hot, 0] = mine.label[one_hot]
    logprobs[one_hot, 0] = 0.0
    projection = Projection(ids, logprobs, np.isfinite(logprobs[:, 0]), one_hot, moved, seen)
    index = np.maximum(taken, -1).astype(np.int32)
    return _chosen(
        pivot, source, rows, kind, index, projection, choose=choose, per=per, unit=unit, own_where_empty=True
    )


def _chosen(
    pivot: Side,
    source: Side,
    rows: int,
    kind: npt.NDArray[np.int8],
    index: npt.NDArray[np.int32],
    projection: Projection,
    *,
    choose: Choice,
    per: Per,
    unit: Unit,
    own_where_empty: bool = False,
) -> Aligned:
    """What MinCE makes of a projection, or AvgCE. `own_where_empty`: the pivot's own row stands where the source won and nothing was projected."""
    mine, other = pivot.positions, source.positions
    ce_pivot, ce_source = cross_entropy(mine, other, rows), cross_entropy(other, mine, rows)
    comparable = projection.known & (index >= 0)
    if per == "sequence":
        source_won = source_wins_rows(ce_pivot, ce_source, choose=choose, unit=unit)
        theirs = source_won[mine.row]
    else:
        theirs = source_wins_tokens(mine, other, index, comparable, choose=choose, unit=unit) | np.full(
            mine.count, choose == "source"
        )
        source_won = 2 * np.bincount(mine.row, theirs, rows) > np.bincount(mine.row, minlength=rows)
    if choose == "avg_ce":
        if per == "sequence":
            means = (ce.per_byte if unit == "byte" else ce.per_token for ce in (ce_pivot, ce_source))
            weight = source_weight(*means)[mine.row]
        else:
            weight = source_weight(*token_cross_entropies(mine, other, index, comparable, unit=unit))
        return _averaged(mine, kind, index, projection, weight, source_won, ce_pivot, ce_source)
    if own_where_empty:
        theirs = theirs & projection.known
    take = theirs[:, None]
    return Aligned(
        kind=kind,
        source_index=index,
        topk_ids=np.where(take, projection.topk_ids, mine.topk_ids).astype(np.int32, copy=False),
        topk_logprobs=np.where(take, projection.topk_logprobs, mine.topk_logprobs).astype(np.float32, copy=False),
        has_target=~theirs | projection.known,
        from_source=theirs & projection.known,
        source_won=np.asarray(source_won, np.bool_),
        projection=projection,
        ce_pivot=ce_pivot,
        ce_source=ce_source,
    )


def _averaged(
    mine: Positions,
    kind: npt.NDArray[np.int8],
    index: npt.NDArray[np.int32],
    projection: Projection,
    weight: npt.NDArray[np.float64],
    source_won: Bools,
    ce_pivot: CrossEntropy,
    ce_source: CrossEntropy,
) -> Aligned:
    """Every position has a target: the mean of both where the source says something, else the pivot's own."""
    ids, logprobs = average(
        (mine.topk_ids, mine.topk_logprobs), (projection.topk_ids, projection.topk_logprobs), weight * projection.known
    )
    return Aligned(
        kind=kind,
        source_index=index,
        topk_ids=ids,
        topk_logprobs=logprobs,
        has_target=np.ones(mine.count, np.bool_),
        from_source=projection.known,
        source_won=np.asarray(source_won, np.bool_),
        projection=projection,
        ce_pivot=ce_pivot,
        ce_source=ce_source,
    )


def label_pairs(pivot: Side, source: Side) -> tuple[Ints, Ints]:
    """Source and pivot ids to count for `spans`: the labels of positions that have read the same bytes; ends of turns meet by role, not by counting."""
    mine, other = pivot.positions, source.positions
    index, kind = match_spans(mine.message_key, mine.start, mine.end, other.message_key, other.start, other.end)
    met = (kind <= COMPARABLE) & ~mine.turn_ends
    return other.label[index[met]], mine.label[met]


def token_pairs(pivot: Side, source: Side) -> tuple[Ints, Ints]:
    """The same for `fusechat`: the tokens that the programme matches, over whole rows."""
    if pivot.sequences is None or source.sequences is None:
        raise ValueError(NO_SEQUENCES)
    mine, other = pivot.sequences, source.sequences
    return met_pairs(match_rows(mine, other), mine.tokens, other.tokens)


METHODS: Mapping[str, Callable[..., Aligned]] = {"spans": align_spans, "fusechat": align_fusechat}
# What `map: statistics` counts.
PAIRS: Mapping[str, Callable[[Side, Side], tuple[Ints, Ints]]] = {"spans": label_pairs, "fusechat": token_pairs}

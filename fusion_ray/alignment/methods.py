"""From two models' positions over the same rows to the targets of distillation: match, project, choose (design.md section 6). Called by `workers/aligner.py`.

METHODS is the choice of the config's `align.method`. Letters: N pivot positions, R rows, K top-k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.choose import Choice, CrossEntropy, cross_entropy, source_wins_rows, source_wins_tokens
from fusion_ray.alignment.edges import Edges
from fusion_ray.alignment.positions import Bools, Positions
from fusion_ray.alignment.project import Duplicates, Inside, Projection, project
from fusion_ray.alignment.spans import match_spans
from fusion_ray.alignment.vocabulary import Vocabulary

Unit = Literal["byte", "token"]
Per = Literal["sequence", "token"]


@dataclass(frozen=True)
class Side:
    """One model's half of an alignment."""

    positions: Positions
    edges: Edges
    vocabulary: Vocabulary


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
    inside: Inside,
    duplicates: Duplicates,
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
        inside=inside,
        duplicates=duplicates,
        top_k=mine.topk_ids.shape[1],
    )
    ce_pivot, ce_source = cross_entropy(mine, other, rows), cross_entropy(other, mine, rows)
    if per == "sequence":
        source_won = source_wins_rows(ce_pivot, ce_source, choose=choose, unit=unit)
        theirs = source_won[mine.row]
    else:
        theirs = source_wins_tokens(mine, other, index, projection.known, choose=choose, unit=unit) | np.full(
            mine.count, choose == "source"
        )
        source_won = 2 * np.bincount(mine.row, theirs, rows) > np.bincount(mine.row, minlength=rows)
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


METHODS: Mapping[str, Callable[..., Aligned]] = {"spans": align_spans}

"""The cost of the pivot's true tokens under an alignment's targets, in bits. Pure; called by `jobs/benchmarks/alignment_fidelity.py`.

Letters: N pivot positions, K top-k.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_ray.logprobs.codec import TeacherRow

Floats = npt.NDArray[np.float64]
LEAST = 2.0**-40  # a probability below it, or none at all, is charged as this


@dataclass(frozen=True)
class Cost:
    """Sums over positions. `bits` and `bytes` of covered positions; `teacher_bits` the teacher's own on the same bytes."""

    positions: int = 0
    covered: int = 0
    missing: int = 0
    bits: float = 0.0
    bytes: int = 0
    teacher_bits: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def cost(
    aligned: pa.Table, pivot: Mapping[str, TeacherRow], source: Mapping[str, TeacherRow], *, top_k: int, vocabulary: int
) -> Cost:
    """Of a table of records.aligned_schema whose rows all belong to the source; `vocabulary` is the number of the pivot's ids."""
    total = Cost()
    for row in aligned.select(["id", "ids", "position", "from_source", "topk_ids", "topk_logprobs"]).to_batches():
        for number in range(row.num_rows):
            name, ids, position, of_source, topk_ids, topk = (column[number] for column in row.columns)
            mine = pivot[name.as_py()]
            label = _array(ids)[_array(position) + 1]
            logprobs = _array(topk).astype(np.float64).reshape(-1, top_k)
            # a label alone is no distribution: any real one has several candidates
            covered = np.asarray(of_source.values) & (np.isfinite(logprobs).sum(axis=1) > 1)
            bits, missing = label_bits(_array(topk_ids).reshape(-1, top_k), logprobs, label, vocabulary)
            total += Cost(
                positions=label.size,
                covered=int(covered.sum()),
                missing=int((missing & covered).sum()),
                bits=float(bits[covered].sum()),
                bytes=int((mine.byte_end - mine.byte_start)[covered].sum()),
                teacher_bits=float(bits_on_bytes(source[name.as_py()], mine)[covered].sum()),
            )
    return total


def label_bits(
    topk_ids: npt.NDArray[np.int32], topk_logprobs: Floats, label: npt.NDArray[np.int32], vocabulary: int
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(N,) -log2 of the label's probability, and whether it is outside the (N, K) candidates: then it has its share of the tail."""
    probability = np.exp(topk_logprobs)
    found = (topk_ids == label[:, None]) & np.isfinite(topk_logprobs)
    of_label = np.where(found, probability, 0.0).sum(axis=1)
    missing = ~found.any(axis=1)
    tail = np.maximum(0.0, 1.0 - probability.sum(axis=1)) / np.maximum(
        1, vocabulary - np.isfinite(topk_logprobs).sum(axis=1)
    )
    return -np.log2(np.maximum(np.where(missing, tail, of_label), LEAST)), missing


def bits_on_bytes(source: TeacherRow, pivot: TeacherRow) -> Floats:
    """(N,) the source's own bits on the bytes of each of the pivot's tokens: a token's bits spread evenly over its bytes, an end of turn whole."""
    bits = -source.label_logprob.astype(np.float64) / math.log(2)
    found = np.zeros(pivot.position.size)
    for message in np.unique(pivot.message):
        mine, theirs = pivot.message == message, source.message == message
        start, end = source.byte_start[theirs], source.byte_end[theirs]
        size = max(int(pivot.byte_end[mine].max()), int(end.max(initial=0))) + 1
        each = np.zeros(size + 1)  # bits of every byte; the end of turn stands behind the last
        for first, last, value in zip(start.tolist(), end.tolist(), bits[theirs].tolist(), strict=True):
            if last > first:
                each[first:last] += value / (last - first)
        sums = np.concatenate([[0.0], np.cumsum(each)])
        found[mine] = sums[pivot.byte_end[mine]] - sums[pivot.byte_start[mine]]
        ends = {
            last: value
            for first, last, value in zip(start.tolist(), end.tolist(), bits[theirs].tolist(), strict=True)
            if first == last
        }
        for at in np.flatnonzero(mine & (pivot.byte_start == pivot.byte_end)):
            found[at] = ends.get(int(pivot.byte_end[at]), 0.0)
    return found


def _array(values: pa.ListScalar) -> np.ndarray:
    return values.values.to_numpy(zero_copy_only=False)

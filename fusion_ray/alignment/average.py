"""AvgCE (FuseLLM; paper.md 1.2): at each position the mean of the pivot's and the source's distributions, weighed by how well each tells the text.

    w = softmax over the two models of exp(-ce)        target = w_pivot P_pivot + w_source P_source

with ce the mean cross entropy of the sequence, or of the token, in the unit of `align.unit`. exp(-ce) lies in 0..1, so the weights lie between 0.27 and
0.73. Of the union of both top-k the K largest are kept; an id that one side does not list has no mass there. Called by `methods.py`.
"""

import numpy as np
import numpy.typing as npt
from numba import njit


def source_weight(ce_pivot: npt.NDArray[np.float64], ce_source: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n,) the source's weight from mean cross entropies; a model without evidence (infinite) counts exp(-ce) = 0."""
    return 1.0 / (1.0 + np.exp(np.exp(-ce_pivot) - np.exp(-ce_source)))


def average(
    pivot: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]],
    source: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]],
    weight: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and log-probabilities (N, K) of the mean of both sides' (N, K), -inf where unknown; `weight` (N,) is the source's. The largest come first, of
    equal ones the lower id."""
    ids = np.zeros(pivot[0].shape, np.int32)
    logprobs = np.full(pivot[1].shape, -np.inf, np.float32)
    _average(*pivot, *source, weight, ids, logprobs)
    return ids, logprobs


@njit(cache=True, nogil=True)
def _average(  # type: ignore[no-untyped-def]  # compiled, see average
    pivot_ids, pivot_logprobs, source_ids, source_logprobs, weight, ids, logprobs
):
    size = ids.shape[1]
    names, masses = np.empty(2 * size, np.int32), np.empty(2 * size, np.float64)
    for n in range(ids.shape[0]):
        count = 0
        for k in range(size):
            if pivot_logprobs[n, k] != -np.inf:
                names[count], masses[count] = (
                    pivot_ids[n, k],
                    (1.0 - weight[n]) * np.exp(np.float64(pivot_logprobs[n, k])),
                )
                count += 1
        for k in range(size):
            if source_logprobs[n, k] == -np.inf:
                continue
            mass = weight[n] * np.exp(np.float64(source_logprobs[n, k]))
            at = 0
            while at < count and names[at] != source_ids[n, k]:
                at += 1
            if at == count:
                names[count], masses[count] = source_ids[n, k], 0.0
                count += 1
            masses[at] += mass
        for k in range(min(size, count)):
            best = k
            for at in range(k + 1, count):
                if masses[at] > masses[best] or (masses[at] == masses[best] and names[at] < names[best]):
                    best = at
            names[k], names[best] = names[best], names[k]
            masses[k], masses[best] = masses[best], masses[k]
            if masses[k] > 0.0:
                ids[n, k], logprobs[n, k] = names[k], np.float32(np.log(masses[k]))

"""An engine's flat prompt logprobs as arrays, with the checks that catch a corrupted answer. Called by workers/engine.py.

vLLM's FlatLogprobs (0.29) holds, for a prompt of T tokens and K asked for, an empty range for position 0 and then K + 1 entries for each position: the actual
token with its logprob first, then the top K in order; workers/prompt_arrays.py keeps the same as arrays. Row j of the result predicts token j + 1. Pure:
takes the entries, not the engine's object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class CorruptLogprobsError(ValueError):
    """The engine's answer is not the distribution over this prompt's own tokens; nothing of it may be used."""


@dataclass(frozen=True)
class TopK:
    """For each of N positions the K likeliest tokens in order and the label's own logprob; natural logarithms of normalised probabilities."""

    ids: np.ndarray  # (N, K) int32
    logprobs: np.ndarray  # (N, K) float32
    label_logprob: np.ndarray  # (N,) float32

    def at(self, positions: np.ndarray) -> "TopK":
        return TopK(self.ids[positions], self.logprobs[positions], self.label_logprob[positions])

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.logprobs).all() and np.isfinite(self.label_logprob).all())


def from_flat(
    token_ids: Sequence[int] | np.ndarray,
    logprobs: Sequence[float] | np.ndarray,
    *,
    positions: int,
    prompt_ids: Sequence[int] | np.ndarray,
    top_k: int,
) -> TopK:
    """The (T - 1) rows of one prompt of T tokens; `positions` is the number of positions that the engine answered for.

    Raises CorruptLogprobsError when lengths, labels or order are not those of this prompt (NaNs are no matter of this check: see `finite`).
    """
    prompt = np.asarray(prompt_ids, np.int32)
    rows = len(prompt) - 1
    if positions != len(prompt) or len(token_ids) != rows * (top_k + 1) or len(logprobs) != len(token_ids):
        raise CorruptLogprobsError(
            f"a prompt of {len(prompt)} tokens with top_k {top_k} came back with {positions} positions, {len(token_ids)} tokens and "
            f"{len(logprobs)} logprobs, expected {len(prompt)}, {rows * (top_k + 1)} and {rows * (top_k + 1)}"
        )
    ids = np.asarray(token_ids, np.int32).reshape(rows, top_k + 1)
    values = np.asarray(logprobs, np.float32).reshape(rows, top_k + 1)
    wrong = np.flatnonzero(ids[:, 0] != prompt[1:])
    if len(wrong):
        at = int(wrong[0])
        raise CorruptLogprobsError(
            f"position {at + 1} of the prompt is token {prompt[at + 1]}, the engine answered for token {ids[at, 0]}"
        )
    top = values[:, 1:]
    # A comparison with NaN is False, so rows with NaN pass here and are seen by `finite`.
    if (top[:, 1:] > top[:, :-1]).any():
        raise CorruptLogprobsError("the top logprobs are not in descending order")
    if (values[:, 0] > top[:, 0] + 1e-4).any():
        raise CorruptLogprobsError("a label is likelier than the likeliest token")
    return TopK(ids[:, 1:], top, values[:, 0])

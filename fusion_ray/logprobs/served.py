"""The `prompt_logprobs` of a served answer (vLLM's extension of OpenAI's completions) as the arrays of flat.py, with its checks. Called by workers/endpoint.py.

The JSON holds, for a prompt of T tokens and K asked for, null for position 0 and then a mapping of token id to {logprob, rank}: the actual token and the
top K, which are K entries where the actual token is among them and K + 1 where it is not. vLLM writes -9999 for a logprob of minus infinity. Pure.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fusion_ray.logprobs.flat import CorruptLogprobsError, TopK, from_flat

ENDPOINT = "vllm behind an endpoint"  # in the place of an engine's version
MINUS_INFINITY = -9999.0


def from_served(
    positions: Sequence[Mapping[str, Mapping[str, object]] | None],
    *,
    prompt_ids: Sequence[int],
    top_k: int,
    vocabulary: int,
) -> TopK:
    """The (T - 1) rows of one prompt of T tokens. Raises CorruptLogprobsError for an answer that is not about this prompt or this vocabulary.

    A logprob that is null (JSON's NaN) is NaN; see TopK.finite.
    """
    if len(positions) != len(prompt_ids) or positions[0]:
        raise CorruptLogprobsError(
            f"a prompt of {len(prompt_ids)} tokens came back with {len(positions)} positions, expected as many, the first without logprobs"
        )
    token_ids: list[int] = []
    logprobs: list[float] = []
    for number, (label, entries) in enumerate(zip(prompt_ids[1:], positions[1:], strict=True), 1):
        if not entries or str(label) not in entries:
            answered = next(iter(entries), None) if entries else None
            raise CorruptLogprobsError(
                f"position {number} of the prompt is token {label}, the server answered for token {answered}"
            )
        ranked = {entry["rank"]: (int(token), _logprob(entry["logprob"])) for token, entry in entries.items()}
        if any(rank not in ranked for rank in range(1, top_k + 1)):
            raise CorruptLogprobsError(
                f"position {number} came back with the ranks {sorted(map(str, ranked))[:8]}, expected 1 to {top_k}: "
                "the server gives fewer logprobs than it is asked for"
            )
        token_ids.append(label)
        logprobs.append(_logprob(entries[str(label)]["logprob"]))
        for rank in range(1, top_k + 1):
            token_ids.append(ranked[rank][0])
            logprobs.append(ranked[rank][1])
    foreign = next((token for token in token_ids if not 0 <= token < vocabulary), None)
    if foreign is not None:
        raise CorruptLogprobsError(
            f"the server answered with token {foreign}, the model has {vocabulary}: it serves another model"
        )
    return from_flat(token_ids, logprobs, positions=len(positions), prompt_ids=prompt_ids, top_k=top_k)


def not_finite(tokens: int, top_k: int) -> TopK:
    """What stands for an answer to a prompt of `tokens` tokens whose logprobs could not be written as JSON: NaN throughout."""
    rows = tokens - 1
    return TopK(
        np.zeros((rows, top_k), np.int32),
        np.full((rows, top_k), np.nan, np.float32),
        np.full(rows, np.nan, np.float32),
    )


def _logprob(value: object) -> float:
    if value is None:
        return math.nan
    assert isinstance(value, int | float)
    return -math.inf if value <= MINUS_INFINITY else float(value)

"""vLLM's prompt logprobs as the tensors that its engine made, and without the ranks that nobody here reads. Called by workers/engine.py.

vLLM 0.29 lays the tensors of a prompt out as Python lists, one append for every candidate of every token, and counts for every token how many are likelier, in
a pass over all logprobs by a function that it compiles when it is first needed. Both take time in which a GPU waits. Where vLLM's own code is another than
the one this was written for, nothing is replaced and its lists are taken.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample import sampler

logger = logging.getLogger(__name__)

# (owner, attribute, its parameters) of what is replaced.
_LISTS = (LogprobsProcessor, "_update_prompt_logprobs", ["self", "prompt_logprobs_tensors"])
_RANKS = (sampler, "batched_count_greater_than", ["x", "values"])
_FIELDS = ("logprob_token_ids", "logprobs")
_replaced: list[tuple[Any, str, Callable[..., Any]]] = []


class PromptArrays:
    """What a request's `prompt_logprobs` are: as FlatLogprobs, `token_ids` and `logprobs` one after the other, K + 1 a position from the second token on."""

    def __init__(self, tensors: LogprobsTensors) -> None:
        self.token_ids: np.ndarray = tensors.logprob_token_ids.numpy().reshape(-1)
        self.logprobs: np.ndarray = tensors.logprobs.numpy().reshape(-1)
        self._positions = len(tensors.logprobs) + 1

    def __len__(self) -> int:
        return self._positions


def keep_arrays() -> bool:
    """Have every engine of this process give PromptArrays for flat prompt logprobs, and no ranks; whether vLLM's code allows it. May be called again."""
    if _replaced:
        return True
    known = all(_parameters(owner, name) == parameters for owner, name, parameters in (_LISTS, _RANKS))
    if not known or LogprobsTensors._fields[:2] != _FIELDS:
        logger.warning("this vLLM makes prompt logprobs in a way of its own: they are read from its lists, more slowly")
        return False
    lists = LogprobsProcessor._update_prompt_logprobs

    def update(self: Any, prompt_logprobs_tensors: LogprobsTensors) -> None:
        empty = isinstance(self.prompt_logprobs, FlatLogprobs) and not self.prompt_logprobs.token_ids
        if empty and self.tokenizer is None:
            self.prompt_logprobs = PromptArrays(prompt_logprobs_tensors)
        else:
            lists(self, prompt_logprobs_tensors)

    def no_ranks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)

    for (owner, name, _), ours in ((_LISTS, update), (_RANKS, no_ranks)):
        _replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, ours)
    return True


def put_back() -> None:
    """vLLM's own code again: for comparisons."""
    while _replaced:
        owner, name, theirs = _replaced.pop()
        setattr(owner, name, theirs)


def _parameters(owner: Any, name: str) -> list[str] | None:
    found = getattr(owner, name, None)
    return list(inspect.signature(found).parameters) if callable(found) else None

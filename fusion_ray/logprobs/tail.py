"""What a top-k record leaves out: the tail mass, and the two ways to make a distribution of the rest. Called by align, losses and `inspect`. Pure."""

import numpy as np


def log_mass(logprobs: np.ndarray) -> np.ndarray:
    """log of the mass that the K entries hold. logprobs (..., K), -inf where an entry is missing; returns (...) float32, -inf for none."""
    values = logprobs.astype(np.float32)
    top = values.max(axis=-1)
    shift = np.where(np.isfinite(top), top, np.float32(0))
    with np.errstate(divide="ignore"):
        return (shift + np.log(np.exp(values - shift[..., None]).sum(axis=-1))).astype(np.float32)


def tail_mass(logprobs: np.ndarray) -> np.ndarray:
    """1 - sum of the K probabilities, in 0..1 (rounding in float16 may push the sum over 1). logprobs (..., K); returns (...) float32."""
    total = np.exp(logprobs.astype(np.float32)).sum(axis=-1)
    return np.clip(1 - total, 0, 1).astype(np.float32)


def renormalise(logprobs: np.ndarray) -> np.ndarray:
    """The K entries scaled to sum to 1: (..., K) to (..., K) float32. Rows without any entry stay all -inf."""
    mass = log_mass(logprobs)
    return (logprobs.astype(np.float32) - np.where(np.isfinite(mass), mass, np.float32(0))[..., None]).astype(
        np.float32
    )


def with_tail(logprobs: np.ndarray) -> np.ndarray:
    """(..., K) to (..., K + 1) float32: the last entry is the log of the tail mass, -inf where nothing is left."""
    with np.errstate(divide="ignore"):
        tail = np.log(tail_mass(logprobs))
    return np.concatenate([logprobs.astype(np.float32), tail[..., None]], axis=-1)

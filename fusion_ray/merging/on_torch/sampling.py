"""The random numbers of `merging/sampling.py` on a torch device: the same bits for the same element. Called by `task_vectors.py`.

torch has no arithmetic on unsigned integers; products and sums of int64 have the same bits, and a shift to the right is freed of the sign that it drags along.
"""

import torch
from torch import Tensor

from fusion_ray.merging.sampling import BITS, FIRST, GAMMA, SECOND


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64 below 2**BITS: the numbers of the elements from `start` on, in the stream with this key (uint64)."""
    value = torch.arange(start + 1, start + 1 + count, device=device) * _signed(int(GAMMA)) + _signed(key)
    value = (value ^ _shifted(value, 30)) * _signed(int(FIRST))
    value = (value ^ _shifted(value, 27)) * _signed(int(SECOND))
    return _shifted(value ^ _shifted(value, 31), 64 - BITS)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - (1 << 64) if value >> 63 else value

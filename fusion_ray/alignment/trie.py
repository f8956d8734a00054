"""A compiled byte trie: the longest piece of a vocabulary that is a prefix of some bytes, without a Python object per node.

Edges live in an open-addressing hash table keyed by (node, byte), so that a vocabulary of 131k pieces builds in well under a second and takes
tens of megabytes. Called by `vocabulary.py`, and by the kernels of `maps.py` and `project.py` through `child`.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

NO_NODE = -1
NO_TOKEN = -1


class Trie(NamedTuple):
    """Node 0 is the root. A NamedTuple of arrays, so that compiled code takes it as it is."""

    keys: npt.NDArray[np.int64]  # (H,) node * 256 + byte, -1 in an empty slot; H is a power of two
    nodes: npt.NDArray[np.int32]  # (H,) the child behind that edge
    token: npt.NDArray[np.int32]  # (nodes,) the id whose bytes end at the node, -1 where none does
    below: npt.NDArray[np.int32]  # (nodes,) how many inserted ids have the node's bytes as a prefix


def build_trie(blob: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], order: npt.NDArray[np.int32]) -> Trie:
    """The trie of the pieces `blob[offsets[id]:offsets[id + 1]]` for the ids in `order`; of equal pieces the last in `order` keeps the node."""
    total = int((offsets[order.astype(np.int64) + 1] - offsets[order]).sum()) + 1
    slots = 1 << max(4, (2 * total).bit_length())
    keys = np.full(slots, -1, np.int64)
    nodes = np.zeros(slots, np.int32)
    token = np.full(total, NO_TOKEN, np.int32)
    below = np.zeros(total, np.int32)
    used = _insert_all(blob, offsets, order, keys, nodes, token, below)
    return Trie(keys, nodes, token[:used].copy(), below[:used].copy())


@njit(cache=True)
def _slot(keys: npt.NDArray[np.int64], key: int) -> int:
    """The slot that holds `key`, or the empty one where it belongs."""
    mask = keys.size - 1
    slot = ((key * -7046029254386353131) >> 17) & mask  # 2**64 / golden ratio, as a signed number; wraps
    while keys[slot] != key and keys[slot] != -1:
        slot = (slot + 1) & mask
    return slot


@njit(cache=True)
def child(keys: npt.NDArray[np.int64], nodes: npt.NDArray[np.int32], node: int, byte: int) -> np.int64:
    """The node below `node` along `byte`, or -1.

    It takes the trie's arrays: a call that passes a NamedTuple counts a reference to each of its arrays, which costs more than the look-up.
    """
    key = np.int64(node) * 256 + byte
    slot = _slot(keys, key)
    return np.int64(nodes[slot]) if keys[slot] == key else np.int64(-1)


@njit(cache=True)
def _insert_all(blob, offsets, order, keys, nodes, token, below):  # type: ignore[no-untyped-def]  # compiled, see build_trie
    used = 1
    for number in range(order.size):
        piece = order[number]
        node = np.int64(0)
        below[0] += 1
        for index in range(offsets[piece], offsets[piece + 1]):
            key = node * 256 + blob[index]
            slot = _slot(keys, key)
            if keys[slot] == -1:
                keys[slot] = key
                nodes[slot] = used
                used += 1
            node = np.int64(nodes[slot])
            below[node] += 1
        token[node] = piece
    return used

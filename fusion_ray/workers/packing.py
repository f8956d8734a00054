"""Which conversations share a line of a batch: pure arithmetic on their lengths. Called by workers/schedule.py.

Best-fit decreasing: the longest conversation first, each into the fullest line that still has room for it, into a new line where none has. It needs at
most about 11/9 of the fewest lines possible (Johnson 1974), and the same lengths in the same order give the same lines.
"""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: np.ndarray, room: int, *, at_least: int = 1) -> list[list[int]]:
    """The numbers 0 .. len(lengths) - 1, each in one line, so that no line's lengths sum to more than `room`; the fullest line first.

    Where that makes fewer than `at_least` lines, the fullest are halved until there are as many or each holds one conversation: a worker without a line
    would wait for the others. Raises ValueError for a length above `room`.
    """
    if len(lengths) and lengths.max() > room:
        raise ValueError(f"a conversation of {lengths.max()} tokens does not fit a line of {room}: cut it first")
    lines: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room left in a line and the line's number, ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        best = bisect.bisect_left(left, (length, -1))
        if best < len(left):
            free, line = left.pop(best)
        else:
            free, line = room, len(lines)
            lines.append([])
        lines[line].append(number)
        bisect.insort(left, (free - length, line))
    while len(lines) < at_least and any(len(line) > 1 for line in lines):
        fullest = max((line for line in lines if len(line) > 1), key=lambda line: _tokens(lengths, line))
        lines.remove(fullest)
        lines += _halves(lengths, fullest)
    return sorted(lines, key=lambda line: -_tokens(lengths, line))


def padded_size(lengths: np.ndarray, lines: Sequence[Sequence[int]]) -> int:
    """Tokens of the rectangle that these lines of row numbers are laid out in, padding included."""
    return len(lines) * max((_tokens(lengths, line) for line in lines), default=0)


def _halves(lengths: np.ndarray, line: Sequence[int]) -> tuple[list[int], list[int]]:
    first: list[int] = []
    second: list[int] = []
    for number in line:  # longest first
        (first if _tokens(lengths, first) <= _tokens(lengths, second) else second).append(number)
    return first, second


def _tokens(lengths: np.ndarray, line: Sequence[int]) -> int:
    return sum(int(lengths[number]) for number in line)

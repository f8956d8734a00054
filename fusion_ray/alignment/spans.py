"""Token alignment by byte spans: for every pivot position the source position that has read the same bytes (design.md section 6). Called by `methods.py`.

Linear time: one walk over both sides. Positions are those of `records.teacher_schema`; `kind` numbers are `records.MatchKind`'s.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

STRICT, COMPARABLE, INSIDE, NONE = 0, 1, 2, 3


@njit(cache=True)
def match_spans(
    message_pivot: npt.NDArray[np.int64],
    start_pivot: npt.NDArray[np.int32],
    end_pivot: npt.NDArray[np.int32],
    message_source: npt.NDArray[np.int64],
    start_source: npt.NDArray[np.int32],
    end_source: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """(N,) index of the source position for every pivot position, -1 where there is none, and (N,) kind of match.

    Both sides are sorted by message (a number that is unique over all rows), then by bytes. A source token that starts where the pivot token starts
    has the same context: STRICT where it ends there too, else COMPARABLE. A pivot token that starts within a source token is INSIDE it. An empty span
    is the end of a turn and matches only the other side's end of the same turn, STRICT. Where the source has no token (its row was cut, its
    template dropped blanks): NONE.
    """
    count, total = message_pivot.size, message_source.size
    index = np.full(count, -1, np.int32)
    kind = np.full(count, 3, np.int8)
    j = 0
    for i in range(count):
        message, start, end = message_pivot[i], start_pivot[i], end_pivot[i]
        turn_ends = start == end
        while j < total and (
            message_source[j] < message
            or (
                message_source[j] == message
                and end_source[j] <= start
                and not (turn_ends and start_source[j] == start and end_source[j] == start)
            )
        ):
            j += 1
        if j == total or message_source[j] != message or start_source[j] > start:
            continue
        if turn_ends and end_source[j] != start:
            continue  # the source's content goes on here: its end of turn is elsewhere
        index[i] = j
        if start_source[j] < start:
            kind[i] = 2
        elif end_source[j] == end:
            kind[i] = 0
        else:
            kind[i] = 1
    return index, kind

"""The rating in a judge's free text, as FastChat reads it: `[[7]]`, else `[7]`, else none."""

import re

NO_RATING = -1.0
# What stands as the judgement when the judge could not be reached: FastChat's marker.
ERROR_OUTPUT = "$ERROR$"

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_SINGLE = re.compile(r"\[(\d+\.?\d*)\]")
_HIGHEST = 10.0


def parse_rating(text: str) -> float:
    """The first rating in `text`, or -1 where there is none.

    Stricter than FastChat in one point: a number above 10 is no rating (it would pull the mean without a trace) and gives -1 too.
    """
    match = _RATING.search(text) or _RATING_SINGLE.search(text)
    if match is None:
        return NO_RATING
    rating = float(match.group(1))
    return rating if rating <= _HIGHEST else NO_RATING

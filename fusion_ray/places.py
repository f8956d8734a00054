"""What is said where a folder of a model cannot be read, on this machine or in an object store. Called by models.py and checkpoints/."""

from collections.abc import Iterator
from contextlib import contextmanager


class PlaceError(OSError):
    """A place that cannot be read; the message names it and says what to do."""


@contextmanager
def told(url: str) -> Iterator[None]:
    """Errors of an object store's client, which has kinds of its own, as PlaceError; FileNotFoundError as it is."""
    try:
        yield
    except (FileNotFoundError, PlaceError):
        raise
    except Exception as error:
        raise PlaceError(
            f"cannot read {url} ({type(error).__name__}: {error}): give the URL of a model folder that this machine may read, such as s3://bucket/model "
            "(credentials come from the environment), or a folder of this machine"
        ) from error

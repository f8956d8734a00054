"""Work that is done a little before it is asked for, in one thread, in order. Called by workers/trainer.py for its micro-batches."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(make: Callable[[Given], Made], given: Iterable[Given], *, count: int = 2) -> Generator[Made]:
    """make(each) for each of `given`, in order, while up to `count` further ones are made in another thread. What `make` raises is raised in its place.

    `given` is read in the caller's thread. Closing the generator waits for what is being made.
    """
    coming: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        try:
            for each in given:
                coming.append(pool.submit(make, each))
                if len(coming) > count:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()

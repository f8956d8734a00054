"""Worker processes held to one core each, as the actors of "one actor on one core". Called by benchmarks of scaling; Linux only.

Ray's `num_cpus=1` is a promise for the scheduler and binds nothing: a worker's own threads (reading ahead, hashing, writing) take a second core where one is
idle, so that the second worker finds less than it would on a full machine.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import psutil  # type: ignore[import-untyped]

SECONDS = 0.5  # looking costs a few milliseconds of a core


def one_core_each(title: str) -> AbstractContextManager[None]:
    """While the block runs, the processes below this one whose title begins with `title` have a core each, dealt anew when one comes or goes."""
    cores = sorted(os.sched_getaffinity(0))
    return _held(title, [{core} for core in cores])


def free(title: str) -> AbstractContextManager[None]:
    """They have all cores, also those that were held before."""
    return _held(title, [os.sched_getaffinity(0)])


@contextlib.contextmanager
def _held(title: str, sets: Sequence[set[int]]) -> Iterator[None]:
    stop = threading.Event()

    def hold() -> None:
        while not stop.wait(SECONDS):
            for number, pid in enumerate(sorted(_working(title))):
                _bind(pid, sets[number % len(sets)])

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _working(title: str) -> Iterator[int]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                yield process.pid


def _bind(pid: int, cores: set[int]) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if os.sched_getaffinity(int(thread)) != cores:
                os.sched_setaffinity(int(thread), cores)

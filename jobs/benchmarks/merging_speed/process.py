"""A command as a whole process, from its start to its end: seconds, and how much memory it held. Called by `merge.py` and its test.

Private memory is what would be gone if the process were not there: anonymous pages and shared memory of it and of its children, and the pages of mapped
files that nobody else maps, such as libraries; pages of the model files are left out, for the kernel takes them back when it likes. The counters of
anonymous pages are read every two milliseconds, the mappings less often, since reading them holds the process up.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.002
MAPPINGS_INTERVAL = 0.05
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+) +(.*)$")
_BLOCK = 512  # bytes that rusage counts by


@dataclass(frozen=True)
class Finished:
    """`processor` is of all threads and children; `from_disk` what did not come from the page cache, in bytes."""

    seconds: float
    processor: float
    from_disk: int
    peak_private: int = 0  # bytes; 0 where nobody looked
    peak_anonymous: int = 0


def run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    watch: bool = False,
    leave_out: Path | None = None,
) -> Finished:
    """Run the command to its end, looking at its memory all the while if `watch`; mapped files below `leave_out` do not count.

    Raises RuntimeError with the end of what it said where it fails.
    """
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=cwd, env=None if env is None else dict(env)
        )
        try:
            private, anonymous = _watch(process.pid, leave_out) if watch else (0, 0)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, not by Popen
        if process.returncode:
            said.seek(0)
            text = said.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_inblock * _BLOCK, private, anonymous)


def _watch(process: int, leave_out: Path | None) -> tuple[int, int]:
    """The most private and the most anonymous bytes that were seen until the process ended; it is left to be waited for."""
    private = anonymous = files = 0
    family, next_mappings = [process], 0.0
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = time.perf_counter()
        if now >= next_mappings:
            family = _family(process)
            files = sum(_private_files(member, leave_out) for member in family)
            next_mappings = time.perf_counter() + MAPPINGS_INTERVAL
        held = sum(_anonymous(member) for member in family)
        anonymous = max(anonymous, held)
        private = max(private, held + files)
        time.sleep(INTERVAL)
    return private, anonymous


def _family(process: int) -> list[int]:
    """The process and everything below it, but for a child that has not begun its program: it shows its parent's memory once more."""
    found = [process]
    for member in found:  # grows while it is gone through
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{member}/task"):
                with suppress(OSError):
                    children = Path(f"/proc/{member}/task/{thread}/children").read_text(encoding="ascii").split()
                    found.extend(int(child) for child in children if _read(int(child), "maps") != _read(member, "maps"))
    return found


def _anonymous(process: int) -> int:
    """Bytes of anonymous and of shared memory; 0 for a process that is gone."""
    text = _read(process, "status")
    return 1024 * sum(int(row.split()[1]) for row in text.splitlines() if row.startswith(("RssAnon:", "RssShmem:")))


def _private_files(process: int, leave_out: Path | None) -> int:
    """Bytes of mapped files that this process alone holds and that are no anonymous copies."""
    total, counts = 0, False
    for row in _read(process, "smaps").splitlines():
        if found := _MAPPING.match(row):
            counts = found[1] != "0" and not (leave_out and Path(found[2]).is_relative_to(leave_out))
        elif counts and row.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(row.split()[1])
        elif counts and row.startswith("Anonymous:"):
            total -= int(row.split()[1])
    return 1024 * total


def _read(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

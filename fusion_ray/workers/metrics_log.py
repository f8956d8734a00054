"""The lines of metrics.jsonl, one a step, on any storage: written by rank 0, tailed by the driver. Called by stages/distill.py.

A resumed run repeats the steps after its checkpoint, so the first line of an attempt drops every old line from its step on.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from fusion_ray.store import Folder

REMOTE_SECONDS = 20.0  # object stores cannot append: there the file is written anew, at most this often


class MetricsLog:
    def __init__(self, folder: Folder, name: str) -> None:
        self.folder = folder
        self.name = name
        self._file: IO[bytes] | None = None
        self._lines: list[bytes] | None = None
        self._written = 0.0

    def append(self, figures: Mapping[str, object]) -> None:
        """Add the line of step `done` of `total`."""
        named = {"step": figures["done"], "steps": figures["total"]}
        rest = {key: value for key, value in figures.items() if key not in ("done", "total", "unit")}
        line = (json.dumps(named | rest) + "\n").encode()
        if self._lines is None:
            self._lines = [old for old in self._old() if json.loads(old)["step"] < figures["done"]]
            self.folder.write_bytes(self.name, b"".join(self._lines))
        if self.folder.is_local:
            if self._file is None:
                self._file = open(Path(self.folder.path(self.name)), "ab")  # noqa: SIM115  # open for the whole run
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._written > REMOTE_SECONDS:
            self.close()

    def close(self) -> None:
        """Everything appended is on the storage from here on."""
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._lines is not None and not self.folder.is_local:
            self.folder.write_bytes(self.name, b"".join(self._lines))
            self._written = time.monotonic()

    def _old(self) -> list[bytes]:
        if not self.folder.exists(self.name):
            return []
        lines = self.folder.read_bytes(self.name).splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"}\n")]  # a kill may have torn the last one


def last_line(folder: Folder, name: str) -> dict[str, object] | None:
    """The newest whole line, as MetricsLog.append took it; None before there is one."""
    if not folder.exists(name):
        return None
    whole = [line for line in folder.fs.tail(folder.path(name), 4096).split(b"\n")[:-1] if line.endswith(b"}")]
    if not whole or not whole[-1].startswith(b"{"):
        return None
    found = json.loads(whole[-1])
    return {"done": found.pop("step"), "total": found.pop("steps"), "unit": "steps", **found}

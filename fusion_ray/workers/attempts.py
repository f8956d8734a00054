"""Which rows an engine had in hand when it died: markers beside the shards, so that a row that kills engines is found and left out.

Before the engine reads a batch its ids are written down; a marker that is still there when the shard is taken up again belongs to a dead process. The rows of
its batch are then read one at a time, and a row on which two engines died while it was alone is quarantined. Called by teach_shard.py.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fusion_ray.store import Artifact

FOLDER = "_attempts"
DEATHS = 2
MAX_TRIES = 25  # each poisonous row takes three


class TeachError(RuntimeError):
    """A shard whose engines die again and again without a row to blame."""


@dataclass
class _State:
    tries: int = 0
    suspects: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    error: str = ""
    pid: int = 0  # of the last to take the shard up: for people who look


class Attempts:
    """The markers of one shard of `out`. Making it takes the shard up: what an earlier attempt left running is held against it.

    Raises TeachError when the shard was taken up MAX_TRIES times.
    """

    def __init__(self, out: Artifact, shard: str) -> None:
        self._out = out
        self._name = f"{FOLDER}/{shard}.json"
        self._state = _State(**out.read_json(self._name)) if out.exists(self._name) else _State()  # type: ignore[arg-type]
        state = self._state
        if len(state.running) == 1:
            name = state.running[0]
            state.deaths[name] = state.deaths.get(name, 0) + 1
        state.suspects = sorted({*state.suspects, *state.running})
        state.running = []
        state.tries += 1
        state.pid = os.getpid()
        if state.tries > MAX_TRIES:
            raise TeachError(
                f"{shard} was taken up {MAX_TRIES} times and never finished; the last error: {state.error or 'the process was killed'}. "
                f"Mend the cause (often memory: resources.teach.engine.max_num_batched_tokens) and remove {out.url}/{self._name}"
            )
        self._write()

    @property
    def alone(self) -> frozenset[str]:
        """Rows that were in hand when an engine died: to be read one at a time."""
        return frozenset(self._state.suspects) - self.quarantined

    @property
    def quarantined(self) -> frozenset[str]:
        return frozenset(name for name, deaths in self._state.deaths.items() if deaths >= DEATHS)

    def starting(self, ids: Sequence[str]) -> None:
        self._state.running = list(ids)
        self._write()

    def failed(self, error: BaseException) -> None:
        """The engine broke with an error that names no row; the process is about to end."""
        self._state.error = f"{type(error).__name__}: {error}"[:500]
        self._write()

    def done(self) -> None:
        self._out.remove(self._name)

    def _write(self) -> None:
        """Not flushed: a marker has to outlive a process, not a power cut."""
        self._out.write_json(self._name, asdict(self._state), flushed=False)

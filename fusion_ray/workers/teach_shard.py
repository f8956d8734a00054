"""One shard of the corpus taught and committed, exactly once whatever dies. Called by the actor of stages/teach.py and, without Ray, by tests."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Protocol

from fusion_ray.corpus.shards import decode_conversations
from fusion_ray.logprobs.codec import encode
from fusion_ray.records import Conversation
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.attempts import Attempts
from fusion_ray.workers.teacher import Starting, Taught

logger = logging.getLogger(__name__)


class Teaches(Protocol):
    """What a Teacher does."""

    def teach(
        self,
        conversations: Sequence[Conversation],
        *,
        alone: Collection[str] = (),
        quarantined: Collection[str] = (),
        starting: Starting = ...,
    ) -> Taught: ...


class EngineBrokenError(RuntimeError):
    """The engine failed on a shard in a way that says nothing of the rows; it must not be used again."""


def teach_shard(teacher: Teaches, corpus: Artifact, out: Artifact, name: str) -> Unit:
    """Teach shard `name` of `corpus` into `out`, unless it is there already, and return its record.

    unit.info: the counts of teacher.Counts and `missing`, the rows that are not in the shard with their reasons. Raises EngineBrokenError when the engine is
    to be replaced, TeachError when that does not help any more, ValueError and OSError for what a user must mend.
    """
    done = out.unit(name)
    if done is not None:
        return done
    attempts = Attempts(out, name)
    conversations = decode_conversations(corpus.read_bytes(name))
    started = time.monotonic()
    try:
        taught = teacher.teach(
            conversations, alone=attempts.alone, quarantined=attempts.quarantined, starting=attempts.starting
        )
    except (ValueError, OSError):
        attempts.starting(
            []
        )  # this process lives: the rows in hand are not to blame, least of all for a server that is away
        raise
    except Exception as error:
        attempts.failed(error)
        raise EngineBrokenError(f"the engine broke on {name}: {type(error).__name__}: {error}") from error
    info = asdict(taught.counts) | {"missing": [asdict(row) for row in taught.rejected]}
    unit = out.commit_bytes(name, encode(taught.table), rows=taught.counts.rows, info=info)
    attempts.done()
    seconds = time.monotonic() - started
    logger.info("%s: %d rows, %.0f tokens/s", name, taught.counts.rows, taught.counts.tokens / max(seconds, 1e-9))
    return unit

"""The corpus stage: conversation files in, shards of checked conversations out, malformed rows kept apart with their reason. No Ray."""

import logging
from collections.abc import Sequence

from fusion_ray.corpus.readers import Rejected, read_conversations
from fusion_ray.corpus.shards import REJECTED, encode_conversations, encode_rejected, shard_name
from fusion_ray.records import Conversation, Report
from fusion_ray.store import Artifact, Manifest, Unit

log = logging.getLogger(__name__)
SHOWN = 3


def ingest(
    out: Artifact,
    *,
    paths: Sequence[str],
    format: str,
    rows_per_shard: int,
    max_rows: int | None,
    max_rejected: float,
    report: Report,
) -> Manifest:
    """Read `paths` into shards of `rows_per_shard` conversations (at most `max_rows` in all), and seal.

    manifest.info: rows, rejected, reasons {reason without its particulars: count}. Raises ValueError when more than `max_rejected` (a share) of
    the rows are malformed, naming file, row and the first reasons, and when no conversation is left.
    """
    if out.sealed:
        return out.manifest()
    log.info("corpus: reading %s", ", ".join(paths))
    units: list[Unit] = []
    rejected: list[Rejected] = []
    waiting: list[Conversation] = []
    rows = 0
    for row in read_conversations(paths, format=format):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        waiting.append(row)
        rows += 1
        if len(waiting) == rows_per_shard:
            units.append(_commit(out, len(units), waiting))
            waiting = []
            report({"done": rows, "total": max_rows, "unit": "rows", "rejected": len(rejected)})
        if rows == max_rows:
            break
    if waiting:
        units.append(_commit(out, len(units), waiting))
    _check(paths, rows, rejected, max_rejected)
    units.append(out.commit_bytes(REJECTED, encode_rejected(rejected), rows=len(rejected)))
    report({"done": rows, "total": rows, "unit": "rows", "rejected": len(rejected)})
    log.info("corpus: %d rows in %d shards, %d rejected", rows, len(units) - 1, len(rejected))
    return out.seal(units, {"rows": rows, "rejected": len(rejected), "shards": len(units) - 1})


def _commit(out: Artifact, number: int, conversations: Sequence[Conversation]) -> Unit:
    name = shard_name(number)
    return out.unit(name) or out.commit_bytes(name, encode_conversations(conversations), rows=len(conversations))


def _check(paths: Sequence[str], rows: int, rejected: Sequence[Rejected], max_rejected: float) -> None:
    first = "; ".join(f"{bad.dataset} row {bad.row}: {bad.reason}" for bad in rejected[:SHOWN])
    total = rows + len(rejected)
    if rows == 0:
        why = f"all {total} rows were rejected, the first: {first}" if rejected else "there are no rows"
        raise ValueError(f"the corpus is empty (corpus.path {', '.join(paths)}): {why}")
    if len(rejected) > max_rejected * total:
        raise ValueError(
            f"{len(rejected)} of {total} rows of the corpus are malformed, more than corpus.max_rejected = {max_rejected} allows. "
            f"The first: {first}. Mend these rows or raise corpus.max_rejected"
        )

"""The corpus stage: conversation files in, shards of checked conversations out, malformed rows kept apart with their reason. No Ray.

Memory does not grow with the corpus: what is held is one shard, one group of rejected rows, the shuffle buffer, and of each row seen a digest on disk.
"""

import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath

from fusion_ray.corpus.mixture import Source, interleave, shuffled
from fusion_ray.corpus.readers import Rejected, read_rows, seen_before
from fusion_ray.corpus.rows import content_id
from fusion_ray.corpus.seen import Seen, id_digest
from fusion_ray.corpus.shards import REJECTED, RejectedFile, encode_conversations, shard_name
from fusion_ray.records import Conversation, Report
from fusion_ray.store import Artifact, Manifest, Unit

log = logging.getLogger(__name__)
SHOWN = 3
SHARD_CHARACTERS = 64 << 20  # a shard of very long conversations ends here, before it has rows_per_shard


@dataclass
class Tally:
    """What became of the rows of one source: `read` is the sum of the others. Duplicates are counted alone, as nothing is lost with them."""

    read: int = 0
    kept: int = 0
    rejected: int = 0
    duplicates: int = 0


def ingest(
    out: Artifact,
    *,
    paths: Sequence[str] = (),
    mixture: Sequence[Source] = (),
    format: str,
    rows_per_shard: int,
    max_rows: int | None,
    max_rejected: float,
    deduplicate: bool = False,
    shuffle_rows: int = 0,
    seed: int = 0,
    report: Report,
) -> Manifest:
    """Read `paths` one after another, or the sources of `mixture` by weight, into shards of `rows_per_shard` conversations, and seal.

    `max_rows` is of the whole; `deduplicate` leaves out what has the messages of an earlier row. manifest.info: rows, rejected, duplicates, shards, and
    `sources`: the Tally of each file of `paths` or source of `mixture`. Raises ValueError when more than `max_rejected` (a share) of the rows are malformed,
    naming file, row and the first reasons, when a source of a mixture has no conversation, and when none is left at all.
    """
    if out.sealed:
        return out.manifest()
    sources = list(mixture) or [Source(PurePosixPath(path).name, (path,), format, "corpus.path") for path in paths]
    log.info("corpus: reading %s", ", ".join(path for source in sources for path in source.paths))
    tallies = {source.name: Tally() for source in sources}
    units: list[Unit] = []
    waiting: list[Conversation] = []
    rows = size = 0
    with tempfile.TemporaryDirectory() as folder:
        with RejectedFile(Path(folder) / REJECTED) as rejected:
            reader = _Reader(rejected, deduplicate=deduplicate, mixed=bool(mixture))
            streams = [reader.conversations(source, tallies[source.name]) for source in sources]
            for row in _ordered(streams, mixture, max_rows=max_rows, shuffle_rows=shuffle_rows, seed=seed):
                waiting.append(row)
                rows += 1
                size += sum(len(message.content) for message in row.messages)
                if len(waiting) == rows_per_shard or size > SHARD_CHARACTERS:
                    units.append(_commit(out, len(units), waiting))
                    waiting, size = [], 0
                    report({"done": rows, "total": max_rows, "unit": "rows", "rejected": rejected.rows})
            if waiting:
                units.append(_commit(out, len(units), waiting))
        _check(sources, rows, tallies, reader.first, max_rejected)
        units.append(out.commit_file(REJECTED, rejected.path, rows=rejected.rows))
    duplicates = sum(tally.duplicates for tally in tallies.values())
    report({"done": rows, "total": rows, "unit": "rows", "rejected": rejected.rows})
    log.info(
        "corpus: %d rows in %d shards, %d rejected, %d duplicates", rows, len(units) - 1, rejected.rows, duplicates
    )
    if mixture:
        log.info("corpus: kept %s", ", ".join(f"{tally.kept} of {name}" for name, tally in tallies.items()))
    info = {"rows": rows, "rejected": rejected.rows, "duplicates": duplicates, "shards": len(units) - 1}
    return out.seal(units, info | {"sources": {name: asdict(tally) for name, tally in tallies.items()}})


class _Reader:
    """Reads sources and takes out what is no conversation or was there before. `first` are the first rejected rows."""

    def __init__(self, rejected: RejectedFile, *, deduplicate: bool, mixed: bool) -> None:
        self._rejected, self._deduplicate, self._mixed = rejected, deduplicate, mixed
        self._ids, self._contents = Seen(), Seen()
        self.first: list[Rejected] = []

    def conversations(self, source: Source, tally: Tally) -> Iterator[Conversation]:
        """The source's conversations, whose ids no other has; counts into `tally`. Raises ValueError where a source of a mixture has none."""
        own: list[Rejected] = []
        for path in source.paths:
            if tally.kept == source.max_rows:
                return
            file = PurePosixPath(path).name
            dataset = file if not self._mixed else source.name if len(source.paths) == 1 else f"{source.name}:{file}"
            for number, row in read_rows(path, format=source.format, dataset=dataset, key=source.key):
                tally.read += 1
                found = self._sorted_out(row, number, source)
                if found is None:
                    tally.duplicates += 1
                elif isinstance(found, Rejected):
                    tally.rejected += 1
                    for shown in (self.first, own):
                        shown += [found] if len(shown) < SHOWN else []
                    self._rejected.add(found)
                else:
                    tally.kept += 1
                    yield found
                    if tally.kept == source.max_rows:
                        return
        if self._mixed and not tally.kept and not tally.duplicates:
            why = f", the first: {_tell(own)}" if own else ""
            raise ValueError(
                f"{source.key} ({source.name}) gave no conversation; {tally.rejected} of its {tally.read} rows were rejected{why}. "
                "Give another file or leave the source out"
            )

    def _sorted_out(self, row: Conversation | Rejected, number: int, source: Source) -> Conversation | Rejected | None:
        """The row, or why it is rejected; None for a duplicate."""
        if isinstance(row, Rejected):
            return row
        content = content_id(row.messages)
        own = row.id != content
        digest = bytes.fromhex(content)
        if self._deduplicate and digest in self._contents:
            return None
        if own and self._mixed:  # many public sets number their rows from 0
            row = replace(row, id=f"{source.name}/{row.id}")
        if not self._ids.add(id_digest(row.id)):
            return seen_before(row, number) if own else None
        if self._deduplicate:  # only now: what is rejected must not hide a good row with the same messages
            self._contents.add(digest)
        return row


def _ordered(
    streams: Sequence[Iterator[Conversation]],
    mixture: Sequence[Source],
    *,
    max_rows: int | None,
    shuffle_rows: int,
    seed: int,
) -> Iterator[Conversation]:
    """At most `max_rows` conversations: by weight or one source after another, then shuffled."""
    generator = random.Random(seed)
    rows: Iterator[Conversation] = chain.from_iterable(streams)
    if mixture:
        rows = interleave(streams, weights=[source.weight for source in mixture], generator=generator)
    rows = islice(rows, max_rows)
    return shuffled(rows, size=shuffle_rows, generator=generator) if shuffle_rows else rows


def _commit(out: Artifact, number: int, conversations: Sequence[Conversation]) -> Unit:
    name = shard_name(number)
    return out.unit(name) or out.commit_bytes(name, encode_conversations(conversations), rows=len(conversations))


def _check(
    sources: Sequence[Source], rows: int, tallies: Mapping[str, Tally], first: Sequence[Rejected], max_rejected: float
) -> None:
    total, rejected = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("read", "rejected"))
    if rows == 0:
        why = f"all {total} rows were rejected, the first: {_tell(first)}" if rejected else "there are no rows"
        where = ", ".join(f"{source.key} {path}" for source in sources for path in source.paths)
        raise ValueError(f"the corpus is empty ({where}): {why}")
    if rejected > max_rejected * total:
        raise ValueError(
            f"{rejected} of {total} rows of the corpus are malformed, more than corpus.max_rejected = {max_rejected} allows. "
            f"The first: {_tell(first)}. Mend these rows or raise corpus.max_rejected"
        )


def _tell(rejected: Sequence[Rejected]) -> str:
    return "; ".join(f"{bad.dataset} row {bad.row}: {bad.reason}" for bad in rejected)

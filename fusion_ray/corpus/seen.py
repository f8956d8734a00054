"""Which digests were seen before, in memory that does not grow with their number. Called by readers.py and ingest.py.

A B-tree of SQLite in a temporary file that it alone knows: about 25 bytes of disk for a 16-byte digest, and CACHE bytes of memory however many there are.
"""

import hashlib
import sqlite3

CACHE = 8 << 20
DIGEST = 16  # bytes: among 10 million rows two that differ meet with a probability of 1e-25


class Seen:
    """A set of digests that is gone with the object."""

    def __init__(self) -> None:
        # "" is a temporary file, made once the cache is full.
        self._database = sqlite3.connect("", isolation_level=None)
        # Nothing is ever read again after a crash, so that nothing is logged; one transaction that never ends writes a page only to make room.
        for command in (
            f"PRAGMA cache_size = -{CACHE >> 10}",
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",
        ):
            self._database.execute(command)
        self._cursor = self._database.cursor()

    def __contains__(self, digest: bytes) -> bool:
        return self._run("SELECT 1 FROM seen WHERE digest = ?", digest).fetchone() is not None

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new. Raises OSError where the temporary file cannot be written."""
        return self._run("INSERT OR IGNORE INTO seen VALUES (?)", digest).rowcount == 1

    def _run(self, command: str, digest: bytes) -> sqlite3.Cursor:
        try:
            return self._cursor.execute(command, (digest,))
        except sqlite3.OperationalError as error:
            raise OSError(
                f"cannot note which rows of the corpus were seen: {error}. About 25 bytes a row are written to the temporary folder: free space "
                "there, or set SQLITE_TMPDIR to another folder"
            ) from error


def id_digest(name: str) -> bytes:
    """The digest of a conversation's id, apart from those of contents."""
    return hashlib.blake2b(name.encode("utf-8"), digest_size=DIGEST, person=b"id").digest()

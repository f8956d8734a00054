"""A new file written past the page cache: pieces come in any order and from several threads, leave in whole chunks, and are hashed on the way.

What a merge writes is as large as a model. Through the cache every page of it would be found, filled, copied and given back, which takes longer than the
arithmetic and drives out the models that are read. Where the file system wants the cache, the file is flushed as it grows, so that little is left to wait
for at the end either way.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 4 << 20  # bytes
CHUNKS = 12  # in memory at a time, where pieces come roughly in order; more is no faster
_ALIGNMENT = 4096  # of places, lengths and memory: the most that a disk asks for
_FLUSHED_AT_A_TIME = 64 << 20  # bytes, through the cache
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass
class _Chunk:
    number: int
    memory: mmap.mmap | None
    filled: int = 0
    whole: bool = False
    stored: bool = False


class DirectFile:
    """Of a known size. Every byte is written once, then comes `finish`; `close` in any case. What the disk says against it is raised by a later call."""

    def __init__(self, path: Path, size: int) -> None:
        """Raises OSError."""
        self._size = size
        self._chunk_size = min(CHUNK, _aligned(size))
        self._changed = threading.Condition()
        self._chunks: dict[int, _Chunk] = {}  # that came and are not yet both stored and hashed
        self._free: list[mmap.mmap] = []
        self._in_memory = 0  # chunks
        self._storing = 0  # chunks on their way
        self._hashed = 0  # chunks
        self._hashing = False
        self._hash = hashlib.sha256()
        self._error: BaseException | None = None
        self._unflushed = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            self._file, self._direct = os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)
            self._file, self._direct = os.open(path, flags, 0o666), False
        self._disk, self._hasher = ThreadPoolExecutor(1, "disk"), ThreadPoolExecutor(1, "hash")
        try:
            os.ftruncate(self._file, size)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Bytes from `offset` on; they are copied. Raises OSError."""
        while data:
            number, start = divmod(offset, self._chunk_size)
            piece = data[: self._length(number) - start]
            chunk = self._chunk(number)
            assert chunk.memory is not None
            chunk.memory[start : start + len(piece)] = piece
            with self._changed:
                chunk.filled += len(piece)
                if chunk.filled == self._length(number):
                    chunk.whole = True
                    self._storing += 1
                    self._disk.submit(self._store, chunk)
                    self._hash_on()
            data, offset = data[len(piece) :], offset + len(piece)

    def finish(self) -> str:
        """Wait until all is on the disk; its sha256. Raises OSError."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._storing or self._hashing))
            self._check()
        assert self._hashed * self._chunk_size >= self._size, "bytes are missing"
        os.ftruncate(self._file, self._size)  # the last chunk went out with what its last sector holds beyond
        os.fsync(self._file)
        return self._hash.hexdigest()

    def close(self) -> None:
        """Waits for what is on its way."""
        for threads in (self._disk, self._hasher):
            threads.shutdown(cancel_futures=True)
        os.close(self._file)

    def _length(self, number: int) -> int:
        return min(self._chunk_size, self._size - number * self._chunk_size)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _chunk(self, number: int) -> _Chunk:
        """A chunk to be filled. Where all memory is taken, waits for one to be stored and hashed; where none will be, for the next to be hashed has not come
        yet, takes the memory of one that is stored."""
        with self._changed:
            while True:
                self._check()
                if number in self._chunks:
                    return self._chunks[number]
                if not self._free and self._in_memory < CHUNKS:
                    self._take_more()
                if not self._free and not self._storing and not self._hashing and not self._give_up_one():
                    self._take_more()
                if self._free:
                    chunk = self._chunks[number] = _Chunk(number, self._free.pop())
                    return chunk
                self._changed.wait()

    def _take_more(self) -> None:
        self._in_memory += 1
        self._free.append(mmap.mmap(-1, self._chunk_size))

    def _give_up_one(self) -> bool:
        """The memory of the stored chunk that is hashed last, if any; it is read again when its turn comes."""
        for number in sorted(self._chunks, reverse=True):
            chunk = self._chunks[number]
            if chunk.stored and chunk.memory is not None:
                self._free.append(chunk.memory)
                chunk.memory = None
                return True
        return False

    def _store(self, chunk: _Chunk) -> None:
        assert chunk.memory is not None
        try:
            if self._error is None:
                self._to_disk(chunk.number * self._chunk_size, chunk.memory, _aligned(self._length(chunk.number)))
        except BaseException as error:
            self._error = error
        with self._changed:
            self._storing -= 1
            chunk.stored = True
            self._drop_done(chunk)
            self._changed.notify_all()

    def _to_disk(self, offset: int, memory: mmap.mmap, size: int) -> None:
        with memoryview(memory) as data:
            at = 0
            while at < size:
                try:
                    at += os.pwrite(self._file, data[at:size], offset + at)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._through_the_cache()
        self._unflushed += size
        if not self._direct and self._unflushed >= _FLUSHED_AT_A_TIME:
            os.fsync(self._file)
            self._unflushed = 0

    def _through_the_cache(self) -> None:
        """From now on: this file system asks for another alignment."""
        fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT)
        self._direct = False

    def _hash_on(self) -> None:
        """Called with the lock."""
        if not self._hashing and self._hashable() is not None:
            self._hashing = True
            self._hasher.submit(self._hash_all)

    def _hashable(self) -> _Chunk | None:
        chunk = self._chunks.get(self._hashed)
        return chunk if chunk is not None and chunk.whole else None

    def _hash_all(self) -> None:
        """Every whole chunk whose turn has come."""
        while True:
            with self._changed:
                chunk = self._hashable()
                if chunk is None or self._error is not None:
                    self._hashing = False
                    self._changed.notify_all()
                    return
                memory = chunk.memory
            try:
                self._hash_chunk(chunk.number, memory)
            except BaseException as error:
                self._error = error
            with self._changed:
                self._hashed += 1
                self._drop_done(chunk)
                self._changed.notify_all()

    def _hash_chunk(self, number: int, memory: mmap.mmap | None) -> None:
        size = self._length(number)
        if memory is None:
            memory = mmap.mmap(-1, self._chunk_size)
            count = os.preadv(self._file, [memory], number * self._chunk_size)
            if count < size:
                raise OSError(errno.EIO, "the file became shorter while it was written")
        with memoryview(memory) as data:
            self._hash.update(data[:size])

    def _drop_done(self, chunk: _Chunk) -> None:
        """Called with the lock."""
        if chunk.stored and chunk.number < self._hashed:
            del self._chunks[chunk.number]
            if chunk.memory is not None:
                self._free.append(chunk.memory)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
